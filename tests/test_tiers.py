"""Memory tiers: eviction against naive policies, what a tier holds, its laws, and the reuse in public traces."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mist.errors import ScenarioError
from mist.memory.eviction import Eviction
from mist.memory.eviction.lfu import LFU
from mist.memory.eviction.lru import LRU
from mist.memory.eviction.ttl import TTL
from mist.memory.tier import MemoryTier, Tier
from mist.units import NS_PER_S
from mist.workload import RequestTable
from mist.workload.column_map import chain_keys
from mist.workload.trace import find_trace, read_trace

UNIT = 16
TTL_S = 3.0
POLICIES: dict[str, Callable[[], Eviction]] = {"lru": LRU, "lfu": LFU, "ttl": lambda: TTL(TTL_S)}

#: prompts over an alphabet of few blocks, so that they often begin alike
prompts = st.lists(st.lists(st.integers(0, 2), max_size=6), max_size=40).map(chain_keys)
uses = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2), st.booleans()), max_size=60)


def tier(
    num_units: int = 4, *, eviction: Callable[[], Eviction] = LRU, chunk_tokens: int = 0, compression: float = 1.0
) -> Tier:
    """A tier for `num_units` units of one byte a token."""
    spec = MemoryTier(
        "host", num_units * UNIT, 1e9, eviction=eviction, chunk_tokens=chunk_tokens, compression=compression
    )
    return Tier(spec, UNIT)


def serve(one: Tier, keys: tuple[int, ...], now: int = 0) -> int:
    """A request of this prompt comes and is computed; the units found."""
    found = one.lookup(keys, 0, now)
    one.insert(keys, len(keys), 1, now)
    return found


def held(one: Tier, keys: Iterable[int]) -> set[int]:
    return {key for key in keys if key in one}


# --- eviction policies ---


class Naive:
    """Every policy as a list of (key, uses, last use in order, last use in time), searched from end to end."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.rows: dict[int, tuple[int, int, int]] = {}
        self.order = 0

    def touch(self, key: int, now: int) -> None:
        self.order += 1
        self.rows[key] = (self.rows.get(key, (0, 0, 0))[0] + 1, self.order, now)

    def evict(self, now: int, *, full: bool) -> int | None:
        by_order = sorted(self.rows, key=lambda key: self.rows[key][1])
        for key in by_order:
            if self.name == "ttl" and now - self.rows[key][2] >= TTL_S * NS_PER_S:
                del self.rows[key]
                return key
        if not full:
            return None
        key = min(by_order, key=lambda key: self.rows[key][0]) if self.name == "lfu" else by_order[0]
        del self.rows[key]
        return key


@pytest.mark.parametrize("name", POLICIES)
@given(uses)
def test_policies_are_what_they_say(name: str, story: list[tuple[int, int, bool]]) -> None:
    policy, naive, now = POLICIES[name](), Naive(name), 0
    for key, seconds, evict in story:
        now += seconds * NS_PER_S
        if evict:
            full = bool(naive.rows) and key > 0
            assert policy.evict(now, full=full) == naive.evict(now, full=full)
        else:
            policy.touch(key, now)
            naive.touch(key, now)
    while naive.rows:
        assert policy.evict(now, full=True) == naive.evict(now, full=True)


def test_the_least_frequently_used_goes_and_among_equals_the_one_used_longest_ago() -> None:
    policy = LFU()
    for key in (1, 2, 3, 1, 2, 1, 4, 3):
        policy.touch(key, 0)
    assert [policy.evict(0, full=True) for _ in range(4)] == [4, 2, 3, 1]


@pytest.mark.parametrize("ttl_s", [0.0, -1.0, float("inf"), float("nan")])
def test_a_time_to_live_is_some_seconds(ttl_s: float) -> None:
    with pytest.raises(ValueError, match="ttl_s is"):
        TTL(ttl_s)


def test_what_nobody_used_for_its_time_is_gone() -> None:
    one = tier(9, eviction=lambda: TTL(10))
    one.insert((1, 2), 2, 1, 0)
    assert one.lookup((1,), 0, 9 * NS_PER_S) == 1
    assert one.lookup((1, 2), 0, 10 * NS_PER_S) == 1
    assert (len(one), one.evicted_bytes) == (1, UNIT)
    assert one.lookup((1, 2), 0, 20 * NS_PER_S) == 0
    assert len(one) == 0


# --- what a tier holds ---


