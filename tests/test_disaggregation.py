"""Prefill and decode apart: reservations, early choice, groups, conversions, any ratio under any terms; their laws.

Guards what `hand_over` and `reservations` add; plain hand-overs, layers, lending and scenarios have tests of their own.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from apart import EARLY, LATE, LAYERWISE, LINK, STEPS, D, P, by_request, column, pair
from kit import LinearSteps, Run, engine, play, rows, sampled, table
from mist.batching.chunked import Chunked
from mist.batching.continuous import Continuous
from mist.batching.orders.fcfs import FCFS
from mist.batching.orders.priority import Priority
from mist.errors import InvariantError
from mist.hand_over import Conversion, HandOver, Terms
from mist.kernel import Kernel
from mist.memory.kv_cache import KVCache
from mist.records import CANCELLED, FINISHED
from mist.request import ClientView, Task
from mist.reservations import Reservations
from mist.routing.chunked_balancer import ChunkedBalancer
from mist.routing.decode_balancer import DecodeBalancer
from mist.routing.join_shortest_queue import JoinShortestQueue
from mist.routing.least_outstanding import LeastOutstanding
from mist.routing.random_choice import RandomChoice
from mist.routing.round_robin import RoundRobin
from mist.routing.runtime_estimate import RuntimeEstimate
from mist.tenant import Patience
from mist.testing import random_scenario
from mist.testing.cluster import KVLink

# --- room on the decode side ---


@pytest.mark.parametrize("terms", [Terms(), LATE])
def test_a_transfer_begins_once_there_is_room(terms: Terms) -> None:
    """Room for one context at a time: the second one's KV cache stays where it was computed until the first is done."""
    run = pair(table([0, 0], [64, 64], [5, 5]), num_blocks=8, terms=terms, perf=LinearSteps(), block_size=16)
    ends = dict(zip(column(run, "requests", "request"), column(run, "requests", "end_ns"), strict=True))
    transfers = run.records.transfers.as_columns()
    computed = by_request(run, 0, "end_ns")
    assert transfers["queued_ns"].tolist() == [computed[0], computed[1]]
    assert transfers["start_ns"].tolist() == [computed[0], ends[0]]
    assert by_request(run, 1, "started_ns")[1] == transfers["end_ns"][1]


def test_with_early_room_a_prompt_is_not_computed_before_there_is_some() -> None:
    run = pair(table([0, 0], [64, 64], [5, 5]), num_blocks=8, terms=EARLY, block_size=16)
    ends = dict(zip(column(run, "requests", "request"), column(run, "requests", "end_ns"), strict=True))
    assert by_request(run, 0, "started_ns")[1] == ends[0]
    assert column(run, "transfers", "queued_ns") == column(run, "transfers", "start_ns")


@pytest.mark.parametrize("router", [LeastOutstanding, DecodeBalancer, ChunkedBalancer, RuntimeEstimate])
def test_an_early_choice_sees_those_made_before(router: Any) -> None:
    """All arrive at once, before anybody decodes: counting what has come alone would send all to one client."""
    for terms in (EARLY, LATE, LAYERWISE):
        run = play(table([0] * 6, [20] * 6, [5] * 6), num_clients=4, serves=[P, D, D, D], nic=LINK, terms=terms,
                   router=router())  # fmt: skip
        assert sorted(column(run, "transfers", "receiver")) == [1, 1, 2, 2, 3, 3]


def test_an_early_choice_is_that_of_a_decode() -> None:
    """Its router sees no prompt to compute, and one that draws does so as at the end of the prefill."""
    seen: list[int] = []

    class Drawing(RandomChoice):
        def choose(self, task: Task, views: Any, now: int) -> ClientView:
            seen.append(task.remaining_tokens)
            return super().choose(task, views, now)

    options: dict[str, Any] = {"num_clients": 4, "serves": [P, D, D, D], "nic": LINK}
    workload = table([1000 * i for i in range(20)], [20] * 20, [5] * 20)
    early, late = (play(workload, terms=terms, router=Drawing(7), **options) for terms in (EARLY, Terms()))
    assert not any(seen)
    ways = [dict(zip(column(run, "transfers", "request"), column(run, "transfers", "receiver"), strict=True))
            for run in (early, late)]  # fmt: skip
    assert ways[0] == ways[1]


def test_early_choices_within_a_period_of_the_views_do_not_see_one_another() -> None:
    """As all decisions by views of an age: only those of the next period know what was promised."""
    workload = table([0, 1, 2, 5000, 5001], [20] * 5, [5] * 5)
    run = play(workload, num_clients=3, serves=[P, D, D], nic=KVLink(10, 1e6), terms=LATE, view_refresh_ns=5000,
               router=LeastOutstanding())  # fmt: skip
    to = dict(zip(column(run, "transfers", "request"), column(run, "transfers", "receiver"), strict=True))
    assert to == {0: 1, 1: 1, 2: 1, 3: 2, 4: 2}


