"""How well the measured tables are interpolated: grid points are withheld, re-predicted and compared with their times.

    python benchmarks/leave_one_out.py [--systems h100_sxm,a100_sxm] [--framework vllm] [--points 1500] [--json]

Reads the tables of aiconfigurator-core (installed, or in the folder of MIST_KERNEL_TABLES) without the isotonic
cleaning, so that a withheld point has no influence on its neighbours; it never writes a file.

`withheld`: single points, or all points of a shape (heads; n and k; width of an expert). Two columns tell how much of
the error is noise of the tables: `falls` is the 95th percentile of how far the nearest monotone times lie from the
measured ones; `again` that of how badly the same work, measured again under other keys, predicts them (`same_work`).
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
from mist.perf.measured.tables import Arrays, convert

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.intp]

SYSTEMS = "h100_sxm,h200_sxm,a100_sxm,l40s"
MEDIAN_BAR, P95_BAR = 0.03, 0.12
#: Families whose parts, by the value of this key, are reported one by one too.
PARTS = {"gemm": "gemm_dtype", "nccl": "op_name", "moe": "moe_dtype", "moe_a2a": "comm_backend"}


@dataclass(frozen=True, slots=True)
class Score:
    """Errors predicted / measured - 1 of the withheld points inside the grid; how many lay at its edge.

    `part`: "" is the whole family. `falls`, `again`: as in the module's docstring; NaN where the table can't tell.
    """

    system: str
    family: str
    part: str
    withheld: str
    errors: FloatArray
    edge: int
    falls: float
    again: float

    @property
    def median(self) -> float:
        return _percentile(np.abs(self.errors), 50)

    @property
    def p95(self) -> float:
        return _percentile(np.abs(self.errors), 95)

    @property
    def bias(self) -> float:
        return _percentile(self.errors, 50)

    @property
    def holds(self) -> bool:
        return self.median <= MEDIAN_BAR and self.p95 <= P95_BAR

    @property
    def line(self) -> str:
        name = f"{self.family} {self.part}".strip()
        return (f"{self.system:10s} {name:26s} {self.withheld:8s} {len(self.errors):6d} {self.edge:5d} "
                f"{self.median:7.1%} {self.p95:7.1%} {self.bias:+7.1%} {self.falls:7.1%} {self.again:7.1%}  "
                f"{'yes' if self.holds else 'no'}")  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", default=SYSTEMS)
    parser.add_argument("--framework", default="vllm")
    parser.add_argument("--points", type=int, default=1500, help="withheld points per family (and part) and system")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    folder = find_tables()
    if isinstance(folder, str):
        print(folder, file=sys.stderr)
        return 2
    if not options.json:
        print(f"{'system':10s} {'family':26s} {'withheld':8s} {'points':>6s} {'edge':>5s} {'median':>7s} {'P95':>7s} "
              f"{'bias':>7s} {'falls':>7s} {'again':>7s}  median {MEDIAN_BAR:.0%}, P95 {P95_BAR:.0%}")  # fmt: skip
    rows = []
    for system in options.systems.split(","):
        tables = OperatorTables(folder, system, options.framework)
        for family in FAMILIES:
            for score in scores(tables, family, options.points):
                rows.append(score)
                if not options.json:
                    print(score.line, flush=True)
    if options.json:
        print(json.dumps([
            {"system": s.system, "family": s.family, "part": s.part, "withheld": s.withheld, "points": len(s.errors),
             "edge": s.edge, "median_ape": _or_null(s.median), "p95_ape": _or_null(s.p95), "falls": _or_null(s.falls),
             "again": _or_null(s.again), "holds": s.holds}
            for s in rows
        ]))  # fmt: skip
    return 0


def scores(tables: OperatorTables, family: Family, num_points: int) -> Iterator[Score]:
    """A family's scores, whole and by part: of single points and, where the table has shapes as axes, of shapes."""
    path = tables.folder.file(tables.system, family, tables.framework, tables.version)
    if path is None:
        return
    arrays = convert(family, path, clean=False)
    shift = np.abs(convert(family, path)["ns"] / arrays["ns"] - 1)
    again = repeated(family, arrays)
    part_of, names = _parts(family, arrays)
    for part in ["", *names]:
        own = part_of == part if part else np.ones(len(part_of), bool)
        noise = _percentile(shift[own], 95), _percentile(np.abs(again[own]), 95)
        groups = _groups(family, {name: values[own] for name, values in arrays.items() if len(values) == len(own)})
        shape = [i for i, axis in enumerate(family.axes) if not axis.rising]
        for withheld, axes in (("point", list(range(len(family.axes)))), ("shape", shape)):
            if axes:
                errors, edge = _withhold(groups, num_points, axes)
                yield Score(tables.system, family.name, part, withheld, errors, edge, *noise)


