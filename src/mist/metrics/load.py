"""How many were in the system, over time: the number waiting per stretch of a run, and Little's identity.

Intervals (from when, to when) come in; time averages go out. Saturation reads the averages, tests the identity. It
never needs events in order and never walks a clock.
"""

from __future__ import annotations

import numpy as np

from mist.metrics.distribution import FloatColumn
from mist.metrics.window import Columns
from mist.records import UNFINISHED, IntColumn


def mean_number(starts_ns: IntColumn, ends_ns: IntColumn, edges_ns: FloatColumn) -> FloatColumn:
    """Time-averaged number of the intervals [start, end) open in each stretch between neighbouring edges.

    `edges_ns`: float64[n + 1], increasing; returns float64[n].
    """
    opened = [np.maximum(edge - starts_ns, 0.0).sum() for edge in edges_ns]
    closed = [np.maximum(edge - ends_ns, 0.0).sum() for edge in edges_ns]
    return np.diff(np.subtract(opened, closed)) / np.diff(edges_ns)


def highest_number(starts_ns: IntColumn, ends_ns: IntColumn, until_ns: int) -> int:
    """The most intervals [start, end) open at one instant up to `until_ns`; one of no length is never open."""
    times = np.concatenate((ends_ns, starts_ns))
    change = np.repeat(np.array((-1, 1)), len(starts_ns))
    # at one instant, ends before starts
    order = np.argsort(times, kind="stable")
    change = change[order][times[order] <= until_ns]
    return max(0, int(np.cumsum(change).max(initial=0)))


def littles_identity(requests: Columns, last_event_ns: int) -> tuple[int, int]:
    """(integral of the number in the system over time, sum of all sojourn times), both in ns: equal in any run.

    Little (1961): L = lambda W as an identity over a finite stretch. Requests that are unfinished stay in the system
    until `last_event_ns`. Exact at any size: the sums are Python integers.
    """
    arrivals = requests["arrival_ns"]
    ends = np.where(requests["status"] == UNFINISHED, last_event_ns, requests["end_ns"])
    times = np.concatenate((arrivals, ends))
    change = np.repeat(np.array((1, -1)), len(arrivals))
    order = np.argsort(times, kind="stable")
    number = np.cumsum(change[order])[:-1]
    integral = sum(n * time for n, time in zip(number.tolist(), np.diff(times[order]).tolist(), strict=True))
    return integral, sum((ends - arrivals).tolist())
