"""Capacity: the highest load that a deployment serves within its SLO, or the fewest clients that serve a load so.

Bisects for each seed by itself, all seeds side by side. The same seed gives the same requests at every value (common
random numbers), so that only the value differs between two runs. It never takes a verdict from anything but a run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from mist.errors import InvariantError, ScenarioError
from mist.scenario.clients import Pool
from mist.scenario.value import Scenario
from mist.search.evaluate import Executor, Job, Outcome
from mist.search.executors.serial import Serial
from mist.search.intervals import ALIKE, LEVEL, mean_interval, share_at_least
from mist.search.knobs import RATE, Knob, knob_of
from mist.search.pace import measured
from mist.search.verdict import FIGURES, Trial, trial_of

SCHEMA_VERSION = 1
#: called with the runs that are done and about how many there will be
Progress = Callable[[int, int], None]


@dataclass(slots=True)
class Bisection:
    """The trials of one seed, and the value that it needs next; `good` and `bad` are the closest so far."""

    knob: Knob
    seed: int
    tolerance: float
    trials: dict[float, Trial] = field(default_factory=dict)
    good: float | None = None
    bad: float | None = None
    is_level: bool = False
    """more clients changed nothing, and it still fails"""

    def next(self) -> float | None:
        """Where to try next: outwards until one holds and one doesn't, then between them; None when it is done."""
        if self.good is None:
            if self.bad is None:
                return self.knob.start
            return self.knob.easier(self.bad) if self.trials[self.bad].ran and not self.is_level else None
        if self.bad is None:
            return self.knob.harder(self.good)
        return self.knob.between(self.good, self.bad, self.tolerance)

    def add(self, trial: Trial) -> None:
        """Take a trial at the value that `next` gave."""
        self.trials[trial.value] = trial
        if trial.holds:
            self.good = trial.value
        else:
            before = self.trials.get(self.bad or 0.0)
            self.is_level = not self.knob.rises and before is not None and before.is_like(trial)
            self.bad = trial.value

    def num_left(self) -> int:
        """About how many trials it still needs."""
        if self.next() is None:
            return 0
        low, high = sorted((self.good or 1.0, self.bad or 1.0)) if self.good and self.bad else (1.0, 2.0)
        width = high - low if self.knob.is_whole else math.log(high / low) / math.log1p(self.tolerance)
        return math.ceil(math.log2(max(width, 2))) + (not (self.good and self.bad))

    def broken(self) -> list[tuple[float, float]]:
        """(fails at, though it holds at): neighbours whose verdicts are the wrong way round, from easy to hard."""
        order = sorted(
            (trial for trial in self.trials.values() if trial.ran),
            key=lambda trial: trial.value,
            reverse=not self.knob.rises,
        )
        return [(a.value, b.value) for a, b in pairwise(order) if b.holds and not a.holds]


