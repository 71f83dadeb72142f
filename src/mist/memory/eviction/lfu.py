"""Least frequently used: the entry with the fewest uses goes first, among equals the one whose last use is longest ago.

Entries lie in buckets of equal counts, in a ring by rising count, so that a use or a victim costs O(1) whatever the
counts are (Shah, Mitra, Matani 2010). Counts start anew when an entry comes back; they never age.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from mist.registry import register


class _Bucket:
    """The keys that were used `count` times, least recently used first, between the next lower and higher counts."""

    __slots__ = ("above", "below", "count", "keys")
    above: _Bucket
    below: _Bucket

    def __init__(self, count: int, below: _Bucket | None = None) -> None:
        self.count = count
        self.keys: OrderedDict[int, None] = OrderedDict()
        self.below = below or self
        self.above = self.below.above if below else self
        self.below.above = self.above.below = self

    def leave_if_empty(self) -> None:
        if not self.keys:
            self.below.above, self.above.below = self.above, self.below


@register("eviction", "lfu")
@dataclass(slots=True)
class LFU:
    """Least frequently used first, the least recently used among equals."""

    #: of count 0, without keys: the ring begins and ends here
    _ring: _Bucket = field(init=False, default_factory=lambda: _Bucket(0))
    _bucket_of: dict[int, _Bucket] = field(init=False, default_factory=dict)

    def touch(self, key: int, now: int) -> None:
        old = self._bucket_of.get(key, self._ring)
        new = old.above if old.above.count == old.count + 1 else _Bucket(old.count + 1, old)
        new.keys[key] = None
        self._bucket_of[key] = new
        if old is not self._ring:
            del old.keys[key]
            old.leave_if_empty()

    def evict(self, now: int, *, full: bool) -> int | None:
        if not full:
            return None
        bucket = self._ring.above
        key, _ = bucket.keys.popitem(last=False)
        del self._bucket_of[key]
        bucket.leave_if_empty()
        return key
