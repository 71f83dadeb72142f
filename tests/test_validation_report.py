"""Error statistics and `mist validate`: shapes, exit codes, what goes where, folders that are continued or refused."""

from __future__ import annotations

import csv
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from measured import CLOSED, OFFLINE, OPEN, STATIC, invoke, lines, point_file, write_points
from mist.scenario.build import run
from mist.validation import evaluate as evaluation
from mist.validation.evaluate import Comparison, Evaluated
from mist.validation.points import PointFile
from mist.validation.score import family_of, kind_of, report, statistics

QUICK = ("--perf", "roofline", "--workers", 1)
KEYS = {"n", "median_ape", "mean_ape", "p90_ape", "bias"}


def compared(simulated: float, *, source: str = "s", trust: str = "A", saturated: bool = False,
             metric: str = "ttft_mean_ms", device: str = "d") -> Comparison:  # fmt: skip
    error = 100 * (simulated / 100 - 1)
    return Comparison("i", "p", source, metric, 100.0, simulated, abs(error), error, saturated, trust, device,
                      "vllm", "m", "vllm-0.10")  # fmt: skip


def document(*comparisons: Comparison) -> dict[str, Any]:
    file = PointFile(Path("points.csv"), [], len(comparisons), [])
    return report(file, [Evaluated("p", comparisons, ())])


def test_statistics_are_of_sizes_and_bias_of_signs() -> None:
    assert statistics([-10, 10, 20, -40]) == {"n": 4, "median_ape": 15, "mean_ape": 20, "p90_ape": 34, "bias": -5}


def test_only_what_is_trusted_and_not_saturated_is_judged() -> None:
    found = document(
        compared(110), compared(130, trust="B"), compared(200, trust="C"), compared(300, saturated=True),
        compared(400, saturated=True, trust="C"),
    )  # fmt: skip
    assert found["sources"]["s"]["ttft_mean_ms"]["n"] == 2
    assert found["sources"]["s"]["ttft_mean_ms"]["median_ape"] == pytest.approx(20)
    assert found["saturated"]["s"]["ttft_mean_ms"]["n"] == 1
    assert {trust: table["s"]["ttft_mean_ms"]["mean_ape"] for trust, table in found["trust"].items()} == {
        "A": 10, "B": 30, "C": 100,
    }  # fmt: skip
    assert len(found["points"]) == 5


def test_families_count_once_however_large() -> None:
    small = [compared(120, source="blis_a")]
    found = document(*[compared(110, source="llm_inference_bench_quant")] * 100, *small)["families"]
    assert found["over_families"]["ttft"] == {"families": 2, "mean_of_medians": 15}
    assert set(found["by_family"]) == {"llm_inference_bench", "blis"}
    assert family_of("mine") == "mine"


@pytest.mark.parametrize(
    ("metric", "kind"),
    [("ttft_p99_ms", "ttft_tail"), ("ttft_p50_ms", "ttft"), ("batch_prefill_ms", "ttft"), ("batch_e2e_s", "e2e"),
     ("output_tokens_per_s", "throughput"), ("makespan_s", "makespan"), ("itl_mean_ms", "itl")],
)  # fmt: skip
def test_kinds_of_metrics(metric: str, kind: str) -> None:
    assert kind_of(metric) == kind


# the command


def test_the_document_has_the_promised_shape(tmp_path: Path) -> None:
    points: list[Mapping[str, str]] = [
        {**STATIC, "measured": "batch_e2e_s=0.2 tpot_mean_ms=9"},
        {**CLOSED, "trust": "C", "measured": "ttft_mean_ms=20"},
        {**OFFLINE, "trust": "B", "measured": "output_tokens_per_s=500"},
        {**OPEN, "device": "h900", "measured": "ttft_mean_ms=20 tpot_mean_ms=9"},
        {**OPEN, "runnable": "false", "why_not": "no seed"},
    ]
    result = invoke("validate", write_points(tmp_path, *points), "--json", *QUICK)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout, parse_constant=pytest.fail)
    assert found["sources"]["made"].keys() == {"batch_e2e_s", "tpot_mean_ms"}
    tables = [found["sources"], found["saturated"], *found["trust"].values(), found["devices"], found["engines"],
              found["models"]]  # fmt: skip
    assert all(figures.keys() == KEYS for table in tables for group in table.values() for figures in group.values())
    assert found["saturated"]["made"].keys() == {"output_tokens_per_s"}
    assert found["trust"].keys() == {"A", "B", "C"}
    assert found["trust"]["C"]["made"].keys() == {"ttft_mean_ms"}
    assert found["devices"].keys() == {"h100-sxm"}
    assert found["models"].keys() == {"meta-llama/Llama-3.1-8B"}
    row = found["points"][0]
    assert {"id", "point", "source", "metric", "measured", "simulated", "ape", "saturated", "trust"} <= row.keys()
    assert row["ape"] == pytest.approx(100 * abs(row["simulated"] / row["measured"] - 1), abs=1e-3)
    coverage = found["coverage"]
    assert (coverage["rows"], coverage["runnable"], coverage["run"]) == (7, 6, 4)
    assert {row["id"]: row["reason"] for row in coverage["skipped"]}["p4-0"] == "no seed"
    assert len(coverage["skipped"]) == 3


