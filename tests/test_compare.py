"""Comparisons: requests are paired by number, differences and intervals are right, other workloads are refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from mist.cli import main
from mist.errors import ScenarioError
from mist.metrics.words import load_verdict, slo_verdict
from mist.scenario import load
from mist.search.compare import Deployment, compare, deployments_of
from mist.search.intervals import interval_of, paired_blocks
from mist.search.runs import Run, read_run

SMALL: dict[str, Any] = {
    "name": "small",
    "seed": 3,
    "workload": {
        "arrivals": {"poisson": {"rate_per_s": 8}},
        "num_requests": 120,
        "input_tokens": {"uniform": {"low": 10, "high": 2000}},
        "output_tokens": {"uniform": {"low": 1, "high": 60}},
    },
    "clients": {"gpu": {"device": "h100-sxm", "model": "llama-3.1-8b"}},
    "perf": "roofline",
}


def write(folder: Path, name: str, **sections: Any) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**SMALL, **sections}))
    return path


def larger(folder: Path, **sections: Any) -> Path:
    return write(folder, "larger", clients={"gpu": {**SMALL["clients"]["gpu"], "tp": 2}}, **sections)


def made_up(label: str, ttft: Any, *, first: int = 0, scenario: Any = None, **columns: Any) -> Run:
    """A run with these TTFTs in s of requests from `first` on, which have arrived one each second."""
    ttft = np.asarray(ttft, np.float64)
    n = len(ttft)
    requests = {
        "request": np.arange(first, first + n), "arrival_s": np.arange(n, dtype=float),
        "input_tokens": np.full(n, 7), "status": np.full(n, "finished", object), "ttft_s": ttft,
        "tpot_s": np.full(n, np.nan), "e2e_s": ttft + 1,
    }  # fmt: skip
    asked = scenario or {"seed": 1, "workload": {"num_requests": 9}}
    return Run(label, asked, {"window": {"start_s": 0.0, "end_s": 1e9}}, requests | columns)


def against(a: Run, b: Run) -> dict[str, Any]:
    (found,) = compare([Deployment("a", [a]), Deployment("b", [b])])["against"]
    return dict(found)


# pairs and differences


def test_a_shift_of_every_request_is_known_exactly() -> None:
    rng = np.random.default_rng(1)
    ttft = rng.exponential(1, 400)
    found = against(made_up("a", ttft), made_up("b", ttft - 0.125))
    for statistic in ("mean", "p50", "p99"):
        each = found["requests"]["ttft_s"][statistic]
        assert each["difference_s"] == pytest.approx(-0.125)
        assert (each["low_s"], each["high_s"]) == (pytest.approx(-0.125), pytest.approx(-0.125))
    assert found["requests"]["ttft_s"]["mean"]["baseline_s"] == pytest.approx(ttft.mean())
    assert found["requests"]["ttft_s"]["share_faster"] == 1
    assert found["requests"]["tpot_s"] is None


def test_only_requests_that_finished_in_both_are_paired() -> None:
    status = np.array(["finished"] * 50, object)
    status[10] = "unfinished"
    a = made_up("a", np.arange(50.0), status=status)
    b = made_up("b", np.arange(5, 60.0), first=5, arrival_s=np.arange(5, 60.0))
    found = against(a, b)
    assert (found["num_pairs"], found["num_finished"]) == (44, [49, 55])
    assert found["requests"]["ttft_s"]["mean"]["difference_s"] == 0
    assert (found["requests"]["ttft_s"]["share_faster"], found["requests"]["ttft_s"]["share_slower"]) == (0, 0)


def test_requests_outside_of_a_window_arent_counted() -> None:
    a, b = made_up("a", np.ones(50)), made_up("b", np.ones(50))
    b.summary["window"]["start_s"] = 20.0
    assert against(a, b)["num_pairs"] == 30


@pytest.mark.long
def test_intervals_of_one_run_hold_the_true_difference_as_often_as_they_say() -> None:
    rng, held = np.random.default_rng(2), 0
    for _ in range(40):
        load = rng.exponential(1, 300)  # which both have in common
        one, two = (load + shift + rng.normal(0, 0.1, 300) for shift in (0, 0.05))
        found = against(made_up("a", one), made_up("b", two))
        mean = found["requests"]["ttft_s"]["mean"]
        held += mean["low_s"] <= 0.05 <= mean["high_s"]
        assert mean["high_s"] - mean["low_s"] < 0.05  # far narrower than the spread of the load allows unpaired
    assert 33 <= held <= 40


def test_few_requests_have_no_interval() -> None:
    mean = against(made_up("a", np.ones(29)), made_up("b", np.ones(29)))["requests"]["ttft_s"]["mean"]
    assert (mean["difference_s"], mean["low_s"], mean["high_s"]) == (0, None, None)


def test_resamples_are_of_neighbours_and_always_the_same() -> None:
    first, again = (np.array(list(paired_blocks(103))) for _ in range(2))
    assert (first == again).all()
    assert first.shape[1] == 103
    steps = np.diff(first, axis=1) % 103
    assert np.mean(steps == 1) > 0.85
    assert interval_of(np.arange(1001).tolist()) == pytest.approx((25, 975))


# runs of scenarios


def test_two_deployments_of_one_workload(tmp_path: Path) -> None:
    paths = [write(tmp_path, "one"), larger(tmp_path)]
    document = compare(deployments_of(paths))
    results = [load(path).run() for path in paths]
    found = document["against"][0]
    for metric in ("ttft_s", "tpot_s", "e2e_s"):
        columns = [result.requests[metric] for result in results]
        known = ~np.isnan(columns[0])
        differences = (columns[1] - columns[0])[known]
        each = found["requests"][metric]["mean"]
        assert each["difference_s"] == pytest.approx(differences.mean())
        assert each["low_s"] < each["difference_s"] < each["high_s"]
    assert found["runs"]["output_tokens_per_s"]["value"] == results[1].metrics["throughput"]["output_tokens_per_s"]
    assert document["interval"] == {"level": 0.95, "by": "blocks of requests"}
    assert found["num_pairs"] == 120


def test_a_deployment_doesnt_differ_from_itself(tmp_path: Path) -> None:
    found = compare(deployments_of([write(tmp_path, "one"), write(tmp_path, "two")]))["against"][0]
    each = found["requests"]["e2e_s"]["p99"]
    assert (each["difference_s"], each["low_s"], each["high_s"]) == (0, 0, 0)


def test_several_seeds_have_an_interval_over_them(tmp_path: Path) -> None:
    paths = [write(tmp_path, "one"), larger(tmp_path)]
    document = compare(deployments_of(paths, seeds=3))
    each = document["against"][0]["requests"]["e2e_s"]["mean"]
    singles = [
        compare(deployments_of(paths, seed=seed))["against"][0]["requests"]["e2e_s"]["mean"]["difference_s"]
        for seed in (3, 4, 5)
    ]
    assert each["difference_s"] == pytest.approx(np.mean(singles))
    half = 4.3027 * np.std(singles, ddof=1) / np.sqrt(3)  # Student's t of 2 degrees of freedom at 97.5 %
    assert each["high_s"] - each["difference_s"] == pytest.approx(half, rel=1e-4)
    assert document["against"][0]["runs"]["requests_per_s"]["low"] is not None
    assert (document["num_seeds"], document["interval"]["by"]) == (3, "seeds")


def test_seeds_that_draw_nothing_dont_make_an_interval_of_no_width(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("t_s,i,o\n" + "".join(f"{n},{300 + 7 * n},{20 + n % 9}\n" for n in range(60)))
    workload = {
        "trace": str(tmp_path / "t.csv"),
        "columns": {"arrival": "t_s", "input_tokens": "i", "output_tokens": "o"},
    }
    paths = [write(tmp_path, "one", workload=workload), larger(tmp_path, workload=workload)]
    one, three = (compare(deployments_of(paths, seeds=seeds)) for seeds in (1, 3))
    (note,) = three.pop("notes")
    assert note.startswith("All 3 seeds gave the same, as nothing is drawn at random here")
    assert three == {key: one[key] for key in three}
    each = three["against"][0]["requests"]["ttft_s"]["mean"]
    assert each["low_s"] < each["difference_s"] < each["high_s"]


def test_verdicts_are_of_all_runs(tmp_path: Path) -> None:
    each = {"num_runs": 3, "num_saturated": 1, "num_near_capacity": 0}
    assert load_verdict(each) == "saturated in 1 of 3 runs"
    told = [slo_verdict(each | {"num_slo_met": number}) for number in (None, 0, 2, 3)]
    assert told == ["none", "missed", "met in 2 of 3 runs", "met"]
    strict, lax = (write(tmp_path, f"{p99}", slo={"ttft_s": {"p99": p99}}) for p99 in (1e-6, 10))
    printed = CliRunner().invoke(main, ["compare", str(strict), str(lax), "--executor", "serial"])
    rows = [line.split() for line in printed.output.splitlines()[:3]]
    assert [row[-1] for row in rows] == ["SLO", "missed", "met"]


def test_folders_of_earlier_runs_are_as_good(tmp_path: Path) -> None:
    paths = [write(tmp_path, "one"), larger(tmp_path)]
    load(paths[0]).run().write(tmp_path / "out")
    anew, read = (compare(deployments_of([first, paths[1]])) for first in (paths[0], tmp_path / "out"))
    for document in (anew, read):
        document.pop("baseline")
        document["deployments"][0].pop("label")
    assert anew == read
    with pytest.raises(ScenarioError, match="was run already"):
        deployments_of([tmp_path / "out", paths[1]], seeds=2)


def test_a_folder_without_a_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match=r"holds no scenario\.yaml"):
        read_run(tmp_path)
    for name in ("scenario.yaml", "summary.json", "requests.parquet"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(ScenarioError, match="can't be read"):
        read_run(tmp_path)


# what can't be compared


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"seed": 4}, "seed  A: 3  B: 4"),
        ({"workload": {**SMALL["workload"], "num_requests": 99}}, "workload.num_requests  A: 120  B: 99"),
        ({"workload": {**SMALL["workload"], "rate_scale": 2}}, "workload.rate_scale  A: 1.0  B: 2.0"),
        ({"workload": {**SMALL["workload"], "timeout_s": 9}}, "workload.timeout_s  A: left out  B: 9.0"),
    ],
)
def test_other_workloads_are_refused_with_what_differs(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(
        ScenarioError, match=rf"one.yaml \(A\) and .*larger.yaml \(B\) serve different workloads:\n    {told}\n"
    ):
        compare(deployments_of([write(tmp_path, "one"), larger(tmp_path, **changes)]))


def test_workloads_that_differ_in_much_are_told_in_short_lines(tmp_path: Path) -> None:
    others = {name: {"workload": {**SMALL["workload"], "rate_scale": 2}} for name in ("chat", "code")}
    many = [write(tmp_path, "one"), larger(tmp_path, workload=None, tenants=others)]
    result = CliRunner().invoke(main, ["compare", *map(str, many)])
    assert result.exit_code == 2
    first, *lines = result.stderr.splitlines()
    assert first.endswith("serve different workloads:")
    assert max(map(len, lines)) <= 120
    assert re.fullmatch(r"    and \d+ others", lines[-2])
    assert len(lines) == 10


def test_a_trace_that_has_changed_is_noticed_and_one_that_has_moved_is_not() -> None:
    asked = [{"seed": 1, "workload": {"trace": f"/{place}/trace.csv"}} for place in ("here", "there")]
    a, b = (made_up(name, np.ones(40), scenario=each) for name, each in zip("ab", asked, strict=True))
    assert against(a, b)["num_pairs"] == 40
    with pytest.raises(ScenarioError, match="number 0 has 7 input tokens in one and 8 in the other"):
        against(a, made_up("b", np.ones(40), scenario=asked[1], input_tokens=np.full(40, 8)))


def test_one_that_doesnt_run_is_told_with_its_file(tmp_path: Path) -> None:
    wrong = write(tmp_path, "wrong", clients={"gpu": {"device": "h100-sxm", "model": "llama-3.1-405b"}})
    with pytest.raises(ScenarioError, match="does not fit"):
        deployments_of([write(tmp_path, "one"), wrong])


# the command


def test_the_command_prints_tables_or_a_document(tmp_path: Path) -> None:
    files = [str(write(tmp_path, "one")), str(larger(tmp_path)), str(write(tmp_path, "other", routing="round_robin"))]
    printed = CliRunner().invoke(main, ["compare", *files, "--executor", "serial"])
    assert printed.exit_code == 0, printed.output
    assert f"{files[2]} against {files[0]}: 120 requests in pairs" in printed.output
    assert "TTFT P99" in printed.output
    assert "95% confidence, by blocks of requests" in printed.output
    document = json.loads(CliRunner().invoke(main, ["compare", *files, "--executor", "serial", "--json"]).stdout)
    assert [each["label"] for each in document["against"]] == files[1:]
    refused = CliRunner().invoke(main, ["compare", files[0]])
    assert refused.exit_code == 2
    assert "mist compare A B" in refused.output


def test_options_change_every_file_and_what_became_of_requests_is_told(tmp_path: Path) -> None:
    few = {**SMALL["workload"], "num_requests": 20}
    files = [str(write(tmp_path, "one", workload=few, slo={"ttft_s": {"p99": 1}})), str(larger(tmp_path))]
    options = ["compare", *files, "--executor", "serial", "--set", "workload.num_requests=20"]
    printed = CliRunner().invoke(main, options)
    assert printed.exit_code == 0, printed.output
    assert "not saturated" in printed.output
    assert f"Attainment and goodput aren't compared with {files[1]}, which has no SLO" in printed.output
    assert "95% confidence" not in printed.output
    assert "too few requests" in printed.output
    document = json.loads(CliRunner().invoke(main, [*options, "--limit", "12", "--json"]).stdout)
    served = document["deployments"]
    assert [(each["arrived"], each["finished"], each["lost"]) for each in served] == [(12, 12, 0)] * 2
    assert served[0]["num_saturated"] == 0
    assert [each["num_slo_met"] for each in served] == [1, None]
