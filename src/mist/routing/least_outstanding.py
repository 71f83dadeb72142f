"""Least outstanding requests: the client with the fewest tasks accepted and not yet done; the first on a tie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import ClassVar

from mist.registry import register
from mist.request import ClientView, Task

_NUM_OUTSTANDING = attrgetter("num_outstanding")


@register("routing", "least_outstanding")
@dataclass
class LeastOutstanding:
    """The load balancer's classic: counts tasks, not tokens."""

    reads_load: ClassVar[bool] = False

    def choose(self, task: Task, views: Sequence[ClientView], now: int) -> ClientView:
        return min(views, key=_NUM_OUTSTANDING)
