"""The outcome of a validation as tables of plain rows, for a terminal, and as files that are kept.

Behind the scores, for whoever reads them; every figure is of the report document. It never judges.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mist.errors import Problem, ScenarioError
from mist.validation.points import TRUSTS
from mist.validation.score import TRUSTED, Tables, reasons

#: what `mist validate --out` makes; the journal is there from the start, the others in the end
JOURNAL, REPORT, COMPARISONS = "journal.jsonl", "validation.json", "comparisons.csv"

Row = dict[str, Any]

_STATISTICS = {"n": "n", "median_ape": "median", "mean_ape": "mean", "p90_ape": "P90", "bias": "bias"}
#: reasons that are printed whole; the document has all
_MOST_REASONS = 30


def sections(document: Mapping[str, Any]) -> list[tuple[str, list[Row]]]:
    """(title, rows) of every table of a report that says anything, in reading order."""
    found = [
        ("By source, trust A and B, not saturated; absolute percentage errors, bias with its sign",
         flat("source", document["sources"])),
        ("Saturated, by source", flat("source", document["saturated"])),
        *((f"Trust {trust}, by source", flat("source", document["trust"][trust]))
          for trust in TRUSTS if trust not in TRUSTED),
        ("By device", flat("device", document["devices"])),
        ("By engine", flat("engine", document["engines"])),
        ("By model", flat("model", document["models"])),
        ("By family of sources and kind of metric", flat("family", document["families"]["by_family"], "kind")),
        ("Mean of the families' medians, each family counted once",
         [{"kind": kind, **mean} for kind, mean in document["families"]["over_families"].items()]),
        ("Not compared", _skips(document["coverage"])),
    ]  # fmt: skip
    return [(title, rows) for title, rows in found if rows]


def flat(name: str, tables: Tables, of: str = "metric") -> list[Row]:
    """{group: {metric: statistics}} as rows."""
    return [
        {name: group, of: metric, **{short: _written(figures[key]) for key, short in _STATISTICS.items()}}
        for group, metrics in tables.items()
        for metric, figures in metrics.items()
    ]


def covered(document: Mapping[str, Any]) -> str:
    """How much was compared, in a sentence."""
    rows, runnable, sampled, run = (document["coverage"][key] for key in ("rows", "runnable", "sampled", "run"))
    of, kind = (runnable, "runnable") if sampled is None else (sampled, "sampled")
    share = f" ({100 * run / of:.1f} %)" if of else ""
    more = "" if sampled is None else f", of which {runnable:,} are runnable"
    return f"{run:,} of {of:,} {kind} rows were compared{share}; the file has {rows:,}{more}."


def assumed(document: Mapping[str, Any]) -> list[str]:
    """What was taken for granted, a line each with its number of rows."""
    found = document["coverage"]["assumptions"].items()
    return [f"{number:,} row{'s' if number > 1 else ''}: {what}." for what, number in found]


def check_folder(folder: Path, *, overwrite: bool, inputs: Iterable[Path] = ()) -> bool:
    """Whether a validation that was cut goes on in `folder`; ScenarioError where there is something else.

    None of the `inputs` may be what is written there, with `overwrite` neither.
    """
    written = {(folder / name).resolve() for name in (JOURNAL, REPORT, COMPARISONS)}
    if lost := [path for path in inputs if path.resolve() in written]:
        raise ScenarioError(Problem(f"results in {folder} would replace {lost[0]}", hint="name another folder"))
    if folder.exists() and not folder.is_dir():
        raise ScenarioError(Problem(f"{folder} is a file, and results go into a folder"))
    present = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    if REPORT in present and not overwrite:
        raise ScenarioError(Problem(f"{folder / REPORT} is there already", hint="name another folder, or --overwrite"))
    if present and JOURNAL not in present and not overwrite:
        raise ScenarioError(Problem(f"{folder} isn't empty", hint="name another folder, or give --overwrite"))
    return JOURNAL in present


def write(document: Mapping[str, Any], folder: Path) -> None:
    """The report, and the comparisons as a table; each file takes its place when it is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    made = folder / f".{os.getpid()}.partial"
    with made.open("w", encoding="utf-8", newline="") as file:
        rows = document["points"]
        writer = csv.DictWriter(file, list(rows[0]) if rows else ["id"])
        writer.writeheader()
        writer.writerows(rows)
    made.replace(folder / COMPARISONS)
    made.write_text(text + "\n", encoding="utf-8")
    made.replace(folder / REPORT)


def _skips(coverage: Mapping[str, Any]) -> list[Row]:
    found = reasons(coverage["skipped"])
    rows: list[Row] = [{"rows": number, "reason": reason} for reason, number in found[:_MOST_REASONS]]
    if left := found[_MOST_REASONS:]:
        rows.append({"rows": sum(number for _, number in left), "reason": f"of {len(left)} further kinds"})
    return rows


def _written(value: float) -> int | str:
    return value if isinstance(value, int) else f"{value:.1f}"
