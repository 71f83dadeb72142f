"""Prefix affinity: the client that has the most of a prompt's prefix, held against the work that waits there.

The router remembers what it sent where, as production routers without reports from their engines do; it never asks a
client what its cache still holds.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Sequence
from dataclasses import dataclass, field

from mist.registry import register
from mist.request import ClientView, Task


@register("routing", "prefix_affinity")
@dataclass
class PrefixAffinity:
    """Fewest tokens to compute: those of the prompt that the client wasn't sent + `load_weight` x those waiting there.

    Among equals the client with the fewest outstanding tasks, then the one that was sent the fewest keys. Of each
    prompt every `stride`-th prefix key is remembered, and of each client the `max_num_keys` that were used last, a
    prompt's tail forgotten before its head; prompts without keys go by load alone. Sources: the router of SGLang keeps
    such a tree per worker and leaves it where loads differ too much; NVIDIA Dynamo's adds up weighted overlap and load.
    """

    load_weight: float = 1.0
    max_num_keys: int = 1_000_000
    stride: int = 1
    _seen: dict[int, OrderedDict[int, None]] = field(default_factory=dict, init=False, repr=False)
    _num_sent: dict[int, int] = field(default_factory=dict, init=False, repr=False)
    #: how many clients have seen a key
    _num_clients: dict[int, int] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.load_weight < float("inf"):
            raise ValueError(f"load_weight is {self.load_weight}: give 0 or more tokens for a token that waits")
        for name in ("max_num_keys", "stride"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} is {value}: give at least 1")

    def choose(self, task: Task, views: Sequence[ClientView], now: int) -> ClientView:
        keys = task.prompt_keys[self.stride - 1 :: self.stride]
        key_tokens = self.stride * task.keyed_tokens / max(1, len(task.prompt_keys))
        common = self._count_common(keys)
        following = keys[common] if common < len(keys) else None
        remaining, load_weight, num_sent, all_seen = task.remaining_tokens, self.load_weight, self._num_sent, self._seen

        def cost(view: ClientView) -> tuple[float, int, int]:
            seen = all_seen.get(view.index)
            if seen is None:
                num_seen = 0
            elif following is None or following not in seen:  # most
                num_seen = common
            else:
                num_seen = _count_seen(seen, keys, common + 1)
            to_compute = remaining - num_seen * key_tokens + load_weight * view.pending_prefill_tokens
            return to_compute, view.num_outstanding, num_sent.get(view.index, 0)

        there = min(views, key=cost)
        self._remember(there.index, keys)
        return there

    def _count_common(self, keys: Sequence[int]) -> int:
        """How many of `keys` at their front all clients have seen that have seen anything."""
        num_clients, num_all = self._num_clients, len(self._seen)
        low, high = 0, len(keys)
        while low < high:
            middle = (low + high) // 2
            if num_clients.get(keys[middle], 0) == num_all:
                low = middle + 1
            else:
                high = middle
        return low

    def _remember(self, client: int, keys: Sequence[int]) -> None:
        seen, num_clients = self._seen.setdefault(client, OrderedDict()), self._num_clients
        before = len(seen)
        use = seen.move_to_end
        for key in reversed(keys):
            if key in seen:
                use(key)
            else:
                seen[key] = None
                num_clients[key] = num_clients.get(key, 0) + 1
        self._num_sent[client] = self._num_sent.get(client, 0) + len(seen) - before
        while len(seen) > self.max_num_keys:
            key, _ = seen.popitem(last=False)
            num_clients[key] -= 1
            if not num_clients[key]:
                del num_clients[key]


def _count_seen(seen: Container[int], keys: Sequence[int], low: int) -> int:
    """How many of `keys` at their front, `low` at least, are in `seen`: a head is never forgotten before its tail."""
    high = len(keys)
    while low < high:
        middle = (low + high) // 2
        if keys[middle] in seen:
            low = middle + 1
        else:
            high = middle
    return low
