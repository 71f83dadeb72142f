"""Round robin: each client in turn, whatever its load."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from mist.registry import register
from mist.request import ClientView, Task


@register("routing", "round_robin")
@dataclass
class RoundRobin:
    """Clients in the order of the scenario, over and over."""

    reads_load: ClassVar[bool] = False

    _turn: int = field(default=0, init=False, repr=False)

    def choose(self, task: Task, views: Sequence[ClientView], now: int) -> ClientView:
        view = views[self._turn % len(views)]
        self._turn += 1
        return view
