"""Branches on the client and on the naive per-token scheduler, bit for bit, on thousands of random small scenarios."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest

from reference import Job
from side_by_side import campaign, same
from test_reference import drawn_speculation, scenario

SCENARIOS_PER_CASE = 150
MOST_JOBS = 8
CASES = [
    ("chunked", False),
    ("chunked", True),
    ("continuous", False),
    ("continuous", True),
    ("static", False),
    ("mixed", True),
]


def branching(seed: int, policy: str, caching: bool) -> tuple[list[Job], dict[str, int]]:
    """Scenarios of `test_reference.py` whose answers are often several: from one prefill or from one each."""
    jobs, limits = scenario(seed, policy, caching)
    jobs = jobs[:MOST_JOBS]
    rng = random.Random(f"branches {policy} {caching} {seed}")
    crowded = rng.random() < 0.5
    for i, job in enumerate(jobs):
        if crowded:
            job = jobs[i] = replace(job, arrival=job.arrival // 8)
        if rng.random() < 0.3:
            continue
        lengths = [rng.choice([rng.randint(1, 40), rng.randint(1, 40), rng.randint(0, 3)])] * rng.randint(1, 6)
        if rng.random() < 0.8:
            lengths = [rng.choice([rng.randint(1, 40), rng.randint(1, 40), rng.randint(0, 3)]) for _ in lengths]
        jobs[i] = replace(
            job,
            output=rng.choice([max(lengths), max(lengths), 1, job.output]),
            branches=tuple(lengths),
            k=rng.choice([0, 0, rng.randint(1, 4)]),
            cancels=rng.random() < 0.7,
            prefills=rng.random() < 0.25,
            after=rng.choice([(0, 0), (0, 0), (rng.randint(1, 40), 0), (rng.randint(1, 40), rng.randint(1, 20))]),
        )
    return jobs, limits


def compare(seed: int, policy: str, caching: bool) -> Counter[str]:
    jobs, limits = branching(seed, policy, caching)
    speculation = drawn_speculation(seed) if seed % 4 == 0 else None
    return same(jobs, limits, policy, caching, speculation, seed % 3 == 0).events


#: what has to happen so often, at least, in 100 scenarios of a policy
OFTEN = {
    "placeless": 150,
    "placed": 100,
    "surrendered": 8,
    "preempted branches": 150,
    "cancelled in flight": 25,
    "cancelled at once": 8,
    "cancelled waiting": 8,
    "cancelled placeless": 15,
    "ended though cancelled": 3,
}


@pytest.mark.parametrize(("policy", "caching"), CASES)
def test_branches_equal_the_naive_scheduler(policy: str, caching: bool) -> None:
    share = 10 if policy == "static" else 1  # it admits no more than it has room for at first
    often = {each: n / share for each, n in OFTEN.items()}
    campaign(compare, range(SCENARIOS_PER_CASE), often, policy, caching)


@pytest.mark.long
@pytest.mark.parametrize(("policy", "caching"), CASES)
@pytest.mark.parametrize("part", range(4))
def test_branches_equal_the_naive_scheduler_at_length(policy: str, caching: bool, part: int) -> None:
    campaign(compare, range(100_000 + part * 1000, 100_000 + (part + 1) * 1000), {}, policy, caching)