def test_a_prompt_that_fills_the_decode_client_and_ends_with_its_first_token_holds_up_nobody() -> None:
    """Room for its next token will never be there, and isn't needed; how long its answer is nobody knows early."""
    run = pair(table([0, 10], [64, 40], [1, 5]), num_blocks=4, terms=EARLY)
    assert column(run, "requests", "status") == [FINISHED] * 2
    assert column(run, "transfers", "request") == [1]


class BySize:
    """Long prompts to the first client of a kind, short ones and all decodes to the last."""

    def choose(self, task: Task, views: Any, now: int) -> ClientView:
        chosen: ClientView = views[0 if task.stage.kind == "prefill" and task.target_tokens > 50 else -1]
        return chosen


@pytest.mark.parametrize(("order", "priority"), [(FCFS, 0), (Priority, 0), (Priority, 1), (Priority, 2)])
def test_prompts_that_come_later_do_not_take_the_room_that_a_kv_cache_waits_for(order: Any, priority: int) -> None:
    """Short prompts of priority 1 without end on a client that computes them too: room for all blocks but three."""
    n = 100
    workload = table([0, *range(100, 100 + n * 600, 600)], [96] + [20] * n, [10] + [20] * n)
    workload.sizes["priority"] = np.array([priority] + [1] * n)
    run = play(workload, num_clients=2, serves=[P, P + D], nic=LINK, num_blocks=10, router=BySize(),
               policy=lambda: Chunked(512, 16, order()))  # fmt: skip
    ((queued, start),) = zip(*(column(run, "transfers", key) for key in ("queued_ns", "start_ns")), strict=True)
    ends = dict(zip(column(run, "requests", "request"), column(run, "requests", "end_ns"), strict=True))
    came = {i: workload.arrival_ns[i] for i in range(1, n + 1)}
    num_passed = sum(came[i] > queued and ends[i] <= start for i in came)
    assert num_passed < 10 if priority < 2 else num_passed > 80


def shrink(kv: KVCache, num_blocks: int) -> None:
    kv.free = kv.num_blocks = num_blocks


@pytest.mark.parametrize("terms", [Terms(), LATE, EARLY])
def test_room_is_given_in_the_order_of_the_decode_client(terms: Terms) -> None:
    """One context at a time: the first has it as the others come, of whom the most urgent is next."""
    workload = table([0, 10, 20, 30], [60] * 4, [30] * 4)
    workload.sizes["priority"] = np.array([9, 5, 1, 5])
    for order, expected in ((Priority(), [0, 2, 1, 3]), (FCFS(), [0, 1, 2, 3])):
        made = iter([FCFS(), order])  # of the prefill and of the decode client
        run = play(workload, num_clients=2, serves=[P, D], nic=LINK, terms=terms,
                   policy=lambda made=made: Chunked(2048, 4, next(made)),
                   prepare=lambda _, clients: shrink(clients[1].residents.kv, 6))  # fmt: skip
        assert column(run, "transfers", "request") == expected


@pytest.mark.parametrize("terms", [EARLY, LAYERWISE])
@pytest.mark.parametrize("output", [0, 1])
def test_room_for_nobody_is_given_back(terms: Terms, output: int) -> None:
    run = pair(table([0, 0, 9], [300] * 3, [output] * 3), terms=terms, num_blocks=40)
    assert column(run, "requests", "status") == [FINISHED] * 3
    assert not run.clients[1].residents.kv.used


# --- groups and dtypes ---


def test_a_group_hands_over_to_its_own() -> None:
    terms = Terms(reach={0: frozenset([2]), 1: frozenset([3])})
    run = play(table([0] * 8, [20] * 8, [5] * 8), num_clients=4, serves=[P, P, D, D], nic=LINK, terms=terms)
    ways = set(zip(column(run, "transfers", "sender"), column(run, "transfers", "receiver"), strict=True))
    assert ways == {(0, 2), (1, 3)}


@pytest.mark.parametrize("is_before", [False, True])
def test_a_conversion_takes_its_time_once(is_before: bool) -> None:
    terms = Terms(conversions={(0, 1): Conversion(2.5, is_before)})

    def halve(_: Kernel, clients: Any) -> None:
        clients[1].kv_bytes_per_token = 5

    run = pair(table([0], [300], [3]), terms=terms, perf=STEPS, prepare=halve)
    sent = 30_000 + (750 if is_before else 0)
    num_bytes = 1500 if is_before else 3000
    assert column(run, "transfers", "bytes") == [num_bytes]
    assert column(run, "transfers", "start_ns") == [sent]
    assert column(run, "transfers", "end_ns") == [sent + num_bytes + 500]
    assert by_request(run, 1, "started_ns") == {0: 30_000 + 750 + num_bytes + 500}


