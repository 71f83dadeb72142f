"""Events, scaling, timeouts and cancellations as a user writes them: what is refused, what a result tells."""

from __future__ import annotations

from typing import Any

import pytest

from mist.errors import ScenarioError
from mist.records import DOWN, DRAINING, STARTING, UP
from mist.scenario import load
from mist.scenario.build import run
from mist.scenario.result import Result

GPU: dict[str, Any] = {"device": "h100-sxm", "model": "llama-3.1-8b", "perf": "roofline"}
WORKLOAD: dict[str, Any] = {
    "arrivals": {"poisson": {"rate_per_s": 8}}, "num_requests": 120, "input_tokens": 800, "output_tokens": 120,
}  # fmt: skip


def scenario(**sections: Any) -> dict[str, Any]:
    return {"workload": WORKLOAD, "clients": {"gpu": {**GPU, "count": 2}}} | sections


def played(**sections: Any) -> Result:
    return run(load(scenario(**sections)), check=True)


def refused(**sections: Any) -> str:
    with pytest.raises(ScenarioError) as caught:
        load(scenario(**sections)).run()
    return str(caught.value)


# --- what is refused ---


@pytest.mark.parametrize(
    ("event", "told"),
    [
        ({"at_s": 1}, "nothing happens in this event"),
        ({"at_s": 1, "client_down": "gpu-0", "client_up": "gpu-1"}, "client_down and client_up are in one event"),
        ({"at_s": 1, "client_down": "gpu-7"}, "there is no client 'gpu-7'"),
        ({"at_s": 1, "client_up": "cpu"}, "there is no client 'cpu'"),
        ({"at_s": 1, "client_down": "gpu-0", "on_loss": "ignore"}, "on_loss"),
        ({"at_s": 1, "client_up": "gpu-0", "on_loss": "fail"}, "on_loss is for client_down"),
        ({"at_s": 1, "client_up": "gpu-0", "for_s": 2}, "for_s is for client_down or link"),
        ({"at_s": 1, "link": "gpu-0.out"}, "factor is missing"),
        ({"at_s": 1, "client_down": "gpu-0", "factor": 0.5}, "factor is for link"),
        ({"at_s": 1, "link": "gpu-0.out", "factor": 2}, "factor"),
        ({"at_s": 1, "link": "gpu-0.out", "factor": 0.5}, "there is no link 'gpu-0.out' of limited bandwidth"),
        ({"client_down": "gpu-0"}, "at_s"),
        ({"at_s": 1, "client_dow": "gpu-0"}, "client_down"),
    ],
)
def test_an_event_that_makes_no_sense_is_refused(event: dict[str, Any], told: str) -> None:
    assert told in refused(events=[event])


@pytest.mark.parametrize(
    ("scaling", "told"),
    [
        ({"initial_count": 3}, "3 replicas, and the pool has 2"),
        ({"schedule": [{"at_s": 1, "count": 5}]}, "5 replicas, and the pool has 2"),
        ({"rule": {"every_s": 1}}, "a rule goes by either queue or wait_s"),
        ({"rule": {"queue": {"above": 1}, "wait_s": {"above": 1}}}, "a rule goes by either queue or wait_s"),
        ({"rule": {"queue": {"above": 1, "below": 2}}}, "below 2 is more than above 1"),
    ],
)
def test_scaling_that_makes_no_sense_is_refused(scaling: dict[str, Any], told: str) -> None:
    assert told in refused(clients={"gpu": {**GPU, "count": 2, "scaling": scaling}})


# --- what a result tells ---


