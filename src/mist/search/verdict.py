"""What one run says of a capacity: a `Trial`, which holds or fails, and why.

Between the runs and the bisection. A run holds where every target of its SLO is met and it keeps up with its load. It
never looks at another run but to say whether the two are alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mist.metrics.slo import SLOWDOWNS
from mist.metrics.words import counted
from mist.search.evaluate import Summary
from mist.search.pace import Pace

#: what is told of a run beside its verdict, and where a summary has it
FIGURES = {
    "throughput_requests_per_s": ("throughput", "requests_per_s"),
    "output_tokens_per_s": ("throughput", "output_tokens_per_s"),
    "ttft_p99_s": ("ttft_s", "p99"),
    "tpot_p99_s": ("tpot_s", "p99"),
    "usd_per_hour": ("cost", "usd_per_hour"),
    "usd_per_million_output_tokens": ("cost", "usd_per_million_output_tokens"),
}


@dataclass(frozen=True, slots=True)
class Trial:
    """One run at one value: whether it `holds`, and else why not (`because`); its targets with what came of them.

    `pace` is None where the load waits for the system; `is_behind`: it only fails for not having kept it. `figures` are
    those of the run that a reader looks at first. `ran`: whether the scenario can be run so at all.
    """

    seed: int
    value: float
    requests_per_s: float | None
    holds: bool
    because: str
    targets: tuple[Mapping[str, Any], ...]
    figures: Mapping[str, float | None] = field(default_factory=dict)
    pace: Pace | None = None
    is_behind: bool = False
    ran: bool = True

    def is_like(self, other: Trial) -> bool:
        """Whether all targets came out the same, to 1 %."""
        pairs = zip(_actual(self), _actual(other), strict=True)
        return len(self.targets) > 0 and all(a == b or (a and b and abs(a / b - 1) < 0.01) for a, b in pairs)

    @property
    def num_enough(self) -> int:
        """Requests that would have to arrive for this verdict to be more than a beginning; 0 where these are enough."""
        told = self.pace is not None and self.pace.is_short and (self.holds or self.is_behind)
        return self.pace.num_enough if told and self.pace else 0


def trial_of(seed: int, value: float, summary: Summary) -> Trial:
    """The verdict on the run of a seed at a value."""
    targets = tuple(summary["slo"]["targets"])
    missed = "; ".join(_missed(target) for target in targets if target["met"] is not True)
    pace: Pace | None = summary.get("pace")
    is_behind = not (missed or summary["saturated"] or pace is None or pace.is_kept)
    because = _overload(summary, pace) or missed
    rate = summary["offered"]["requests_per_s"] if summary["offered"] else None
    return Trial(seed, value, rate, not because, because, targets, _figures(summary), pace, is_behind)


def _overload(summary: Summary, pace: Pace | None) -> str:
    """Why more arrives than is served, whatever the targets say; empty where it doesn't."""
    if summary["saturated"]:
        return f"saturated, {summary['saturation_reason']}"
    if summary.get("near_capacity") and (backlog := summary["backlog"]):
        grown = f"from about {backlog['waiting_first']:,.0f} to {backlog['waiting_last']:,.0f} waiting"
        return f"near capacity, the queue of {backlog['pool']} grew {grown}"
    if pace is not None and not pace.is_kept:
        return (
            f"behind its load, {pace.ended:,} requests ended while {pace.arrived:,} arrived (second half of arrivals)"
        )
    return ""


def _figures(summary: Summary) -> dict[str, float | None]:
    """What a run served, how fast and at what cost; None each for what it has no figure of."""
    return {name: (summary.get(section) or {}).get(key) for name, (section, key) in FIGURES.items()}


def _missed(target: Mapping[str, Any]) -> str:
    unit = "slowdown" if target["metric"] in SLOWDOWNS else "s"
    name = f"{target['metric'].removesuffix('_s').upper().replace('_SLOWDOWN', ' slowdown')} {target['statistic']}"
    name = f"{target['tenant']}: {name}" if "tenant" in target else name
    actual = target[f"actual_{unit}"]
    if target["met"] is None:
        return f"no request has a {name}"
    sign = "x" if unit == "slowdown" else "s"
    wanted = f"{target[f'target_{unit}']:.4g} {sign}"
    if not target["num_lost"]:
        return f"{name} is {actual:.4g} {sign}, not {wanted}"
    others = f"no other request has a {name}" if actual is None else f"{name} of the others is {actual:.4g} {sign}"
    return f"{counted(target['num_lost'], 'request')} lost, which count as late: {others}, target {wanted}"


def _actual(trial: Trial) -> list[Any]:
    return [target.get(key) for target in trial.targets for key in ("actual_s", "actual_slowdown", "num_lost")]
