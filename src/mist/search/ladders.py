"""Deployments under rising loads: which loads a deployment takes is bisected rather than tried one by one.

Between the legal points and the strategies: the points of one deployment are a `Ladder`. It relies on three things:
what a deployment misses at one load it misses at higher ones, its latencies don't fall with the load, and what it
serves rises at most in proportion. It never decides which deployments are worth a run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mist.search.laboratory import Laboratory
from mist.search.legal import Point
from mist.search.objectives import at_best, maximised
from mist.search.pareto import Bar, Score, ranked

#: what misses a bound by more than this share with one seed isn't tried with the others
FAR = 0.2


@dataclass(frozen=True, slots=True)
class Ladder:
    """The points of a deployment by rising `loads`; where a space has no load, its one point."""

    points: tuple[Point, ...]
    loads: tuple[float, ...]


def ladders_of(points: Iterable[Point], load: str | None) -> list[Ladder]:
    """The points by deployment; `load`: the choice whose values are rising loads, None: each point is alone."""
    groups: dict[object, list[Point]] = {}
    for point in points:
        others = tuple((name, label) for name, label in point.choices.items() if name != load)
        groups.setdefault((others, point.deployment) if load else point.number, []).append(point)
    found = []
    for members in groups.values():
        by_load = {float(point.choices[load]) if load else 1.0: point for point in members}
        found.append(Ladder(tuple(by_load[each] for each in sorted(by_load)), tuple(sorted(by_load))))
    return found


def climb(
    lab: Laboratory, ladders: Sequence[Ladder], share: float, seeds: Sequence[int], far: float = 0.0,
    rivals: Sequence[Ladder] = (),
) -> None:  # fmt: skip
    """Measure the lowest load of each, then bisect for the highest that misses no constraint by more than `far`.

    All ladders step together, so that a round has a run for each. Where there are `rivals`, a bisection ends when all
    that it could still find is covered at best by what is known of them.
    """
    held, missed = [-1] * len(ladders), [len(ladder.points) for ladder in ladders]
    probes = dict.fromkeys(range(len(ladders)), 0)
    steps_left = sum(steps(len(ladder.points) - 1) for ladder in ladders)
    while probes:
        lab.forecast.expect("climb", share, len(seeds) * steps_left)
        lab.measure([ladders[k].points[i] for k, i in probes.items()], share, seeds)
        for k, i in probes.items():
            fits = lab.score(ladders[k].points[i], share, seeds).violation <= far
            held[k], missed[k] = (i, missed[k]) if fits else (held[k], i)
        bar = bar_of(lab, rivals, share, seeds)
        left = {k: missed[k] - held[k] - 1 for k in range(len(ladders))}
        if rivals:
            for k in (k for k, number in left.items() if number):
                left[k] = sum(held[k] < i < missed[k] for i in _open(lab, ladders[k], bar, share, seeds, far))
        probes = {k: (held[k] + missed[k]) // 2 for k, number in left.items() if number}
        steps_left = sum(steps(left[k]) - 1 for k in probes)


def steps(number: int) -> int:
    """Runs that find the highest of so many loads that holds, at most."""
    return number.bit_length()


def climb_best_first(
    lab: Laboratory, ladders: Sequence[Ladder], share: float, seeds: Sequence[int], far: float, num_waves: int = 8
) -> None:
    """As `climb`, in waves: the most promising at their lowest loads first, so that the others can be held to them."""
    # of bisections about a quarter is run, for who is covered by others at best has none
    lab.forecast.expect("waves", share, len(seeds) * sum(steps(len(each.points) - 1) for each in ladders) / 4)
    lab.measure([ladder.points[0] for ladder in ladders], share, seeds)
    by_lowest = {ladder.points[0].number: ladder for ladder in ladders}
    ranking = ranked({number: lab.score(ladder.points[0], share, seeds) for number, ladder in by_lowest.items()})
    order = [by_lowest[number] for number in ranking]
    size = -(-len(order) // num_waves)
    for start in range(0, len(order), size):
        bar = bar_of(lab, ladders, share, seeds)
        later = (len(_open(lab, ladder, bar, share, seeds, far)) for ladder in order[start + size :])
        lab.forecast.expect("waves", share, len(seeds) * sum(map(steps, later)) / 2)
        climb(lab, order[start : start + size], share, seeds, far, ladders)


def fill(lab: Laboratory, ladders: Sequence[Ladder], share: float, seeds: Sequence[int]) -> None:
    """After `climb`: measure what could still be in the front, until nothing else can; of each the middle first."""
    while True:
        bar = bar_of(lab, ladders, share, seeds)
        left = [(ladder, _open(lab, ladder, bar, share, seeds)) for ladder in ladders]
        wanted = [ladder.points[numbers[len(numbers) // 2]] for ladder, numbers in left if numbers]
        # of a deployment one at least, all at most
        later = sum(len(numbers) - 1 for _, numbers in left if numbers) / 2
        lab.forecast.expect("fill", share, len(seeds) * later)
        if not wanted:
            return
        lab.measure(wanted, share, seeds)


def planned_fill(lab: Laboratory, ladders: Sequence[Ladder], share: float, seeds: Sequence[int]) -> float:
    """About how many runs `fill` takes, by what has run so far: of what is open below a load that held about half."""
    bar, number = bar_of(lab, ladders, share, seeds), 0.0
    for ladder in ladders:
        known = known_of(lab, ladder, share, seeds)
        places = (i for i, p in enumerate(ladder.points) if p.number in known and known[p.number].violation <= 0)
        if held := max(places, default=0):
            below = sum(i < held for i in _open(lab, ladder, bar, share, seeds))
            number += (below + 1) / 2 if below else 0
    return len(seeds) * number


def beside(lab: Laboratory, ladders: Sequence[Ladder], scores: Mapping[int, Score], seeded: set[int]) -> set[int]:
    """Loads that all seeds together may judge otherwise than the first one did, by number; one of a deployment.

    `scores`: of all that ran on the whole workload; `seeded`: those of them that ran with every seed. Of the latter the
    highest load that holds may have a next one that does too, and below one that is missed the next lower may hold.
    """
    bar = Bar.of([(scores[p.number], p.standing) for each in ladders for p in each.points if p.number in scores])
    found: set[int] = set()
    for ladder in ladders:
        known = {i: scores[p.number] for i, p in enumerate(ladder.points) if p.number in seeded}
        held = max((i for i, score in known.items() if score.violation <= 0), default=-1)
        missed = min((i for i in known if i > held), default=len(ladder.points))
        if not known or missed - held < 2:
            continue
        place = missed - 1 if missed in known else held + 1
        point = ladder.points[place]
        if held >= 0:
            best = hope(lab.objectives, known[held], ladder.loads[place] / ladder.loads[held])
            if bar.covers(best, point.standing):
                continue
        if missed in known or _misses_by(lab, point) <= FAR:
            found.add(point.number)
    return found


def _misses_by(lab: Laboratory, point: Point) -> float:
    """By what share it missed its worst constraint on the longest prefix that it ran on; 0 where it never ran."""
    ran = [(share, seed) for number, share, seed in lab.runs if number == point.number]
    longest = max((share for share, _ in ran), default=0.0)
    seeds = sorted(seed for share, seed in ran if share == longest)
    return lab.score(point, longest, seeds).violation if ran else 0.0


def bar_of(lab: Laboratory, ladders: Sequence[Ladder], share: float, seeds: Sequence[int]) -> Bar:
    """What is to be beaten on a prefix."""
    known = [(ladder, known_of(lab, ladder, share, seeds)) for ladder in ladders]
    return Bar.of([(its[p.number], p.standing) for ladder, its in known for p in ladder.points if p.number in its])


def known_of(lab: Laboratory, ladder: Ladder, share: float, seeds: Sequence[int]) -> dict[int, Score]:
    """The scores of a deployment's points that ran on a prefix, by number."""
    ran = [point for point in ladder.points if (point.number, share, seeds[0]) in lab.runs]
    return {point.number: lab.score(point, share, seeds) for point in ran}


