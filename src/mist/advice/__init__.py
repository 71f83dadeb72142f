"""What to change about a deployment, and why: the largest reasons for its latency and its cost, with what-ifs run.

On top of a run: `advise` reads the records of a result, ranks reasons by the share that they explain, and runs the
scenario again with changes against each. It never changes a scenario, and tells nothing that it hasn't counted or run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mist.advice.changes import changes
from mist.advice.evidence import Evidence
from mist.advice.facts import facts
from mist.advice.latency import METRICS, Account, account, fractions
from mist.advice.reasons import COST_FIGURES, HEALTHY, INTERFERENCE, NONE, QUEUEING, Change, Reason, WhatIf
from mist.advice.spending import spending
from mist.advice.trials import Figures, Trials, figures_of
from mist.metrics import SCHEMA_VERSION
from mist.scenario import Scenario
from mist.scenario.build import run
from mist.scenario.result import Result

__all__ = ["HEALTHY", "Advice", "Change", "Reason", "WhatIf", "advise"]

#: reasons that are told of latency, and of cost
MOST_REASONS = 3
#: what explains less than this is not told
LEAST_SHARE = 0.02


@dataclass(frozen=True)
class Advice:
    """The reasons, largest first, and the figures that they are of.

    `figures`: those of the scenario as it is, P99s in seconds and USD per million tokens; `requests`: how many were
    looked at for each latency; `saturation`: why more arrives than is served, None where it doesn't.
    """

    name: str
    figures: Figures
    latency: Sequence[Reason]
    cost: Sequence[Reason]
    requests: dict[str, int]
    remarks: Sequence[str]
    saturation: str | None = None

    @property
    def bottleneck(self) -> str:
        """The code of the first reason for latency that explains more than `HEALTHY`; "none" where none does."""
        first = next(iter(self.latency), None)
        return first.code if first is not None and first.share > HEALTHY else NONE

    def as_json(self) -> dict[str, Any]:
        """The whole as a JSON document."""
        return {
            "schema_version": SCHEMA_VERSION,
            "name": self.name,
            "saturation_reason": self.saturation,
            "bottleneck": self.bottleneck,
            "healthy_share": HEALTHY,
            "figures": self.figures,
            "requests": self.requests,
            "latency": [reason.as_json() for reason in self.latency],
            "cost": [reason.as_json() for reason in self.cost],
            "remarks": list(self.remarks),
        }


def advise(
    scenario: Scenario,
    *,
    what_ifs: int = 2,
    metrics: Sequence[str] = (),
    result: Result | None = None,
    progress: Callable[[int], None] | None = None,
) -> Advice:
    """The largest reasons for latency and for cost of `scenario`, each with up to `what_ifs` changes that were run.

    `metrics`: of which P99s reasons are sought, such as ["e2e_s"]; left out, TTFT and TPOT, and those with a target.
    `result`: the scenario's own, where there is one. `progress` is called with the number of runs so far. Raises
    ScenarioError where the scenario can't be run, and ValueError for an unknown metric.
    """
    if unknown := sorted(set(metrics) - set(METRICS)):
        raise ValueError(f"no latency {unknown[0]!r}; known: {', '.join(METRICS)}")
    tell = progress or (lambda number: None)
    if result is None:
        result = run(scenario)
        tell(1)
    evidence, figures = Evidence(scenario, result), figures_of(result.metrics)
    accounts = [found for metric in metrics or _asked(result) if (found := account(evidence, metric)) is not None]
    latency, cost = _of_latency(evidence, accounts, figures), _of_cost(evidence, figures)
    trials = Trials(scenario, figures, tell)
    return Advice(
        scenario.name,
        figures,
        [trials.with_what_ifs(reason, changes(evidence, reason), what_ifs) for reason in latency],
        [trials.with_what_ifs(reason, changes(evidence, reason), what_ifs) for reason in cost],
        {each.metric: each.num_requests for each in accounts},
        _remarks(result),
        result.metrics["saturation_reason"],
    )


def _asked(result: Result) -> list[str]:
    """The latencies that reasons are sought for: TTFT and TPOT, those with a target, or E2E where there are neither."""
    targets = {each["metric"] for each in (result.metrics["slo"] or {"targets": ()})["targets"]}
    found = [
        name for name in METRICS if (name != "e2e_s" or name in targets) and result.metrics[name].get("p99") is not None
    ]
    return found or ["e2e_s"]


def _of_latency(evidence: Evidence, accounts: Sequence[Account], figures: Figures) -> list[Reason]:
    """Each reason once, of the latency that it explains the largest share of, the largest first."""
    largest: dict[tuple[str, str], tuple[float, Account]] = {}
    for each in accounts:
        for cause, share in fractions(each).items():
            if share > largest.get(cause, (LEAST_SHARE, each))[0]:
                largest[cause] = (share, each)
    reasons = [
        Reason(code, at, found.metric, share, share * (figures[found.metric] or 0.0), facts(evidence, code, at, found))
        for (code, at), (share, found) in largest.items()
    ]
    return sorted(reasons, key=lambda reason: (-_weight(reason, reasons), -reason.share))[:MOST_REASONS]


def _weight(reason: Reason, reasons: Sequence[Reason]) -> float:
    """The share that a reason is ranked by.

    Prompts beside decodes come behind the queueing for the token budget that they fill, where that is above `HEALTHY`:
    more prompts than there is time for cause both.
    """
    if reason.code != INTERFERENCE:
        return reason.share
    queues = [each.share for each in reasons if each.code == QUEUEING and each.at == reason.at and _is_full(each)]
    return min([reason.share, *(share * (1 - 1e-9) for share in queues)])


def _is_full(reason: Reason) -> bool:
    return reason.share > HEALTHY and reason.facts["bound"] == "tokens"


def _of_cost(evidence: Evidence, figures: Figures) -> list[Reason]:
    figure = next((name for name in COST_FIGURES if figures[name] is not None), None)
    if figure is None:
        return []
    ranked = [(cause, share) for cause, share in spending(evidence).items() if share > LEAST_SHARE]
    return [
        Reason(code, at, figure, share, share * (figures[figure] or 0.0), facts(evidence, code, at))
        for (code, at), share in ranked[:MOST_REASONS]
    ]


def _remarks(result: Result) -> list[str]:
    """What one must know to read the reasons: requests that aren't in them, no price."""
    counts, found = result.metrics["requests"], []
    if not counts["finished"]:
        found.append("No request finished, so there is no latency to explain; `mist run` says why.")
    elif counts["finished"] < counts["arrived"]:
        found.append(f"The reasons are of the {counts['finished']:,} of {counts['arrived']:,} requests that finished.")
    return found + [str(remark) for remark in result.metrics["cost"]["remarks"]]
