"""Orders on random clusters that are short of KV blocks: branches, hand-overs, fetches and several prompts at a time.

Everybody is served, whoever goes ranks last, and the ledger watches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import test_first_of
import test_forks
import test_hand_over
import test_offload
from kit import POLICIES, SmallScenario, sampled, small_scenarios
from mist.batching import Budget, CohortView, Queue
from mist.batching.chunked import Chunked
from mist.batching.orders import Order
from mist.batching.orders.fcfs import FCFS
from mist.batching.orders.priority import Priority
from mist.client import Client
from mist.coordinator import Coordinator
from mist.memory.kv_cache import KVCache
from mist.records import FINISHED, REJECTED
from mist.request import Batch, Task, Wait
from mist.residents import Residents
from mist.testing import with_hints
from ordered import ORDERS, hinted, hinted_like, play_small, pressed


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


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("part", sampled(range(4), 1))
def test_random_clusters_drain_under_the_ledger(part: int, order: type[Any], victims: list[Task]) -> None:
    for seed in range(120 * part, 120 * (part + 1)):
        result = play_small(pressed(seed), POLICIES[seed // 2 % len(POLICIES)], order(), num_clients=1 + seed % 2)
        assert set(result.records.requests.as_columns()["status"].tolist()) <= {FINISHED}, f"pressed({seed})"
        assert all(client.residents.kv.used == 0 for client in result.clients)
    assert len(victims) > 15, f"{len(victims)} preemptions prove little"


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
@pytest.mark.parametrize("part", sampled(range(2), 1))
def test_hand_overs_obey_the_laws(
    part: int, order: type[Any], monkeypatch: pytest.MonkeyPatch, victims: list[Task]
) -> None:
    Ordered(order)(monkeypatch)
    monkeypatch.setattr(test_hand_over, "random_scenario", pressed)
    for seed in range(75 * part, 75 * (part + 1)):
        test_hand_over.random_pools(seed)()
    assert len(victims) > 10, f"{len(victims)} preemptions prove little"


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