def test_what_was_cancelled_while_it_was_converted_is_not_sent() -> None:
    """And the prefill client has its blocks back, which the next prompt waits for."""
    terms = Terms(conversions={(0, 1): Conversion(100, is_before=True)})
    run = pair(table([0, 10], [300, 300], [9, 1]), terms=terms, perf=STEPS, num_blocks=30, block_size=16,
               patience=Patience([35_000, 10**9], [CANCELLED] * 2))  # fmt: skip
    assert not len(run.records.transfers)
    assert by_request(run, 0, "started_ns")[1] == 60_000
    assert not run.coordinator.handing.orders


# --- any ratio, any terms ---


def random_terms(seed: int) -> Callable[[], Run]:
    """xPyD with tiny caches and budgets under random terms."""
    rng = random.Random(seed)
    scenario = random_scenario(seed)
    x, y = rng.randint(1, 4), rng.randint(1, 4)
    terms = replace(rng.choice([Terms(), Terms(), EARLY, LATE, LAYERWISE]))
    if rng.random() < 0.3:
        groups = min(x, y)
        reach = {p: frozenset(x + d for d in range(y) if d % groups == p % groups) for p in range(x)}
        terms = replace(terms, reach=reach)
    if rng.random() < 0.3:
        is_before = not terms.layerwise and rng.random() < 0.5
        ways = {(p, x + d): Conversion(rng.choice([0.5, 20]), is_before) for p in range(x) for d in range(y)}
        terms = replace(terms, conversions=ways)
    if rng.random() < 0.3:
        scenario = replace(scenario, concurrency=2)
    router = rng.choice([RoundRobin, LeastOutstanding, JoinShortestQueue])
    options: dict[str, Any] = {
        "num_clients": x + y, "serves": [P] * x + [D] * y, "terms": terms, "num_layers": rng.choice([1, 3, 32]),
        "nic": KVLink(rng.randint(1, 900), 1e9, rng.choice([0, 500, 3000])),
        "engine_profile": engine(request_ns=rng.choice([0, 0, 300]), step_ns=rng.choice([0, 70])),
        "lending": {x: rng.randint(0, 40)} if rng.random() < 0.3 else None,
    }  # fmt: skip
    if rng.random() < 0.15:
        options["until_ns"] = rng.randint(1, 60_000)
    policy: Any = rng.choice([Chunked, Continuous])
    return lambda: scenario.play(policy, router=router(), **options)


@pytest.mark.parametrize("part", sampled(range(4), 2))
def test_any_ratio_drains_under_the_ledger(part: int) -> None:
    counts = np.zeros(4, np.int64)
    for seed in range(150 * part, 150 * (part + 1)):
        run = random_terms(seed)()
        requests, transfers = run.records.requests.as_columns(), run.records.transfers.as_columns()
        if run.end_ns > 60_000:
            assert not run.coordinator.in_system, f"random_terms({seed})"
            assert not any(client.residents.kv.used for client in run.clients), f"random_terms({seed})"
        token_bytes = run.clients[0].kv_bytes_per_token
        whole = dict(zip(requests["request"].tolist(), (requests["input_tokens"] * token_bytes).tolist(), strict=True))
        done = [r for r, s in zip(requests["request"], requests["status"], strict=True) if s == FINISHED]
        moved = [(r, b) for r, b in zip(transfers["request"].tolist(), transfers["bytes"].tolist(), strict=True)]
        assert len(dict(moved)) == len(moved), f"random_terms({seed}): sent twice"
        answered = set(np.array(done)[(requests["output_tokens"] > 1)[requests["status"] == FINISHED]].tolist())
        assert all(b == whole[r] for r, b in moved if r in answered), f"random_terms({seed})"
        counts += (len(moved), requests["num_preemptions"].sum(), len(run.records.loans),
                   (transfers["start_ns"] > transfers["queued_ns"]).sum())  # fmt: skip
    assert counts.min() > 0, f"transfers, preemptions, loans, waits for room: {counts}: proves little"


