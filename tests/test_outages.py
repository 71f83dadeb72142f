"""Clients that go down and come back: closed forms of what is lost, computed again and handed over again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from kit import rows
from mist.availability.events import Down, Event, Events, LinkChange, Up
from mist.availability.laws import breaches
from mist.availability.outages import FAIL, Outages, Replica
from mist.availability.scaling import Pool, Rule, Scaling
from mist.batching.chunked import Chunked
from mist.coordinator import Coordinator
from mist.hand_over import Conversion, Terms
from mist.kernel import FOREVER
from mist.records import CANCELLED, DOWN, FINISHED, LOST, OFF, REJECTED, STARTING, TIMED_OUT, UP
from mist.request import NO_DEADLINE, ClientView, Task
from mist.routing.least_outstanding import LeastOutstanding
from mist.tenant import Patience
from mist.testing.cluster import KVLink, LinearSteps, Run, play, table

#: 100 ns a step and 10 ns a prefill token
STEPS = LinearSteps(base=100, per_prefill_token=10, per_decode=0, per_context=0, per_prefill=0)
LINK = KVLink(10, 1e9)


def disturbed(*events: Event) -> Callable[[Coordinator], None]:
    """Let `events` happen to clients, each a replica of its own."""

    def disturb(coordinator: Coordinator) -> None:
        events_of(coordinator).post(events)

    return disturb


def events_of(coordinator: Coordinator) -> Events:
    replicas = {client.name: Replica(client.name, [client]) for client in coordinator.clients}
    outages = Outages(coordinator, coordinator.records, replicas)
    return Events(coordinator.kernel, outages, coordinator.network.sharing)


def run(workload: Any, *events: Event, **options: Any) -> Run:
    return play(workload, perf=STEPS, router=LeastOutstanding(), disturb=disturbed(*events), **options)


def column(result: Run, table_name: str, name: str) -> list[int]:
    return list(getattr(result.records, table_name).as_columns()[name].tolist())


class First:
    """Whoever is first of those that are up."""

    def choose(self, task: Task, clients: Sequence[ClientView], now: int) -> ClientView:
        return clients[0]


def apart(*events: Event, terms: Terms, outputs: Sequence[int] = (20, 20)) -> Run:
    """One prefill client and two decode clients, each with room for one of the prompts of 64 tokens at a time.

    Both prompts are computed by 1380; a KV cache takes 640.
    """
    workload = table([0] * len(outputs), [64] * len(outputs), list(outputs))
    return play(workload, num_clients=3, serves=[("prefill",), ("decode",), ("decode",)], nic=LINK, num_blocks=9,
                block_size=16, perf=STEPS, router=First(), disturb=disturbed(*events), terms=terms)  # fmt: skip


def moved(result: Run) -> list[tuple[int, ...]]:
    """Transfers that arrived: request, sender, receiver, start."""
    names = ("request", "sender", "receiver", "start_ns", "end_ns")
    found = zip(*(column(result, "transfers", name) for name in names), strict=True)
    return [row[:4] for row in found if row[4] >= 0]


def test_a_kv_cache_that_waits_for_room_goes_to_somebody_else() -> None:
    """The second waits for the first one's room on gpu-1 until that is gone at 2500; it is not computed again."""
    result = apart(Down(2500, "gpu-1"), terms=Terms())
    assert moved(result) == [(0, 0, 1, 1380), (1, 0, 2, 2500)]
    computed = zip(column(result, "tasks", "request"), column(result, "tasks", "computed_tokens"), strict=True)
    assert sorted(tokens for request, tokens in computed if request == 1) == [0, 64]
    assert column(result, "requests", "output_tokens") == [20, 20]


def test_a_kv_cache_that_is_lost_where_it_waits_gives_back_what_was_reserved() -> None:
    """On its way, being converted or waiting: decodes begin anew where they were to come, and no room is left taken."""
    for terms in (Terms(), Terms(conversions={(0, 1): Conversion(50, is_before=True)})):
        for at in (1500, 2500):
            result = apart(Down(at, "gpu-0"), Down(1, "gpu-2"), terms=terms)
            assert column(result, "requests", "status") == [FINISHED] * 2
            assert not result.clients[1].residents.kv.used
            assert not result.clients[1].reservations.blocks


