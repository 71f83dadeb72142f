"""Where a request's time went: waiting, served and handed over, per stage, in integer nanoseconds.

The segments of a request tile its life, so the three parts add up to its E2E exactly; where stages ran side by side,
those that were waited for do (the critical path). It never looks inside a stage (steps, tokens).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from mist.metrics.distribution import Blocks, Distribution, distribution
from mist.metrics.window import BoolColumn, Columns
from mist.records import DROPPED, NO_CLIENT, IntColumn

PARTS = ("wait_s", "serve_s", "transfer_s")


def stage_times(
    requests: Columns, tasks: Columns, num_kinds: int, transfers: Columns | None = None, until: str = "end_ns"
) -> IntColumn:
    """Nanoseconds per request, stage kind and part (`PARTS`), int64[requests, num_kinds, 3].

    `requests` are the finished ones to look at; `tasks` has a request's rows together and in order, and may hold
    other requests' rows. Every entry of one request sums to its E2E: a segment's transfer lasts from the end of the
    one before (at first: the arrival) to its queueing, its wait to its start, its service to its end; a way back to
    the user after the last segment is that one's transfer. Of segments side by side only those count that the end
    was waiting for (none that was cancelled): from the last one back, always the latest that had ended when what the
    next one works on was sent, which `transfers` tell. What comes after `until`, a column of `requests`, is left out:
    with "first_token_ns" of requests that have one, the entries sum to the TTFT.
    """
    times = np.zeros((len(requests["request"]), num_kinds, len(PARTS)), np.int64)
    rows, request, edges = segment_edges(requests, tasks, transfers)
    if not len(rows):
        return times
    last = requests[until][request]
    handed, waited, served, way_back = (
        after - edge for edge, after in pairwise([np.minimum(edge, last) for edge in edges])
    )
    cell = (request * num_kinds + tasks["kind"][rows]) * len(PARTS)
    for part, time in enumerate((waited, served, handed + way_back)):
        np.add.at(times.reshape(-1), cell + part, time)
    return times


def segment_edges(
    requests: Columns, tasks: Columns, transfers: Columns | None = None
) -> tuple[IntColumn, IntColumn, tuple[IntColumn, ...]]:
    """The segments that `stage_times` adds up: their rows of `tasks`, their requests' rows, and five instants in ns.

    These are the end of the segment before (at first: the arrival), its queueing, start and end, and the request's end
    where it is the last (else its end again); a request's intervals between them tile its life.
    """
    row_of = np.full(_largest(requests["request"], tasks["request"]) + 1, -1, np.int64)
    row_of[requests["request"]] = np.arange(len(requests["request"]))
    rows = np.flatnonzero((row_of[tasks["request"]] >= 0) & (tasks["how"] != DROPPED))
    if not len(rows):
        return rows, rows, (rows,) * 5
    rows = rows[_critical({name: tasks[name][rows] for name in _PLACES}, transfers)]
    request = row_of[tasks["request"][rows]]
    queued, ended = (tasks[name][rows] for name in ("queued_ns", "end_ns"))
    started = np.where(tasks["started_ns"][rows] >= 0, tasks["started_ns"][rows], ended)
    is_first = np.append(True, request[1:] != request[:-1])
    is_last = np.append(is_first[1:], True)
    before = np.where(is_first, requests["arrival_ns"][request], np.append(0, ended[:-1]))
    end = np.where(is_last, requests["end_ns"][request], ended)
    return rows, request, (before, queued, started, ended, end)


class Stages:
    """The times of finished requests, block by block, by stage kind and part."""

    def __init__(self, kinds: Sequence[str]) -> None:
        self._times = {kind: {part: Blocks() for part in (*PARTS, "ttft_s")} for kind in kinds}

    def add(self, finished: Columns, tasks: Columns, transfers: Columns) -> None:
        """As for `stage_times`; `ttft_s` are all parts until the first token, of the requests that have one."""
        times = stage_times(finished, tasks, len(self._times), transfers)
        spoken = {name: column[finished["first_token_ns"] >= 0] for name, column in finished.items()}
        before_token = stage_times(spoken, tasks, len(self._times), transfers, "first_token_ns").sum(axis=2)
        for kind, found in enumerate(self._times.values()):
            for part, name in enumerate(PARTS):
                found[name].add(times[:, kind, part])
            found["ttft_s"].add(before_token[:, kind])

    def summary(self) -> dict[str, dict[str, Distribution]]:
        """Distributions over all requests, a stage that one didn't have counting as zero."""
        return {
            kind: {name: distribution(times.whole()) for name, times in found.items()}
            for kind, found in self._times.items()
        }


def awaited(sent: Sequence[int], ended: Sequence[int]) -> list[bool]:
    """Which of a request's segments, in order of their ends, are on its critical path.

    `sent`: when what each works on left for its client.
    """
    kept = [True] * len(ended)
    begin = ended[-1] if ended else 0
    for place in reversed(range(len(ended))):
        kept[place] = ended[place] <= begin
        if kept[place]:
            begin = sent[place]
    return kept


_PLACES = ("request", "client", "queued_ns", "end_ns")


def _critical(tasks: Columns, transfers: Columns | None) -> BoolColumn:
    """Which rows are on the critical path of their request: all, unless some overlap."""
    request, client, queued, ended = (tasks[name] for name in _PLACES)
    kept = np.ones(len(request), dtype=bool)
    overlaps = np.append(False, (request[1:] == request[:-1]) & (queued[1:] < ended[:-1]))
    if not overlaps.any():
        return kept
    rows = transfers or {}
    ways = zip(*(rows[name].tolist() for name in ("request", "receiver", "end_ns")), strict=True) if rows else ()
    left = dict(zip(ways, rows["queued_ns"].tolist() if rows else (), strict=True))
    for one in np.unique(request[overlaps]).tolist():
        first, end = np.searchsorted(request, [one, one + 1]).tolist()
        places = zip(client[first:end].tolist(), queued[first:end].tolist(), strict=True)
        # memories are below 0 too, and what is written to them is nobody's way to a delay
        sent = [at if there == NO_CLIENT else left.get((one, there, at), at) for there, at in places]
        kept[first:end] = awaited(sent, ended[first:end].tolist())
    return kept


def _largest(*columns: IntColumn) -> int:
    return max((int(column.max()) for column in columns if len(column)), default=-1)
