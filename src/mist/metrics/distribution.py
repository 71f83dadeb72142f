"""Mean and percentiles of columns of times, plain or weighted, as the JSON documents show them.

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
    """Mean and percentiles in seconds of times in ns, as {"mean", "p50", ...}; None each where there are no values."""
    if not len(values_ns):
        return _empty(percentiles)
    points = [float(value) for value in np.percentile(values_ns, percentiles)]
    return _in_seconds(float(np.mean(values_ns)), points, percentiles)


def weighted_distribution(
    values_ns: IntColumn, weights: IntColumn, percentiles: Sequence[float] = PERCENTILES
) -> Distribution:
    """The same of the multiset that holds `values_ns[i]` `weights[i]` times, without expanding it."""
    counted = weights > 0
    values, counts = values_ns[counted], weights[counted]
    if not len(values):
        return _empty(percentiles)
    points = weighted_percentiles(values, counts, percentiles)
    return _in_seconds(float(np.sum(values * counts, dtype=np.float64)) / int(counts.sum()), points, percentiles)


def weighted_percentiles(values: IntColumn, weights: IntColumn, percentiles: Sequence[float]) -> list[float]:
    """Percentiles (0-100) of the multiset; equal to `np.percentile` (linear, on ranks) of the expanded column.

    `values`, `weights`: int64[n], weights > 0. Raises ValueError where n is 0.
    """
    if not len(values):
        raise ValueError("percentiles of no values")
    order = np.argsort(values)
    ranked, last_rank = values[order], np.cumsum(weights[order])
    total = int(last_rank[-1])
    return [_at_rank(ranked, last_rank, (total - 1) * (percentile / 100)) for percentile in percentiles]


def _at_rank(ranked: IntColumn, last_rank: IntColumn, rank: float) -> float:
    """The value at a fractional rank counted from 0, interpolated from the nearer neighbour as NumPy does."""
    below = int(rank)
    share = rank - below
    places = np.searchsorted(last_rank, (below, below + 1), side="right")
    lower, upper = (int(value) for value in ranked[np.minimum(places, len(ranked) - 1)])
    return upper - (upper - lower) * (1 - share) if share >= 0.5 else lower + (upper - lower) * share


def _in_seconds(mean_ns: float, points_ns: Sequence[float], percentiles: Sequence[float]) -> Distribution:
    named = {f"p{percentile:g}": point / NS_PER_S for percentile, point in zip(percentiles, points_ns, strict=True)}
    return {"mean": mean_ns / NS_PER_S, **named}


def _empty(percentiles: Sequence[float]) -> Distribution:
    return {"mean": None, **{f"p{percentile:g}": None for percentile in percentiles}}
