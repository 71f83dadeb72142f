"""Jobs one after another in this process: the reference for all other executors, and the one to debug with.

It is asked for a name, by tests, and where there is one core. It starts nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType

from mist.registry import register
from mist.search.evaluate import Job, Outcome, evaluate


@register("executor", "serial")
@dataclass(frozen=True)
class Serial:
    """One after another, here."""

    def __enter__(self) -> Serial:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        pass

    def run(self, jobs: Iterable[Job]) -> Iterator[Outcome]:
        """The outcomes in the order of the jobs."""
        return map(evaluate, jobs)
