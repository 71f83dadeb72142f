"""The lazy client against the naive per-token scheduler, bit for bit, on thousands of random small scenarios."""

from __future__ import annotations

import random

import numpy as np
import pytest

from kit import sampled
from mist.speculation import Speculation
from reference import Job
from side_by_side import POLICIES, same

SCENARIOS_PER_CASE = 125


def scenario(seed: int, policy: str, caching: bool) -> tuple[list[Job], dict[str, int]]:
    """Tiny pools and budgets; lengths 0, 1, block - 1, block, block + 1 and random; shared prefixes."""
    rng = random.Random(f"{policy} {caching} {seed}")
    block = rng.choice([1, 2, 4, 8])
    unit = block * rng.choice([1, 2, 4]) if caching and rng.random() < 0.8 else 0
    edges = [1, block, block + 1, max(1, block - 1), 2 * block]
    jobs = []
    now = 0
    prefixes = [tuple(100 * p + i for i in range(12)) for p in range(3)]
    for i in range(rng.randint(1, 14)):
        now += rng.choice([0, 0, rng.randint(0, 4000), rng.randint(0, 400)])
        prompt = rng.choice(edges) if rng.random() < 0.3 else rng.randint(1, 40)
        output = rng.choice([0, 1, 2, block, block + 1]) if rng.random() < 0.3 else rng.randint(1, 40)
        keys: tuple[int, ...] = ()
        if unit:
            shared = rng.randint(0, 6)
            count = -(-prompt // unit)
            own = [10_000 * (i + 1) + k for k in range(count)]
            keys = (rng.choice(prefixes)[:shared] + tuple(own))[:count]
        jobs.append(Job(i, now, prompt, output, keys))
    seqs = rng.randint(1, 8)
    limits = {
        "max_num_seqs": seqs,
        "max_num_batched_tokens": seqs + rng.randint(0, 30),
        "num_blocks": rng.randint(max(1, 30 // block), max(2, 160 // block)),
        "block_size": block,
        "unit_tokens": unit,
        "watermark": rng.choice([0, 0, 1, 2]),
    }
    return jobs, limits


def drawn_speculation(seed: int) -> Speculation:
    rng = random.Random(seed)
    acceptance = rng.choice([0.0, 1.0, rng.random(), rng.random()])
    return Speculation(rng.randint(1, 5), acceptance, lambda *key: np.random.default_rng((seed, *key)))


def compare(seed: int, policy: str, caching: bool, speculation: Speculation | None = None) -> int:
    jobs, limits = scenario(seed, policy, caching)
    reference = same(jobs, limits, policy, caching, speculation)
    return sum(preemptions for *_, preemptions in reference.done.values())


@pytest.mark.parametrize("caching", [False, True], ids=["plain", "prefix-caching"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("part", sampled(range(2), 1))
def test_equals_the_naive_scheduler(policy: str, caching: bool, part: int) -> None:
    preemptions = 0
    for seed in range(part * SCENARIOS_PER_CASE, (part + 1) * SCENARIOS_PER_CASE):
        try:
            preemptions += compare(seed, policy, caching)
        except BaseException:
            print(f"reproduce: compare({seed}, {policy!r}, {caching})")
            raise
    assert preemptions > SCENARIOS_PER_CASE // (25 if policy == "static" else 4), "hardly any preemption: proves little"


@pytest.mark.parametrize("caching", [False, True], ids=["plain", "prefix-caching"])
@pytest.mark.parametrize("policy", POLICIES)
def test_speculation_equals_the_naive_scheduler(policy: str, caching: bool) -> None:
    preemptions = 0
    for seed in range(500_000, 500_000 + SCENARIOS_PER_CASE):
        try:
            preemptions += compare(seed, policy, caching, drawn_speculation(seed))
        except BaseException:
            print(f"reproduce: compare({seed}, {policy!r}, {caching}, drawn_speculation({seed}))")
            raise
    assert preemptions > SCENARIOS_PER_CASE // (25 if policy == "static" else 4), "hardly any preemption: proves little"


@pytest.mark.long
@pytest.mark.parametrize("caching", [False, True], ids=["plain", "prefix-caching"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("part", range(4))
def test_equals_the_naive_scheduler_at_length(policy: str, caching: bool, part: int) -> None:
    for seed in range(100_000 + part * 2000, 100_000 + (part + 1) * 2000):
        compare(seed, policy, caching)
        compare(seed, policy, caching, drawn_speculation(seed))
