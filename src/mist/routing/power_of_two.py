"""Power of two choices: the less loaded of two clients drawn at random.

Nearly as good as looking at all, and far better than looking at none. Source: Mitzenmacher, "The Power of Two Choices
in Randomized Load Balancing" (IEEE TPDS 12(10), 2001). It never looks at the clients that it didn't draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mist.load import Measure, fields_of, measured
from mist.registry import register
from mist.request import ClientView, Task
from mist.routing import rng_of


@register("routing", "power_of_two")
@dataclass
class PowerOfTwo:
    """The least loaded of `num_choices` clients drawn, by `measure`; the first in the scenario's order on a tie.

    `seed`: left out, of the run's seed tree.
    """

    measure: Measure = "outstanding"
    num_choices: int = 2
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.num_choices < 1:
            raise ValueError(f"num_choices is {self.num_choices}: give at least 1")

    @property
    def needs(self) -> frozenset[str]:
        return fields_of(self.measure)

    def choose(self, task: Task, views: Sequence[ClientView], now: int) -> ClientView:
        if self.num_choices < len(views):
            places = rng_of(self.seed, task).sample(range(len(views)), self.num_choices)
            views = [views[place] for place in sorted(places)]
        return min(views, key=measured(self.measure))
