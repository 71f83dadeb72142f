"""How the timeline reads records: rows by request, blocks of rows, lanes for what overlaps, and how much was there.

It stands between the tables and the parts that write events, so that none of them holds all rows as objects.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

import numpy as np

from mist.records import IntColumn, Records, Table
from mist.report.timeline.events import Excerpt

_BLOCK = 4096


class ByRequest:
    """The rows of a table for each request, in the order in which they were written."""

    def __init__(self, table: Table) -> None:
        columns = table.as_columns()
        order = np.argsort(columns["request"], kind="stable")
        self.columns = {name: column[order] for name, column in columns.items()}
        self._requests = self.columns["request"]
        self._rows = np.column_stack(list(self.columns.values()))

    def rows(self, request: int) -> list[list[int]]:
        """Those of one request."""
        first, stop = np.searchsorted(self._requests, (request, request + 1))
        rows: list[list[int]] = self._rows[first:stop].tolist()
        return rows


class Lanes:
    """Numbers for spans in order of their start such that two in one lane never overlap: the lowest that is free.

    `gap_ns`: from one's end to the start of the next in its lane, at least.
    """

    def __init__(self, gap_ns: int = 0) -> None:
        self.count = 0
        self._gap_ns = gap_ns
        self._free: list[int] = []
        self._taken: list[tuple[int, int]] = []

    def take(self, start: int, end: int) -> tuple[int, bool]:
        """A lane for [start, end], counted from 1, and whether it is a new one."""
        while self._taken and self._taken[0][0] + self._gap_ns <= start:
            heapq.heappush(self._free, heapq.heappop(self._taken)[1])
        is_new = not self._free
        if is_new:
            self.count += 1
        lane = self.count if is_new else heapq.heappop(self._free)
        heapq.heappush(self._taken, (end, lane))
        return lane, is_new


def in_blocks(columns: dict[str, IntColumn], order: IntColumn) -> Iterator[list[int]]:
    """Rows as lists of Python integers, a block at a time."""
    for start in range(0, len(order), _BLOCK):
        block = order[start : start + _BLOCK]
        yield from np.column_stack([column[block] for column in columns.values()]).tolist()


def last_event(records: Records) -> int:
    """When the last of all requests, segments and steps ended, in ns."""
    tables = (records.requests, records.tasks, records.steps)
    return max((int(table.as_columns()["end_ns"].max()) for table in tables if len(table)), default=0)


def level_events(
    process: int, name: str, unit: str, starts: IntColumn, ends: IntColumn, amounts: IntColumn, excerpt: Excerpt
) -> Iterator[str]:
    """A counter of the sum of `amounts` between their starts and ends, wherever it changes."""
    times = np.maximum(np.concatenate([starts, ends]), excerpt.start_ns)
    order = np.argsort(times, kind="stable")
    times, total = times[order], np.cumsum(np.concatenate([amounts, -amounts])[order])
    changes = np.flatnonzero((times < excerpt.stop_ns) & np.append(times[1:] != times[:-1], True))
    for at, value in in_blocks({"time": times, "total": total}, changes):
        yield from excerpt.counter(process, at, name, unit, value)
