"""Least outstanding requests: the client with the fewest tasks accepted and not yet done; the first on a tie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mist.registry import register
from mist.request import ClientView, Task


@register("routing", "least_outstanding")
@dataclass
class LeastOutstanding:
    """The load balancer's classic: counts tasks, not tokens."""

    def choose(self, task: Task, views: Sequence[ClientView], now: int) -> ClientView:
        return min(views, key=lambda view: view.num_outstanding)
