"""A naive scheduler to compare with: every decode looped over, every KV block an object in a list.

Short, obvious and slow. It shares no code with the client: it follows the sequences token by token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Job:
    index: int
    arrival: int
    prompt: int
    output: int
    keys: tuple[int, ...] = ()


@dataclass(eq=False)
class Block:
    unit: int | None = None  # hash key of the unit it belongs to
    own: int | None = None  # index of the job whose private content it holds
    position: int = -1  # place among the private blocks left behind


@dataclass(eq=False)
class Sequence:
    job: Job
    target: int
    computed: int = 0
    generated: int = 0
    scheduled: int = 0
    units: int = 0
    blocks: list[Block] = field(default_factory=list)
    left_start: int = -1
    left_full: int = 0
    preemptions: int = 0
    first_token: int = -1
    decoding: bool = False
    pace: int = 0  # tokens per step in 2^-32, once drawn
    path: int = 0  # how far it is since it joined, in the same unit
    since_join: int = 0


@dataclass
class Reference:
    """One client. `step_time(num_prefill_tokens, num_decodes, context, num_prefills)` in ns.

    With `drafts` > 0 a decode step computes that many tokens more, and `steps_for(job, tokens)` are those drawn for it.
    """

    policy: str
    max_tokens: int
    max_seqs: int
    num_blocks: int
    block_size: int
    step_time: Callable[[int, int, int, int], int]
    unit_tokens: int = 0
    caching: bool = False
    watermark: int = 0
    drafts: int = 0
    steps_for: Callable[[Job, int], int] = lambda job, tokens: tokens

    def __post_init__(self) -> None:
        self.pool = [Block() for _ in range(self.num_blocks)]  # what can be taken, first to go first
        self.held: dict[int, int] = {}  # unit -> sequences that refer to it
        self.unit_blocks: dict[int, list[Block]] = {}
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.steps: list[tuple[int, ...]] = []
        self.done: dict[int, tuple[int, int, int, int]] = {}

    # --- blocks ---

    def take(self) -> Block:
        block = self.pool.pop(0)
        if block.unit is not None:
            for other in self.unit_blocks.pop(block.unit):
                other.unit = None
        block.own = None
        block.position = -1
        return block

    def release(self, seq: Sequence, resumes: bool) -> None:
        for block in self.pool:
            if block.own == seq.job.index:
                block.own = None  # what an earlier preemption left is forgotten
        per_unit = self.unit_tokens // self.block_size if self.unit_tokens else 0
        private = seq.blocks[seq.units * per_unit :]
        if not self.caching:
            self.pool.extend(private)
        else:
            for position, block in reversed(list(enumerate(private))):
                block.own = seq.job.index if resumes else None
                block.position = position
                self.pool.append(block)
            seq.left_start = seq.units * self.unit_tokens if resumes else -1
            seq.left_full = (seq.computed - seq.units * self.unit_tokens) // self.block_size
            for key in reversed(seq.job.keys[: seq.units]):
                self.held[key] -= 1
                if not self.held[key]:
                    del self.held[key]
                    self.pool.extend(reversed(self.unit_blocks[key]))
        seq.blocks = []
        seq.units = 0

    def lookup(self, seq: Sequence) -> tuple[list[int], list[Block]]:
        if not self.caching:
            return [], []
        most = seq.target - 1
        units: list[int] = []
        if self.unit_tokens:
            for key in seq.job.keys[: min(most, seq.job.prompt) // self.unit_tokens]:
                if key not in self.unit_blocks:
                    break
                units.append(key)
        start = len(units) * self.unit_tokens
        own: list[Block] = []
        if seq.left_start == start:
            left = {b.position: b for b in self.pool if b.own == seq.job.index}
            while len(own) < min(seq.left_full, (most - start) // self.block_size) and len(own) in left:
                own.append(left[len(own)])
        return units, own

    def index(self, seq: Sequence, tokens: int) -> None:
        if not (self.caching and self.unit_tokens):
            return
        per_unit = self.unit_tokens // self.block_size
        while seq.units < min(len(seq.job.keys), min(tokens, seq.job.prompt) // self.unit_tokens):
            key = seq.job.keys[seq.units]
            mine = seq.blocks[seq.units * per_unit : (seq.units + 1) * per_unit]
            if key in self.unit_blocks:
                if key not in self.held:
                    for block in self.unit_blocks[key]:
                        self.pool.remove(block)
                seq.blocks[seq.units * per_unit : (seq.units + 1) * per_unit] = self.unit_blocks[key]
                self.pool[:0] = mine
            else:
                self.unit_blocks[key] = mine
                for block in mine:
                    block.unit = key
            self.held[key] = self.held.get(key, 0) + 1
            seq.units += 1

    # --- scheduling ---

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def preempt(self, seq: Sequence, now: int) -> None:
        self.running.remove(seq)
        self.release(seq, resumes=True)
        if seq.decoding:
            seq.target = seq.job.prompt + seq.generated
        seq.decoding = False
        seq.computed = seq.scheduled = 0
        seq.preemptions += 1
        self.waiting.insert(0, seq)

    def grow(self, seq: Sequence, tokens: int, now: int) -> bool:
        needed = self.blocks_for(seq.computed + tokens) - len(seq.blocks)
        while len(self.pool) < needed:
            victim = self.running[-1]
            self.preempt(victim, now)
            if victim is seq:
                return False
        seq.blocks.extend(self.take() for _ in range(needed))
        seq.scheduled = tokens
        return True

    def admit(self, seq: Sequence, max_tokens: int, whole: bool) -> int:
        units, own = self.lookup(seq)
        hit = len(units) * self.unit_tokens + len(own) * self.block_size
        chunk = min(seq.target - hit, max_tokens)
        if chunk <= 0 or (whole and chunk < seq.target - hit):
            return 0
        needed = self.blocks_for(hit + chunk) - self.blocks_for(hit)
        per_unit = self.unit_tokens // self.block_size if self.unit_tokens else 0
        unheld = sum(key not in self.held for key in units) * per_unit + len(own)
        if needed + unheld + self.watermark > len(self.pool):
            return 0
        self.waiting.remove(seq)
        for key in units:
            for block in self.unit_blocks[key]:
                if key not in self.held:
                    self.pool.remove(block)
                seq.blocks.append(block)
            self.held[key] = self.held.get(key, 0) + 1
        for block in own:
            self.pool.remove(block)
            block.own = None
            seq.blocks.append(block)
        if own:
            for block in self.pool:
                if block.own == seq.job.index:
                    block.own = None
        seq.units = len(units)
        seq.computed = hit
        seq.scheduled = chunk
        for _ in range(needed):
            seq.blocks.append(self.take())
        self.index(seq, hit + chunk)
        self.running.append(seq)
        return chunk

    def grow_decodes(self, now: int) -> bool:
        before = [s for s in self.running if s.decoding]
        for seq in before:
            if seq in self.running and seq.decoding:
                self.grow(seq, 1 + self.drafts, now)
        return any(s not in self.running for s in before)

    def admit_whole(self) -> list[Sequence]:
        admitted: list[Sequence] = []
        tokens = self.max_tokens
        while self.waiting and len(self.running) < self.max_seqs:
            seq = self.waiting[0]
            chunk = self.admit(seq, tokens if admitted else max(tokens, seq.target), whole=True)
            if not chunk:
                break
            admitted.append(seq)
            tokens -= chunk
        return admitted

    def schedule(self, now: int) -> tuple[list[Sequence], list[Sequence]]:
        """The sequences that prefill, and those that decode, in the next step."""
        if self.policy != "chunked":
            if self.policy == "continuous" or not self.running:
                admitted = self.admit_whole()
                if admitted:
                    return admitted, []
            self.grow_decodes(now)
            return [], [s for s in self.running if s.decoding]
        everybody = len(self.running)
        self.grow_decodes(now)
        tokens = self.max_tokens - sum(1 + self.drafts for s in self.running if s.decoding)
        chunks: list[Sequence] = []
        for seq in [s for s in self.running if not s.decoding]:
            if seq in self.running and tokens > 0:
                chunk = min(seq.target - seq.computed, tokens)
                if not self.grow(seq, chunk, now):
                    break
                self.index(seq, seq.computed + chunk)
                chunks.append(seq)
                tokens -= chunk
        if len(self.running) == everybody:
            while tokens > 0 and self.waiting and len(self.running) < self.max_seqs:
                seq = self.waiting[0]
                chunk = self.admit(seq, tokens, whole=False)
                if not chunk:
                    break
                chunks.append(seq)
                tokens -= chunk
        return chunks, [s for s in self.running if s.decoding]

    def never_fits(self, job: Job) -> bool:
        drafts = self.drafts if job.output > 1 else 0
        return self.blocks_for(job.prompt + max(0, job.output - 1) + drafts) + self.watermark > self.num_blocks

    def run(self, jobs: list[Job]) -> None:
        arrivals = sorted(jobs, key=lambda j: (j.arrival, j.index))
        now = 0
        while arrivals or self.waiting or self.running:
            while arrivals and arrivals[0].arrival <= now:
                job = arrivals.pop(0)
                if self.never_fits(job):
                    self.done[job.index] = (-1, job.arrival, 0, 0)
                else:
                    self.waiting.append(Sequence(job, job.prompt))
            chunks, decodes = self.schedule(now)
            if not chunks and not decodes:
                assert not self.waiting
                assert not self.running
                if arrivals:
                    now = arrivals[0].arrival
                continue
            context = (sum(((s.computed - s.since_join) << 32) + s.path for s in decodes) >> 32) + len(decodes)
            context += self.drafts * len(decodes)
            tokens = sum(s.scheduled for s in chunks)
            end = now + self.step_time(tokens, len(decodes), context, len(chunks))
            used = self.num_blocks - len(self.pool)
            while arrivals and arrivals[0].arrival < end:  # arrivals at `end` itself come after the step's end
                job = arrivals.pop(0)
                if self.never_fits(job):
                    self.done[job.index] = (-1, job.arrival, 0, 0)
                else:
                    self.waiting.append(Sequence(job, job.prompt))
            self.steps.append((now, end, len(chunks), tokens, len(decodes), context, used, len(self.waiting)))
            now = end
            for seq in decodes:
                seq.path += seq.pace
                tokens = min((seq.path >> 32) - seq.since_join, seq.job.output - seq.generated)
                assert 1 <= tokens <= 1 + self.drafts
                seq.computed += tokens
                seq.since_join += tokens
                seq.generated += tokens
                seq.scheduled = 0
                if seq.generated == seq.job.output:
                    self.finish(seq, now)
            for seq in chunks:
                seq.computed += seq.scheduled
                seq.scheduled = 0
                if seq.computed == seq.target:
                    if seq.job.output:
                        seq.generated += 1
                        if seq.first_token < 0:
                            seq.first_token = now
                    seq.decoding = True
                    seq.path = seq.since_join = 0
                    left = seq.job.output - seq.generated
                    if left and not seq.pace:
                        seq.pace = -(-(left << 32) // self.steps_for(seq.job, left))
                    if seq.generated == seq.job.output:
                        self.finish(seq, now)

    def finish(self, seq: Sequence, now: int) -> None:
        self.running.remove(seq)
        self.release(seq, resumes=False)
        self.done[seq.job.index] = (seq.first_token, now, seq.generated, seq.preemptions)
