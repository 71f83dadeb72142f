"""Orders in tests: tasks with hints, residents in an order, and small clusters that are short of KV blocks.

What the tests of orders have in common. It asserts nothing.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from kit import Run, SmallScenario, play, task
from mist.batching.orders import Order
from mist.batching.orders.earliest_deadline import EarliestDeadline
from mist.batching.orders.least_predicted_work import LeastPredictedWork
from mist.batching.orders.priority import Priority
from mist.batching.orders.shortest_prompt import ShortestPrompt
from mist.memory.kv_cache import KVCache
from mist.request import Task
from mist.residents import Residents
from mist.testing import random_scenario, with_hints

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


def pressed(seed: int) -> SmallScenario:
    """A random scenario whose requests come close together, with hardly more blocks than the longest needs."""
    scenario, rng = random_scenario(seed), random.Random(seed)
    requests = tuple((arrival // 20, prompt, output, keys) for arrival, prompt, output, keys in scenario.requests)
    longest = max(-(-(prompt + output) // scenario.block_size) for _, prompt, output, _ in requests)
    blocks = longest + scenario.watermark + rng.randint(0, 3)
    return replace(scenario, requests=requests, num_blocks=blocks, max_num_seqs=6, max_num_batched_tokens=24)


def hinted_like(one: Task, index: int) -> Task:
    made = hinted(index, one.target_tokens)
    made.request.block_keys = one.request.block_keys
    return made
