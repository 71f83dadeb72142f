"""The tiers of one client: what is found where, what is kept, fetch or compute, and the expected time of it all."""

from __future__ import annotations

from fractions import Fraction
from itertools import product
from math import prod, sqrt
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kit import task
from mist.memory.hierarchy import Found, Hierarchy, expected_ns, exposed_ns
from mist.memory.kv_cache import KVCache
from mist.memory.tier import MemoryTier, Tier
from mist.request import Task
from mist.scenario.seeds import random_of
from mist.units import GB, KIB, MIB

UNIT = 16
TOKEN_BYTES = 10

shares = st.fractions(0, 1, max_denominator=50)
times = st.fractions(0, 1000, max_denominator=50)


def alone(tier: Tier, num_bytes: int) -> tuple[int, int]:
    """A fetch that shares its way with nobody."""
    return tier.spec.access_ns, tier.spec.fetch_ns(num_bytes) - tier.spec.access_ns


def tier(num_units: int = 100, **more: Any) -> Tier:
    """Room for so many units, at a byte per ns."""
    return Tier(MemoryTier("host", num_units * UNIT * TOKEN_BYTES, **{"bytes_per_s": 1e9, **more}), UNIT)


def hierarchy(*tiers: Tier, **more: Any) -> Hierarchy:
    return Hierarchy(tiers, **{"token_bytes": TOKEN_BYTES, "unit_tokens": UNIT, **more})


def prompt(*keys: int, more: int = 1) -> Task:
    """A prompt of whole units and `more` tokens."""
    return task(0, len(keys) * UNIT + more, keys=keys)


def units(found: list[Found]) -> list[tuple[Tier, float]]:
    return [(one, tokens / UNIT) for one, tokens in found]


# --- by content ---


def test_each_tier_is_asked_for_what_those_before_it_do_not_have() -> None:
    near, far = tier(), tier()
    seen = hierarchy(near, far)
    near.insert((1, 2, 3), 3, TOKEN_BYTES, 0)
    far.insert((1, 2, 3, 4, 5), 5, TOKEN_BYTES, 0)
    assert units(seen.find(prompt(1, 2, 3, 4, 5, 6), 0, 0)) == [(near, 3), (far, 2)]
    assert units(seen.find(prompt(1, 2, 3, 4, 5, 6), 2 * UNIT, 0)) == [(near, 1), (far, 2)]
    assert units(seen.find(prompt(1, 2, 3, 4, 5, 6), 3 * UNIT, 0)) == [(far, 2)]
    assert seen.find(prompt(1, 2, 3, 4, 5, 6), 5 * UNIT, 0) == []
    assert seen.find(prompt(9), 0, 0) == []


def test_the_device_may_end_within_a_unit() -> None:
    seen = hierarchy(one := tier())
    one.insert((1, 2), 2, TOKEN_BYTES, 0)
    assert seen.find(prompt(1, 2), UNIT + 5, 0) == [(one, UNIT - 5)]
    assert seen.find(prompt(1, 2, more=99), 2 * UNIT + 5, 0) == []


def test_at_least_one_token_is_computed() -> None:
    seen = hierarchy(one := tier())
    one.insert((1, 2), 2, TOKEN_BYTES, 0)
    assert units(seen.find(prompt(1, 2, more=0), 0, 0)) == [(one, 1)]
    assert units(seen.find(prompt(1, 2, more=1), 0, 0)) == [(one, 2)]


def test_without_hashes_or_tiers_nothing_is_found() -> None:
    assert hierarchy(tier()).find(task(0, 99), 0, 0) == []
    assert hierarchy().find(prompt(1, 2), 0, 0) == []
    assert hierarchy().write_through(prompt(1, 2), 99, 0) == []
    assert hierarchy().write_back(1, 0) == 0


def test_a_tier_is_shared_by_clients_of_one_layout() -> None:
    one = tier()
    mine, yours, other = hierarchy(one), hierarchy(one), hierarchy(one, layout=1)
    assert mine.write_through(prompt(1, 2), 2 * UNIT + 1, 0) == [(one, 2 * UNIT * TOKEN_BYTES)]
    assert yours.write_through(prompt(1, 2), 2 * UNIT + 1, 0) == []
    assert units(yours.find(prompt(1, 2), 0, 0)) == [(one, 2)]
    assert other.find(prompt(1, 2), 0, 0) == []
    other.write_through(prompt(1, 2), UNIT, 0)
    assert units(other.find(prompt(1, 2), 0, 0)) == [(one, 1)]
    assert len(one) == 3


def test_llama_70b_has_320_kib_a_token_in_every_account() -> None:
    one = Tier(MemoryTier("host", 2**40, 1e9), 512)
    seen = Hierarchy([one], token_bytes=320 * KIB, unit_tokens=512)
    assert seen.write_through(task(0, 1025, keys=(1, 2)), 1025, 0) == [(one, 1024 * 320 * KIB)]
    assert one.held_bytes == 320 * MIB