def test_a_prompt_that_waits_for_room_chooses_again() -> None:
    """With early room the second prompt waits for the first one's place on gpu-1; at 1000 that is gone."""
    result = apart(Down(1000, "gpu-1"), terms=Terms(at_arrival=True))
    tasks = result.records.tasks.as_columns()
    prompts = {r: s for r, s, k in zip(tasks["request"], tasks["started_ns"], tasks["kind"], strict=True) if k == 0}
    assert prompts[0] == 0
    assert prompts[1] >= 1000
    assert {row[2] for row in moved(result)} == {2}


def test_a_stream_to_who_is_lost_is_in_vain() -> None:
    """Layers leave while they are computed, up to 740; at 500 their receiver is gone: all goes to the other one."""
    result = apart(Down(500, "gpu-1"), terms=Terms(at_arrival=True, layerwise=True), outputs=[20])
    assert moved(result) == [(0, 0, 2, 740)]
    (_, whole) = column(result, "transfers", "bytes")
    assert whole == 640


def test_a_decode_is_computed_again_elsewhere_with_what_it_generated() -> None:
    """Prefill to 200, a token each 100: at 450 it has three; prompt and three are computed again in 230 ns."""
    result = run(table([0], [10], [6]), Down(450, "gpu-0"), num_clients=2)
    assert column(result, "requests", "first_token_ns") == [200]
    assert column(result, "requests", "end_ns") == [450 + 230 + 2 * 100]
    assert column(result, "requests", "output_tokens") == [6]
    assert column(result, "tasks", "how").count(LOST) == 1
    assert column(result, "tasks", "computed_tokens") == [10, 0, 13]
    busy = sum(column(result, "steps", "end_ns")) - sum(column(result, "steps", "start_ns"))
    assert busy == 450 + 230 + 200  # the step that was lost ends as its client does


def test_a_prefill_in_flight_begins_anew() -> None:
    result = run(table([0], [10], [2]), Down(150, "gpu-0"), num_clients=2)
    assert column(result, "requests", "first_token_ns") == [350]
    assert column(result, "steps", "num_prefill_tokens") == [0, 10, 0]


def test_requests_fail_with_the_reason() -> None:
    result = run(table([0, 0], [10, 10], [6, 6]), Down(450, "gpu-0", FAIL), num_clients=2)
    assert column(result, "requests", "status") == [REJECTED, FINISHED]
    assert result.records.reasons == ["lost with gpu-0"]
    assert column(result, "requests", "output_tokens") == [3, 6]


def test_tasks_wait_for_a_client_to_come_up() -> None:
    result = run(table([0], [10], [6]), Down(450, "gpu-0"), Up(1000, "gpu-0"))
    assert column(result, "requests", "end_ns") == [1000 + 230 + 200]


def test_nobody_waits_for_who_never_comes() -> None:
    result = run(table([0, 500], [10, 10], [6, 6]), Down(450, "gpu-0"))
    assert column(result, "requests", "status") == [REJECTED] * 2
    assert result.records.reasons == ["gpu-0 went down for good"]
    assert column(result, "requests", "output_tokens") == [3, 0]


def test_a_kv_cache_on_its_way_is_sent_again_to_another() -> None:
    """It leaves at 200 and takes 100; at 250 its receiver goes down."""
    serves = [("prefill",), ("decode",), ("decode",)]
    result = run(table([0], [10], [3]), Down(250, "gpu-1"), num_clients=3, serves=serves, nic=LINK)
    assert column(result, "transfers", "end_ns") == [-1, 350]
    assert column(result, "transfers", "receiver") == [1, 2]
    assert column(result, "requests", "end_ns") == [350 + 2 * 100]
    assert column(result, "tasks", "computed_tokens") == [10, 0]


