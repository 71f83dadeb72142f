"""Look-ups in the index of a KV store: a constant time each, one after another.

The performance model of clients that are KV stores, which have no parameter else. What is found is moved by the
network, and none of its time is here.
"""

from __future__ import annotations

from dataclasses import dataclass

from mist.perf import Demand, HostDeployment, OperatorTime
from mist.request import Step


@dataclass(slots=True)
class Lookup:
    """`lookup_ns` of one prompt; the prompts of a step come one after another. It asks nothing of the host."""

    lookup_ns: int

    @property
    def kinds(self) -> tuple[str, ...] | None:
        """Any stage."""
        return None

    def supports(self, deployment: HostDeployment) -> str | None:
        """It supports anything."""
        return None

    def prepare(self, deployment: HostDeployment) -> None:
        """There is nothing to prepare."""

    def memory_bytes(self) -> int:
        """The index is small beside what it points to."""
        return 0

    def step_time(self, step: Step) -> int:
        """All look-ups of the step, ns."""
        return len(step.chunks) * self.lookup_ns

    def floor_time(self, step: Step) -> int:
        """Nothing is known to take time."""
        return 0

    def demand(self, step: Step) -> Demand:
        """Nothing that others could miss."""
        return Demand()

    def explain(self, step: Step) -> list[OperatorTime]:
        """One part, which is the whole."""
        return [OperatorTime("lookup", len(step.chunks), 0, 0, self.step_time(step), "compute", "extrapolated", 0)]

    def provenance(self) -> dict[str, float]:
        """The user's figure."""
        return {"extrapolated": 1.0}