def test_a_prompt_is_found_as_far_as_it_goes() -> None:
    one = tier(9)
    assert one.insert((1, 2, 3), 3, 1, 0) == 3 * UNIT
    assert [one.lookup((1, 2, 3, 4), start, 0) for start in range(5)] == [3, 2, 1, 0, 0]
    assert one.lookup((5, 2, 3), 0, 0) == 0
    assert (one.hits, one.misses) == (6, 1 + 1 + 1 + 1 + 0 + 3)
    assert one.insert((1, 2, 3), 3, 1, 0) == 0


def test_a_prompt_loses_its_tail_first() -> None:
    one = tier(4)
    serve(one, (1, 2, 3))
    one.insert((7, 8), 2, 1, 0)
    assert held(one, range(9)) == {1, 2, 7, 8}
    assert one.lookup((1, 2, 3), 0, 0) == 2
    one.insert((9,), 1, 1, 0)
    one.insert((10, 11), 2, 1, 0)
    assert held(one, range(12)) == {1, 9, 10, 11}


def test_what_the_device_has_is_used_too() -> None:
    """Else the head would go while its tail, which the device doesn't have, is read again and again."""
    one = tier(4)
    serve(one, (1, 2, 3))
    serve(one, (9,))
    assert one.lookup((1, 2, 3), 2, 0) == 1
    serve(one, (8,))
    assert held(one, range(10)) == {1, 2, 3, 8}


def test_of_a_prompt_beyond_the_capacity_the_head_is_kept() -> None:
    one = tier(2)
    assert one.insert((1, 2, 3, 4), 4, 1, 0) == 2 * UNIT
    assert (held(one, range(5)), one.evicted_bytes) == ({1, 2}, 0)


def test_units_form_chunks_from_the_front_and_only_whole_ones_count() -> None:
    one = tier(12, chunk_tokens=4 * UNIT)
    assert (one.entry_units, one.entry_tokens) == (4, 64)
    assert one.insert((1, 2, 3), 3, 1, 0) == 0
    assert one.insert(tuple(range(1, 11)), 10, 1, 0) == 8 * UNIT
    assert held(one, range(20)) == {4, 8}
    assert [one.lookup(tuple(range(1, 11)), start, 0) for start in (0, 3, 4, 6, 8, 9)] == [8, 5, 4, 2, 0, 0]
    assert one.lookup((1, 2, 3, 4, 5, 6, 7, 99), 0, 0) == 4
    assert one.lookup((1, 2, 3), 0, 0) == 0


