"""Preemption by swapping: one swap by hand, its laws on random clusters, and what it saves; under the ledger."""

from __future__ import annotations

import pathlib
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import test_first_of
import test_forks
import test_hand_over
from kit import POLICIES, LinearSteps, Run, SmallScenario, play, rows, sampled, small_scenarios, table
from mist.batching.chunked import Chunked
from mist.batching.orders.fcfs import FCFS
from mist.batching.orders.priority import Priority
from mist.client import Client
from mist.errors import InvariantError
from mist.fabric import Path
from mist.kernel import Kernel
from mist.lanes import share_stages
from mist.network import HOST
from mist.records import FINISHED, KV_SWAP
from mist.scenario.build import run
from mist.sharing import Channel
from mist.speculation import Speculation
from mist.swap import SwappingResidents, SwapSpace
from mist.testing import record_bytes, with_hints
from mist.testing.cluster import KVLink
from ordered import pressed
from scenarios import problems, read
from test_outages import First

#: 10 bytes a token at one byte per ns
LINK = KVLink(10, 1e9, 500)
#: swaps that there are, at least: these policies hardly admit what has to go, or never
LEAST = {"TensorRTLLM": -1, "Static": 0, "SGLang": 0}


def swaps(result: Run) -> list[tuple[int, ...]]:
    rows = result.records.transfers.as_columns()
    names = ("request", "sender", "receiver", "bytes", "start_ns", "end_ns")
    chosen = rows["kind"] == KV_SWAP
    return list(zip(*(rows[name][chosen].tolist() for name in names), strict=True))


def test_one_swap_by_hand() -> None:
    """Two of 4 + 9 tokens in 5 blocks of 4: both decode to 8 tokens, then the second goes until the first has ended."""
    result = play(table([0, 0], [4, 4], [9, 9]), num_blocks=5, block_size=4, host=LINK, swap_blocks=9)
    steps = LinearSteps()
    now = steps.of(8, 0, 0, 2)
    now += sum(steps.of(0, 2, 2 * (4 + k), 0) for k in range(1, 5))  # contexts of 8: two full blocks each
    copy = 500 + 2 * 4 * 10
    assert swaps(result)[0] == (1, 0, HOST, 80, now, now + copy)
    now += copy + sum(steps.of(0, 1, 4 + k, 0) for k in range(5, 9))
    rows = result.records.requests.as_columns()
    ends = dict(zip(rows["request"].tolist(), rows["end_ns"].tolist(), strict=True))
    assert ends[0] == now
    assert swaps(result)[1:] == [(1, HOST, 0, 80, now, now + copy)]
    now += copy + sum(steps.of(0, 1, 4 + k, 0) for k in range(5, 9))
    assert ends[1] == now
    assert rows["num_preemptions"].tolist() == [0, 1]
    assert int(result.records.tasks.as_columns()["computed_tokens"].sum()) == 8  # the prompts, and nothing again


def test_without_room_on_the_host_it_is_computed_again() -> None:
    arguments: dict[str, Any] = {"num_blocks": 5, "block_size": 4, "host": LINK}
    workload = table([0, 0], [4, 4], [9, 9])
    full, none = play(workload, swap_blocks=1, **arguments), play(workload, **arguments)
    assert record_bytes(full.records) == record_bytes(none.records)
    assert not swaps(full)


def play_swapping(scenario: SmallScenario, policy: Any, order: Any, blocks: int, **more: Any) -> Run:
    limits = {"max_num_seqs": scenario.max_num_seqs, "max_num_batched_tokens": scenario.max_num_batched_tokens}
    kv = {name: getattr(scenario, name) for name in ("num_blocks", "block_size", "unit_tokens", "caching", "watermark")}
    workload = with_hints(scenario.workload(), len(scenario.requests))
    return play(workload, policy=lambda: policy(**limits, order=order()), host=LINK, swap_blocks=blocks, **kv, **more)


