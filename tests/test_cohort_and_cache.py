"""Hand-made cases of the decode cohort, the KV cache and admission."""

from __future__ import annotations

import pytest

from kit import decode, residents, task
from mist.cohort import Cohort
from mist.memory.kv_cache import KVCache
from mist.request import Task

# --- cohort ---


def test_a_cohort_counts_contexts_by_its_step() -> None:
    cohort = Cohort(4)
    first, second = decode(1, 6, 9), decode(2, 3, 9)
    cohort.join(first, 3)
    assert (cohort.count, cohort.sum_context, cohort.context(first)) == (1, 6, 6)
    assert cohort.advance() is None
    cohort.join(second, 2)
    assert (cohort.count, cohort.sum_context) == (2, 7 + 3)
    assert cohort.advance() is None
    assert (cohort.context(first), cohort.context(second), cohort.sum_context) == (8, 4, 12)
    assert cohort.advance() == [first, second]
    assert (cohort.count, cohort.sum_context, cohort.calendar) == (0, 0, {})
    assert cohort.boundary == [0, 0, 0, 0]


def test_those_that_end_together_come_by_admission() -> None:
    cohort = Cohort(4)
    late, early = decode(9, 5, 9), decode(3, 5, 9)
    cohort.join(late, 2)
    cohort.advance()
    cohort.join(early, 1)
    assert cohort.advance() == [early, late]


@pytest.mark.parametrize("block_size", [1, 2, 3, 16])
def test_new_blocks_are_counted_by_boundaries(block_size: int) -> None:
    """A sequence opens a block whenever its context is a multiple of the block size."""
    cohort = Cohort(block_size)
    tasks = [decode(i, context, 99) for i, context in enumerate([1, 2, 3, 15, 16, 17, 32])]
    for step in range(40):
        if step < len(tasks):
            cohort.join(tasks[step], 60)
        joined = tasks[: step + 1]
        assert cohort.boundary[cohort.step % block_size] == sum(cohort.context(t) % block_size == 0 for t in joined)
        cohort.advance()


def test_leaving_early_takes_everything_along() -> None:
    cohort = Cohort(4)
    stays, leaves = decode(1, 6, 9), decode(2, 3, 9)
    cohort.join(stays, 5)
    cohort.join(leaves, 5)
    cohort.advance()
    cohort.leave(leaves)
    assert (cohort.count, cohort.sum_context, cohort.calendar) == (1, 7, {5: [stays]})
    assert sum(cohort.boundary) == 1
    cohort.leave(stays)
    assert cohort.calendar == {}


# --- KV cache ---


def hold(kv: KVCache, who: Task, tokens: int) -> int:
    """Let `who` compute its first `tokens` as a client would; the tokens found in the cache."""
    hit = kv.match(who)
    kv.refer(who, hit)
    kv.take(kv.blocks_for(tokens) - kv.blocks_for(hit.num_tokens))
    kv.index(who, tokens)
    return hit.num_tokens


def release(kv: KVCache, who: Task, tokens: int, *, resumes: bool = False) -> None:
    kv.release(who, tokens, kv.blocks_for(tokens), resumes=resumes)


def cached(kv: KVCache, *keys: int) -> int:
    """Tokens of the cache that a new prompt of these units finds."""
    probe = task(999, len(keys) * kv.hash_block_size + 1, keys=keys)
    return kv.match(probe).num_tokens


def caching(num_blocks: int = 8, block_size: int = 4, unit: int = 4) -> KVCache:
    return KVCache(num_blocks, block_size, enable_prefix_caching=True, hash_block_size=unit)


def test_without_prefix_caching_nothing_outlives_its_release() -> None:
    kv = KVCache(8, 4, hash_block_size=4)
    one = task(0, 8, keys=(1, 2))
    assert hold(kv, one, 8) == 0
    assert (kv.free, kv.cached, kv.used) == (6, 0, 2)
    release(kv, one, 8, resumes=True)
    assert (kv.free, kv.cached, kv.used) == (8, 0, 0)
    assert hold(kv, task(1, 8, keys=(1, 2)), 8) == 0


def test_blocks_round_up() -> None:
    kv = KVCache(8, 4)
    assert [kv.blocks_for(n) for n in (0, 1, 4, 5, 8)] == [0, 1, 1, 2, 2]


def test_a_unit_can_be_hit_as_soon_as_it_is_scheduled() -> None:
    kv = caching()
    hold(kv, task(0, 8, keys=(1, 2)), 8)
    two = task(1, 12, keys=(1, 2, 9))
    assert kv.match(two) == (8, 2, 0, 0)
    hold(kv, two, 12)
    assert (kv.used, kv.free) == (3, 5)


def test_at_least_one_token_is_computed() -> None:
    kv = caching()
    hold(kv, task(0, 8, keys=(1, 2)), 8)
    assert kv.match(task(1, 8, keys=(1, 2))).num_tokens == 4
    assert kv.match(task(1, 9, keys=(1, 2, 3))).num_tokens == 8


