"""KV caches outside device memory at work: prefixes are fetched before a client computes, and written once it has.

Between a client's front end, which waits for what is fetched, and the network that carries it. It chooses whether to
fetch, never what a memory holds or who goes, and nothing waits for what it writes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, inf
from typing import TYPE_CHECKING, Any

import numpy as np

from mist.memory.hierarchy import Found, Hierarchy, exposed_ns
from mist.memory.tier import BACK, Tier, Write
from mist.network import Network
from mist.records import KV_WRITE, PREFIX_FETCH
from mist.request import Request, Step, Task
from mist.sharing import duration_ns
from mist.units import NS_PER_S

if TYPE_CHECKING:
    from mist.client import Client


@dataclass(slots=True, eq=False)
class Memory:
    """One instance of a memory in a run: `index` is its number in transfers (`Records.memory_names`), below 0.

    `always`: what a KV store finds is fetched whatever that is estimated to take.
    """

    index: int
    tier: Tier
    always: bool = False

    def __post_init__(self) -> None:
        self.tier.takes_time = True

    def goes_by_statement(self, request: Request) -> bool:
        """Whether what it has of the request's prompt is the workload's word, not its content.

        A tier is asked so by its `hit_rate`; a KV store, which the request knows, wherever the workload states hits.
        """
        is_asked = request.store == self.index
        return self.tier.spec.hit_rate is not None or (is_asked and request.hit_tokens > 0)


@dataclass(slots=True, eq=False)
class Fetch:
    """What `task` waits for before it may be computed: stretches under way or being decoded, and whom to tell."""

    task: Task
    first_token: int
    num_tokens: int
    num_open: int
    deliver: Callable[[Task, int], None]


@dataclass(slots=True, eq=False)
class _Stretch:
    """A piece of a fetch: tokens of KV cache from one memory; `later_bytes` follow while the task is computed."""

    fetch: Fetch
    memory: Memory
    decode_ns: int
    later_bytes: int


class KVStore:
    """The memory of a client that is a KV store: it says how much of a prompt's front it has.

    By content, or where the workload states hits by draws of the request's own generator: `hit_rate` of the memory, and
    every time without one.
    """

    def __init__(self, memory: Memory, unit_tokens: int, rng_of: Callable[[int], np.random.Generator]) -> None:
        self.memory = memory
        self._unit_tokens = unit_tokens
        self._rng_of = rng_of

    def find(self, task: Task, now: int) -> int:
        """Tokens at the front of the prompt that are here, of those that the task asks for; its request knows where."""
        request, tier = task.request, self.memory.tier
        request.store = self.memory.index
        wanted = task.stage.input_tokens
        if self.memory.goes_by_statement(request):
            rate = tier.spec.hit_rate
            found = min(wanted, request.hit_tokens)
            if rate is not None and self._rng_of(request.index).random() >= rate:
                found = 0
            tier.hits += found > 0
            tier.misses += found == 0
            return found
        if not self._unit_tokens:
            return 0
        keys = request.block_keys[: min(wanted, request.input_tokens) // self._unit_tokens]
        return tier.lookup(keys, 0, now) * self._unit_tokens


class Offload:
    """The memories that one client reaches: its own tiers, nearest first, and the KV stores of the run by index.

    `always`: fetch what the tiers have; else where the prefill is estimated to end sooner. `num_layers` above 1: a task
    may be computed once so much is there that the other layers arrive while the layers before them are computed.
    """

    def __init__(
        self,
        client: Client,
        network: Network,
        hierarchy: Hierarchy,
        memories: Sequence[Memory],
        *,
        stores: Mapping[int, Memory] | None = None,
        always: bool = False,
        num_layers: int = 1,
    ) -> None:
        self.hierarchy = hierarchy
        #: tasks whose prefix is under way or being decoded
        self.fetching: dict[Task, Fetch] = {}
        #: tasks that wait until there is room for what they fetch, in order: the blocks it takes, and whom to tell
        self.waiting: dict[Task, tuple[int, Callable[[Task, int], None]]] = {}
        #: blocks that what is fetched, or under way, will take at the admission of its task
        self._to_take: dict[Task, int] = {}
        self._num_to_take = 0
        self._client = client
        self._network = network
        self._memories = tuple(memories)
        self._stores = stores or {}
        self._of_tier = {memory.tier: memory for memory in (*memories, *self._stores.values())}
        self._always = always
        self._num_layers = num_layers
        #: keys of units that the device gave up to the nearest tier, not written yet
        self.evicted: list[int] = []
        kv = client.residents.kv
        kv.holds_stated_hits = False
        client.residents.on_loss = client.front_end.fetch_again
        if hierarchy.takes_evicted:
            kv.on_evict = self.evicted.append

    @property
    def tasks(self) -> list[Task]:
        """Tasks whose prefix is under way, or will be."""
        return [*self.fetching, *self.waiting]

    @property
    def memories(self) -> list[Memory]:
        """All that it may fetch from and write to."""
        return list(self._of_tier.values())

    def keys(self, memory: Memory, task: Task, num_tokens: int) -> Sequence[int]:
        """What `memory` calls the whole units in the first `num_tokens` of the prompt."""
        is_store = memory.index in self._stores
        return (self.hierarchy.prompt_keys if is_store else self.hierarchy.keys)(task, num_tokens)

    # --- fetching ---

    def fetch(self, task: Task, deliver: Callable[[Task, int], None], now: int) -> bool:
        """Fetch what is worth it of the front of `task`'s prompt; False if nothing is, else `deliver` comes at its end.

        What the device has itself isn't fetched; a task counts what came as found where the device still has that.
        A fetch begins once there is room: blocks in use and those of all that is fetched for tasks that aren't
        admitted fit into the device together. Until then it waits behind others, and so do tasks that came later.
        A task that is in the queue already is asked for again: what came for it is no use any more.
        """
        self.admitted(task)
        task.found_tokens = 0
        first, found = self._look(task, now)
        if not found:
            return False
        is_back = task not in self._client.front_end.incoming
        num_blocks = self._blocks(first, found)
        if self._others_come_first(task, is_back) or not self._has_room(num_blocks):
            later = [] if not is_back else [each for each in self.waiting if not self._is_back(each)]
            self.waiting[task] = num_blocks, deliver
            for each in later:
                self.waiting[each] = self.waiting.pop(each)
            self._tell_who_waits()
        else:
            self._begin(task, first, found, deliver, now)
        return True

    def has_room_for_first(self) -> bool:
        """Whether the first that waits may begin."""
        for num_blocks, _ in self.waiting.values():
            return self._has_room(num_blocks)
        return False

    def begin_waiting(self, now: int) -> None:
        """Blocks may have come back: let the fetches begin that there is room for, in the client's order."""
        while self.waiting:
            task = self._first_waiting()
            num_blocks, deliver = self.waiting[task]
            if not self._has_room(num_blocks):
                break
            first, found = self._look(task, now, again=True)
            num_blocks = self._blocks(first, found)
            if found and not self._has_room(num_blocks):
                self.waiting[task] = num_blocks, deliver
                break
            del self.waiting[task]
            if found:
                self._begin(task, first, found, deliver, now)
            else:
                deliver(task, now)
        self._tell_who_waits()

    def admitted(self, task: Task) -> None:
        """`task` has blocks of its own for what was fetched."""
        self._num_to_take -= self._to_take.pop(task, 0)

    def forget(self, task: Task) -> None:
        """`task` was cancelled: what it waits for isn't fetched any more; what is under way still needs its room."""
        self.waiting.pop(task, None)
        if task not in self.fetching:
            self.admitted(task)

    def clear(self) -> None:
        """Nobody here waits for anything any more, and the device has nothing to give up."""
        self.fetching.clear()
        self.waiting.clear()
        self._to_take.clear()
        self._num_to_take = 0
        self.evicted.clear()

    def _first_waiting(self) -> Task:
        ranks = self._client.residents.ranks
        return next(iter(self.waiting)) if ranks is None else min(self.waiting, key=ranks.of)

    def _is_back(self, task: Task) -> bool:
        """Whether `task` has been the first in the queue: it comes before those that have not, in order of coming."""
        return self._client.front_end.incoming.get(task, True)

    def _tell_who_waits(self) -> None:
        first = self._first_waiting() if self.waiting else None
        self._client.residents.fetch_waits(first, is_back=first is not None and self._is_back(first))

    def _others_come_first(self, task: Task, is_back: bool) -> bool:
        ranks = self._client.residents.ranks
        if not self.waiting:
            return False
        first = self._first_waiting()
        if ranks is not None:
            return ranks.of(first) < ranks.of(task)
        return self._is_back(first) or not is_back

    def _blocks(self, first_token: int, found: Sequence[Found]) -> int:
        kv = self._client.residents.kv
        return kv.blocks_for(first_token + sum(tokens for _, tokens in found)) - kv.blocks_for(first_token)

    def _has_room(self, num_blocks: int) -> bool:
        kv = self._client.residents.kv
        return self._num_to_take + num_blocks <= kv.free + kv.cached

    def _look(self, task: Task, now: int, *, again: bool = False) -> tuple[int, list[Found]]:
        """Tokens that the device has, and the stretches to fetch behind them."""
        task.found_from = device = self._client.residents.kv.match(task).num_tokens
        return device, self._found(task, device, now, again)

    def _begin(
        self, task: Task, first: int, found: Sequence[Found], deliver: Callable[[Task, int], None], now: int
    ) -> None:
        num_tokens = sum(tokens for _, tokens in found)
        fetch = self.fetching[task] = Fetch(task, first, num_tokens, len(found), deliver)
        self._to_take[task] = num_blocks = self._blocks(first, found)
        self._num_to_take += num_blocks
        if self._client.watcher is not None:
            self._client.watcher.fetches(self._client, task, first, found, now)
        share = self._exposed(task, first, found)
        for tier, tokens in found:
            self._send(fetch, self._of_tier[tier], tokens, share, now)

    def _found(self, task: Task, num_device_tokens: int, now: int, again: bool) -> list[Found]:
        """The stretches to fetch behind what the device has, in order."""
        found = self.hierarchy.find(task, num_device_tokens, now, again=again)
        tokens = num_device_tokens + sum(found_tokens for _, found_tokens in found)
        store = self._stores.get(task.request.store)
        always = self._always
        if store is not None:
            in_store = min(self._in_store(task, store), task.target_tokens - 1)
            always = store.always and (always or not found)
            if in_store > tokens:
                found.append(Found(store.tier, in_store - tokens))
        if always or not found:
            return found

        def recompute_ns(num_fetched: int) -> int:
            return prefill_ns(self._client, num_device_tokens + num_fetched, task.target_tokens)

        return self.hierarchy.worth_fetching(found, recompute_ns, self._fetch_ns, self._num_layers)

    def _in_store(self, task: Task, store: Memory) -> int:
        """Tokens that the store found of the prompt and still has."""
        found = task.stage.found_tokens
        if store.goes_by_statement(task.request):
            return found
        unit = self.hierarchy.unit_tokens
        return min(found, store.tier.count_units(self.hierarchy.prompt_keys(task, found), 0) * unit) if unit else 0

    def _fetch_ns(self, tier: Tier, num_bytes: int) -> tuple[int, int]:
        """Latency, and an estimate of the rest of a fetch of `num_bytes` of KV cache beside those under way."""
        path = self._network.path(self._of_tier[tier].index, self._client.index)
        rate = min((channel.capacity_per_s / (channel.num_flows + 1) for channel in path.channels), default=inf)
        wire = duration_ns(tier.spec.stored_bytes(num_bytes), rate) if rate < inf else 0
        return path.latency_ns, wire + _decode_ns(tier, num_bytes)

    def _exposed(self, task: Task, num_device_tokens: int, found: Sequence[Found]) -> Fraction:
        """The share of the fetch that the task waits for: all, or what can't arrive while layers are computed."""
        if self._num_layers == 1:
            return Fraction(1)
        token_bytes = self.hierarchy.token_bytes
        transfer = sum(self._fetch_ns(tier, tokens * token_bytes)[1] for tier, tokens in found)
        first = num_device_tokens + sum(tokens for _, tokens in found)
        compute = prefill_ns(self._client, first, task.target_tokens)
        return Fraction(exposed_ns(transfer, compute, self._num_layers), transfer) if transfer else Fraction(1)

    def _send(self, fetch: Fetch, memory: Memory, num_tokens: int, share: Fraction, now: int) -> None:
        """Send `num_tokens`, those of `share` first, in whole tokens."""
        spec, token_bytes = memory.tier.spec, self.hierarchy.token_bytes
        num_bytes, first_bytes = num_tokens * token_bytes, ceil(num_tokens * share) * token_bytes
        stored, first = spec.stored_bytes(num_bytes), spec.stored_bytes(first_bytes)
        stretch = _Stretch(fetch, memory, _decode_ns(memory.tier, first_bytes), stored - first)
        request = fetch.task.request.index
        self._network.send(request, PREFIX_FETCH, memory.index, self._client.index, first, self._came, stretch, now)

    def _came(self, stretch: _Stretch, now: int) -> None:
        if stretch.later_bytes:
            request = stretch.fetch.task.request.index
            self._network.send(request, PREFIX_FETCH, stretch.memory.index, self._client.index, stretch.later_bytes,
                               _nobody_waits, None, now)  # fmt: skip
        if stretch.decode_ns:
            self._client.kernel.at(now + stretch.decode_ns, self._is_there, stretch.fetch)
        else:
            self._is_there(stretch.fetch, now)

    def _is_there(self, fetch: Fetch, now: int) -> None:
        if self.fetching.get(fetch.task) is not fetch:
            return  # lost with the client while it was decoded
        fetch.num_open -= 1
        if not fetch.num_open:
            task = fetch.task
            del self.fetching[task]
            task.found_tokens = fetch.first_token + fetch.num_tokens
            if task not in self._client.front_end.incoming:
                self.admitted(task)  # it was cancelled: nobody comes for it
                self.begin_waiting(now)
            fetch.deliver(task, now)

    # --- writing ---

    def computed(self, task: Task, now: int) -> None:
        """The prompt of `task` is computed: tiers that are written through get it, and the store that it asked."""
        self.hierarchy.write_through(task, task.target_tokens, now)
        store = self._stores.get(task.request.store)
        if store is not None and not store.goes_by_statement(task.request):
            keys = self.hierarchy.prompt_keys(task, task.target_tokens)
            store.tier.insert(keys, len(keys), self.hierarchy.token_bytes, now)
            self._write(task.request, self._client.index, store, now)
        self._write_tiers(task.request, now)

    def write_back(self, request: Request, now: int) -> None:
        """Send what the device evicted to make room for `request`, as far as anybody can tell."""
        for key in self.evicted:
            self.hierarchy.write_back(key, now)
        self.evicted.clear()
        self._write_tiers(request, now)

    def _write_tiers(self, request: Request, now: int) -> None:
        """Send what came into the tiers: from the client, or from the memory above one that is written back to."""
        above = self._client.index
        for memory in self._memories:
            self._write(request, above if memory.tier.spec.write == BACK else self._client.index, memory, now)
            above = memory.index

    def _write(self, request: Request, sender: int, memory: Memory, now: int) -> None:
        write = memory.tier.begin_write()
        if write.num_bytes:
            deliver, argument = _is_written, (memory.tier, write)
            self._network.send(request.index, KV_WRITE, sender, memory.index, write.num_bytes, deliver, argument, now)


