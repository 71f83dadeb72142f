"""The earliest deadline first; requests without one come last, in the order of their arrival at the client.

Liu and Layland, "Scheduling Algorithms for Multiprogramming in a Hard-Real-Time Environment" (Journal of the ACM 20,
1973). A deadline that has passed still goes first: nothing is given up.
"""

from __future__ import annotations

from dataclasses import dataclass

from mist.registry import register
from mist.request import Task


@register("order", "earliest_deadline")
@dataclass
class EarliestDeadline:
    """Earliest `deadline_ns` of the request first."""

    def key(self, task: Task) -> tuple[int, ...]:
        return (task.request.deadline_ns,)
