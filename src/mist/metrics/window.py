"""The part of a run that is measured: which requests count, and over which span of the clock rates are taken.

Everything else in this package gets one of these instead of a pair of bounds, so that all figures of a summary agree
on what they cover. It never drops records: figures select from the tables by its bounds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mist.records import IntColumn, Records

Columns = Mapping[str, IntColumn]
BoolColumn = npt.NDArray[np.bool_]
#: ns on the run's clock; None: open
Bounds = tuple[int | None, int | None]


@dataclass(frozen=True, slots=True)
class Window:
    """Half-open in its events: an event at t counts where `start_ns` <= t < `stop_ns`.

    `end_ns` ends the span (`stop_ns` is one past it at the end of a run, so that the last event counts).
    `first_ns` and `last_ns` are the run's first arrival and last event.
    """

    first_ns: int
    last_ns: int
    start_ns: int
    end_ns: int
    stop_ns: int

    @classmethod
    def of(cls, records: Records, bounds: Bounds = (None, None)) -> Window:
        """The bounds cut to a run whose records are whole."""
        return cls.between(*_extent(records), bounds)

    @classmethod
    def between(cls, first_ns: int, last_ns: int, bounds: Bounds = (None, None)) -> Window:
        """The bounds cut to a run from its first arrival to its last event.

        `last_ns` may be later than the run lasts: what happens in it is in the same windows.
        """
        lower, upper = bounds
        start = first_ns if lower is None else max(lower, first_ns)
        end = last_ns if upper is None else max(min(upper, last_ns), start)
        return cls(first_ns, last_ns, start, end, last_ns + 1 if upper is None or upper > last_ns else end)

    @property
    def span_ns(self) -> int:
        """Length of the span that rates are divided by, in ns."""
        return max(0, self.end_ns - self.start_ns)

    @property
    def is_whole_run(self) -> bool:
        return self.start_ns == self.first_ns and self.stop_ns > self.last_ns

    def holds(self, times_ns: IntColumn) -> BoolColumn:
        """Which of the times lie in the window."""
        return (times_ns >= self.start_ns) & (times_ns < self.stop_ns)


def _extent(records: Records) -> tuple[int, int]:
    arrivals = records.requests.as_columns()["arrival_ns"]
    if not len(arrivals):
        return 0, 0
    ends = [table.as_columns()["end_ns"] for table in (records.requests, records.tasks, records.steps)]
    return int(arrivals.min()), max(int(column.max()) for column in [arrivals, *ends] if len(column))
