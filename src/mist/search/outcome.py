"""What a search gives back: a document of plain values, and files from which every deployment of the front can be run.

At the end of a search. The same space and seeds give the same document, `timing` apart, whoever ran it, on however many
workers, and however often it was cut. It measures nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mist.errors import Problem, ScenarioError
from mist.scenario.value import to_yaml
from mist.search.choices import Choice
from mist.search.finalists import Podium
from mist.search.intervals import ALIKE
from mist.search.laboratory import WHOLE, Laboratory
from mist.search.ladders import ladders_of
from mist.search.legal import Legal, Point
from mist.search.objectives import excesses, maximised, objective
from mist.search.space import Space
from mist.search.store import excerpt_of

SCHEMA_VERSION = 1
RESULT, STORE, PAGE = "result.json", "search.db", "report.html"
#: measured points that are told one by one, those on the longest prefixes first
MAX_POINTS = 2000
_CONFIDENCE = 0.95
_SECONDS_PER_HOUR = 3600.0


@dataclass(frozen=True, eq=False)
class Found:
    """A search's outcome: its `document` and, by the front's names, the scenarios of its deployments."""

    document: dict[str, Any]
    deployments: Mapping[str, Mapping[str, Any]]

    def to_json(self) -> str:
        """The document, ended by a newline."""
        return json.dumps(self.document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def write(self, folder: Path) -> None:
        """result.json, and a YAML file for each deployment of the front."""
        folder.mkdir(parents=True, exist_ok=True)
        for earlier in folder.glob("front-*.yaml"):
            earlier.unlink()
        for name, scenario in self.deployments.items():
            (folder / f"{name}.yaml").write_text(to_yaml({"name": name, **scenario}), encoding="utf-8")
        (folder / RESULT).write_text(self.to_json(), encoding="utf-8")


def read_found(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The document that `Found.write` left in `folder`, and the YAML of the front's deployments that are still there.

    Raises ScenarioError where that isn't what lies there.
    """
    try:
        document = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        names = [each["name"] for each in document["front"]]
        known = document["schema_version"] == SCHEMA_VERSION
    except (OSError, ValueError, KeyError, TypeError):
        known = False
    if not known:
        hint = "name a folder that `mist search --out` wrote"
        raise ScenarioError(Problem(f"{folder / RESULT} is no result of a search that this version reads", hint=hint))
    files = {name: folder / f"{name}.yaml" for name in names}
    return document, {name: path.read_text(encoding="utf-8") for name, path in files.items() if path.is_file()}


def outcome(
    space: Space, strategy: str, legal: Legal, lab: Laboratory, podium: Podium, seeds: Sequence[int],
    base: Point | None, timing: Mapping[str, float],
) -> Found:  # fmt: skip
    """The document of a search that has ended."""
    names = {number: f"front-{i}" for i, number in enumerate(podium.front, start=1)}
    told = {number: _deployment(lab, legal.points[number], seeds) for number in podium.front}
    lead = podium.best[f"best {lab.objectives[0]}"]
    first = legal.points[lead] if lead is not None else None
    document = {
        "schema_version": SCHEMA_VERSION,
        "name": space.name,
        "strategy": strategy,
        "seeds": list(seeds),
        "objectives": {name: "maximise" if maximised(name) else "minimise" for name in lab.objectives},
        "constraints": {each.name: each.bound for each in lab.constraints},
        "configurations": {
            "tried": legal.num_configurations,
            "legal": len(legal.points),
            "deployments": len(ladders_of(legal.points.values(), space.load)),
            "refused": [
                {"reason": reason, "count": number, "example": legal.examples[reason]}
                for reason, number in sorted(legal.refused.items(), key=lambda item: (-item[1], item[0]))
            ],
            "failed": _failed(lab),
        },
        "remarks": [*legal.remarks, *_remarks(space, base, first), *_alike(lab, first, seeds), *_hidden(lab, legal)],
        "runs": _runs(lab),
        "front": [{"name": names[number], **told[number]} for number in podium.front],
        "best": {
            title: None
            if i is None
            else {
                "front": names.get(i),
                **_deployment(lab, legal.points[i], seeds),
                "gain": _gain_of(title, lab, legal.points[i], base, seeds),
            }
            for title, i in podium.best.items()
        },
        "points": _points(lab, legal.points, names, seeds),
        "baseline": None if base is None else _deployment(lab, base, seeds),
        "gain": None if base is None or first is None else _gain(lab, first, base, seeds, lab.objectives[0]),
        "real": _real(lab),
        "timing": dict(timing),
    }
    return Found(document, {names[number]: legal.points[number].resolved for number in podium.front})


def _remarks(space: Space, base: Point | None, best: Point | None) -> list[str]:
    told = []
    if space.baseline is not None and base is None:
        told.append("The baseline meets the constraints under no load of the space.")
    choice = space.tree.get(space.load or "")
    if best is not None and isinstance(choice, Choice) and best.choices[choice.name] == list(choice.options)[-1]:
        told.append("The best is under the highest load of the space: give higher ones, which it may serve too.")
    return told


def _alike(lab: Laboratory, best: Point | None, seeds: Sequence[int]) -> list[str]:
    """That several seeds gave one and the same, where requests are read and not drawn."""
    found = _excerpts(lab, best, seeds) if best is not None else []
    if len(found) < 2 or any(each != found[0] for each in found):
        return []
    return [ALIKE]