def check(result: Run) -> int:
    """Everybody is served, and what went out came back whole; the number of swaps."""
    assert set(result.records.requests.as_columns()["status"].tolist()) <= {FINISHED}
    out, back = (Counter((r, n) for r, s, _, n, *_ in swaps(result) if (s == HOST) == came) for came in (False, True))
    assert out == back
    for client in result.clients:
        assert client.residents.kv.used == 0
        assert isinstance(client.residents, SwappingResidents)
        assert client.residents.swap.used == 0
    return sum(out.values())


@pytest.mark.parametrize("order", [FCFS, Priority])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("part", sampled(range(3), 1))
def test_swaps_obey_the_laws_under_pressure(part: int, policy: Any, order: Any) -> None:
    num_swaps = 0
    for seed in range(80 * part, 80 * (part + 1)):
        blocks = random.Random(seed).choice([2, 5, 1000])
        num_swaps += check(play_swapping(pressed(seed), policy, order, blocks, num_clients=1 + seed % 2))
    assert num_swaps > LEAST.get(policy.__name__, 5)


@settings(max_examples=150)
@given(small_scenarios(gap_ns=300), st.sampled_from(POLICIES), st.sampled_from([1, 4, 1000]))
def test_random_swaps_obey_the_laws(scenario: SmallScenario, policy: Any, blocks: int) -> None:
    result = play_swapping(scenario, policy, FCFS, blocks)
    assert all(client.residents.kv.used == 0 for client in result.clients)


@pytest.mark.parametrize("policy", POLICIES)
def test_with_room_for_all_no_decode_is_computed_again(policy: Any) -> None:
    """Every prompt token is computed once, and every preempted decode went to the host."""
    num_preemptions = 0
    for seed in range(80):
        scenario = pressed(seed)
        result = play_swapping(scenario, policy, FCFS, 1 << 30, num_clients=1)
        tasks = result.records.tasks.as_columns()
        decodes = tasks["join_step"] >= 0
        computed = int(tasks["computed_tokens"].sum() + tasks["cached_tokens"].sum())
        half_done = int((tasks["computed_tokens"] + tasks["cached_tokens"])[(tasks["how"] == 1) & ~decodes].sum())
        assert computed - half_done == sum(prompt for _, prompt, _, _ in scenario.requests), seed
        num_preemptions += len(swaps(result))
    assert num_preemptions > LEAST.get(policy.__name__, 15)


def test_speculation_swaps_too() -> None:
    num_swaps = 0
    for seed in range(80):
        speculation = Speculation(2, 0.5, lambda *key, s=seed: np.random.default_rng((s, *key)))
        scenario = pressed(seed)
        scenario = replace(scenario, num_blocks=scenario.num_blocks + 2)  # of drafts
        num_swaps += check(play_swapping(scenario, Chunked, FCFS, 1000, speculation=speculation))
    assert num_swaps > 10


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cluster of the tests of branches and hand-overs swaps."""

    def swapping(*arguments: Any, **options: Any) -> Run:
        return play(*arguments, **{"host": LINK, "swap_blocks": 7, **options})

    for module in (test_forks, test_first_of, test_hand_over):
        monkeypatch.setattr(module, "play", swapping)


@pytest.mark.usefixtures("everywhere")
def test_branches_and_hand_overs_with_swaps_obey_the_laws() -> None:
    for seed in range(80):
        test_forks.test_random_thoughts_obey_the_laws(seed)
        test_first_of.test_random_races_obey_the_laws(seed)


def test_the_ledger_sees_what_a_swap_space_loses(monkeypatch: pytest.MonkeyPatch) -> None:
    def keep(self: SwapSpace, task: Any) -> None:
        self.tasks.pop(task, None)

    monkeypatch.setattr(SwapSpace, "forget", keep)
    with pytest.raises(InvariantError, match="swap space in use"):
        play(table([0, 0], [4, 4], [9, 9]), num_blocks=5, block_size=4, host=LINK, swap_blocks=9)


# --- who else is on the link ---


@dataclass
class OneLink:
    """All clients reach their hosts' memory over one and the same link, which has a channel each way."""

    carries_all: bool = field(default=False, init=False)
    out: Path = field(default_factory=lambda: Path((Channel("to_host", 1e9),), 500), init=False)
    back: Path = field(default_factory=lambda: Path((Channel("from_host", 1e9),), 500), init=False)

    def path(self, sender: int, receiver: int) -> Path:
        return self.back if sender < 0 else self.out


