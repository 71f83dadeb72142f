"""A limit of tokens per prompt and step, on the client and on the naive scheduler, bit for bit: several half computed.

By arrival and by priority: there whoever ranks behind may have its chunk in the batch already when it has to go.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest

from side_by_side import campaign, same
from test_reference import drawn_speculation
from test_reference_priority import ranked

SCENARIOS_PER_CASE = 100
#: what has to happen so often, at least, in 100 scenarios by arrival, and by priority
OFTEN = {"half computed together": (25, 25), "chunks taken out": (0, 5), "preempted": (50, 50), "placed": (70, 70)}


def compare(seed: int, caching: bool, by_priority: bool) -> Counter[str]:
    jobs, limits = ranked(seed, "chunked", caching)
    rng = random.Random(f"threshold {caching} {seed}")
    limits["long_prefill_token_threshold"] = rng.choice([1, 2, 3, rng.randint(1, 12)])
    if rng.random() < 0.5:  # many prompts side by side, and no room for all
        jobs = [replace(job, arrival=job.arrival // 20) for job in jobs]
        limits["max_num_seqs"] += 3
        limits["max_num_batched_tokens"] += 20
        limits["num_blocks"] = max(40 // limits["block_size"], limits["num_blocks"] // 2)
    speculation = drawn_speculation(seed) if seed % 5 == 0 else None
    return same(jobs, limits, "chunked", caching, speculation, by_priority=by_priority).events


@pytest.mark.parametrize("caching", [False, True], ids=["plain", "prefix-caching"])
@pytest.mark.parametrize("by_priority", [False, True], ids=["by-arrival", "by-priority"])
def test_a_threshold_equals_the_naive_scheduler(caching: bool, by_priority: bool) -> None:
    often = {each: n[by_priority] for each, n in OFTEN.items()}
    events = campaign(compare, range(SCENARIOS_PER_CASE), often, caching, by_priority)
    assert by_priority or not events["chunks taken out"]


@pytest.mark.long
@pytest.mark.parametrize("caching", [False, True], ids=["plain", "prefix-caching"])
@pytest.mark.parametrize("by_priority", [False, True], ids=["by-arrival", "by-priority"])
def test_a_threshold_equals_the_naive_scheduler_at_length(caching: bool, by_priority: bool) -> None:
    campaign(compare, range(100_000, 104_000), {}, caching, by_priority)
