"""How long the rest of a search may take: the runs that may still come, and what runs on each prefix took so far.

Beside the laboratory. Whoever decides what is run says after each decision how many runs it expects to ask for later,
so that no part of a search is left out of the figure. It decides nothing, and no result depends on it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

#: a number of runs, or what tells it by what is known then
Expected = float | Callable[[], float]

#: new runs before which nothing is said of the time: the first of them make tables of step times for all
_FEW = 10
#: seconds of a run that don't grow with its requests, about: the scenario is validated and its requests are drawn
_START_S = 0.05


@dataclass
class Forecast:
    """Runs to come by part of a search, and the processor time of those that are done, by share of the workload."""

    _parts: dict[str, tuple[float, Expected]] = field(default_factory=dict)
    _coming: list[tuple[float, float]] = field(default_factory=list)
    _took: dict[float, tuple[int, float]] = field(default_factory=dict)
    _num_new: int = 0
    _new_s: float = 0.0
    _began_s: float = field(default_factory=time.perf_counter)

    def expect(self, part: str, share: float, number: Expected) -> None:
        """What a part of the search may ask for on the first `share` of the workload, beside the next batch of runs."""
        self._parts[part] = share, number

    def begin_batch(self) -> None:
        """Ask all parts how many runs they expect now."""
        self._coming = [(share, each() if callable(each) else each) for share, each in self._parts.values()]

    def add(self, share: float, cpu_s: float, *, is_new: bool) -> None:
        """A run that is done; one that isn't `is_new` was known before."""
        number, total_s = self._took.get(share, (0, 0.0))
        self._took[share] = number + 1, total_s + cpu_s
        if is_new:
            self._num_new += 1
            self._new_s += cpu_s

    @property
    def num_coming(self) -> int:
        """Runs that may come after the batch under way."""
        return math.ceil(sum(number for _, number in self._coming))

    def left_s(self, share: float, number: int) -> float:
        """Seconds that `number` runs on a share and all that may come after them take; inf where nobody can tell yet.

        Runs go on in parallel as they have so far.
        """
        if self._num_new < _FEW or not self._new_s:
            return math.inf
        work_s = sum(each * self._run_s(its) for its, each in [(share, number), *self._coming])
        return work_s * (time.perf_counter() - self._began_s) / self._new_s

    def _run_s(self, share: float) -> float:
        """The mean of a run; on a prefix that none ran on that of the next shorter one in proportion, but its start."""
        at = max((each for each in self._took if each <= share), default=min(self._took))
        number, total_s = self._took[at]
        start_s = min(_START_S, total_s / number)
        return start_s + (total_s / number - start_s) * share / at
