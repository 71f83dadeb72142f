"""What doesn't go together between the sections of a scenario, each at its place in the user's file.

Called once a scenario is complete; what a section can tell by itself is refused there. It builds nothing and changes
nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from mist.errors import Problem, nearest
from mist.memory.tier import BACK
from mist.request import DECODE, PREFILL
from mist.scenario import catalogue
from mist.scenario.clients import Pool
from mist.scenario.hand_over import hand_over_conflicts, lending_conflicts
from mist.scenario.memory import misfits
from mist.scenario.memory_groups import forks
from mist.scenario.named import Located
from mist.scenario.network import numbered
from mist.scenario.prices import price_conflicts
from mist.scenario.scaling import without_deadlines
from mist.scenario.unserved import is_static

if TYPE_CHECKING:
    from mist.scenario.schema import ScenarioFile
    from mist.scenario.tenancy import Tenancy
    from mist.scenario.value import Scenario


def conflicts(scenario: Scenario, file: ScenarioFile) -> Iterator[Located]:
    """What doesn't go together between sections."""
    for tenant in scenario.tenants.values():
        yield from _unserved(scenario, tenant)
        yield from _inadmissible(tenant, file)
    delays = {stage for tenant in scenario.tenants.values() for stage in tenant.delays}
    for stage in file.routing:
        if stage in delays:
            yield ("routing", stage), _is_a_delay(stage)
        elif stage and stage not in scenario.stages:
            message = f"no pipeline has a stage {stage!r}" if file.tenants else f"the pipeline has no stage {stage!r}"
            yield ("routing", stage), Problem(message, hint=nearest(stage, scenario.stages))
    for name, serves in ((name, client.serves) for name, client in scenario.clients.items()):
        yield from _unknown_stages(scenario, name, serves)
    for name, client in scenario.pools.items():
        yield from _client_conflicts(scenario, name, client)
        for at, found in misfits(client.kv_cache.tiers, scenario.memories):
            yield ("clients", name, "kv_cache", "tiers", *at), found
    yield from _events_of_nobody(scenario)
    yield from without_deadlines(scenario)
    yield from lending_conflicts(scenario)
    yield from hand_over_conflicts(scenario)
    yield from _memory_conflicts(scenario)
    yield from _same_names(scenario)
    yield from price_conflicts(scenario)
    if scenario.window_s is not None and scenario.warmup_s > scenario.window_s[0]:
        message = f"the warm-up of {scenario.warmup_s:g} s ends after the window begins"
        yield ("window_s",), Problem(message, hint="let the window begin later, or leave warmup_s out")


def _unserved(scenario: Scenario, tenant: Tenancy) -> Iterator[Located]:
    """Stages of a tenant that none of its clients serves."""
    unknown = [name for name in tenant.clients or () if name not in scenario.clients]
    for name in unknown:
        place = (*tenant.place, "clients", (tenant.clients or ()).index(name))
        yield place, Problem(f"there is no client {name!r}", hint=nearest(name, scenario.clients))
    served = {stage for client in scenario.clients_of(tenant.name).values() for stage in client.serves}
    for stage in tenant.stages if not unknown else ():
        if stage not in served and stage not in tenant.delays:
            whose = "none of its clients" if tenant.clients else "no client"
            hint = f"add it to `serves` of a client; they serve {', '.join(sorted(served))}"
            yield (*tenant.place, "pipeline"), Problem(f"{whose} serves the stage {stage!r}", hint=hint)
    if DECODE in tenant.stages and PREFILL not in tenant.stages:
        yield (*tenant.place, "pipeline"), Problem("decode needs a prefill before it", hint="such as [prefill, decode]")


def _inadmissible(tenant: Tenancy, file: ScenarioFile) -> Iterator[Located]:
    """Admission policies that look at the clients of a stage that the tenant hasn't."""
    given = file.tenants[tenant.name].admission if tenant.name else file.admission
    place = ("admission",) if given is None else (*tenant.place, "admission")
    for spec in tenant.admission:
        for stage in getattr(spec.build(), "stages", ()):
            if stage not in tenant.stages:
                message = f"{spec.name} looks at the clients of {stage!r}, and the pipeline has no such stage"
                yield place, Problem(message, hint=nearest(stage, tenant.stages))


