"""Tenants of one run: whose requests are whose, how evenly they were served, and all their service levels together.

Beside the figures of each tenant, which are those of any run over its own requests. Fairness is Jain's index. It never
judges who should have had more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mist.metrics.distribution import FloatColumn
from mist.metrics.slo import Targets
from mist.metrics.window import BoolColumn, Columns
from mist.records import IntColumn


@dataclass(frozen=True, slots=True)
class TenantInfo:
    """What a summary needs to know of a tenant: its requests are `num_requests` from `first_request` on.

    `stages`: the kinds that they may go through. `alone` (float64[num_requests] in ns, by metric): what each request
    takes by itself, -1 where it has none; for slowdowns. The other fields are those of `mist.metrics.summarise`, for
    these requests.
    """

    name: str = ""
    first_request: int = 0
    num_requests: int = 0
    stages: tuple[str, ...] = ()
    priority: int = 0
    open_loop: bool = True
    slo: Targets = field(default_factory=dict)
    oracle_output_tokens: IntColumn | None = None
    quality: Mapping[str, float] | None = None
    alone: Mapping[str, FloatColumn] = field(default_factory=dict)

    def holds(self, requests: IntColumn) -> BoolColumn:
        """Which of the request numbers are its own."""
        place = requests - self.first_request
        return (place >= 0) & (place < self.num_requests)

    def rows(self, table: Columns) -> dict[str, IntColumn]:
        """The rows of `table`, which has a column `request`, that are its own."""
        return rows_of([self], table)


def rows_of(tenants: Sequence[TenantInfo], table: Columns) -> dict[str, IntColumn]:
    """The rows of `table`, which has a column `request`, that are any of these tenants'."""
    mine = np.logical_or.reduce([tenant.holds(table["request"]) for tenant in tenants])
    return {name: column[mine] for name, column in table.items()}


def jain(values: Sequence[float | None]) -> float | None:
    """Jain's fairness index (sum x)^2 / (n sum x^2): 1 where all have the same, 1/n where one has all; None for none.

    Source: Jain, Chiu, Hawe, "A Quantitative Measure of Fairness and Discrimination for Resource Allocation in Shared
    Computer Systems", DEC-TR-301, 1984.
    """
    known = np.array([value for value in values if value is not None], np.float64)
    squares = float((known**2).sum())
    return float(known.sum()) ** 2 / (len(known) * squares) if squares else None


def fairness(tenants: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """Jain's index over tenants: of their tokens per second, of the shares of what they asked for that they got, and of
    the shares of their requests that met all SLOs, where several have any."""
    served = [_share_served(figures) for figures in tenants.values()]
    attained = [figures["slo"]["attainment"] for figures in tenants.values() if figures["slo"] is not None]
    return {
        "total_tokens_per_s": jain([figures["throughput"]["total_tokens_per_s"] for figures in tenants.values()]),
        "served_share": jain(served),
        "slo_attainment": jain(attained) if len(attained) > 1 else None,
    }


def all_levels(tenants: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """The verdicts of all tenants as one, each with its `tenant`; None where none has any. Goodput is their sum."""
    levels = {name: figures["slo"] for name, figures in tenants.items() if figures["slo"] is not None}
    if not levels:
        return None
    verdicts = [level["met"] for level in levels.values()]
    wanted = {name: _num_wanted(tenants[name]) for name in levels}
    attained = sum((level["attainment"] or 0.0) * wanted[name] for name, level in levels.items())
    goodputs = [level["goodput_requests_per_s"] for level in levels.values()]
    return {
        "met": False if False in verdicts else None if None in verdicts else True,
        "targets": [{"tenant": name, **target} for name, level in levels.items() for target in level["targets"]],
        "goodput_requests_per_s": None if None in goodputs else sum(goodputs),
        "attainment": attained / sum(wanted.values()) if any(wanted.values()) else None,
    }


def _share_served(figures: Mapping[str, Any]) -> float | None:
    arrived = figures["requests"]["arrived"]
    return figures["requests"]["finished"] / arrived if arrived else None


def _num_wanted(figures: Mapping[str, Any]) -> int:
    """Requests that SLOs are asked of: all that weren't turned away by their own pipeline."""
    requests = figures["requests"]
    return int(requests["arrived"] - requests["refused"])