def test_a_unit_may_be_several_chunks() -> None:
    one = tier(4, chunk_tokens=UNIT // 2)
    assert (one.entry_units, one.entry_tokens) == (1, UNIT)
    assert serve(one, (1, 2)) == 0
    assert serve(one, (1, 2)) == 2


@pytest.mark.parametrize("chunk_tokens", [24, 12, 17])
def test_chunks_align_with_units(chunk_tokens: int) -> None:
    with pytest.raises(ValueError, match=f"chunk_tokens is {chunk_tokens}: neither a multiple nor a part of 16"):
        tier(chunk_tokens=chunk_tokens)


def test_compressed_content_takes_less_room() -> None:
    one = tier(4, compression=3.5)
    assert one.insert(tuple(range(20)), 20, 1, 0) == 12 * 5  # ceil(16 / 3.5) bytes each
    assert (len(one), one.held_bytes) == (12, 60)


def test_what_is_evicted_is_told_and_what_is_written_back_is_counted() -> None:
    upper, lower = tier(2), tier(4)
    upper.on_evict = lower.write_back
    upper.insert((1, 2), 2, 1, 0)
    upper.insert((3, 4), 2, 1, 0)
    assert held(lower, range(5)) == {1, 2}
    assert lower.inserted_bytes == 2 * UNIT
    assert lower.lookup((1, 2), 0, 0) == 2
    assert lower.write_back(2, UNIT, 0) == 0


def test_its_own_head_comes_back_where_the_policy_gives_it_up() -> None:
    """Nobody is told of it, and the whole prompt is there afterwards."""
    one, told = tier(4, eviction=LFU), []
    one.on_evict = lambda key, num_bytes, now: told.append(key)
    one.insert((1,), 1, 1, 0)
    for _ in range(3):
        serve(one, (7, 8))
    assert one.insert((1, 2, 3), 3, 1, 0) == 3 * UNIT
    assert (held(one, range(9)), told) == ({1, 2, 3, 7}, [8])


# --- laws ---


@pytest.mark.parametrize("name", POLICIES)
@given(prompts, st.integers(0, 9), st.sampled_from([1, 2, 3]), st.sampled_from([1.0, 1.7]), st.data())
def test_accounts_balance(
    name: str, table: list[tuple[int, ...]], num_units: int, units: int, compression: float, data: st.DataObject
) -> None:
    one = tier(num_units, eviction=POLICIES[name], chunk_tokens=units * UNIT, compression=compression)
    now = asked = 0
    for keys in table:
        now += data.draw(st.integers(0, 2)) * NS_PER_S
        start = data.draw(st.integers(0, len(keys)))
        found = one.lookup(keys, start, now)
        asked += len(keys) - start
        assert found == 0 or (start + found) % units == 0
        assert one.hits + one.misses == asked
        before = one.inserted_bytes
        assert one.insert(keys, len(keys), 1, now) == one.inserted_bytes - before
        assert one.held_bytes == one.inserted_bytes - one.evicted_bytes == one.count_held_bytes()
        assert one.held_bytes <= one.spec.capacity_bytes
        room = one.spec.capacity_bytes // one.spec.stored_bytes(one.entry_tokens)
        chunks = keys[units - 1 :: units][:room]
        assert held(one, chunks) == set(chunks)


@pytest.mark.parametrize("name", ["lru", "ttl"])
@given(prompts, st.integers(1, 9), st.data())
def test_no_tail_without_its_head(name: str, table: list[tuple[int, ...]], num_units: int, data: st.DataObject) -> None:
    """In whatever order requests come and are computed, as far as they get."""
    one = tier(num_units, eviction=POLICIES[name])
    for now, keys in enumerate(table):
        end = data.draw(st.integers(0, len(keys)))
        if data.draw(st.booleans()):
            one.lookup(keys, end, now * NS_PER_S // 2)
        else:
            one.insert(keys, end, 1, now * NS_PER_S // 2)
        for other in table:
            there = [key in one for key in other]
            assert there == sorted(there, reverse=True)


@given(prompts, st.sampled_from([1, 2]))
def test_a_larger_lru_tier_holds_what_a_smaller_one_does(table: list[tuple[int, ...]], units: int) -> None:
    tiers = [tier(n * units, chunk_tokens=units * UNIT) for n in (1, 2, 3, 5, 8, 13, 1000)]
    everything = {key for keys in table for key in keys}
    for keys in table:
        found = [serve(one, keys) for one in tiers]
        assert found == sorted(found)
        contents = [held(one, everything) for one in tiers]
        assert all(small <= large for small, large in pairwise(contents))


@given(prompts)
def test_an_infinite_tier_finds_what_was_there_before(table: list[tuple[int, ...]]) -> None:
    one, seen = tier(10**6), set[int]()
    for keys in table:
        assert serve(one, keys) == len(seen & set(keys))
        seen.update(keys)


# --- public traces ---


@pytest.fixture(scope="module", params=["conversation", "synthetic"])
def mooncake(request: pytest.FixtureRequest) -> tuple[str, RequestTable]:
    name = f"mooncake_fast25/{request.param}_trace.jsonl.gz"
    try:
        return str(request.param), read_trace(find_trace(name, Path(), os.environ))
    except ScenarioError:
        pytest.skip(f"set MIST_DATA to a folder that holds the public trace {name}")


def test_reuse_in_mooncake_grows_with_the_capacity_up_to_the_published(mooncake: tuple[str, RequestTable]) -> None:
    """Upper bounds of reuse, of all blocks: 0.366 and 0.640. Equal with chunks of 256, two of which are a block."""
    name, table = mooncake
    assert table.block_keys is not None
    capacities = (1_000, 10_000, 50_000, 10**7)
    tiers = [Tier(MemoryTier("host", units * 512, 1e9, chunk_tokens=256), 512) for units in capacities]
    everything = range(1 + max(map(max, filter(None, table.block_keys))))
    for row, keys in enumerate(table.block_keys):
        found = [serve(one, keys) for one in tiers]
        assert found == sorted(found)
        if row % 1500 == 0:
            contents = [held(one, everything) for one in tiers]
            assert all(small <= large for small, large in pairwise(contents))
    rates = [one.hits / (one.hits + one.misses) for one in tiers]
    assert rates == sorted(rates)
    assert rates[0] < rates[1] < rates[2]
    assert round(rates[-1], 3) == {"conversation": 0.366, "synthetic": 0.640}[name]
