"""First come, first served; whoever was admitted last is preempted first, and waits in front of all others.

What vLLM does by default. A client keeps this order by its queue alone, without keys.
"""

from __future__ import annotations

from dataclasses import dataclass

from mist.registry import register
from mist.request import Task


@register("order", "fcfs")
@dataclass
class FCFS:
    """First come, first served: vLLM's scheduling_policy fcfs."""

    def key(self, task: Task) -> tuple[int, ...]:
        return ()