# --- who is written to ---


def test_through_is_written_when_it_is_computed_and_back_when_it_is_evicted() -> None:
    """The device holds four units, the nearer tier two, the farther one all that these lose."""
    near, far = tier(2, write="back"), tier(50, write="back")
    seen = hierarchy(near, far)
    device = KVCache(4, UNIT, enable_prefix_caching=True, hash_block_size=UNIT)
    device.on_evict = lambda key: seen.write_back(key, 0)
    for keys in ((1, 2, 3, 4), (5, 6, 7, 8), (9, 10, 11, 12)):
        one = prompt(*keys, more=0)
        device.take(4)
        device.index(one, 4 * UNIT)
        device.release(one, 4 * UNIT, 4, resumes=False)
        assert seen.write_through(one, 4 * UNIT, 0) == []
    assert units(seen.find(prompt(5, 6, 7, 8), 0, 0)) == [(near, 2), (far, 2)]
    assert units(seen.find(prompt(1, 2, 3, 4), 0, 0)) == [(far, 4)]
    assert units(seen.find(prompt(9, 10), 0, 0)) == []
    assert near.inserted_bytes == 8 * UNIT * TOKEN_BYTES
    assert far.inserted_bytes == near.evicted_bytes == 6 * UNIT * TOKEN_BYTES


def test_a_tier_may_be_written_through_above_one_that_is_written_back() -> None:
    near, far = tier(2), tier(write="back")
    seen, beside = hierarchy(near, far), hierarchy(near, far)
    seen.write_through(prompt(1, 2), 2 * UNIT, 0)
    beside.write_through(prompt(3, 4), 2 * UNIT, 0)
    assert seen.write_back(9, 0) == 0
    assert units(seen.find(prompt(1, 2), 0, 0)) == [(far, 2)]


def test_what_is_written_back_has_one_size_and_one_place() -> None:
    near = tier()
    hierarchy(near, tier(write="back"))
    with pytest.raises(ValueError, match="host is written back to two memories"):
        hierarchy(near, tier(write="back"))
    with pytest.raises(ValueError, match="its chunks must be those of the memory above"):
        hierarchy(tier(chunk_tokens=4 * UNIT, write="back"))
    hierarchy(tier(chunk_tokens=4 * UNIT), tier(chunk_tokens=4 * UNIT, write="back"))


# --- by given rates ---


def rated(*rates: float, seed: int = 1, **more: Any) -> Hierarchy:
    tiers = [tier(hit_rate=rate, **more) for rate in rates]
    return hierarchy(*tiers, rng_of=lambda i: random_of(seed, "tiers", i))


def asking(index: int, hit_tokens: int = 64, tokens: int = 100) -> Task:
    one = task(index, tokens)
    one.request.hit_tokens = hit_tokens
    return one


def test_rates_of_one_and_zero_are_certain() -> None:
    seen = rated(0.0, 1.0, 1.0)
    assert seen.find(asking(0), 0, 0) == [(seen.tiers[1], 64)]
    assert seen.find(asking(0), 24, 0) == [(seen.tiers[1], 40)]
    assert seen.find(asking(0), 64, 0) == []
    assert seen.find(asking(0, tokens=64), 0, 0) == [(seen.tiers[1], 63)]
    assert rated(0.0).find(asking(0), 0, 0) == []


def test_draws_are_the_request_s_own() -> None:
    """Whatever order requests come in, and however often, the same hit the same tier; rates move no other draw."""
    seen, again, less = rated(0.3, 0.5), rated(0.3, 0.5), rated(0.2, 0.5)

    def where(one: Hierarchy, index: int) -> int | None:
        found = one.find(asking(index), 0, 0)
        return one.tiers.index(found[0].tier) if found else None

    forwards = [where(seen, i) for i in range(200)]
    assert [where(again, i) for i in reversed(range(200))][::-1] == forwards
    assert [where(seen, i) for i in range(200)] == forwards
    assert {(a, b) for a, b in zip(forwards, [where(less, i) for i in range(200)], strict=True) if a != b} <= {
        (0, 1), (0, None)}  # fmt: skip


def test_rates_are_for_all_tiers_or_none() -> None:
    with pytest.raises(ValueError, match="hit_rate is given for some tiers only"):
        hierarchy(tier(hit_rate=0.5), tier(), rng_of=np.random.default_rng)


# --- how long it takes ---


