"""Runs every point, several at a time, and keeps what came out: a line of a file for each, so that it can be resumed.

The second part of a validation: points go in, comparisons come out, one for each measured value. Whatever a point does,
it ends as a comparison or as a skip with its reason. It computes no error statistics.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mist.errors import ScenarioError
from mist.scenario.build import run
from mist.scenario.result import Result
from mist.scenario.value import Scenario
from mist.validation import journal as journals
from mist.validation.limit import TooLong, time_limit
from mist.validation.outcome import Outcome
from mist.validation.points import Point, Skip
from mist.validation.setting import Overrides, setting_of
from mist.workers import each

#: seconds of real time that one point may take, and requests that are run of one
LIMIT_S = 120.0
MAX_REQUESTS = 1_000_000

#: called with the points that are done and all of them
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Comparison:
    """One measured value beside the simulated one; `ape` is 100 |simulated / measured - 1|, `error` with its sign.

    `profile` is the engine profile that stood for the engine; `perf` the performance model that steps were priced by.
    """

    id: str
    point: str
    source: str
    metric: str
    measured: float
    simulated: float
    ape: float
    error: float
    saturated: bool
    trust: str
    device: str
    engine: str
    model: str
    profile: str
    perf: str = ""


@dataclass(frozen=True, slots=True)
class Evaluated:
    """All comparisons of a point, the rows that aren't compared as (id, reason), and what was taken for granted."""

    point: str
    comparisons: tuple[Comparison, ...]
    skipped: tuple[tuple[str, str], ...]
    assumptions: tuple[str, ...] = ()


def evaluate(
    points: Sequence[Point],
    folder: Path,
    *,
    overrides: Overrides | None = None,
    perf: Any = None,
    workers: int = 0,
    journal: Path | None = None,
    progress: Progress | None = None,
    limit_s: float = LIMIT_S,
) -> list[Evaluated]:
    """Every point, in order. `workers` 0 takes a process per core, 1 none but this one.

    `journal`: a file in which each finished point is a line; points that are in it already, run by the same simulator
    from the same columns, aren't run again. A point that takes longer than `limit_s` seconds is a skip.
    """
    work = partial(evaluate_point, folder=folder, overrides=overrides, perf=perf, limit_s=limit_s)
    found: dict[int, Evaluated] = {}
    keys: list[str] = []
    if journal is not None:
        known = journals.read(journal)
        keys = [journals.key_of(point, folder, overrides, perf, limit_s) for point in points]
        found = {i: _from_plain(known[key]) for i, key in enumerate(keys) if key in known}
    missing = [i for i in range(len(points)) if i not in found]
    if progress is not None:
        progress(len(found), len(points))
    with journals.appending(journal) if journal is not None else nullcontext() as file:
        for place, evaluated in each(work, [points[i] for i in missing], workers or os.cpu_count() or 1):
            i = missing[place]
            found[i] = evaluated or _none(points[i], "the simulator failed: its process died, as for want of memory")
            if file is not None:
                journals.add(file, keys[i], asdict(found[i]))
            if progress is not None:
                progress(len(found), len(points))
    return [found[i] for i in range(len(points))]


def evaluate_point(
    point: Point, *, folder: Path, overrides: Overrides | None = None, perf: Any = None, limit_s: float = LIMIT_S
) -> Evaluated:
    """Run one point and compare; never raises for what is wrong with the point, or with the simulator."""
    try:
        with time_limit(limit_s):
            return _compared(point, folder, overrides, perf)
    except Skip as skip:
        return _none(point, str(skip))
    except ScenarioError as error:
        return _none(point, "; ".join(problem.message for problem in error.problems))
    except TooLong:
        return _none(point, f"the simulation took longer than {limit_s:g} s")
    except Exception as error:
        # a file of points is judged as a whole: whatever one of them brings to light is counted, with what it was
        return _none(point, f"the simulator failed: {type(error).__name__}: {error}")


def _compared(point: Point, folder: Path, overrides: Overrides | None, perf: Any) -> Evaluated:
    setting = setting_of(point, folder, overrides, perf)
    _check_size(setting.scenario)
    result = run(setting.scenario)
    outcome, priced_by = Outcome(point, setting, result), _priced_by(result)
    comparisons, skipped = [], list(point.skipped)
    for row in point.measured:
        try:
            simulated = outcome.value(row.metric)
        except Skip as skip:
            skipped.append((row.id, str(skip)))
            continue
        except Exception as error:
            # as of a whole point: one value that can't be computed costs no other
            skipped.append((row.id, f"the simulator failed: {type(error).__name__}: {error}"))
            continue
        error_pct = 100 * (simulated / row.value - 1)
        comparisons.append(
            Comparison(
                row.id, point.name, point["source"], row.metric, row.value, simulated, abs(error_pct), error_pct,
                setting.saturated, row.trust, point["device"], point["engine"], point["model"], setting.engine,
                priced_by,
            )
        )  # fmt: skip
    return Evaluated(point.name, tuple(comparisons), tuple(skipped), setting.assumptions)


def _check_size(scenario: Scenario) -> None:
    number = sum(tenant.workload.num_requests or 0 for tenant in scenario.tenants.values())
    if number > MAX_REQUESTS:
        raise Skip(f"{number:,} requests are more than the {MAX_REQUESTS:,} that are run of a point")


def _priced_by(result: Result) -> str:
    """The performance model of the first pool."""
    return str(next(iter(result.metrics["expected_error"].values()))["perf"])


def _none(point: Point, reason: str) -> Evaluated:
    return Evaluated(point.name, (), (*point.skipped, *((row.id, reason) for row in point.measured)))


def _from_plain(row: Mapping[str, Any]) -> Evaluated:
    """What a line of the journal says."""
    comparisons = tuple(Comparison(**c) for c in row["comparisons"])
    skipped = tuple((i, reason) for i, reason in row["skipped"])
    return Evaluated(row["point"], comparisons, skipped, tuple(row["assumptions"]))