def crowded(scenario: SmallScenario, *, hits: bool = False, **more: Any) -> Run:
    """Three clients play the same at once: they swap, and with `hits` fetch most of each prompt, over one link."""
    scenario = replace(scenario, requests=tuple(each for each in scenario.requests for _ in range(3)))
    workload = scenario.workload()
    if hits:
        workload.cached_tokens = np.maximum(workload.input_tokens - 1, 0)
    return scenario.play(workload=workload, num_clients=3, paths=OneLink(), host=LINK, swap_blocks=1000, **more)


def test_two_clients_that_swap_at_once_share_the_link() -> None:
    """The swap by hand above on two clients: each copy takes twice as long on the wire."""
    result = play(table([0] * 4, [4] * 4, [9] * 4), num_clients=2, num_blocks=5, block_size=4, paths=OneLink(),
                  host=LINK, swap_blocks=9)  # fmt: skip
    alone = play(table([0, 0], [4, 4], [9, 9]), num_blocks=5, block_size=4, host=LINK, swap_blocks=9)
    took = [end - start for *_, start, end in swaps(result)]
    assert took == [500 + 160] * 4
    ends = sorted(result.records.requests.as_columns()["end_ns"].tolist())
    assert ends == [each + 80 * (1 + k // 2) for k, each in enumerate(
        sorted(alone.records.requests.as_columns()["end_ns"].tolist() * 2))]  # fmt: skip


def beaten(result: Run, *, comes_back: bool) -> list[tuple[int, int]]:
    """Spans of time in which more bytes passed the link one way than it carries: starts and ends of transfers."""
    names = ("start_ns", "end_ns", "bytes", "sender")
    rows = zip(*(result.records.transfers.as_columns()[name].tolist() for name in names), strict=True)
    mine = [(start, end - 500, size) for start, end, size, sender in rows if (sender < 0) == comes_back]
    return [
        (first, last)
        for first, _, _ in mine
        for _, last, _ in mine
        if sum(size for start, end, size in mine if start >= first and end <= last) > max(0, last - first) + len(mine)
    ]


@pytest.mark.parametrize("hits", [False, True])
def test_copies_and_fetches_never_take_more_of_the_link_than_there_is(hits: bool) -> None:
    num_swaps = num_shared = 0
    for seed in range(80):
        scenario = pressed(seed)
        if hits and not scenario.caching:
            continue
        result = crowded(scenario, hits=hits)
        assert not beaten(result, comes_back=True), seed
        assert not beaten(result, comes_back=False), seed
        num_swaps += check(result)
        num_shared += sum(end - start > 500 + size for _, _, _, size, start, end in swaps(result))
    assert min(num_swaps, num_shared) > 5


def test_a_step_computes_once_its_copies_are_there() -> None:
    """And these wait for the step alone: the first leaves as it begins, the next ones as the one before is there."""
    num_swaps = 0
    for seed in range(40):
        result = crowded(pressed(seed))
        steps, rows = result.records.steps.as_columns(), result.records.transfers.as_columns()
        ends = dict(zip(zip(steps["client"].tolist(), steps["start_ns"].tolist(), strict=True),
                        steps["end_ns"].tolist(), strict=True))  # fmt: skip
        free: dict[tuple[int, int], int] = {}
        for sender, receiver, queued, start, end in zip(
            *(rows[name].tolist() for name in ("sender", "receiver", "queued_ns", "start_ns", "end_ns")), strict=True
        ):
            step = max(sender, receiver), queued
            assert start == free.get(step, queued)
            free[step] = end
            num_swaps += 1
        assert all(end + LinearSteps().base < ends[step] for step, end in free.items())
    assert num_swaps > 30


