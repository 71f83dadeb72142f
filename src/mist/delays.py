"""Where requests wait outside all clients: the delays of their pipelines, such as the time that a tool takes.

Between the coordinator, which hands a delay over like any other task, and the kernel, which says when it is over. It
never knows what is waited for.
"""

from __future__ import annotations

from collections.abc import Callable

from mist.kernel import Kernel
from mist.records import CUT, DONE, DROPPED, NO_CLIENT, Records
from mist.request import Delay, Task


class Delays:
    """`ended(task, now)` is told when one is over; one that was cancelled ends for nobody."""

    def __init__(self, kernel: Kernel, records: Records, ended: Callable[[Task, int], None]) -> None:
        self.kernel = kernel
        self.records = records
        self.ended = ended
        #: what is being waited for, until when
        self.waiting: dict[Task, int] = {}
        self._stage_kinds = {kind: i for i, kind in enumerate(records.stage_kinds)}

    def begin(self, task: Task, delay: Delay, now: int) -> None:
        """`task` waits for its `delay` from `now` on."""
        task.started_ns = now
        self.waiting[task] = until = now + delay.duration_ns
        self.kernel.at(until, self._end, task)

    def cancel(self, task: Task, now: int) -> None:
        """Nobody waits for `task` any more."""
        del self.waiting[task]
        self._record(task, now, DROPPED)

    def cut(self, now: int) -> None:
        """The run stops at `now`."""
        for task in self.waiting:
            self._record(task, now, CUT)
        self.waiting.clear()

    def _end(self, task: Task, now: int) -> None:
        if task in self.waiting:
            del self.waiting[task]
            self._record(task, now, DONE)
            self.ended(task, now)

    def _record(self, task: Task, now: int, how: int) -> None:
        kind = self._stage_kinds[task.stage.kind]
        self.records.tasks.append(
            (task.request.index, task.stage_index, kind, NO_CLIENT, task.queued_ns, task.started_ns, -1, now, how,
             0, 0, -1, -1, 0)
        )  # fmt: skip
