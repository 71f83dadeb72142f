"""Least loaded by any measure: one of tasks, tokens, KV cache or time, whichever is the scarce one.

The general form of the balancers that go by one number. It remembers nothing of what it sent where.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mist.load import Measure, fields_of, measured
from mist.registry import register
from mist.request import ClientView, Task


@register("routing", "least_loaded")
@dataclass
class LeastLoaded:
    """The least of `measure`; the fewest outstanding tasks, then the first, on a tie."""

    measure: Measure

    @property
    def needs(self) -> frozenset[str]:
        return fields_of(self.measure)

    def choose(self, task: Task, views: Sequence[ClientView], now: int) -> ClientView:
        load = measured(self.measure)
        return min(views, key=lambda view: (load(view), view.num_outstanding))
