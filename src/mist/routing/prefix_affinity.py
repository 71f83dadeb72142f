"""Prefix affinity: the client that has the most of a prompt's prefix, held against the work that waits there.

The router remembers what it sent where, as production routers without reports from their engines do; it never asks a
client what its cache still holds.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
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

    def __post_init__(self) -> None:
        if not 0 <= self.load_weight < float("inf"):
            raise ValueError(f"load_weight is {self.load_weight}: give 0 or more tokens for a token that waits")
        for name in ("max_num_keys", "stride"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} is {value}: give at least 1")

    def choose(self, task: Task, views: Sequence[ClientView], now: int) -> ClientView:
        keys = task.prompt_keys[self.stride - 1 :: self.stride]
        key_tokens = self.stride * task.keyed_tokens / max(1, len(task.prompt_keys))

        def cost(view: ClientView) -> tuple[float, int, int]:
            seen_tokens = self._count_seen(view.index, keys) * key_tokens
            to_compute = task.remaining_tokens - seen_tokens + self.load_weight * view.pending_prefill_tokens
            return to_compute, view.num_outstanding, self._num_sent.get(view.index, 0)

        there = min(views, key=cost)
        self._remember(there.index, keys)
        return there

    def _count_seen(self, client: int, keys: Sequence[int]) -> int:
        """How many of `keys` at their front the client was sent: a head is never forgotten before its tail."""
        seen = self._seen.get(client, ())
        if not keys or keys[0] not in seen:  # as of most sessions
            return 0
        low, high = 1, len(keys)
        while low < high:
            middle = (low + high) // 2
            if keys[middle] in seen:
                low = middle + 1
            else:
                high = middle
        return low

    def _remember(self, client: int, keys: Sequence[int]) -> None:
        seen = self._seen.setdefault(client, OrderedDict())
        before = len(seen)
        use = seen.move_to_end
        for key in reversed(keys):
            seen[key] = None
            use(key)
        self._num_sent[client] = self._num_sent.get(client, 0) + len(seen) - before
        while len(seen) > self.max_num_keys:
            seen.popitem(last=False)
