"""One run as a value: a `Job` says what to run, an `Outcome` what came of it, an `Executor` runs many of them.

Between whoever asks for many runs (searches, capacities, comparisons) and the runs. What is wrong with one job is its
outcome's error and stops no other. It never knows where it runs, so that the place changes nothing in an outcome.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Protocol

from mist.errors import InvariantError, Problem, ScenarioError
from mist.metrics.words import counted
from mist.scenario.build import run
from mist.scenario.source import Source, key_path, read_file, read_mapping
from mist.scenario.value import Scenario

Summary = dict[str, Any]

_CRASHED = "the simulator failed: "
_BROKEN = "a law of the simulation broke, which is a bug: "
#: errors that are told where all runs failed, the most frequent first
_MOST_ERRORS = 3


def summary_of(scenario: Scenario) -> Summary:
    """Run it; the summary document without its wall times, which are all that two runs of it differ in."""
    summary = run(scenario).summary()
    summary["simulator"] = {key: value for key, value in summary["simulator"].items() if key != "timing"}
    return summary


@dataclass(frozen=True, slots=True)
class Job:
    """A scenario to run, and how its outcome is called.

    `source`: a scenario's file, its mapping (relative paths in it start at `folder`, left out: the current one) or its
    `Source`. `overrides` replace values by dotted path, such as {"seed": 3, "workload.num_requests": 500}. `measure`
    runs it and says what is kept, as plain values; a function of a module, for it is sent by name.
    """

    key: str
    source: Source | Mapping[str, Any] | str | Path
    overrides: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    measure: Callable[[Scenario], dict[str, Any]] = summary_of

    def scenario(self) -> Scenario:
        """The scenario that is run; ScenarioError with all that is wrong with it."""
        source = self.source
        if isinstance(source, Mapping):
            source = read_mapping(source, folder=self.folder)
        elif not isinstance(source, Source):
            source = read_file(source)
        for dotted, value in self.overrides.items():
            source = source.with_value(key_path(dotted), value, f"{dotted}={value}")
        return Scenario.from_source(source)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of the job `key`: a `summary` (what its `measure` gave) or, where it failed, None and an `error`.

    `cpu_s`: seconds of one core that it took, the only value that differs between two evaluations of a job.
    """

    key: str
    summary: Summary | None
    error: str | None
    cpu_s: float

    @property
    def is_bug(self) -> bool:
        """Whether it failed by a law of the simulation that broke, which no scenario should do."""
        return self.error is not None and self.error.startswith(_BROKEN)

    @property
    def has_crashed(self) -> bool:
        """Whether it failed by an exception that nobody foresaw."""
        return self.error is not None and self.error.startswith(_CRASHED)


class Executor(Protocol):
    """Runs jobs somewhere; registered under the kind `executor`. Within a `with` block it keeps what it has started."""

    def __enter__(self) -> Executor: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None: ...

    def run(self, jobs: Iterable[Job]) -> Iterator[Outcome]:
        """One outcome for each job, as they finish, in any order; jobs are taken as there is room for them.

        Whoever leaves the iteration early stops what is under way.
        """
        ...


def evaluate(job: Job) -> Outcome:
    """Run one job; what goes wrong is told in its outcome, but for interruptions."""
    began = time.process_time()
    summary, error = None, None
    try:
        summary = job.measure(job.scenario())
    except ScenarioError as problem:
        error = str(problem)
    except InvariantError as problem:
        error = f"{_BROKEN}{problem}"
    except Exception as problem:
        # many are run for one answer: whatever one of them brings to light is told with it, and costs no other
        error = f"{_CRASHED}{type(problem).__name__}: {problem}"
    return Outcome(job.key, summary, error, time.process_time() - began)


def _problem(message: str, hint: str) -> Problem:
    return Problem(message, hint=hint)


def raise_failures(errors: Sequence[str], problem: Callable[[str, str], Problem] = _problem) -> NoReturn:
    """ScenarioError that counts the `errors` that all runs failed with; InvariantError where a law broke in one.

    `problem` places a message and a hint.
    """
    counts = Counter(errors)
    told = [f"{number:,} with {error.splitlines()[0]}" for error, number in counts.most_common(_MOST_ERRORS)]
    if len(counts) > _MOST_ERRORS:
        told.append(f"and {len(counts) - _MOST_ERRORS:,} other errors")
    found = problem(f"all {counted(len(errors), 'run')} failed", "\n    ".join(told))
    if any(error.startswith(_BROKEN) for error in counts):
        raise InvariantError(str(found))
    raise ScenarioError(found)
