"""The memory tiers behind the device memory of one client, nearest first, and whether to fetch from them or to compute.

The front end of a client asks it when a task comes in, after the client's own prefix cache, and again for one that is
next where that has lost some of it; what it says to fetch is then sent over the network. It never sends, computes or
waits itself, and never sees the tiers that others have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple, TypeVar

import numpy as np

from mist.memory.tier import BACK, THROUGH, Tier
from mist.request import Task

Number = TypeVar("Number", float, Fraction)


class Found(NamedTuple):
    """A stretch of a prompt that `tier` holds."""

    tier: Tier
    num_tokens: int


def expected_ns(hit_rates: Sequence[Number], fetch_ns: Sequence[Number], recompute_ns: Number) -> Number:
    """Expected time until a prefix is in device memory: T = sum_i [prod_{j<i} (1-h_j)] h_i t_i + prod_j (1-h_j) T_rec.

    h_i: hit rate of tier i among the requests that missed the tiers before it; t_i = L_i + S/B_i its time alone
    (`MemoryTier.fetch_ns`). Source: the expected retrieval time of MIST (arXiv 2504.09775), with its last term priced.
    """
    expected, missed = recompute_ns, hit_rates
    for hit_rate, time in zip(reversed(missed), reversed(fetch_ns), strict=True):
        expected = hit_rate * time + (1 - hit_rate) * expected
    return expected


def exposed_ns(transfer_ns: int, compute_ns: int, num_layers: int, latency_ns: int = 0) -> int:
    """By how much a fetch delays a prefill if layer i + 1 is fetched while layer i is computed, ns, rounded up.

    Layer i of L is there at latency + (i + 1) F/L and takes C/L, so the prefill ends at
    C + latency + max(F/L, F - C (L-1)/L): the first layer always waits, and for many layers the rest is
    max(0, F - C). One layer overlaps nothing. Source: layer-wise pre-loading, CachedAttention (arXiv 2403.19708, 3.2).
    """
    return latency_ns - (-max(transfer_ns, num_layers * transfer_ns - (num_layers - 1) * compute_ns) // num_layers)


class Hierarchy:
    """The `tiers` of one client, nearest first; each may be in other clients' hierarchies too.

    Hits are by content, or by the tiers' hit rates with draws of the request's own generator (`rng_of`), so that they
    depend on neither policies nor load. `token_bytes`: KV cache of a token over all ranks. `layout`: a number that is
    another one for clients whose KV caches can't be exchanged (other models or dtypes).
    """

    def __init__(
        self,
        tiers: Sequence[Tier],
        *,
        token_bytes: int,
        unit_tokens: int = 0,
        layout: int = 0,
        rng_of: Callable[[int], np.random.Generator] | None = None,
    ) -> None:
        """ValueError where hit rates are given for some tiers only, or where what is written back has another size."""
        self.tiers = tuple(tiers)
        self.token_bytes = token_bytes
        self.unit_tokens = unit_tokens
        self._first_key = layout << 128
        self._rng_of = rng_of
        rated = [tier.spec.hit_rate is not None for tier in tiers]
        if any(rated) and not (all(rated) and rng_of):
            raise ValueError("hit_rate is given for some tiers only: give it for all of them or for none")
        if not any(rated):
            self._join()

    def find(self, task: Task, num_device_tokens: int, now: int, *, again: bool = False) -> list[Found]:
        """What the tiers hold of the front of `task`'s target, behind its `num_device_tokens`, in order.

        Each tier is asked once, for what those before it don't have; at least one token is left to compute. By given
        rates, one tier has the request's `hit_tokens`, or none. `again`: as before, and not counted a second time.
        """
        most = task.target_tokens - 1
        if self.tiers and self.tiers[0].spec.hit_rate is not None:
            stated = min(task.request.hit_tokens, most) if task.reads_prompt else 0
            return self._draw(task, stated - num_device_tokens, 0 if again else 1)
        if not self.unit_tokens:
            return []
        keys = self.keys(task, most)
        unit, tokens = num_device_tokens // self.unit_tokens, num_device_tokens
        found = []
        for tier in self.tiers:
            unit += tier.lookup(keys, unit, now, again=again)
            if unit * self.unit_tokens > tokens:
                found.append(Found(tier, unit * self.unit_tokens - tokens))
                tokens = unit * self.unit_tokens
        return found

    def worth_fetching(
        self,
        found: Sequence[Found],
        recompute_ns: Callable[[int], int],
        fetch_ns: Callable[[Tier, int], tuple[int, int]],
        num_layers: int = 1,
    ) -> list[Found]:
        """The stretches at the front of `found` to fetch so that the prefill is estimated to end soonest.

        `recompute_ns(n)`: time of the prefill if n of the tokens found are fetched; `fetch_ns(tier, bytes)`: latency of
        a fetch, and what the rest of it takes; `num_layers`: of the model, where its
        layers are fetched one by one. Fetching wins ties.
        """
        latency = transfer = num_tokens = best = 0
        soonest = recompute_ns(0)
        for count, (tier, tokens) in enumerate(found, 1):
            num_tokens += tokens
            first, rest = fetch_ns(tier, tokens * self.token_bytes)
            latency += first
            transfer += rest
            compute = recompute_ns(num_tokens)
            end = compute + exposed_ns(transfer, compute, num_layers, latency)
            if end <= soonest:
                best, soonest = count, end
        return list(found[:best])

    def write_through(self, task: Task, num_tokens: int, now: int) -> list[tuple[Tier, int]]:
        """The first `num_tokens` of `task` are computed: what each write-through tier stores of it, in bytes."""
        if self.tiers and self.tiers[0].spec.hit_rate is not None:
            return []
        keys = self.keys(task, num_tokens)
        writes = [
            (tier, tier.insert(keys, len(keys), self.token_bytes, now))
            for tier in self.tiers
            if tier.spec.write == THROUGH
        ]
        return [(tier, num_bytes) for tier, num_bytes in writes if num_bytes]

    def write_back(self, key: int, now: int) -> int:
        """The device gives up the unit of `key` (`KVCache.on_evict`): bytes that the nearest tier stores of it."""
        if not self.takes_evicted:
            return 0
        return self.tiers[0].write_back(key + self._first_key, self.unit_tokens * self.token_bytes, now)

    @property
    def takes_evicted(self) -> bool:
        """Whether the nearest tier gets what the device evicts."""
        return bool(self.tiers) and self.tiers[0].spec.write == BACK

    def keys(self, task: Task, num_tokens: int) -> Sequence[int]:
        """What the tiers call the whole units in the first `num_tokens` of the prompt; none of another text."""
        keys = self.prompt_keys(task, num_tokens)
        return [key + self._first_key for key in keys] if self._first_key else keys

    def prompt_keys(self, task: Task, num_tokens: int) -> Sequence[int]:
        """What the workload and KV stores, which are of one layout, call them."""
        if not self.unit_tokens:
            return ()
        return task.prompt_keys[: min(num_tokens, task.keyed_tokens) // self.unit_tokens]

    def _draw(self, task: Task, num_tokens: int, count: int) -> list[Found]:
        assert self._rng_of is not None
        draws = self._rng_of(task.request.index).random(len(self.tiers)) if num_tokens > 0 else ()
        for tier, draw in zip(self.tiers, draws, strict=False):
            assert tier.spec.hit_rate is not None
            if draw < tier.spec.hit_rate:
                tier.hits += count
                return [Found(tier, num_tokens)]
            tier.misses += count
        return []

    def _join(self) -> None:
        """Let each tier that is written back to take what the one above it evicts."""
        above_units = 1
        for tier in self.tiers:
            if tier.spec.write == BACK and tier.entry_units != above_units:
                raise ValueError(
                    f"{tier.spec.name} is written back to, so its chunks must be those of the memory above"
                )
            above_units = tier.entry_units
        for above, tier in pairwise(self.tiers):
            if tier.spec.write == BACK:
                if above.on_evict not in (None, tier.write_back):
                    raise ValueError(f"{above.spec.name} is written back to two memories")
                above.on_evict = tier.write_back
