"""What a user may write of memories outside the devices, and of the tiers that the clients of a pool see.

A part of the schema: the values of the scenario's `memories`, and keys of a pool's `kv_cache`. A validated `Memory`
says what one instance is and who shares it. It never counts instances: they follow from the placement of clients.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import replace
from math import inf
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mist.errors import Problem, nearest
from mist.memory.tier import BACK, THROUGH, MemoryTier
from mist.scenario.catalogued import Catalogued
from mist.scenario.named import Located, Section, Spec, SpecOf, problem
from mist.scenario.quantities import Bandwidth, Latency, Size
from mist.units import GB, GIB, parse_bytes, parse_bytes_per_s, parse_time_ns

Count = Annotated[int, Field(ge=1, le=2**40)]


class Memory(Section):
    """A memory outside the devices: an entry of the catalogue, figures of one's own, or both, and how it is used."""

    memory: Annotated[MemoryTier, Catalogued("memories")] | None = None
    """a memory: a name of `mist list memories`, the path of a YAML file, or a mapping"""
    capacity: Size | None = None
    """bytes that one instance holds, such as 512 GiB; left out, the memory's"""
    bandwidth: Bandwidth | None = None
    """bytes that all its readers together get, such as 200 GB/s; left out, the memory's"""
    write_bandwidth: Bandwidth | None = None
    """bytes that can be written; left out, the memory's, else as reading"""
    latency: Latency | None = None
    """time of each read besides, such as 80 us; left out, the memory's"""
    per: Literal["client", "node", "rack", "cluster"] | None = None
    """who shares one instance; left out, as many clients as the memory's entry says, or each client has its own"""
    shared_by: Count | None = None
    """clients that share one instance, in their order, in place of `per`"""
    eviction: Annotated[Spec, SpecOf("eviction")] = Field(default="lru", validate_default=True)
    """what goes when it is full: an eviction policy, such as {ttl: {ttl_s: 600}}"""
    hit_rate: Annotated[float, Field(ge=0, le=1)] | None = None
    """share of the requests that missed the tiers before it which find the workload's `cached_tokens` here"""
    compression: Annotated[float, Field(ge=1, le=1000)] = 1.0
    """bytes of KV cache per byte stored and sent"""
    decode_bandwidth: Bandwidth | None = None
    """bytes of KV cache that are decoded in a second, if it is compressed; left out, that takes no time"""
    chunk_tokens: Count | None = None
    """tokens that are stored and hit together, 256 for LMCache and vLLM's offloading; left out, those of a hash"""
    write: Literal["through", "back"] = THROUGH
    """when it is filled: through, as soon as a prompt is computed; back, when the memory above it evicts"""

    @classmethod
    def conflicts(cls, given: Set[str]) -> Iterator[Located]:
        """Figures without a memory must be complete, and keys that nothing reads aren't taken."""
        if "memory" not in given:
            for key in sorted({"capacity", "bandwidth", "latency"} - given):
                yield (), Problem(f"{key} is missing", hint="memory: ddr5; or capacity, bandwidth and latency")
        if {"per", "shared_by"} <= given:
            yield ("shared_by",), Problem("per and shared_by are both given", hint="keep one of them")
        if "decode_bandwidth" in given and "compression" not in given:
            yield ("decode_bandwidth",), Problem("nothing is compressed", hint="such as compression: 3.5")
        for key in sorted({"eviction", "chunk_tokens", "write"} & given if "hit_rate" in given else ()):
            message = f"hit_rate says what is found, so {key} is of no use"
            yield (key,), Problem(message, hint=f"remove hit_rate or {key}")

    def describe(self, name: str) -> str:
        """In words: `1.0 TiB at 307.2 GB/s, lru, one per node`."""
        tier = self.tier(name)
        each = f"one for {tier.shared_by} clients" if tier.shared_by > 1 else "one per client"
        finds = self.eviction.name if self.hit_rate is None else f"hit rate {self.hit_rate:g}"
        packed = f", {self.compression:g} times compressed" if self.compression > 1 else ""
        size, rate = tier.capacity_bytes / GIB, tier.bytes_per_s / GB
        return f"{size:,.4g} GiB at {rate:,.4g} GB/s{packed}, {finds}, {f'one per {self.per}' if self.per else each}"

    def tier(self, name: str) -> MemoryTier:
        """The memory called `name`, with all that the user says of it."""
        base = self.memory or MemoryTier(name, 0, inf)
        figures: dict[str, Any] = {
            "capacity_bytes": self.capacity and parse_bytes(self.capacity),
            "bytes_per_s": self.bandwidth and parse_bytes_per_s(self.bandwidth),
            "write_bytes_per_s": self.write_bandwidth and parse_bytes_per_s(self.write_bandwidth),
            "latency_ns": parse_time_ns(self.latency) if self.latency else None,
            "shared_by": self.shared_by,
        }
        return replace(
            base,
            name=name,
            eviction=self.eviction.build,
            hit_rate=self.hit_rate,
            compression=self.compression,
            decode_bytes_per_s=parse_bytes_per_s(self.decode_bandwidth) if self.decode_bandwidth else inf,
            chunk_tokens=self.chunk_tokens or 0,
            write=self.write,
            **{key: value for key, value in figures.items() if value is not None},
        )


class TierSettings(Section):
    """Which memories stand behind a KV cache; part of a pool's `kv_cache`."""

    tiers: list[Annotated[str, Field(min_length=1, max_length=200)]] = []  # noqa: RUF012
    """names of `memories`, nearest first"""
    fetch: Literal["estimate", "always"] = "estimate"
    """whether what a tier has is fetched: where that is estimated to be sooner than computing it, or always"""
    layerwise: bool = False
    """fetch layer by layer, while the layers before are computed"""

    @model_validator(mode="after")
    def _has_tiers(self) -> TierSettings:
        unused = [key for key in ("fetch", "layerwise") if getattr(self, key) != type(self).model_fields[key].default]
        if unused and not self.tiers:
            raise problem(f"{unused[0]} is for tiers, and there are none", "such as tiers: [host]", (unused[0],))
        return self


def misfits(tiers: Sequence[str], memories: Mapping[str, Memory]) -> Iterator[Located]:
    """What is wrong with the tiers of a pool in view of the scenario's memories, located below `tiers`."""
    for at, name in enumerate(tiers):
        if name not in memories:
            yield (at,), Problem(f"there is no memory {name!r}", hint=nearest(name, memories))
        elif name in tiers[:at]:
            yield (at,), Problem(f"{name} is here twice", hint="name each memory once, the nearest first")
    known = [(at, memories[name]) for at, name in enumerate(tiers) if name in memories]
    rated = [memory.hit_rate is not None for _, memory in known]
    if any(rated) and not all(rated):
        at, hint = known[rated.index(False)][0], "give hit_rate for all tiers of a pool or for none"
        yield (at,), Problem(f"{tiers[at]} has no hit_rate, and other tiers have", hint=hint)
    above: int | None = None
    for at, memory in known:
        if memory.write == BACK and at and memory.chunk_tokens != above:
            message = f"{tiers[at]} takes what {tiers[at - 1]} evicts, in chunks of another size"
            yield (at,), Problem(message, hint="give both the same chunk_tokens, or write: through")
        above = memory.chunk_tokens
