"""Interpolation on ragged grids, linear in time, and the isotonic cleaning that makes measured times monotone.

Between the cached tables and the performance models that tabulate from them, once per client. It never answers a step,
and knows neither units nor hardware.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
OriginArray = npt.NDArray[np.int8]

#: Where an estimate comes from, from best to worst.
MEASURED, INTERPOLATED, EXTRAPOLATED = 0, 1, 2

#: Neighbours on either side that are tried until one covers the point.
_REACH = 2
_MAX_SWEEPS = 50


@dataclass(frozen=True, slots=True)
class Estimate:
    """Times in ns, and for each its origin (MEASURED, INTERPOLATED or EXTRAPOLATED)."""

    ns: FloatArray
    origin: OriginArray


class RaggedGrid:
    """Times at scattered points of a product grid with holes, interpolated axis by axis.

    `points`: [axes, points], sorted by the first axis, then the second, ...; `ns`: [points]. The last axis is a line;
    every other value of an outer axis holds a smaller grid of its own. `origin`: [points], MEASURED for all if None.
    """

    def __init__(self, points: FloatArray, ns: FloatArray, origin: OriginArray | None = None) -> None:
        self.points = points
        self.ns = ns
        self.origin = np.full(len(ns), MEASURED, np.int8) if origin is None else origin

    @classmethod
    def filled(cls, points: FloatArray, ns: FloatArray) -> RaggedGrid:
        """The grid of these points and of the holes that lie between points along at least two axes.

        A hole takes the median of what the lines through it say, each linear between its neighbours; the last axis, the
        smoothest, counts twice. With two axes in all that is what its own line says.
        """
        axes = [np.unique(row) for row in points]
        shape = tuple(len(axis) for axis in axes)
        if len(axes) < 3 or len(ns) == np.prod(shape):
            return cls(points, ns)
        times = np.full(shape, np.nan)
        times[tuple(np.searchsorted(axis, row) for axis, row in zip(axes, points, strict=True))] = ns
        holes = _bracketed(times)
        if not len(holes):
            return cls(points, ns)
        added = np.array([axis[i] for axis, i in zip(axes, holes.T, strict=True)])
        points = np.concatenate([points, added], axis=1)
        ns = np.concatenate([ns, [_filling(axes, times, tuple(hole)) for hole in holes.tolist()]])
        order = np.lexsort(points[::-1])
        origin = np.where(order < len(ns) - len(holes), MEASURED, INTERPOLATED).astype(np.int8)
        return cls(points[:, order], ns[order], origin)

    @cached_property
    def values(self) -> FloatArray:
        """The values of the first axis."""
        return np.unique(self.points[0])

    def at(self, outer: Sequence[float], inner: FloatArray) -> Estimate:
        """Times at `outer` (one value for each axis but the last) and each of `inner`.

        On a grid value of an outer axis its own line answers; between two, both lines, linearly in time. A line that
        doesn't reach `inner` gives way to the next one beyond if that one does. Past the last point of a line time
        grows at its last rate (`_line`); before the first it stays.
        """
        if not outer:
            return _line(self.points[0], self.ns, self.origin, inner)
        x, rest = outer[0], outer[1:]
        values = self.values
        at = int(np.searchsorted(values, x))
        if at < len(values) and values[at] == x:
            own = self._below(at).at(rest, inner)
            missing = own.origin == EXTRAPOLATED
            if not missing.any() or at in (0, len(values) - 1):
                return own
            around = self._between(values, at, at + 1, x, rest, inner)
            take = missing & (around.origin < EXTRAPOLATED)
            return Estimate(np.where(take, around.ns, own.ns), np.where(take, around.origin, own.origin))
        return self._between(values, at, at, x, rest, inner)

    def _between(
        self, values: FloatArray, num_below: int, first_above: int, x: float, rest: Sequence[float], inner: FloatArray
    ) -> Estimate:
        """Linear in `x` between a line below and one above; past the end of the axis by the rate of `_line`."""
        below = list(range(num_below - 1, max(num_below - 1 - _REACH, -1), -1))
        above = list(range(first_above, min(first_above + _REACH, len(values))))
        if not above:
            return self._beyond(values, num_below - 1, x, rest, inner)
        if not below:
            first = self._below(above[0]).at(rest, inner)
            return Estimate(first.ns, np.full(len(inner), EXTRAPOLATED, np.int8))
        low_x, low = self._covering(values, below, rest, inner)
        high_x, high = self._covering(values, above, rest, inner)
        share = (x - low_x) / (high_x - low_x)
        origin = np.maximum(np.maximum(low.origin, high.origin), np.int8(INTERPOLATED))
        return Estimate(low.ns + share * (high.ns - low.ns), origin)

    def _covering(
        self, values: FloatArray, candidates: list[int], rest: Sequence[float], inner: FloatArray
    ) -> tuple[FloatArray, Estimate]:
        """For each of `inner` the nearest candidate that needn't extrapolate, else the nearest."""
        chosen = self._below(candidates[0]).at(rest, inner)
        x, ns, origin = np.full(len(inner), values[candidates[0]]), chosen.ns, chosen.origin
        for i in candidates[1:]:
            if not (origin == EXTRAPOLATED).any():
                break
            other = self._below(i).at(rest, inner)
            take = (origin == EXTRAPOLATED) & (other.origin < EXTRAPOLATED)
            x, ns, origin = (
                np.where(take, values[i], x), np.where(take, other.ns, ns), np.where(take, other.origin, origin)
            )  # fmt: skip
        return x, Estimate(ns, origin)

    def _beyond(self, values: FloatArray, last: int, x: float, rest: Sequence[float], inner: FloatArray) -> Estimate:
        end = self._below(last).at(rest, inner)
        origin = np.full(len(inner), EXTRAPOLATED, np.int8)
        if last == 0:
            return Estimate(end.ns * max(1.0, x / values[0]), origin)
        base = half_way(values)
        start = self._below(base).at(rest, inner)
        rate = np.maximum(end.ns - start.ns, 0.0) / (values[last] - values[base])
        return Estimate(end.ns + rate * (x - values[last]), origin)

    def _below(self, i: int) -> RaggedGrid:
        if i not in self._children:
            first, last = np.searchsorted(self.points[0], [self.values[i], np.nextafter(self.values[i], np.inf)])
            self._children[i] = RaggedGrid(self.points[1:, first:last], self.ns[first:last], self.origin[first:last])
        return self._children[i]

    @cached_property
    def _children(self) -> dict[int, RaggedGrid]:
        return {}


