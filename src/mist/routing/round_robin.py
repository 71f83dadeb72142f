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
    """Clients in the order of the scenario, over and over.

    Tasks that are offered only some of them have a turn of their own among these, which are told from others by how
    many they are, and by the first and the last: long prompts that every second client can hold go to all that can.
    """

    reads_load: ClassVar[bool] = False

    _turns: dict[tuple[int, int, int], int] = field(default_factory=dict, init=False, repr=False)

    def choose(self, task: Task, views: Sequence[ClientView], now: int) -> ClientView:
        offered = len(views), views[0].index, views[-1].index
        turn = self._turns.get(offered, 0)
        self._turns[offered] = turn + 1
        return views[turn % len(views)]
