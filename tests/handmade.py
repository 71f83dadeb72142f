"""Runs made by hand: a naive server that writes `Records` and also remembers every token and every second by itself.

The tests of metrics, results and timelines compare what they compute from the records with what this scheduler saw
happen, token by token. It never shares code with the simulator.
"""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass, field

from mist.metrics import ClientInfo
from mist.records import CUT, DONE, FINISHED, PREEMPTED, REJECTED, UNFINISHED, Records

PREFILL, DECODE = 0, 1


@dataclass(eq=False)
class Job:
    """A request's current task, and what it lived through."""

    index: int
    arrival: int
    prompt: int
    output: int
    kind: int = PREFILL
    queued: int = -1
    started: int = -1
    joined: int = -1
    join_step: int = -1
    left: int = 0
    cached: int = 0
    generated: int = 0
    preemptions: int = 0
    tokens: list[int] = field(default_factory=list)
    spent: dict[tuple[int, str], int] = field(default_factory=dict)
    since: int = 0

    def spend(self, part: str, now: int) -> None:
        key = (self.kind, part)
        self.spent[key] = self.spent.get(key, 0) + now - self.since
        self.since = now


@dataclass(eq=False)
class Server:
    index: int
    waiting: list[Job] = field(default_factory=list)
    running: list[Job] = field(default_factory=list)
    decode_steps: int = 0
    busy: bool = False


@dataclass
class Story:
    """A run: its records, and the truth about each request (`jobs`, by number) and each token (time, client)."""

    records: Records
    clients: list[ClientInfo]
    jobs: list[Job]
    finished: set[int]
    tokens: list[tuple[int, int]]
    end: int


def random_story(
    seed: int,
    *,
    num_requests: int = 40,
    num_clients: int = 2,
    disaggregated: bool = False,
    preempt: float = 0.1,
    max_seqs: int = 3,
    mean_gap: int = 4_000_000,
    cut: int | None = None,
) -> Story:
    """Play `num_requests` random requests; `cut` stops the clock there and leaves the rest unfinished."""
    return _Play(seed, num_requests, num_clients, disaggregated, preempt, max_seqs, mean_gap, cut).story()


