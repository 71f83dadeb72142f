"""Random: any client, each as likely as the others, whatever its load.

What a load balancer without memory does, and the base that others are measured against. It looks at no view.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from mist.registry import register
from mist.request import ClientView, Task
from mist.routing import rng_of


@register("routing", "random")
@dataclass
class RandomChoice:
    """Each client with the same probability; `seed`: left out, of the run's seed tree."""

    reads_load: ClassVar[bool] = False

    seed: int | None = None

    def choose(self, task: Task, views: Sequence[ClientView], now: int) -> ClientView:
        return views[rng_of(self.seed, task).randrange(len(views))]
