"""The memories of a run, built from a scenario: instances, who shares them, their channels, and each client's tiers.

Beside the fleet, whose clients get them; after the network, whose channels they share. It decides nothing that the
scenario doesn't say, and runs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import inf
from typing import Any

from mist.client import Client
from mist.errors import ScenarioError
from mist.fabric import Fabric, Path
from mist.memory.hierarchy import Hierarchy
from mist.memory.tier import BACK, MemoryTier, Tier
from mist.metrics.memories import MemoryInfo
from mist.network import HOST, Network
from mist.offload import KVStore, Memory, Offload
from mist.records import Records
from mist.request import PREFILL
from mist.scenario.clients import Pool
from mist.scenario.fleet import Fleet
from mist.scenario.memory_groups import Where, shared, where
from mist.scenario.network import numbered
from mist.scenario.seeds import random_of
from mist.scenario.value import Scenario
from mist.sharing import Channel
from mist.workload import RequestTable

#: where the workload's stated hits are, with `prefix_tier: cpu`: it has them all, behind the device's link to its host
HOST_MEMORY = MemoryTier("host memory", 1 << 62, inf, hit_rate=1.0)


def add_memories(scenario: Scenario, fleet: Fleet, unit_tokens: int, network: Network, records: Records) -> None:
    """Give the clients of `fleet` the memories that their pools name; ScenarioError where chunks don't fit.

    `unit_tokens`: tokens per prefix key of the workloads, 0 where they have none.
    """
    builder = _Builder(scenario, fleet, unit_tokens, network, records)
    builder.add_stores()
    builder.add_tiers()


def memory_infos(fleet: Fleet) -> list[MemoryInfo]:
    """What a summary needs to know of the memories, once the run is over."""
    infos = []
    for name, memory in fleet.memories:
        tier = memory.tier
        infos.append(MemoryInfo(name, memory.index, tier.hits, tier.misses, tier.held_bytes, tier.evicted_bytes))
    return infos


def nothing_to_find(scenario: Scenario, tables: Mapping[str, RequestTable]) -> Iterator[str]:
    """Sentences on memories in which these workloads can't find anything."""
    for name, pool in scenario.pools.items():
        if not pool.kv_cache.tiers:
            continue
        users = [table for tenant, table in tables.items() if name in scenario.clients_of(tenant, PREFILL)]
        has_hits, has_hashes = _told(users)
        nearest = scenario.memories[pool.kv_cache.tiers[0]]
        if nearest.write == BACK and not pool.kv_cache.enable_prefix_caching:
            yield f"{name}: prefix caching is off, so the device evicts nothing that could be written back."
        if nearest.hit_rate is None:
            if not has_hashes:
                yield f"{name}: its tiers find nothing: the workload's prompts have no hashes, and they no hit_rate."
            elif has_hits:
                yield f"{name}: its tiers go by the workload's hashes, so its cached_tokens are computed."
        elif not has_hits:
            yield f"{name}: hit_rate is of the workload's cached_tokens, and there are none: its tiers have nothing."
    for name, store in scenario.stores.items():
        asking = [table for tenant, table in tables.items() if {*store.serves} & {*scenario.tenants[tenant].stages}]
        if not any(_told(asking)):
            yield f"{name}: the workload has neither cached_tokens nor hashes, so it isn't asked for anything."


def _told(tables: Sequence[RequestTable]) -> tuple[bool, bool]:
    """Whether any of the workloads states hits, and whether any has hashes."""
    return any(t.cached_tokens is not None for t in tables), any(t.hash_block_size > 0 for t in tables)


@dataclass(frozen=True, slots=True)
class _Replica:
    """Clients that are one replica of a pool, its lanes, and where they are."""

    clients: Sequence[Client]
    where: Where


@dataclass(slots=True, eq=False)
class _Instance:
    """A memory of the run with its channels, and who shares it."""

    memory: Memory
    read: Channel
    write: Channel
    is_outside: bool


