"""The tenants of a run, built from a scenario: their requests, pipelines and routes, and what summaries say of each.

Beside the fleet, whose clients they use. Tenants with the same choice of clients for a stage have one router for it
together. It decides nothing that the scenario doesn't say, and runs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial

from mist.metrics import TenantInfo
from mist.metrics.distribution import FloatColumn
from mist.records import Records
from mist.request import DECODE, NO_DEADLINE, PREFILL
from mist.scenario.disturbances import patience
from mist.scenario.fleet import Fleet
from mist.scenario.named import Spec
from mist.scenario.seeds import random_of, seed_of
from mist.scenario.tenancy import SOLE, Tenancy
from mist.scenario.value import Scenario
from mist.tenant import Route, Tenant
from mist.units import seconds_to_ns
from mist.workload import RequestTable


def build_tenants(
    scenario: Scenario, tables: Mapping[str, RequestTable], fleet: Fleet, records: Records
) -> dict[str, Tenant]:
    """The tenants in the order of the scenario, their requests numbered one tenant after another."""
    tenants: dict[str, Tenant] = {}
    routes: dict[tuple[str, ...], Route] = {}
    first_request = first_session = 0
    for name, table in tables.items():
        section = scenario.tenants[name]
        tenants[name] = Tenant(
            table,
            section.pipeline.build(),
            {
                stage: _route(scenario, fleet, name, stage, routes)
                for stage in section.stages
                if stage not in section.delays
            },
            partial(random_of, scenario.seed, section.purpose("pipeline")),
            priority=section.priority,
            deadline_after_ns=_deadline_ns(section),
            admission=[spec.build() for spec in section.admission],
            patience=patience(scenario, section, len(table)),
            index=len(tenants),
            first_request=first_request,
            first_session=first_session,
        )
        if name != SOLE:
            records.tenants.append((name, first_request))
        first_request += len(table)
        first_session += 0 if table.sessions is None else int(table.sessions.max(initial=-1)) + 1
    return tenants


def _route(scenario: Scenario, fleet: Fleet, tenant: str, stage: str, routes: dict[tuple[str, ...], Route]) -> Route:
    pools = scenario.clients_of(tenant, stage)
    if (stage, *pools) not in routes:
        lent = {name for name, pool in scenario.pools.items() if stage == PREFILL and pool.lending is not None}
        chosen = pools.keys() - lent
        clients = [client for client, info in zip(fleet.clients, fleet.infos, strict=True) if info.pool in chosen]
        routes[stage, *pools] = Route(clients, _seeded(scenario, stage, pools).build())
    return routes[stage, *pools]


def _seeded(scenario: Scenario, stage: str, pools: Iterable[str]) -> Spec:
    """The policy of a stage; one that draws has a seed of its own in the tree, unless it is given one."""
    spec = scenario.routing[stage]
    if spec.params.get("seed", 0) is not None:
        return spec
    own = seed_of(scenario.seed, ".".join(("routing", stage, *pools)))
    return replace(spec, params={**spec.params, "seed": int(own.generate_state(1)[0])})


def tenant_infos(
    scenario: Scenario, tenants: Mapping[str, Tenant], alone: Mapping[str, Mapping[str, FloatColumn]]
) -> dict[str, TenantInfo]:
    """What summaries say of each tenant; `alone` are the times of the requests of some by themselves."""
    found = {}
    for name, tenant in tenants.items():
        section, table = scenario.tenants[name], tenant.workload
        found[name] = TenantInfo(
            name,
            tenant.first_request,
            len(table),
            section.stages,
            section.priority,
            _is_open_loop(section) and table.after is None,
            {metric: targets for metric, targets in section.slo.model_dump().items() if targets},
            table.output_tokens if DECODE in section.stages else None,
            getattr(tenant.pipeline, "quality", None),
            alone.get(name, {}),
        )
    return found


def table_notes(tables: Mapping[str, RequestTable]) -> list[str]:
    """What the reader of a result should know of the workloads, each with its tenant."""
    return [f"{name}: {note}" if name else note for name, table in tables.items() for note in table.notes]


def _deadline_ns(section: Tenancy) -> int:
    """From arrival: the strictest target of TTFT, or of E2E where there is none."""
    targets = [*section.slo.ttft_s.values()] or [*section.slo.e2e_s.values()]
    return seconds_to_ns(min(targets)) if targets else NO_DEADLINE


def _is_open_loop(section: Tenancy) -> bool:
    """Whether arrivals have times of their own, which the system's answers don't change."""
    process = section.workload.arrival_process
    return process is None or process.name not in ("closed_loop", "all_at_once")
