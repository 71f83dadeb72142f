"""Heavy/light: long requests have clients of their own, so that short ones never wait behind them.

Heavy is who is predicted to answer at length, or has a long prompt, or either. Source: the heavy-light split of HERMES
(arXiv 2504.09775), with its limits of 512 and 2,048 tokens. It never sees true output lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeVar

from mist.load import Measure, fields_of, measured
from mist.registry import register
from mist.request import ClientView, Task

T = TypeVar("T")


@register("routing", "heavy_light")
@dataclass
class HeavyLight:
    """`heavy_share` of the clients, the first ones, serve the heavy requests and the others the light ones.

    A request is heavy `by` its predicted output of more than `max_light_output_tokens`, by its input of more than
    `max_light_input_tokens`, or by either. Both parts have one client at least, where there are two. Within a part the
    least loaded by `measure`, the first on a tie; where none of a part can hold a request, of those that can.
    """

    by: Literal["output", "input", "either"] = "either"
    max_light_output_tokens: int = 512
    max_light_input_tokens: int = 2048
    heavy_share: float = 0.5
    measure: Measure = "outstanding"
    sizes: ClassVar[tuple[str, ...]] = ("predicted_output_tokens",)

    def __post_init__(self) -> None:
        if not 0 < self.heavy_share < 1:
            raise ValueError(f"heavy_share is {self.heavy_share}: give a share of the clients between 0 and 1")

    @property
    def needs(self) -> frozenset[str]:
        return fields_of(self.measure)

    def choose(self, task: Task, views: Sequence[ClientView], now: int) -> ClientView:
        return min(self._part(task, views) or views, key=measured(self.measure))

    def choose_of(self, task: Task, views: Sequence[ClientView], now: int, everyone: Sequence[int]) -> ClientView:
        """One of `views`; the parts are those of `everyone`, of whom some can't hold the task."""
        part = set(self._part(task, everyone))
        return min([view for view in views if view.index in part] or views, key=measured(self.measure))

    def _part(self, task: Task, clients: Sequence[T]) -> Sequence[T]:
        num_heavy = min(max(1, round(self.heavy_share * len(clients))), len(clients) - 1)
        return clients[:num_heavy] if self._is_heavy(task) else clients[num_heavy:]

    def _is_heavy(self, task: Task) -> bool:
        request = task.request
        by_output = request.predicted_output_tokens > self.max_light_output_tokens
        by_input = request.input_tokens > self.max_light_input_tokens
        return (by_output and self.by != "input") or (by_input and self.by != "output")
