"""A limit on the queue: a request is turned away where even the shortest queue is full.

The servers' own limit, such as a gateway's on pending requests (`max_pending_requests` of Envoy's circuit breakers).
It looks at the tasks that wait, not at how long they will take.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mist.registry import register
from mist.request import PREFILL, ClientView, Request


@register("admission", "max_waiting")
@dataclass
class MaxWaiting:
    """Turn away who finds `max_num_waiting` tasks or more waiting on every client that serves `stage`."""

    max_num_waiting: int
    stage: str = PREFILL

    def __post_init__(self) -> None:
        if self.max_num_waiting < 1:
            raise ValueError(f"max_num_waiting is {self.max_num_waiting}: give at least 1")

    @property
    def stages(self) -> tuple[str, ...]:
        """The stage kind whose clients it looks at."""
        return (self.stage,)

    def refuses(self, request: Request, views: Mapping[str, Sequence[ClientView]], now: int) -> str:
        queues = views.get(self.stage)
        if queues and all(view.num_waiting >= self.max_num_waiting for view in queues):
            return f"{self.max_num_waiting:,} tasks or more waiting on every client"
        return ""