def repeated(family: Family, arrays: Arrays) -> FloatArray:
    """How far each time lies from the median of its other measurements; NaN where it was measured once."""
    work = same_work(family, arrays)
    found = np.full(len(arrays["ns"]), np.nan)
    if work is None:
        return found
    _, group = np.unique(np.stack(work), axis=1, return_inverse=True)
    for own in _members(group.ravel()):
        for i in own if len(own) > 1 else []:
            found[i] = np.median(arrays["ns"][own[own != i]]) / arrays["ns"][i] - 1
    return found


def same_work(family: Family, arrays: Arrays) -> list[npt.NDArray[np.int64]] | None:
    """Columns in which rows that do the same work are equal; None where the table has no such rows.

    GEMMs of 9 to 16 rows fill one tile; a window beyond the attended length bounds nothing; encoders see heads times
    sequences; one token touches as many experts whatever their distribution; collectives that don't reduce move bytes.
    """
    c = {name: arrays[name] for name in family.columns}
    if family.name == "gemm":
        c["m"] = np.where((c["m"] >= 9) & (c["m"] <= 16), 16, c["m"])
    elif family.name in ("context_attention", "generation_attention"):
        attended = c["isl"] if "isl" in c else c["total_context"] // c["batch_size"]
        c["window_size"] = np.where(attended <= c["window_size"], 0, c["window_size"])
    elif family.name == "encoder_attention":
        c["num_heads"], c["batch_size"] = c["num_heads"] * c["batch_size"], np.zeros_like(c["isl"])
    elif family.name == "moe":
        c["distribution"] = np.where((c["num_tokens"] == 1) & (c["moe_ep_size"] == 1), 0, c["distribution"])
    elif family.name == "nccl":
        reduces = np.isin(arrays["op_name/texts"], ["all_reduce", "reduce_scatter"])[c["op_name"]]
        size = np.where(arrays["nccl_dtype/texts"] == "half", 2, 1)[c["nccl_dtype"]]
        c["message_size"] = c["message_size"] * size
        c["nccl_dtype"] = np.where(reduces, c["nccl_dtype"], 0)
    else:
        return None
    return list(c.values())


def _parts(family: Family, arrays: Arrays) -> tuple[npt.NDArray[np.str_], list[str]]:
    key = PARTS.get(family.name)
    if key is None:
        return np.full(len(arrays["ns"]), ""), []
    texts = arrays[f"{key}/texts"]
    return texts[arrays[key]], [str(text) for text in texts]


def _groups(family: Family, arrays: Arrays) -> list[tuple[FloatArray, FloatArray]]:
    """(points, ns) of each combination of keys."""
    keys = np.stack([arrays[name] for name in family.keys])
    points = np.stack([axis.scaled(arrays[axis.column].astype(np.float64)) for axis in family.axes])
    _, group = np.unique(keys, axis=1, return_inverse=True)
    return [(points[:, own], arrays["ns"][own]) for own in _members(group.ravel())]


def _withhold(groups: list[tuple[FloatArray, FloatArray]], num_points: int, axes: list[int]) -> tuple[FloatArray, int]:
    """Signed errors of points drawn at random, each once, and how many of them only extrapolation would reach.

    With a point all those are withheld that are equal to it on `axes`.
    """
    sizes = np.array([len(ns) for _, ns in groups])
    drawn = np.random.default_rng(1).permutation(sizes.sum())[:num_points]
    of_group = np.searchsorted(np.cumsum(sizes), drawn, side="right")
    found, edge = [], 0
    for chosen, i in zip(of_group.tolist(), (drawn - (np.cumsum(sizes) - sizes)[of_group]).tolist(), strict=True):
        points, ns = groups[chosen]
        near = np.all(points[axes] == points[axes, i : i + 1], axis=0)
        if near.all():
            edge += 1
            continue
        estimate = RaggedGrid.filled(points[:, ~near], ns[~near]).at(tuple(points[:-1, i]), points[-1:, i])
        if estimate.origin[0] == EXTRAPOLATED:
            edge += 1
        else:
            found.append(estimate.ns[0] / ns[i] - 1)
    return np.array(found), edge


def _members(group: IntArray) -> list[IntArray]:
    order = np.argsort(group, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(group[order])) + 1)


def _percentile(values: FloatArray, q: float) -> float:
    known = values[np.isfinite(values)]
    return float(np.percentile(known, q)) if len(known) else float("nan")


def _or_null(value: float) -> float | None:
    return None if np.isnan(value) else round(100 * value, 3)


if __name__ == "__main__":
    sys.exit(main())