def _events_of_nobody(scenario: Scenario) -> Iterator[Located]:
    """Clients of events that there aren't."""
    for index, event in enumerate(scenario.events):
        for key in ("client_down", "client_up"):
            name = getattr(event, key)
            if name is not None and not scenario.replicas_called(name):
                known = [
                    *scenario.clients,
                    *(r for n, each in scenario.clients.items() for r in numbered(n, each.count)),
                ]
                yield ("events", index, key), Problem(f"there is no client {name!r}", hint=nearest(name, known))


def _same_names(scenario: Scenario) -> Iterator[Located]:
    """Pools of which replicas would be called the same: gpu-0 of a pool gpu, and a pool gpu-0."""
    owner: dict[str, str] = {}
    for pool, client in scenario.clients.items():
        for name in numbered(pool, client.count):
            if owner.setdefault(name, pool) != pool:
                message = f"{owner[name]} has a replica {name!r} already"
                yield ("clients", pool), Problem(message, hint="call the pool otherwise")
                break


def _unknown_stages(scenario: Scenario, name: str, serves: Iterable[str]) -> Iterator[Located]:
    known = {PREFILL, DECODE, *scenario.stages}
    delays = {stage for tenant in scenario.tenants.values() for stage in tenant.delays}
    for index, stage in enumerate(serves):
        if stage in delays:
            yield ("clients", name, "serves", index), _is_a_delay(stage)
        elif stage not in known:
            message = f"there is no stage {stage!r}"
            yield ("clients", name, "serves", index), Problem(message, hint=nearest(stage, known))


def _is_a_delay(stage: str) -> Problem:
    return Problem(f"the stage {stage!r} is a delay, which no client serves", hint="leave it out")


def _client_conflicts(scenario: Scenario, name: str, client: Pool) -> Iterator[Located]:
    if client.model.is_encoder and DECODE in scenario.stages and DECODE in client.serves:
        message = f"{client.model.name} is an encoder: it decodes nothing"
        yield ("clients", name, "model"), Problem(message, hint="take a decoder, or pipeline: [prefill]")
    yield from _hand_over_conflicts(scenario, name, client)


def _memory_conflicts(scenario: Scenario) -> Iterator[Located]:
    """Memories that nobody has a place for, and KV stores of what can't be exchanged."""
    for name, memory in scenario.memories.items():
        if memory.per in ("node", "rack") and not scenario.network.has_nodes:
            message = f"per: {memory.per}, and the network has no {memory.per}s"
            hint = "give network a preset or nodes, or take per: client, per: cluster or shared_by: N"
            yield ("memories", name, "per"), Problem(message, hint=hint)
    yield from forks(scenario.pools, scenario.memories, scenario.placement)
    for name, store in scenario.stores.items():
        if store.memory not in scenario.memories and store.memory.lower() not in catalogue.aliases("memories"):
            known = [*scenario.memories, *catalogue.names("memories")]
            message = f"there is no memory {store.memory!r}"
            yield ("clients", name, "memory"), Problem(message, hint=nearest(store.memory, known))
        elif scenario.memory_of(store).write == BACK:
            message = f"{store.memory} is written back, and a KV store is told what was computed"
            yield ("clients", name, "memory"), Problem(message, hint="let it be write: through")
        (first, layout), *others = [(n, pool.kv_layout) for n, pool in scenario.users_of(name).items()] or [("", ())]
        for other, its_layout in others:
            if its_layout != layout:
                message = f"a KV store is of one model and kv_dtype, and {other} has others than {first}"
                yield ("clients", other, "model"), Problem(message, hint="give both the same, or use tiers")


def _hand_over_conflicts(scenario: Scenario, name: str, client: Pool) -> Iterator[Located]:
    """What keeps the KV caches of this client from being decoded elsewhere."""
    for other_name, other in scenario.decoders_of(name).items():
        if other.model.layers != client.model.layers:
            message = f"{name} hands KV caches of {client.model.name} over to {other_name}, which has another model"
            yield ("clients", other_name, "model"), Problem(message, hint="give both the same model")
        if is_static(other.batching):
            message = f"{other_name} takes decodes over from {name} one by one, which no static batch can"
            yield ("clients", other_name, "batching"), Problem(message, hint="take chunked or continuous")
