"""What each memory outside the devices held, found, and moved: per memory as the user named it, its instances together.

Bytes that moved are sums over the transfer table; what was looked for and found is counted by the tiers as they are
asked. It covers the whole run, whatever the window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mist.metrics.clients import ratio
from mist.metrics.window import Columns
from mist.records import KV_WRITE, PREFIX_FETCH


@dataclass(frozen=True, slots=True)
class MemoryInfo:
    """One instance: the scenario's `name` for it, its number in transfers, and its counts at the end of the run.

    `hits` and `misses`: units of prompts that share a hash, or requests where the workload states hits. Bytes as they
    are stored.
    """

    name: str
    index: int
    hits: int
    misses: int
    held_bytes: int
    evicted_bytes: int


def summarise_memories(memories: Sequence[MemoryInfo], transfers: Columns) -> dict[str, dict[str, Any]]:
    """Figures by name; `fetched_bytes` and `written_bytes` are those that arrived."""
    there = transfers["end_ns"] >= 0
    fetched, written = (there & (transfers["kind"] == kind) for kind in (PREFIX_FETCH, KV_WRITE))
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(memory.name for memory in memories):
        mine = [memory for memory in memories if memory.name == name]
        numbers = [memory.index for memory in mine]
        hits, misses = sum(memory.hits for memory in mine), sum(memory.misses for memory in mine)
        found[name] = {
            "instances": len(mine),
            "hits": hits,
            "misses": misses,
            "hit_rate": ratio(hits, hits + misses),
            "held_bytes": sum(memory.held_bytes for memory in mine),
            "fetched_bytes": int(transfers["bytes"][fetched & np.isin(transfers["sender"], numbers)].sum()),
            "written_bytes": int(transfers["bytes"][written & np.isin(transfers["receiver"], numbers)].sum()),
            "evicted_bytes": sum(memory.evicted_bytes for memory in mine),
        }
    return found