def _decode_ns(tier: Tier, num_bytes: int) -> int:
    """What it takes to decode `num_bytes` of KV cache."""
    return round(num_bytes / tier.spec.decode_bytes_per_s * NS_PER_S)


def _is_written(written: tuple[Tier, Write], now: int) -> None:
    """What was written to a tier is there."""
    tier, write = written
    tier.written(write)


def _nobody_waits(_: Any, now: int) -> None:
    """What goes on in the background ends."""


def prefill_ns(client: Client, context: int, target: int) -> int:
    """An estimate of how long `client` takes alone to compute the tokens from `context` to `target` of a prompt, ns.

    Of several full chunks only the first and the last are priced; the others are taken to lie between them.
    """
    size = max(1, client.batching.max_num_batched_tokens)
    full, rest = divmod(max(0, target - context), size)
    ends = [_chunk_ns(client, size, context)] if full else []
    if full > 1:
        ends.append(_chunk_ns(client, size, context + (full - 1) * size))
    total = full * sum(ends) // len(ends) if ends else 0
    return total + (_chunk_ns(client, rest, target - rest) if rest else 0)


def _chunk_ns(client: Client, num_tokens: int, context: int) -> int:
    step = Step(0, 0, [(num_tokens, context)], num_tokens, 1, 1 + client.num_drafts)
    host, device = client.host_ns(step), client.perf.step_time(step)
    return max(host, device) if client.engine.overlapped else host + device
