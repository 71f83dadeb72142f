"""Runs every point, several at a time, and keeps what came out: a line of a file for each, so that it can be resumed.

The second part of a validation: points go in, comparisons come out, one for each measured value. Whatever a point does,
it ends as a comparison or as a skip with its reason. It computes no error statistics.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mist import __version__
from mist.errors import InvariantError, Problem, ScenarioError
from mist.scenario.build import run
from mist.validation.outcome import Outcome
from mist.validation.points import Point, Skip
from mist.validation.setting import Overrides, setting_of

#: called with the points that are done and all of them
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Comparison:
    """One measured value beside the simulated one; `ape` is 100 |simulated / measured - 1|, `error` with its sign.

    `profile` is the engine profile that stood for the engine.
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


@dataclass(frozen=True, slots=True)
class Evaluated:
    """All comparisons of a point, and the rows that aren't compared as (id, reason)."""

    point: str
    comparisons: tuple[Comparison, ...]
    skipped: tuple[tuple[str, str], ...]


def evaluate(
    points: Sequence[Point],
    folder: Path,
    *,
    overrides: Overrides | None = None,
    perf: Any = None,
    workers: int = 0,
    journal: Path | None = None,
    progress: Progress | None = None,
) -> list[Evaluated]:
    """Every point, in order. `workers` 0 takes a process per core, 1 none but this one.

    `journal`: a file in which each finished point is a line; points that are in it already, run by the same version of
    MIST from the same columns, aren't run again.
    """
    known = _read_journal(journal) if journal is not None else {}
    keys = [_key(point, overrides, perf) for point in points]
    missing = [i for i, key in enumerate(keys) if key not in known]
    found = {i: known[key] for i, key in enumerate(keys) if key in known}
    work = partial(evaluate_point, folder=folder, overrides=overrides, perf=perf)
    # long ones first would balance better, but nobody knows which they are; small chunks do nearly as well
    with _opened(journal) as file:
        for i, evaluated in zip(missing, _mapped(work, [points[i] for i in missing], workers), strict=True):
            found[i] = evaluated
            if file is not None:
                file.write(json.dumps({"key": keys[i], **asdict(evaluated)}) + "\n")
                file.flush()
            if progress is not None:
                progress(len(found), len(points))
    return [found[i] for i in range(len(points))]


def evaluate_point(point: Point, *, folder: Path, overrides: Overrides | None = None, perf: Any = None) -> Evaluated:
    """Run one point and compare; never raises for what is wrong with the point."""
    try:
        setting = setting_of(point, folder, overrides, perf)
        outcome = Outcome(point, setting, run(setting.scenario))
    except Skip as skip:
        return _none(point, str(skip))
    except ScenarioError as error:
        return _none(point, "; ".join(problem.message for problem in error.problems))
    except (InvariantError, ArithmeticError, MemoryError) as error:
        return _none(point, f"the simulator failed: {type(error).__name__}: {error}")
    comparisons, skipped = [], list(point.skipped)
    for row in point.measured:
        try:
            simulated = outcome.value(row.metric)
        except Skip as skip:
            skipped.append((row.id, str(skip)))
            continue
        error_pct = 100 * (simulated / row.value - 1)
        comparisons.append(
            Comparison(
                row.id, point.name, point["source"], row.metric, row.value, simulated, abs(error_pct), error_pct,
                setting.saturated, point.trust, point["device"], point["engine"], point["model"], setting.engine,
            )
        )  # fmt: skip
    return Evaluated(point.name, tuple(comparisons), tuple(skipped))


def _none(point: Point, reason: str) -> Evaluated:
    return Evaluated(point.name, (), (*point.skipped, *((row.id, reason) for row in point.measured)))


def _mapped(work: Callable[[Point], Evaluated], points: Sequence[Point], workers: int) -> Iterator[Evaluated]:
    workers = min(workers or os.cpu_count() or 1, len(points))
    if workers <= 1:
        yield from map(work, points)
        return
    with ProcessPoolExecutor(workers) as pool:
        try:
            yield from pool.map(work, points, chunksize=2)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _key(point: Point, overrides: Overrides | None, perf: Any) -> str:
    """What a point's outcome depends on, as a short text."""
    rows = [(m.id, m.metric, m.value) for m in point.measured]
    text = json.dumps([__version__, dict(point.columns), rows, overrides, perf], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _read_journal(path: Path) -> dict[str, Evaluated]:
    if not path.exists():
        return {}
    found = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            found[row["key"]] = Evaluated(
                row["point"],
                tuple(Comparison(**c) for c in row["comparisons"]),
                tuple((i, reason) for i, reason in row["skipped"]),
            )
        except (ValueError, KeyError, TypeError):
            if number == 1:
                hint = "name another file; one that a validation wrote is continued"
                raise ScenarioError(Problem("is no journal of a validation", str(path), 1, 1, hint)) from None
            continue  # a line that was cut when the run was killed
    return found


def _opened(path: Path | None) -> Any:
    if path is None:
        return nullcontext()
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n")
    file = path.open("a", encoding="utf-8")
    if torn:
        file.write("\n")
    return file


def skipped_rows(evaluated: Iterable[Evaluated]) -> list[tuple[str, str]]:
    """All rows that aren't compared, with why."""
    return [row for each in evaluated for row in each.skipped]
