"""KV caches that are sent layer by layer: exposed by the formula alone, shared fairly together, bit-equal for nothing.

Guards `streams`; on clusters of made-up step times.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest

from apart import EARLY, LAYERWISE, STEPS, D, P, column, pair
from kit import rows, table
from mist.batching.chunked import Chunked
from mist.testing import random_scenario
from mist.testing.cluster import KVLink


def after_the_prefill(chunks: list[tuple[int, int]], num_layers: int, ns_per_byte: Fraction) -> Fraction:
    """How long after the last chunk the last byte leaves: chunks are (bytes, ns that it is computed in)."""
    left = now = Fraction(0)
    for num_bytes, took in chunks:
        but_last = num_bytes * (num_layers - 1) // num_layers
        begin = max(left, now + Fraction(took, num_layers))
        now += took
        left = max(begin + but_last * ns_per_byte, now if but_last and begin < now else Fraction(0))
        left = max(left, now) + (num_bytes - but_last) * ns_per_byte
    return left - now


@pytest.mark.parametrize("num_layers", [1, 2, 8, 80])
@pytest.mark.parametrize("ns_per_byte", [1, 4, 10, 40, 200])
def test_alone_a_layerwise_transfer_is_exposed_by_its_formula(num_layers: int, ns_per_byte: int) -> None:
    link = KVLink(10, 1e9 / ns_per_byte, 700)
    run = pair(table([50], [320], [3]), terms=LAYERWISE, num_layers=num_layers, nic=link, perf=STEPS)
    compute, transfer = 32_000, 3200 * ns_per_byte
    prefill_end = 50 + compute
    exposed = max(transfer // num_layers, transfer - compute * (num_layers - 1) // num_layers)
    assert column(run, "transfers", "end_ns") == [prefill_end + exposed + 700]
    assert column(run, "transfers", "start_ns") == [50 + compute // num_layers]
    assert column(run, "transfers", "bytes") == [3200]
    assert exposed == after_the_prefill([(3200, compute)], num_layers, Fraction(ns_per_byte))


@pytest.mark.parametrize("num_layers", [1, 4])
@pytest.mark.parametrize("ns_per_byte", [1, 8, 12, 50])
def test_chunks_travel_while_later_ones_are_computed(num_layers: int, ns_per_byte: int) -> None:
    link = KVLink(10, 1e9 / ns_per_byte)
    run = pair(table([0], [240], [3]), terms=LAYERWISE, num_layers=num_layers, nic=link, perf=STEPS,
               policy=lambda: Chunked(max_num_batched_tokens=80, max_num_seqs=8))  # fmt: skip
    exposed = after_the_prefill([(800, 8000)] * 3, num_layers, Fraction(ns_per_byte))
    assert column(run, "transfers", "end_ns") == [24_000 + exposed]
    assert column(run, "transfers", "bytes") == [2400]


def test_over_infinite_links_layers_change_nothing() -> None:
    for seed in range(40):
        scenario = random_scenario(seed, roomy=True)
        options: dict[str, Any] = {"num_clients": 3, "serves": [P, D, D], "nic": KVLink(10)}
        whole, layered = (scenario.play(Chunked, terms=terms, **options) for terms in (EARLY, LAYERWISE))
        for name in ("requests", "tasks", "steps"):
            assert rows(whole.records)[name] == rows(layered.records)[name]


def test_layers_of_two_prompts_share_the_link() -> None:
    """Bound by the link: both are under way from the first layer on, and end when all bytes have crossed it."""
    link = KVLink(10, 1e7)
    run = pair(table([0, 0], [320, 320], [3, 3]), terms=LAYERWISE, nic=link, perf=STEPS,
               policy=lambda: Chunked(2048, 8))  # fmt: skip
    start = 64_000 // 4
    assert column(run, "transfers", "start_ns") == [start] * 2
    assert column(run, "transfers", "end_ns") == [start + 6400 * 100] * 2
