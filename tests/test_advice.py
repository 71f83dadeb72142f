"""Advice: shares against closed forms, planted bottlenecks, what-ifs against runs of their own, and the command."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import mist
from mist.advice import HEALTHY, Reason, advise
from mist.advice.changes import changes
from mist.advice.evidence import Evidence
from mist.advice.latency import OWN, account, around
from mist.advice.pace import BLOCKS, SENDING, Limits, pace_of
from mist.advice.reasons import BATCH, HOST, IDLE, INTERFERENCE, KV, LINK, QUEUEING, RETRIEVAL, STAGE
from mist.advice.spending import spending
from mist.advice.words import lines
from mist.cli import main
from mist.engine import EngineProfile
from mist.errors import ScenarioError
from mist.scenario import Scenario, load

ROOT = Path(__file__).parent.parent
_spec = importlib.util.spec_from_file_location("planted", ROOT / "benchmarks" / "advice.py")
assert _spec is not None
assert _spec.loader is not None
planted = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(planted)

MS = 1e6


def one_by_one(engine: dict[str, Any] | None = None, **sections: Any) -> dict[str, Any]:
    """Requests that never meet: 512 tokens in, 11 out, every ten seconds."""
    gpu = {"device": "h100-sxm", "model": "llama-3.1-8b", "engine": {"name": "bare", **(engine or {})}}
    return {
        "workload": {"arrivals": {"constant": {"rate_per_s": 0.1}}, "num_requests": 25, "input_tokens": 512,
                     "output_tokens": 11},
        "clients": {"gpu": gpu},
        "perf": "roofline",
    } | sections  # fmt: skip


def evidence_of(scenario: dict[str, Any] | Scenario) -> Evidence:
    loaded = load(scenario)
    return Evidence(loaded, loaded.run())


def times(scenario: dict[str, Any], metric: str) -> tuple[dict[tuple[str, str], float], float]:
    """Mean ns of a request by cause, and in all."""
    found = account(evidence_of(scenario), metric)
    assert found is not None
    return {
        cause: time / found.num_requests for cause, time in found.times.items()
    }, found.total_ns / found.num_requests


# --- shares against closed forms ---


def test_the_hosts_time_of_each_step_is_counted_exactly() -> None:
    found, total = times(one_by_one({"step_overhead_ns": "20 ms", "token_overhead_ns": "1 ms"}), "tpot_s")
    assert found[HOST, "gpu"] == pytest.approx(10 * 21 * MS, abs=1)
    bare = times(one_by_one(), "tpot_s")[1]
    assert total - found[HOST, "gpu"] == pytest.approx(bare, abs=1)


def test_a_host_that_works_beside_the_devices_counts_only_where_it_is_slower() -> None:
    slow, total = times(one_by_one({"step_overhead_ns": "30 ms", "overlapped": True}), "tpot_s")
    assert slow[HOST, "gpu"] == pytest.approx(total)
    quick, _ = times(one_by_one({"step_overhead_ns": "1 ms", "overlapped": True}), "tpot_s")
    assert quick[HOST, "gpu"] == 0


def test_the_front_end_is_the_hosts_with_the_queue_before_it() -> None:
    scenario = one_by_one({"request_serial_ns": "300 ms", "prompt_token_overhead_ns": "1 us"})
    found, _ = times(scenario, "ttft_s")
    assert found[HOST, "gpu"] == pytest.approx(300 * MS, abs=1)
    at_once = scenario | {"workload": {**scenario["workload"], "arrivals": {"constant": {"rate_per_s": 1e6}}}}
    last = account(evidence_of(at_once), "ttft_s")
    assert last is not None
    assert last.times[HOST, "gpu"] / last.total_ns > 0.9  # 25 in a row: they wait for each other there, not for a step
    assert last.times[QUEUEING, "gpu"] / last.total_ns < 0.05


def test_a_link_takes_its_latency_and_its_bytes() -> None:
    scenario = one_by_one(network={"kv_transfer": {"bandwidth": "1 GB/s", "latency": "5 ms"}})
    gpu = scenario["clients"]["gpu"]
    scenario["clients"] = {name: {**gpu, "serves": [name]} for name in ("prefill", "decode")}
    found, _ = times(scenario, "e2e_s")
    kv_bytes = 512 * 2 * 32 * 8 * 128 * 2  # tokens, K and V, layers, heads, head size, bytes
    assert found[LINK, "prefill -> decode"] == pytest.approx(5 * MS + kv_bytes, rel=1e-6)
    assert found.get((KV, "decode"), 0) == 0


def test_blocks_that_are_still_being_sent_are_the_links() -> None:
    workload = {"arrivals": {"constant": {"rate_per_s": 20}}, "num_requests": 60, "input_tokens": 512,
                "output_tokens": 2}  # fmt: skip
    scenario = one_by_one(workload=workload, network={"kv_transfer": {"bandwidth": "1 GB/s"}})
    gpu = scenario["clients"]["gpu"]
    scenario["clients"] = {name: {**gpu, "serves": [name]} for name in ("prefill", "decode")}
    scenario["clients"]["prefill"]["kv_cache"] = {"capacity_tokens": 1040}
    found = account(evidence_of(scenario), "ttft_s")
    assert found is not None
    assert found.times[LINK, "prefill -> decode"] > 0.8 * found.total_ns
    assert found.times[KV, "prefill"] < 0.1 * found.total_ns


def test_a_step_short_of_blocks_is_split_by_who_holds_them() -> None:
    row = {"start_ns": 0, "end_ns": 100, "num_prefills": 1, "num_prefill_tokens": 16, "num_decodes": 0, "kv_blocks": 10,
           "num_waiting": 1}  # fmt: skip
    steps = {name: np.array([value]) for name, value in row.items()}
    limits = Limits(EngineProfile("bare"), 512, 8, kv_blocks=10, block_size=16, largest_prompt=64)
    pace = pace_of(steps, np.array([1]), np.array([8.0]), np.array([8.0]), limits)
    parts = pace.between(np.array([0, 50]), np.array([100, 60]))
    assert parts[:, SENDING].tolist() == pytest.approx([80, 8])
    assert parts[:, BLOCKS].tolist() == pytest.approx([20, 2])


def test_a_prefix_that_is_fetched_from_the_hosts_memory_is_the_links() -> None:
    scenario = one_by_one()
    scenario["workload"] |= {"input_tokens": 20000, "cached_tokens": 19900}
    scenario["clients"]["gpu"]["kv_cache"] = {"enable_prefix_caching": True, "prefix_tier": "cpu"}
    evidence = evidence_of(scenario)
    found = account(evidence, "ttft_s")
    assert found is not None
    fetches = evidence.result.transfers
    assert found.times[LINK, "host memory -> gpu"] / found.num_requests == pytest.approx(
        float((fetches["end_s"] - fetches["start_s"]).mean()) * 1e9, rel=1e-6
    )
    (change,) = changes(evidence, reason(LINK, "host memory -> gpu"))
    assert load(evidence.scenario, **change.overrides) != evidence.scenario


def test_who_waits_for_a_place_or_for_blocks_is_told_so() -> None:
    workload = {"arrivals": {"constant": {"rate_per_s": 100}}, "num_requests": 40, "input_tokens": 512,
                "output_tokens": 64}  # fmt: skip
    places = evidence_of(one_by_one({"max_num_seqs": 2}, workload=workload))
    found = account(places, "ttft_s")
    assert found is not None
    assert found.bounds["gpu"]["slots"] > 0.9 * found.total_ns
    blocks = one_by_one(workload=workload)
    blocks["clients"]["gpu"]["kv_cache"] = {"capacity_tokens": 1280}
    found = account(evidence_of(blocks), "ttft_s")
    assert found is not None
    assert found.times[KV, "gpu"] > 0.9 * found.total_ns


def test_requests_that_never_meet_have_no_reason_at_all() -> None:
    found, total = times(one_by_one(), "ttft_s")
    assert found[OWN, ""] == pytest.approx(total)
    advice = advise(load(one_by_one()), what_ifs=0)
    assert (advice.bottleneck, list(advice.latency)) == ("none", [])


@pytest.mark.parametrize("metric", ["ttft_s", "tpot_s", "e2e_s"])
@pytest.mark.parametrize("kind", ["queueing", "kv", "link", "retrieval", "host", "none"])
def test_reasons_and_own_work_are_the_whole(kind: str, metric: str) -> None:
    _, scenario = next(planted.scenarios(kind, 1))
    evidence = evidence_of(scenario)
    found = account(evidence, metric)
    assert found is not None
    assert min(found.times.values()) >= 0
    assert sum(found.times.values()) == pytest.approx(found.total_ns, rel=1e-9)
    p99 = evidence.summary[metric]["p99"]
    if metric != "tpot_s":
        assert found.total_ns / found.num_requests / 1e9 == pytest.approx(p99, rel=0.25)


def test_requests_around_a_percentile_are_those_next_to_it_in_rank() -> None:
    number = np.arange(5000)
    none = number * 0
    requests = {"request": number, "arrival_ns": none, "first_token_ns": number[::-1] + 1, "end_ns": number + 9999,
                "status": none, "output_tokens": none + 5}  # fmt: skip
    assert sorted(around(requests, "ttft_s", 99)["first_token_ns"].tolist()) == list(range(4901, 5001))
    assert len(around({key: column[:7] for key, column in requests.items()}, "ttft_s", 99)["request"]) == 7
    middle = around(requests, "ttft_s", 50)["first_token_ns"]
    assert (middle.min(), middle.max()) == (2451, 2550)


# --- what was planted ---


@pytest.mark.parametrize("kind", ["queueing", "kv", "link", "retrieval", "host", "none"])
def test_a_planted_bottleneck_comes_first(kind: str) -> None:
    for _, scenario in planted.scenarios(kind, 3, seed=11):
        advice = advise(scenario, what_ifs=0)
        assert advice.bottleneck == kind, (scenario.resolved(), planted.told(advice))


@pytest.mark.long
def test_all_planted_bottlenecks() -> None:
    right = {kind: sum(advise(scenario, what_ifs=0).bottleneck == kind for _, scenario in planted.scenarios(kind))
             for kind in [*planted.PLANTED, "none"]}  # fmt: skip
    assert right.pop("none") == 10
    assert sum(right.values()) >= 45, right


@pytest.mark.parametrize("kind", ["queueing", "kv", "link", "retrieval", "host"])
def test_the_first_what_if_against_a_bottleneck_helps(kind: str) -> None:
    _, scenario = next(planted.scenarios(kind, 1))
    first = advise(scenario, what_ifs=1).latency[0]
    (what_if,) = first.what_ifs
    assert what_if.helps
    alone = mist.run(scenario, **what_if.change.overrides).summary()
    assert what_if.figures[first.figure] == alone[first.figure]["p99"]
    cost = alone["cost"]["usd_per_million_output_tokens"]
    assert what_if.figures["usd_per_million_output_tokens"] == cost


def test_a_what_if_that_does_not_help_is_said_to() -> None:
    scenario = load(one_by_one({"step_overhead_ns": "20 ms"}))
    first = advise(scenario).latency[0]
    assert first.code == HOST
    overlapped, replica = first.what_ifs
    assert overlapped.helps
    assert not replica.helps
    assert replica.change.overrides == {"clients.gpu.count": 2}
    assert any("doesn't help" in line for line in lines(advise(scenario)))


def test_a_change_that_turns_the_verdict_of_the_slo_says_so() -> None:
    advice = advise(load(one_by_one({"step_overhead_ns": "20 ms"})))
    what_if = advice.latency[0].what_ifs[0]
    for met, told in (((True, False), "SLO is missed"), ((False, True), "SLO is met"), ((True, True), "requests")):
        before, after = (
            figures | {"slo_met": each, "slo_attainment": share}
            for figures, each, share in zip((advice.figures, what_if.figures), met, (0.99, 0.92), strict=True)
        )
        first = replace(advice.latency[0], what_ifs=(replace(what_if, figures=after),))
        printed = lines(replace(advice, figures=before, latency=(first,)))
        assert any(line.endswith(told) and "SLOs met by 99.0% -> 92% of requests" in line for line in printed)


def test_a_saturated_run_is_told_as_that_before_all_else() -> None:
    slow = {"workload.num_requests": 400, "clients.gpu.batching.chunked.max_num_seqs": 4}
    scenarios = [load(one_by_one(), **slow, **{"workload.rate_scale": scale}) for scale in (1, 1e4)]
    told = [[*lines(advise(each, what_ifs=0))] for each in scenarios]
    assert "aturated" not in "".join(told[0])
    assert ": saturated; " in told[1][0]
    assert told[1][1].startswith("Saturated: the queue of gpu grew from ")
    assert sum("Saturated" in line for line in told[1]) == 1


# --- cost ---


def test_the_bill_is_split_by_what_was_paid_for() -> None:
    evidence = evidence_of(one_by_one({"step_overhead_ns": "20 ms"}))
    found = spending(evidence)
    busy = evidence.summary["clients"]["gpu"]["utilisation"]
    assert found[IDLE, "gpu"] == pytest.approx(1 - busy)
    assert found[HOST, "gpu"] == pytest.approx(busy * evidence.host_share("gpu"))
    assert sum(found.values()) <= 1 + 1e-9


def test_without_a_price_there_is_no_reason_for_cost_and_that_is_said() -> None:
    scenario = one_by_one()
    scenario["clients"]["gpu"]["device"] = {"name": "card", "peak_tflops": {"bf16": 400}, "memory_bytes": "80 GiB",
                                            "memory_bytes_per_s": "3 TB/s"}  # fmt: skip
    advice = advise(load(scenario), what_ifs=0)
    assert not advice.cost
    assert any("price" in remark for remark in advice.remarks)


# --- changes ---


def reason(code: str, at: str, **facts: Any) -> Reason:
    return Reason(code, at, "ttft_s", 0.5, 1.0, facts)


@pytest.mark.parametrize("example", ["demo", "prefill-decode", "news-search"])
def test_changes_are_overrides_that_load(example: str) -> None:
    scenario = load(ROOT / "examples" / f"{example}.yaml", **{"workload.num_requests": 5})
    evidence = Evidence(scenario, scenario.run())
    for pool in scenario.pools:
        for bound in ("tokens", "slots", "step"):
            assert loaded(evidence, reason(QUEUEING, pool, bound=bound)) >= 1
        for code in (KV, STAGE, HOST, IDLE, BATCH, INTERFERENCE):
            assert loaded(evidence, reason(code, pool)) >= 1
    for pool in scenario.hosts:
        assert loaded(evidence, reason(RETRIEVAL, pool, waiting=0.1)) >= 2
    if "decode" in scenario.pools:
        assert loaded(evidence, reason(LINK, "prefill -> decode")) == 2


def loaded(evidence: Evidence, against: Reason) -> int:
    """How many of the changes give a valid scenario that isn't the one as it is."""
    found = 0
    for change in changes(evidence, against):
        try:
            found += load(evidence.scenario, **change.overrides) != evidence.scenario
        except ScenarioError:
            continue
    return found


