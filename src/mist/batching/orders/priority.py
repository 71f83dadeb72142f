"""By priority, lower numbers first, and among equals by the request's arrival: vLLM's `scheduling_policy: priority`.

The running task with the largest (priority, arrival) is preempted first. Nothing that runs gives way to what waits.
"""

from __future__ import annotations

from dataclasses import dataclass

from mist.registry import register
from mist.request import Task


@register("order", "priority")
@dataclass
class Priority:
    """Lower `priority` of the request first, then by its arrival (vLLM's scheduling_policy priority)."""

    def key(self, task: Task) -> tuple[int, ...]:
        return task.request.priority, task.request.arrival_ns
