"""Runs of points on a prefix of the workload, with a seed: from the store where they are known, else by the executor.

Between the strategies, which say what to run next, and the jobs. The same prefix and seed give every point the same
requests; the first requests of each run are left out of its metrics. It never decides what is run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mist.scenario import Scenario
from mist.scenario.tables import build_tables
from mist.scenario.tenancy import SOLE
from mist.search.evaluate import Executor, Job
from mist.search.forecast import Forecast
from mist.search.keys import run_key
from mist.search.legal import Point
from mist.search.objectives import HOPELESS, Constraint, excerpt, excesses, maximised, objective
from mist.search.pareto import Score
from mist.search.store import Run, Store, excerpt_of
from mist.units import NS_PER_S

#: called with the runs that are done, those that there may be in all, and the seconds left (inf: can't be told yet)
Progress = Callable[[int, int, float], None]
#: the share that is all of the workload
WHOLE = 1.0


@dataclass
class Laboratory:
    """Runs points and keeps what came of them; `runs` are all that this search asked for, by (point, share, seed).

    `warmup`: share of each run's requests that are left out, where the scenario has no warm-up or window of its own.
    """

    executor: Executor
    store: Store
    objectives: tuple[str, ...]
    constraints: tuple[Constraint, ...]
    warmup: float = 0.1
    progress: Progress | None = None
    forecast: Forecast = field(default_factory=Forecast)
    runs: dict[tuple[int, float, int], Run] = field(default_factory=dict)
    _tables: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False)
    _scores: dict[tuple[int, float, tuple[int, ...]], Score] = field(default_factory=dict, repr=False)

    def measure(self, points: Iterable[Point], share: float, seeds: Sequence[int]) -> None:
        """Run what isn't known of `points` on the first `share` of the workload, with each seed."""
        wanted = {(point.number, share, seed): point for point in points for seed in seeds}
        wanted = {at: point for at, point in wanted.items() if at not in self.runs}
        jobs: dict[str, tuple[Job, Point]] = {}
        keys = {}
        # neighbours ask for the same tables of step times, which are made once for them
        for at, point in sorted(wanted.items(), key=lambda item: item[1].deployment):
            job = self._job(point, share, at[2])
            keys[at] = job.key
            if job.key not in self.store.runs:
                jobs[job.key] = job, point
            else:
                self.forecast.add(share, self.store.runs[job.key]["cpu_s"], is_new=False)
        self.forecast.begin_batch()
        left = len(jobs)
        self._tell(share, len(wanted), left)
        for outcome in self.executor.run(job for job, _ in jobs.values()):
            job, point = jobs[outcome.key]
            found = outcome.summary
            kept: Run = {"error": outcome.error} if found is None else {"excerpt": excerpt(found, point.devices)}
            about = {"choices": dict(point.choices), "share": share, **job.overrides}
            self.store.add(outcome.key, {**kept, "cpu_s": outcome.cpu_s}, **about)
            self.forecast.add(share, outcome.cpu_s, is_new=True)
            left -= 1
            self._tell(share, len(wanted), left)
        for at, key in keys.items():
            self.runs[at] = self.store.runs[key]

    def skipped(self, points: Iterable[Point], seed: int) -> float:
        """The largest share of a workload that comes before a warm-up or window of the scenario's own; 0 without one.

        It is 1 where requests wait for the system, since how many come before is known after the run alone.
        """
        timed = (point for point in points if point.scenario.warmup_s or point.scenario.window_s is not None)
        return max((_before(_seeded(each, seed)) for each in {_requests_of(p): p for p in timed}.values()), default=0.0)

    def score(self, point: Point, share: float, seeds: Sequence[int]) -> Score:
        """The means over the runs of `seeds` that there are: of each objective, and of what each constraint misses."""
        ran = tuple(seed for seed in seeds if (point.number, share, seed) in self.runs)
        at = (point.number, share, ran)
        if at not in self._scores:
            self._scores[at] = self._score([self.runs[point.number, share, seed] for seed in ran], share)
        return self._scores[at]

    def _score(self, runs: Sequence[Run], share: float) -> Score:
        found = [excerpt_of(run) for run in runs]
        if not found or any(each is None for each in found):
            return Score((math.inf,) * len(self.objectives), HOPELESS)
        values, missed = [], []
        for each in found:
            assert each is not None
            values.append([self._value(each, name) for name in self.objectives])
            missed.append(excesses(each, self.constraints, is_prefix=share < WHOLE))
        means = tuple(math.fsum(column) / len(column) for column in zip(*values, strict=True))
        names = missed[0].keys() | {name for each in missed for name in each}
        worst = max((math.fsum(each.get(name, 0.0) for each in missed) / len(missed) for name in names), default=0.0)
        return Score(means, max(worst, 0.0) if all(map(math.isfinite, means)) else HOPELESS)

    def _value(self, found: Mapping[str, Any], name: str) -> float:
        value = objective(found, name)
        if value is None:
            return math.inf
        return -value if maximised(name) else value

    def _job(self, point: Point, share: float, seed: int) -> Job:
        overrides = {"seed": seed, **self._prefix(point, share, seed)}
        return Job(run_key(point.resolved, overrides), point.resolved, overrides)

    def _prefix(self, point: Point, share: float, seed: int) -> dict[str, Any]:
        """What takes the first `share` of every tenant's requests, and leaves the first of these out of the metrics."""
        key = json.dumps([_requests_of(point), seed, share])
        if key not in self._tables:
            self._tables[key] = self._cut(_seeded(point, seed), share)
        return self._tables[key]

    def _cut(self, scenario: Scenario, share: float) -> dict[str, Any]:
        found: dict[str, Any] = {}
        arrivals = []
        for name, table in build_tables(scenario).items():
            number = math.ceil(len(table) * share)
            if share < 1:
                found["workload.limit" if name == SOLE else f"tenants.{name}.workload.limit"] = number
            if table.concurrency is None:
                arrivals.append(table.arrival_ns[:number])
        if arrivals and self.warmup and not scenario.warmup_s and scenario.window_s is None:
            times = np.sort(np.concatenate(arrivals))
            found["warmup_s"] = float(times[int(len(times) * self.warmup)] - times[0]) / NS_PER_S
        return found

    def _tell(self, share: float, wanted: int, left: int) -> None:
        if self.progress is not None:
            in_all = len(self.runs) + wanted
            self.progress(in_all - left, in_all + self.forecast.num_coming, self.forecast.left_s(share, left))


def _requests_of(point: Point) -> str:
    """All that a point's requests and measured window depend on, the seed apart."""
    own = {key: point.resolved.get(key) for key in ("workload", "tenants", "pipeline", "warmup_s", "window_s")}
    return json.dumps(own, sort_keys=True, default=str)


def _seeded(point: Point, seed: int) -> Scenario:
    return Scenario.from_source(point.scenario.source.with_value(("seed",), seed, "seed"))


def _before(scenario: Scenario) -> float:
    """The share of a scenario's requests that arrive before what is measured."""
    tables = build_tables(scenario).values()
    if any(table.concurrency is not None for table in tables):
        return 1.0
    start_s = scenario.window_s[0] if scenario.window_s else scenario.warmup_s
    arrival_ns = np.concatenate([table.arrival_ns for table in tables])
    return float(np.mean(arrival_ns < arrival_ns.min() + start_s * NS_PER_S))
