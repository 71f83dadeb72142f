"""How to find the front: all points, those that could matter, those that a halving leaves, or those a sampler asks for.

Between the legal points and the finalists. Each strategy is a deterministic function of what its runs give, whoever
runs them in whatever order; it leaves points measured on the whole workload with the first seed. It never looks into a
run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from mist.search.choices import resolve
from mist.search.laboratory import WHOLE, Laboratory
from mist.search.ladders import FAR, Ladder, climb, climb_best_first, fill, hopes_of, planned_fill
from mist.search.legal import Legal, Point
from mist.search.objectives import HOPELESS
from mist.search.pareto import Bar, Score, ranked
from mist.search.space import Space


def exhaustive(lab: Laboratory, ladders: Sequence[Ladder], seeds: Sequence[int]) -> None:
    """Every deployment on the whole workload, with every seed: what the others are held against.

    Its highest load is bisected, and loads below it are measured where they could be in the front.
    """
    lab.forecast.expect("fill", WHOLE, partial(planned_fill, lab, ladders, WHOLE, seeds))
    climb(lab, ladders, WHOLE, seeds)
    fill(lab, ladders, WHOLE, seeds)


def bounded(lab: Laboratory, ladders: Sequence[Ladder], seeds: Sequence[int]) -> None:
    """Branch and bound: what `exhaustive` finds, without the runs that couldn't change it.

    Every deployment runs on the whole workload at its lowest load. Then the most promising climb first, and the others
    only as far as their best case isn't covered by what is known.
    """
    lab.forecast.expect("fill", WHOLE, partial(planned_fill, lab, ladders, WHOLE, seeds))
    climb_best_first(lab, ladders, WHOLE, seeds, 0.0)
    fill(lab, ladders, WHOLE, seeds)


@dataclass(frozen=True, slots=True)
class Halving:
    """Successive halving on longer and longer prefixes of the same workload, with a second look at what was left.

    All deployments run on the shortest prefix, where their highest load is bisected, as far as it could be in the front
    there. Of the points on the longest prefix but the whole that are still promising, the best by Pareto rank go on to
    the next prefix, 1/`eta` as many as there are deployments, then 1/`eta` of these, ...; where none is left, those on
    the prefix below it, at last those that ran on none, with what a lower load says at best; until none is promising.
    A point is promising while it misses no constraint by more than `far`, nor a lower load of its deployment does on a
    longer prefix, and no point on the whole workload that takes part in as many contests is as good in every objective
    to within `margin`. What a prefix says is corrected by the median ratio of the whole workload to it, over the points
    that ran on both: those under the same load, for the higher it is the less of a prefix is steady, or where these are
    fewer than `min_pairs`, all. At last the deployments that ran on the whole workload run there under all loads that
    could be in the front.
    """

    eta: int = 4
    margin: float = 0.01
    far: float = FAR
    min_requests: int = 100
    min_points: int = 8
    min_pairs: int = 4

    def shares(self, num_requests: int, skipped: float = 0.0) -> list[float]:
        """The prefixes as shares of the workload, the whole last; none has fewer than `min_requests`.

        The first share of `skipped` isn't measured, so that these don't count.
        """
        shares = [WHOLE]
        while num_requests * (shares[0] / self.eta - skipped) >= self.min_requests:
            shares.insert(0, shares[0] / self.eta)
        return shares

    def run(self, lab: Laboratory, ladders: Sequence[Ladder], seed: int, num_requests: int) -> None:
        """Measure until nothing is promising."""
        points = {point.number: point for ladder in ladders for point in ladder.points}
        shares = self.shares(num_requests, lab.skipped(points.values(), seed))
        first, *others = [self._number(len(ladders), rung) for rung in range(-1, len(shares) - 1)]
        # those on longer prefixes twice, for there is a second look
        self._expect(lab, ladders, shares, [first, *(2 * each for each in others)] if others else [0])
        climb_best_first(lab, ladders, shares[0], [seed], self.far)
        at = {i: 0 if (i, shares[0], seed) in lab.runs else -1 for i in points}
        while climbing := self._next(lab, ladders, at, shares, seed):
            rung = at[climbing[0]] + 1
            lab.measure([points[i] for i in climbing], shares[rung], [seed])
            at.update(dict.fromkeys(climbing, rung))
        ran = [each for each in ladders if any(at[point.number] == len(shares) - 1 for point in each.points)]
        fill(lab, ran, WHOLE, [seed])

    def _next(
        self, lab: Laboratory, ladders: Sequence[Ladder], at: Mapping[int, int], shares: list[float], seed: int
    ) -> list[int]:
        """The points that go on, all from one prefix to the next; those of the rung -1 have run on none."""
        last = len(shares) - 1
        points = {point.number: point for ladder in ladders for point in ladder.points}
        loads = {p.number: load for ladder in ladders for p, load in zip(ladder.points, ladder.loads, strict=True)}
        said = [
            {i: lab.score(points[i], share, [seed]) for i, its in at.items() if its >= rung}
            for rung, share in enumerate(shares)
        ]
        whole = said[last]
        bar = Bar.of([(score, points[i].standing) for i, score in whole.items()])
        lost = self._lost(ladders, at, said)
        promising: dict[int, dict[int, Score]] = {}
        for rung in range(-1, last):
            there = said[max(rung, 0)]
            both = {i: (there[i], score) for i, score in whole.items()}
            open_ = {i: there[i] for i in there if at[i] == rung} if rung >= 0 else _unmeasured(lab, ladders, there)
            pairs = {load: [both[i] for i in both if loads[i] == load] for load in {*loads.values()}}
            here = {
                i: corrected(score, (pairs[loads[i]], list(both.values())), self.min_pairs)
                for i, score in open_.items()
                if i not in lost
            }
            promising[rung] = {
                i: score
                for i, score in here.items()
                if score.violation <= self.far and not bar.covers(score, points[i].standing, self.margin)
            }
        longest = max((rung for rung, its in promising.items() if its), default=-1)
        chosen = ranked(promising[longest])[: self._number(len(ladders), longest)]
        waiting = [len(promising[each]) - (len(chosen) if each == longest else 0) for each in range(-1, last)]
        self._expect(lab, ladders, shares, self._coming(waiting, longest, len(chosen), len(ladders)), len(whole))
        return chosen

    def _number(self, num_ladders: int, rung: int) -> int:
        """How many points go on from a rung at a time."""
        share: float = self.eta ** -max(rung + 1, 1)
        return max(self.min_points, math.ceil(num_ladders * share))

    def _coming(self, waiting: Sequence[int], rung: int, size: int, num_ladders: int) -> list[int]:
        """Runs to expect on each prefix after `size` points have gone on from a rung; `waiting` from the rung -1 on.

        These go on to the whole workload, with those that wait on the way. Where they come from a prefix, as many as
        may follow from below.
        """
        coming = [0] * len(waiting)
        for lowest, moved in ((rung + 1, size), (-1, 0)) if rung >= 0 else ((rung + 1, size),):
            for each in range(lowest, len(waiting) - 1):
                moved = min(self._number(num_ladders, each), moved + waiting[each + 1])
                coming[each + 1] += moved
        return coming

    def _expect(
        self, lab: Laboratory, ladders: Sequence[Ladder], shares: Sequence[float], coming: Sequence[int], ran: int = 0
    ) -> None:
        """Tell what may come on each prefix and, where there are loads, the others of deployments on the whole."""
        for share, number in zip(shares, coming, strict=True):
            lab.forecast.expect(f"halving {share}", share, number)
        if any(len(ladder.points) > 1 for ladder in ladders):
            lab.forecast.expect("fill", WHOLE, ran + coming[-1])

    def _lost(
        self, ladders: Sequence[Ladder], at: Mapping[int, int], said: Sequence[Mapping[int, Score]]
    ) -> frozenset[int]:
        """Points under a load that is above one which was missed: on the whole workload at all, else by `far`."""
        lost: set[int] = set()
        last = len(said) - 1
        for ladder in ladders:
            missed = -1
            for number in (point.number for point in ladder.points):
                if at[number] < missed:
                    lost.add(number)
                elif at[number] >= 0:
                    allowed = 0.0 if at[number] == last else self.far
                    if said[at[number]][number].violation > allowed:
                        missed = max(missed, at[number])
        return frozenset(lost)


def _unmeasured(lab: Laboratory, ladders: Sequence[Ladder], known: Mapping[int, Score]) -> dict[int, Score]:
    """What the points that have not run could be at best on the prefix of `known`."""
    hopes = ((ladder, hopes_of(lab.objectives, ladder, known)) for ladder in ladders)
    return {ladder.points[i].number: score for ladder, found in hopes for i, score in found.items()}


def corrected(score: Score, samples: Sequence[Sequence[tuple[Score, Score]]], least: int) -> Score:
    """What a prefix says as the whole workload would: by the points of which both are known, `least` of them at least.

    The first of `samples` that has so many is taken; without one the score stays as it is.
    """
    if score.violation >= HOPELESS:
        return score
    for sample in samples:
        known = [(a, b) for a, b in sample if a.violation < HOPELESS and b.violation < HOPELESS]
        if len(known) >= least:
            ratios = [
                np.median([b.values[k] / a.values[k] if a.values[k] else 1.0 for a, b in known])
                for k in range(len(score.values))
            ]
            values = (float(value * ratio) for value, ratio in zip(score.values, ratios, strict=True))
            return Score(tuple(values), score.violation)
    return score


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
        told, tries = 0, 0
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
            lab.forecast.expect("trials", WHOLE, self.num_trials - told - len(asked))
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
