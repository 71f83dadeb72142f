"""Moments that random scenarios seldom meet: what is cancelled, cut, lost or taken back at just that instant."""

from __future__ import annotations

import random
from functools import partial

import pytest

import test_offload
from kit import rows
from mist.availability.events import Down, Up
from mist.batching.chunked import Chunked
from mist.batching.orders.priority import Priority
from mist.client import Client
from mist.memory.tier import BACK, MemoryTier
from mist.pipeline import RequestRandom
from mist.pipeline.agent import Agent
from mist.records import DROPPED, TIMED_OUT
from mist.request import DECODE, PREFILL, All, Pipeline, Request, Stage
from mist.tenant import Patience
from mist.testing.cluster import LinearSteps, Run, play, record_bytes, table, with_hints
from mist.workload.synthetic import Uniform
from test_outages import column, disturbed


@pytest.mark.parametrize("ledger", [True, False], ids=["watched", "alone"])
def test_who_gives_up_as_a_step_ends_is_let_go_with_the_next_one(ledger: bool) -> None:
    steps = LinearSteps(base=1000, per_prefill_token=0, per_decode=0, per_context=0, per_prefill=0)
    patience = Patience([100_000], [TIMED_OUT])
    result = play(table([0], [10], [5000]), perf=steps, patience=patience, ledger=ledger)
    assert column(result, "tasks", "how")[-1] == DROPPED
    assert len(result.records.steps) == 101


@pytest.mark.parametrize("ledger", [True, False], ids=["watched", "alone"])
def test_a_cut_counts_the_tokens_of_who_waits_for_a_client_to_come_up(ledger: bool) -> None:
    outage = disturbed(Down(20_000, "gpu-0", "retry"), Up(40_000, "gpu-0"))
    result = play(table([0], [10], [50]), disturb=outage, until_ns=30_000, ledger=ledger)
    generated = sum(column(result, "tasks", "generated_tokens"))
    assert column(result, "requests", "output_tokens") == [generated]
    assert generated > 0


def agents(down_ns: int) -> Run:
    """An agent of three turns, whose contexts are in the host's memory alone; its client is lost at `down_ns`."""
    workload = table([0], [64], [8])
    workload.hash_block_size = 16
    return play(
        workload,
        pipeline=Agent(turns=3, call_tokens=32, tool_ms=1, tool_output_tokens=64, hash_block_size=16),
        unit_tokens=16,
        policy=lambda: Chunked(1 << 20, 64),
        disturb=disturbed(Down(down_ns, "gpu-0", "retry"), Up(down_ns + 1, "gpu-0")),
        connect=test_offload.behind(test_offload.memory(), unit=16),
    )


def test_a_turn_that_begins_anew_is_still_known_to_memories() -> None:
    """Lost in its second turn: what it wrote before is fetched, by that turn and by the next."""
    undisturbed, lost = agents(10**12), agents(1_036_400)
    fetched = column(undisturbed, "requests", "cached_tokens")[0]
    assert fetched > 0
    assert sum(column(lost, "tasks", "cached_tokens")) >= fetched


@pytest.mark.parametrize("seed", range(20, 32))
def test_chunks_of_contexts_are_taken_out_of_a_batch(seed: int) -> None:
    """Prompts that several turns have in part, in a cache too small for all, by priority."""
    rng = random.Random(seed)
    num, unit = rng.randint(4, 10), 4
    inputs = [rng.randint(4, 40) for _ in range(num)]
    workload = table(sorted(rng.randint(0, 5000) for _ in range(num)), inputs, [rng.randint(1, 30) for _ in range(num)])
    workload.hash_block_size = unit
    pipeline = Agent(
        turns=rng.randint(2, 4), call_tokens=rng.randint(1, 20), tool_ms=Uniform(1, 3),
        tool_output_tokens=rng.randint(1, 30), sub_agents=2, fan_out=0.5, sub_agent_prompt_tokens=20,
        sub_agent_output_tokens=9, hash_block_size=unit,
    )  # fmt: skip
    policy = partial(
        Chunked, max_num_seqs=5, max_num_batched_tokens=5 + rng.randint(8, 40), long_prefill_token_threshold=3,
        order=Priority(),
    )  # fmt: skip
    runs = [
        play(with_hints(workload, seed), pipeline=pipeline, unit_tokens=unit, block_size=4, caching=True,
             num_blocks=70, policy=policy, perf=LinearSteps(base=200_000), ledger=ledger)
        for ledger in (True, False)
    ]  # fmt: skip
    assert record_bytes(runs[0].records) == record_bytes(runs[1].records)


class Forked:
    """A prompt, and two to four answers side by side, of lengths drawn by request."""

    kinds = (PREFILL, DECODE)
    is_fixed = False

    def __call__(self, request: Request, rng: RequestRandom) -> Pipeline:
        draws = random.Random(request.index)
        yield Stage(PREFILL, input_tokens=request.input_tokens)
        yield All([Stage(DECODE, oracle_output_tokens=draws.randint(10, 40)) for _ in range(draws.randint(2, 4))])


def test_what_a_fork_evicts_is_written_back_before_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of a prompt's last block evict at the end of a step; the spans of decodes behind it don't put that off."""
    monkeypatch.setattr(Client, "_took", property(lambda self: 0, lambda self, took: None), raising=False)
    num_written = 0
    for seed in range(30):
        rng = random.Random(seed)
        num = rng.randint(4, 9)
        prompts = [8 * rng.randint(1, 5) + rng.choice([1, 3]) for _ in range(num)]
        begins = [100 * rng.randint(0, 5) for _ in prompts]
        keys = [tuple(begin + k for k in range(each // 8)) for begin, each in zip(begins, prompts, strict=True)]
        workload = table(sorted(rng.randint(0, 60_000) for _ in range(num)), prompts, [1] * num, keys)
        runs = [
            play(workload, pipeline=Forked(), policy=lambda: Chunked(64, 12), unit_tokens=8, block_size=4, caching=True,
                 num_blocks=40, connect=test_offload.behind(MemoryTier("host", 1 << 30, 1e9, write=BACK), unit=8),
                 ledger=ledger)
            for ledger in (True, False)
        ]  # fmt: skip
        sent = [sorted(rows(each.records)["transfers"]) for each in runs]
        assert sent[0] == sent[1], seed
        num_written += len(sent[0])
    assert num_written > 30
