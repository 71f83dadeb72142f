"""A result as the sections of a report read it: its tables in order, who is measured, which client is in which pool.

Between `Result` and the sections. It changes no figure: what the summary says is taken from there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from mist.metrics.stages import stage_times
from mist.metrics.window import BoolColumn, Columns, Window
from mist.records import FINISHED, IntColumn, Records
from mist.scenario.result import Result
from mist.units import NS_PER_S


@dataclass(frozen=True)
class View:
    """What sections need of one result."""

    result: Result

    @cached_property
    def summary(self) -> dict[str, Any]:
        return self.result.summary()

    @property
    def records(self) -> Records:
        return self.result.records

    @property
    def scenario(self) -> Mapping[str, Any]:
        return self.result.scenario

    @cached_property
    def requests(self) -> Columns:
        return _ordered(self.records.requests.as_columns())

    @cached_property
    def tasks(self) -> Columns:
        return _ordered(self.records.tasks.as_columns())

    @cached_property
    def steps(self) -> Columns:
        return self.records.steps.as_columns()

    @cached_property
    def transfers(self) -> Columns:
        return self.records.transfers.as_columns()

    @cached_property
    def window(self) -> Window:
        """The measured part, as the summary has it."""
        whole = Window.of(self.records)
        start, end = (round(self.summary["window"][key] * NS_PER_S) for key in ("start_s", "end_s"))
        if (start, end) == (whole.first_ns, whole.last_ns):
            return whole
        return Window.of(self.records, (start, None if end >= whole.last_ns else end))

    @cached_property
    def span(self) -> Window:
        """The whole run, which charts over time show."""
        return Window.of(self.records)

    @cached_property
    def measured(self) -> BoolColumn:
        """Which requests count."""
        return self.window.holds(self.requests["arrival_ns"])

    @cached_property
    def finished(self) -> Columns:
        """Those of them that finished."""
        chosen = self.measured & (self.requests["status"] == FINISHED)
        return {name: column[chosen] for name, column in self.requests.items()}

    @cached_property
    def stage_ns(self) -> IntColumn:
        """Where the time of the finished went, int64[finished, kinds, 3]; each row adds up to its E2E."""
        return stage_times(self.finished, self.tasks, len(self.kinds), self.transfers)

    @property
    def kinds(self) -> list[str]:
        return self.records.stage_kinds

    @cached_property
    def pools(self) -> dict[str, list[int]]:
        """The clients of each pool, by their numbers."""
        pool_of = {
            replica["name"]: pool for pool, each in self.summary["clients"].items() for replica in each["replicas"]
        }
        found: dict[str, list[int]] = {pool: [] for pool in self.summary["clients"]}
        for number, name in enumerate(self.records.client_names):
            found[pool_of.get(name) or pool_of[name.rpartition(".")[0]]].append(number)
        return found

    @cached_property
    def pool_of(self) -> IntColumn:
        """The number of each client's pool."""
        found = np.full(len(self.records.client_names), -1, np.int64)
        for number, clients in enumerate(self.pools.values()):
            found[clients] = number
        return found

    @cached_property
    def kv_blocks(self) -> IntColumn:
        """Blocks of each client's KV cache, 0 where it has none."""
        found: IntColumn = np.zeros(len(self.records.client_names), np.int64)
        for pool, clients in self.pools.items():
            block_size = self.settings(pool).get("kv_cache", {}).get("block_size", 1)
            tokens = sum(replica["kv_tokens_capacity"] for replica in self.summary["clients"][pool]["replicas"])
            found[clients] = tokens // block_size // max(1, len(clients))
        return found

    def settings(self, pool: str) -> Mapping[str, Any]:
        """What the scenario says of a pool."""
        found: Mapping[str, Any] = self.scenario.get("clients", {}).get(pool, {})
        return found

    def limits(self, pool: str) -> Mapping[str, Any]:
        """The parameters of a pool's batching policy."""
        batching = self.settings(pool).get("batching", {})
        found: Any = next(iter(batching.values()), {}) if isinstance(batching, Mapping) else {}
        return found if isinstance(found, Mapping) else {}

    @cached_property
    def tenants(self) -> dict[str, tuple[int, int]]:
        """The numbers of each tenant's requests, from the first up to before the last; empty without tenants."""
        firsts = [*(first for _, first in self.records.tenants), 2**62]
        return {name: (firsts[i], firsts[i + 1]) for i, (name, _) in enumerate(self.records.tenants)}

    def tenant_of(self, request: int) -> str:
        """Its tenant's name, "" without tenants."""
        return next((name for name, (first, stop) in self.tenants.items() if first <= request < stop), "")


def _ordered(columns: Columns) -> Columns:
    """Rows by request, those of one in the order of recording."""
    order = np.argsort(columns["request"], kind="stable")
    return {name: column[order] for name, column in columns.items()}
