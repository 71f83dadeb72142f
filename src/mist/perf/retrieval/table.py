"""A measured table of recall and throughput, for an index that no formula here knows.

One of the performance models of vector search: it picks an operating point and scales it to batches and cores. It never
extrapolates beyond the points that are given.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from mist.errors import nearest
from mist.perf import HostDeployment, OperatorTime
from mist.perf.retrieval.phases import Phase, Search, at_least
from mist.registry import register
from mist.request import Step
from mist.units import NS_PER_S


class SearchPoint(NamedTuple):
    """One measured setting: its recall (NaN where unknown), the queries per second of all threads, and its name."""

    recall: float
    queries_per_s: float
    setting: str

    @classmethod
    def of(cls, given: Mapping[str, float | str]) -> SearchPoint:
        """A point as users write it; ValueError where it isn't one."""
        if unknown := given.keys() - {"recall", "queries_per_s", "setting"}:
            raise ValueError(f"points: {min(unknown)} is not known; recall, queries_per_s and setting are")
        recall, rate = given.get("recall", math.nan), given.get("queries_per_s")
        if not isinstance(rate, int | float) or not rate > 0:
            raise ValueError(f"points: queries_per_s must be a number above 0, not {rate!r}")
        if isinstance(recall, str) or not (0 <= recall <= 1 or math.isnan(recall)):
            raise ValueError(f"points: a recall is a number from 0 to 1, not {recall!r}")
        return cls(recall, rate, str(given.get("setting", "")))


@register("perf", "search_table")
@dataclass(slots=True, kw_only=True)
class SearchTable(Search):
    """Measured throughputs, by `recall` or by the name of a `setting`; between two recalls log(QPS) is linear.

    `points`: mappings of `queries_per_s` and `recall` or `setting`, or both; one that another beats in both recall and
    throughput counts by its name alone. They were measured with `num_threads` threads, all of them busy. So a query is
    `num_threads` / QPS of work of one core, and a batch takes as long as the core with the most queries: ceil(n /
    cores) times that. A batch smaller than the cores is no faster per query.
    `dram_bytes_per_query`: what others on the host lose, and a bound of the memory's bandwidth; 0 where it isn't known.
    `index_bytes`: what the index takes in memory.
    """

    points: tuple[dict[str, float | str], ...]
    num_threads: int
    index_bytes: int
    recall: float | None = None
    setting: str = ""
    dram_bytes_per_query: int = 0
    _read: tuple[SearchPoint, ...] = field(init=False, repr=False)
    _origin: str = field(init=False, repr=False, default="measured")

    def __post_init__(self) -> None:
        at_least(1, num_threads=self.num_threads)
        at_least(0, index_bytes=self.index_bytes, dram_bytes_per_query=self.dram_bytes_per_query)
        self._read = tuple(SearchPoint.of(point) for point in self.points)
        if (self.recall is None) == (not self.setting):
            raise ValueError("recall or setting chooses a point: give one of them")
        self.queries_per_s()

    def queries_per_s(self) -> float:
        """The throughput of the chosen point with `num_threads` threads; ValueError where the table has none."""
        if self.setting:
            named = {point.setting: point.queries_per_s for point in self._read if point.setting}
            if self.setting not in named:
                raise ValueError(f"setting {self.setting!r} is of no point; {nearest(self.setting, named)}")
            return named[self.setting]
        assert self.recall is not None
        frontier = self._frontier()
        if not frontier or not frontier[0].recall <= self.recall <= frontier[-1].recall:
            span = f"{frontier[0].recall:g} to {frontier[-1].recall:g}" if frontier else "none"
            raise ValueError(f"recall {self.recall:g} isn't within that of the points, {span}")
        above = next(point for point in frontier if point.recall >= self.recall)
        below = next(point for point in reversed(frontier) if point.recall <= self.recall)
        if below is above:
            return above.queries_per_s
        share = (self.recall - below.recall) / (above.recall - below.recall)
        return math.exp((1 - share) * math.log(below.queries_per_s) + share * math.log(above.queries_per_s))

    def index_size(self) -> float:
        """`index_bytes`."""
        return self.index_bytes

    def phases(self, host: HostDeployment) -> tuple[Phase, ...]:
        """The search as a whole."""
        is_measured = bool(self.setting) or any(p.recall == self.recall for p in self._frontier())
        self._origin = "measured" if is_measured else "interpolated"
        core_ns = self.num_threads / self.queries_per_s() * NS_PER_S
        return (Phase("search", core_ns, bytes=self.dram_bytes_per_query, resident_bytes=self.index_bytes),)

    def explain(self, step: Step) -> list[OperatorTime]:
        """The search as one operator, of the table's origin."""
        found = super(SearchTable, self).explain(step)
        return [OperatorTime(p.name, p.count, p.flop, p.bytes, p.time_ns, p.bound_by, self._origin, p.floor_ns)
                for p in found]  # fmt: skip

    def provenance(self) -> dict[str, float]:
        """All of the time is of one point, or between two."""
        return {self._origin: 1.0}

    def _frontier(self) -> list[SearchPoint]:
        """The points by recall, without those that another beats in both recall and throughput."""
        best: list[SearchPoint] = []
        known = [point for point in self._read if not math.isnan(point.recall)]
        for point in sorted(known, key=lambda p: (-p.recall, -p.queries_per_s)):
            if not best or point.queries_per_s > best[-1].queries_per_s:
                best.append(point)
        return best[::-1]
