"""The paged KV cache of one client: blocks by number, prefix content by hash, least recently used evicted first.

Blocks are interchangeable, so only their number is kept; content that may be hit again is kept as *entries*: a stretch
of a prompt's hashed units, or a request's own *run* of blocks behind them. It never picks a victim task.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

from mist.request import Task


class Hit(NamedTuple):
    """The front of a task's target that is in the cache: hashed units, then blocks of its own run.

    `num_unreferenced` of these blocks belong to nobody now: a hit takes them out of `available`.
    """

    num_tokens: int
    num_units: int
    num_run_blocks: int
    num_unreferenced: int


class _Run(NamedTuple):
    """Blocks that a preempted request left behind: the entry, the token it starts at, its full blocks."""

    entry: int
    start: int
    full_blocks: int


_MISS = Hit(0, 0, 0, 0)


class _Segment:
    """Units that follow each other in some prompt, and that the same sequences refer to: `num_users`.

    The first `num_units` of `keys` are cached. Its place among what can be evicted is that of each of them, its tail
    first: what one sequence released together, or what is left of it.
    """

    __slots__ = ("keys", "num_units", "num_users")

    def __init__(self, keys: tuple[int, ...], num_users: int) -> None:
        self.keys = keys
        self.num_units = len(keys)
        self.num_users = num_users

    def count_common(self, keys: tuple[int, ...], start: int, end: int) -> int:
        """How many of its units stand in `keys` from `start` on, before `end`."""
        own = self.keys
        low, high = 0, min(self.num_units, end - start)
        if own[high - 1] == keys[start + high - 1]:  # an equal key has an equal prefix
            return high
        while high - low > 1:  # the first `low` are the same, the first `high` aren't
            middle = (low + high) // 2
            if own[middle - 1] == keys[start + middle - 1]:
                low = middle
            else:
                high = middle
        return low


class KVCache:
    """`num_blocks` blocks of `block_size` tokens.

    Laws: free + cached + referenced = num_blocks; available = free + cached. `hash_block_size` tokens share one hash
    (a multiple of `block_size`, 0 where prompts have no hashes). Without `enable_prefix_caching` nothing outlives its
    release.

    Keys are chained, so of a prompt's units the first ones are cached, and of these the first ones referred to: a radix
    tree, whose edges are segments, found by the key that each begins with. A segment may have lost its tail, or branch
    anywhere, and is split only where a sequence refers to a part of it.

    vLLM v1's order is kept: units are indexed when their tokens are scheduled; a released sequence's blocks become
    evictable tail first; free blocks are used before cached content is evicted. Two things differ: a sequence that
    computes a unit which is in the cache already refers to that one and gives its own copy back, and other requests'
    content is hit in whole units only.
    """

    __slots__ = (
        "_dead", "_evictable", "_next_run", "_run_of", "_runs", "_segments", "block_size", "cached", "free",
        "hash_block_size", "holds_stated_hits", "num_blocks", "on_evict", "prefix_caching", "unit_blocks",
        "watermark_blocks",
    )  # fmt: skip

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        enable_prefix_caching: bool = False,
        hash_block_size: int = 0,
        watermark_blocks: int = 0,
    ) -> None:
        if hash_block_size % block_size:
            raise ValueError(f"hash_block_size {hash_block_size} is not a multiple of block_size {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.watermark_blocks = watermark_blocks
        self.prefix_caching = enable_prefix_caching
        self.hash_block_size = hash_block_size if enable_prefix_caching else 0
        self.unit_blocks = self.hash_block_size // block_size
        self.free = num_blocks
        self.cached = 0
        #: whether hits that the workload states are here, not in a memory behind
        self.holds_stated_hits = True
        #: told the key of every hashed unit that is evicted, a prompt's tail before its head; runs are nobody else's
        self.on_evict: Callable[[int], object] | None = None
        #: unreferenced segments, and runs by their ids -> blocks, least recently used first
        self._evictable: OrderedDict[_Segment | int, int] = OrderedDict()  # a dict rescans its deleted front
        #: the hashed units that are cached or referred to, by the first key of each segment
        self._segments: dict[int, _Segment] = {}
        #: request and context -> its run, while the request waits to resume; and whose each such entry is
        self._runs: dict[tuple[int, int], _Run] = {}
        self._run_of: dict[int, tuple[int, int]] = {}
        self._next_run = -1
        #: the newest entry that nobody looks for
        self._dead = 0

    @property
    def available(self) -> int:
        """Blocks that can be taken."""
        return self.free + self.cached

    @property
    def used(self) -> int:
        """Blocks that sequences refer to."""
        return self.num_blocks - self.free - self.cached

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` of one sequence."""
        return -(-num_tokens // self.block_size)

    def take(self, num_blocks: int) -> None:
        """Take `num_blocks` <= `available`, evicting cached content only where free blocks don't suffice."""
        if num_blocks > self.free:
            self._evict(num_blocks - self.free)
        self.free -= num_blocks

    def match(self, task: Task) -> Hit:
        """What the cache holds of the front of `task`'s target; at least one token is left to compute."""
        if not self.prefix_caching:
            return _MISS
        most = task.target_tokens - 1
        units = unreferenced = run_blocks = 0
        if self.unit_blocks:
            keys, segments = task.prompt_keys, self._segments
            end = min(len(keys), min(most, task.keyed_tokens) // self.hash_block_size)
            while units < end and (segment := segments.get(keys[units])) is not None:
                common = segment.count_common(keys, units, end)
                if not segment.num_users:
                    unreferenced += common * self.unit_blocks
                units += common
        tokens = units * self.hash_block_size
        run = self._runs.get(task.run) if self._runs else None
        if run is not None and run.start == tokens:
            run_blocks = min(run.full_blocks, self._evictable[run.entry], (most - tokens) // self.block_size)
        return Hit(tokens + run_blocks * self.block_size, units, run_blocks, unreferenced + run_blocks)

    def stated_hit(self, task: Task) -> int:
        """Tokens of `task`'s target that the workload says are cached; at least one token is left to compute."""
        num_tokens = task.request.hit_tokens
        if not num_tokens or not (self.prefix_caching and self.holds_stated_hits and task.reads_prompt):
            return 0
        return min(num_tokens, task.target_tokens - 1)

    def refer(self, task: Task, hit: Hit) -> None:
        """Let `task` refer to what `match` just found."""
        while task.num_indexed < hit.num_units:
            task.num_indexed += self._refer(task.prompt_keys, task.num_indexed, hit.num_units)
        if hit.num_run_blocks:
            run = self._runs.pop(task.run)
            del self._run_of[run.entry]
            self.cached -= hit.num_run_blocks
            self._evictable[run.entry] -= hit.num_run_blocks
            if not self._evictable[run.entry]:
                del self._evictable[run.entry]

    def index(self, task: Task, num_tokens: int) -> None:
        """The first `num_tokens` of `task` are scheduled: index the hashed units that they fill."""
        if not self.unit_blocks:
            return
        keys = task.prompt_keys
        full = min(len(keys), min(num_tokens, task.keyed_tokens) // self.hash_block_size)
        while task.num_indexed < full:
            start = task.num_indexed
            if keys[start] in self._segments:
                num_units = self._refer(keys, start, full)
                self.free += num_units * self.unit_blocks  # its own copies
            else:
                self._segments[keys[start]] = _Segment(keys[start:full], 1)
                num_units = full - start
            task.num_indexed += num_units

    def unindex(self, task: Task, num_tokens: int) -> int:
        """What `task` has scheduled behind its first `num_tokens` won't be computed: it refers to no unit there.

        A unit that others refer to stays, for they compute it, or have; returns the blocks of these, which `task` holds
        no more. The blocks of the others are its own.
        """
        if not self.unit_blocks:
            return 0
        keys, first = task.prompt_keys, num_tokens // self.hash_block_size
        start = num_lost = 0
        while start < task.num_indexed:
            segment = self._segments[keys[start]]
            if start < first < start + segment.num_units:
                segment = self._split(segment, first - start)
            elif start >= first:
                segment.num_users -= 1
                if segment.num_users:
                    num_lost += segment.num_units
                else:
                    del self._segments[keys[start]]
            start += segment.num_units
        task.num_indexed = min(first, task.num_indexed)
        return num_lost * self.unit_blocks

    def release(self, task: Task, num_tokens: int, num_blocks: int, *, resumes: bool) -> None:
        """`task` gives up its `num_blocks`, which hold `num_tokens`; `resumes`: it will look for them again."""
        if not self.prefix_caching:
            self.free += num_blocks
            return
        if self._runs and task.run in self._runs:
            del self._run_of[self._runs.pop(task.run).entry]
        private = num_blocks - task.num_indexed * self.unit_blocks
        if private:
            entry = self._add(private, resumes)
            if resumes:
                start = task.num_indexed * self.hash_block_size
                self._runs[task.run] = _Run(entry, start, max(0, num_tokens - start) // self.block_size)
                self._run_of[entry] = task.run
        if task.num_indexed:
            self._unrefer(task.prompt_keys, task.num_indexed)
            task.num_indexed = 0

    def _add(self, num_blocks: int, resumes: bool) -> int:
        """The entry of private blocks that become evictable: dead ones are one with those just before them."""
        evictable = self._evictable
        self.cached += num_blocks
        if not resumes and evictable and next(reversed(evictable)) == self._dead:
            evictable[self._dead] += num_blocks
            return self._dead
        entry, self._next_run = self._next_run, self._next_run - 1
        evictable[entry] = num_blocks
        if not resumes:
            self._dead = entry
        return entry

    def clear(self) -> None:
        """All content is gone, and nobody refers to any block."""
        self.free, self.cached = self.num_blocks, 0
        self._evictable.clear()
        self._segments.clear()
        self._runs.clear()
        self._run_of.clear()
        self._dead = 0

    def count_referenced_units(self) -> int:
        """Blocks in hashed units that sequences refer to, each counted once (for the ledger)."""
        return sum(each.num_units for each in self._segments.values() if each.num_users) * self.unit_blocks

    def count_evictable(self) -> int:
        """Blocks in unreferenced entries, counted anew: equals `cached` (for the ledger)."""
        return sum(self._evictable.values())

    def _refer(self, keys: tuple[int, ...], start: int, end: int) -> int:
        """One sequence more refers to the units of `keys` in the segment at `start`, but to none from `end` on."""
        segment = self._segments[keys[start]]
        num_units = segment.count_common(keys, start, end)
        if num_units < segment.num_units:
            segment = self._split(segment, num_units)
        elif not segment.num_users:
            self.cached -= self._evictable.pop(segment)
        segment.num_users += 1
        return num_units

    def _split(self, segment: _Segment, num_units: int) -> _Segment:
        """The first `num_units` of `segment` as one of its own, to be referred to; the rest keeps its place."""
        head = _Segment(segment.keys[:num_units], segment.num_users)
        segment.keys = segment.keys[num_units : segment.num_units]
        segment.num_units = len(segment.keys)
        self._segments[head.keys[0]] = head
        self._segments[segment.keys[0]] = segment
        if not segment.num_users:
            self._evictable[segment] -= num_units * self.unit_blocks
            self.cached -= num_units * self.unit_blocks
        return head

    def _unrefer(self, keys: tuple[int, ...], num_units: int) -> None:
        """One sequence less refers to the first `num_units` of `keys`; what nobody else does is one segment now."""
        start, left = 0, None
        while start < num_units:
            segment = self._segments[keys[start]]
            segment.num_users -= 1
            if left is not None:
                del self._segments[keys[start]]
            elif not segment.num_users:
                left, first = segment, start
            start += segment.num_units
        if left is not None:
            left.keys = keys[first:num_units]
            left.num_units = num_units - first
            self._evictable[left] = left.num_units * self.unit_blocks
            self.cached += left.num_units * self.unit_blocks

    def _evict(self, num_blocks: int) -> None:
        """Turn `num_blocks` or more of the least recently used content into free blocks, tails before heads.

        An entry that nobody looks for goes at once: its blocks would all be taken before any others.
        """
        evictable = self._evictable
        while num_blocks > 0:
            entry, blocks = next(iter(evictable.items()))
            if isinstance(entry, int):
                taken = min(blocks, num_blocks) if entry in self._run_of else blocks
                if taken == blocks and entry in self._run_of:
                    del self._runs[self._run_of.pop(entry)]
            else:
                taken = self._shorten(entry, num_blocks)
            if taken < blocks:
                evictable[entry] = blocks - taken
            else:
                del evictable[entry]
            self.free += taken
            self.cached -= taken
            num_blocks -= taken

    def _shorten(self, segment: _Segment, num_blocks: int) -> int:
        """Evict units from the tail of `segment` for `num_blocks`, as far as it has them; the blocks of these units."""
        end = segment.num_units
        segment.num_units = max(0, end - -(-num_blocks // self.unit_blocks))
        if self.on_evict is not None:
            for key in reversed(segment.keys[segment.num_units : end]):
                self.on_evict(key)
        if not segment.num_units:
            del self._segments[segment.keys[0]]
        return (end - segment.num_units) * self.unit_blocks