def test_a_replica_goes_down_and_comes_back() -> None:
    result = played(events=[{"at_s": 4, "client_down": "gpu-0", "for_s": 5}])
    assert result.metrics["requests"]["finished"] == 120
    changes = list(zip(*(column.tolist() for column in result.records.changes.as_columns().values()), strict=True))
    assert changes == [(0, DOWN, 4 * 10**9), (0, UP, 9 * 10**9)]
    lost = result.tasks["how"] == "lost"
    assert lost.any()
    assert set(result.tasks["client"][lost]) == {"gpu-0"}
    first, second = result.metrics["clients"]["gpu"]["replicas"]
    span = result.metrics["window"]["span_s"]
    assert first["replica_s"] == pytest.approx(span - 5)
    assert second["replica_s"] == pytest.approx(span)
    busy = result.steps["duration_s"][result.steps["client"] == "gpu-0"].sum()
    assert first["utilisation"] == pytest.approx(busy / (span - 5))
    assert any("lost with clients that went down" in note for note in result.metrics["notes"])


def test_a_pool_goes_down_and_its_requests_fail() -> None:
    result = played(events=[{"at_s": 4, "client_down": "gpu", "on_loss": "fail"}])
    counts = result.metrics["requests"]
    assert counts["finished"] + counts["rejected"] == 120
    assert {"lost with gpu-0", "lost with gpu-1", "gpu-0, gpu-1 went down for good"} == set(result.records.reasons)


def test_a_scenario_with_all_of_it_reads_back_the_same() -> None:
    given = load(
        scenario(
            workload={**WORKLOAD, "timeout_s": 30, "cancellation": {"probability": 0.1, "after_ms": 500}},
            clients={"gpu": {**GPU, "count": 2, "scaling": {"schedule": [{"at_s": 3, "count": 2}], "start_up_s": 2}}},
            events=[{"at_s": 4, "client_down": "gpu-0", "for_s": 5}, {"at_s": 20, "client_up": "gpu"}],
        )
    )
    again = load(given.resolved())
    assert again.resolved() == given.resolved()
    assert run(again).metrics["requests"] == run(given).metrics["requests"]


def test_tenants_have_patience_of_their_own() -> None:
    patient = {"workload": WORKLOAD}
    hasty = {"workload": {**WORKLOAD, "timeout_s": 0.4, "cancellation": {"probability": 0.5, "after_ms": 300}}}
    given = scenario(tenants={"patient": patient, "hasty": hasty})
    del given["workload"]
    tenants = run(load(given), check=True).metrics["tenants"]
    assert tenants["patient"]["requests"]["finished"] == 120
    counts = tenants["hasty"]["requests"]
    assert counts["cancelled"] > 30
    assert counts["timed_out"] > 30
    assert counts["finished"] + counts["cancelled"] + counts["timed_out"] == 120


def test_sessions_and_closed_loops_go_on_when_users_give_up() -> None:
    sessions = {"num_sessions": 8, "turns": 4, "think_ms": 100}
    base = {key: value for key, value in WORKLOAD.items() if key != "num_requests"}
    counts = played(workload={**base, "sessions": sessions, "timeout_s": 0.5}).metrics["requests"]
    assert counts["arrived"] == 32
    assert counts["timed_out"] > 0
    closed = {**WORKLOAD, "concurrency": 4, "timeout_s": 0.3}
    del closed["arrivals"]
    counts = played(workload=closed).metrics["requests"]
    assert counts["arrived"] == counts["timed_out"] == 120


def test_a_pool_scales_by_schedule() -> None:
    scaling = {"initial_count": 1, "start_up_s": 2, "schedule": [{"at_s": 3, "count": 2}, {"at_s": 8, "count": 1}]}
    result = played(clients={"gpu": {**GPU, "count": 2, "scaling": scaling}})
    changes = result.records.changes.as_columns()
    assert changes["state"].tolist() == [DRAINING, STARTING, UP, DRAINING]
    assert changes["time_ns"].tolist() == [0, 3 * 10**9, 5 * 10**9, 8 * 10**9]
    assert result.metrics["requests"]["finished"] == 120
    second = result.metrics["clients"]["gpu"]["replicas"][1]
    last = result.tasks["end_s"][result.tasks["client"] == "gpu-1"].max()
    assert second["replica_s"] == pytest.approx(last - 3)


