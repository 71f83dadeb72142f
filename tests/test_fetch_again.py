"""Prefixes that the device loses while their tasks wait: memories are asked again once such a task is next.

On clients with made-up step times; the ledger watches every run.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kit import POLICIES, Run, engine, play, table
from mist.batching.chunked import Chunked
from mist.batching.orders.priority import Priority
from mist.errors import InvariantError
from mist.front_end import FrontEnd
from mist.memory.tier import MemoryTier
from mist.offload import Offload
from mist.records import PREFIX_FETCH
from mist.request import Task
from mist.testing import record_bytes
from test_offload import FAR_APART, TOKEN_BYTES, UNIT, WHOLE, behind, column, memory, sent

#: tokens -> ns of a step that computes them alone
STEP = {1: 1017, 15: 1157, 33: 1337, 49: 1497}


def lost(*, bytes_per_s: float = 1e9, always: bool = True, policy: Any = Chunked, others: int = 2) -> Run:
    """One at a time on four blocks: when request 3 comes the device has its prefix, and request 2 takes its blocks."""
    at = [0, *(FAR_APART + i for i in range(4 + others - 1))]
    prompts, keys = [33, 15, 49, 33] + [15] * others, [(1, 2), (), (8, 9, 10), (1, 2)] + [()] * others
    return play(
        table(at, prompts, [1] * len(at), keys),
        policy=lambda: policy(1 << 20, 1),
        perf=WHOLE,
        caching=True,
        unit_tokens=UNIT,
        num_blocks=4,
        connect=behind(memory(bytes_per_s=bytes_per_s), always=always),
    )


@pytest.mark.parametrize("policy", POLICIES)
def test_what_the_device_lost_while_a_task_waited_is_fetched_when_it_is_next(policy: Any) -> None:
    run = lost(policy=policy, others=0)
    next_ = FAR_APART + STEP[15] + STEP[49]
    assert sent(run, PREFIX_FETCH) == [(3, 320, next_, next_ + 320)]
    assert column(run, "requests", "cached_tokens") == [0, 0, 0, 32]
    assert column(run, "requests", "end_ns")[3] == next_ + 320 + STEP[1]


def test_others_run_meanwhile_and_it_comes_back_to_the_front() -> None:
    run = lost()
    next_ = FAR_APART + STEP[15] + STEP[49]
    tasks = run.records.tasks.as_columns()
    started = dict(zip(tasks["request"][::-1].tolist(), tasks["started_ns"][::-1].tolist(), strict=True))
    assert started[4] == next_
    assert started[3] == next_ + STEP[15] > next_ + 320
    assert started[5] == started[3] + STEP[1]


@pytest.mark.parametrize(("bytes_per_s", "fetched"), [(1.1e9, True), (0.9e9, False)])
def test_the_sooner_of_fetching_and_computing_then(bytes_per_s: float, fetched: bool) -> None:
    """Computing takes 10 ns a token and fetching 10 bytes of it; asked and counted once either way."""
    run = lost(bytes_per_s=bytes_per_s, always=False, others=0)
    assert [request for request, *_ in sent(run, PREFIX_FETCH)] == [3] * fetched
    assert column(run, "requests", "cached_tokens")[3] == 32 * fetched
    offload = run.clients[0].offload
    assert offload is not None
    assert (offload.hierarchy.tiers[0].hits, offload.hierarchy.tiers[0].misses) == (2, 2 + 3)


def test_nothing_is_asked_again_that_the_device_still_has(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Task] = []

    def ask(self: FrontEnd, task: Task) -> bool:
        asked.append(task)
        return False

    monkeypatch.setattr(FrontEnd, "fetch_again", ask)
    lost()
    assert asked, "the device loses what request 3 needs"
    asked.clear()
    conversations(3, num_blocks=4000)
    assert not asked


@pytest.mark.parametrize("caching", [True, False])
def test_what_a_preempted_task_lost_is_fetched(caching: bool) -> None:
    """Request 1 goes as both need a fourth of six blocks; the other one comes to hold all of them."""
    workload = table([0, 0], [33, 33], [60, 60], [(1, 2), (3, 4)])
    options: dict[str, Any] = {"perf": WHOLE, "unit_tokens": UNIT, "num_blocks": 6, "caching": caching}
    run = play(workload, policy=lambda: Chunked(1 << 20, 4), connect=behind(memory()), **options)
    assert column(run, "requests", "num_preemptions") == [0, 1]
    first = column(run, "requests", "end_ns")[0]
    ((request, num_bytes, begun, come),) = sent(run, PREFIX_FETCH)
    assert (request, num_bytes, come) == (1, 320, begun + 320)
    tasks = run.records.tasks.as_columns()
    (again,) = np.flatnonzero((tasks["request"] == 1) & (tasks["started_ns"] > 0) & (tasks["cached_tokens"] > 0))
    assert tasks["cached_tokens"][again] == 32
    assert begun == first
    assert tasks["started_ns"][again] == come


def test_a_decode_that_waited_behind_it_goes_on_as_its_prefix_is_fetched_again() -> None:
    """Eight blocks: 1 takes the cached prefix of 3, which is next, and the place of 2, which is swapped out.

    As 1 ends, 3 leaves the queue to be fetched for, and whoever waited behind it joins that very step.
    """
    workload = table([0, FAR_APART, FAR_APART + 1, FAR_APART + 5000], [33, 48, 15, 33], [1, 40, 60, 1],
                     [(1, 2), (), (), (1, 2)])  # fmt: skip
    workload.sizes["priority"] = np.array([0, 0, 5, 1])
    run = play(workload, policy=lambda: Chunked(1 << 20, 2, Priority()), perf=WHOLE, caching=True, unit_tokens=UNIT,
               num_blocks=8, swap_blocks=8, connect=behind(memory()))  # fmt: skip
    ends = dict(zip(column(run, "requests", "request"), column(run, "requests", "end_ns"), strict=True))
    ((request, _, begun, come),) = sent(run, PREFIX_FETCH)
    assert (request, begun) == (3, ends[1])
    tasks = run.records.tasks.as_columns()
    assert tasks["started_ns"][tasks["request"] == 2][-1] == begun
    assert begun < come < ends[3]


# --- many at once ---


def conversations(seed: int, num_blocks: int = 14, until_ns: int = 1 << 62, **more: Any) -> Run:
    """Turns of a few conversations in a crowd; behind the device a tier with room for most of them, or for some."""
    rng = np.random.default_rng(seed)
    num_requests = int(rng.integers(20, 50))
    talks, units = rng.integers(0, 6, num_requests), rng.integers(1, 8, num_requests)
    keys = [tuple(range(100 * talk, 100 * talk + n)) for talk, n in zip(talks.tolist(), units.tolist(), strict=True)]
    prompts = [len(each) * UNIT + int(rng.integers(1, UNIT)) for each in keys]
    outputs = rng.integers(1, 60, num_requests).tolist()
    at = np.sort(rng.integers(0, 200_000, num_requests)).tolist()
    spec = MemoryTier(
        "host",
        int(rng.integers(10, 60)) * UNIT * TOKEN_BYTES,
        10.0 ** rng.integers(8, 11),
        latency_ns=int(rng.integers(0, 3000)),
        write=("through", "back")[int(rng.integers(2))],
    )
    limits: dict[str, Any] = {"max_num_seqs": int(rng.integers(1, 6)), "max_num_batched_tokens": 300}
    if rng.integers(2):
        limits["order"] = Priority()
    workload = table(at, prompts, outputs, keys)
    workload.sizes["priority"] = rng.integers(0, 3, num_requests)
    profile = replace(engine(request_ns=seed % 3 * 100), async_scheduling=bool(seed % 2))
    return play(
        workload,
        policy=lambda: POLICIES[seed % 3](**limits),
        num_clients=1 + seed % 2,
        num_blocks=num_blocks,
        caching=True,
        unit_tokens=UNIT,
        engine_profile=profile,
        connect=behind(spec, always=bool(rng.integers(2)), layers=(1, 8)[seed % 2]),
        until_ns=int(rng.integers(1, 400_000)) if seed % 5 == 0 else until_ns,
        **more,
    )


def test_tasks_that_lose_their_prefixes_again_and_again_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time a task is asked again it has less on the device, unless it was preempted: so nothing goes round."""
    fetch_again, fetched_again, asked = FrontEnd.fetch_again, Counter[int](), Counter[tuple[int, int]]()
    num_preempted = 0

    def counting(self: FrontEnd, task: Task) -> bool:
        nonlocal num_preempted
        before = task.found_from
        found = fetch_again(self, task)
        assert task.found_from < before
        asked[task.request.index, task.request.num_preemptions] += 1
        num_preempted += found and task.request.num_preemptions > 0
        fetched_again[task.request.index] += found
        return found

    monkeypatch.setattr(FrontEnd, "fetch_again", counting)
    total = most = 0
    for seed in range(75):
        run = conversations(seed)
        if seed % 5:
            assert all(end >= 0 for end in column(run, "requests", "end_ns")), f"conversations({seed})"
        total += sum(fetched_again.values())
        most = max([most, *asked.values()])
        fetched_again.clear()
        asked.clear()
    assert total > 100
    assert num_preempted > 12
    assert 1 < most < 8, "not above the units of a prompt"


def test_running_ahead_of_the_clock_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(1, 40, 2):
        ahead = record_bytes(conversations(seed).records)
        with monkeypatch.context() as patch:
            patch.setattr("mist.kernel.Kernel.horizon", lambda self: self.now)
            step_by_step = record_bytes(conversations(seed).records)
        assert ahead[:3] == step_by_step[:3], f"conversations({seed})"


def test_a_fetch_of_what_the_device_has_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def look(self: Offload, task: Task, now: int, *, again: bool = False) -> Any:
        return 0, self.hierarchy.find(task, 0, now, again=again)

    monkeypatch.setattr(Offload, "_look", look)
    with pytest.raises(InvariantError, match="gpu-0: found here: 32 is not 0"):
        lost()
