"""Prefix affinity: the client that has the most of a prompt's prefix, held against the work that waits there.

The router remembers what it sent where, as production routers without reports from their engines do; it never asks a
client what its cache still holds.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from math import inf
from operator import attrgetter
from typing import ClassVar

from mist.registry import register
from mist.request import ClientView, Task

#: sets of clients, and how many keys at the front of a prompt these have seen and no more
_Overlaps = list[tuple[int, int]]
_EVERYBODY = -1
_INDEX = attrgetter("index")
#: that are kept for the next prompt
_MAX_NUM_SETS = 1000


class _Lacking(dict[int, int]):
    """By key, the set of the clients that haven't seen it: bit i is client i; all, for a key that isn't here.

    Who has not seen a key has seen none behind it in a prompt.
    """

    def __missing__(self, key: int) -> int:
        return _EVERYBODY


@register("routing", "prefix_affinity")
@dataclass
class PrefixAffinity:
    """Fewest tokens to compute: those of the prompt that the client wasn't sent + `load_weight` x those waiting there.

    Among equals the client with the fewest outstanding tasks, then the one that was sent the fewest keys. Of each
    prompt every `stride`-th prefix key is remembered, and of each client the `max_num_keys` that were used last, a
    prompt's tail forgotten before its head; prompts without keys go by load alone. Sources: the router of SGLang keeps
    such a tree per worker and leaves it where loads differ too much; NVIDIA Dynamo's adds up weighted overlap and load.
    """

    reads_load: ClassVar[bool] = False
    reads_pending: ClassVar[bool] = True

    load_weight: float = 1.0
    max_num_keys: int = 1_000_000
    stride: int = 1
    #: of the clients to choose from, in their order, and by set of clients where these are among them
    _indices: list[int] = field(default_factory=list, init=False, repr=False)
    _places: dict[int, list[int]] = field(default_factory=dict, init=False, repr=False)
    #: by client that it has met, and these as a set: bit i is client i
    _sent: dict[int, _Sent] = field(default_factory=dict, init=False, repr=False)
    _everyone: int = field(default=0, init=False, repr=False)
    _lacking: _Lacking = field(default_factory=_Lacking, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.load_weight < float("inf"):
            raise ValueError(f"load_weight is {self.load_weight}: give 0 or more tokens for a token that waits")
        for name in ("max_num_keys", "stride"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} is {value}: give at least 1")

    def choose(self, task: Task, views: Sequence[ClientView], now: int) -> ClientView:
        indices = list(map(_INDEX, views))
        if indices != self._indices:
            self._meet(indices)
        keys = task.prompt_keys[self.stride - 1 :: self.stride]
        overlaps = self._overlaps(keys)
        tied = self._cheapest(task, views, overlaps)
        fewest = min([views[place].num_outstanding for place in tied])
        sent = self._sent
        _, there = min((sent[indices[p]].num_ever, p) for p in tied if views[p].num_outstanding == fewest)
        self._remember(indices[there], keys, overlaps)
        return views[there]

    def _meet(self, indices: list[int]) -> None:
        """The clients to choose from are these, from now on."""
        self._indices = indices
        self._places.clear()
        for index in indices:
            self._sent.setdefault(index, _Sent())
            self._everyone |= 1 << index

    def _overlaps(self, keys: Sequence[int]) -> _Overlaps:
        """All clients that it has met, those that have seen the fewest of `keys` first."""
        lacking, clients, place = self._lacking, self._everyone, 0
        overlaps = []
        while clients:
            lack = lacking[keys[place]] if place < len(keys) else _EVERYBODY
            if clients & lack:
                overlaps.append((clients & lack, place))
                clients &= ~lack
            if clients:  # a set within another is the smaller number, so that they are in order
                place = bisect_right(keys, lack, place + 1, key=lacking.__getitem__)
        return overlaps

    def _cheapest(self, task: Task, views: Sequence[ClientView], overlaps: _Overlaps) -> list[int]:
        """Where in `views` those with the fewest tokens to compute are.

        Those that have seen the most come first: others can't win where their part of the prompt alone is more.
        """
        key_tokens = self.stride * task.keyed_tokens / max(1, len(task.prompt_keys))
        remaining, load_weight = task.remaining_tokens, self.load_weight
        cheapest: list[int] = []
        least = inf
        for clients, num_seen in reversed(overlaps):
            to_compute = remaining - num_seen * key_tokens
            if to_compute > least:
                break
            if not (places := self._places_of(clients)):
                continue
            costs = [to_compute + load_weight * views[place].pending_prefill_tokens for place in places]
            if (least_here := min(costs)) < least:
                least, cheapest = least_here, []
            if least_here == least:
                cheapest += [place for place, cost in zip(places, costs, strict=True) if cost == least]
        return cheapest

    def _places_of(self, clients: int) -> list[int]:
        """Where in the views those of `clients` are; the same sets come again and again."""
        places = self._places.get(clients)
        if places is None:
            if len(self._places) >= _MAX_NUM_SETS:
                self._places.clear()
            places = [place for place, index in enumerate(self._indices) if clients >> index & 1]
            self._places[clients] = places
        return places

    def _remember(self, client: int, keys: Sequence[int], overlaps: _Overlaps) -> None:
        lacking, bit = self._lacking, 1 << client
        num_seen = next(number for clients, number in overlaps if clients & bit)
        _, num_known = overlaps[-1]
        for key in keys[num_seen:num_known]:
            lacking[key] &= ~bit
        lacking.update(dict.fromkeys(keys[num_known:], ~bit))
        sent = self._sent[client]
        sent.use(keys, len(keys) - num_seen)
        while sent.num_keys > self.max_num_keys:
            key = sent.forget()
            lacking[key] |= bit
            if lacking[key] == _EVERYBODY:
                del lacking[key]


class _Sent:
    """The `num_keys` keys that one client is known to have, of `num_ever` that were new to it when they were sent.

    Prompts are only noted as they are sent; which key was used when is worked out once some have to be forgotten.
    """

    __slots__ = ("_last_used", "_num_looked_at", "_num_noted", "_prompts", "_used_since", "num_ever", "num_keys")

    def __init__(self) -> None:
        self.num_keys = self.num_ever = 0
        #: noted since keys were put in order, their number of keys together
        self._prompts: list[Sequence[int]] = []
        self._num_noted = 0
        #: the keys of the first prompts of these
        self._used_since: set[int] = set()
        self._num_looked_at = 0
        #: keys in the order of their last use until then, the last used first
        self._last_used: list[int] = []

    def use(self, keys: Sequence[int], num_new: int) -> None:
        """It was sent `keys`, the last `num_new` of which it didn't have."""
        self.num_keys += num_new
        self.num_ever += num_new
        self._num_noted += len(keys)
        self._prompts.append(keys)
        if self._num_noted > 2 * self.num_keys + 10_000:
            self._put_in_order()

    def forget(self) -> int:
        """Forget the key that was used longest ago, of a prompt the tail first."""
        self._used_since.update(*self._prompts[self._num_looked_at :])
        self._num_looked_at = len(self._prompts)
        while True:
            if not self._last_used:
                self._put_in_order()
            key = self._last_used.pop()
            if key not in self._used_since:
                self.num_keys -= 1
                return key

    def _put_in_order(self) -> None:
        self._last_used = list(dict.fromkeys(chain(*reversed(self._prompts), self._last_used)))
        self._num_noted = self._num_looked_at = 0
        self._prompts.clear()
        self._used_since.clear()
