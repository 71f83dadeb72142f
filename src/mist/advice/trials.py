"""Changes, tried: the scenario run again with each, by the same seed, and what became of its figures.

Between a reason and the what-ifs that are told with it. A change that gives no valid scenario, or one that can't run,
is passed over for the next.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mist.advice.reasons import COST_FIGURES, Change, Reason, WhatIf
from mist.errors import ScenarioError
from mist.scenario import Scenario, load
from mist.scenario.build import run

#: a figure that falls by less is told not to be helped
LEAST_GAIN = 0.01

Figures = dict[str, float | None]


def figures_of(summary: Mapping[str, Any]) -> Figures:
    """The figures that advice is about: P99s in seconds, dollars per million tokens, and what was served."""
    cost = summary["cost"]
    return {
        **{metric: summary[metric].get("p99") for metric in ("ttft_s", "tpot_s", "e2e_s")},
        **{figure: cost[figure] for figure in COST_FIGURES},
        "output_tokens_per_s": summary["throughput"]["output_tokens_per_s"],
        "slo_attainment": summary["slo"]["attainment"] if summary["slo"] else None,
        "slo_met": summary["slo"]["met"] if summary["slo"] else None,  # True is 1
    }


@dataclass
class Trials:
    """What-ifs of `scenario`, whose own figures are `before`; each change is run once, whoever asks for it.

    `tried` is called after each run with the number of runs so far, the scenario's own included.
    """

    scenario: Scenario
    before: Figures
    tried: Callable[[int], None] = lambda number: None
    _known: dict[str, Figures | None] = field(default_factory=dict)

    def with_what_ifs(self, reason: Reason, changes: Iterable[Change], most: int) -> Reason:
        """`reason` with the first `most` of the changes that can be run."""
        found: list[WhatIf] = []
        for change in changes:
            if len(found) == most:
                break
            figures = self._figures(change)
            if figures is not None:
                found.append(WhatIf(change, figures, _falls(self.before[reason.figure], figures[reason.figure])))
        return replace(reason, what_ifs=found)

    def _figures(self, change: Change) -> Figures | None:
        key = json.dumps(dict(change.overrides), sort_keys=True)
        if key not in self._known:
            try:
                self._known[key] = figures_of(run(load(self.scenario, **change.overrides)).metrics)
            except ScenarioError:
                self._known[key] = None
            self.tried(1 + len(self._known))
        return self._known[key]


def _falls(before: float | None, after: float | None) -> bool:
    return before is not None and after is not None and after < before * (1 - LEAST_GAIN)