class _Builder:
    def __init__(self, scenario: Scenario, fleet: Fleet, unit_tokens: int, network: Network, records: Records) -> None:
        self.scenario = scenario
        self.fleet = fleet
        self.unit_tokens = unit_tokens
        self.network = network
        self.records = records
        #: by pool, the KV stores that it may be sent to
        self.stores: dict[str, dict[int, Memory]] = {}
        self.layouts: dict[tuple[Any, ...], int] = {}

    def add_stores(self) -> None:
        """A memory for each KV store, and paths between it and all clients that compute prompts."""
        for pool_name, pool in self.scenario.stores.items():
            spec = self.scenario.memory_of(pool).tier(pool_name)
            place = ("memories", pool.memory) if pool.memory in self.scenario.memories else ("clients", pool_name)
            for client in self._of_pool(pool_name):
                made = self._instance(pool_name, client.name, spec, place, is_outside=False)
                made.memory.always = pool.fetch == "always"
                draws = partial(random_of, self.scenario.seed, f"memories.{pool_name}")
                client.store = KVStore(made.memory, self.unit_tokens, draws)
                users = self.scenario.users_of(pool_name)
                for user_name in users:
                    self.stores.setdefault(user_name, {})[made.memory.index] = made.memory
                for replica in self._replicas(users):
                    link = _Link(spec, f"{client.name}.{replica.clients[0].name}")
                    for user in replica.clients:
                        self._join_store(client, made, user, link)

    def add_tiers(self) -> None:
        """Instances of what the pools' tiers name, and an `Offload` for each client with tiers or a store to ask."""
        instances = {name: self._instances(name) for name in self.scenario.memories}
        for name, pool in self.scenario.pools.items():
            cache = pool.kv_cache
            on_host = cache.prefix_tier == "cpu" and cache.enable_prefix_caching
            if not (cache.tiers or on_host or name in self.stores):
                continue
            layout = self.layouts.setdefault(pool.kv_layout, len(self.layouts))
            for client in self._of_pool(name):
                if on_host:
                    memories = [Memory(HOST, Tier(HOST_MEMORY))]
                else:
                    memories = [instances[tier][client.index].memory for tier in cache.tiers]
                    self._join_tiers([instances[tier][client.index] for tier in cache.tiers])
                client.offload = Offload(
                    client,
                    self.network,
                    self._hierarchy(name, pool, memories, layout),
                    memories,
                    stores=self.stores.get(name),
                    always=on_host or cache.fetch == "always",
                    num_layers=pool.model.num_layers if cache.layerwise else 1,
                )

    def _hierarchy(self, name: str, pool: Pool, memories: Sequence[Memory], layout: int) -> Hierarchy:
        try:
            return Hierarchy(
                [memory.tier for memory in memories],
                token_bytes=pool.model.kv_bytes_per_token(pool.kv_dtype),
                unit_tokens=self.unit_tokens,
                layout=layout,
                rng_of=partial(random_of, self.scenario.seed, "memories"),
            )
        except ValueError as error:
            hint = "take another chunk_tokens, or write: through"
            raise ScenarioError(
                self.scenario.problem(("clients", name, "kv_cache", "tiers"), str(error), hint)
            ) from None

    # --- instances ---

    def _instances(self, name: str) -> dict[int, _Instance]:
        """An instance of the memory `name` for each group that shares one; the instance of each client."""
        section = self.scenario.memories[name]
        users = {n: pool for n, pool in self.scenario.pools.items() if name in pool.kv_cache.tiers}
        everyone = list(self._replicas(users))
        groups = [[everyone[i] for i in group] for group in shared(section, [one.where for one in everyone])]
        found: dict[int, _Instance] = {}
        spec = section.tier(name)
        for label, replicas in zip(numbered(name, len(groups)), groups, strict=False):
            nodes = {node for replica in replicas for node in replica.where.nodes}
            is_outside = section.per in ("rack", "cluster") or len(nodes) > max(len(r.where.nodes) for r in replicas)
            made = self._instance(name, label, spec, ("memories", name), is_outside=is_outside)
            for replica in replicas:
                link = _Link(spec, f"{label}.{replica.clients[0].name}")
                for client in replica.clients:
                    found[client.index] = made
                    self._join_tier(made, client, link)
        return found

    def _instance(
        self, name: str, label: str, spec: MemoryTier, place: tuple[str, ...], *, is_outside: bool
    ) -> _Instance:
        try:
            tier = Tier(spec, self.unit_tokens)
        except ValueError as error:
            hint = f"the workload hashes {self.unit_tokens} tokens at a time"
            key = (*place, "chunk_tokens") if place[0] == "memories" else place
            raise ScenarioError(self.scenario.problem(key, str(error), hint)) from None
        self.records.memory_names.append(label)
        memory = Memory(-len(self.records.memory_names), tier)
        self.fleet.memories.append((name, memory))
        read = Channel(f"{label}.read", spec.bytes_per_s)
        apart = spec.write_bytes_per_s is not None
        write = Channel(f"{label}.write", spec.write_bytes_per_s or inf) if apart else read
        return _Instance(memory, read, write, is_outside)

    # --- paths ---

    def _join_tier(self, made: _Instance, client: Client, link: _Link) -> None:
        """A tier with a link of its own is behind that; else, or beyond the node, what the network has in between."""
        network, index = self.network, made.memory.index
        spec = made.memory.tier.spec
        here, away = Path(), Path()
        if made.is_outside and isinstance(network.paths, Fabric):
            is_far = self.scenario.memories[spec.name].per != "rack"
            here, away = (network.paths.beyond_node(client.index, way, is_far) for way in ("in", "out"))
        elif spec.link_bytes_per_s is None:
            here, away = network.path(HOST, client.index), network.path(client.index, HOST)
        network.memory_paths[index, client.index] = _joined(spec, (made.read, *link.to_client), here)
        network.memory_paths[client.index, index] = _joined(spec, away.channels, away, (*link.to_memory, made.write))

    def _join_store(self, store: Client, made: _Instance, client: Client, link: _Link) -> None:
        """Between a KV store and a client: over the network if there are nodes, else as from a tier."""
        network, index, spec = self.network, made.memory.index, made.memory.tier.spec
        if not isinstance(network.paths, Fabric):
            self._join_tier(made, client, link)
            return
        here, away = network.path(store.index, client.index), network.path(client.index, store.index)
        network.memory_paths[index, client.index] = _joined(spec, (made.read, *link.to_client), here)
        network.memory_paths[client.index, index] = _joined(spec, away.channels, away, (*link.to_memory, made.write))

    def _join_tiers(self, instances: Sequence[_Instance]) -> None:
        """What a tier gives up goes to the next over the channels of both, and of nobody else."""
        for above, below in pairwise(instances):
            latency = above.memory.tier.spec.access_ns + below.memory.tier.spec.access_ns
            path = Path(_distinct((above.read, below.write)), latency)
            self.network.memory_paths[above.memory.index, below.memory.index] = path

    # --- clients ---

    def _of_pool(self, name: str) -> list[Client]:
        return [c for c, info in zip(self.fleet.clients, self.fleet.infos, strict=True) if info.pool == name]

    def _replicas(self, pools: Mapping[str, Pool]) -> Iterator[_Replica]:
        """The replicas of `pools`, in order."""
        for name, pool in pools.items():
            clients = self._of_pool(name)
            for number, first in enumerate(range(0, len(clients), pool.lanes)):
                place = where(self.scenario.placement, name, number)
                yield _Replica(clients[first : first + pool.lanes], place)


class _Link:
    """What lies between a memory and one replica, each way; nothing where the memory has no link of its own."""

    def __init__(self, spec: MemoryTier, name: str) -> None:
        rate = spec.link_bytes_per_s
        self.to_client = () if rate is None else (Channel(f"{name}.to_client", rate),)
        self.to_memory = () if rate is None else (Channel(f"{name}.to_memory", rate),)


def _joined(spec: MemoryTier, first: Sequence[Channel], path: Path, last: Sequence[Channel] = ()) -> Path:
    """`first`, then what `path` has and `first` doesn't, then `last`; a read's latency, the link's and the path's."""
    return Path(_distinct((*first, *path.channels, *last)), spec.access_ns + path.latency_ns)


def _distinct(channels: Sequence[Channel]) -> tuple[Channel, ...]:
    return tuple(dict.fromkeys(channels))
