"""Events, scaling, timeouts and cancellations as a user writes them: what is refused, what a result tells."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from mist.errors import ScenarioError
from mist.records import DRAINING, OFF, STARTING, UP
from mist.report.timeline import trace_events
from mist.scenario import load
from mist.scenario.build import run
from mist.scenario.disturbances import check_links
from mist.scenario.result import Result
from mist.scenario.result_table import saturation_verdict

GPU: dict[str, Any] = {"device": "h100-sxm", "model": "llama-3.1-8b", "perf": "roofline"}
WORKLOAD: dict[str, Any] = {
    "arrivals": {"poisson": {"rate_per_s": 8}}, "num_requests": 120, "input_tokens": 800, "output_tokens": 120,
}  # fmt: skip


APART = {"one": {**GPU, "serves": ["prefill"]}, "two": {**GPU, "serves": ["decode"]}}
LINK = {"kv_transfer": {"bandwidth": "50 GB/s"}}


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
        ({"rule": {"every_s": 1}}, "a rule goes by one of queue, wait_s and deadline_share"),
        ({"rule": {"queue": {"above": 1}, "wait_s": {"above": 1}}}, "a rule goes by one of queue, wait_s"),
        ({"rule": {"deadline_share": {"above": 0.5}}}, "no request has a deadline"),
        ({"initial_count": 0}, "initial_count: no replica ever serves"),
        ({"initial_count": 0, "schedule": [{"at_s": 1, "count": 0}]}, "no replica ever serves"),
        (
            {"initial_count": 1, "min_count": 2, "rule": {"queue": {"above": 1}}},
            "no fewer than 2, and 1 serve",
        ),
        ({"schedule": [{"at_s": 1, "count": 0}], "rule": {"wait_s": {"above": 1}}}, "the rule leaves no fewer than 1"),
        ({"schedule": [{"at_s": 1, "count": 1}, {"at_s": 1, "count": 2}]}, "1 s is here twice"),
        ({"rule": {"queue": {"above": 1, "below": 2}}}, "below 2 is more than above 1"),
    ],
)
def test_scaling_that_makes_no_sense_is_refused(scaling: dict[str, Any], told: str) -> None:
    assert told in refused(clients={"gpu": {**GPU, "count": 2, "scaling": scaling}})


@pytest.mark.parametrize(
    ("sets", "told"),
    [
        ({"clients.gpu.order": "fcfs"}, "it is a key of a batching policy: batching: {chunked: {order: ...}}"),
        ({"clients.gpu.block_size": 16}, "it is a key of kv_cache: {block_size: ...}"),
        ({"num_requests": 3}, "it is a key of workload: {num_requests: ...}"),
        ({"routing": "least_loaded"}, "its keys: measure (one of outstanding, waiting, pending_prefill_tokens"),
        ({"routing": {"prefill": {"least_loaded": "most"}}}, "must be one of 'outstanding', 'waiting'"),
    ],
)
def test_what_is_wrong_is_told_with_a_remedy(sets: dict[str, Any], told: str) -> None:
    with pytest.raises(ScenarioError) as caught:
        load(scenario(), **sets)
    assert told in str(caught.value)


# --- what a result tells ---


def test_a_replica_goes_down_and_comes_back() -> None:
    result = played(events=[{"at_s": 4, "client_down": "gpu-0", "for_s": 5}])
    assert result.metrics["requests"]["finished"] == 120
    changes = result.metrics["availability"]["changes"]
    assert changes == [
        {"time_s": 4.0, "client": "gpu-0", "state": "down", "reason": "event"},
        {"time_s": 9.0, "client": "gpu-0", "state": "up", "reason": "event"},
    ]
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
    assert changes["state"].tolist() == [OFF, STARTING, UP, DRAINING]
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
    slow = [{"at_s": 0, "link": "one.out", "factor": 0.1}]
    times = [
        played(clients=APART, network=LINK, events=events).metrics["kv_transfer"]["time_s"]["p50"]
        for events in ([], slow)
    ]
    assert times[1] == pytest.approx(10 * times[0], rel=0.01)


def test_links_of_a_network_go_by_the_names_of_the_result() -> None:
    clients = APART
    network = {"preset": "h100-nvl8"}
    plain = played(clients=clients, network=network)
    names = [link["name"] for link in plain.metrics["links"] if link["carried_bytes"]]
    assert names
    events = [{"at_s": 0, "link": name, "factor": 0, "for_s": 20} for name in names]
    result = played(clients=clients, network=network, events=events)
    assert result.transfers["end_s"].min() > 20
    assert result.metrics["requests"]["finished"] == 120
    assert "events.0.link: there is no link 'one.oud'" in refused(
        clients=clients, network=network, events=[{"at_s": 0, "link": "one.oud", "factor": 0.5}]
    )


def test_the_end_of_an_earlier_slowness_does_not_end_a_later_one() -> None:
    """A tenth from 0 to 2 s, a twentieth of 50 GB/s from 1 to 4 s: whole again at 4 s, not at 2 s."""
    first = {"at_s": 0, "link": "one.out", "factor": 0.1, "for_s": 2}
    events = [first, {"at_s": 1, "link": "one.out", "factor": 0.05, "for_s": 3}]
    moved = played(clients=APART, network=LINK, events=events).transfers
    slow = (moved["start_s"] > 2.01) & (moved["end_s"] < 4)
    assert slow.any()
    rates = moved["bytes"] / (moved["end_s"] - moved["start_s"])
    assert np.all(rates[slow] < 2.51e9)
    assert np.all(rates[moved["start_s"] > 4.01] > 10e9)


def test_a_client_is_down_until_the_last_of_its_outages_is_over() -> None:
    host = {"at_s": 2, "client_down": "gpu", "for_s": 4}
    longer = {"at_s": 3, "client_down": "gpu-1", "for_s": 5}
    shorter = {"at_s": 4, "client_down": "gpu-0", "for_s": 1}
    result = played(events=[host, longer, shorter])
    told = [tuple(each.values())[:3] for each in result.metrics["availability"]["changes"]]
    assert told == [(2.0, "gpu-0", "down"), (2.0, "gpu-1", "down"), (6.0, "gpu-0", "up"), (8.0, "gpu-1", "up")]


def test_a_client_comes_up_by_an_event_whatever_outages_it_has() -> None:
    events = [{"at_s": 2, "client_down": "gpu-0"}, {"at_s": 3, "client_down": "gpu-0", "for_s": 9}]
    result = played(events=[*events, {"at_s": 5, "client_up": "gpu-0"}])
    told = [(each["time_s"], each["state"]) for each in result.metrics["availability"]["changes"]]
    assert told == [(2.0, "down"), (5.0, "up")]


def test_an_outage_without_end_rejects_those_who_wait_for_the_end_of_another() -> None:
    events = [{"at_s": 2, "client_down": "gpu", "for_s": 9}, {"at_s": 3, "client_down": "gpu"}]
    result = played(events=events)
    assert result.metrics["requests"]["unfinished"] == 0
    assert set(result.records.reasons) == {"gpu-0, gpu-1 went down for good"}


def test_a_pool_that_nobody_wants_any_more_is_not_down() -> None:
    scaling = {"initial_count": 1, "schedule": [{"at_s": 3, "count": 0}]}
    result = played(clients={"gpu": {**GPU, "count": 2, "scaling": scaling}})
    assert result.records.reasons == ["gpu-0, gpu-1 went out of service for good"]


def test_what_a_result_tells_of_a_pool_that_scales() -> None:
    """One of three, two from 3 s on; gpu-1 drains from 8 s on; the third is never there."""
    scaling = {"initial_count": 1, "start_up_s": 2, "schedule": [{"at_s": 1, "count": 2}, {"at_s": 8, "count": 1},
                                                                {"at_s": 900, "count": 3}]}  # fmt: skip
    events = [{"at_s": 800, "client_down": "gpu-0"}]
    result = played(clients={"gpu": {**GPU, "count": 3, "scaling": scaling}}, events=events)
    told = result.metrics["availability"]
    emptied = result.tasks["end_s"][result.tasks["client"] == "gpu-1"].max()
    rows = [tuple(each.values()) for each in told["changes"]]
    assert rows == [
        (0.0, "gpu-1", "off", "initial_count"), (0.0, "gpu-2", "off", "initial_count"),
        (1.0, "gpu-1", "starting", "schedule"), (3.0, "gpu-1", "up", "started"),
        (8.0, "gpu-1", "draining", "schedule"), (emptied, "gpu-1", "off", "drained"),
    ]  # fmt: skip
    assert [tuple(row) for row in zip(*result.changes.values(), strict=True)] == [
        (client, time, state, reason) for time, client, state, reason in rows
    ]
    span, start = (result.metrics["window"][name] for name in ("span_s", "start_s"))
    pool = dict(told["pools"]["gpu"])
    assert pool.pop("mean_up") == pytest.approx(1 + 5 / span)
    assert pool.pop("replica_s") == pytest.approx(span + emptied - 1)
    assert start < 1
    assert pool == {"min_up": 1, "max_up": 2, "num_down": 0, "num_scaled_up": 1, "num_scaled_down": 1}
    notes = "\n".join(result.metrics["notes"])
    assert "events.0 at 800 s, clients.gpu.scaling.schedule.2 at 900 s" in notes
    (line,) = [line for line in str(result).splitlines() if line.startswith("3 x gpu") and line.endswith(" s")]
    assert line.split()[3:9] == [f"{1 + 5 / span:.2f}", "1", "2", "0", "1", "1"]


def test_replicas_that_are_not_there_do_not_go_down() -> None:
    pool = {**GPU, "count": 4, "scaling": {"initial_count": 1, "schedule": [{"at_s": 9, "count": 2}]}}
    result = played(clients={"gpu": pool}, events=[{"at_s": 5, "client_down": "gpu", "for_s": 1}])
    assert result.metrics["availability"]["pools"]["gpu"]["num_down"] == 1
    assert [each["state"] for each in result.metrics["availability"]["changes"]].count("down") == 4


def test_the_verdict_names_rejections() -> None:
    gone = [{"at_s": 2, "client_down": "gpu", "on_loss": "fail"}]
    result = played(events=gone)
    told = result.metrics["requests"]
    assert told["rejected"] > 80
    verdict = saturation_verdict(result.summary())
    assert verdict is not None
    assert verdict.plain.startswith("Not saturated: at most")
    assert f"were rejected ({told['rejected']} of 120)." in verdict.plain
    assert verdict.style == "bold yellow"
    assert "rejected" not in str(saturation_verdict(played().summary()))


def test_links_that_there_are_not_are_found_without_a_run() -> None:
    event = {"at_s": 1, "factor": 0.5}
    with pytest.raises(ScenarioError, match=r"there is no link 'gpu-0.out' of limited bandwidth"):
        check_links(load(scenario(events=[{**event, "link": "gpu-0.out"}])))
    with pytest.raises(ScenarioError, match=r"did you mean 'one\.out'"):
        check_links(load(scenario(clients=APART, network=LINK, events=[{**event, "link": "one.in"}])))
    check_links(load(scenario(clients=APART, network=LINK, events=[{**event, "link": "one.out"}])))


def test_a_run_without_events_has_no_availability() -> None:
    result = played()
    assert result.metrics["availability"] is None
    assert "Availability" not in str(result)
    assert all(len(column) == 0 for column in result.changes.values())


def test_changes_are_written_and_shown(tmp_path: Path) -> None:
    result = played(events=[{"at_s": 4, "client_down": "gpu-0", "for_s": 5}])
    rows = pq.read_table(result.write(tmp_path / "out") / "changes.parquet").to_pylist()
    assert [(row["client"], row["time_s"], row["state"]) for row in rows] == [("gpu-0", 4, "down"), ("gpu-0", 9, "up")]
    shown = [json.loads(event) for event in trace_events(result.records)]
    states = [(each["name"], each["ts"], each["ts"] + each["dur"]) for each in shown if each.get("cat") == "state"]
    assert states[:2] == [("up", 0, 4e6), ("down", 4e6, 9e6)]
    assert [name for name, *_ in states] == ["up", "down", "up"]


def test_a_pool_scales_by_the_deadline() -> None:
    """Half of the deadline has passed for whoever waits: more replicas, sooner where it is sooner."""
    rule = {"deadline_share": {"above": 0.5, "below": 0.05}, "every_s": 0.25}
    workload = {**WORKLOAD, "arrivals": {"poisson": {"rate_per_s": 40}}, "num_requests": 300}
    pool = {**GPU, "count": 4, "batching": {"chunked": {"max_num_seqs": 8}}}
    numbers = {}
    for target in (1, 30):
        scaled = {"gpu": {**pool, "scaling": {"start_up_s": 0.5, "rule": rule}}}
        result = played(workload=workload, clients=scaled, slo={"ttft_s": {"p99": target}})
        numbers[target] = result.metrics["availability"]["pools"]["gpu"]["mean_up"]
        reasons = {each["reason"].partition(" 0")[0] for each in result.metrics["availability"]["changes"]}
    assert numbers[1] > numbers[30] + 0.5
    assert reasons <= {"initial_count", "started", "drained", "rule: deadline_share"}


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