# --- the command ---


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "slow-host.yaml"
    path.write_text(json.dumps(one_by_one({"step_overhead_ns": "20 ms"})))
    return path


def test_the_command_tells_reasons_with_figures(file: Path) -> None:
    result = CliRunner().invoke(main, ["advise", str(file), "--metric", "tpot", "--what-ifs", "1"])
    assert result.exit_code == 0, result.output
    assert "bottleneck" in result.stdout
    assert "P99 TPOT" in result.stdout
    assert "--set clients.gpu.engine" not in result.stdout or "What if" in result.stdout
    assert "runs" in result.stderr


def test_json_of_a_folder_is_that_of_its_scenario(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert CliRunner().invoke(main, ["run", str(file), "--out", str(out)]).exit_code == 0
    of_file, of_folder = (
        CliRunner().invoke(main, ["advise", str(given), "--json", "--what-ifs", "0"]) for given in (file, out)
    )
    assert of_file.stdout == of_folder.stdout
    assert "aren't those" not in of_folder.stderr
    document = json.loads(of_folder.stdout)
    assert document["bottleneck"] == "host"
    assert document["latency"][0]["share"] > HEALTHY
    changed = CliRunner().invoke(main, ["advise", str(out), "--set", "clients.gpu.tp=2", "--what-ifs", "0"])
    assert "aren't those" in changed.stderr


def test_a_folder_without_a_scenario_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["advise", str(tmp_path)])
    assert result.exit_code == 2
    assert "no scenario.yaml" in result.stderr


def test_a_run_of_which_nothing_finishes_is_told(file: Path) -> None:
    result = CliRunner().invoke(main, ["advise", str(file), "--set", "max_time_s=0.001"])
    assert result.exit_code == 0, result.output
    assert "No request finished" in result.stdout
    assert "Latency: nothing to explain" in result.stdout
    assert "Cost: nothing to explain" in result.stdout
    assert "own work" not in result.stdout
    assert "no reason explains" not in result.stdout


def test_an_unknown_latency_is_refused() -> None:
    with pytest.raises(ValueError, match="ttft_s, tpot_s, e2e_s"):
        advise(load(one_by_one()), metrics=["itl_s"])