@pytest.mark.parametrize("hits", [False, True])
def test_running_ahead_changes_nothing(hits: bool) -> None:
    for seed in range(40):
        scenario = pressed(seed)
        ahead = crowded(scenario, hits=hits and scenario.caching)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Kernel, "horizon", lambda kernel: kernel.now)
            stepwise = crowded(scenario, hits=hits and scenario.caching)
        assert rows(ahead.records) == rows(stepwise.records), seed


def in_lanes(num_stages: int) -> Callable[[Kernel, list[Client]], None]:
    return lambda kernel, clients: share_stages(clients, num_stages, kernel)


def test_a_lane_that_is_alone_swaps_as_a_client_does() -> None:
    num_swaps = 0
    for seed in range(40):
        options: dict[str, Any] = {"num_clients": 2, "router": First(), "host": LINK, "swap_blocks": 1000}
        plain, lane = (pressed(seed).play(**options, **each) for each in ({}, {"prepare": in_lanes(2)}))
        assert rows(plain.records) == rows(lane.records), seed
        num_swaps += check(lane)
    assert num_swaps > 5


def test_attention_groups_wait_for_the_copies_of_each_other() -> None:
    num_swaps = 0
    for seed in range(40):
        result = crowded(pressed(seed), prepare=in_lanes(1))
        steps = result.records.steps.as_columns()
        spans = set(zip(steps["start_ns"].tolist(), steps["end_ns"].tolist(), strict=True))
        assert len(spans) == len({start for start, _ in spans})
        latest = dict(spans)
        for *_, start, end in swaps(result):
            assert end < latest[max(begin for begin in latest if begin <= start)]
        num_swaps += check(result)
    assert num_swaps > 10


# --- scenarios ---

TIGHT = """\
workload: {arrivals: {poisson: {rate_per_s: 40}}, num_requests: 120, input_tokens: 300, output_tokens: 200}
clients:
  gpu: {device: h100-sxm, tp: 2, model: llama-3.1-8b, kv_cache: {num_blocks: 900, preemption: swap}}
"""


def test_a_pool_that_swaps(tmp_path: pathlib.Path) -> None:
    """Blocks of 16 tokens of 128 KiB go over both links at once, and no prompt is computed twice but for chunks."""
    scenario = read(tmp_path, TIGHT)
    assert scenario.pools["gpu"].swap_blocks() == 4 * 2**30 // (16 * 64 * 1024)
    swapped, computed = (
        run(each, check=True) for each in (scenario, read(tmp_path, TIGHT.replace("swap", "recompute")))
    )
    rows = swapped.records.transfers.as_columns()
    assert set(rows["kind"].tolist()) == {KV_SWAP}
    assert set((rows["bytes"] % (16 * 128 * 1024)).tolist()) == {0}
    device = scenario.pools["gpu"].device
    took = rows["end_ns"] - rows["start_ns"] - device.host_link_latency_ns
    rate = 2 * device.host_link_bytes_per_s
    assert np.allclose(took, rows["bytes"] / rate * 1e9, atol=2)
    assert swapped.metrics["kv_swap"]["transfers"] == len(rows["kind"]) > 20
    assert computed.metrics["kv_swap"] is None
    tokens = [int(each.records.steps.as_columns()["num_prefill_tokens"].sum()) for each in (swapped, computed)]
    assert 120 * 300 <= tokens[0] < tokens[1]


def test_swap_space_is_for_devices(tmp_path: pathlib.Path) -> None:
    assert not read(tmp_path, TIGHT, "clients.gpu.kv_cache.preemption=recompute").pools["gpu"].swap_blocks()
    half = read(tmp_path, TIGHT, "clients.gpu.kv_cache.swap_space=2 GiB")
    assert half.pools["gpu"].swap_blocks() == 2 * 2**30 // (16 * 64 * 1024)
    found = problems(tmp_path, TIGHT.replace("h100-sxm, tp: 2", "epyc-9554"))
    assert any("is a CPU" in each.message for each in found), found
    assert "out of range" in problems(tmp_path, TIGHT, "clients.gpu.kv_cache.swap_space=0 GiB")[0].message
