"""Whether what the clients of a host keep in its memory fits there together: indexes, weights, activations, KV caches.

A check of a placement; each client alone was checked before, by its own performance model or its engine's rule. It
moves nobody, and knows nothing of what is fetched into the memory during a run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from mist.errors import Problem
from mist.scenario.clients import Pool
from mist.scenario.hosts import HostPool
from mist.scenario.named import Located
from mist.scenario.pools import AnyClient
from mist.scenario.stores import StorePool
from mist.topology import Node, Place
from mist.units import GIB

Pools = Mapping[str, AnyClient]


def overfull(nodes: Sequence[Node], places: Mapping[str, Sequence[Place]], pools: Pools) -> Iterator[Located]:
    """The hosts that clients keep more on than they hold, located at the last of their pools."""
    on_host: dict[int, list[tuple[str, str]]] = {}
    for pool, replicas in places.items():
        for place in replicas:
            if place.on_host:
                on_host.setdefault(place.nodes[0], []).append((pool, place.name))
    kept = {pool: kept_bytes(pools[pool]) for pool in dict.fromkeys(p for each in on_host.values() for p, _ in each)}
    for index, clients in on_host.items():
        node, total = nodes[index], sum(kept[pool] for pool, _ in clients)
        if node.host is None or len(clients) < 2 or total <= node.host.memory_bytes:
            continue
        each = ", ".join(f"{name} {kept[pool] / GIB:,.1f}" for pool, name in clients)
        told = f"{node.name} has {node.host.memory_bytes / GIB:,.1f} GiB of memory, and its clients keep"
        hint = "place them apart, or let one keep less"
        if any(isinstance(pools[pool], Pool) for pool, _ in clients):
            hint += ", such as kv_cache: {gpu_memory_utilization: 0.3}"
        yield ("network", "placement", clients[-1][0]), Problem(f"{told} {total / GIB:,.1f}: {each}", hint=hint)


def kept_bytes(pool: AnyClient) -> int:
    """What one client keeps in its host's memory all the time.

    Of a model its weights, the activations of its largest step, the engine's overhead and all of the KV cache; an
    encoder has none. What a KV store keeps is in its memory, which has a capacity of its own.
    """
    if isinstance(pool, StorePool):
        return 0
    if isinstance(pool, HostPool):
        return pool.prepared().memory_bytes()
    fits = pool.kv_capacity()
    num_blocks = 0 if pool.model.is_encoder else pool.kv_cache.num_blocks or fits.num_blocks
    return fits.weight_bytes + fits.activation_bytes + fits.overhead_bytes + num_blocks * fits.block_bytes
