"""Many values as few: distributions by exact quantiles, levels over time by mean, least and most of each stretch.

Between the records and the charts, so that a page of a million requests is as long as one of a thousand. Every point
of a distribution is one that occurred, and no extreme of a level is lost; what lies between is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mist.metrics.distribution import FloatColumn
from mist.records import IntColumn

#: points of a distribution, and stretches of a run, at most
MAX_POINTS = 400
NUM_STRETCHES = 240


def cdf(values: FloatColumn | IntColumn, weights: IntColumn | None = None) -> tuple[FloatColumn, FloatColumn]:
    """Values in order and the share of all that is at most as large; every point occurred.

    All of them up to `MAX_POINTS`, else those at even ranks, closer towards the largest, which is among them.
    `weights`: how often each occurs.
    """
    if not len(values):
        return np.empty(0), np.empty(0)
    order = np.argsort(values, kind="stable")
    ranked = values[order].astype(np.float64)
    counts = np.cumsum(np.ones(len(ranked), np.int64) if weights is None else weights[order])
    # of equal values the last one has the share
    last = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))
    ranked, counts = ranked[last], counts[last]
    if len(ranked) > MAX_POINTS:
        total = counts[-1]
        half = MAX_POINTS // 2
        upper = total - np.geomspace(total, 1, half) + 1
        wanted = np.union1d(np.linspace(1, total, half), upper)
        kept = np.unique(np.searchsorted(counts, wanted))
        ranked, counts = ranked[kept], counts[kept]
    return ranked, counts / counts[-1]


def edges(first_ns: int, last_ns: int, num: int = NUM_STRETCHES) -> FloatColumn:
    """Bounds of even stretches of the span, in ns; one nanosecond at least each."""
    num = max(1, min(num, last_ns - first_ns))
    return np.linspace(first_ns, max(last_ns, first_ns + 1), num + 1)


@dataclass(frozen=True, slots=True)
class Levels:
    """Of each stretch: the mean over its time, the least and the most."""

    mean: FloatColumn
    least: FloatColumn
    most: FloatColumn


def levels(
    starts_ns: IntColumn, ends_ns: IntColumn, bounds: FloatColumn, amounts: FloatColumn | IntColumn | None = None
) -> Levels:
    """How much was there in each stretch between neighbouring `bounds` (ns), where interval i adds `amounts[i]`, or 1.

    Intervals are [start, end); what ends where something else begins makes no gap.
    """
    lasting = ends_ns > starts_ns
    added = np.ones(len(starts_ns)) if amounts is None else amounts.astype(np.float64)
    added = added[lasting]
    times, place = np.unique(np.concatenate((starts_ns[lasting], ends_ns[lasting])), return_inverse=True)
    if not len(times):
        zeros = np.zeros(len(bounds) - 1)
        return Levels(zeros, zeros, zeros)
    changes = np.bincount(place.ravel(), np.concatenate((added, -added)), len(times))
    # a rounded sum of rates may pass below nothing
    level = np.append(0.0, np.maximum(np.cumsum(changes), 0.0))
    level[-1] = 0.0
    passed = np.append(0.0, np.cumsum(level[1:-1] * np.diff(times)))
    mean = np.diff(np.interp(bounds, times, passed)) / np.diff(bounds)
    first = np.searchsorted(times, bounds[:-1], side="right")
    stop = np.maximum(np.searchsorted(times, bounds[1:], side="left"), first) + 1
    spans = np.column_stack((first, stop)).ravel()
    padded = np.append(level, 0.0)
    least, most = (extreme.reduceat(padded, spans)[::2] for extreme in (np.minimum, np.maximum))
    return Levels(np.clip(mean, least, most), least, most)