def test_a_partial_last_unit_is_never_indexed() -> None:
    kv = caching()
    hold(kv, task(0, 7, keys=(1, 2)), 7)
    assert cached(kv, 1, 2) == 4


def test_a_chain_ends_at_the_first_unit_that_is_missing() -> None:
    kv = caching()
    hold(kv, task(0, 12, keys=(1, 2, 3)), 12)
    assert cached(kv, 1, 7, 8) == 4
    assert cached(kv, 7, 8, 9) == 0


def test_shared_units_are_counted_once_and_freed_with_the_last() -> None:
    kv = caching()
    one, two = task(0, 9, keys=(1, 2, 3)), task(1, 9, keys=(1, 2, 4))
    hold(kv, one, 9)
    hold(kv, two, 9)
    assert (kv.used, kv.count_referenced_units()) == (4, 2)
    release(kv, one, 9)
    assert (kv.used, kv.cached) == (3, 1)
    release(kv, two, 9)
    assert (kv.used, kv.cached, kv.free) == (0, 4, 4)
    assert kv.count_evictable() == kv.cached


def test_duplicates_are_merged() -> None:
    """Two compute the same unit at once, the second having looked before the first indexed: one copy remains."""
    kv = caching(unit=8)
    one, two = task(0, 9, keys=(1, 2)), task(1, 9, keys=(1, 2))
    kv.take(1)
    kv.index(one, 4)
    kv.take(1)
    kv.index(two, 4)
    assert (kv.used, kv.count_referenced_units()) == (2, 0)
    for who in (one, two):
        kv.take(1)
        kv.index(who, 8)
    assert (kv.used, kv.count_referenced_units(), kv.free) == (2, 2, 6)
    for who in (one, two):
        release(kv, who, 8)
    assert (kv.free, kv.cached) == (6, 2)


def test_a_duplicate_of_unreferenced_content_revives_it() -> None:
    kv = caching(unit=8)
    one, two = task(0, 9, keys=(1, 2)), task(1, 9, keys=(1, 2))
    kv.take(1)
    kv.index(two, 4)  # has begun before the unit was cached
    hold(kv, one, 8)
    release(kv, one, 8)
    assert (kv.cached, kv.used) == (2, 1)
    kv.take(1)
    kv.index(two, 8)
    assert (kv.cached, kv.used, kv.free) == (0, 2, 6)


def test_free_blocks_go_first_then_the_least_recently_used() -> None:
    kv = caching(num_blocks=4)
    for key in (1, 2, 3):
        one = task(key, 4, keys=(key,))
        hold(kv, one, 4)
        release(kv, one, 4)
    assert (kv.free, kv.cached) == (1, 3)
    toucher = task(7, 5, keys=(1, 50))
    kv.refer(toucher, kv.match(toucher))
    release(kv, toucher, 4)  # 1 is now the most recently used
    kv.take(1)
    assert [cached(kv, key) for key in (1, 2, 3)] == [4, 4, 4]
    kv.take(1)
    assert [cached(kv, key) for key in (1, 2, 3)] == [4, 0, 4]
    kv.take(1)
    assert [cached(kv, key) for key in (1, 2, 3)] == [4, 0, 0]


def test_a_sequence_is_evicted_tail_first() -> None:
    kv = caching(num_blocks=4)
    one = task(0, 12, keys=(1, 2, 3))
    hold(kv, one, 12)
    release(kv, one, 12)
    for left in (12, 8, 4, 0):
        kv.take(1)
        assert cached(kv, 1, 2, 3) == max(0, left)


def test_evicted_units_are_told_of_tail_first() -> None:
    kv = caching(4)
    told: list[int] = []
    kv.on_evict = told.append
    one, two = task(0, 12, keys=(1, 2, 3)), task(1, 9, keys=(7, 8))
    hold(kv, one, 12)
    release(kv, one, 12)
    hold(kv, two, 9)
    assert (told, cached(kv, 1)) == ([3, 2], 4)
    release(kv, two, 9)
    kv.take(4)
    assert told == [3, 2, 1, 8, 7]  # the ninth token's block is nobody's but the request's own


def test_private_blocks_go_before_the_prefix() -> None:
    """What a sequence generated lies behind its hashed units, so it is evicted first."""
    kv = caching(num_blocks=4)
    one = task(0, 4, keys=(1,))
    hold(kv, one, 4)
    kv.take(2)  # generated tokens
    release(kv, one, 12)
    assert (kv.free, kv.cached) == (1, 3)
    kv.take(3)
    assert cached(kv, 1) == 4
    kv.take(1)
    assert cached(kv, 1) == 0


