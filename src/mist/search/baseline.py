"""What one would do without a search: the engine's defaults on the baseline's devices and the same budget.

Beside the strategies, held against what they find. Limits of batching are the engine's, tp the smallest that fits,
and replicas fill the budget; the loads are those of the space. It never tunes the baseline.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mist.errors import Problem, ScenarioError
from mist.search.choices import every
from mist.search.laboratory import WHOLE, Laboratory
from mist.search.ladders import FAR, Ladder, beside, climb, steps
from mist.search.legal import REST, Point, Refusal, examine
from mist.search.space import Space

_TP = (1, 2, 4, 8, 16)


def baseline_points(space: Space) -> list[Point]:
    """The baseline under every load of the space and, within a budget that needn't be spent, with every count."""
    if space.baseline is None:
        return []
    loads = {path: tree for path, tree in space.tree.items() if "workload" in path.split(".") or path == space.load}
    found: list[Point] = []
    refused: Refusal | None = None
    for choices, settings in every(loads):
        for given in _completed(space):
            point = _smallest(space, choices, {**settings, **given}, -1 - len(found))
            if isinstance(point, Point):
                found.append(point)
            else:
                refused = point
    if not found:
        place = space.own.problem(("baseline",), "")
        told = refused.problem if refused else ""
        raise ScenarioError(Problem(f"the baseline can't be run: {told}", place.file, place.line, place.column))
    return found


def best_baseline(lab: Laboratory, ladders: Sequence[Ladder], seeds: Sequence[int]) -> Point | None:
    """Of the baselines, the feasible one that is best in the first objective, run with every seed; None if none is.

    Its load is the highest that every seed together holds, not the first one alone.
    """
    lab.forecast.expect("baseline", WHOLE, 2 * (len(seeds) - 1))
    climb(lab, ladders, WHOLE, seeds[:1])
    points = {point.number: point for ladder in ladders for point in ladder.points}
    seeded: set[int] = set()
    while True:
        ran = [number for number in points if (number, WHOLE, seeds[0]) in lab.runs]
        scores = {n: lab.score(points[n], WHOLE, seeds if n in seeded else seeds[:1]) for n in ran}
        hopeful = [number for number in ran if scores[number].violation <= (0 if number in seeded else FAR)]
        best = min(hopeful, key=lambda number: (scores[number].values, -number), default=None)
        missing = ({best} if best is not None else set()) - seeded or beside(lab, ladders, scores, seeded)
        lab.forecast.expect("baseline", WHOLE, 0 if seeded or not missing else len(seeds) - 1)
        if not missing:
            return None if best is None else points[best]
        lab.measure([points[number] for number in sorted(missing, reverse=True)], WHOLE, seeds)
        seeded |= missing


def planned_baseline(ladders: Sequence[Ladder], seeds: Sequence[int]) -> int:
    """About how many runs `best_baseline` takes."""
    return sum(1 + steps(len(each.points) - 1) for each in ladders) + 2 * (len(seeds) - 1) if ladders else 0


def _completed(space: Space) -> Iterator[dict[str, Any]]:
    """The baseline's settings, with counts that fill the budget, or less where that may be."""
    assert space.baseline is not None
    clients: dict[str, Any] = space.baseline["clients"]
    others = {key: value for key, value in space.baseline.items() if key != "clients"}
    open_counts = [name for name, client in clients.items() if "model" in client and "count" not in client]
    if not open_counts or space.devices is None:
        yield {**others, "clients": clients}
        return
    counts: list[Any] = [*range(1, space.devices + 1)] if space.at_most else [REST]
    for count in counts:
        yield {**others, "clients": {**clients, open_counts[0]: {**clients[open_counts[0]], "count": count}}}


def _smallest(space: Space, choices: Mapping[str, str], settings: dict[str, Any], number: int) -> Point | Refusal:
    """The baseline with the smallest tp that fits, in clients that say none."""
    found: Point | Refusal | None = None
    for tp in _TP:
        clients = {
            name: {"tp": tp, **client} if "model" in client else client for name, client in settings["clients"].items()
        }
        found = examine(space, choices, {**settings, "clients": clients}, number)
        if isinstance(found, Point):
            return found
    assert found is not None
    return found
