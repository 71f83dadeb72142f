"""What might help against a reason: a few changes of the scenario, as overrides, the most promising first.

From a reason and the scenario that it was found in. Nothing is validated or run here: a change that the scenario can't
take is left out by whoever runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from mist.advice.evidence import Evidence
from mist.advice.reasons import (
    BATCH,
    COST_FIGURES,
    HOST,
    IDLE,
    INTERFERENCE,
    KV,
    LINK,
    QUEUEING,
    RETRIEVAL,
    STAGE,
    Change,
    Reason,
)
from mist.metrics.words import counted
from mist.model import DTYPE_BYTES
from mist.request import PREFILL
from mist.scenario import Scenario, catalogue
from mist.scenario.clients import Pool
from mist.scenario.hosts import HostPool
from mist.scenario.tenancy import SOLE
from mist.units import GB, parse_bytes_per_s

#: by how much a link is made faster
FASTER = 4
#: keys of an engine that say where it is from, not what it does
_ABOUT = ("sources", "era", "first_version", "first_date")
#: the largest share of device memory that is proposed
MOST_MEMORY = 0.95


def changes(evidence: Evidence, reason: Reason) -> Iterator[Change]:
    """Changes against `reason`, best first."""
    yield from _AGAINST[reason.code](evidence.scenario, reason)


def _queueing(scenario: Scenario, reason: Reason) -> Iterator[Change]:
    bound = reason.facts["bound"]
    yield from _replicas(scenario, reason.at, 1)
    if bound == "slots":
        yield from _limit(scenario, reason.at, "max_num_seqs", 2)
    if PREFILL in scenario.clients[reason.at].serves:
        yield from _limit(scenario, reason.at, "max_num_batched_tokens", 2 if bound == "tokens" else 0.5)
    yield from _wider(scenario, reason.at)


def _kv(scenario: Scenario, reason: Reason) -> Iterator[Change]:
    pool = scenario.pools.get(reason.at)
    if pool is None:
        return
    where = f"clients.{reason.at}"
    if pool.kv_cache.num_blocks:
        yield _own_blocks(scenario, reason.at, pool.kv_cache.num_blocks)
    else:
        if DTYPE_BYTES[pool.kv_dtype] > 1:
            yield Change(f"{reason.at}: KV cache in fp8", {f"{where}.kv_dtype": "fp8"})
        if pool.kv_cache.gpu_memory_utilization < MOST_MEMORY:
            words = f"{reason.at}: {MOST_MEMORY:.0%} of device memory for the engine"
            yield Change(words, {f"{where}.kv_cache.gpu_memory_utilization": MOST_MEMORY})
    yield from _unless_for_cost(reason, _replicas(scenario, reason.at, 1))
    yield from _wider(scenario, reason.at)


def _own_blocks(scenario: Scenario, pool: str, num_blocks: int) -> Change:
    """Twice the blocks, under the key that the user gave them by."""
    key, size = "num_blocks", num_blocks
    with suppress(KeyError):
        size, key = scenario.source.at(("clients", pool, "kv_cache", "capacity_tokens")), "capacity_tokens"
    return Change(f"{pool}: twice the KV cache", {f"clients.{pool}.kv_cache.{key}": 2 * size})


def _link(scenario: Scenario, reason: Reason) -> Iterator[Change]:
    sender, _, receiver = reason.at.partition(" -> ")
    network = scenario.network
    if sender in scenario.memories and (bandwidth := scenario.memories[sender].tier(sender).bytes_per_s):
        faster = f"{FASTER * bandwidth / GB:g} GB/s"
        yield Change(f"{sender}: {FASTER} times the bandwidth", {f"memories.{sender}.bandwidth": faster})
    elif receiver in scenario.pools and scenario.pools[receiver].kv_cache.prefix_tier == "cpu":
        yield Change(f"{receiver}: prefixes in device memory", {f"clients.{receiver}.kv_cache.prefix_tier": "hbm"})
    elif network.kv_transfer is not None:
        faster = _faster(network.kv_transfer.bandwidth)
        yield Change(f"links of {faster} between prefill and decode", {"network.kv_transfer.bandwidth": faster})
    elif network.has_nodes:
        yield _faster_tiers(scenario)
    if sender in scenario.pools and receiver in scenario.pools and not scenario.hand_over.layerwise:
        early = {"hand_over.choose_decode": "at_arrival", "hand_over.layerwise": True}
        yield Change("KV caches sent layer by layer", early)


def _faster_tiers(scenario: Scenario) -> Change:
    """Whole tiers, since one that is written in part loses what its preset says; and NICs with a rate of their own."""
    network, overrides = scenario.network, dict[str, Any]()
    for name in ("node", "rack", "pod"):
        if (tier := getattr(network, name)) is not None:
            overrides[f"network.{name}"] = {**tier.model_dump(), "bandwidth": _faster(tier.bandwidth)}
    for name, group in (network.nodes or {}).items():
        if group.nic is not None:
            overrides[f"network.nodes.{name}.nic"] = {
                **group.nic.model_dump(),
                "bandwidth": _faster(group.nic.bandwidth),
            }
    return Change(f"links {FASTER} times as fast", overrides)


def _faster(bandwidth: str) -> str:
    return f"{FASTER * parse_bytes_per_s(bandwidth) / GB:g} GB/s"


def _retrieval(scenario: Scenario, reason: Reason) -> Iterator[Change]:
    more = list(_replicas(scenario, reason.at, 1))
    pool = scenario.clients[reason.at]
    less: list[Change] = []
    if isinstance(pool, HostPool):
        for key in ("n_probe", "ef_search"):
            if isinstance(number := pool.perf.params.get(key), int) and number > 1 and key in pool.perf.given:
                where = f"clients.{reason.at}.perf.{pool.perf.name}.{key}"
                less.append(Change(f"{reason.at}: {key} {number // 2}, at a lower recall", {where: number // 2}))
        if pool.cores < pool.device.num_cores:
            cores = min(2 * pool.cores, pool.device.num_cores)
            less.append(Change(f"{reason.at}: {cores} cores", {f"clients.{reason.at}.cores": cores}))
    waits = reason.facts["waiting"] > 0.5
    yield from (*more, *less) if waits else (*less, *more)


def _stage(scenario: Scenario, reason: Reason) -> Iterator[Change]:
    pool = scenario.clients[reason.at]
    if isinstance(pool, HostPool) and pool.cores < pool.device.num_cores:
        yield Change(f"{reason.at}: all cores", {f"clients.{reason.at}.cores": pool.device.num_cores})
    yield from _wider(scenario, reason.at)
    yield from _replicas(scenario, reason.at, 1)


def _host(scenario: Scenario, reason: Reason) -> Iterator[Change]:
    pool = scenario.pools.get(reason.at)
    if pool is None:
        return
    where = f"clients.{reason.at}.engine"
    newer = [data for entry in catalogue.entries("engines") if _is_newer(data := entry.source.data(), pool)]
    if newer:
        newest = max(newer, key=lambda data: _version(data["first_version"]))["name"]
        yield Change(f"{reason.at}: engine {newest}", {where: newest})
    elif not pool.engine.overlapped:
        words = f"{reason.at}: a host that prepares a step while the devices run the one before"
        yield Change(words, {where: {**_engine_of(scenario, reason.at), "overlapped": True, "async_scheduling": True}})
    yield from _unless_for_cost(reason, _replicas(scenario, reason.at, 1))


def _engine_of(scenario: Scenario, pool: str) -> dict[str, Any]:
    """The engine of a pool as a mapping, for one of our own."""
    try:
        given = scenario.source.at(("clients", pool, "engine"))
    except KeyError:
        given = scenario.pools[pool].engine.name
    form = catalogue.read("engines", given, scenario.folder)[1]
    kept = {key: value for key, value in catalogue.mapping("engines", form).items() if key not in _ABOUT}
    return {**kept, "name": f"{scenario.pools[pool].engine.name}, overlapped"}


def _is_newer(entry: dict[str, Any], pool: Pool) -> bool:
    """Whether a catalogue's engine is a later version of the pool's."""
    own = pool.engine
    if not own.engine or entry.get("engine") != own.engine or entry.get("harness"):
        return False
    return _version(str(entry.get("first_version", ""))) > _version(own.first_version)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdecimal())


def _interference(scenario: Scenario, reason: Reason) -> Iterator[Change]:
    yield from _limit(scenario, reason.at, "max_num_batched_tokens", 0.5)
    yield from _replicas(scenario, reason.at, 1)


def _idle(scenario: Scenario, reason: Reason) -> Iterator[Change]:
    yield from _replicas(scenario, reason.at, -1)
    if reason.at in scenario.pools and (tp := scenario.pools[reason.at].tp) > 1:
        yield Change(f"{reason.at}: tp {tp // 2}", {f"clients.{reason.at}.tp": tp // 2})
    yield from _twice_the_load(scenario)


def _twice_the_load(scenario: Scenario) -> Iterator[Change]:
    if SOLE not in scenario.tenants:
        return
    workload, words = scenario.tenants[SOLE].workload, "twice the load on the same devices"
    closed = workload.arrival_process
    if closed is not None and closed.name == "closed_loop":
        key = "concurrency" if workload.concurrency else "arrivals.closed_loop.concurrency"
        yield Change(words, {f"workload.{key}": 2 * closed.params["concurrency"]})
    else:
        yield Change(words, {"workload.rate_scale": 2 * workload.rate_scale})


def _batch(scenario: Scenario, reason: Reason) -> Iterator[Change]:
    yield from _replicas(scenario, reason.at, -1)
    pool = scenario.pools.get(reason.at)
    if pool is not None and DTYPE_BYTES[pool.weights_dtype] > 1 and "fp8" in pool.device.peak_flop_per_s:
        yield Change(f"{reason.at}: weights in fp8", {f"clients.{reason.at}.weights_dtype": "fp8"})
    yield from _twice_the_load(scenario)


def _replicas(scenario: Scenario, pool: str, more: int) -> Iterator[Change]:
    """More or fewer; where clients have nodes by name, one more on a node more too."""
    count = scenario.clients[pool].count + more
    if count < 1 or getattr(scenario.clients[pool], "scaling", None) is not None:
        return
    words, overrides = f"{pool}: {counted(count, 'replica')}", {f"clients.{pool}.count": count}
    network = scenario.network
    placed = (network.placement or {}).get(pool, ()) if more > 0 else ()
    group = next((name for name, nodes in network.node_names().items() if placed and placed[-1] in (name, *nodes)), "")
    if group and network.nodes is not None:
        yield Change(f"{words}, on a node more", overrides | _one_node_more(scenario, pool, group))
    if not (group and isinstance(scenario.clients[pool], HostPool)):
        yield Change(words, overrides)


def _one_node_more(scenario: Scenario, pool: str, group: str) -> dict[str, Any]:
    """A group of nodes grown by one, which a pool is placed on too; a group of one is named anew where it has many."""
    network = scenario.network
    nodes, placement = network.nodes or {}, network.placement or {}
    count = nodes[group].count
    moved = {name: [_first_of(group, count, node) for node in given] for name, given in placement.items()}
    moved[pool] = [*moved[pool], f"{group}-{count}"]
    return {f"network.nodes.{group}.count": count + 1, "network.placement": moved}


def _first_of(group: str, count: int, node: str) -> str:
    return f"{group}-0" if node == group and count == 1 else node


def _unless_for_cost(reason: Reason, more: Iterator[Change]) -> Iterator[Change]:
    """More devices, which nobody takes to pay less."""
    if reason.figure not in COST_FIGURES:
        yield from more


def _wider(scenario: Scenario, pool: str) -> Iterator[Change]:
    if pool in scenario.pools:
        tp = 2 * scenario.pools[pool].tp
        yield Change(f"{pool}: tp {tp}", {f"clients.{pool}.tp": tp})


def _limit(scenario: Scenario, pool: str, key: str, factor: float) -> Iterator[Change]:
    client = scenario.clients[pool]
    batching = getattr(client, "batching", None)
    if batching is not None and (limit := batching.params.get(key)) and pool in scenario.pools:
        value = int(limit * factor)
        overrides = {f"clients.{pool}.batching.{batching.name}.{key}": value}
        tokens = batching.params.get("max_num_batched_tokens")
        if key == "max_num_seqs" and tokens and tokens < value:
            overrides[f"clients.{pool}.batching.{batching.name}.max_num_batched_tokens"] = value
        yield Change(f"{pool}: {key} {value:,}", overrides)


_AGAINST: dict[str, Callable[[Scenario, Reason], Iterator[Change]]] = {
    QUEUEING: _queueing, KV: _kv, LINK: _link, RETRIEVAL: _retrieval, STAGE: _stage, HOST: _host,
    INTERFERENCE: _interference, IDLE: _idle, BATCH: _batch,
}  # fmt: skip
