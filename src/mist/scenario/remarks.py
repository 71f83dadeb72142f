"""What a reader of a result should know of the scenario behind it, in sentences: what is assumed rather than known.

Beside the checks, which refuse: a remark lets pass. `mist check` prints them and every result carries them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import inf

from mist.hardware import GENERIC_EFFICIENCY, Device
from mist.metrics.words import counted
from mist.request import DECODE, ORDER_SIZES, PREFILL
from mist.scenario.bands import expected_error
from mist.scenario.clients import Pool
from mist.scenario.named import Spec, parameters
from mist.scenario.prices import unused_prices
from mist.scenario.value import Scenario
from mist.speculation import AcceptedLengths


def remarks(scenario: Scenario, priced_by: Mapping[str, str] | None = None, *, saturated: bool = False) -> list[str]:
    """Sentences on memory, what has no cost or no use, figures that nobody measured or confirmed, the expected error.

    `priced_by` names the performance model of each pool, where it is known already; `saturated`: the run was.
    """
    found = [remark for name, pool in scenario.pools.items() for remark in _memory(name, pool)]
    found += [remark for name, pool in scenario.pools.items() for remark in _speculation(name, pool)]
    found += [remark for name, host in scenario.hosts.items() for remark in _search(name, host.perf)]
    found += [*_not_modelled(scenario), *_conversions(scenario), *_mixed(scenario), *_priorities(scenario)]
    found += [*_of_no_use(scenario), *_never_routed(scenario), *_never_scaled(scenario), *_never_down(scenario)]
    computing = {pool.device.name for pool in scenario.pools.values()}
    devices = {pool.device.name: pool.device for pool in scenario.clients.values() if pool.device}
    found += [remark for name, device in devices.items() for remark in _figures(device, name in computing)]
    priced_by = priced_by or {}
    expected = [expected_error(scenario, name, priced_by.get(name, ""), saturated=saturated) for name in scenario.pools]
    return [*found, *dict.fromkeys(each["statement"] for each in expected)]


def _not_modelled(scenario: Scenario) -> Iterator[str]:
    """What the scenario has, at no cost."""
    is_free = scenario.network.kv_transfer is None and scenario.placement is None
    if is_free and any(map(scenario.decoders_of, scenario.pools)):
        yield "KV caches go from prefill to decode clients in no time: network.kv_transfer gives them a link."


def _of_no_use(scenario: Scenario) -> Iterator[str]:
    """What the scenario tells and nobody reads."""
    read = {tier for pool in scenario.pools.values() for tier in pool.kv_cache.tiers}
    read |= {store.memory for store in scenario.stores.values()}
    for name in scenario.memories:
        if name not in read:
            yield f"memories.{name}: no client's tiers or KV store name it."
    hosts = scenario.placement.topology.nodes if scenario.placement else ()
    bought = [pool.device for pool in scenario.clients.values()] + [node.host for node in hosts]
    yield from unused_prices(scenario.prices, {device.name for device in bought if device is not None})
    policies = [pool.batching for pool in scenario.pools.values()] + [host.batching for host in scenario.hosts.values()]
    orders = [policy.params.get("order") for policy in policies]
    for_orders = ORDER_SIZES if any(order and order.name != "fcfs" for order in orders) else ()
    for tenant in scenario.tenants.values():
        choosing = [
            *(scenario.routing[stage] for stage in tenant.stages if stage in scenario.routing),
            *tenant.admission,
        ]
        for_choices = {size for spec in choosing for size in getattr(spec.build(), "sizes", ())}
        known = getattr(tenant.pipeline.build(), "sizes", None)
        told = tenant.workload.sizes or ()
        unread = [name for name in told if known is not None and name not in {*known, *for_orders, *for_choices}]
        if unread:
            where = ".".join((*map(str, tenant.place), "workload.sizes"))
            reads = f"reads {', '.join(known)}" if known else "reads none"
            yield f"{where}: {tenant.pipeline.name} {reads}, so the others change nothing: {', '.join(unread)}."


def _never_routed(scenario: Scenario) -> Iterator[str]:
    """A policy that was chosen for decodes which stay where their prefills were."""
    policy = scenario.routing.get(DECODE)
    if policy is None or policy.name == "least_outstanding" or policy == scenario.routing.get(PREFILL):
        return
    is_lost = any(event.client_down for event in scenario.events)  # such decodes are placed again
    if not is_lost and not any(map(scenario.decoders_of, scenario.pools)):
        yield f"routing.decode: decodes stay where their prefills were, so {policy.name} changes nothing."


def _never_scaled(scenario: Scenario) -> Iterator[str]:
    """Pools that scale by nothing."""
    for name, pool in scenario.pools.items():
        scaling = pool.scaling
        if scaling is not None and scaling.rule is None and not scaling.schedule:
            serving = f"{scaling.initial_count} of {counted(pool.count, 'replica')}"
            yield f"clients.{name}.scaling has neither a schedule nor a rule: {serving} serve all the time."


def _never_down(scenario: Scenario) -> Iterator[str]:
    """Clients that come up and weren't down."""
    until: dict[str, float] = {}
    for number, event in sorted(enumerate(scenario.events), key=lambda pair: pair[1].at_s):
        replicas = scenario.replicas_called(event.client_down or event.client_up or "")
        if event.client_down is not None:
            end = inf if event.for_s is None else event.at_s + event.for_s
            until |= {replica: max(end, until.get(replica, 0.0)) for replica in replicas}
        elif replicas and max([until.pop(replica, 0.0) for replica in replicas]) <= event.at_s:
            yield f"events.{number}: {event.client_up} isn't down at {event.at_s:g} s, so client_up changes nothing."


