"""Priorities on the client and on the naive per-token scheduler, bit for bit: with branches, caching, speculation."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest

from reference import Job
from side_by_side import campaign, same
from test_reference import drawn_speculation, scenario
from test_reference_branches import CASES, branching

SCENARIOS_PER_CASE = 125
#: what has to happen so often, at least, in 100 scenarios of a policy
OFTEN = {"preempted before the last": 25, "grown and preempted": 12, "preempted branches": 100, "placed": 80}


def ranked(seed: int, policy: str, caching: bool) -> tuple[list[Job], dict[str, int]]:
    """Every other one with branches; few priorities or many, and some arrivals at one instant."""
    jobs, limits = (branching if seed % 2 else scenario)(seed, policy, caching)
    rng = random.Random(f"priorities {policy} {caching} {seed}")
    most = rng.choice([0, 1, 2, 9])
    return [replace(job, priority=rng.randint(-1, most)) for job in jobs], limits


def compare(seed: int, policy: str, caching: bool) -> Counter[str]:
    jobs, limits = ranked(seed, policy, caching)
    speculation = drawn_speculation(seed) if seed % 5 == 0 else None
    return same(jobs, limits, policy, caching, speculation, by_priority=True).events


@pytest.mark.parametrize(("policy", "caching"), CASES)
def test_priorities_equal_the_naive_scheduler(policy: str, caching: bool) -> None:
    share = 10 if policy == "static" else 1  # it admits no more than it has room for at first
    often = {each: n / share for each, n in OFTEN.items()}
    campaign(compare, range(SCENARIOS_PER_CASE), often, policy, caching)


@pytest.mark.long
@pytest.mark.parametrize(("policy", "caching"), CASES)
@pytest.mark.parametrize("part", range(4))
def test_priorities_equal_the_naive_scheduler_at_length(policy: str, caching: bool, part: int) -> None:
    campaign(compare, range(100_000 + part * 1000, 100_000 + (part + 1) * 1000), {}, policy, caching)
