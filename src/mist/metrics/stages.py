"""Where a request's time went: waiting, served and handed over, per stage, in integer nanoseconds.

The segments of a request tile its life, so the three parts add up to its E2E exactly; `summarise` turns them into
means that add up to the mean E2E. It never looks inside a stage (steps, tokens).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mist.metrics.distribution import Distribution, distribution
from mist.metrics.window import Columns
from mist.records import IntColumn

PARTS = ("wait_s", "serve_s", "transfer_s")


def stage_times(requests: Columns, tasks: Columns, num_kinds: int) -> IntColumn:
    """Nanoseconds per request, stage kind and part (`PARTS`), int64[requests, num_kinds, 3].

    `requests` are the finished ones to look at; `tasks` has a request's rows together and in order, and may hold
    other requests' rows. Every entry of one request sums to its E2E: a segment's transfer lasts from the end of the
    one before (at first: the arrival) to its queueing, its wait to its start, its service to its end; a way back to
    the user after the last segment is that one's transfer.
    """
    times = np.zeros((len(requests["request"]), num_kinds, len(PARTS)), np.int64)
    row_of = np.full(_largest(requests["request"], tasks["request"]) + 1, -1, np.int64)
    row_of[requests["request"]] = np.arange(len(requests["request"]))
    rows = np.flatnonzero(row_of[tasks["request"]] >= 0)
    if not len(rows):
        return times
    request = row_of[tasks["request"][rows]]
    kind, queued, ended = (tasks[name][rows] for name in ("kind", "queued_ns", "end_ns"))
    started = np.where(tasks["started_ns"][rows] >= 0, tasks["started_ns"][rows], ended)
    is_first = np.append(True, request[1:] != request[:-1])
    is_last = np.append(is_first[1:], True)
    before = np.where(is_first, requests["arrival_ns"][request], np.append(0, ended[:-1]))
    way_back = np.where(is_last, requests["end_ns"][request] - ended, 0)
    cell = (request * num_kinds + kind) * len(PARTS)
    for part, time in enumerate((started - queued, ended - started, queued - before + way_back)):
        np.add.at(times.reshape(-1), cell + part, time)
    return times


def summarise_stages(times: IntColumn, kinds: Sequence[str]) -> dict[str, dict[str, Distribution]]:
    """Distributions of `stage_times` over all its requests, a stage that a request didn't have counting as zero."""
    return {kind: {part: distribution(times[:, k, p]) for p, part in enumerate(PARTS)} for k, kind in enumerate(kinds)}


def _largest(*columns: IntColumn) -> int:
    return max((int(column.max()) for column in columns if len(column)), default=-1)