@pytest.mark.parametrize("terms", [Terms(), LATE, EARLY, LAYERWISE])
def test_who_was_handed_over_never_waits_for_blocks(terms: Terms) -> None:
    """With places for all, a decode joins the first step from when it is there, in caches that hold two or three."""
    num_held_up = 0
    for seed in range(40):
        rng = random.Random(seed)
        prompts, outputs = ([rng.randint(1, most) for _ in range(40)] for most in (40, 25))
        run = play(table([0] * 40, prompts, outputs), num_clients=4, serves=[P, P, D, D], terms=terms,
                   num_blocks=110 // rng.choice([1, 4, 8]), block_size=1, nic=KVLink(20, 1e9, 300),
                   policy=lambda: Chunked(64, 64))  # fmt: skip
        tasks, steps = run.records.tasks.as_columns(), run.records.steps.as_columns()
        came = set(zip(*(column(run, "transfers", k) for k in ("request", "receiver", "end_ns")), strict=True))
        for request, client, queued, started, _ in zip(
            *(tasks[k].tolist() for k in ("request", "client", "queued_ns", "started_ns", "kind")), strict=True
        ):
            if (request, client, queued) in came:
                starts = steps["start_ns"][steps["client"] == client]
                assert started == starts[starts >= queued][0], f"seed {seed}"
        transfers = run.records.transfers.as_columns()
        num_held_up += int((transfers["start_ns"] > transfers["queued_ns"]).sum())
        num_held_up += int((tasks["started_ns"] > 30_000)[tasks["kind"] == 0].sum())
    assert num_held_up > 100


def test_running_ahead_changes_nothing_under_any_terms() -> None:
    for seed in range(150):
        ahead = random_terms(seed)()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Kernel, "horizon", lambda kernel: kernel.now)
            assert rows(ahead.records) == rows(random_terms(seed)().records), f"random_terms({seed})"


# --- stations in series ---


class InTurn:
    """Round robin, each stage for itself."""

    def __init__(self) -> None:
        self.routers: dict[str, RoundRobin] = {}

    def choose(self, task: Task, views: Any, now: int) -> ClientView:
        return self.routers.setdefault(task.stage.kind, RoundRobin()).choose(task, views, now)


@pytest.mark.parametrize(("x", "y"), [(1, 1), (2, 1), (1, 3), (3, 2)])
@pytest.mark.parametrize("terms", [Terms(), LATE])
def test_constant_steps_are_stations_in_series(x: int, y: int, terms: Terms) -> None:
    """One place each, infinite links: x and y servers that requests take in turn, first come first served (Lindley)."""
    rng = random.Random(x + y)
    num, prefill_ns, decode_ns = 200, 9000, 7000
    arrivals = sorted(rng.randrange(5000 * num) for _ in range(num))
    perf = LinearSteps(base=0, per_prefill_token=900, per_decode=decode_ns, per_context=0, per_prefill=0)
    run = play(table(arrivals, [10] * num, [2] * num), num_clients=x + y, serves=[P] * x + [D] * y, nic=KVLink(10),
               perf=perf, policy=lambda: Chunked(16, 1), terms=terms, router=InTurn())  # fmt: skip
    free = [0] * x
    computed = []
    for i, arrival in enumerate(arrivals):
        free[i % x] = max(arrival, free[i % x]) + prefill_ns
        computed.append((free[i % x], i % x, i))
    free, ends = [0] * y, {}
    for turn, (ready, _, i) in enumerate(sorted(computed)):
        server = (i if terms.at_arrival else turn) % y  # in turn as they arrive, or as their prompts are done
        free[server] = max(ready, free[server]) + decode_ns
        ends[i] = free[server]
    assert dict(zip(column(run, "requests", "request"), column(run, "requests", "end_ns"), strict=True)) == ends


# --- planted bugs ---


def send_without_room(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(HandOver, "_has_reserved", lambda *_: True)


def forget_who_waits(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(HandOver, "room_came", lambda *_: None)


def take_the_room_twice(patch: pytest.MonkeyPatch) -> None:
    original = Reservations._end

    def twice(self: Reservations, task: Any) -> int:
        return original(self, task) - 1

    patch.setattr(Reservations, "_end", twice)


def send_half(patch: pytest.MonkeyPatch) -> None:
    original = Reservations.make
    patch.setattr(Reservations, "make", lambda self, task, tokens: original(self, task, tokens // 2))


@pytest.mark.parametrize(
    ("sabotage", "says"),
    [(send_without_room, "there is no room for it"), (take_the_room_twice, "gpu-1: KV blocks: .* is not"),
     (send_half, "KV blocks|there is no room")],
)  # fmt: skip
def test_a_planted_bug_is_caught(sabotage: Any, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sabotage(monkeypatch)
    with pytest.raises(InvariantError, match=says):
        pair(table([0, 0, 9000], [64, 64, 50], [5, 5, 9]), num_blocks=8)


def test_a_promise_that_is_not_kept_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HandOver, "_end_early", lambda self, task: self.early.pop(task))
    with pytest.raises(InvariantError, match="gpu-1: promises: 1 is not 0"):
        pair(table([0], [64], [5]), terms=EARLY)


def test_who_is_forgotten_is_still_in_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_who_waits(monkeypatch)
    run = pair(table([0, 0], [64, 64], [5, 5]), num_blocks=8)
    assert sorted(column(run, "requests", "status")) != [FINISHED] * 2
