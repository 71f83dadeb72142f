"""Slowdowns: what a request takes under load over what it takes alone on the same clients, as a service level.

The reference run is checked against runs of single requests; what disturbs the loaded run must not reach it.
"""

from __future__ import annotations

from typing import Any

import pytest

from mist.errors import ScenarioError
from mist.scenario import Scenario, load, unloaded

SLO = {"ttft_slowdown": {"mean": 3, "p50": 2}, "tpot_slowdown": {"p99": 1.5}, "e2e_slowdown": {"mean": 2}}


def scenario(workload: dict[str, Any], **sections: Any) -> Scenario:
    engine = {"name": "none", "step_overhead_ns": 0}
    gpu = {"device": "h100-sxm", "model": "llama-3.1-8b", "perf": "roofline", "engine": engine}
    return Scenario(
        workload=workload,
        clients=sections.pop("clients", {"gpu": {**gpu, **sections.pop("gpu", {})}}),
        slo=sections.pop("slo", SLO),
        **sections,
    )


def actual(summary: dict[str, Any], metric: str, statistic: str) -> Any:
    (found,) = (t for t in summary["slo"]["targets"] if (t["metric"], t["statistic"]) == (metric, statistic))
    assert "actual_s" not in found
    return found["actual_slowdown"]


LENGTHS = {"input_tokens": {"uniform": {"low": 10, "high": 3000}}, "output_tokens": {"uniform": {"low": 1, "high": 40}}}
POISSON = {"arrivals": {"poisson": {"rate_per_s": 12}}, "num_requests": 80, **LENGTHS}


def test_requests_that_never_meet_have_none() -> None:
    summary = scenario({"concurrency": 1, "num_requests": 30, **LENGTHS}).run(check=True).summary()
    assert {target["actual_slowdown"] for target in summary["slo"]["targets"]} == {1.0}
    assert summary["slo"]["met"] is True
    assert summary["slo"]["attainment"] == 1


def test_a_queue_of_two_is_as_it_is_computed_by_hand() -> None:
    work = {"arrivals": "all_at_once", "num_requests": 2, "input_tokens": 1000, "output_tokens": 8}
    one_by_one = {"continuous": {"max_num_seqs": 1}}
    result = scenario(work, gpu={"batching": one_by_one}).run(check=True)
    first, second = result.requests["ttft_s"]
    summary = result.summary()
    assert actual(summary, "ttft_slowdown", "mean") == pytest.approx((1 + second / first) / 2, rel=1e-12)
    assert actual(summary, "e2e_slowdown", "mean") == pytest.approx(1.5, rel=1e-6)
    assert actual(summary, "tpot_slowdown", "p99") == 1
    assert summary["slo"]["met"] is False


def test_each_request_is_held_against_itself() -> None:
    loaded = scenario(POISSON).run(check=True)
    alone = scenario({"concurrency": 1, "num_requests": 80, **LENGTHS}, slo={}).run()
    factors = loaded.requests["ttft_s"] / alone.requests["ttft_s"]
    assert actual(loaded.summary(), "ttft_slowdown", "mean") == pytest.approx(factors.mean(), rel=1e-12)
    bounds = (factors <= 2) & (loaded.requests["e2e_s"] <= 2 * alone.requests["e2e_s"])
    with_tpot = loaded.requests["tpot_s"] > 1.5 * alone.requests["tpot_s"]
    assert loaded.summary()["slo"]["attainment"] == pytest.approx((bounds & ~with_tpot).mean())
    assert factors.max() > 1


def test_nothing_else_of_the_result_knows_of_it() -> None:
    with_targets, without = (scenario(POISSON, slo=slo).run().summary() for slo in (SLO, {}))
    for summary in (with_targets, without):
        del summary["slo"], summary["simulator"]
    assert with_targets == without


DISTURBED = {
    "workload": {**POISSON, "timeout_s": 0.2, "cancellation": {"probability": 0.3, "after_ms": 1}},
    "admission": {"rate_limit": {"rate_per_s": 3, "burst": 5}},
    "events": [{"at_s": 0.5, "client_down": "gpu", "for_s": 1.0}],
    "max_time_s": 3,
    "warmup_s": 0.5,
}


def test_what_happens_under_load_doesnt_reach_the_reference() -> None:
    disturbed = scenario(**DISTURBED).run(check=True)
    alone = scenario({"concurrency": 1, "num_requests": 80, **LENGTHS}, slo={}).run()
    rows = disturbed.requests
    counted = (rows["status"] == "finished") & (rows["arrival_s"] >= rows["arrival_s"][0] + 0.5)
    assert 0 < counted.sum() < 80
    factors = (rows["ttft_s"] / alone.requests["ttft_s"][rows["request"]])[counted]
    assert actual(disturbed.summary(), "ttft_slowdown", "mean") == pytest.approx(factors.mean(), rel=1e-12)


def test_each_tenant_is_alone_and_only_those_that_ask_have_targets() -> None:
    tenants = {
        "chat": {"workload": POISSON, "slo": {"ttft_slowdown": {"p50": 2}}},
        "batch": {"workload": {**POISSON, "num_requests": 40}, "slo": {"e2e_s": {"p99": 10}}},
    }
    both = load({**_plain(tenants), "slo": {}}).run(check=True).summary()
    assert [(t["tenant"], t["metric"]) for t in both["slo"]["targets"]] == [
        ("chat", "ttft_slowdown"), ("batch", "e2e_s"),
    ]  # fmt: skip
    alone = load({**_plain({"chat": tenants["chat"]}), "slo": {}}).run().summary()
    slowed, less = (s["tenants"]["chat"]["slo"]["targets"][0]["actual_slowdown"] for s in (both, alone))
    assert slowed > less >= 1


def _plain(tenants: dict[str, Any]) -> dict[str, Any]:
    plain = scenario(POISSON).resolved()
    for key in ("workload", "pipeline", "slo"):
        plain.pop(key)
    return {**plain, "tenants": tenants}


def test_sessions_come_one_request_after_the_other() -> None:
    sessions = {"num_sessions": 6, "turns": 3, "think_ms": 100}
    work = {"arrivals": {"poisson": {"rate_per_s": 5}}, "sessions": sessions, "input_tokens": 300, "output_tokens": 9}
    summary = scenario(work, gpu={"kv_cache": {"enable_prefix_caching": True}}).run(check=True).summary()
    assert actual(summary, "e2e_slowdown", "mean") >= 1


def test_the_reference_is_played_once_for_all_rates_of_the_same_requests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(unloaded, "_remembered", {})
    scenarios = [scenario({**POISSON, "rate_scale": scale}) for scale in (1, 2)]
    found = [each.run().summary()["slo"] for each in scenarios]
    assert len(unloaded._remembered) == 1
    for changed in ({"seed": 1}, {"gpu": {"tp": 2}}, {"routing": "round_robin"}):
        number = len(unloaded._remembered)
        scenario(POISSON, **changed).run()
        assert len(unloaded._remembered) == number + 1
    unloaded._remembered.clear()
    assert scenarios[1].run().summary()["slo"] == found[1] != found[0]


def test_a_slowdown_of_one_or_less_is_refused() -> None:
    with pytest.raises(ScenarioError, match="greater than 1"):
        scenario(POISSON, slo={"ttft_slowdown": {"p50": 1}})


def test_the_printed_form_says_how_many_times() -> None:
    text = str(scenario({"concurrency": 1, "num_requests": 4, **LENGTHS}).run())
    assert "TTFT slowdown P50" in text
    assert "≤ 2 x" in text
    assert "1.00 x" in text
