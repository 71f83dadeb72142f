"""Mean and percentiles of columns of times, plain or weighted, whole or in blocks, as the JSON documents show them.

The last station of every latency figure: integer nanoseconds come in, a small dict of seconds goes out. It never
answers NaN (an empty column gives None) and never guesses: percentiles interpolate linearly between ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mist.records import IntColumn
from mist.units import NS_PER_S

FloatColumn = npt.NDArray[np.float64]
Distribution = dict[str, float | None]

PERCENTILES = (50.0, 90.0, 99.0)


def distribution(values_ns: IntColumn | FloatColumn, percentiles: Sequence[float] = PERCENTILES) -> Distribution:
    """Mean and percentiles in seconds of times in ns, as {"mean", "p50", ...}; None each where there are no values.

    The order of the values makes no difference, nor does it to the last bit of a mean.
    """
    if not len(values_ns):
        return _empty(percentiles)
    ascending = np.sort(values_ns)
    points = [float(value) for value in np.percentile(ascending, percentiles)]
    return _in_seconds(float(np.mean(ascending)), points, percentiles)


class Blocks:
    """A column that is written block by block, each in as few bytes a value as hold it."""

    def __init__(self) -> None:
        self._blocks: list[IntColumn] = []

    def add(self, values: IntColumn) -> None:
        self._blocks.append(_narrow(values))

    def whole(self) -> IntColumn:
        """int64[values], in the order that they came in."""
        return np.concatenate([np.zeros(0, np.int64), *self._blocks], dtype=np.int64)


class Multiset:
    """Times in ns, each so many times; percentiles are exact, and nothing is ever expanded.

    Blocks lie sorted, each value once with the rank of its last one, and the value at a rank is found by bisection.
    """

    def __init__(self) -> None:
        self._blocks: list[tuple[IntColumn, IntColumn]] = []
        self._count = 0
        self._sum = 0

    def add(self, values_ns: IntColumn, weights: IntColumn) -> None:
        """`values_ns[i]` comes in `weights[i]` times: int64[n] each."""
        counted = weights > 0
        values, weights = values_ns[counted], weights[counted]
        if not len(values):
            return
        order = np.argsort(values)
        values, ranks = values[order], np.cumsum(weights[order])
        is_last = np.append(values[1:] != values[:-1], True)
        self._blocks.append((_narrow(values[is_last]), _narrow(ranks[is_last])))
        self._count += int(ranks[-1])
        self._sum += _exact_sum(values * weights[order])

    def distribution(self, percentiles: Sequence[float] = PERCENTILES) -> Distribution:
        """As `distribution` of the expanded column."""
        if not self._count:
            return _empty(percentiles)
        points = [self._at_rank((self._count - 1) * (percentile / 100)) for percentile in percentiles]
        return _in_seconds(self._sum / self._count, points, percentiles)

    def _at_rank(self, rank: float) -> float:
        """The value at a fractional rank counted from 0, interpolated from the nearer neighbour as NumPy does."""
        below = int(rank)
        share = rank - below
        lower, upper = self._value(below), self._value(min(below + 1, self._count - 1))
        return upper - (upper - lower) * (1 - share) if share >= 0.5 else lower + (upper - lower) * share

    def _value(self, rank: int) -> int:
        low = min(int(values[0]) for values, _ in self._blocks)
        high = max(int(values[-1]) for values, _ in self._blocks)
        while low < high:
            middle = (low + high) // 2
            if sum(_num_up_to(middle, *block) for block in self._blocks) > rank:
                high = middle
            else:
                low = middle + 1
        return low


def _num_up_to(bound: int, values: IntColumn, ranks: IntColumn) -> int:
    # a bound of the values' own type: else they would all be converted
    place = np.searchsorted(values, values.dtype.type(min(bound, np.iinfo(values.dtype).max)), side="right")
    return int(ranks[place - 1]) if place else 0


def _exact_sum(values: IntColumn) -> int:
    """The sum of int64 values, however large."""
    return (int((values >> 32).sum()) << 32) + int((values & 0xFFFFFFFF).sum())


def _narrow(values: IntColumn) -> IntColumn:
    """The same values in the smallest type that holds them."""
    low, high = int(values.min(initial=0)), int(values.max(initial=0))
    fits = [dtype for dtype in (np.uint8, np.uint16, np.uint32) if low >= 0 and high <= np.iinfo(dtype).max]
    return np.array(values, dtype=fits[0] if fits else np.int64)


def _in_seconds(mean_ns: float, points_ns: Sequence[float], percentiles: Sequence[float]) -> Distribution:
    named = {f"p{percentile:g}": point / NS_PER_S for percentile, point in zip(percentiles, points_ns, strict=True)}
    return {"mean": mean_ns / NS_PER_S, **named}


def _empty(percentiles: Sequence[float]) -> Distribution:
    return {"mean": None, **{f"p{percentile:g}": None for percentile in percentiles}}