def _hidden(lab: Laboratory, legal: Legal) -> list[str]:
    """That nothing was run on the whole workload, so that nothing is known of it."""
    shares = {share for number, share, _ in lab.runs if number in legal.points}
    if not shares or WHOLE in shares:
        return []
    return [
        f"Nothing ran on the whole workload, as nothing was near its constraints on the first {max(shares):.3g} of it: "
        "where these requests are harder to serve than the others, use --strategy bounded."
    ]


def _deployment(lab: Laboratory, point: Point, seeds: Sequence[int]) -> dict[str, Any]:
    """A point on the whole workload: its objectives over the seeds, and how its constraints held."""
    found = _excerpts(lab, point, seeds)
    missed = [excesses(each, lab.constraints) for each in found]
    return {
        "choices": dict(point.choices),
        "devices": point.devices,
        "kinds": list(point.kinds),
        "objectives": {name: interval([objective(each, name) for each in found]) for name in lab.objectives},
        "constraints": {
            name: _finite(math.fsum(each.get(name, 0.0) for each in missed) / len(missed))
            for name in sorted({name for each in missed for name in each})
        },
        "step_times": {
            origin: math.fsum(each["provenance"].get(origin, 0.0) for each in found) / len(found)
            for origin in (found[0]["provenance"] or {})
        }
        if found
        else {},
        "seeds_met": sum(all(excess <= 0 for excess in each.values()) for each in missed),
        "num_seeds": len(found),
    }


def interval(values: Sequence[float | None]) -> dict[str, Any]:
    """The mean of one value a seed, with the bounds of its 95 % confidence interval by Student's t.

    The bounds are None for one seed, and where all values are the same, which says nothing of how far others spread.
    """
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return {"mean": None, "low": None, "high": None}
    if len(set(known)) < 2:
        return {"mean": known[0], "low": None, "high": None}
    from scipy.stats import t

    mean = math.fsum(known) / len(known)
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in known) / (len(known) - 1) / len(known))
    half = float(t.ppf((1 + _CONFIDENCE) / 2, len(known) - 1)) * spread
    return {"mean": mean, "low": mean - half, "high": mean + half}


def _points(
    lab: Laboratory, points: Mapping[int, Point], names: Mapping[int, str], seeds: Sequence[int]
) -> list[dict[str, Any]]:
    """What was measured, each on its longest prefix: means over its seeds, and the share that it misses at most."""
    longest: dict[int, float] = {}
    for number, share, _ in lab.runs:
        if number in points:
            longest[number] = max(share, longest.get(number, 0.0))
    told = []
    for number in sorted(longest, key=lambda number: (-longest[number], number))[:MAX_POINTS]:
        score = lab.score(points[number], longest[number], seeds)
        values = dict(zip(lab.objectives, score.values, strict=True))
        told.append({
            "front": names.get(number),
            "choices": dict(points[number].choices),
            "devices": points[number].devices,
            "share": longest[number],
            "objectives": {name: _plain(value, maximised(name)) for name, value in values.items()},
            "missed": _finite(score.violation),
        })  # fmt: skip
    return told


def _plain(value: float, is_negated: bool) -> float | None:
    if not math.isfinite(value):
        return None
    return -value if is_negated else value


def _gain_of(
    title: str, lab: Laboratory, best: Point, base: Point | None, seeds: Sequence[int]
) -> dict[str, Any] | None:
    """The gain in what the title is for: its objective, or the first one."""
    name = title.removeprefix("best ")
    chosen = name if name in lab.objectives else lab.objectives[0]
    return None if base is None else _gain(lab, best, base, seeds, chosen)


def _gain(lab: Laboratory, best: Point, base: Point, seeds: Sequence[int], name: str) -> dict[str, Any]:
    """By what factor the best is better than the baseline in an objective, seed by seed."""
    factors: list[float | None] = []
    for ours, theirs in zip(_excerpts(lab, best, seeds), _excerpts(lab, base, seeds), strict=True):
        a, b = objective(ours, name), objective(theirs, name)
        factors.append((a / b if maximised(name) else b / a) if a and b else None)
    return {"objective": name, "factor": interval(factors), "by_seed": factors}


def _excerpts(lab: Laboratory, point: Point, seeds: Sequence[int]) -> list[Mapping[str, Any]]:
    runs = [lab.runs.get((point.number, WHOLE, seed)) for seed in seeds]
    return [each for run in runs if run is not None and (each := excerpt_of(run)) is not None]


def _runs(lab: Laboratory) -> list[dict[str, Any]]:
    """How many runs there were on each prefix."""
    shares = sorted({share for _, share, _ in lab.runs})
    return [{"share": s, "runs": sum(share == s for _, share, _ in lab.runs)} for s in shares]


def _failed(lab: Laboratory) -> list[dict[str, Any]]:
    """Errors of runs, each with how many configurations had it in any run."""
    had: dict[str, set[int]] = {}
    for (number, _, _), run in lab.runs.items():
        if "error" in run:
            had.setdefault(run["error"], set()).add(number)
    return [{"error": error, "count": len(had[error])} for error in sorted(had)]


def _real(lab: Laboratory) -> dict[str, float | None]:
    """What the same runs would have taken on real devices: device-hours, and dollars at the scenario's prices."""
    hours, usd, has_prices = 0.0, 0.0, True
    for at in sorted(lab.runs):
        found = excerpt_of(lab.runs[at])
        if found is None or not found["duration_s"]:
            continue
        lasted = found["duration_s"] / _SECONDS_PER_HOUR
        hours += found["devices"] * lasted
        price = objective(found, "usd_per_hour")
        has_prices = has_prices and price is not None
        usd += (price or 0.0) * lasted
    return {"device_hours": hours, "usd": usd if has_prices else None}


def _finite(value: float) -> float | None:
    return value if value < 1e6 else None
