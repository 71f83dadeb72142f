"""Service-level objectives: a verdict per target, and goodput, the requests per second that met all of them.

Targets and per-request times come in, verdicts go out. It never relaxes a target by its percentile when it judges a
single request: there each target is a bound.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mist.metrics.clients import ratio
from mist.metrics.distribution import Distribution, FloatColumn
from mist.metrics.window import BoolColumn, Columns, Window
from mist.records import FINISHED, REFUSED, REJECTED, TIMED_OUT, IntColumn
from mist.units import NS_PER_S

#: targets by percentile ("p99", "mean") by metric: seconds of one of `SLO_METRICS`, or a factor of one of `SLOWDOWNS`
Targets = Mapping[str, Mapping[str, float]]

SLO_METRICS = ("ttft_s", "tpot_s", "itl_s", "e2e_s")
#: times over those of the same request alone, and of which metric
SLOWDOWNS = {"ttft_slowdown": "ttft_s", "tpot_slowdown": "tpot_s", "e2e_slowdown": "e2e_s"}


def summarise_slo(
    targets: Targets,
    times_ns: Mapping[str, IntColumn | FloatColumn],
    distributions: Mapping[str, Distribution],
    requests: Columns,
    chosen: BoolColumn,
    window: Window,
) -> dict[str, Any]:
    """Verdicts and goodput.

    `times_ns[metric]`: per row of `requests`, -1 where the metric doesn't apply (a bound is then met); for `itl_s` the
    request's longest gap. `distributions` holds the statistics of those that finished; those of ITL are over gaps, not
    requests. `chosen` are the rows that arrived in the window: verdicts and attainment are over them, goodput over what
    finished in the window. Requests that were rejected or timed out count as infinitely late in a verdict, which tells
    their number (`num_lost`), and so miss any target of a mean. A slowdown of 1 is given as a second.
    """
    verdicts = []
    met_all = requests["status"] == FINISHED
    num_lost = int(np.count_nonzero(chosen & _lost(requests)))
    for metric, bounds in targets.items():
        known = times_ns[metric][chosen & (times_ns[metric] >= 0)]
        for statistic, target_s in bounds.items():
            actual_s = distributions[metric][statistic]
            judged_s = actual_s if not num_lost else _with_lost(known, num_lost, statistic)
            if num_lost and metric == "itl_s" and judged_s is not None and judged_s < math.inf:
                judged_s = actual_s  # over gaps, of which lost requests have none
            met = None if judged_s is None else judged_s <= target_s
            unit = "slowdown" if metric in SLOWDOWNS else "s"
            verdicts.append(
                {
                    "metric": metric,
                    "statistic": statistic,
                    f"target_{unit}": target_s,
                    f"actual_{unit}": actual_s,
                    "num_lost": num_lost,
                    "met": met,
                }
            )
            met_all &= times_ns[metric] <= target_s * NS_PER_S
    good = int(np.count_nonzero(met_all & window.holds(requests["end_ns"])))
    wanted = chosen & (requests["status"] != REFUSED)
    all_met = [verdict["met"] for verdict in verdicts]
    return {
        "met": False if False in all_met else None if None in all_met else True,
        "targets": verdicts,
        "goodput_requests_per_s": ratio(good * NS_PER_S, window.span_ns),
        "attainment": ratio(int(np.count_nonzero(met_all & chosen)), int(np.count_nonzero(wanted))),
    }


def slowdowns_ns(times_ns: IntColumn | FloatColumn, alone_ns: FloatColumn) -> FloatColumn:
    """Each of `times_ns` over that of its request alone, a factor of 1 as a second; -1 where either isn't known."""
    known = (times_ns >= 0) & (alone_ns > 0)
    return np.where(known, times_ns / np.where(known, alone_ns, 1.0) * NS_PER_S, -1.0)


def _lost(requests: Columns) -> BoolColumn:
    """Requests that ended without an answer, though neither their users nor their own pipeline wanted it so."""
    lost: BoolColumn = (requests["status"] == REJECTED) | (requests["status"] == TIMED_OUT)
    return lost


def _with_lost(times_ns: IntColumn | FloatColumn, num_lost: int, statistic: str) -> float | None:
    """A statistic, in seconds, of these times and as many infinite ones; None of none."""
    if statistic == "mean":
        return math.inf
    rank = (len(times_ns) + num_lost - 1) * _percentile(statistic) / 100
    if rank > len(times_ns) - 1:
        return math.inf
    share = 100 * rank / (len(times_ns) - 1) if len(times_ns) > 1 else 0.0
    return float(np.percentile(times_ns, share)) / NS_PER_S


def percentiles_of(targets: Targets) -> list[float]:
    """The percentiles (0-100) that the targets name; ValueError for a statistic that isn't "mean" or like "p99"."""
    named = {statistic for bounds in targets.values() for statistic in bounds}
    return sorted(_percentile(statistic) for statistic in named - {"mean"})


def _percentile(statistic: str) -> float:
    digits = statistic[1:]
    if statistic[:1] != "p" or not digits.replace(".", "", 1).isdigit() or not 0 <= float(digits) <= 100:
        raise ValueError(f"{statistic!r} is neither 'mean' nor a percentile like 'p99'")
    return float(digits)
