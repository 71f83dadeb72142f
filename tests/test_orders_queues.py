"""Orders against textbook queues: a naive queue ns by ns, Cobham's formula, and overloads that urgent work hardly sees.

On clients with made-up step times, mostly of one place.
"""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np
import pytest

from kit import LinearSteps, Run, play, sampled, table
from mist.batching.chunked import Chunked
from mist.batching.orders import Order
from mist.batching.orders.fcfs import FCFS
from mist.batching.orders.priority import Priority
from mist.batching.orders.shortest_prompt import ShortestPrompt
from test_closed_forms import PER_TOKEN, STEP, agrees, one_at_a_time, poisson, wait_ns


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


@pytest.mark.parametrize("order", sampled([Priority, ShortestPrompt], 1))
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


@pytest.mark.long
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