def test_a_kv_cache_is_lost_with_its_sender() -> None:
    """At 250 its prefill client goes down: the decode client computes ten tokens and the one that came out."""
    serves = [("prefill",), ("decode",)]
    result = run(table([0], [10], [3]), Down(250, "gpu-0"), num_clients=2, serves=serves, nic=LINK)
    assert column(result, "transfers", "end_ns") == [-1]
    assert column(result, "requests", "first_token_ns") == [200]
    assert column(result, "requests", "end_ns") == [250 + 100 + 110 + 100]


def test_the_prefix_cache_is_lost() -> None:
    keys: list[tuple[int, ...]] = [(1, 2), (1, 2)]
    workload = table([0, 1000], [32, 32], [1, 1], keys)
    options: dict[str, Any] = {"caching": True, "unit_tokens": 16, "block_size": 16}
    assert column(run(workload, **options), "requests", "cached_tokens") == [0, 16]
    again = run(workload, Down(600, "gpu-0"), Up(700, "gpu-0"), **options)
    assert column(again, "requests", "cached_tokens") == [0, 0]


# --- users who give up ---


@pytest.mark.parametrize("status", [CANCELLED, TIMED_OUT])
def test_a_user_gives_up(status: int) -> None:
    """At 450 a step is in flight for it; the other request of the closed loop comes then."""
    patience = Patience([450, NO_DEADLINE], [status, status])
    result = play(table([0, 0], [10, 10], [6, 6], concurrency=1), perf=STEPS, patience=patience)
    assert column(result, "requests", "status") == [status, FINISHED]
    assert column(result, "requests", "end_ns") == [450, 500 + 200 + 500]
    assert column(result, "requests", "output_tokens") == [3, 6]


# --- links ---


def slowed(result_share: Sequence[tuple[int, float]]) -> Callable[[Coordinator], None]:
    def disturb(coordinator: Coordinator) -> None:
        (channel,) = coordinator.network.path(0, 1).channels
        events_of(coordinator).post([LinkChange(at_ns, channel, share) for at_ns, share in result_share])

    return disturb


@pytest.mark.parametrize(
    ("changes", "arrives"),
    [
        ([(250, 0.5)], 350),  # half of it was there
        ([(250, 0.0), (1000, 1.0)], 1050),
        ([(100, 0.1), (700, 1.0)], 750),  # began slow: half of it by 700
        ([(250, 0.5), (250, 1.0)], 300),
        ([(10_000_000, 0.5)], 300),
    ],
)
def test_a_transfer_goes_as_fast_as_its_link(changes: list[tuple[int, float]], arrives: int) -> None:
    serves = [("prefill",), ("decode",)]
    result = play(table([0], [10], [3]), perf=STEPS, num_clients=2, serves=serves, nic=LINK, disturb=slowed(changes))
    assert column(result, "transfers", "end_ns") == [arrives]


# --- scaling ---


def scaled(pool: dict[str, Any], *events: Event) -> Callable[[Coordinator], None]:
    def disturb(coordinator: Coordinator) -> None:
        made = events_of(coordinator)
        made.post(events)
        replicas = list(made.outages.replicas.values())
        Scaling(made.outages, [Pool(replicas, **pool)], lambda: coordinator.num_left == 4).start()

    return disturb


def test_a_schedule_starts_and_drains() -> None:
    """One replica serves; another is wanted from 100 and ready at 200; the second drains from 450 on."""
    schedule = [(100, 2), (450, 1)]
    disturb = scaled({"initial_count": 1, "start_up_ns": 100, "schedule": schedule})
    workload = table([0, 150, 250, 500], [10] * 4, [6] * 4)
    result = play(workload, perf=STEPS, num_clients=2, router=LeastOutstanding(), disturb=disturb)
    tasks = result.records.tasks.as_columns()
    clients = {r: int(c) for r, c in zip(tasks["request"], tasks["client"], strict=True)}
    assert clients == {0: 0, 1: 0, 2: 1, 3: 0}
    assert rows(result.records)["requests"][2][3] == 250 + 200 + 500  # it drained to its end


