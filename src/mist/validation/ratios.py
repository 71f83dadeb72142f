"""Errors of ratios: when one thing about a run changes, does the simulated value change as the measured one does?

Beside the scores; a search compares configurations, so that errors common to both cancel. Pairs are of one source and
metric and differ in one thing. It never compares across sources.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

from mist.validation.evaluate import Evaluated
from mist.validation.points import Point
from mist.validation.score import TRUSTED, kind_of, statistics

#: what may differ, by its columns; those behind the first follow from it
AXES = {
    "device": ("device",),
    "tensor parallelism": ("tp", "num_devices"),
    "batch size": ("batch_size", "num_requests"),
    "concurrency": ("concurrency", "num_requests"),
    "rate": ("rate_per_s", "num_requests"),
    "dtype": ("weights_dtype", "kv_dtype", "checkpoint"),
    "engine": ("engine", "engine_version"),
}
#: columns that are no configuration
_ABOUT = ("point", "id", "citation", "date", "trust", "metric", "value", "runnable", "why_not", "note")


def ratio_errors(points: Sequence[Point], evaluated: Iterable[Evaluated]) -> dict[str, dict[str, dict[str, Any]]]:
    """{what differs: {kind of metric: statistics}} of 100 ((simulated a / b) / (measured a / b) - 1).

    All pairs that are trusted and not saturated; a is the one whose value comes later in the order of texts.
    """
    return {axis: errors for axis in AXES if (errors := _of_axis(axis, points, evaluated))}


def _of_axis(axis: str, points: Sequence[Point], evaluated: Iterable[Evaluated]) -> dict[str, dict[str, Any]]:
    groups: dict[tuple[object, ...], list[tuple[str, float]]] = defaultdict(list)
    for point, each in zip(points, evaluated, strict=True):
        same = _same(point.columns, AXES[axis])
        for c in each.comparisons:
            if c.trust in TRUSTED and not c.saturated:
                groups[c.metric, same].append((point[AXES[axis][0]], c.simulated / c.measured))
    errors: dict[str, list[float]] = defaultdict(list)
    for (metric, _), values in groups.items():
        for (first, low), (second, high) in combinations(sorted(values), 2):
            if first != second:
                errors[kind_of(str(metric))].append(100 * (high / low - 1))
    return {kind: statistics(found) for kind, found in sorted(errors.items())}


def _same(columns: Mapping[str, str], but: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """A point's configuration without these columns."""
    return tuple(sorted((k, v) for k, v in columns.items() if k not in _ABOUT and k not in but))
