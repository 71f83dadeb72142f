"""How to find the front: every point, those that a halving leaves, or those that an Optuna sampler asks for.

Between the legal points and the finalists. Each strategy is a deterministic function of what its runs give, whoever
runs them in whatever order; it leaves points measured on the whole workload with the first seed. It never looks into a
run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mist.search.choices import resolve
from mist.search.laboratory import Laboratory
from mist.search.legal import Legal, Point
from mist.search.objectives import HOPELESS
from mist.search.pareto import Score, covers, ranked
from mist.search.space import Space

WHOLE = 1.0


def exhaustive(lab: Laboratory, points: Mapping[int, Point], seeds: Sequence[int]) -> None:
    """Every point on the whole workload, with every seed: what the others are held against."""
    lab.planned = len(points) * len(seeds)
    lab.measure(points.values(), WHOLE, seeds)


@dataclass(frozen=True, slots=True)
class Halving:
    """Successive halving on longer and longer prefixes of the same workload, with a second look at what was left.

    All points run on the shortest prefix. Of the points on the longest prefix but the whole that are still promising,
    the best 1/`eta` by Pareto rank, as many as a halving of all points leaves there, go on to the next prefix; where
    none is left, those on the prefix below it; until none is promising. A point is promising while it misses no
    constraint by more than `far`, and no point on the whole workload is as good in every objective to within `margin`.
    What a prefix says is corrected by the median ratio of the whole workload to it, over the points that ran on both.
    """

    eta: int = 4
    margin: float = 0.01
    far: float = 0.2
    min_requests: int = 100
    min_points: int = 8

    def shares(self, num_requests: int) -> list[float]:
        """The prefixes as shares of the workload, the whole last; none has fewer than `min_requests`."""
        shares = [WHOLE]
        while num_requests * shares[0] / self.eta >= self.min_requests:
            shares.insert(0, shares[0] / self.eta)
        return shares

    def run(self, lab: Laboratory, points: Mapping[int, Point], seed: int, num_requests: int) -> None:
        """Measure until nothing is promising."""
        shares = self.shares(num_requests)
        at = dict.fromkeys(points, 0)
        lab.planned = sum(max(len(points) // self.eta**i, 1) for i in range(len(shares)))
        lab.measure(points.values(), shares[0], [seed])
        while climbing := self._next(lab, points, at, shares, seed):
            rung = at[climbing[0]] + 1
            lab.measure([points[i] for i in climbing], shares[rung], [seed])
            at.update(dict.fromkeys(climbing, rung))

    def _next(
        self, lab: Laboratory, points: Mapping[int, Point], at: Mapping[int, int], shares: list[float], seed: int
    ) -> list[int]:
        """The points that go on, all from one prefix to the next."""
        last = len(shares) - 1
        whole = {i: lab.score(points[i], WHOLE, [seed]) for i, rung in at.items() if rung == last}
        feasible = [score for score in whole.values() if score.violation <= 0]
        for rung in reversed(range(last)):
            said = {i: lab.score(points[i], shares[rung], [seed]) for i, its in at.items() if its >= rung}
            both = [(said[i], score) for i, score in whole.items()]
            here = {i: corrected(said[i], both, self.min_points) for i, its in at.items() if its == rung}
            promising = {
                i: score
                for i, score in here.items()
                if score.violation <= self.far and not any(covers(best, score, self.margin) for best in feasible)
            }
            if promising:
                number = max(self.min_points, math.ceil(len(points) / self.eta ** (rung + 1)))
                return ranked(promising)[:number]
        return []


def corrected(score: Score, both: list[tuple[Score, Score]], least: int) -> Score:
    """What a prefix says as the whole workload would, by the points of which both are known, from `least` on."""
    known = [(a, b) for a, b in both if a.violation < HOPELESS and b.violation < HOPELESS]
    if len(known) < least or score.violation >= HOPELESS:
        return score
    ratios = [
        np.median([b.values[k] / a.values[k] if a.values[k] else 1.0 for a, b in known])
        for k in range(len(score.values))
    ]
    return Score(tuple(float(value * ratio) for value, ratio in zip(score.values, ratios, strict=True)),
                 score.violation)  # fmt: skip


SAMPLERS = ("nsga2", "nsga3", "tpe")


@dataclass(frozen=True, slots=True)
class Sampled:
    """An Optuna sampler for spaces too large to enumerate: `num_trials` legal points, asked for by generations.

    A generation of `population` is asked for at once, run in any order and told in the order of asking: the same
    whatever the executor. Illegal choices are counted as everywhere, and told as failed.
    """

    sampler: str = "nsga2"
    num_trials: int = 256
    population: int = 32
    #: choices that are tried at most for each trial, where most are illegal
    max_tries: int = 50

    def run(self, lab: Laboratory, space: Space, legal: Legal, seed: int) -> None:
        """Measure what the sampler asks for on the whole workload."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(sampler=self._sampler(seed), directions=["minimize"] * len(space.objectives))
        lab.planned, told, tries = self.num_trials, 0, 0
        while told < self.num_trials and tries < self.max_tries * self.num_trials:
            asked: list[tuple[optuna.Trial, Point]] = []
            wanted = min(self.population, self.num_trials - told)
            while len(asked) < wanted and tries < self.max_tries * self.num_trials:
                tries += 1
                trial = study.ask()
                choices, settings = _choose(space, trial)
                point = legal.add(space, choices, settings, again=True)
                if point is None:
                    study.tell(trial, state=optuna.trial.TrialState.FAIL)
                else:
                    asked.append((trial, point))
            lab.measure([point for _, point in asked], WHOLE, [seed])
            for trial, point in asked:
                score = lab.score(point, WHOLE, [seed])
                trial.set_user_attr("violation", score.violation)
                study.tell(trial, [value if math.isfinite(value) else HOPELESS for value in score.values])
            told += len(asked)

    def _sampler(self, seed: int) -> Any:
        import warnings

        from optuna.samplers import NSGAIIISampler, NSGAIISampler, TPESampler

        def violation(trial: Any) -> tuple[float]:
            return (float(trial.user_attrs.get("violation", HOPELESS)),)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Optuna calls experimental
            if self.sampler == "tpe":
                return TPESampler(seed=seed, constant_liar=True, multivariate=True, group=True,
                                  n_startup_trials=self.population, constraints_func=violation)  # fmt: skip
            kind = NSGAIISampler if self.sampler == "nsga2" else NSGAIIISampler
            return kind(seed=seed, population_size=self.population, constraints_func=violation)


def _choose(space: Space, trial: Any) -> tuple[dict[str, str], dict[str, Any]]:
    made: dict[str, str] = {}

    def choose(name: str, labels: tuple[str, ...]) -> int:
        made[name] = trial.suggest_categorical(name, labels)
        return labels.index(made[name])

    return made, resolve(space.tree, choose)
