"""A memory tier outside the devices: host DRAM, CXL, NVMe, a rack's or a remote store, and what it holds of prompts.

`MemoryTier` says what a memory is, `Tier` is one instance of it, which many clients may share: the hierarchy of each
client asks it what it has and tells it what to keep. It never moves a byte, and shares its bandwidth with nobody: the
transfers that fill and read it are flows of the network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from math import ceil, inf
from typing import Any, Final, Literal, NamedTuple

from mist.hardware import MappingReader
from mist.memory.eviction import Eviction
from mist.memory.eviction.lru import LRU
from mist.units import NS_PER_S

#: when a tier gets what was computed: at once, or when the memory above it gives it up
THROUGH: Final = "through"
BACK: Final = "back"


@dataclass(frozen=True, slots=True)
class MemoryTier:
    """A memory as data sheets and operators describe it; rates in bytes per second.

    `bytes_per_s`, shared by all who read at once, and `write_bytes_per_s` (None: the same); `latency_ns` of each read.
    `link_bytes_per_s`, `link_latency_ns`: what lies between the memory and each of its clients; None leaves it to the
    device's own link to its host. `shared_by`: clients that share one instance where the user doesn't say.
    `compression`: bytes of KV cache per byte that is stored and sent (CacheGen: 3.5 to 4.3, arXiv 2310.07240); what was
    read is decoded at `decode_bytes_per_s` of KV cache. `chunk_tokens`: only whole chunks are stored and hit (LMCache
    and vLLM's offloading: 256 tokens); 0 stands for the workload's own hash unit. `hit_rate`: of the requests that
    missed the tiers before this one, in place of content. `write`: "through" or "back".
    """

    name: str
    capacity_bytes: int
    bytes_per_s: float
    latency_ns: int = 0
    write_bytes_per_s: float | None = None
    link_bytes_per_s: float | None = None
    link_latency_ns: int = 0
    shared_by: int = 1
    aliases: tuple[str, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict)
    eviction: Callable[[], Eviction] = LRU
    hit_rate: float | None = None
    compression: float = 1.0
    decode_bytes_per_s: float = inf
    chunk_tokens: int = 0
    write: Literal["through", "back"] = THROUGH

    def stored_bytes(self, num_bytes: int) -> int:
        """Bytes that `num_bytes` of KV cache take here and on the wire."""
        return num_bytes if self.compression == 1 else ceil(num_bytes / self.compression)

    def fetch_ns(self, num_bytes: int) -> int:
        """How long a client that reads alone waits for `num_bytes` of KV cache, ns.

        L + (S/c) / min(B, link) + S/decode rate: latency, wire, then decoding; without compression the L + S/B of
        `hierarchy.expected_ns`.
        """
        rate = min(self.bytes_per_s, self.link_bytes_per_s or inf)
        transfer_s = self.stored_bytes(num_bytes) / rate + num_bytes / self.decode_bytes_per_s
        return self.access_ns + round(transfer_s * NS_PER_S)

    @property
    def access_ns(self) -> int:
        """Time until the first byte of a read is with the client, ns."""
        return self.latency_ns + self.link_latency_ns

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any]) -> MemoryTier:
        """A memory from a catalogue file or a user's YAML: the figures of the hardware, not how it is used.

        ScenarioError lists every key that is unknown, missing or out of range.
        """
        use = {"eviction", "hit_rate", "compression", "decode_bytes_per_s", "chunk_tokens", "write"}
        required = ("name", "capacity_bytes", "bytes_per_s")
        reader = MappingReader(data, {f.name for f in fields(cls)} - use, required)
        values: dict[str, Any] = {key: reader.quantity(key, low) for key, low in _QUANTITIES.items() if key in data}
        if "shared_by" in values:
            values["shared_by"] = int(values["shared_by"] or 1)
        values["name"] = str(data.get("name", ""))
        values["aliases"] = tuple(str(alias) for alias in data.get("aliases") or ())
        values["sources"] = {str(k): str(v) for k, v in (data.get("sources") or {}).items()}
        reader.finish()
        return cls(**values)


_QUANTITIES = {
    "capacity_bytes": 1, "bytes_per_s": 1, "write_bytes_per_s": 1, "latency_ns": 0, "link_bytes_per_s": 1,
    "link_latency_ns": 0, "shared_by": 1,
}  # fmt: skip


class Write(NamedTuple):
    """Entries on their way into a tier together, as `num_bytes` stored bytes."""

    number: int
    keys: tuple[int, ...]
    num_bytes: int


class Tier:
    """One instance of a memory: which chunks of prompts it holds, by their chained keys, and their bytes.

    `unit_tokens` tokens share one key of the workload. An *entry* is a unit, or the chunk of several units that
    `chunk_tokens` asks for, named by its last key; chunks are counted from a prompt's front. Laws: held = inserted -
    evicted <= capacity.

    Where writes take time (`takes_time`), an entry has its room from the start of its write on and is found from its
    end on (`begin_write`, `written`); one that has to make room meanwhile is lost, and goes to no memory below.

    An entry whose prompt lost its head can't be reached, so the tail goes first: of entries that are used at the same
    instant the head counts as the last one used, and what a prompt has here is used with it, also what the device
    found in its own cache. Nothing enforces it under a policy that looks at more than uses and their order.
    """

    __slots__ = (
        "_entries", "_new", "_new_bytes", "_num_writes", "_pending", "_policy", "entry_tokens", "entry_units",
        "evicted_bytes", "held_bytes", "hits", "inserted_bytes", "misses", "on_evict", "spec", "takes_time",
    )  # fmt: skip

    def __init__(self, spec: MemoryTier, unit_tokens: int = 0) -> None:
        """ValueError unless a chunk is a whole number of units, or a unit of chunks; `unit_tokens` 0: no content."""
        entry, part = max(spec.chunk_tokens, unit_tokens), min(spec.chunk_tokens or unit_tokens, unit_tokens)
        if part and entry % part:
            raise ValueError(f"chunk_tokens is {spec.chunk_tokens}: neither a multiple nor a part of {unit_tokens}")
        self.spec = spec
        self.entry_units = entry // unit_tokens if unit_tokens else 1
        self.entry_tokens = entry
        self._policy = spec.eviction()
        #: key -> bytes of KV cache, before compression
        self._entries: dict[int, int] = {}
        #: told (key, bytes of KV cache, now) of every entry that has to make room; what expires is gone
        self.on_evict: Callable[[int, int, int], object] | None = None
        #: stored bytes, and units that were asked for
        self.held_bytes = self.inserted_bytes = self.evicted_bytes = 0
        self.hits = self.misses = 0
        self.takes_time = False
        #: entries whose write isn't over -> its number; those of the next write, and its bytes
        self._pending: dict[int, int] = {}
        self._new: list[int] = []
        self._new_bytes = self._num_writes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: int) -> bool:
        return key in self._entries and key not in self._pending

    def lookup(self, keys: Sequence[int], start: int, now: int, *, again: bool = False) -> int:
        """How many consecutive units from `start` on are here, of the prompt of `keys`; what is here of it is used.

        `again`: it was looked for before, and isn't counted a second time. Entries count whole: one that `start` lies
        in gives the units behind it.
        """
        self._expire(now)
        size = self.entry_units
        found = self.count_units(keys, start)
        entries, touch = self._entries, self._policy.touch
        for key in reversed(keys[size - 1 : (start + found) // size * size : size]):
            if key in entries:
                touch(key, now)
        if not again:
            self.hits += found
            self.misses += max(0, len(keys) - start - found)
        return found

    def count_units(self, keys: Sequence[int], start: int) -> int:
        """What `lookup` gives, but nothing counts as used or asked for."""
        size = self.entry_units
        first = end = start // size
        while (end + 1) * size <= len(keys) and keys[(end + 1) * size - 1] in self:
            end += 1
        return end * size - start if end > first else 0

    def insert(self, keys: Sequence[int], num_units: int, token_bytes: int, now: int) -> int:
        """Write the whole entries among the first `num_units` units of a prompt that aren't here; the stored bytes.

        Where not all of them fit into the tier, the head is kept. A prompt that comes in pieces is given from its front
        each time.
        """
        chunks = keys[self.entry_units - 1 : num_units : self.entry_units]
        return self._put(chunks, self.entry_tokens * token_bytes, now)

    def write_back(self, key: int, num_bytes: int, now: int) -> int:
        """Take an entry of `num_bytes` of KV cache that the memory above gives up; bytes stored, 0 if it is here."""
        return self._put((key,), num_bytes, now)

    def begin_write(self) -> Write:
        """All that came in since the last call, to be sent here now; it is found once `written` gets it back."""
        write = Write(self._num_writes, tuple(self._new), self._new_bytes)
        self._num_writes += 1
        self._new, self._new_bytes = [], 0
        return write

    def written(self, write: Write) -> None:
        """The bytes of `write` are here."""
        for key in write.keys:
            if self._pending.get(key) == write.number:
                del self._pending[key]

    def count_pending_bytes(self) -> int:
        """Stored bytes of entries whose write isn't over (for the ledger)."""
        return sum(self.spec.stored_bytes(self._entries[key]) for key in self._pending)

    def count_held_bytes(self) -> int:
        """Stored bytes, counted anew: equals `held_bytes` (for the ledger)."""
        return sum(map(self.spec.stored_bytes, self._entries.values()))

    def _put(self, keys: Sequence[int], num_bytes: int, now: int) -> int:
        self._expire(now)
        if not keys:
            return 0
        stored = self.spec.stored_bytes(num_bytes)
        keys = keys[: self.spec.capacity_bytes // stored]
        missing = len(keys) - sum(map(self._entries.__contains__, keys))
        own = frozenset(keys) if self.held_bytes + missing * stored > self.spec.capacity_bytes else ()
        while self.held_bytes + missing * stored > self.spec.capacity_bytes:
            victim = self._policy.evict(now, full=True)
            assert victim is not None
            is_told = self.on_evict is not None and victim in self
            num_victim_bytes = self._drop(victim)
            if victim in own:  # it comes back with the others, its uses counted anew
                missing += 1
            elif is_told and self.on_evict is not None:
                self.on_evict(victim, num_victim_bytes, now)
        entries, touch = self._entries, self._policy.touch
        for key in reversed(keys):
            if key not in entries:
                self._enter(key, num_bytes, stored)
            touch(key, now)
        self.held_bytes += missing * stored
        self.inserted_bytes += missing * stored
        return missing * stored

    def _enter(self, key: int, num_bytes: int, stored: int) -> None:
        self._entries[key] = num_bytes
        if self.takes_time:
            self._pending[key] = self._num_writes
            self._new.append(key)
            self._new_bytes += stored

    def _expire(self, now: int) -> None:
        while (key := self._policy.evict(now, full=False)) is not None:
            self._drop(key)

    def _drop(self, key: int) -> int:
        num_bytes = self._entries.pop(key)
        self._pending.pop(key, None)
        stored = self.spec.stored_bytes(num_bytes)
        self.held_bytes -= stored
        self.evicted_bytes += stored
        return num_bytes
