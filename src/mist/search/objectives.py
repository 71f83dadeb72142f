"""What a deployment is judged by: objectives by their standard names, and how far it is from its constraints.

A summary, or the part of one that is kept (`excerpt`), comes in; numbers go out. It never compares two deployments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mist.errors import nearest
from mist.search.pace import ENOUGH

Summary = Mapping[str, Any]

#: what is counted as infinitely far from a constraint: nothing was measured, or requests were lost
HOPELESS = 1e9
#: latencies, of which there are objectives by statistic, such as ttft_s.p99
LATENCIES = ("ttft_s", "tpot_s", "itl_s", "e2e_s")
STATISTICS = ("mean", "p50", "p90", "p99")

#: where a summary has the figures, and whether more is better
_FIGURES: dict[str, tuple[str, str, bool]] = {
    "usd_per_hour": ("cost", "usd_per_hour", False),
    "mean_w": ("energy", "mean_w", False),
    "joules_per_output_token": ("energy", "joules_per_output_token", False),
    "requests_per_s": ("throughput", "requests_per_s", True),
    "output_tokens_per_s": ("throughput", "output_tokens_per_s", True),
    "total_tokens_per_s": ("throughput", "total_tokens_per_s", True),
    "goodput_requests_per_s": ("slo", "goodput_requests_per_s", True),
    "attainment": ("slo", "attainment", True),
    "quality": ("quality", "mean", True),
}
_PER_USD = ("output_tokens_per_usd", "total_tokens_per_usd", "requests_per_usd")
_USD_PER = ("usd_per_million_output_tokens", "usd_per_million_total_tokens", "usd_per_thousand_requests")
_UNITS = {"output_tokens": 1e6, "total_tokens": 1e6, "requests": 1e3}
_SECONDS_PER_HOUR = 3600.0
#: beside what is per dollar: at most in proportion to a load that rises these grow, or fall
_GROWING = ("requests_per_s", "output_tokens_per_s", "total_tokens_per_s", "goodput_requests_per_s")
_FALLING = (*_USD_PER, "joules_per_output_token")

NAMES = (
    "devices",
    *_PER_USD,
    *_USD_PER,
    *_FIGURES,
    *(f"{metric}.{statistic}" for metric in LATENCIES for statistic in STATISTICS),
)


def unknown(name: str) -> str | None:
    """The nearest names where `name` is no objective, else None."""
    return None if name in NAMES else nearest(name, NAMES)


def maximised(name: str) -> bool:
    """Whether more of it is better."""
    return name in _PER_USD or (name in _FIGURES and _FIGURES[name][2])


def improves_with_load(name: str) -> bool:
    """Whether it may get better where a deployment is offered more; if so, by no more than in proportion."""
    return name in _PER_USD or name in _GROWING or name in _FALLING


def at_best(name: str, value: float, times: float) -> float:
    """What a figure `value` could be at best under a load that is `times` as high, times >= 1."""
    if not improves_with_load(name):
        return value
    return value / times if name in _FALLING else value * times


def objective(summary: Summary, name: str) -> float | None:
    """The figure of that name; None where the summary has none, such as dollars of what has no price.

    What is served per dollar is what is served in the long run: the offered load where an open loop keeps up with it,
    since a run's own throughput has its ramp and its tail in it, but for requests that weren't served, such as rejected
    ones; else the throughput.
    """
    if name == "devices":
        return float(summary["devices"])
    if name in _PER_USD:
        return _served_per_usd(summary, name.removesuffix("_per_usd"))
    if name in _USD_PER:
        what = name.removeprefix("usd_per_million_").removeprefix("usd_per_thousand_")
        served = _served_per_usd(summary, what)
        return _UNITS[what] / served if served else None
    if name in _FIGURES:
        section, key, _ = _FIGURES[name]
        found = (summary.get(section) or {}).get(key)
    else:
        metric, _, statistic = name.partition(".")
        found = (summary.get(metric) or {}).get(statistic)
    return None if found is None else float(found)


@dataclass(frozen=True, slots=True)
class Constraint:
    """A bound on an objective: at most `bound` of what is minimised, at least that of what is maximised."""

    name: str
    bound: float

    def excess(self, summary: Summary) -> float:
        """By what share of the bound it is missed; 0 or less where it holds."""
        value = objective(summary, self.name)
        if value is None:
            return HOPELESS
        over = self.bound / value if maximised(self.name) and value > 0 else value / self.bound
        return HOPELESS if maximised(self.name) and value <= 0 else over - 1.0


def excesses(summary: Summary, constraints: tuple[Constraint, ...], *, is_prefix: bool = False) -> dict[str, float]:
    """By what share each bound is missed: the scenario's SLOs and `constraints`; and whether it keeps up at all.

    A prefix whose requests arrive for less than `ENOUGH` times what they take can't tell the latter: all of it is ramp.
    """
    found = {each.name: each.excess(summary) for each in constraints}
    for target in (summary.get("slo") or {}).get("targets", ()):
        name = ".".join(filter(None, (target.get("tenant"), target["metric"], target["statistic"])))
        unit = "slowdown" if "target_slowdown" in target else "s"
        actual, bound = target[f"actual_{unit}"], target[f"target_{unit}"]
        lost = actual is None or (target["met"] is not True and actual <= bound)
        found[f"slo.{name}"] = HOPELESS if lost else actual / bound - 1.0
    if summary.get("saturated") and not (is_prefix and _is_short(summary)):
        found["saturated"] = 1.0
    return found


def _is_short(summary: Summary) -> bool:
    span_s, e2e_s = (summary.get("offered") or {}).get("span_s"), (summary.get("e2e_s") or {}).get("mean")
    return span_s is not None and e2e_s is not None and span_s < ENOUGH * e2e_s


def excerpt(summary: Summary, devices: int) -> dict[str, Any]:
    """The part of a summary that a search keeps of every run, with the number of accelerators."""
    metrics = ("throughput", "offered", "saturated", "near_capacity", "open_loop", "duration_s", "requests", "quality",
               "slo", "provenance", *LATENCIES)  # fmt: skip
    kept: dict[str, Any] = {key: summary.get(key) for key in metrics}
    for section, keys in (("cost", ("usd_per_hour", "usd")), ("energy", ("mean_w", "joules_per_output_token"))):
        given = summary.get(section)
        kept[section] = {key: given.get(key) for key in keys} if given else None
    return {"devices": devices, **kept}


def _served_per_usd(summary: Summary, what: str) -> float | None:
    usd_per_hour = (summary.get("cost") or {}).get("usd_per_hour")
    offered, throughput = summary.get("offered") or {}, summary.get("throughput") or {}
    steady = summary.get("open_loop") and not summary.get("saturated")
    per_s = offered.get(f"{what}_per_s") if steady else None
    if per_s is None:
        per_s = throughput.get(f"{what}_per_s")
    else:
        per_s *= _served_share(summary, what)
    if not usd_per_hour or per_s is None:
        return None
    return float(per_s) * _SECONDS_PER_HOUR / float(usd_per_hour)


def _served_share(summary: Summary, what: str) -> float:
    """The share of the offered requests, or of the tokens that they ask for, of those that finished; 1 if unknown."""
    share = (summary.get("offered") or {}).get("served_share") if what == "output_tokens" else None
    if share is None:
        requests = summary.get("requests") or {}
        share = requests["finished"] / requests["arrived"] if requests.get("arrived") else 1.0
    return float(share)
