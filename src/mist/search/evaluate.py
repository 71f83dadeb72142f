"""One run as a value: a `Job` says what to run, an `Outcome` what came of it, an `Executor` runs many of them.

Between whoever asks for many runs and the runs. It never knows where it runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from mist.errors import ScenarioError
from mist.scenario import load
from mist.scenario.source import Source
from mist.scenario.value import Scenario


def summary_of(scenario: Scenario) -> dict[str, Any]:
    """Run it; the summary document."""
    return scenario.run().summary()


@dataclass(frozen=True, slots=True)
class Job:
    """A scenario to run, and how its outcome is called."""

    key: str
    source: Source | Mapping[str, Any] | str | Path
    overrides: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    measure: Callable[[Scenario], dict[str, Any]] = summary_of


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of the job `key`: a `summary`, or None and an `error`; `cpu_s` that it took."""

    key: str
    summary: dict[str, Any] | None
    error: str | None
    cpu_s: float


class Executor(Protocol):
    """Runs jobs somewhere."""

    def __enter__(self) -> Executor: ...

    def __exit__(self, *args: Any) -> None: ...

    def run(self, jobs: Iterable[Job]) -> Iterator[Outcome]:
        """One outcome for each job, as they finish."""
        ...


class Serial:
    """One after another, here."""

    def __enter__(self) -> Serial:
        return self

    def __exit__(self, *args: Any) -> None:
        pass

    def run(self, jobs: Iterable[Job]) -> Iterator[Outcome]:
        """The outcomes in the order of the jobs."""
        for job in jobs:
            began = time.process_time()
            summary, error = None, None
            try:
                assert not isinstance(job.source, Source)
                summary = job.measure(load(job.source, **job.overrides))
            except ScenarioError as problem:
                error = str(problem)
            yield Outcome(job.key, summary, error, time.process_time() - began)