@given(st.lists(st.tuples(shares, times), max_size=5), times)
def test_expected_time_is_that_of_all_outcomes(tiers: list[tuple[Fraction, Fraction]], recompute: Fraction) -> None:
    """All 2^n ways in which tiers hit or miss, each with its probability; and the sum as it is written."""
    total = Fraction(0)
    for hits in product([True, False], repeat=len(tiers)):
        probability = prod((h if hit else 1 - h for hit, (h, _) in zip(hits, tiers, strict=True)), start=Fraction(1))
        times = [t for hit, (_, t) in zip(hits, tiers, strict=True) if hit]
        total += probability * (times[0] if times else recompute)
    rates = [h for h, _ in tiers]
    assert expected_ns(rates, [t for _, t in tiers], recompute) == total
    missed = [prod((1 - h for h in rates[:i]), start=Fraction(1)) for i in range(len(tiers) + 1)]
    assert total == sum(m * h * t for m, (h, t) in zip(missed, tiers, strict=False)) + missed[-1] * recompute


def test_draws_have_the_expected_time() -> None:
    n, tokens, recompute = 20_000, 64, 7_000
    seen = rated(0.5, 0.3, latency_ns=300)
    seen.tiers[1].spec = MemoryTier("far", 10**6, 0.25e9, 1_000, hit_rate=0.3)
    specs = [one.spec for one in seen.tiers]
    fetch = [spec.fetch_ns(tokens * TOKEN_BYTES) for spec in specs]
    assert fetch == [300 + 640, 1_000 + 4 * 640]
    found = [seen.find(asking(i), 0, 0) for i in range(n)]
    took = np.array([f[0].tier.spec.fetch_ns(f[0].num_tokens * TOKEN_BYTES) if f else recompute for f in found])
    expected = expected_ns([0.5, 0.3], list(map(float, fetch)), float(recompute))
    assert abs(took.mean() - expected) < 3.9 * took.std() / sqrt(n)  # alpha = 1e-4
    assert [one.hits + one.misses for one in seen.tiers] == [n, seen.tiers[0].misses]


def test_a_fetch_takes_latency_wire_and_decoding() -> None:
    plain = MemoryTier("host", 10**12, 2 * GB, 500)
    assert [plain.fetch_ns(size) for size in (0, 1, 2_000)] == [500, 500, 1_500]
    linked = MemoryTier("rack", 10**12, 2 * GB, 500, link_bytes_per_s=1 * GB, link_latency_ns=9)
    assert linked.fetch_ns(2_000) == 509 + 2_000
    packed = MemoryTier("host", 10**12, 2 * GB, 500, compression=4.0, decode_bytes_per_s=10 * GB)
    assert packed.fetch_ns(2_000) == 500 + 250 + 200


@given(times, times, times, st.integers(1, 8))
def test_layers_overlap_as_a_pipeline_of_two_stages(
    latency: Fraction, fetch: Fraction, compute: Fraction, num_layers: int
) -> None:
    """Layer by layer: each is fetched after the one before it, and computed once it is there and its turn comes."""
    latency_ns, fetch_ns, compute_ns = (round(1000 * t) for t in (latency, fetch, compute))
    there, done = Fraction(latency_ns), Fraction(0)
    for _ in range(num_layers):
        there += Fraction(fetch_ns, num_layers)
        done = max(there, done) + Fraction(compute_ns, num_layers)
    exposed = done - compute_ns
    assert exposed <= exposed_ns(fetch_ns, compute_ns, num_layers, latency_ns) < exposed + 1


def test_a_single_layer_overlaps_nothing_and_many_leave_what_is_longer() -> None:
    assert exposed_ns(900, 5_000, 1) == 900
    assert exposed_ns(900, 5_000, 900) == 1
    assert exposed_ns(5_000_000, 900_000, 10**6) == pytest.approx(4_100_000, abs=5)


def test_it_is_fetched_where_that_is_sooner() -> None:
    """160 bytes a unit: 160 ns from the near tier, 1,600 from the far one; a unit is computed in 200 ns."""
    near, far = tier(), tier(bytes_per_s=0.1e9)
    seen = hierarchy(near, far)
    found = [Found(near, 3 * UNIT), Found(far, 2 * UNIT)]

    def recompute(num_found: int) -> int:
        return (6 * UNIT - num_found) * 200 // UNIT

    assert seen.worth_fetching(found, recompute, alone) == found[:1]
    assert seen.worth_fetching(found, lambda n: 20 * recompute(n), alone) == found
    shared = seen.worth_fetching(found, recompute, lambda one, size: (one.spec.access_ns, round(2 * size)))
    assert shared == []
    assert seen.worth_fetching(found, lambda n: 0, alone) == []
    assert (
        seen.worth_fetching(found, lambda n: (6 * UNIT - n) * 160 // UNIT, alone) == found[:1]
    )  # as soon, and less work
    assert seen.worth_fetching([], recompute, alone) == []


def test_layers_that_overlap_make_fetching_worth_it() -> None:
    one = tier(latency_ns=100)
    found = [Found(one, 4 * UNIT)]
    seen = hierarchy(one)

    def recompute(num_found: int) -> int:
        return (8 * UNIT - num_found) * 150 // UNIT

    assert seen.worth_fetching(found, recompute, alone) == []  # 100 + 640 + 600 > 1,200
    assert seen.worth_fetching(found, recompute, alone, num_layers=32) == found
