"""A naive scheduler to compare with: every decode looped over, every branch followed, every KV block an object.

Short, obvious and slow. It shares no code with the client: it follows the sequences token by token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from reference_blocks import Blocks
from reference_jobs import Job, Request, Sequence

__all__ = ["Job", "Reference"]


@dataclass
class Reference:
    """One client. `step_time(num_prefill_tokens, num_decodes, context, num_prefills)` in ns.

    With `drafts` > 0 a decode step computes that many tokens more; `steps_for(request index, stage, tokens)` are drawn.
    If it `merges` reads, blocks that branches share count once in the context. Served `by_priority` as vLLM v1 does it,
    the smallest rank is admitted first and the largest is preempted first; else first come is first served. A step
    computes at most `longest` tokens of one prompt; 0: no such limit.
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
    steps_for: Callable[[int, int, int], int] = lambda index, stage, tokens: tokens
    merges: bool = False
    by_priority: bool = False
    longest: int = 0

    def __post_init__(self) -> None:
        self.memory = Blocks(self.num_blocks, self.block_size, self.unit_tokens, self.caching)
        self.pool, self.blocks_for = self.memory.pool, self.memory.count_for
        self.now = 0
        self.waiting: list[Sequence] = []
        self.placeless: list[Sequence] = []  # branches that have their context and no place to decode in
        self.running: list[Sequence] = []
        self.forked: list[Request] = []
        self.in_flight: list[Sequence] = []
        self.cancelled: list[Sequence] = []  # of these, those that nobody waits for
        self.preempted = False
        self.num_ranked = 0
        self.events: Counter[str] = Counter()
        self.steps: list[tuple[int, ...]] = []
        self.done: dict[int, tuple[int, int, int, int]] = {}

    # --- requests and their branches ---

    def begin(self, job: Job) -> None:
        request = Request(job)
        if not job.branches:
            self.submit(request, job.prompt, job.output)
        elif not job.prefills:
            self.submit(request, job.prompt, 0, forks=True)
        else:
            for length in job.branches:
                if not request.is_rejected:
                    request.branches.append(self.submit(request, job.prompt, length, branch=True))

    def submit(self, request: Request, tokens: int, output: int, forks: bool = False, branch: bool = False) -> Sequence:
        job = request.job
        seq = Sequence(job.index, job.prompt, job.keys, request=request, target=tokens, output=output)
        seq.forks, seq.branch = forks, branch
        request.stages += 1
        request.tasks += 1
        if self.never_fits(tokens, job.output):
            self.reject(seq)
        else:
            self.number(seq)
            self.waiting.append(seq)
            self.sort()
        return seq

    def number(self, seq: Sequence) -> None:
        self.num_ranked += 1
        seq.number = self.num_ranked

    def sort(self) -> None:
        if self.by_priority:
            self.waiting.sort(key=lambda seq: seq.rank)
            self.placeless.sort(key=lambda seq: seq.rank)

    def never_fits(self, prompt: int, output: int) -> bool:
        drafts = self.drafts if output > 1 else 0
        return self.blocks_for(prompt + max(0, output - 1) + drafts) + self.watermark > self.num_blocks

    def reject(self, seq: Sequence) -> None:
        seq.over = True
        seq.request.is_rejected = True
        seq.request.tasks -= 1
        self.leave_if_over(seq.request)

    def outgrows(self, seq: Sequence) -> bool:
        """Whether a longer answer than its request was let in for has no room."""
        return seq.output > seq.request.job.output and self.never_fits(seq.target, seq.output)

    def fork(self, prefill: Sequence) -> None:
        """The branches go on: the first in the place of the prefill, others where there is room, the rest waits."""
        request, job = prefill.request, prefill.request.job
        going: list[Sequence] = []
        for length in job.branches:
            if request.is_rejected or (job.cancels and request.ended == self.num_needed(job)):
                break
            seq = Sequence(job.index, job.prompt, job.keys, request=request, target=job.prompt, output=length)
            seq.branch = True
            seq.computed = job.prompt
            request.branches.append(seq)
            request.tasks += 1
            if length:
                seq.stage = request.stages
                request.stages += 1
                going.append(seq)
            else:
                self.ended(seq)
        request.tasks -= 1  # the prefill
        self.leave_if_over(request)
        going = [seq for seq in going if not seq.cancelled]
        for seq in going:
            if self.outgrows(seq):
                self.reject(seq)
        self.place(prefill, [seq for seq in going if not seq.over])

    def place(self, prefill: Sequence, branches: list[Sequence]) -> None:
        if not branches:
            self.leave(prefill)
            return
        first, *others = branches
        first.blocks, first.units = prefill.blocks, prefill.units
        first.number = prefill.number
        self.running[self.running.index(prefill)] = first
        if others:
            self.forked.append(first.request)
            first.shares = True
        for seq in others:
            self.number(seq)
            self.memory.share(first, seq, seq.target)
            seq.shares = True
            tail = self.blocks_for(seq.target) - len(seq.blocks)
            if any(each in self.placeless for each in others) or not self.has_room(tail):
                self.placeless.append(seq)
                self.events["placeless"] += 1
            else:
                self.memory.take(seq, tail)
                self.running.append(seq)
        self.sort()
        for seq in branches:
            if not seq.cancelled and (seq in self.running or seq.output == 1):
                self.decode(seq)

    def has_room(self, blocks: int) -> bool:
        return blocks + self.watermark <= len(self.pool) and len(self.running) < self.max_seqs

    def num_needed(self, job: Job) -> int:
        return min(job.k or len(job.branches), len(job.branches))

    def ended(self, seq: Sequence) -> None:
        """What `seq` was to do is done."""
        request, job = seq.request, seq.request.job
        seq.over = True
        if seq.cancelled:
            self.events["ended though cancelled"] += 1
            return
        request.tasks -= 1
        request.tokens += seq.generated
        if not request.is_rejected:
            if not seq.branch:
                request.is_answered = True
            else:
                request.ended += 1
                if request.ended == self.num_needed(job):
                    self.join(request)
        self.leave_if_over(request)

    def join(self, request: Request) -> None:
        """Enough branches have ended."""
        for seq in request.branches:
            if request.job.cancels and not seq.over:
                self.cancel(seq)
        tokens, output = request.job.after
        if tokens:
            self.submit(request, tokens, output)
        else:
            request.is_answered = True

    def cancel(self, seq: Sequence) -> None:
        """Nobody waits for `seq`: it leaves at once, or when the step that computes for it is over."""
        seq.cancelled = True
        seq.request.tasks -= 1
        if seq in self.in_flight:
            self.cancelled.append(seq)
            self.events["cancelled in flight"] += 1
        else:
            where = "waiting" if seq in self.waiting else "placeless" if seq in self.placeless else "at once"
            self.events[f"cancelled {where}"] += 1
            self.leave(seq)

    def leave(self, seq: Sequence) -> None:
        for place in (self.waiting, self.placeless, self.running):
            if seq in place:
                place.remove(seq)
        self.release(seq, resumes=False)

    def leave_if_over(self, request: Request) -> None:
        index = request.job.index
        if not request.tasks and (request.is_answered or request.is_rejected) and index not in self.done:
            self.done[index] = (request.first_token, self.now, request.tokens, request.preemptions)

    # --- memory ---

    def release(self, seq: Sequence, resumes: bool) -> None:
        seq.shares = False
        if seq.blocks:
            self.memory.release(seq, seq.computed, resumes)

    def wait_again(self, seq: Sequence) -> None:
        seq.computed = seq.scheduled = 0
        seq.request.preemptions += 1
        self.preempted = True
        self.waiting.insert(0, seq)
        self.sort()

    def preempt(self, seq: Sequence) -> None:
        # without such a limit one prompt at most is half computed, and nothing else is taken back than what decodes got
        assert seq.decoding or not seq.scheduled or self.longest
        if seq.scheduled:
            self.events["grown and preempted" if seq.decoding else "chunks taken out"] += 1
        if seq is not self.running[-1]:
            self.events["preempted before the last"] += 1
        self.events["preempted branches" if seq.branch else "preempted"] += 1
        self.running.remove(seq)
        if seq.scheduled and not seq.decoding and self.memory.unindex(seq, seq.computed):
            seq.computed = 0  # what is its own behind the blocks of others is of no use
        self.release(seq, resumes=not seq.branch)
        if seq.decoding:
            seq.target = seq.computed + 1  # the token that came out last isn't in memory yet
        seq.decoding = False
        self.wait_again(seq)

    def surrender(self) -> bool:
        """The prompt that was forked last of those that only placeless branches hold is given up; they begin anew."""
        groups = [[seq for seq in request.branches if seq.shares] for request in self.forked]
        groups = [g for g in groups if g and g[0].blocks and not any(seq in self.running for seq in g)]
        if not groups:
            return False
        self.events["surrendered"] += 1
        for seq in reversed(max(groups, key=lambda g: g[0].rank) if self.by_priority else groups[-1]):
            self.placeless.remove(seq)
            self.release(seq, resumes=False)
            self.wait_again(seq)
        return True

    def grow(self, seq: Sequence, tokens: int) -> bool:
        needed = self.blocks_for(seq.computed + tokens) - len(seq.blocks)
        while len(self.pool) < needed:
            if self.surrender():
                continue
            victim = max(self.running, key=lambda s: s.rank) if self.by_priority else self.running[-1]
            self.preempt(victim)
            if victim is seq:
                return False
        self.memory.take(seq, needed)
        seq.scheduled = tokens
        return True

    # --- scheduling ---

    def take_over(self) -> None:
        """Branches without a place get one where all that decode and they have room for their next tokens."""
        while self.placeless:
            seq = self.placeless[0]
            decodes = [s for s in self.running if s.decoding]
            growth = sum(max(0, self.missing(s)) for s in [*decodes, seq])
            if not self.has_room(growth):
                break
            self.memory.take(seq, self.blocks_for(seq.computed) - len(seq.blocks))
            self.placeless.remove(seq)
            self.running.append(seq)
            self.decode(seq)
            self.events["placed"] += 1

    def missing(self, decode: Sequence) -> int:
        return self.blocks_for(decode.computed + 1 + self.drafts) - len(decode.blocks)

    def admit(self, seq: Sequence, max_tokens: int, whole: bool) -> int:
        units, own = self.memory.lookup(seq, seq.target - 1)
        hit = len(units) * self.unit_tokens + len(own) * self.block_size
        chunk = min(seq.target - hit, max_tokens)
        if self.preempted or chunk <= 0 or (whole and chunk < seq.target - hit):
            return 0
        if self.by_priority and self.running and self.placeless and self.placeless[0].rank < seq.rank:
            return 0  # the room that comes back is for that one
        needed = self.blocks_for(hit + chunk) - self.blocks_for(hit)
        unheld = sum(key not in self.memory.held for key in units) * self.memory.per_unit + len(own)
        if not self.has_room(needed + unheld):
            return 0
        self.waiting.remove(seq)
        self.memory.refer(seq, units, own)
        seq.computed = hit
        seq.scheduled = chunk
        self.memory.take(seq, needed)
        self.memory.index(seq, hit + chunk)
        self.running.append(seq)
        return chunk

    def grow_decodes(self) -> None:
        for seq in list(self.running):
            if seq in self.running and seq.decoding:
                self.grow(seq, 1 + self.drafts)

    def admit_all(self, tokens: int, whole: bool, alone: bool = True) -> list[Sequence]:
        """First come, first served, while there is room; a prompt that is admitted `whole` may be longer, `alone`."""
        admitted: list[Sequence] = []
        while self.waiting and (whole or tokens > 0):
            seq = self.waiting[0]
            most = max(tokens, seq.target) if whole and alone and not admitted else min(tokens, self.longest or tokens)
            chunk = self.admit(seq, most, whole)
            if not chunk:
                break
            admitted.append(seq)
            tokens -= chunk
        return admitted

    def schedule(self) -> tuple[list[Sequence], list[Sequence]]:
        """The sequences that prefill, and those that decode, in the next step."""
        if self.policy == "mixed":
            tokens = self.left([])
            if self.waiting and self.waiting[0].target > tokens and (admitted := self.admit_all(self.max_tokens, True)):
                return admitted, []
            self.grow_decodes()
            return self.admit_all(tokens, whole=True, alone=False), [s for s in self.running if s.decoding]
        if self.policy != "chunked":
            if self.policy == "continuous" or not self.running:
                admitted = self.admit_all(self.max_tokens, whole=True)
                if admitted:
                    return admitted, []
            self.grow_decodes()
            return [], [s for s in self.running if s.decoding]
        self.grow_decodes()
        chunks: list[Sequence] = []
        for seq in [s for s in self.running if not s.decoding]:
            chunk = min(seq.target - seq.computed, self.left(chunks), self.longest or self.max_tokens)
            if seq in self.running and chunk > 0 and self.grow(seq, chunk):
                self.memory.index(seq, seq.computed + chunk)
                chunks.append(seq)
            chunks = [s for s in chunks if s in self.running]
        tokens = self.left(chunks)
        self.events["half computed together"] += sum(s.target > s.computed + s.scheduled for s in chunks) > 1
        chunks += self.admit_all(tokens, whole=False)
        return chunks, [s for s in self.running if s.decoding]

    def left(self, chunks: list[Sequence]) -> int:
        """Tokens of the step that neither decodes nor these chunks have."""
        decodes = sum(1 + self.drafts for s in self.running if s.decoding)
        return self.max_tokens - decodes - sum(s.scheduled for s in chunks)

    def plan(self) -> tuple[list[Sequence], list[Sequence]]:
        while True:
            self.preempted = False
            self.take_over()
            chunks, decodes = self.schedule()
            if chunks or decodes or self.running or not self.surrender():
                return chunks, decodes

    # --- time ---

    def run(self, jobs: list[Job]) -> None:
        arrivals = sorted(jobs, key=lambda j: (j.arrival, j.index))
        while arrivals or self.waiting or self.running or self.placeless:
            now = self.now
            while arrivals and arrivals[0].arrival <= now:
                self.begin(arrivals.pop(0))
            chunks, decodes = self.plan()
            if not chunks and not decodes:
                assert not self.waiting
                assert not self.running
                assert not self.placeless
                if arrivals:
                    self.now = arrivals[0].arrival
                continue
            context = self.context(decodes)
            tokens = sum(s.scheduled for s in chunks)
            end = now + self.step_time(tokens, len(decodes), context, len(chunks))
            used = self.num_blocks - len(self.pool)
            while arrivals and arrivals[0].arrival < end:  # arrivals at `end` itself come after the step's end
                self.now = arrivals[0].arrival
                self.begin(arrivals.pop(0))
            num_waiting = len(self.waiting) + len(self.placeless)
            self.steps.append((now, end, len(chunks), tokens, len(decodes), context, used, num_waiting))
            self.now = end
            self.end_step(chunks, decodes)

    def context(self, decodes: list[Sequence]) -> int:
        context = sum(((s.computed - s.since_join) << 32) + s.path for s in decodes) >> 32
        for request in self.forked if self.merges else ():
            users = [seq for seq in request.branches if seq.shares and seq in decodes]
            for seq in users[1:]:
                context -= seq.target // self.block_size * self.block_size
        return context + (1 + self.drafts) * len(decodes)

    def end_step(self, chunks: list[Sequence], decodes: list[Sequence]) -> None:
        self.in_flight = [*chunks, *decodes]
        for seq in decodes:
            seq.path += seq.pace
            tokens = min((seq.path >> 32) - seq.since_join, seq.output - seq.generated)
            assert 1 <= tokens <= 1 + self.drafts
            seq.computed += tokens
            seq.since_join += tokens
            seq.generated += tokens
            seq.scheduled = 0
        for seq in decodes:
            if seq.generated == seq.output:
                self.finish(seq)
        for seq in chunks:
            seq.computed += seq.scheduled
            seq.scheduled = 0
            if seq.computed == seq.target:
                self.computed(seq)
        for seq in self.cancelled:
            if seq in self.running:
                self.leave(seq)
        self.in_flight, self.cancelled = [], []

    def computed(self, seq: Sequence) -> None:
        """All of its target is in memory."""
        begins = seq.stage < 0
        if begins:
            self.in_flight.remove(seq)
        if seq.forks:
            self.fork(seq)
        elif begins and (seq.cancelled or seq.request.is_rejected or not seq.output):
            self.finish(seq)
        else:
            if begins:
                seq.stage = seq.request.stages
                seq.request.stages += 1
            if begins and self.outgrows(seq):
                self.leave(seq)
                self.reject(seq)
            else:
                self.decode(seq)

    def decode(self, seq: Sequence) -> None:
        """A token comes out of what is computed, and others follow."""
        seq.generated += 1
        if seq.request.first_token < 0:
            seq.request.first_token = self.now
        seq.decoding = True
        seq.path = seq.since_join = 0
        left = seq.output - seq.generated
        if left and not seq.pace:
            seq.pace = -(-(left << 32) // self.steps_for(seq.index, seq.stage, left))
        if not left:
            self.finish(seq)

    def finish(self, seq: Sequence) -> None:
        self.leave(seq)
        self.ended(seq)
