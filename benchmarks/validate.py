"""Makes docs/validation.md, its plots and mist/data/bands.yaml from measured points: `make validate`.

    python benchmarks/validate.py [POINTS.csv ...] [--left-out FILE] [--sample N] [--workers N] [--docs DIR]

Without POINTS it takes validation/points.csv of MIST_DATA (or of ../shared/data) and, where the operator package is
there, the serving measurements in it. A run that was cut goes on: journals are in out/validate. With --docs the page
and the bands go to that folder instead.

FILE of --left-out (benchmarks/left_out_devices.yaml if there is one) says what is in force when nothing is fitted on a
device: {device: {engine profile: {field: value}}}.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import yaml

from mist import __version__
from mist.perf.measured import find_tables
from mist.scenario import catalogue
from mist.validation.bands import bands
from mist.validation.evaluate import Comparison, Evaluated, evaluate
from mist.validation.page import Judged, page, plotted, texts_of
from mist.validation.plot import scatter
from mist.validation.points import Point, PointFile, read_points, sampled
from mist.validation.ratios import ratio_errors
from mist.validation.score import coverage
from mist.validation.split import is_checking

ROOT = Path(__file__).parent.parent
WORK = Path("out/validate")
LEFT_OUT = ROOT / "benchmarks" / "left_out_devices.yaml"
#: an engine that takes no time of its own, and one whose kernels are those that were measured
HOST = ("step", "token", "prefill", "prefill_layer", "request", "prompt_token")
NO_HOST = {**dict.fromkeys((f"{part}_overhead_ns" for part in HOST), 0), "request_serial_ns": 0}
NO_FACTORS: dict[str, Any] = {"time_factors": {}}
#: what is in force, by name: performance models (None: those of any scenario) and changes to every engine profile
ABLATION: dict[str, tuple[list[str] | None, dict[str, Any]]] = {
    "roofline, no host time": (["roofline"], NO_HOST | NO_FACTORS),
    "+ operator tables": (None, NO_HOST | NO_FACTORS),
    "+ host time of the engine profile": (None, NO_FACTORS),
    "+ fitted time factors (as it ships)": (None, {}),
}


@dataclass(frozen=True, slots=True)
class Files:
    """The points of all files with the folder that each one's request lists are in."""

    files: Sequence[PointFile]
    workers: int

    def run(
        self, name: str, perf: Any = None, overrides: Any = None, only: Any = None
    ) -> list[tuple[Point, Evaluated]]:
        """Every point (those that `only` holds of), with journals of this name."""
        found: list[tuple[Point, Evaluated]] = []
        for file in self.files:
            points = [point for point in file.points if only is None or only(point)]
            journal = WORK / f"{file.path.stem}.jsonl"
            done = evaluate(points, file.path.parent, perf=perf, overrides=overrides, workers=self.workers,
                            journal=journal, progress=lambda i, n: _tell(name, i, n))  # fmt: skip
            found += zip(points, done, strict=True)
        return found


