"""What a run held, of its scenario: the devices of each pool, the hosts of nodes, the memories; and its bill.

Between a run that is over and `mist.cost`, which knows no scenario. It changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mist.cost import BusyTime, Holding, HostUse, MemoryUse, cost, energy, used
from mist.metrics.window import Window
from mist.metrics.words import counted
from mist.scenario.clients import Pool
from mist.scenario.hosts import HostPool
from mist.scenario.pools import AnyClient
from mist.scenario.prices import tariff_of
from mist.scenario.value import Scenario

Json = dict[str, Any]


def bill(scenario: Scenario, busy: BusyTime, metrics: Mapping[str, Any], span: Window) -> Json:
    """`usage`, `cost` and `energy` of the run whose summary over `span` is `metrics`."""
    usage = used(
        busy,
        metrics,
        span,
        hosts=list(_hosts(scenario)),
        memories=list(_memories(scenario, metrics)),
        remarks=list(_unpaid(scenario)),
    )
    tariff = tariff_of(scenario.prices, {name: pool.price for name, pool in scenario.clients.items()})
    return {"usage": usage, "cost": cost(usage, tariff), "energy": energy(usage, scenario.energy.settings())}


def holdings_of(scenario: Scenario) -> dict[str, Holding]:
    """What each pool with devices holds: all but KV stores that are nowhere in particular."""
    return {
        name: holding(pool, on_host=_on_host(scenario, name))
        for name, pool in scenario.clients.items()
        if pool.device is not None
    }


def holding(pool: AnyClient, *, on_host: bool = False) -> Holding:
    """What the replicas of a pool hold; a KV store with a device a core of it."""
    assert pool.device is not None
    if isinstance(pool, Pool):
        return Holding(
            pool.device,
            pool.count,
            pool.platform.num_devices,
            pool.platform.num_devices / pool.lanes,
            pool.deployment(),
            on_host,
            pool.power_cap_w,
        )
    cores = pool.cores / pool.workers if isinstance(pool, HostPool) else 1
    return Holding(pool.device, pool.count, busy_devices=cores / max(1, pool.device.num_cores), on_host=on_host)


def _on_host(scenario: Scenario, name: str) -> bool:
    return scenario.placement is not None and scenario.placement.places[name][0].on_host


def _hosts(scenario: Scenario) -> Iterator[HostUse]:
    """Those of nodes that anybody is on."""
    if scenario.placement is None:
        return
    on: dict[int, tuple[list[str], list[str]]] = {}
    for pool, places in scenario.placement.places.items():
        for place in places:
            for index in place.nodes:
                replicas, beside = on.setdefault(index, ([], []))
                (replicas if place.on_host else beside).append(place.name if place.on_host else pool)
    for index, (replicas, beside) in sorted(on.items()):
        node = scenario.placement.topology.nodes[index]
        yield HostUse(node.name, node.host, tuple(replicas), tuple(dict.fromkeys(beside)))


def _memories(scenario: Scenario, metrics: Mapping[str, Any]) -> Iterator[MemoryUse]:
    """Those that there are instances of, KV stores too."""
    for name, figures in metrics["memories"].items():
        store = scenario.stores.get(name)
        memory = scenario.memory_of(store) if store else scenario.memories.get(name)
        if memory is None:  # that of a client's own host
            continue
        readers = [pool for pool, each in scenario.pools.items() if name in each.kv_cache.tiers]
        readers = list(scenario.users_of(name)) if store else readers
        kind = memory.memory.name if memory.memory else (store.memory if store else name)
        capacity = memory.tier(name).capacity_bytes
        yield MemoryUse(name, kind, figures["instances"], capacity, tuple(readers))


def _unpaid(scenario: Scenario) -> Iterator[str]:
    """What is there and in no bill, and what is paid for and not used."""
    if scenario.placement is None:
        for name, host in scenario.hosts.items():
            if host.cores < host.device.num_cores:
                whole = f"{host.device.num_cores} cores of {host.device.name}"
                yield f"{name} pays for all {whole} and uses {host.cores}: clients on nodes of a network share a host."
        return
    unused: dict[int, int] = {i: node.num_devices for i, node in enumerate(scenario.placement.topology.nodes)}
    for places in scenario.placement.places.values():
        for place in places:
            for index in place.nodes if not place.on_host else ():
                unused[index] -= place.num_devices // len(place.nodes)
    if idle := sum(unused.values()):
        have, are = ("has", "is") if idle == 1 else ("have", "are")
        yield f"{counted(idle, 'accelerator')} of the nodes {have} no client and {are} not in the cost."