def test_a_rule_follows_the_queue() -> None:
    rule = Rule("queue", above=1, below=0.5, every_ns=100)
    disturb = scaled({"initial_count": 1, "start_up_ns": 50, "rule": rule})
    workload = table([0] * 4, [10] * 4, [6] * 4)
    result = play(workload, perf=STEPS, num_clients=2, disturb=disturb, policy=lambda: Chunked(max_num_seqs=1))
    assert set(column(result, "requests", "status")) == {FINISHED}
    changes = list(zip(column(result, "changes", "state"), column(result, "changes", "time_ns"), strict=True))
    assert changes[:3] == [(OFF, 0), (STARTING, 100), (UP, 150)]


def elastic(*pools: tuple[int, ...], start_up_ns: int = 0, above: float = 100, measure: str = "queue") -> Any:
    """Pools of these clients, all at zero at first, whose rule alone would hardly ever start one."""

    def disturb(coordinator: Coordinator, *events: Event) -> None:
        made = events_of(coordinator)
        made.post(events)
        replicas = list(made.outages.replicas.values())
        rule = Rule(measure, above=above, below=above / 2, every_ns=100)
        made_of = [Pool([replicas[i] for i in pool], 0, 0, start_up_ns, rule=rule) for pool in pools]
        Scaling(made.outages, made_of, lambda: coordinator.num_left == 4).start()

    return disturb


def changes_of(result: Run) -> list[tuple[int, int, int]]:
    return list(zip(*(column(result, "changes", name) for name in ("time_ns", "client", "state")), strict=True))


@pytest.mark.parametrize("measure", ["queue", "wait_s", "deadline_share"])
def test_a_pool_at_zero_starts_for_tasks_that_no_other_serves(measure: str) -> None:
    """Once, however often the rule looks while it starts, and though what is measured is below both thresholds."""
    result = play(table([0] * 4, [10] * 4, [6] * 4), perf=STEPS, num_clients=2, router=First(),
                  disturb=elastic((0, 1), start_up_ns=250, measure=measure))  # fmt: skip
    assert set(column(result, "requests", "status")) == {FINISHED}
    assert [each for each in changes_of(result) if each[2] in (STARTING, UP)] == [(100, 0, STARTING), (350, 0, UP)]
    assert result.records.causes[column(result, "changes", "cause")[2]] == "rule: no other serves who waits"


def test_of_two_pools_at_zero_that_serve_the_same_one_starts() -> None:
    result = play(table([0] * 4, [10] * 4, [6] * 4), perf=STEPS, num_clients=2, router=First(),
                  disturb=elastic((0,), (1,), start_up_ns=250))  # fmt: skip
    assert set(column(result, "requests", "status")) == {FINISHED}
    assert [client for _, client, state in changes_of(result) if state == STARTING] == [0]


def test_a_pool_at_zero_starts_for_what_another_that_was_at_zero_computed() -> None:
    """When the decode client's rule looks for the first time, nobody waits for it yet, and nothing else happens."""
    result = play(table([0] * 4, [10] * 4, [6] * 4), perf=STEPS, num_clients=2, serves=[("prefill",), ("decode",)],
                  nic=LINK, disturb=elastic((1,), (0,)))  # fmt: skip
    assert set(column(result, "requests", "status")) == {FINISHED}


def test_a_pool_at_zero_does_not_start_for_tasks_that_another_will_serve() -> None:
    disturb = elastic((1,))
    result = play(table([0] * 4, [10] * 4, [6] * 4), perf=STEPS, num_clients=2, router=First(),
                  disturb=lambda coordinator: disturb(coordinator, Down(0, "gpu-0", until_ns=1000)))  # fmt: skip
    assert set(column(result, "requests", "status")) == {FINISHED}
    assert changes_of(result) == [(0, 1, OFF), (0, 0, DOWN), (1000, 0, UP)]


