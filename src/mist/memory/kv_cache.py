"""The paged KV cache of one client: blocks by number, prefix content by hash, least recently used evicted first.

Blocks are interchangeable, so only their number is kept; content that may be hit again is kept as *entries*: a unit of
a prompt that a hash names, or a request's own *run* of blocks behind its hashed units. It never picks a victim task.
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


class KVCache:
    """`num_blocks` blocks of `block_size` tokens.

    Laws: free + cached + referenced = num_blocks; available = free + cached. `hash_block_size` tokens share one hash
    (a multiple of `block_size`, 0 where prompts have no hashes). Without `enable_prefix_caching` nothing outlives its
    release.

    vLLM v1's order is kept: units are indexed when their tokens are scheduled; a released sequence's blocks become
    evictable tail first; free blocks are used before cached content is evicted. Two things differ: a sequence that
    computes a unit which is in the cache already refers to that one and gives its own copy back, and other requests'
    content is hit in whole units only.
    """

    __slots__ = (
        "_evictable", "_next_run", "_refs", "_runs", "block_size", "cached", "free", "hash_block_size",
        "holds_stated_hits", "num_blocks", "on_evict", "prefix_caching", "unit_blocks", "watermark_blocks",
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
        #: unreferenced entries -> blocks, least recently used first; hashed units by key (>= 0), runs by negative ids
        self._evictable: OrderedDict[int, int] = OrderedDict()  # a dict rescans its deleted front on every eviction
        #: hashed units that sequences refer to -> how many do
        self._refs: dict[int, int] = {}
        #: request index -> its run, while the request waits to resume
        self._runs: dict[int, _Run] = {}
        self._next_run = -1

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
            refs, evictable = self._refs, self._evictable
            for key in task.prompt_keys[: min(most, task.request.input_tokens) // self.hash_block_size]:
                if key not in refs:
                    if key not in evictable:
                        break
                    unreferenced += self.unit_blocks
                units += 1
        tokens = units * self.hash_block_size
        run = self._runs.get(task.request.index)
        if run is not None and run.start == tokens:
            run_blocks = min(run.full_blocks, self._evictable[run.entry], (most - tokens) // self.block_size)
        return Hit(tokens + run_blocks * self.block_size, units, run_blocks, unreferenced + run_blocks)

    def stated_hit(self, task: Task) -> int:
        """Tokens of `task`'s target that the workload says are cached; at least one token is left to compute."""
        if not (self.prefix_caching and self.holds_stated_hits and task.reads_prompt):
            return 0
        return min(task.request.hit_tokens, task.target_tokens - 1)

    def refer(self, task: Task, hit: Hit) -> None:
        """Let `task` refer to what `match` just found."""
        for key in task.request.block_keys[: hit.num_units]:
            self._refer(key)
        task.num_indexed = hit.num_units
        if hit.num_run_blocks:
            run = self._runs.pop(task.request.index)
            self.cached -= hit.num_run_blocks
            self._evictable[run.entry] -= hit.num_run_blocks
            if not self._evictable[run.entry]:
                del self._evictable[run.entry]

    def index(self, task: Task, num_tokens: int) -> None:
        """The first `num_tokens` of `task` are scheduled: index the hashed units that they fill."""
        if not self.unit_blocks:
            return
        keys = task.prompt_keys
        full = min(len(keys), min(num_tokens, task.request.input_tokens) // self.hash_block_size)
        for key in keys[task.num_indexed : full]:
            if key in self._refs or key in self._evictable:
                self.free += self.unit_blocks  # its own copy
                self._refer(key)
            else:
                self._refs[key] = 1
            task.num_indexed += 1

    def release(self, task: Task, num_tokens: int, num_blocks: int, *, resumes: bool) -> None:
        """`task` gives up its `num_blocks`, which hold `num_tokens`; `resumes`: it will look for them again."""
        if not self.prefix_caching:
            self.free += num_blocks
            return
        request = task.request
        self._runs.pop(request.index, None)
        private = num_blocks - task.num_indexed * self.unit_blocks
        if private:
            entry, self._next_run = self._next_run, self._next_run - 1
            self._evictable[entry] = private
            self.cached += private
            if resumes:
                start = task.num_indexed * self.hash_block_size
                self._runs[request.index] = _Run(entry, start, (num_tokens - start) // self.block_size)
        for key in reversed(request.block_keys[: task.num_indexed]):
            self._refs[key] -= 1
            if not self._refs[key]:
                del self._refs[key]
                self._evictable[key] = self.unit_blocks
                self.cached += self.unit_blocks
        task.num_indexed = 0

    def count_referenced_units(self) -> int:
        """Blocks in hashed units that sequences refer to, each counted once (for the ledger)."""
        return len(self._refs) * self.unit_blocks

    def count_evictable(self) -> int:
        """Blocks in unreferenced entries, counted anew: equals `cached` (for the ledger)."""
        return sum(self._evictable.values())

    def _refer(self, key: int) -> None:
        count = self._refs.get(key, 0)
        if not count:
            self.cached -= self._evictable.pop(key)
        self._refs[key] = count + 1

    def _evict(self, num_blocks: int) -> None:
        """Turn `num_blocks` or more of the least recently used content into free blocks; a run loses its tail first."""
        evictable = self._evictable
        while num_blocks > 0:
            entry = next(iter(evictable))
            blocks = evictable[entry]
            if entry < 0 and blocks > num_blocks:
                evictable[entry] = blocks - num_blocks
                blocks = num_blocks
            else:
                del evictable[entry]
                if entry < 0:
                    self._forget(entry)
                elif self.on_evict is not None:
                    self.on_evict(entry)
            self.free += blocks
            self.cached -= blocks
            num_blocks -= blocks

    def _forget(self, entry: int) -> None:
        for index, run in self._runs.items():
            if run.entry == entry:
                del self._runs[index]
                return