class _Play:
    def __init__(self, seed, num_requests, num_clients, disaggregated, preempt, max_seqs, mean_gap, cut):
        self.rng = rng = random.Random(seed)
        self.num_clients, self.disaggregated, self.preempt = num_clients, disaggregated, preempt
        self.max_seqs, self.cut = max_seqs, cut
        names = [f"gpu-{i}" for i in range(num_clients)]
        self.records = Records(client_names=names, stage_kinds=["prefill", "decode"], reasons=["too long"])
        self.servers = [Server(i) for i in range(num_clients)]
        self.clients = [
            ClientInfo(name, "decode" if disaggregated and i else "gpu", 100, 16, max_seqs)
            for i, name in enumerate(names)
        ]
        self.events: list[tuple[int, int, str, object]] = []
        self.jobs, self.finished, self.token_log, self.now = [], set(), [], 0
        at = 1_000
        for i in range(num_requests):
            at += int(rng.expovariate(1 / mean_gap))
            self.jobs.append(Job(i, at, rng.randint(1, 4), rng.choice([0, 1, 1, 2, 5, 20])))
            self.push(at, "arrive", self.jobs[-1])

    def push(self, at, what, about):
        heapq.heappush(self.events, (at, len(self.events) + self.rng.getrandbits(30), what, about))

    def story(self):
        while self.events and (self.cut is None or self.events[0][0] <= self.cut):
            self.now, _, what, about = heapq.heappop(self.events)
            getattr(self, what)(about)
        if self.cut is not None:
            self.stop_here()
        return Story(self.records, self.clients, self.jobs, self.finished, self.token_log, self.now)

    def arrive(self, job):
        job.since = self.now
        if job.prompt == 4 and self.rng.random() < 0.2:
            self.request_row(job, REJECTED, 0)
            return
        self.push(self.now + self.rng.choice([0, 0, 700]), "hand_over", (job, self.place(job)))

    def place(self, job):
        if self.disaggregated:
            return self.servers[0] if job.kind == PREFILL else self.rng.choice(self.servers[1:])
        return self.rng.choice(self.servers)

    def hand_over(self, pair):
        job, server = pair
        job.spend("transfer", self.now)
        job.queued, job.started, job.joined = self.now, -1, -1
        job.left = job.prompt if job.kind == PREFILL else 1
        job.cached = 16 * (job.left - 1) if self.rng.random() < 0.3 else 0
        server.waiting.append(job)
        self.wake(server)

    def wake(self, server):
        if not server.busy:
            self.start_step(server)

    def start_step(self, server):
        rng = self.rng
        for job in list(server.running):
            if rng.random() < self.preempt / 4:
                self.kick_out(server, job)
        while server.waiting and len(server.running) < self.max_seqs:
            job = server.waiting.pop(0)
            job.spend("wait", self.now)
            job.started = self.now
            server.running.append(job)
        if not server.running:
            return
        chunks = [job for job in server.running if job.joined < 0]
        decodes = [job for job in server.running if job.joined >= 0]
        if chunks and rng.random() < 0.5:
            decodes = []
        server.busy = True
        step = (server, self.now, chunks, decodes, rng.randint(0, 100), len(server.waiting))
        self.push(self.now + rng.randint(1_000, 3_000_000), "end_step", step)

    def kick_out(self, server, job):
        job.spend("serve", self.now)
        self.segment(server, job, PREEMPTED)
        server.running.remove(job)
        job.preemptions += 1
        job.queued, job.started, job.joined, job.join_step, job.cached = self.now, -1, -1, -1, 0
        job.left = 1
        server.waiting.insert(0, job)

    def end_step(self, step):
        server, start, chunks, decodes, kv, num_waiting = step
        server.busy = False
        tokens = 16 * len(chunks)
        self.records.steps.append(
            (server.index, start, self.now, len(chunks), tokens, len(decodes), 50 * len(decodes), kv, num_waiting)
        )
        if decodes:
            server.decode_steps += 1
            for job in decodes:
                self.emit(server, job)
                if job.generated == job.output:
                    self.finish_task(server, job)
        for job in chunks:
            job.left -= 1
            if job.left == 0:
                self.computed(server, job)
        self.start_step(server)

    def emit(self, server, job):
        job.generated += 1
        job.tokens.append(self.now)
        self.token_log.append((self.now, server.index))

    def computed(self, server, job):
        if job.kind == PREFILL:
            self.finish_task(server, job)
            return
        job.joined, job.join_step = self.now, server.decode_steps
        self.emit(server, job)
        if job.generated == job.output:
            self.finish_task(server, job)

    def finish_task(self, server, job):
        job.spend("serve", self.now)
        self.segment(server, job, DONE)
        server.running.remove(job)
        if job.kind == DECODE or job.output == 0:
            job.since = self.now
            self.finished.add(job.index)
            self.request_row(job, FINISHED)
            return
        job.kind = DECODE
        if self.disaggregated:
            self.push(self.now + 5_000, "hand_over", (job, self.place(job)))
            return
        job.queued = job.started = self.now
        job.cached = job.left = 0
        server.running.append(job)
        self.computed(server, job)

    def segment(self, server, job, how):
        last_step = server.decode_steps if job.join_step >= 0 else -1
        self.records.tasks.append(
            (job.index, job.kind, job.kind, server.index, job.queued, job.started, job.joined, self.now, how,
             16, job.cached, job.join_step, last_step, 1 + last_step - job.join_step if job.join_step >= 0 else 0)
        )  # fmt: skip

    def request_row(self, job, status, reason=-1):
        first = job.tokens[0] if job.tokens else -1
        self.records.requests.append(
            (job.index, job.arrival, first, self.now, status, reason, 16 * job.prompt, job.generated, job.cached,
             job.preemptions)
        )  # fmt: skip

    def stop_here(self):
        self.now = self.cut
        rows = set(self.records.requests.as_columns()["request"].tolist())
        for server in self.servers:
            for job in [*server.running, *server.waiting]:
                self.segment(server, job, CUT)
        for job in self.jobs:
            if job.index not in rows and job.arrival <= self.now:
                self.request_row(job, UNFINISHED)
