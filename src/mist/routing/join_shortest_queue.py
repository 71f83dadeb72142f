"""Join the shortest queue, measured in prompt tokens still to be computed; the first client on a tie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mist.registry import register
from mist.request import ClientView, Task


@register("routing", "join_shortest_queue")
@dataclass
class JoinShortestQueue:
    """Fewest pending prefill tokens, then fewest outstanding tasks."""

    def choose(self, task: Task, views: Sequence[ClientView], now: int) -> ClientView:
        return min(views, key=lambda view: (view.pending_prefill_tokens, view.num_outstanding))
