"""What a step's time is bound by: compute, memory, network, launches, or the engine's host, pool by pool.

A section of a report around `mist.report.anatomy`. It shows; it explains nothing itself.
"""

from __future__ import annotations

from mist.metrics.words import counted
from mist.report.anatomy import PARTS, Anatomy, StepKind, anatomies
from mist.report.html.bars import Part, Row, bar_chart
from mist.report.html.figures import SECONDS, digits, percent, seconds
from mist.report.html.markup import Child, Markup, el, note, section, table
from mist.report.html.view import View
from mist.units import NS_PER_S

_NAMES = {"compute": "compute-bound", "memory": "memory-bound", "network": "network-bound", "launch": "kernel launches",
          "host": "host of the engine", "rest": "not told by the records"}  # fmt: skip
_LOOK = [
    Part(_NAMES[part], f"--c:var(--b{i})", "striped" if part == "rest" else "solid") for i, part in enumerate(PARTS)
]
_KINDS = {"decodes": "decodes only", "prefills": "prefills only", "both": "prefills and decodes"}


def anatomy(view: View) -> Markup | None:
    found = anatomies(view.result, view.pools)
    if not found:
        return None
    rows = [_row(each, kind) for each in found for kind in each.kinds]
    lead = "What bounds the steps of each pool, by the performance model's own account of its operators."
    said = note(
        "Of each kind, three recorded steps from short to long are explained, each standing for a third of the time "
        "that such steps took. Records hold the sums of a step: prompts in it are taken to be alike and to begin "
        "there, so long prompts in chunks, and cached ones, leave some of its time untold."
    )
    problems = [
        note(f"{each.pool}: its steps can't be explained here: {each.problem}") for each in found if each.problem
    ]
    title = "Time in steps, by what bounds it"
    return section(
        "steps", "What steps are bound by", lead,
        bar_chart(title, _used(rows), [_only(rows, row) for row in rows], SECONDS, as_shares=True) if rows else None,
        said if rows else None, problems,
        el("details", el("summary", "Operators of a step of each kind, the one in the middle"),
           [_details(each, kind) for each in found for kind in each.kinds], class_="nested") if rows else None,
    )  # fmt: skip


def _row(found: Anatomy, kind: StepKind) -> Row:
    amounts = [share * kind.time_ns / NS_PER_S for share in kind.shares]
    return Row(f"{found.pool}: {_KINDS[kind.name]}", amounts, counted(kind.num_steps, "step"))


def _used(rows: list[Row]) -> list[Part]:
    return [part for i, part in enumerate(_LOOK) if any(row.amounts[i] for row in rows)]


def _only(rows: list[Row], row: Row) -> Row:
    """The row without parts that nobody has."""
    return Row(row.name, [a for i, a in enumerate(row.amounts) if any(each.amounts[i] for each in rows)], row.remark)


def _details(found: Anatomy, kind: StepKind) -> Child:
    """The operators of the step in the middle."""
    step = kind.steps[len(kind.steps) // 2]
    total = sum(o.time_ns for o in step.operators) or 1.0
    rows = [
        (o.name, f"{o.count:,}", seconds(o.time_ns / NS_PER_S), percent(o.time_ns / total), f"{digits(o.flop / 1e9)}",
         f"{digits(o.bytes / 1e6)}", percent(o.efficiency), o.bound_by, o.origin)
        for o in step.operators
    ]  # fmt: skip
    heads = ["operator", "launches", "time", "share", "GFLOP", "MB", "of peak", "bound by", "origin"]
    title = (
        f"{found.pool}, {_KINDS[kind.name]}: a step of {step.name}, {seconds(step.time_ns / NS_PER_S)}, by {found.perf}"
    )
    return el("details", el("summary", title), table(heads, rows, label=f"Operators of {title}"))
