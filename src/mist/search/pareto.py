"""Comparing deployments: which dominates which, and in what order they deserve another look.

Scores come in, orders and fronts go out. It knows nothing of scenarios.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Score:
    """A deployment's `values`, all to be minimised, and by what share it misses its worst constraint (0: feasible)."""

    values: tuple[float, ...]
    violation: float = 0.0


def covers(one: Score, other: Score, margin: float = 0.0) -> bool:
    """Whether the feasible `one` is as good as `other` in everything, to within a share of `margin` of it."""
    return one.violation <= 0 and all(a <= b + margin * abs(b) for a, b in zip(one.values, other.values, strict=True))


@dataclass(frozen=True, slots=True)
class Bar:
    """What is to be beaten: by standing, the front of the feasible that have that standing or a higher one.

    A point with a lower standing takes part in fewer contests, so it beats none with a higher one.
    """

    fronts: tuple[tuple[Score, ...], ...]

    @classmethod
    def of(cls, scored: Sequence[tuple[Score, int]], num_standings: int = 3) -> Bar:
        """That of scores with their standings, 0 to `num_standings` - 1."""
        fronts = []
        for standing in range(num_standings):
            known = {i: score for i, (score, its) in enumerate(scored) if its >= standing}
            fronts.append(tuple(known[i] for i in front(known)))
        return cls(tuple(fronts))

    def covers(self, score: Score, standing: int, margin: float = 0.0) -> bool:
        """Whether something is as good as `score` in everything, to within a share of `margin` of it."""
        return any(covers(one, score, margin) for one in self.fronts[standing])


def front(scores: Mapping[int, Score]) -> list[int]:
    """The feasible that no other feasible one dominates, by their first value; of equals the lowest number."""
    feasible = {i: score for i, score in scores.items() if score.violation <= 0}
    layers = _layers([score.values for score in feasible.values()])
    found: dict[tuple[float, ...], int] = {}
    for (i, score), layer in zip(feasible.items(), layers, strict=True):
        if layer == 0:
            found[score.values] = min(i, found.get(score.values, i))
    return [found[values] for values in sorted(found)]


def ranked(scores: Mapping[int, Score]) -> list[int]:
    """All, the most promising first: the feasible by Pareto rank, then the others by what they miss.

    Within a rank, those that are best in something first, in turns.
    """
    feasible = [i for i, score in scores.items() if score.violation <= 0]
    layers = _layers([scores[i].values for i in feasible])
    found: list[int] = []
    for layer in sorted(set(layers)):
        found += _in_turns([i for i, its in zip(feasible, layers, strict=True) if its == layer], scores)
    rest = (i for i, score in scores.items() if score.violation > 0)
    return found + sorted(rest, key=lambda i: (scores[i].violation, scores[i].values, i))


def _in_turns(members: Sequence[int], scores: Mapping[int, Score]) -> list[int]:
    """By the first value, by the second, ... in turns, so that a few of them span the rank."""
    orders = [sorted(members, key=partial(_from, scores, k)) for k in range(len(scores[members[0]].values))]
    return list(dict.fromkeys(i for turn in zip(*orders, strict=True) for i in turn))


def _from(scores: Mapping[int, Score], k: int, number: int) -> tuple[float, tuple[float, ...], int]:
    """What to sort by for the order of the value `k`."""
    values = scores[number].values
    return values[k], values, number


def _layers(values: Sequence[tuple[float, ...]]) -> list[int]:
    """The Pareto rank of each: 0 where nothing dominates it, 1 where only those of rank 0 do, and so on."""
    if not values:
        return []
    points = np.array(values, dtype=float).reshape(len(values), -1)
    one, other = points[:, None, :], points[None, :, :]
    better: npt.NDArray[np.bool_] = np.all(one <= other, axis=-1) & np.any(one < other, axis=-1)
    worse_than, layers, layer = better.sum(0), np.full(len(values), -1), 0
    while (here := np.flatnonzero((layers < 0) & (worse_than == 0))).size:
        layers[here] = layer
        worse_than = worse_than - better[here].sum(0)
        layer += 1
    return [int(each) for each in layers]