@dataclass(frozen=True, eq=False)
class Capacity:
    """What was found: `value` holds for every seed, as far as each was bisected; None where no value does for one."""

    name: str
    knob: Knob
    tolerance: float
    bisections: Sequence[Bisection]
    value: float | None
    has_clock: bool = False
    """something happens at stated times, whatever the rate"""
    has_failures: bool = False
    """clients go down"""
    is_whole: bool = True
    """it wasn't interrupted"""

    def as_json(self) -> dict[str, Any]:
        """The document: the same for the same scenario, seeds and tolerance, wherever it was run.

        `found.value` (a factor of the scenario's rate, or a number) with its mean offered load in requests/s, what was
        served of it, P99 latencies and cost, all means over seeds;
        `confidence`: seeds that hold there, the share of all seeds that do at least, and the mean over seeds of what
        each found with its interval; `seeds`: what each found, the closest value that fails, and why; all `runs`.
        """
        runs = [trial for each in self.bisections for trial in sorted(each.trials.values(), key=lambda t: t.value)]
        return {
            "schema_version": SCHEMA_VERSION,
            "name": self.name,
            "complete": self.is_whole,
            "vary": self.knob.name,
            "looking_for": "highest" if self.knob.rises else "fewest",
            "tolerance": None if self.knob.is_whole else self.tolerance,
            "slo": [_target(target) for target in next((trial.targets for trial in runs if trial.ran), ())],
            "found": self._found(),
            "confidence": self._confidence(),
            "seeds": [self._of_seed(each) for each in self.bisections],
            "non_monotone": [
                {"seed": each.seed, "fails_at": fails, "holds_at": holds}
                for each in self.bisections
                for fails, holds in each.broken()
            ],
            "notes": list(self.notes()),
            "runs": [_run(trial) for trial in runs],
        }

    def notes(self) -> Iterator[str]:
        """What the reader should know of the answer, as sentences; none of a search that was interrupted."""
        if not self.is_whole:
            return
        for each in self.bisections:
            if each.good is None and each.bad is not None:
                level = " More clients change nothing." if each.is_level else ""
                because = each.trials[each.bad].because
                yield f"Seed {each.seed}: even at {self.shown(each.bad)} it fails: {because}.{level}"
                if self.has_failures and not self.knob.rises:
                    yield (
                        "Clients fail in this scenario: what one had under way is lost or late however many there are. "
                        "An SLO that leaves no room for that share holds for no number of them."
                    )
            elif each.bad is not None and not each.trials[each.bad].ran:
                because = each.trials[each.bad].because
                yield f"Seed {each.seed}: the search ended at {self.shown(each.bad)}, which {because}."
            elif each.bad is None and each.good is not None and self.knob.rises:
                yield (
                    f"Seed {each.seed}: no end was found: it holds at {self.shown(each.good)} too. So few requests are "
                    "over before a queue can grow: give more, or a stricter SLO."
                )
            for fails, holds in each.broken():
                yield f"Not monotone: seed {each.seed} fails at {self.shown(fails)} and holds at {self.shown(holds)}."
        yield from self._too_short()
        if self.has_clock and self.knob.name == RATE:
            yield (
                "Events and schedules stay at their times while the rate varies: at another rate they meet another "
                "part of the load, so that runs differ in that too."
            )
        if self.is_same_for_all_seeds:
            yield ALIKE

    @property
    def is_same_for_all_seeds(self) -> bool:
        """Whether several seeds gave one and the same: nothing is drawn at random."""
        return len(self.bisections) > 1 and len({_sameness(each) for each in self.bisections}) == 1

    def _too_short(self) -> Iterator[str]:
        for each in self.bisections:
            closest = [each.trials[value] for value in (each.good, each.bad) if value is not None]
            short = [trial for trial in closest if trial.num_enough]
            if short and (pace := short[0].pace) is not None:
                number = max(trial.num_enough for trial in each.trials.values())
                yield (
                    f"Seed {each.seed}: too short to tell: at {self.shown(short[0].value)} requests arrive for "
                    f"{pace.span_s:.3g} s only, and take {pace.e2e_s:.3g} s each on average; "
                    f"workload.num_requests of {number:,} or more (or a longer trace) would do."
                )

    def shown(self, value: float) -> str:
        """A value as text: "0.85 x the rate", "3 clients"."""
        if self.knob.name == RATE:
            return f"{value:.4g} x the rate"
        return f"{value:.4g} {'at once' if self.knob.rises else 'client' + 's' * (value != 1)}"

    def _at(self, value: float) -> list[Trial]:
        return [each.trials[value] for each in self.bisections if value in each.trials]

    def _found(self) -> dict[str, Any] | None:
        if self.value is None:
            return None
        trials = self._at(self.value)
        return {
            "value": self.value,
            "requests_per_s": _mean(trial.requests_per_s for trial in trials),
            "devices": int(self.value) * self.knob.devices or None,
            **{name: _mean(trial.figures.get(name) for trial in trials) for name in FIGURES},
        }

    def _confidence(self) -> dict[str, Any]:
        held = [trial.holds for trial in self._at(self.value)] if self.value is not None else []
        found = [each.good for each in self.bisections if each.good is not None]
        mean, low, high = mean_interval(found) if self.value is not None else (None, None, None)
        return {
            "level": LEVEL,
            "num_seeds": len(self.bisections),
            "num_hold": sum(held),
            "share_at_least": share_at_least(sum(held), len(held)) if held else None,
            "mean": mean,
            "low": low,
            "high": high,
        }

    def _of_seed(self, each: Bisection) -> dict[str, Any]:
        good, bad = each.trials.get(each.good or 0.0), each.trials.get(each.bad or 0.0)
        return {
            "seed": each.seed,
            "value": each.good,
            "requests_per_s": good.requests_per_s if good else None,
            "fails_at": each.bad,
            "because": bad.because if bad else None,
            "num_runs": len(each.trials),
        }


class Interrupted(KeyboardInterrupt):
    """The user stopped a search; `known` is what its finished rounds say."""

    def __init__(self, known: Capacity) -> None:
        super().__init__()
        self.known = known


