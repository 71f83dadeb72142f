"""What deployments are judged by, as a reader wants it: names, units, and values with half of their interval.

Between the documents of searches, comparisons and sensitivities and their pages. It computes no figure of these.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mist.report.html.figures import FRACTION, NOTHING, NUMBER, SECONDS, shown

_STATISTICS = {"mean": "mean ", "p50": "P50 ", "p90": "P90 ", "p99": "P99 "}


def name_of(objective: str) -> str:
    """ "P99 TTFT" of ttft_s.p99, "usd/hour" of usd_per_hour."""
    metric, _, statistic = objective.partition(".")
    if statistic in _STATISTICS and metric.endswith("_s"):
        return _STATISTICS[statistic] + metric[:-2].upper()
    return objective.replace("_per_", "/").replace("_", " ")


def unit_of(objective: str) -> str:
    """The unit of `figures` that its values are in."""
    if objective.partition(".")[0].endswith("_s") and "." in objective:
        return SECONDS
    return FRACTION if objective == "attainment" else NUMBER


def with_interval(objective: str, interval: Mapping[str, Any]) -> str:
    """ "195 ms ± 12 ms": the mean and half of the interval around it, where there is one that is wider than nothing."""
    mean, low, unit = interval["mean"], interval["low"], unit_of(objective)
    if mean is None:
        return NOTHING
    half = 0.0 if low is None else mean - low
    return shown(mean, unit) if half <= 5e-4 * abs(mean) else f"{shown(mean, unit)} ± {shown(half, unit)}"


def told(choices: Mapping[str, str]) -> str:
    """Choices in a line, each by the end of its path."""
    return ", ".join(f"{short(path)} {label}" for path, label in choices.items())


def short(path: str) -> str:
    """The end of a path into a scenario, without the labels of the alternatives around it."""
    return path.rpartition(".")[2].partition("[")[0] or path
