"""The last round: whoever may be in the front, or best at something, runs the whole workload with every seed.

After a strategy, before the result. What was best with one seed by chance falls back, and who is best then runs with
every seed too, until the best all have. Of a deployment whose load rises the highest that every seed together holds is
found so. It never widens the search to other deployments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mist.search.laboratory import WHOLE, Laboratory
from mist.search.ladders import Ladder, beside
from mist.search.legal import Point
from mist.search.pareto import Score, front

#: which points count for a title
Eligible = Callable[[Point], bool]
#: about the size of a front of which nothing is known
_FRONT = 8


@dataclass(frozen=True, slots=True)
class Podium:
    """Who won: the front by number, the best feasible by title (None: there is none), and the final scores."""

    front: list[int]
    best: dict[str, int | None]
    scores: Mapping[int, Score]


def titles(objectives: Sequence[str]) -> dict[str, tuple[int, Eligible]]:
    """What one can be best at: the index of an objective, and who may compete."""
    return {
        **{f"best {name}": (k, lambda point: True) for k, name in enumerate(objectives)},
        "best single vendor": (0, lambda point: len(point.vendors) == 1),
        "best homogeneous": (0, lambda point: len(point.kinds) == 1),
    }


def last_round(
    lab: Laboratory, points: Mapping[int, Point], seeds: Sequence[int], ladders: Sequence[Ladder] = ()
) -> Podium:
    """Measure with every seed until the front and all the best have been, and no load of `ladders` may be better."""
    measured = sorted({number for number, share, _ in lab.runs if share == WHOLE and number in points})
    seeded = {n for n in measured if all((n, WHOLE, seed) in lab.runs for seed in seeds)}
    while True:
        scores = {n: lab.score(points[n], WHOLE, seeds if n in seeded else seeds[:1]) for n in measured}
        best = {title: _best(scores, points, k, may) for title, (k, may) in titles(lab.objectives).items()}
        podium = Podium(front(scores), best, scores)
        missing = {*podium.front, *(number for number in best.values() if number is not None)} - seeded
        if len(seeds) > 1:  # one has judged them all already
            missing = missing or beside(lab, ladders, scores, seeded)
        later = max(_times(ladders) * len(podium.front) - len(seeded | missing), len(missing) / 2) if missing else 0
        lab.forecast.expect("last round", WHOLE, later * (len(seeds) - 1))
        if not missing:
            return podium
        lab.measure([points[number] for number in sorted(missing)], WHOLE, seeds)
        seeded |= missing
        measured = sorted({*measured, *missing})


def planned_round(
    lab: Laboratory, points: Mapping[int, Point], seeds: Sequence[int], ladders: Sequence[Ladder]
) -> float:
    """About how many runs `last_round` takes, by the front on the longest prefix so far; before any run of `_FRONT`."""
    longest = max((share for number, share, _ in lab.runs if number in points), default=0.0)
    ran = {number for number, share, _ in lab.runs if share == longest and number in points}
    known = len(front({number: lab.score(points[number], longest, seeds[:1]) for number in ran})) if ran else _FRONT
    return _times(ladders) * known * (len(seeds) - 1)


def _times(ladders: Sequence[Ladder]) -> float:
    """How many run with every seed for each that is in the front.

    Whoever falls back makes room for another, and under loads each has a neighbour: 1.8, 2.1 and 2.6 times the front in
    the three example spaces.
    """
    return 2.25 if any(len(ladder.points) > 1 for ladder in ladders) else 1.25


def _best(scores: Mapping[int, Score], points: Mapping[int, Point], k: int, may: Eligible) -> int | None:
    """The best feasible in one objective; of equals by the other objectives, then the lowest number."""
    eligible = [i for i, score in scores.items() if score.violation <= 0 and may(points[i])]
    return min(eligible, key=lambda i: (scores[i].values[k], scores[i].values, i), default=None)
