"""Jobs on several processes of this machine, which keep their tables of step times from one job to the next.

The default of the commands. A job whose process dies is an outcome with an error, and all others are done. It never
looks into a job.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from types import TracebackType

from mist.registry import register
from mist.search.evaluate import Job, Outcome, evaluate
from mist.workers import Workers


@register("executor", "processes")
@dataclass
class Processes:
    """`num_workers` processes, 0 for one per core; one is this process itself.

    A script that uses more runs them below its `if __name__ == "__main__"`.
    """

    num_workers: int = 0
    _workers: Workers = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._workers = Workers(self.num_workers or num_cores())

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._workers.close(kill=kind is not None)

    def run(self, jobs: Iterable[Job]) -> Iterator[Outcome]:
        """The outcomes as they come; with one process, in the order of the jobs."""
        keys: dict[int, str] = {}

        def taken() -> Iterator[Job]:
            for i, job in enumerate(jobs):
                keys[i] = job.key
                yield job

        for i, outcome in self._workers.each(evaluate, taken()):
            key = keys.pop(i)
            yield outcome or Outcome(key, None, "its process died, as for want of memory", 0.0)


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
