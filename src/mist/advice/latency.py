"""Why requests around a percentile of a latency took as long: each nanosecond of theirs to one reason, and added up.

From the critical segments of those requests and the pace of the clients that they were at. What no reason takes is the
requests' own computation. It proposes no change.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mist.advice.evidence import Evidence
from mist.advice.pace import BLOCKS, HOST_SERVE, HOST_WAIT, PROMPTS, SENDING, SLOTS, STALLED, TOKENS
from mist.advice.reasons import HOST, INTERFERENCE, KV, LINK, QUEUEING, RETRIEVAL, STAGE
from mist.metrics.latency import e2e_ns, tpot_ns, ttft_ns
from mist.metrics.stages import segment_edges
from mist.metrics.window import BoolColumn, Columns
from mist.pipeline.parts import RETRIEVE
from mist.records import NO_CLIENT, IntColumn
from mist.request import DECODE, PREFILL

#: what requests compute themselves, tools that they wait for included
OWN = "own"
#: requests on either side of a percentile, as a share of all, and at least so many together
AROUND, MIN_AROUND = 0.01, 20
#: of a request's latency, from which of its instants to which
METRICS = {
    "ttft_s": (ttft_ns, "arrival_ns", "first_token_ns"),
    "tpot_s": (tpot_ns, "first_token_ns", "end_ns"),
    "e2e_s": (e2e_ns, "arrival_ns", "end_ns"),
}

#: (reason, pool or the two that a link joins)
Cause = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Account:
    """Where the time of `num_requests` around a percentile of `metric` went: ns by cause, `total_ns` in all.

    `bounds`: of the queueing at each pool, ns by what was used up; `waiting`: of retrieval, ns before it began.
    """

    metric: str
    num_requests: int
    total_ns: float
    times: dict[Cause, float]
    bounds: dict[str, dict[str, float]]
    waiting: dict[str, float]


def account(evidence: Evidence, metric: str, percentile: float = 99.0) -> Account | None:
    """Where the time of the requests around a percentile went; None where no request has that latency."""
    chosen = around(evidence.requests, metric, percentile)
    if not len(chosen["request"]):
        return None
    first, last = (chosen[key] for key in METRICS[metric][1:])
    found = _Sums(evidence)
    rows, request, edges = segment_edges(chosen, evidence.tasks, evidence.transfers)
    edges = tuple(np.clip(edge, first[request], last[request]) for edge in edges)
    for client in np.unique(evidence.tasks["client"][rows]).tolist():
        mine = evidence.tasks["client"][rows] == client
        found.add(client, rows[mine], tuple(edge[mine] for edge in edges))
    total = float((last - first).sum())
    times = dict(found.times)
    times[OWN, ""] = max(0.0, total - sum(times.values()))
    return Account(metric, len(first), total, times, found.bounds, dict(found.waiting))


def around(requests: Columns, metric: str, percentile: float) -> Columns:
    """The requests whose latency is nearest in rank to its percentile: those of `AROUND` on either side of it."""
    latency = METRICS[metric][0](requests)
    known = np.flatnonzero((latency >= 0) & (requests["first_token_ns"] >= 0) if metric != "e2e_s" else latency >= 0)
    known = known[np.argsort(latency[known], kind="stable")]
    number = min(len(known), max(MIN_AROUND, round(2 * AROUND * len(known))))
    middle = percentile / 100 * len(known)
    begin = int(min(max(0, middle - number / 2), len(known) - number))
    rows = known[begin : begin + number]
    return {name: column[rows] for name, column in requests.items()}


class _Sums:
    """ns by cause of the segments that are added."""

    def __init__(self, evidence: Evidence) -> None:
        self._evidence = evidence
        self.times: dict[Cause, float] = defaultdict(float)
        self.bounds: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self.waiting: dict[str, float] = defaultdict(float)

    def add(self, client: int, rows: IntColumn, edges: tuple[IntColumn, ...]) -> None:
        """Segments at a client (rows of the tasks), with what came before and after them."""
        before, queued, started, ended, end = edges
        pool = "" if client == NO_CLIENT else self._evidence.pool_of[client]
        self._handed(client, rows, before, queued)
        self.times[LINK, f"{pool} -> user"] += float((end - ended).sum())
        if client == NO_CLIENT:
            return
        kinds = np.array(self._evidence.records.stage_kinds, dtype=object)[self._evidence.tasks["kind"][rows]]
        is_search = kinds == RETRIEVE
        searched = float((ended - queued)[is_search].sum())
        self.times[RETRIEVAL, pool] += searched
        self.waiting[pool] += float((started - queued)[is_search].sum())
        rest = ~is_search
        resumed = self._evidence.is_resumed[rows[rest]]
        self._waited(client, pool, rows[rest], queued[rest], started[rest])
        joined = self._evidence.tasks["joined_ns"][rows[rest]]
        joined = np.clip(np.where(joined >= 0, joined, ended[rest]), started[rest], ended[rest])
        joined = np.where(kinds[rest] == DECODE, np.where(resumed, joined, started[rest]), joined)
        generates = np.isin(kinds[rest].astype(str), (PREFILL, DECODE))
        generates |= self._evidence.tasks["generated_tokens"][rows[rest]] > 0
        self._served(client, pool, resumed, generates, started[rest], joined, ended[rest])

    def _handed(self, client: int, rows: IntColumn, before: IntColumn, queued: IntColumn) -> None:
        """What a segment took to come: on links, and before these for room at its client."""
        requests = self._evidence.tasks["request"][rows].tolist()
        for request, since, until in zip(requests, before.tolist(), queued.tolist(), strict=True):
            for cause, time in self._sent(client, request, since, until) if since < until else ():
                self.times[cause] += time

    def _sent(self, client: int, request: int, since: int, until: int) -> Iterator[tuple[Cause, float]]:
        """What was sent to a client for a request in an interval, piece by piece as it came."""
        for sender, queued, start, end in self._evidence.sent_to(client, request):
            begun, there = min(max(start, since), until), min(end, until)
            if there <= since:
                continue
            if begun > max(queued, since):
                yield (KV, self._evidence.pool_of[client]), float(begun - max(queued, since))
            yield (LINK, f"{self._evidence.sender(sender)} -> {self._evidence.pool_of[client]}"), float(there - begun)
            since = there

    def _waited(self, client: int, pool: str, rows: IntColumn, queued: IntColumn, started: IntColumn) -> None:
        """A wait: preempted, in the engine's front end, for a prefix that is fetched, and in the queue."""
        again = self._evidence.is_resumed[rows]
        self.times[KV, pool] += float((started - queued)[again].sum())
        rows, queued, started = rows[~again], queued[~again], started[~again]
        ready = np.clip(self._evidence.ready_ns[rows], queued, started)
        self.times[HOST, pool] += float((ready - queued).sum())
        there = ready.copy()
        requests = self._evidence.tasks["request"][rows].tolist()
        for place, (request, since, until) in enumerate(zip(requests, ready.tolist(), started.tolist(), strict=True)):
            for cause, time in self._sent(client, request, since, until) if since < until else ():
                self.times[cause] += time
                there[place] += round(time)
        self._queued(client, pool, there, started)

    def _queued(self, client: int, pool: str, queued: IntColumn, started: IntColumn) -> None:
        """Time in a queue by what those steps were bound by that began meanwhile; before them, it is the step's."""
        pace = self._evidence.paces[client]
        seen = np.minimum(np.maximum(pace.next_start(queued), queued), started)
        beside, before = (part.sum(axis=0) for part in (pace.between(seen, started), pace.between(queued, seen)))
        self.times[KV, pool] += beside[BLOCKS]
        stalled = beside[STALLED] + before[STALLED]
        self.times[LINK, self._beyond(pool)] += beside[SENDING] + stalled
        host = beside[HOST_WAIT] + before[HOST_SERVE]
        self.times[HOST, pool] += host
        bounds = self.bounds[pool]
        bounds["tokens"] += beside[TOKENS]
        bounds["slots"] += beside[SLOTS]
        left = float((started - queued).sum()) - beside[[BLOCKS, SENDING, TOKENS, SLOTS]].sum() - stalled - host
        bounds["step"] += max(0.0, left)
        self.times[QUEUEING, pool] += beside[TOKENS] + beside[SLOTS] + max(0.0, left)

    def _beyond(self, pool: str) -> str:
        """The link that the KV caches of a pool leave by."""
        receivers = self._evidence.scenario.decoders_of(pool) if pool in self._evidence.scenario.pools else {}
        return f"{pool} -> {next(iter(receivers), '')}"

    def _served(
        self, client: int, pool: str, resumed: BoolColumn, generates: BoolColumn,
        started: IntColumn, joined: IntColumn, ended: IntColumn,
    ) -> None:  # fmt: skip
        """A service: prompts computed again, the host's part, prompts beside decodes, and stages beside the model's."""
        pace, again = self._evidence.paces[client], resumed
        self.times[KV, pool] += float((joined - started)[again].sum())
        reading = pace.between(started[~again], joined[~again])
        generating = pace.between(joined, ended)
        self.times[HOST, pool] += reading[:, HOST_SERVE].sum() + generating[:, HOST_SERVE].sum()
        self.times[INTERFERENCE, pool] += generating[:, PROMPTS].sum()
        others = ~generates[~again]
        own = (joined - started)[~again] - reading[:, HOST_SERVE]
        self.times[STAGE, pool] += float(own[others].sum())


def fractions(account: Account) -> dict[Cause, float]:
    """Shares of the whole, largest first, the requests' own computation left out."""
    named = {cause: time / account.total_ns for cause, time in account.times.items() if cause[0] != OWN and time > 0}
    return dict(sorted(named.items(), key=lambda item: -item[1])) if account.total_ns else {}