def test_a_pool_scales_by_rule() -> None:
    rule = {"queue": {"above": 2, "below": 0.5}, "every_s": 0.5}
    scaling = {"initial_count": 1, "min_count": 1, "start_up_s": 1, "rule": rule}
    workload = {**WORKLOAD, "arrivals": {"poisson": {"rate_per_s": 60}}, "num_requests": 400}
    few = {"chunked": {"max_num_seqs": 16}}
    pool = {**GPU, "count": 4, "batching": few}
    elastic = played(workload=workload, clients={"gpu": {**pool, "scaling": scaling}})
    fixed = played(workload=workload, clients={"gpu": {**pool, "count": 1}})
    assert elastic.metrics["requests"]["finished"] == 400
    assert elastic.metrics["ttft_s"]["p99"] < fixed.metrics["ttft_s"]["p99"]
    assert elastic.metrics["clients"]["gpu"]["replica_s"] < 4 * elastic.metrics["window"]["span_s"]


def test_a_slow_link_shows_in_the_transfers() -> None:
    clients = {"one": {**GPU, "serves": ["prefill"]}, "two": {**GPU, "serves": ["decode"]}}
    network = {"kv_transfer": {"bandwidth": "50 GB/s"}}
    slow = [{"at_s": 0, "link": "one.out", "factor": 0.1}]
    times = [
        played(clients=clients, network=network, events=events).metrics["kv_transfer"]["time_s"]["p50"]
        for events in ([], slow)
    ]
    assert times[1] == pytest.approx(10 * times[0], rel=0.01)


def test_links_of_a_network_go_by_the_names_of_the_result() -> None:
    clients = {"one": {**GPU, "serves": ["prefill"]}, "two": {**GPU, "serves": ["decode"]}}
    network = {"preset": "h100-nvl8"}
    plain = played(clients=clients, network=network)
    names = [link["name"] for link in plain.metrics["links"] if link["carried_bytes"]]
    assert names
    events = [{"at_s": 0, "link": name, "factor": 0, "for_s": 20} for name in names]
    result = played(clients=clients, network=network, events=events)
    assert result.transfers["end_s"].min() > 20
    assert result.metrics["requests"]["finished"] == 120
    assert "there is no link 'one.oud'" in refused(
        clients=clients, network=network, events=[{"at_s": 0, "link": "one.oud", "factor": 0.5}]
    )


def test_the_lanes_of_a_replica_go_down_together() -> None:
    clients = {"gpu": {**GPU, "count": 2, "pp": 2}}
    result = played(clients=clients, events=[{"at_s": 4, "client_down": "gpu-1", "for_s": 5}])
    assert result.metrics["requests"]["finished"] == 120
    changes = result.records.changes.as_columns()["client"].tolist()
    assert changes == [2, 3, 2, 3]
    assert result.metrics["clients"]["gpu"]["replica_s"] == pytest.approx(2 * result.metrics["window"]["span_s"] - 5)


def test_clients_of_a_shared_host_go_down() -> None:
    embed = {"device": "epyc-9554", "model": "e5-base-v2", "serves": ["embed"]}
    index = {
        "device": "epyc-9554", "cores": 32, "workers": 4, "serves": ["retrieve"],
        "perf": {"ivf_pq": {"num_vectors": 100_000_000, "dim": 768, "n_list": 65536, "n_probe": 64, "m": 64}},
    }  # fmt: skip
    result = played(
        workload={**WORKLOAD, "sizes": {"query_tokens": 16}},
        pipeline={"news_search": {"passages": 2, "passage_tokens": 64}},
        clients={"embedder": embed, "index": index, "gpu": GPU},
        events=[{"at_s": t, "client_down": name, "for_s": 0.4} for t in range(1, 12) for name in ("index", "embedder")],
    )
    assert result.metrics["requests"]["finished"] == 120