def capacity(
    scenario: Scenario,
    *,
    vary: str = RATE,
    seeds: Sequence[int] | None = None,
    tolerance: float = 0.02,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> Capacity:
    """Bisect `vary` for each of `seeds` (left out: the scenario's) until good and bad are within `tolerance`.

    What is found for all seeds is the least that any of them found, and is tried for each, as are easier values. A run
    holds where every target of its SLOs is met and it isn't saturated. `executor` left out: one run after another.
    A value at which it can't be run fails, and ends the search on its side. Raises ScenarioError for a scenario without
    SLO, or that doesn't run as it is; Interrupted, with what is known so far, where the user stops it.
    """
    if not any(metric for tenant in scenario.tenants.values() for metric in tenant.slo.model_dump().values()):
        hint = "such as slo: {ttft_s: {p99: 1.5}, tpot_s: {p99: 0.05}}, in the file or by --set"
        raise ScenarioError(scenario.problem(("slo",), "there is no SLO, so any load would do", hint))
    knob = knob_of(scenario, vary)
    searches = {seed: Bisection(knob, seed, tolerance) for seed in seeds or (scenario.seed,)}
    runs = _Runs(scenario, knob, executor or Serial(), progress)
    has_clock = bool(scenario.events) or any(
        pool.scaling is not None and len(pool.scaling.schedule) > 0
        for pool in scenario.clients.values()
        if isinstance(pool, Pool)
    )
    has_failures = any(event.client_down for event in scenario.events)
    known = Capacity(scenario.name, knob, tolerance, list(searches.values()), None, has_clock, has_failures)
    try:
        return replace(known, value=_bisect(runs, searches))
    except KeyboardInterrupt:
        raise Interrupted(replace(known, is_whole=False)) from None


def _bisect(runs: _Runs, searches: Mapping[int, Bisection]) -> float | None:
    """Run until every search has ended; the value that each of them holds at, None where one has none."""
    knob = runs.knob
    while wanted := {seed: x for seed, each in searches.items() if (x := each.next()) is not None}:
        left = len(knob.checks(knob.start)) * len(searches) + sum(each.num_left() for each in searches.values())
        for trial in runs.at(wanted.items(), left):
            searches[trial.seed].add(trial)
    found = [each.good for each in searches.values() if each.good is not None]
    value = None if len(found) < len(searches) else min(found) if knob.rises else max(found)
    if value is not None:
        checks = [(seed, x) for x in (value, *knob.checks(value)) for seed in searches]
        missing = [(seed, x) for seed, x in checks if x not in searches[seed].trials]
        for trial in runs.at(missing, len(missing)):
            searches[trial.seed].trials[trial.value] = trial
    return value


@dataclass(slots=True)
class _Runs:
    """Runs of a scenario at other values and with other seeds."""

    scenario: Scenario
    knob: Knob
    executor: Executor
    progress: Progress | None
    num_done: int = 0

    def at(self, wanted: Any, num_left: int) -> Iterator[Trial]:
        """A trial for each (seed, value), in their order; `num_left` runs are about to come, these included."""
        order = list(wanted)
        jobs = [
            Job(f"{i}", self.scenario.source, {"seed": seed, **self.knob.overrides(value)}, measure=measured)
            for i, (seed, value) in enumerate(order)
        ]
        total = self.num_done + num_left
        found: dict[int, Trial] = {}
        for outcome in self.executor.run(jobs):
            seed, value = order[int(outcome.key)]
            found[int(outcome.key)] = self._trial(seed, value, outcome)
            self.num_done += 1
            if self.progress is not None:
                self.progress(self.num_done, max(total, self.num_done))
        return (found[i] for i in range(len(order)))

    def _trial(self, seed: int, value: float, outcome: Outcome) -> Trial:
        """One that can't be run fails; the first of all says that the scenario is wrong."""
        if outcome.summary is not None:
            return trial_of(seed, value, outcome.summary)
        error = outcome.error or ""
        if outcome.is_bug or outcome.has_crashed or value == self.knob.start:
            raise (InvariantError if outcome.is_bug else ScenarioError)(f"{self.knob.name} at {value:g}: {error}")
        return Trial(seed, value, None, False, f"can't be run: {' '.join(error.split())}", (), ran=False)


def _target(target: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in target.items() if key in ("tenant", "metric", "statistic") or "target" in key}


def _run(trial: Trial) -> dict[str, Any]:
    actual = [{key: v for key, v in target.items() if not key.startswith("target")} for target in trial.targets]
    return {
        "seed": trial.seed,
        "value": trial.value,
        "requests_per_s": trial.requests_per_s,
        "holds": trial.holds,
        "because": trial.because or None,
        "num_enough": trial.num_enough or None,
        **trial.figures,
        "targets": actual,
    }


def _mean(values: Iterable[float | None]) -> float | None:
    """Of those that are known."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _sameness(each: Bisection) -> str:
    return repr([(trial.value, trial.targets) for trial in each.trials.values()])