def test_nobody_waits_for_a_pool_whose_last_plan_starts_none() -> None:
    disturb = scaled({"initial_count": 0, "min_count": 0, "schedule": [(100, 0)]})
    result = play(table([0] * 4, [10] * 4, [6] * 4), perf=STEPS, num_clients=2, router=First(), disturb=disturb)
    assert set(column(result, "requests", "status")) == {REJECTED}
    assert result.records.reasons == ["gpu-0, gpu-1 went out of service for good"]


@pytest.mark.parametrize(("deadline_ms", "starts"), [(1, 600_000), (4, 2_200_000), (None, None)])
def test_a_rule_follows_the_deadline(deadline_ms: int | None, starts: int | None) -> None:
    """The second waits from 0 on while the first decodes: its share passes 0.5 at the first look after the half."""
    rule = Rule("deadline_share", above=0.5, below=0.0, every_ns=200_000)
    disturb = scaled({"initial_count": 1, "start_up_ns": 50, "rule": rule})
    workload = table([0] * 4, [10] * 4, [50_000] * 4)
    if deadline_ms is not None:
        workload.sizes = {"deadline_ms": np.full(4, deadline_ms)}
    result = play(workload, perf=STEPS, num_clients=2, disturb=disturb, policy=lambda: Chunked(max_num_seqs=1))
    changes = result.records.changes.as_columns()
    assert changes["time_ns"][changes["state"] == STARTING].tolist() == ([] if starts is None else [starts])
    if starts is not None and deadline_ms is not None:
        cause = result.records.causes[changes["cause"][changes["state"] == STARTING][0]]
        assert cause == f"rule: deadline_share {starts / (deadline_ms * 1e6):.3g} > 0.5"


def test_who_has_a_token_is_past_the_deadline_of_the_first() -> None:
    """A replica is lost at 450: its decode waits for long on the other one, and no third is wanted for it."""
    rule = Rule("deadline_share", above=0.5, below=0.0, every_ns=100)
    disturb = scaled({"initial_count": 2, "rule": rule}, Down(450, "gpu-1"))
    workload = table([0] * 2, [10] * 2, [20_000, 20_000])
    workload.sizes = {"deadline_ms": np.full(2, 1)}
    result = play(workload, perf=STEPS, num_clients=3, router=LeastOutstanding(), disturb=disturb,
                  policy=lambda: Chunked(max_num_seqs=1), until_ns=1_900_000)  # fmt: skip
    assert STARTING not in column(result, "changes", "state")
    assert column(result, "changes", "client").count(2) == 1


@pytest.mark.parametrize(("ends", "back"), [((900, 600), 900), ((600, 900), 900), ((600, None), None)])
def test_outages_that_overlap(ends: tuple[int | None, ...], back: int | None) -> None:
    """From 450 and from 500 on: the client is there again when both are over."""
    lasting = zip((450, 500), ends, strict=True)
    downs = [Down(at, "gpu-0", until_ns=FOREVER if end is None else end) for at, end in lasting]
    result = run(table([0, 2000], [10, 10], [6, 6]), *downs, num_clients=2)
    changes = list(zip(column(result, "changes", "state"), column(result, "changes", "time_ns"), strict=True))
    assert changes == [(DOWN, 450), *([] if back is None else [(UP, back)])]


# --- laws ---


@pytest.mark.parametrize(
    ("table_name", "name", "value", "told"),
    [
        ("steps", "end_ns", 500, "gpu-0 computes while it is down"),
        ("tasks", "end_ns", 500, "gpu-0 serves while it is down"),
        ("tasks", "end_ns", 440, "lost with clients that don't go down then"),
    ],
)
def test_laws_of_outages_are_caught(table_name: str, name: str, value: int, told: str) -> None:
    result = run(table([0], [10], [6]), Down(450, "gpu-0"), num_clients=2)
    assert not list(breaches(result.records))
    column_of = getattr(result.records, table_name).as_columns()
    row = int(np.flatnonzero(column_of[name] == 450)[0])
    column_of[name][row] = value
    assert any(told in breach for breach in breaches(result.records))
