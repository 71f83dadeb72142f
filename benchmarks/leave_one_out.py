"""How well the measured tables are interpolated: grid points are withheld, re-predicted and compared with their times.

    python benchmarks/leave_one_out.py [--systems h100_sxm,a100_sxm] [--framework vllm] [--points 1500] [--json]

Reads the tables of aiconfigurator-core (installed, or in the folder of MIST_KERNEL_TABLES) without the isotonic
cleaning, so that a withheld point has no influence on its neighbours; it never writes a file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mist.perf.measured import EXTRAPOLATED, FAMILIES, Family, OperatorTables, RaggedGrid, find_tables
from mist.perf.measured.tables import convert

FloatArray = npt.NDArray[np.float64]

SYSTEMS = "h100_sxm,h200_sxm,a100_sxm,l40s"
MEDIAN_BAR, P95_BAR = 0.03, 0.12


@dataclass(frozen=True, slots=True)
class Score:
    """Errors |predicted / measured - 1| of the withheld points inside the grid; how many lay at its edge.

    `noise`: 95th percentile of how far the nearest monotone times lie from the measured ones, which no rule can beat.
    """

    system: str
    family: str
    withheld: str
    errors: FloatArray
    bias: float
    edge: int
    noise: float

    @property
    def median(self) -> float:
        return float(np.median(self.errors)) if len(self.errors) else float("nan")

    @property
    def p95(self) -> float:
        return float(np.percentile(self.errors, 95)) if len(self.errors) else float("nan")

    @property
    def holds(self) -> bool:
        return self.median <= MEDIAN_BAR and self.p95 <= P95_BAR


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", default=SYSTEMS)
    parser.add_argument("--framework", default="vllm")
    parser.add_argument("--points", type=int, default=1500, help="withheld points per family and system")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    folder = find_tables()
    if isinstance(folder, str):
        print(folder, file=sys.stderr)
        return 2
    if not options.json:
        print(f"{'system':10s} {'family':22s} {'withheld':8s} {'points':>6s} {'edge':>5s} {'median':>7s} {'P95':>7s} "
              f"{'bias':>7s} {'noise':>7s}  median <= {MEDIAN_BAR:.0%} and P95 <= {P95_BAR:.0%}")  # fmt: skip
    rows = []
    for system in options.systems.split(","):
        tables = OperatorTables(folder, system, options.framework)
        for family in FAMILIES:
            for score in scores(tables, family, options.points):
                rows.append(score)
                if not options.json:
                    print(f"{score.system:10s} {score.family:22s} {score.withheld:8s} {len(score.errors):6d} "
                          f"{score.edge:5d} {score.median:7.1%} {score.p95:7.1%} {score.bias:+7.1%} "
                          f"{score.noise:7.1%}  {'yes' if score.holds else 'no'}", flush=True)  # fmt: skip
    if options.json:
        print(json.dumps([
            {"system": s.system, "family": s.family, "withheld": s.withheld, "points": len(s.errors), "edge": s.edge,
             "median_ape": _or_null(100 * s.median), "p95_ape": _or_null(100 * s.p95), "holds": s.holds}
            for s in rows
        ]))  # fmt: skip
    return 0


def scores(tables: OperatorTables, family: Family, num_points: int) -> Iterator[Score]:
    """Single points withheld and, where there are outer axes, whole lines (a shape that was never measured)."""
    path = tables.folder.file(tables.system, family, tables.framework, tables.version)
    if path is None:
        return
    arrays, noise = convert(family, path, clean=False), float(convert(family, path)["shift"][1])
    keys = np.stack([arrays[name] for name in family.keys])
    points = np.stack([axis.scaled(arrays[axis.column].astype(np.float64)) for axis in family.axes])
    _, group = np.unique(keys, axis=1, return_inverse=True)
    groups = [(points[:, own], arrays["ns"][own]) for own in _members(group.ravel())]
    for withheld in ("point", "line")[: len(family.axes)]:
        errors, edge = _withhold(groups, num_points, lines=withheld == "line")
        bias = float(np.median(errors)) if len(errors) else float("nan")
        yield Score(tables.system, family.name, withheld, np.abs(errors), bias, edge, noise)


def _withhold(groups: list[tuple[FloatArray, FloatArray]], num_points: int, *, lines: bool) -> tuple[FloatArray, int]:
    """Signed errors of points drawn at random, and how many of the drawn ones only extrapolation would reach."""
    rng = np.random.default_rng(1)
    sizes = np.array([len(ns) for _, ns in groups])
    of_group = rng.choice(len(groups), num_points, p=sizes / sizes.sum())
    found, edge = [], 0
    for chosen, count in zip(*np.unique(of_group, return_counts=True), strict=True):
        points, ns = groups[chosen]
        for i in rng.integers(len(ns), size=count):
            near = np.all(points[:-1] == points[:-1, i : i + 1], axis=0) if lines else np.arange(len(ns)) == i
            if near.all():
                edge += 1
                continue
            grid = RaggedGrid(points[:, ~near], ns[~near])
            estimate = grid.at(tuple(points[:-1, i]), points[-1:, i])
            if estimate.origin[0] == EXTRAPOLATED:
                edge += 1
            else:
                found.append(estimate.ns[0] / ns[i] - 1)
    return np.array(found), edge


def _members(group: npt.NDArray[np.intp]) -> list[npt.NDArray[np.intp]]:
    order = np.argsort(group, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(group[order])) + 1)


def _or_null(value: float) -> float | None:
    return None if np.isnan(value) else round(value, 3)


if __name__ == "__main__":
    sys.exit(main())
