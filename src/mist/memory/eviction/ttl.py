"""Time to live: an entry that nobody used for so long goes, whether there is room or not.

For tiers whose content must not, or need not, be kept: sessions that ended, prices per byte and hour. Where the tier
runs full before, the least recently used entry goes, which is also the next to expire. It never renews a use by itself.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from math import inf

from mist.registry import register
from mist.units import seconds_to_ns


@register("eviction", "ttl")
@dataclass(slots=True)
class TTL:
    """Expires `ttl_s` seconds after its last use; least recently used first where that is too late."""

    ttl_s: float
    _last_use: OrderedDict[int, int] = field(init=False, default_factory=OrderedDict)
    _ttl_ns: int = field(init=False)

    def __post_init__(self) -> None:
        if not 0 < self.ttl_s < inf:
            raise ValueError(f"ttl_s is {self.ttl_s}: give the seconds that an entry lives without being used")
        self._ttl_ns = seconds_to_ns(self.ttl_s)

    def touch(self, key: int, now: int) -> None:
        self._last_use[key] = now
        self._last_use.move_to_end(key)

    def evict(self, now: int, *, full: bool) -> int | None:
        oldest = next(iter(self._last_use.items()), None)
        if oldest is None or not (full or oldest[1] + self._ttl_ns <= now):
            return None
        return self._last_use.popitem(last=False)[0]
