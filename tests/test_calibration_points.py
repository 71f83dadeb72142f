"""Constants fitted to measured points: those that made the values are found again, and what can't be told is said."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from measured import CLOSED, OPEN, invoke, write_points, write_request_list
from mist.engine import EngineProfile
from mist.scenario import catalogue, load
from mist.validation.evaluate import evaluate
from mist.validation.points import read_points

ENGINE, VERSION = "vllm-0.6", {"engine_version": "0.6.3"}  # host and device in turn: both show
QUICK = ("--perf", "roofline", "--workers", 1)
METRICS = ("ttft_mean_ms", "tpot_mean_ms", "e2e_mean_ms")
LOADS = [{**CLOSED, **VERSION, "concurrency": str(n), "isl": str(isl)} for n in (1, 4, 12) for isl in (64, 1500)]
LOADS += [{**OPEN, **VERSION, "rate_per_s": "3"}]


def made_with(folder: Path, constants: Mapping[str, Any], loads: list[dict[str, str]] = LOADS) -> Path:
    """A file of what the simulator itself says of these loads with these constants."""
    metrics = " ".join(f"{metric}=1" for metric in METRICS)
    file = read_points(write_points(folder, *({**load, "measured": metrics} for load in loads), name="draft.csv"))
    found = evaluate(file.points, folder, overrides={ENGINE: constants}, perf=["roofline"], workers=1)
    points = [
        {**load, "measured": " ".join(f"{c.metric}={c.simulated:.8g}" for c in each.comparisons)}
        for load, each in zip(loads, found, strict=True)
    ]
    return write_points(folder, *points)


def test_the_constants_that_made_the_values_are_found_again(tmp_path: Path) -> None:
    path = made_with(tmp_path, {"step_overhead_ns": 9_000_000, "request_overhead_ns": 40_000_000})
    out = tmp_path / "profile.yaml"
    result = invoke("calibrate", "points", path, "--engine", ENGINE, "--fit", "step_overhead_ns,request_overhead_ns",
                    "--out", out, "--json", "--date", "2026-01-02", *QUICK)  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout, parse_constant=pytest.fail)
    constants = found["constants"]
    assert constants["step_overhead_ns"]["value"] == pytest.approx(9_000_000, rel=0.03)
    assert constants["request_overhead_ns"]["value"] == pytest.approx(40_000_000, rel=0.03)
    assert found["after_pct"] < 1 < 5 < found["before_pct"]
    assert found["left_out_pct"] < 1
    assert (found["num_points"], found["num_values"]) == (7, 21)
    profile = yaml.safe_load(out.read_text())
    assert profile == found["profile"]
    shipped = catalogue.mapping("engines", ENGINE)
    assert {key: profile[key] for key in shipped.keys() - {*constants, "sources"}} == {
        key: shipped[key] for key in shipped.keys() - {*constants, "sources"}
    }
    for constant in constants:
        assert "2026-01-02: 21 values of 7 points in points.csv (made)" in profile["sources"][constant]
    assert shipped["sources"].items() <= {**profile["sources"], **shipped["sources"]}.items()


def test_a_slower_kernel_is_found_again(tmp_path: Path) -> None:
    path = made_with(tmp_path, {"time_factors": {"gemm": 1.4}}, LOADS[:4])
    result = invoke("calibrate", "points", path, "--engine", ENGINE, "--fit", "time_factors.gemm", "--json", *QUICK)
    found = json.loads(result.stdout)
    # what is fitted is drawn towards 1 a little
    assert found["constants"]["time_factors.gemm"]["value"] == pytest.approx(1.4, rel=0.05)
    assert found["profile"]["time_factors"].keys() == {"gemm"}


def test_the_profile_runs_in_a_scenario(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made_with(tmp_path, {"request_overhead_ns": 30_000_000}, LOADS[:2])
    result = invoke("calibrate", "points", "points.csv", "--engine", ENGINE, "--fit", "request_overhead_ns",
                    "--out", "profile.yaml", *QUICK)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert re.search(r"request_overhead_ns +3(\.0\d*)?e\+07", result.stdout)
    assert "median error" in result.stdout
    assert "engine: ./profile.yaml" in result.stderr
    Path("s.yaml").write_text(
        "workload: {concurrency: 2, num_requests: 4, input_tokens: 64, output_tokens: 4}\n"
        "clients: {gpu: {device: h100-sxm, model: llama-3.1-8b, engine: ./profile.yaml}}\n"
    )
    engine = load("s.yaml").clients["gpu"].engine
    assert isinstance(engine, EngineProfile)
    assert engine.request_overhead_ns == pytest.approx(30_000_000, rel=0.02)
    again = invoke("calibrate", "points", "points.csv", "--engine", ENGINE, "--fit", "request_overhead_ns",
                   "--out", "profile.yaml", *QUICK)  # fmt: skip
    assert again.exit_code == 2
    assert "is there already" in again.stderr


@pytest.mark.parametrize(
    ("option", "target"),
    [("--out", "points.csv"), ("--out", "../{folder}/mine.yaml"), ("--out-device", "card.yaml"),
     ("--out", "workloads/list.csv")],
)  # fmt: skip
def test_what_a_fit_reads_is_never_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str, target: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_request_list(tmp_path)
    write_points(tmp_path, {**LOADS[0], "workload_file": "list.csv"})
    Path("mine.yaml").write_text(yaml.safe_dump(catalogue.mapping("engines", ENGINE)))
    Path("card.yaml").write_text(yaml.safe_dump(catalogue.mapping("devices", "h100-sxm")))
    target = target.format(folder=tmp_path.name)
    before = Path(target).read_bytes()
    result = invoke("calibrate", "points", "points.csv", "--engine", "mine.yaml", "--device", "card.yaml",
                    "--fit", "request_overhead_ns", option, target, "--overwrite", *QUICK)  # fmt: skip
    assert result.exit_code == 2, result.output
    assert "would be written over, and this run reads it" in result.stderr
    assert Path(target).read_bytes() == before


def test_rows_that_share_an_id_count_each(tmp_path: Path) -> None:
    path = made_with(tmp_path, {"request_overhead_ns": 30_000_000}, LOADS[:2])
    path.write_text(re.sub(r"\bp\d-\d\b", "same", path.read_text()))
    result = invoke("calibrate", "points", path, "--engine", ENGINE, "--fit", "request_overhead_ns", "--json", *QUICK)
    found = json.loads(result.stdout)
    assert (found["num_points"], found["num_values"]) == (2, 6)
    assert found["constants"]["request_overhead_ns"]["value"] == pytest.approx(30_000_000, rel=0.03)


def test_a_device_goes_by_any_of_its_names(tmp_path: Path) -> None:
    made = made_with(tmp_path, {"step_overhead_ns": 9_000_000}, LOADS[:2])
    made.write_text(made.read_text().replace("h100-sxm", "H100", 3))  # one point calls it so
    result = invoke("calibrate", "points", made, "--engine", ENGINE, "--fit", "device.efficiency.gemm_memory",
                    "--device", "h100", "--json", *QUICK)  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["num_points"] == 2
    assert found["constants"]["device.efficiency.gemm_memory"]["standard_error"] is not None


def test_what_the_points_cannot_tell_is_said(tmp_path: Path) -> None:
    path = made_with(tmp_path, {"step_overhead_ns": 9_000_000}, [LOADS[0]])
    fit = ("calibrate", "points", path, "--engine", ENGINE, *QUICK, "--fit")
    result = invoke(*fit, "overhead_bytes")
    assert result.exit_code == 0, result.output
    assert "overhead_bytes changes nothing at these points" in result.stderr
    assert re.search(r"overhead_bytes .* unknown", result.stdout)
    out = tmp_path / "profile.yaml"
    # what is drawn towards 1 is told no more of for that
    found = json.loads(invoke(*fit, "step_overhead_ns,time_factors.experts", "--out", out, "--json").stdout)
    assert found["constants"]["time_factors.experts"]["standard_error"] is None
    assert "standard error unknown" in yaml.safe_load(out.read_text())["sources"]["time_factors.experts"]
    assert found["warnings"] == ["time_factors.experts changes nothing at these points: it can't be told from them"]
    assert found["left_out_pct"] is None  # the one point is all there is
    # one sequence at a time: what a step takes and what a sampled token takes are one
    path = made_with(tmp_path, {"step_overhead_ns": 9_000_000}, LOADS[:2])
    result = invoke(*fit, "step_overhead_ns,token_overhead_ns")
    assert "step_overhead_ns and token_overhead_ns can't be told apart by these points" in result.stderr
    assert invoke(*fit, "step_overhead_ns", "--fit", "token_overhead_ns").stdout == result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine", "vllm-0.1O", "--fit", "step_overhead_ns"], "did you mean"),
        (["--engine", "sglang-0.5", "--fit", "step_overhead_ns"], "its points are of vllm-0.6"),
        (["--engine", ENGINE, "--fit", "step_overhead"], "did you mean 'step_overhead_ns'"),
        (["--engine", ENGINE, "--fit", "step_overhead_ns", "--source", "yours"], "there is no source 'yours'"),
        (["--engine", ENGINE, "--fit", "step_overhead_ns", "--out", "lost/profile.yaml"], "there is no folder lost"),
        (["--engine", "mine.yaml", "--fit", "step_overhead_ns"], "'mine' is none of the profiles"),
        (["--engine", ENGINE], "Missing option '--fit'"),
        (["--engine", ENGINE, "--fit", ","], "--fit names no constant"),
    ],
)
def test_wrong_options_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("engine: vllm\n")
    write_points(tmp_path, LOADS[0])
    result = invoke("calibrate", "points", "points.csv", *arguments, *QUICK)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
