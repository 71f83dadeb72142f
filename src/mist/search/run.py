"""A search from its space to what it found: the points, a strategy, the baseline, the last round.

What `mist search` calls. Which strategy, executor and store there are is told by name. It computes nothing itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from mist.errors import Problem, ScenarioError
from mist.scenario.tables import build_tables
from mist.search.baseline import baseline_points, best_baseline, planned_baseline
from mist.search.choices import count
from mist.search.evaluate import Executor, raise_failures
from mist.search.finalists import last_round, planned_round
from mist.search.laboratory import WHOLE, Laboratory, Progress
from mist.search.ladders import Ladder, ladders_of
from mist.search.legal import Legal, check_any, legal_points
from mist.search.objectives import objective
from mist.search.outcome import Found, outcome
from mist.search.space import Space, read_space
from mist.search.store import excerpt_of, open_store
from mist.search.strategies import SAMPLERS, Halving, Sampled, bounded, exhaustive

STRATEGIES = ("halving", "bounded", "exhaustive", *SAMPLERS)
#: configurations, legal or not, beyond which a space is not enumerated
MAX_CONFIGURATIONS = 100_000


def search(
    space: Space | str | Path, executor: Executor, *, strategy: str = "halving", num_seeds: int = 5,
    num_trials: int = 256, store: Path | str | None = None, progress: Progress | None = None,
    examined: Callable[[int, int], None] | None = None,
) -> Found:  # fmt: skip
    """Search a space; the seeds are those of the scenario and the ones after it.

    `num_trials`: for samplers. `store`: a SQLite file or a database's URL, from which a search that was cut goes on.
    `progress` is told of runs, and `examined` of configurations before these: those done, and those in all.
    Raises ScenarioError for what is wrong with the space, or where nothing in it can be run or every run failed.
    """
    began = time.perf_counter()
    space = space if isinstance(space, Space) else read_space(space)
    kept = open_store(store, space.name, space.objectives)
    base = baseline_points(space)
    legal = Legal() if strategy in SAMPLERS else _enumerated(space, examined)
    sample = base[0] if base else next(iter(legal.points.values()), None)
    first = sample.scenario.seed if sample else 0
    seeds = range(first, first + num_seeds)
    lab = Laboratory(executor, kept, space.objectives, space.constraints, progress=progress)
    ladders = ladders_of(legal.points.values(), space.load)
    based = ladders_of(base, space.load)
    lab.forecast.expect("baseline", WHOLE, planned_baseline(based, seeds))
    if strategy not in ("exhaustive", "bounded"):  # which run every seed at once
        lab.forecast.expect("last round", WHOLE, partial(planned_round, lab, legal.points, seeds, ladders))
    _apply(strategy, num_trials, space, legal, ladders, lab, seeds)
    check_any(space, legal)
    _check_ran(space, lab)
    best = best_baseline(lab, based, seeds)
    # a sampler has found its points only now
    podium = last_round(lab, legal.points, seeds, ladders_of(legal.points.values(), space.load))
    _check_measured(space, lab)
    timing = _timing(lab, time.perf_counter() - began)
    return outcome(space, strategy, legal, lab, podium, list(seeds), best, timing)


def _enumerated(space: Space, examined: Callable[[int, int], None] | None) -> Legal:
    if (total := count(space.tree)) > MAX_CONFIGURATIONS:
        hint = f"--strategy {SAMPLERS[0]} samples it; {', '.join(SAMPLERS)} all do"
        place = space.own.problem(("space",), "")
        message = f"{total:,} configurations are more than the {MAX_CONFIGURATIONS:,} that are enumerated"
        raise ScenarioError(Problem(message, place.file, place.line, place.column, hint))
    return legal_points(space, examined)


def _apply(
    strategy: str, num_trials: int, space: Space, legal: Legal, ladders: Sequence[Ladder], lab: Laboratory,
    seeds: Sequence[int],
) -> None:  # fmt: skip
    if strategy == "exhaustive":
        exhaustive(lab, ladders, seeds)
    elif strategy == "bounded":
        bounded(lab, ladders, seeds)
    elif strategy == "halving":
        table = build_tables(next(iter(legal.points.values())).scenario)
        Halving().run(lab, ladders, seeds[0], sum(map(len, table.values())))
    else:
        Sampled(strategy, num_trials).run(lab, space, legal, seeds[0])


def _check_ran(space: Space, lab: Laboratory) -> None:
    errors = [run["error"] for run in lab.runs.values() if "error" in run]
    if errors and len(errors) == len(lab.runs):
        raise_failures(errors, partial(space.own.problem, ("space",)))


def _check_measured(space: Space, lab: Laboratory) -> None:
    """ScenarioError where an objective has no value in any run, such as dollars without prices."""
    found = [each for run in lab.runs.values() if (each := excerpt_of(run)) is not None]
    for index, name in enumerate(space.objectives):
        if found and all(objective(each, name) is None for each in found):
            hint = "prices: in the scenario, for what is in dollars; slo: for goodput"
            raise ScenarioError(space.own.problem(("objectives", index), f"no run has a value of {name}", hint))


def _timing(lab: Laboratory, wall_s: float) -> dict[str, float]:
    """Wall time of this search, and processor time of all its runs, those that it found in the store too."""
    spent = sum(run["cpu_s"] for run in lab.runs.values())
    return {"wall_s": wall_s, "cpu_s": spent, "runs_per_cpu_s": len(lab.runs) / spent if spent else 0.0}