def _bracketed(times: FloatArray) -> IntArray:
    """[holes, axes]: the indices of missing times that lie between others along at least two axes."""
    known = np.isfinite(times)
    num_axes = np.zeros(times.shape, np.int64)
    for axis in range(times.ndim):
        before = np.logical_or.accumulate(known, axis=axis)
        after = np.flip(np.logical_or.accumulate(np.flip(known, axis), axis=axis), axis)
        num_axes += before & after
    return np.argwhere(~known & (num_axes >= 2))


def _filling(axes: Sequence[FloatArray], times: FloatArray, hole: tuple[int, ...]) -> float:
    """What the lines through a hole say of it (`RaggedGrid.filled`)."""
    votes = []
    for i, axis in enumerate(axes):
        line = np.moveaxis(times, i, -1)[hole[:i] + hole[i + 1 :]]
        known = np.flatnonzero(np.isfinite(line))
        if len(known) and known[0] < hole[i] < known[-1]:
            vote = float(np.interp(axis[hole[i]], axis[known], line[known]))
            votes += [vote, vote] if i == len(axes) - 1 else [vote]
    return float(np.median(votes))


def _line(x: FloatArray, ns: FloatArray, origin: OriginArray, at: FloatArray) -> Estimate:
    """Linear between points. Past the last, at the rate from the last point that is at most half as far; one point
    alone is scaled in proportion. Before the first the first time holds: a launch costs what it costs."""
    found = np.searchsorted(x, at)
    exact = x[np.minimum(found, len(x) - 1)] == at
    beyond, before = at > x[-1], at < x[0]
    if len(x) > 1:
        base = half_way(x)
        rate = max(0.0, (ns[-1] - ns[base]) / (x[-1] - x[base]))
        past = ns[-1] + rate * (at - x[-1])
    else:
        past = ns[-1] * at / x[-1]
    between = np.where(beyond | before, EXTRAPOLATED, INTERPOLATED)
    found_origin = np.where(exact, origin[np.minimum(found, len(x) - 1)], between)
    return Estimate(np.where(beyond, past, np.interp(at, x, ns)), found_origin.astype(np.int8))


def half_way(x: FloatArray) -> int:
    """The last index whose value is at most half the last one (a longer base than the last segment, so less noise)."""
    return min(max(int(np.searchsorted(x, x[-1] / 2, side="right")) - 1, 0), len(x) - 2)


def isotonic(
    columns: Sequence[npt.NDArray[np.generic]], ns: FloatArray, rising: Sequence[int], weights: FloatArray
) -> FloatArray:
    """`ns` made non-decreasing along each of the `rising` columns wherever all other columns are equal.

    Along one axis this is isotonic regression of log times (pool adjacent violators, Barlow et al. 1972): the weighted
    geometric mean over each run that would fall. Several axes take turns until none is violated.
    """
    before = np.log(ns)
    log = before.copy()
    orders = []
    for i in rising:
        others = [c for j, c in enumerate(columns) if j != i]
        order = np.lexsort((columns[i], *reversed(others)))
        same = np.ones(len(ns) - 1, bool)
        for c in others:
            same &= c[order][1:] == c[order][:-1]
        orders.append((order, same))
    for _ in range(_MAX_SWEEPS):
        changed = False
        for order, same in orders:
            line = log[order]
            falls = np.flatnonzero(same & (np.diff(line) < -1e-12))
            if len(falls):
                changed = True
                _pool_lines(line, weights[order], same, falls)
                log[order] = line
        if not changed:
            break
    return np.where(log == before, ns, np.exp(log))


def _pool_lines(line: FloatArray, weights: FloatArray, same: npt.NDArray[np.bool_], falls: IntArray) -> None:
    ends = np.append(np.flatnonzero(~same), len(line) - 1)
    for end in np.unique(ends[np.searchsorted(ends, falls)]).tolist():
        at = int(np.searchsorted(ends, end))
        first = int(ends[at - 1]) + 1 if at else 0
        line[first : end + 1] = _pooled(line[first : end + 1].tolist(), weights[first : end + 1].tolist())


def _pooled(values: list[float], weights: list[float]) -> list[float]:
    """Isotonic regression of one sequence: the nearest non-decreasing one in weighted squares."""
    pools: list[tuple[float, float, int]] = []
    for mean, weight in zip(values, weights, strict=True):
        size = 1
        while pools and pools[-1][0] > mean:
            last, last_weight, count = pools.pop()
            mean = (mean * weight + last * last_weight) / (weight + last_weight)
            weight, size = weight + last_weight, size + count
        pools.append((mean, weight, size))
    return [mean for mean, _, size in pools for _ in range(size)]
