"""`chunked` against vLLM v1's own order: one running list, walked whatever phase its sequences are in.

Decision 002 claims that serving decodes first gives the same steps under vLLM's defaults. This is the other
scheduler, written as vLLM describes it, without prefix caching.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from kit import LinearSteps, play, table
from mist.batching.chunked import Chunked

SCENARIOS = 300
COLUMNS = ("start_ns", "end_ns", "num_prefills", "num_prefill_tokens", "num_decodes", "decode_context")


@dataclass(eq=False)
class Sequence:
    arrival: int
    prompt: int
    output: int
    num_tokens: int = 0
    computed: int = 0
    blocks: int = 0
    decodes: bool = False


@dataclass
class OneRunningList:
    max_tokens: int
    max_seqs: int
    free: int
    block_size: int

    def __post_init__(self) -> None:
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_preemptions = 0

    def allocate(self, seq: Sequence, tokens: int) -> bool:
        needed = -(-(seq.computed + tokens) // self.block_size) - seq.blocks
        if needed > self.free:
            return False
        self.free -= needed
        seq.blocks += needed
        return True

    def release(self, seq: Sequence) -> None:
        self.free += seq.blocks
        seq.blocks = seq.computed = 0
        seq.decodes = False

    def schedule(self) -> list[tuple[Sequence, int]]:
        scheduled: list[tuple[Sequence, int]] = []
        budget, before = self.max_tokens, self.num_preemptions
        index = 0
        while index < len(self.running) and budget:
            seq = self.running[index]
            tokens = min(seq.num_tokens - seq.computed, budget)
            while not self.allocate(seq, tokens):
                victim = self.running.pop()
                self.release(victim)
                self.waiting.insert(0, victim)
                self.num_preemptions += 1
                if victim is seq:
                    return scheduled
            scheduled.append((seq, tokens))
            budget -= tokens
            index += 1
        while self.waiting and budget and len(self.running) < self.max_seqs and self.num_preemptions == before:
            seq = self.waiting[0]
            tokens = min(seq.num_tokens - seq.computed, budget)
            if not self.allocate(seq, tokens):
                break
            self.running.append(self.waiting.pop(0))
            scheduled.append((seq, tokens))
            budget -= tokens
        return scheduled

    def run(self, arriving: list[Sequence], perf: LinearSteps) -> list[tuple[int, ...]]:
        steps: list[tuple[int, ...]] = []
        now = 0
        while arriving or self.waiting or self.running:
            while arriving and arriving[0].arrival <= now:
                self.waiting.append(arriving.pop(0))
            scheduled = self.schedule()
            if not scheduled:
                now = arriving[0].arrival
                continue
            decodes = [seq for seq, _ in scheduled if seq.decodes]
            chunks = [tokens for seq, tokens in scheduled if not seq.decodes]
            context = sum(seq.computed + 1 for seq in decodes)
            end = now + perf.of(sum(chunks), len(decodes), context, len(chunks))
            steps.append((now, end, len(chunks), sum(chunks), len(decodes), context))
            now = end
            for seq, tokens in scheduled:
                seq.computed += tokens
                if seq.computed == seq.num_tokens:
                    seq.num_tokens += 1
                    seq.decodes = True
                    if seq.num_tokens == seq.prompt + seq.output:
                        self.running.remove(seq)
                        self.release(seq)
        return steps


def compare(seed: int) -> int:
    rng = random.Random(seed)
    block_size = rng.choice([1, 2, 4, 8])
    max_seqs = rng.randint(1, 8)
    max_tokens = max_seqs + rng.randint(0, 30)
    now, jobs = 0, []
    for _ in range(rng.randint(1, 14)):
        now += rng.choice([0, 0, rng.randint(0, 4000), rng.randint(0, 400)])
        jobs.append((now, rng.randint(1, 40), rng.randint(1, 40)))
    least = max(-(-(prompt + output - 1) // block_size) for _, prompt, output in jobs)
    num_blocks = rng.randint(least, max(least + 1, 160 // block_size))
    perf = LinearSteps()
    vllm = OneRunningList(max_tokens, max_seqs, num_blocks, block_size)
    expected = vllm.run([Sequence(*job, num_tokens=job[1]) for job in jobs], perf)
    run = play(
        table(*zip(*jobs, strict=True)),
        policy=lambda: Chunked(max_num_seqs=max_seqs, max_num_batched_tokens=max_tokens),
        perf=perf,
        num_blocks=num_blocks,
        block_size=block_size,
    )
    steps = run.records.steps.as_columns()
    assert list(zip(*(steps[name].tolist() for name in COLUMNS), strict=True)) == expected, f"compare({seed})"
    return vllm.num_preemptions


@pytest.mark.parametrize("part", range(2))
def test_decodes_first_is_vllm_v1s_order(part: int) -> None:
    preemptions = sum(compare(seed) for seed in range(part * SCENARIOS, (part + 1) * SCENARIOS))
    assert preemptions > SCENARIOS, "hardly any preemption: proves little"
