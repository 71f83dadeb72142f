"""Interference: what each tenant's requests lose to the others, with all of them on the clients against each alone.

Runs a scenario once for all tenants and once for each; the requests are the same every time, so that they are compared
one by one. It changes nothing in the scenario.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mist.errors import ScenarioError
from mist.metrics.distribution import distribution
from mist.metrics.tenants import jain
from mist.records import FINISHED, IntColumn
from mist.scenario.build import run
from mist.scenario.result import Result
from mist.scenario.tenancy import SOLE
from mist.scenario.value import Scenario
from mist.units import NS_PER_S

#: figures that are told with and without the others, by metric
STATISTICS = ("mean", "p50", "p99")
METRICS = ("ttft_s", "tpot_s", "e2e_s")


@dataclass(frozen=True, eq=False)
class Interference:
    """The results of a scenario's tenants `together`, and of each `alone` on the same clients."""

    together: Result
    alone: Mapping[str, Result]

    def as_json(self) -> dict[str, Any]:
        """Per tenant its latencies alone and together (s) and the slowdown of its requests; and how even that is.

        A request's slowdown is its E2E together over its E2E alone, of those that finished in both runs. `jain_speed`
        is Jain's index of the tenants' mean E2E alone over together, their normalised progress.
        """
        tenants = {name: self._tenant(name) for name in self.alone}
        speeds = [tenant["speed"] for tenant in tenants.values()]
        return {"name": self.together.name, "tenants": tenants, "jain_speed": jain(speeds)}

    def rows(self) -> Iterator[dict[str, Any]]:
        """A row per tenant and metric, in milliseconds, as text."""
        for name, tenant in self.as_json()["tenants"].items():
            for metric in METRICS:
                row: dict[str, Any] = {"tenant": name, "metric": metric[:-2].upper()}
                for statistic in STATISTICS:
                    for run_of in ("alone", "together"):
                        seconds = tenant[run_of][metric][statistic]
                        row[f"{statistic} {run_of}"] = "-" if seconds is None else f"{seconds * 1e3:,.1f}"
                    row[f"{statistic} x"] = _ratio(*(tenant[r][metric][statistic] for r in ("together", "alone")))
                yield row

    def _tenant(self, name: str) -> dict[str, Any]:
        figures = {"alone": self.alone[name], "together": self.together}
        of_runs = {key: result.metrics["tenants"][name] for key, result in figures.items()}
        alone, together = (_e2e_ns(result) for result in figures.values())
        both = [(alone[i], together[i]) for i in sorted(alone.keys() & together.keys())]
        pairs = np.array(both, np.float64).reshape(-1, 2)
        slowdowns = distribution(pairs[:, 1] / pairs[:, 0] * NS_PER_S)  # a factor of 1 is a second
        return {
            **{
                key: {
                    "requests": each["requests"],
                    **{metric: {s: each[metric][s] for s in STATISTICS} for metric in METRICS},
                    "throughput": each["throughput"],
                    "slo": each["slo"],
                }
                for key, each in of_runs.items()
            },
            "num_compared": len(pairs),
            "slowdown": slowdowns if len(pairs) else None,
            "speed": float(pairs[:, 0].mean() / pairs[:, 1].mean()) if len(pairs) else None,
        }


def interference(
    scenario: Scenario, *, check: bool = False, progress: Callable[[int, int], None] | None = None
) -> Interference:
    """Run `scenario` with all its tenants, and once more with each alone; `progress` counts runs.

    Raises ScenarioError where it names no tenants.
    """
    if SOLE in scenario.tenants:
        raise ScenarioError(scenario.problem(("workload",), "there are no tenants to compare", "see `tenants`"))
    num_runs = 1 + len(scenario.tenants)
    together = run(scenario, check=check)
    alone: dict[str, Result] = {}
    for name in scenario.tenants:
        if progress is not None:
            progress(1 + len(alone), num_runs)
        alone[name] = run(scenario, check=check, only=name)
    return Interference(together, alone)


def _e2e_ns(result: Result) -> dict[int, int]:
    """By request number, of those that finished."""
    rows: dict[str, IntColumn] = result.records.requests.as_columns()
    done = (rows["status"] == FINISHED) & (rows["end_ns"] > rows["arrival_ns"])
    times = (rows["end_ns"] - rows["arrival_ns"])[done]
    return dict(zip(rows["request"][done].tolist(), times.tolist(), strict=True))


def _ratio(together: float | None, alone: float | None) -> str:
    return "-" if not together or not alone else f"{together / alone:.2f}"