def _open(lab: Laboratory, ladder: Ladder, bar: Bar, share: float, seeds: Sequence[int], far: float = 0.0) -> list[int]:
    """Loads, by index, that have not run, may miss no constraint by more than `far`, and be in the front at best."""
    hopes = hopes_of(lab.objectives, ladder, known_of(lab, ladder, share, seeds))
    standing = ladder.points[0].standing
    return [i for i, score in hopes.items() if score.violation <= far and not bar.covers(score, standing)]


def hopes_of(objectives: Sequence[str], ladder: Ladder, known: Mapping[int, Score]) -> dict[int, Score]:
    """What the points that aren't `known` could be at best, by index: each as the next lower load that is known."""
    found: dict[int, Score] = {}
    below: tuple[float, Score] | None = None
    for i, (point, load) in enumerate(zip(ladder.points, ladder.loads, strict=True)):
        if (score := known.get(point.number)) is not None:
            below = load, score
        elif below is not None:
            found[i] = hope(objectives, below[1], load / below[0])
    return found


def hope(objectives: Sequence[str], score: Score, times: float) -> Score:
    """A score under a load that is `times` as high, at best."""
    values = tuple(
        -at_best(name, -value, times) if maximised(name) else at_best(name, value, times)
        for name, value in zip(objectives, score.values, strict=True)
    )
    return Score(values, score.violation)
