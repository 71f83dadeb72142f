"""Who shares one instance of a memory, and whether what an instance evicts has one place to go to.

Between the sections of memories and pools and the instances that a run builds of them. It builds none, and looks at no
workload.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from mist.errors import Problem
from mist.memory.tier import BACK
from mist.scenario.clients import Pool
from mist.scenario.memory import Memory
from mist.scenario.named import Located
from mist.scenario.network import numbered
from mist.scenario.placement import Placement


class Where(NamedTuple):
    """The nodes of a replica and its rack; none in a network without nodes."""

    nodes: tuple[int, ...] = ()
    rack: int = -1


def where(placement: Placement | None, pool: str, number: int) -> Where:
    """Where replica `number` of `pool` is."""
    if placement is None:
        return Where()
    nodes = placement.places[pool][number].nodes
    return Where(nodes, placement.topology.nodes[nodes[0]].rack)


def shared(section: Memory, replicas: Sequence[Where]) -> list[list[int]]:
    """Which of `replicas` share one instance."""
    if section.per in ("client", None):
        size = section.tier("").shared_by if section.per is None else 1
        return [list(range(i, min(i + size, len(replicas)))) for i in range(0, len(replicas), size)]
    groups: dict[int, list[int]] = {}
    for i, replica in enumerate(replicas):
        place = {"node": replica.nodes[0] if replica.nodes else 0, "rack": replica.rack}.get(section.per or "", 0)
        groups.setdefault(place, []).append(i)
    return list(groups.values())


def forks(pools: Mapping[str, Pool], memories: Mapping[str, Memory], placement: Placement | None) -> Iterator[Located]:
    """Instances whose evicted content would go to several memories that are written back to, or to one for some only.

    Located at the tiers of the first pool that has another one below than those before it.
    """
    instance = {name: _instances(name, section, pools, placement) for name, section in memories.items()}
    below_of: dict[tuple[str, int], tuple[str, str, int]] = {}
    for pool_name, pool in pools.items():
        tiers = [name for name in pool.kv_cache.tiers if name in memories]
        told: set[str] = set()
        for number, replica in enumerate(numbered(pool_name, pool.count)):
            for at, above in enumerate(tiers):
                below = tiers[at + 1] if at + 1 < len(tiers) and memories[tiers[at + 1]].write == BACK else ""
                key = pool_name, number
                goes_to = below, instance[below][key] if below else -1
                first, *other = below_of.setdefault((above, instance[above][key]), (replica, *goes_to))
                if tuple(other) != goes_to and above not in told:
                    told.add(above)
                    yield _fork(pool_name, at, above, below or str(other[0]), (first, replica))


def _fork(pool: str, at: int, above: str, below: str, clients: tuple[str, str]) -> Located:
    message = f"{clients[0]} and {clients[1]} share {above}, and not the memory that takes what it evicts"
    hint = f"give {below} write: through; or let the same clients share {above} and {below}, in the same tiers"
    return ("clients", pool, "kv_cache", "tiers", at), Problem(message, hint=hint)


def _instances(
    name: str, section: Memory, pools: Mapping[str, Pool], placement: Placement | None
) -> dict[tuple[str, int], int]:
    """The instance of the memory `name` that each replica has, by pool and number."""
    users = [(n, i) for n, pool in pools.items() if name in pool.kv_cache.tiers for i in range(pool.count)]
    if section.per in ("node", "rack") and placement is None:
        return dict.fromkeys(users, 0)  # refused already
    groups = shared(section, [where(placement, *user) for user in users])
    return {users[i]: group for group, members in enumerate(groups) for i in members}
