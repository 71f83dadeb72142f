"""Least recently used: the entry whose last use is longest ago goes first.

What tiers do unless told otherwise. It keeps no times: the order of uses is all that it knows.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from mist.registry import register


@register("eviction", "lru")
@dataclass(slots=True)
class LRU:
    """Least recently used first."""

    _order: OrderedDict[int, None] = field(init=False, default_factory=OrderedDict)

    def touch(self, key: int, now: int) -> None:
        order = self._order
        if key in order:
            order.move_to_end(key)
        else:
            order[key] = None

    def evict(self, now: int, *, full: bool) -> int | None:
        return self._order.popitem(last=False)[0] if full else None