def _priorities(scenario: Scenario) -> Iterator[str]:
    """Priorities of tenants that no client goes by."""
    policies = [pool.batching for pool in scenario.pools.values()]
    has_order = any(getattr(policy.params.get("order"), "name", "") == "priority" for policy in policies)
    if len({tenant.priority for tenant in scenario.tenants.values()}) > 1 and not has_order:
        yield "Priorities of tenants change nothing: no client has batching with order: priority."


def _mixed(scenario: Scenario) -> Iterator[str]:
    """Stages that may run on one model or another, by chance."""
    for tenant in scenario.tenants.values():
        for stage in tenant.stages:
            serving = scenario.clients_of(tenant.name, stage)
            models = {name: pool.model.name for name, pool in scenario.pools.items() if name in serving}
            if len(set(models.values())) > 1:
                whose = f"{tenant.name}: {stage}" if tenant.name else stage
                choices = ", ".join(f"{name} ({model})" for name, model in models.items())
                yield f"{whose} goes to one of several models, as the routing has it: {choices}."


def _conversions(scenario: Scenario) -> Iterator[str]:
    """KV caches that are decoded in another dtype than they were computed in."""
    for name, pool in scenario.pools.items():
        for other, decoder in scenario.decoders_of(name).items():
            if decoder.kv_dtype != pool.kv_dtype:
                dtypes = f"{pool.kv_dtype} to {decoder.kv_dtype}"
                where = name if scenario.hand_over.convert == "before" else other
                yield f"{name}, {other}: KV caches are converted from {dtypes} on {where}, at its memory bandwidth."


def _memory(name: str, pool: Pool) -> Iterator[str]:
    fitting = pool.kv_capacity().num_tokens
    given = pool.kv_cache.num_blocks
    tokens = fitting if given is None else given * pool.kv_cache.block_size
    if tokens > fitting:
        rule = f"by {pool.engine.name}'s rule"
        yield f"{name}: a KV cache of {tokens:,} tokens is given, but only {fitting:,} fit {rule}."
    if tokens < pool.max_model_len:
        yield (
            f"{name}: the KV cache holds {tokens:,} tokens, fewer than max_model_len {pool.max_model_len:,}: "
            "vLLM would refuse to start until that is lowered; here longer requests that no other client holds "
            "are rejected one by one."
        )


def _speculation(name: str, pool: Pool) -> Iterator[str]:
    settings = pool.speculation
    if settings is None:
        return
    if isinstance(measured := settings.acceptance, AcceptedLengths):
        what = " ".join(filter(None, (measured.model, measured.method))) or measured.name
        length = 1 + settings.num_draft_tokens * settings.accepted_share
        yield f"{name}: {length:.3g} tokens per step with {settings.num_draft_tokens} drafted were measured of {what}."
    if settings.draft_cost is not None:
        yield f"{name}: a draft is assumed to take {settings.draft_cost:g} of the step that verifies it."
    elif settings.method in ("eagle", "mtp"):
        yield f"{name}: drafts are priced as passes of one decoder layer and the classifier: unverified."


def _search(name: str, perf: Spec) -> Iterator[str]:
    """A rate of FAISS's fast scan that the user hasn't measured."""
    if perf.name != "ivf_pq" or perf.params["bits"] != 4:
        return
    if perf.params["fast_scan_lookup_ns"] == parameters("perf", perf.name).model_fields["fast_scan_lookup_ns"].default:
        yield f"{name}: its rate with 4 bits is of another machine than that with 8, so the two can't be compared."


#: how the keys of a device begin that only the steps of a model use
_OF_MODELS = ("peak_tflops", "efficiency", "link_", "kernel_launch_ns", "scale_up_domain")


def _figures(device: Device, runs_a_model: bool) -> Iterator[str]:
    if runs_a_model:
        yield from _efficiencies(device)
    unverified = sorted(key for key, source in device.sources.items() if source.startswith("unverified"))
    # no time depends on idle_w
    told = [key for key in unverified if key != "idle_w" and (runs_a_model or not key.startswith(_OF_MODELS))]
    if told:
        yield f"{device.name}: unverified are {', '.join(told)}."


def _efficiencies(device: Device) -> Iterator[str]:
    generic = [c for c in GENERIC_EFFICIENCY if not any(k == c or k.startswith(f"{c}_") for k in device.efficiency)]
    if len(generic) == len(GENERIC_EFFICIENCY):
        yield f"{device.name}: generic efficiencies, nothing is measured on this device."
    elif generic:
        yield f"{device.name}: generic efficiencies for {', '.join(generic)}."