def test_tables_are_on_stdout_and_skips_come_most_frequent_first(tmp_path: Path) -> None:
    two = {**OPEN, "device": "h900", "measured": "ttft_mean_ms=20 tpot_mean_ms=9"}
    path = write_points(tmp_path, {**OPEN, "isl": ""}, two, STATIC, OFFLINE)
    result = invoke("validate", path, *QUICK)
    assert result.exit_code == 0
    assert result.stderr == ""
    out = result.stdout
    assert "2 of 5 runnable rows were compared (40.0 %); the file has 5." in out
    assert out.index("By source") < out.index("Saturated") < out.index("By device") < out.index("Not compared")
    assert out.index("h900") < out.index("isl is empty")


def test_nothing_to_compare_is_no_error(tmp_path: Path) -> None:
    for path in (point_file(tmp_path, lines()), write_points(tmp_path, {**OPEN, "engine": "warp9"}, name="b.csv")):
        assert invoke("validate", path, *QUICK).exit_code == 0
        found = json.loads(invoke("validate", path, "--json", *QUICK).stdout)
        assert (found["sources"], found["points"]) == ({}, [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source", "maid"], "there is no source 'maid'"),
        (["--perf", "rooflime"], "did you mean 'roofline'"),
        (["--trust", "D"], "'D' is not one of"),
        (["--sample", "0"], "0 is not in the range"),
        (["--out", "points.csv"], "is a file"),
    ],
)
def test_wrong_options_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke("validate", write_points(tmp_path, STATIC).name, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert invoke("validate", "lost.csv").exit_code == 2


def test_samples_sources_and_trusts_choose_points(tmp_path: Path) -> None:
    points = [{**STATIC, "source": s, "trust": t, "batch_size": str(n), "measured": "batch_e2e_s=1"}
              for s in "ab" for n, t in enumerate("ABC", 1)]  # fmt: skip
    path = write_points(tmp_path, *points)

    def names(*arguments: object) -> list[str]:
        found = json.loads(invoke("validate", path, "--json", *QUICK, *arguments).stdout)
        coverage = found["coverage"]
        assert (coverage["sampled"] or coverage["rows"]) == len(found["points"])
        return [row["point"] for row in found["points"]]

    assert names("--sample", 1) == ["p1", "p4"]
    assert names("--source", "b", "--trust", "A", "--trust", "C") == ["p3", "p5"]


# folders


def test_results_are_kept_and_not_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, out = write_points(tmp_path, STATIC, {**OPEN, "device": "h900"}), tmp_path / "new" / "out"
    first = invoke("validate", path, "--out", out, "--json", *QUICK)
    assert first.exit_code == 0, first.output
    assert sorted(file.name for file in out.iterdir()) == ["comparisons.csv", "journal.jsonl", "validation.json"]
    assert json.loads((out / "validation.json").read_text()) == json.loads(first.stdout)
    with (out / "comparisons.csv").open(newline="") as file:
        assert [row["id"] for row in csv.DictReader(file)] == ["p0-0"]
    again = invoke("validate", path, "--out", out, *QUICK)
    assert again.exit_code == 2
    assert "is there already" in again.stderr
    monkeypatch.setattr(evaluation, "run", lambda _: pytest.fail("ran again"))
    over = invoke("validate", path, "--out", out, "--overwrite", "--json", *QUICK)
    assert (over.exit_code, over.stdout) == (0, first.stdout)


def test_a_cut_validation_goes_on_by_the_same_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, out = write_points(tmp_path, *({**STATIC, "batch_size": str(n)} for n in (1, 2, 3))), tmp_path / "out"
    ran: list[str] = []

    def interrupted(scenario: Any) -> Any:
        if scenario.name == "p2":
            raise KeyboardInterrupt
        return run(scenario)

    def counted(scenario: Any) -> Any:
        ran.append(scenario.name)
        return run(scenario)

    monkeypatch.setattr(evaluation, "run", interrupted)
    assert invoke("validate", path, "--out", out, *QUICK).exit_code == 130
    assert sorted(file.name for file in out.iterdir()) == ["journal.jsonl"]
    monkeypatch.setattr(evaluation, "run", counted)
    result = invoke("validate", path, "--out", out, "--json", *QUICK)
    assert result.exit_code == 0
    assert ran == ["p2"]
    assert "are not run again" in result.stderr
    assert json.loads(result.stdout)["coverage"]["run"] == 3


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    path, out = write_points(tmp_path, STATIC), tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("x")
    assert invoke("validate", path, "--out", out, *QUICK).exit_code == 2
    assert invoke("validate", path, "--out", out, "--overwrite", *QUICK).exit_code == 0
    assert (out / "thesis.tex").read_text() == "x"


def test_progress_says_how_long_it_takes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from mist.cli.output import progress_of

    clock = iter([0.0, 0.0, 5.0, 20.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with progress_of("points") as progress:
        for done in (10, 11, 20):
            progress(done, 40)
    assert capsys.readouterr().err == "20 of 40 points, about 40 s left\n"


# real measurements


def test_a_sample_of_real_points_is_compared() -> None:
    folder = os.environ.get("MIST_DATA")
    if not folder or not (path := Path(folder) / "validation" / "points.csv").is_file():
        pytest.skip("needs the measured points: MIST_DATA=FOLDER with validation/points.csv")
    found = json.loads(invoke("validate", path, "--sample", 1, "--perf", "roofline", "--json").stdout)
    coverage = found["coverage"]
    not_runnable = coverage["rows"] - coverage["runnable"]
    assert coverage["run"] + len(coverage["skipped"]) == coverage["sampled"] + not_runnable
    assert coverage["run"] >= 0.9 * coverage["sampled"]
    assert not [row for row in coverage["skipped"] if "the simulator failed" in row["reason"]]
    assert len({row["source"] for row in found["points"]}) >= 20
