"""Whether a run kept pace with its arrivals, and whether they went on for long enough to tell.

Beside the verdict of `metrics/saturation.py`, which proves that a queue grows: where few requests arrive none can,
though the same rate for longer would be too much. It judges no latency.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mist.metrics.distribution import FloatColumn
from mist.scenario.build import run
from mist.scenario.value import Scenario
from mist.search.evaluate import Summary

#: of the requests that arrive in the second half of the arrivals, as many as this share must end in it
LEAST = 0.9
#: arrivals must go on for so many times the mean E2E
ENOUGH = 10


@dataclass(frozen=True, slots=True)
class Pace:
    """Of the requests that finish, those that `arrived` and `ended` in the second half of the arrivals' `span_s`.

    `e2e_s` is their mean in the run, `per_s` the rate of arrivals, both over all that finish.
    """

    arrived: int
    ended: int
    span_s: float
    e2e_s: float
    per_s: float

    @classmethod
    def of(cls, arrival_s: FloatColumn, end_s: FloatColumn) -> Pace | None:
        """That of requests that finish, in s; None where they don't arrive over a time."""
        if len(arrival_s) < 2 or not (span := float(np.ptp(arrival_s))):
            return None
        last = float(arrival_s.max())
        middle = last - span / 2
        arrived, ended = (int(np.count_nonzero((at > middle) & (at <= last))) for at in (arrival_s, end_s))
        return cls(arrived, ended, span, float((end_s - arrival_s).mean()), (len(arrival_s) - 1) / span)

    @property
    def is_kept(self) -> bool:
        # one may always be under way: the last has arrived just now
        return self.ended + 1 >= LEAST * self.arrived

    @property
    def is_short(self) -> bool:
        return self.span_s < ENOUGH * self.e2e_s

    @property
    def num_enough(self) -> int:
        """Requests that arrive over `ENOUGH` times the mean E2E, rounded up to two digits."""
        number = ENOUGH * self.e2e_s * self.per_s + 1
        unit = int(10 ** max(0, math.floor(math.log10(number)) - 1))
        return math.ceil(number / unit) * unit


def measured(scenario: Scenario) -> Summary:
    """The `measure` of a job: the summary, and the run's `pace` where its load doesn't wait for the system."""
    result = run(scenario)
    summary = result.summary()
    done = result.requests["status"] == "finished"
    columns = (np.asarray(result.requests[name][done], np.float64) for name in ("arrival_s", "end_s"))
    return {**summary, "pace": Pace.of(*columns) if summary["open_loop"] else None}
