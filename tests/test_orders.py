"""Orders of admission and preemption: by hand, against a naive queue and Cobham's formula, and on random clusters.

With pressure on KV blocks, branches, hand-overs and fetches, all under the ledger; each order keeps the contract in
`test_testing.py` too.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import test_first_of
import test_forks
import test_hand_over
import test_offload
from kit import POLICIES, LinearSteps, Run, SmallScenario, decode, play, small_scenarios, table, task
from mist.batching import BatchingPolicy, Budget, CohortView, Queue
from mist.batching.chunked import Chunked
from mist.batching.orders import Order
from mist.batching.orders.earliest_deadline import EarliestDeadline
from mist.batching.orders.fcfs import FCFS
from mist.batching.orders.least_predicted_work import LeastPredictedWork
from mist.batching.orders.priority import Priority
from mist.batching.orders.shortest_prompt import ShortestPrompt
from mist.client import Client
from mist.coordinator import Coordinator
from mist.memory.kv_cache import KVCache
from mist.records import FINISHED, REJECTED
from mist.request import NO_DEADLINE, Batch, Request, Task, Wait
from mist.reservations import Reservations
from mist.residents import Residents
from mist.scenario import load
from mist.scenario.remarks import remarks
from mist.testing import random_scenario, record_bytes, with_hints
from test_closed_forms import PER_TOKEN, STEP, agrees, one_at_a_time, poisson, wait_ns

ORDERS: tuple[type[Any], ...] = (Priority, ShortestPrompt, LeastPredictedWork, EarliestDeadline)


class ByArrival:
    """First come, first served by keys: what a client does by its queue alone."""

    def key(self, task: Task) -> tuple[int, ...]:
        return ()


def play_small(scenario: SmallScenario, policy: type[Any], order: Order, **more: Any) -> Run:
    limits = {"max_num_seqs": scenario.max_num_seqs, "max_num_batched_tokens": scenario.max_num_batched_tokens}
    kv = {name: getattr(scenario, name) for name in ("num_blocks", "block_size", "unit_tokens", "caching", "watermark")}
    workload = with_hints(scenario.workload(), len(scenario.requests))
    return play(workload, policy=lambda: policy(**limits, order=order), **kv, **more)


def residents(order: Order | None, *tasks: Task, blocks: int = 99) -> Residents:
    who = Residents(KVCache(blocks, 4), lambda task: None, order=order)
    for one in tasks:
        who.enqueue(one)
    return who


def hinted(index: int, tokens: int = 8, **hints: int) -> Task:
    made = task(index, tokens)
    for name, value in hints.items():
        setattr(made.request, name, value)
    return made


def indices(tasks: Any) -> list[int]:
    return [each.request.index for each in tasks]


# --- what each order decides ---


def test_priority_is_the_number_then_the_arrival() -> None:
    tasks = [hinted(i, priority=p, arrival_ns=a) for i, (p, a) in enumerate([(1, 0), (0, 9), (0, 3), (-1, 99), (1, 0)])]
    assert indices(residents(Priority(), *tasks).waiting) == [3, 2, 1, 0, 4]


def test_the_shortest_prompt_stands_in_front() -> None:
    assert indices(residents(ShortestPrompt(), *(task(i, n) for i, n in enumerate([9, 3, 9, 4]))).waiting) == [
        1,
        3,
        0,
        2,
    ]


def test_least_predicted_work_adds_prompt_and_prediction() -> None:
    tasks = [hinted(i, n, predicted_output_tokens=p) for i, (n, p) in enumerate([(9, 5), (13, 0), (1, 14), (20, 1)])]
    assert indices(residents(LeastPredictedWork(), *tasks).waiting) == [1, 0, 2, 3]


def test_who_has_no_deadline_comes_last() -> None:
    tasks = [hinted(i, deadline_ns=d) for i, d in enumerate([NO_DEADLINE, 50, NO_DEADLINE, 20])]
    assert indices(residents(EarliestDeadline(), *tasks).waiting) == [3, 1, 0, 2]


def test_sizes_tell_priority_deadline_and_prediction() -> None:
    request = Request(0, 7, 5, 9, sizes={"priority": 3, "deadline_ms": 2, "predicted_output_tokens": 11, "other": 1})
    assert (request.priority, request.deadline_ns, request.predicted_output_tokens) == (3, 2_000_007, 11)
    assert Request(0, 7, 5, 9).deadline_ns == NO_DEADLINE


def test_without_predictions_each_request_is_a_mean_one() -> None:
    seen = []

    class Spy(ByArrival):
        def key(self, task: Task) -> tuple[int, ...]:
            seen.append(task.request.predicted_output_tokens)
            return ()

    play(table([0, 0, 0], [5, 5, 5], [1, 2, 9]), policy=lambda: Chunked(order=Spy()))
    assert seen == [4, 4, 4]


# --- admission and preemption by hand ---


def running(who: Residents, *tasks: Task) -> None:
    for one in tasks:
        who.enqueue(one)
        assert who.admit(one, one.target_tokens)
        who.computed(one, one.target_tokens)
        who.cohort.join(one, 50)
    who.chunks_done()


def with_priority(one: Task, priority: int) -> Task:
    one.request.priority = priority
    return one


def test_the_last_in_the_order_is_preempted_and_waits_at_its_place() -> None:
    who = residents(Priority(), blocks=6)
    low, high, middle = (with_priority(decode(i, 8, 60), p) for i, p in enumerate([9, 0, 5]))
    running(who, low, high, middle)
    who.enqueue(hinted(7, 4, priority=6))
    assert who.grow_decodes() == 1  # each needs a block, and there is none: the first admitted goes, and frees two
    assert indices(who.running.values()) == [1, 2]
    assert indices(who.waiting) == [7, 0]
    assert who.kv.free == 0


def test_who_has_grown_is_not_preempted_for_who_ranks_before() -> None:
    """The first admitted would grow first and take the last block; by rank it goes with exactly what it holds."""
    who = residents(Priority(), blocks=5)
    running(who, with_priority(decode(0, 8, 60), 9), with_priority(decode(1, 8, 60), 0))
    assert who.grow_decodes() == 1
    assert indices(who.running.values()) == [1]
    assert who.kv.free == 2
    assert who.held_blocks(who.running[2]) == 3


def test_a_prompt_preempts_decodes_that_have_grown_in_this_step() -> None:
    """They give back what they hold, and the next step knows that no decode has grown."""
    who = residents(Priority(), blocks=6)
    long, short = hinted(0, 24, priority=0), with_priority(decode(1, 7, 60), 9)
    running(who, short)
    who.enqueue(long)
    policy = Chunked(max_num_batched_tokens=13, max_num_seqs=9)
    batch = policy.next_batch(who, who.cohort, who, 0)
    assert batch == Batch([(long, 12)], decode=True)
    who.decode_step_done()
    who.chunks_done()
    who.computed(long, 12)
    who.begin()
    batch = policy.next_batch(who, who.cohort, who, 0)  # 3 blocks more for the prompt, 1 for the decode: it had to go
    assert batch == Batch([(long, 12)], decode=True)
    assert who.cohort.count == 0
    assert who.kv.free == 0
    who.chunks_done()
    assert who.computed(long, 12)
    who.cohort.join(long, 5)
    assert who.held_blocks(long) == 6


def test_a_decode_that_was_handed_over_goes_before_who_ranks_behind() -> None:
    who = residents(Priority(), blocks=6)
    running(who, with_priority(decode(0, 16, 60), 0))
    handed = with_priority(decode(1, 12, 60), 1)
    handed.admission, handed.computed_tokens = -1, 12
    who.enqueue(handed)
    for i, priority in enumerate([2, 1, 0], start=2):
        who.enqueue(hinted(i, 4, priority=priority))
    assert Reservations(who).take_over(9) is None  # no room, and one of priority 0 waits
    assert who.admit(who.waiting[0], 4)
    assert indices(who.waiting) == [3, 2]
    assert not who.admit(who.waiting[0], 4)  # there is room for it, but the other came first


# --- first come, first served ---


@settings(max_examples=60)
@given(small_scenarios(), st.sampled_from(POLICIES))
def test_first_come_by_keys_is_the_plain_queue(scenario: SmallScenario, policy: type[Any]) -> None:
    plain, ranked = (play_small(scenario, policy, order) for order in (FCFS(), ByArrival()))
    assert plain.clients[0].residents.ranks is None
    assert record_bytes(plain.records) == record_bytes(ranked.records)


@settings(max_examples=40)
@given(small_scenarios(), st.sampled_from(POLICIES), st.sampled_from(ORDERS))
def test_equals_are_served_as_they_come(
    scenario: SmallScenario, policy: Callable[..., BatchingPolicy], order: type[Any]
) -> None:
    """Requests alike in all that orders read: every order is first come, first served."""
    requests = tuple((arrival, 9, output, keys) for arrival, _, output, keys in scenario.requests)
    alike = SmallScenario(requests, scenario.max_num_seqs, scenario.max_num_batched_tokens, scenario.num_blocks + 9)
    limits = {"max_num_seqs": alike.max_num_seqs, "max_num_batched_tokens": alike.max_num_batched_tokens}
    plain, ranked = (
        play(alike.workload(), policy=partial(policy, **limits, order=o()), num_blocks=alike.num_blocks, block_size=4)
        for o in (FCFS, order)
    )
    assert record_bytes(plain.records) == record_bytes(ranked.records)


# --- random clusters, short of blocks ---


@pytest.fixture
def victims(monkeypatch: pytest.MonkeyPatch) -> list[Task]:
    """Who was preempted; each time whoever ranks behind all others that run."""
    found: list[Task] = []
    preempt = Residents.preempt

    def watched(who: Residents, victim: Task) -> None:
        assert who.ranks is None or victim.rank == max(each.rank for each in who.running.values())
        assert len(who.running) > 1 or who.kv.available < who.kv.num_blocks
        preempt(who, victim)
        assert list(who.waiting) == sorted(who.waiting, key=lambda each: each.rank)
        found.append(victim)

    monkeypatch.setattr(Residents, "preempt", watched)
    return found


def pressed(seed: int) -> SmallScenario:
    """A random scenario whose requests come close together, with hardly more blocks than the longest needs."""
    scenario, rng = random_scenario(seed), random.Random(seed)
    requests = tuple((arrival // 20, prompt, output, keys) for arrival, prompt, output, keys in scenario.requests)
    longest = max(-(-(prompt + output) // scenario.block_size) for _, prompt, output, _ in requests)
    blocks = longest + scenario.watermark + rng.randint(0, 3)
    return replace(scenario, requests=requests, num_blocks=blocks, max_num_seqs=6, max_num_batched_tokens=24)


@pytest.mark.parametrize("order", ORDERS)
def test_random_clusters_drain_under_the_ledger(order: type[Any], victims: list[Task]) -> None:
    for seed in range(480):
        result = play_small(pressed(seed), POLICIES[seed // 2 % len(POLICIES)], order(), num_clients=1 + seed % 2)
        assert set(result.records.requests.as_columns()["status"].tolist()) <= {FINISHED}, f"pressed({seed})"
        assert all(client.residents.kv.used == 0 for client in result.clients)
    assert len(victims) > 100, f"{len(victims)} preemptions prove little"


@settings(max_examples=80)
@given(small_scenarios(gap_ns=300), st.sampled_from(POLICIES), st.sampled_from(ORDERS), st.integers(1, 3))
def test_any_small_cluster_obeys_the_laws(
    scenario: SmallScenario, policy: type[Any], order: type[Any], num_clients: int
) -> None:
    result = play_small(scenario, policy, order(), num_clients=num_clients)
    assert set(result.records.requests.as_columns()["status"].tolist()) <= {FINISHED, REJECTED}
    assert all(client.residents.kv.used == 0 for client in result.clients)


@dataclass
class Ordered:
    """Gives `order` to every client that has a batching policy of its own to hold it."""

    order: Callable[[], Order]

    def __call__(self, patch: pytest.MonkeyPatch) -> None:
        build, order = Client.__init__, self.order

        def made(client: Client, *arguments: Any, batching: Any, **more: Any) -> None:
            batching.order = order()
            build(client, *arguments, batching=batching, **more)

        patch.setattr(Client, "__init__", made)
        start = Coordinator.start

        def hinted_start(coordinator: Coordinator, *tenants: object) -> None:
            (tenant,) = coordinator.tenants
            with_hints(tenant.workload, len(tenant.workload))
            tenant._sizes = tuple(tenant.workload.sizes.items())
            start(coordinator)

        patch.setattr(Coordinator, "start", hinted_start)


@pytest.mark.parametrize("order", ORDERS)
def test_hand_overs_obey_the_laws(order: type[Any], monkeypatch: pytest.MonkeyPatch, victims: list[Task]) -> None:
    Ordered(order)(monkeypatch)
    monkeypatch.setattr(test_hand_over, "random_scenario", pressed)
    for seed in range(150):
        test_hand_over.random_pools(seed)()
    assert len(victims) > 20, f"{len(victims)} preemptions prove little"


@pytest.mark.parametrize("order", ORDERS)
def test_branches_obey_the_laws(order: type[Any], monkeypatch: pytest.MonkeyPatch, victims: list[Task]) -> None:
    Ordered(order)(monkeypatch)
    for seed in range(25):
        test_first_of.test_random_races_obey_the_laws(seed)
        test_forks.test_random_thoughts_obey_the_laws(seed)
    assert len(victims) > 20, f"{len(victims)} preemptions prove little"


@pytest.mark.parametrize("order", ORDERS)
def test_fetches_obey_the_laws(order: type[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    Ordered(order)(monkeypatch)
    for seed in range(60):
        test_offload.anything(seed)


# --- a policy that goes on with several prompts at a time ---


@dataclass
class Watched(Chunked):
    """Counts the chunks that were reserved and are not in the batch."""

    long_prefill_token_threshold: int = 3
    num_taken_out: int = field(init=False, default=0)

    def next_batch(self, queue: Queue, cohort: CohortView, budget: Budget, now: int) -> Batch | Wait:
        spy = Reserved(budget)
        batch = super().next_batch(queue, cohort, spy, now)
        self.num_taken_out += spy.num_grown - (len(batch.chunks) if isinstance(batch, Batch) else 0)
        return batch


class Reserved:
    """A budget that counts the chunks of this step."""

    def __init__(self, budget: Any) -> None:
        self.budget = budget
        self.num_grown = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.budget, name)

    def grow(self, task: Task, num_tokens: int) -> bool:
        has_grown: bool = self.budget.grow(task, num_tokens)
        self.num_grown += has_grown
        return has_grown

    def admit(self, task: Task, max_tokens: int, *, whole: bool = False) -> int:
        chunk: int = self.budget.admit(task, max_tokens, whole=whole)
        self.num_grown += chunk > 0
        return chunk


@pytest.mark.parametrize("order", [FCFS, *ORDERS])
def test_chunks_of_who_had_to_go_leave_the_batch(order: type[Any]) -> None:
    made: list[Watched] = []

    def policy(**limits: Any) -> Watched:
        made.append(Watched(**limits))
        return made[-1]

    for seed in range(200):
        result = play_small(pressed(seed), policy, order())  # type: ignore[arg-type]
        assert result.clients[0].residents.kv.used == 0
    taken_out = sum(each.num_taken_out for each in made)
    assert (taken_out > 0) == (order is not FCFS), taken_out


def test_what_was_only_scheduled_is_not_found_later() -> None:
    kv = KVCache(99, 4, enable_prefix_caching=True, hash_block_size=8)
    who = Residents(kv, lambda task: None, order=Priority())
    one = hinted(0, 40)
    one.request.block_keys = (1, 2, 3, 4, 5)
    who.enqueue(one)
    assert who.admit(one, 12) == 12
    who.computed(one, 12)
    who.chunks_done()
    assert who.grow(one, 20)  # three units more, none of them computed
    who.preempt(one)
    assert kv.match(hinted_like(one, 1)).num_tokens == 8
    assert kv.match(one).num_tokens == 12  # a unit and a block of its own
    assert kv.used == 0
    assert kv.cached == kv.count_evictable()


def test_what_another_has_scheduled_too_stays() -> None:
    kv = KVCache(99, 4, enable_prefix_caching=True, hash_block_size=8)
    who = Residents(kv, lambda task: None, order=Priority())
    one = hinted(0, 40, priority=1)
    one.request.block_keys = (1, 2, 3, 4, 5)
    other = hinted_like(one, 1)
    for each in (one, other):
        who.enqueue(each)
        assert who.admit(each, 4) == 4
        who.computed(each, 4)
    who.chunks_done()
    assert who.grow(one, 12)
    assert who.grow(other, 4)
    who.preempt(one)
    assert kv.match(hinted_like(one, 2)).num_tokens == 8
    assert kv.used == 2 == who.held_blocks(other)
    assert kv.cached == kv.count_evictable()
    assert kv.match(one).num_tokens == 8


def hinted_like(one: Task, index: int) -> Task:
    made = hinted(index, one.target_tokens)
    made.request.block_keys = one.request.block_keys
    return made


# --- textbook queues ---


def naive_waits(arrivals: Any, services: Any, keys: Any) -> np.ndarray:
    """One server that never interrupts: whenever it is free, the smallest key among those that have come."""
    order, waits = np.arange(len(arrivals)), np.zeros(len(arrivals), np.int64)
    heap: list[tuple[int, int]] = []
    now = following = 0
    for _ in order:
        if not heap:
            now = max(now, int(arrivals[following]))
        while following < len(order) and arrivals[following] <= now:
            heapq.heappush(heap, (int(keys[following]), following))
            following += 1
        _, i = heapq.heappop(heap)
        waits[i] = now - arrivals[i]
        now += int(services[i])
    return waits


def two_classes(rhos: tuple[float, float], sizes: tuple[float, float], n: int, seed: int) -> tuple[Any, Any, Any]:
    """Arrivals, services (exponential of mean 1, or of two sizes) and classes of two Poisson streams together."""
    rng = np.random.default_rng(seed)
    rates = np.array(rhos) / np.array(sizes)
    arrivals = poisson(rng, n, STEP / rates.sum())
    second = (rng.random(n) >= rates[0] / rates.sum()).astype(np.int64)
    return arrivals, np.array([int(size * STEP) for size in sizes])[second], second


def single_slot(order: Order, arrivals: Any, services: Any, priorities: Any) -> Run:
    workload = table(arrivals, services, [0] * len(arrivals))
    workload.sizes["priority"] = priorities
    policy = one_at_a_time()
    policy.order = order
    return play(workload, policy=lambda: policy, perf=PER_TOKEN)


@pytest.mark.parametrize("order", [Priority, ShortestPrompt])
def test_one_slot_is_cobhams_queue(order: type[Any]) -> None:
    """E[W_k] = R / (1 - σ_{k-1})(1 - σ_k), R = Σ λE[S²] / 2, σ_k the load of the classes up to k (Cobham 1954).

    With the shorter services in the first class it is shortest job first of two sizes too.
    """
    rhos, sizes = (0.4, 0.45), (0.5, 2.0)
    arrivals, services, second = two_classes(rhos, sizes, 60_000, seed=21)
    waits = wait_ns(single_slot(order(), arrivals, services, second))
    assert np.array_equal(waits, naive_waits(arrivals, services, second))
    residual = sum(rho * size for rho, size in zip(rhos, sizes, strict=True)) / 2
    agrees(waits[second == 0] / STEP, residual / (1 - rhos[0]), at_most=0.05)
    agrees(waits[second == 1] / STEP, residual / (1 - rhos[0]) / (1 - sum(rhos)), at_most=0.25)


def test_overload_behind_it_costs_the_first_class_one_residual_service() -> None:
    """At 1.3 times the capacity: E[W] of the first class = R / (1 - ρ) with R = λE[S²] / 2 + (1 - ρ) E[S₂²] / 2E[S₂],
    for whatever the first leaves goes to the second: alone it is λE[S²] / 2(1 - ρ), one residual service less.
    """
    rhos, sizes = (0.3, 1.0), (0.5, 0.25)
    arrivals, services, second = two_classes(rhos, sizes, 60_000, seed=22)
    first = second == 0
    waits = wait_ns(single_slot(Priority(), arrivals, services, second))
    alone = wait_ns(single_slot(Priority(), arrivals[first], services[first], second[first]))
    own = rhos[0] * sizes[0] / 2 / (1 - rhos[0])
    agrees(alone / STEP, own, at_most=0.2)
    agrees(waits[first] / STEP, own + sizes[1] / 2, at_most=0.1)
    assert np.all(waits[first] <= alone + sizes[1] * STEP), "more than the one service that was under way, at any time"
    assert waits[~first][-1000:].mean() > 1000 * STEP


def test_a_small_urgent_stream_hardly_sees_an_overload() -> None:
    """Mixed steps, 16 slots, twice the load that it can bear: TTFT of the urgent tenth, beside alone and by arrival."""
    rng = np.random.default_rng(23)
    n = 3000
    arrivals = poisson(rng, n, 700_000)
    prompts, outputs = rng.integers(50, 400, n), rng.integers(20, 120, n)
    urgent = rng.random(n) < 0.1
    steps = LinearSteps(base=200_000, per_prefill_token=1000, per_decode=1000, per_context=1, per_prefill=0)

    def ttft_ns(order: Order, mine: Any) -> Any:
        workload = table(arrivals[mine], prompts[mine], outputs[mine])
        workload.sizes["priority"] = 1 - urgent[mine].astype(np.int64)
        run = play(workload, policy=lambda: Chunked(512, 16, order), perf=steps, num_blocks=600, block_size=16)
        rows = run.records.requests.as_columns()
        times = (rows["first_token_ns"] - rows["arrival_ns"])[np.argsort(rows["request"])]
        return times[urgent[mine]].mean()

    everyone = np.ones(n, bool)
    alone, beside = ttft_ns(Priority(), urgent), ttft_ns(Priority(), everyone)
    assert beside < 6 * alone, f"{beside / alone:.2f} times the TTFT alone"
    assert ttft_ns(FCFS(), everyone) > 50 * beside


# --- scenarios ---


SCENARIO = {
    "workload": {"arrivals": {"poisson": {"rate_per_s": 20}}, "num_requests": 60, "input_tokens": 500,
                 "output_tokens": 30, "sizes": {"priority": {"uniform": {"low": 1, "high": 3}}}},
    "clients": {"gpu": {"device": "h100-sxm", "model": "llama-3.1-8b", "perf": "roofline",
                        "batching": {"chunked": {"order": "priority", "max_num_seqs": 2}}}},
}  # fmt: skip


def test_a_scenario_names_the_order_of_its_policies() -> None:
    scenario = load(SCENARIO)
    batching = scenario.resolved()["clients"]["gpu"]["batching"]
    assert batching["chunked"]["order"] == {"priority": {}}
    assert load(scenario.resolved()).resolved() == scenario.resolved()
    result = scenario.run(check=True)
    assert result.metrics["requests"]["finished"] == 60
    plain = load(SCENARIO, **{"clients.gpu.batching.chunked.order": "fcfs"}).run(check=True).records
    assert plain.requests.cells != result.records.requests.cells


def test_a_priority_that_no_order_reads_is_remarked_upon() -> None:
    assert not any("priority" in remark for remark in remarks(load(SCENARIO)))
    plain = load(SCENARIO, ["clients.gpu.batching=chunked"])
    assert any("change nothing: priority" in remark for remark in remarks(plain))


def test_first_come_first_served_is_the_default() -> None:
    scenario = load(SCENARIO, ["clients.gpu.batching=continuous"])
    assert scenario.resolved()["clients"]["gpu"]["batching"]["continuous"]["order"] == {"fcfs": {}}


@pytest.mark.parametrize(
    ("order", "words"),
    [
        ("priorty", "there is no order 'priorty'"),
        ("7", "must be an order by name"),
        ("{priority: {levels: 3}}", "there is no key 'levels' here"),
    ],
)
def test_a_wrong_order_is_told(order: str, words: str) -> None:
    with pytest.raises(Exception, match=words):
        load(SCENARIO, [f"clients.gpu.batching.chunked.order={order}"])