def test_a_preempted_request_finds_its_own_run() -> None:
    kv = caching()
    one = task(0, 8, keys=(1, 2))
    hold(kv, one, 8)
    kv.take(2)
    release(kv, one, 14, resumes=True)  # 2 units, a full private block and a partial one
    one.target_tokens = 15
    assert kv.match(one) == (12, 2, 1, 3)
    assert kv.match(task(5, 15, keys=(1, 2))).num_tokens == 8  # somebody else finds the units only
    hold(kv, one, 15)
    assert (kv.used, kv.cached, kv.free) == (4, 1, 3)


def test_a_run_shrinks_from_its_tail() -> None:
    kv = caching(num_blocks=4, unit=0)
    one = task(0, 16)
    hold(kv, one, 12)
    release(kv, one, 12, resumes=True)
    kv.take(2)  # the free block and the tail of the run
    assert kv.match(one) == (8, 0, 2, 2)
    kv.take(2)
    assert kv.match(one).num_tokens == 0


def test_a_finished_request_leaves_no_run() -> None:
    kv = caching(unit=0)
    one = task(0, 16)
    hold(kv, one, 12)
    release(kv, one, 12)
    assert kv.cached == 3
    assert kv.match(one).num_tokens == 0


def test_a_run_behind_an_evicted_unit_is_lost() -> None:
    kv = caching(num_blocks=5)
    one = task(0, 4, keys=(1,))
    hold(kv, one, 4)
    kv.take(2)
    release(kv, one, 12, resumes=True)
    other = task(1, 4, keys=(1,))
    one.target_tokens = 13
    assert kv.match(one).num_tokens == 12
    kv._evictable.pop(kv._segments.pop(1))  # as if only the unit had gone
    kv.cached -= 1
    kv.free += 1
    assert kv.match(one).num_tokens == 0
    assert kv.match(other).num_tokens == 0


def test_a_run_that_others_have_overtaken_is_of_no_use() -> None:
    """Preempted in the middle of a unit that another has computed since: the run begins before its end."""
    kv = caching(unit=8)
    one, other = task(0, 20, keys=(1,)), task(1, 9, keys=(1,))
    hold(kv, one, 7)
    release(kv, one, 7, resumes=True)
    assert kv.match(one) == (4, 0, 1, 1)
    hold(kv, other, 9)
    assert kv.match(one) == (8, 1, 0, 0)


def test_hash_blocks_are_multiples_of_blocks() -> None:
    with pytest.raises(ValueError, match="hash_block_size 6 is not a multiple of block_size 4"):
        caching(unit=6)


# --- admission ---


def test_admission_is_all_or_nothing() -> None:
    one = task(0, 10)
    who = residents(KVCache(2, 4), one)
    assert who.admit(one, 100) == 0
    assert (who.kv.free, list(who.waiting), who.pending_tokens, one.admission) == (2, [one], 10, -1)
    assert who.admit(one, 8) == 8
    assert (who.kv.free, list(who.waiting), who.prefilling, who.num_running) == (0, [], [one], 1)


def test_whole_admits_all_that_remains_or_nothing() -> None:
    one = task(0, 10)
    who = residents(KVCache(9, 4), one)
    assert who.admit(one, 9, whole=True) == 0
    assert who.admit(one, 10, whole=True) == 10


def test_the_watermark_keeps_blocks_for_those_that_run() -> None:
    one = task(0, 8)
    who = residents(KVCache(4, 4, watermark_blocks=3), one)
    assert who.admit(one, 8) == 0
    assert who.admit(one, 4) == 4  # one block, three are kept
    assert who.grow(one, 4)  # growing may use them


def test_a_hit_counts_against_what_is_available_only_where_nobody_holds_it() -> None:
    kv = caching(num_blocks=3)
    first = task(0, 8, keys=(1, 2))
    hold(kv, first, 8)
    one = task(1, 9, keys=(1, 2, 3))
    who = residents(kv, one)
    assert who.admit(one, 99) == 1  # two shared blocks, one new
    kv = caching(num_blocks=3)
    hold(kv, first := task(0, 8, keys=(1, 2)), 8)
    release(kv, first, 8)
    kv.take(1)
    one = task(1, 9, keys=(1, 2, 3))
    who = residents(kv, one)
    assert who.admit(one, 99) == 0  # the two cached ones are all that is left


def test_a_preempted_decode_has_to_compute_what_it_generated() -> None:
    one = decode(0, 6, 9)
    one.generated_tokens = 1
    who = residents(KVCache(9, 4), one)
    who.admit(one, 6)
    assert who.computed(one, 6)
    who.chunks_done()
    who.cohort.join(one, 8)
    for _ in range(3):
        assert who.grow_decodes() == 0
        who.decode_step_done()
    who.preempt(one)
    assert (one.generated_tokens, one.target_tokens, one.computed_tokens, one.admission) == (4, 10, 0, -1)
    assert (who.kv.free, list(who.waiting), who.num_running, who.cohort.count) == (9, [one], 0, 0)
    assert (who.pending_tokens, one.request.num_preemptions) == (10, 1)
