"""Tenants of a scenario as values: a workload each with its pipeline, priority and SLO, and the clients it may use.

Between the sections that a user writes and the run. A scenario with a single workload is one tenant without a name. It
draws no request.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mist.scenario.named import Spec
from mist.scenario.schema import ScenarioFile, Slo, Workload
from mist.scenario.source import KeyPath

#: the name of the only tenant of a scenario that names none
SOLE = ""


@dataclass(frozen=True, slots=True)
class Tenancy:
    """One tenant, complete. `clients` are names, None for all; `stages` the kinds that its pipeline may yield.

    `delays` are those of them that no client serves.
    """

    name: str
    workload: Workload
    pipeline: Spec
    slo: Slo
    stages: tuple[str, ...]
    delays: tuple[str, ...] = ()
    clients: tuple[str, ...] | None = None
    priority: int = 0
    admission: tuple[Spec, ...] = ()

    @property
    def place(self) -> KeyPath:
        """Where its sections are written."""
        return ("tenants", self.name) if self.name else ()

    def purpose(self, purpose: str) -> str:
        """A purpose of its own in the seed tree: what it draws doesn't depend on who else is there."""
        return f"tenants.{self.name}.{purpose}" if self.name else purpose


def tenancies(file: ScenarioFile) -> Mapping[str, Tenancy]:
    """The tenants of a scenario by name; its pipeline and SLO are those of all that have none of their own."""
    if file.workload is not None:
        kinds, admission = _kinds(file.pipeline), tuple(file.admission)
        return {SOLE: Tenancy(SOLE, file.workload, file.pipeline, file.slo, *kinds, admission=admission)}
    found = {}
    for name, given in file.tenants.items():
        pipeline, slo = given.pipeline or file.pipeline, file.slo if given.slo is None else given.slo
        clients = None if given.clients is None else tuple(given.clients)
        admission = tuple(file.admission if given.admission is None else given.admission)
        kinds = _kinds(pipeline)
        found[name] = Tenancy(name, given.workload, pipeline, slo, *kinds, clients, given.priority, admission)
    return found


def _kinds(pipeline: Spec) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The stage kinds that a pipeline may yield, and those of them that are delays."""
    built = pipeline.build()
    return tuple(dict.fromkeys(built.kinds)), tuple(getattr(built, "delays", ()))