def main() -> None:
    """Run everything and write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("points", nargs="*", type=Path)
    parser.add_argument("--left-out", type=Path, default=LEFT_OUT if LEFT_OUT.is_file() else None)
    parser.add_argument("--sample", type=int)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--docs", type=Path)
    args = parser.parse_args()
    files = [read_points(path) for path in args.points or shipped_points()]
    if args.sample:
        files = [sampled(file, args.sample) for file in files]
    left_out = yaml.safe_load(args.left_out.read_text()) if args.left_out else {}
    judged, compared = judge(Files(files, args.workers), left_out or {})
    docs = args.docs or ROOT / "docs"
    write(judged, docs)
    band_file = args.docs / "bands.yaml" if args.docs else ROOT / "src" / "mist" / "data" / "bands.yaml"
    write_bands(judged, compared, band_file)
    print(f"{docs / 'validation.md'} and {band_file} are made of {len(compared):,} comparisons.")


def shipped_points() -> list[Path]:
    """The measured points at hand; exits with what to do where there are none."""
    folders = [Path(os.environ["MIST_DATA"])] if os.environ.get("MIST_DATA") else [ROOT.parent / "shared" / "data"]
    path = folders[0] / "validation" / "points.csv"
    if not path.is_file():
        sys.exit(f"there are no measured points at {path}: set MIST_DATA to the folder that has validation/points.csv")
    tables = find_tables()
    silicon = Path() if isinstance(tables, str) else tables.path.parent / "silicon_sample.csv"
    if not silicon.is_file():
        print("the operator package is not installed: its serving measurements are left out", file=sys.stderr)
        return [path]
    made = WORK / "silicon_points.csv"
    made.parent.mkdir(parents=True, exist_ok=True)
    script = ROOT / "studies" / "silicon_points.py"
    command = [sys.executable, str(script), "--csv", str(silicon), "--part", "fit", "--out", str(made)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return [path, made]


def judge(files: Files, left_out: Mapping[str, Any]) -> tuple[Judged, list[Comparison]]:
    """Run all that the page needs."""
    everything = files.run("all points")
    checking = [(point, each) for point, each in everything if is_checking(point)]
    every = {str(profile) for profile in catalogue.names("engines")}
    ablation = {}
    for name, (perf, changes) in ABLATION.items():
        overrides = dict.fromkeys(every, changes) if changes else None
        done = files.run(name, perf, overrides, is_checking) if changes else checking
        ablation[name] = _comparisons(done)
    without = {
        device: _comparisons(files.run(f"without {device}", None, overrides, _of(device)))
        for device, overrides in left_out.items()
    }
    judged = Judged(
        inputs=[file.path.name for file in files.files],
        date=date.today().isoformat(),
        version=__version__,
        coverage=_coverage(files.files, [each for _, each in everything]),
        everything=_comparisons(everything),
        checking=_comparisons(checking),
        ablation=ablation,
        ratios=ratio_errors([point for point, _ in checking], [each for _, each in checking]),
        left_out=without,
    )
    return judged, _comparisons(everything)


def write(judged: Judged, docs: Path) -> None:
    """The page, with the sentences of the one that is there, and its plots."""
    target, folder = docs / "validation.md", docs / "validation"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.svg"):
        old.unlink()
    plots = {}
    for family, series in plotted(judged).items():
        (folder / f"{family}.svg").write_text(scatter(family, series, "s or tokens/s"), encoding="utf-8")
        plots[family] = f"validation/{family}.svg"
    texts = texts_of(target.read_text(encoding="utf-8")) if target.is_file() else {}
    target.write_text(page(judged, texts, plots), encoding="utf-8")


def write_bands(judged: Judged, compared: Sequence[Comparison], path: Path) -> None:
    """The bands of the checking part."""
    head = (
        f"# made by `make validate`, {judged.date}: errors of the checked points in percent; see docs/validation.md\n"
    )
    path.write_text(head + yaml.safe_dump({"bands": bands(compared)}, sort_keys=False, width=120), encoding="utf-8")


def _of(device: str) -> Any:
    return lambda point: is_checking(point) and point["device"] == device


def _comparisons(done: Sequence[tuple[Point, Evaluated]]) -> list[Comparison]:
    return [c for _, each in done for c in each.comparisons]


def _coverage(files: Sequence[PointFile], evaluated: Sequence[Evaluated]) -> dict[str, Any]:
    whole = replace(
        files[0],
        num_rows=sum(file.num_rows for file in files),
        not_runnable=[row for file in files for row in file.not_runnable],
        num_sampled=None if files[0].num_sampled is None else sum(file.num_sampled or 0 for file in files),
    )
    return coverage(whole, evaluated)


def _tell(name: str, done: int, total: int) -> None:
    if done % 50 == 0 or done == total:
        print(f"{name}: {done:,} of {total:,}", file=sys.stderr)


if __name__ == "__main__":
    main()
