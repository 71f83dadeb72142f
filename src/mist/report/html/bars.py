"""Bars of parts that add up, with a legend: as long as their sums, or all equally long to compare the shares.

Parts come in as numbers by row, fragments go out; a row tells its parts under a pointer or when it has the focus. They
know nothing of results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mist.report.html.figures import percent, shown
from mist.report.html.markup import Markup, el


@dataclass(frozen=True, slots=True)
class Part:
    """A part that each bar may have: its name, colour (a style) and pattern (`solid`, `light` or `striped`)."""

    name: str
    style: str
    pattern: str = "solid"


@dataclass(frozen=True, slots=True)
class Row:
    """A bar: amounts in the order of the parts, and what stands behind it in words."""

    name: str
    amounts: Sequence[float]
    remark: str = ""


def legend(parts: Sequence[Part]) -> Markup:
    """What the parts are called."""
    swatches = [el("span", el("i", class_=f"swatch {part.pattern}", style=part.style), part.name) for part in parts]
    return el("div", swatches, class_="legend")


def bar_chart(
    title: str, parts: Sequence[Part], rows: Sequence[Row], unit: str, *, keys: Markup | None = None,
    as_shares: bool = False,
) -> Markup:  # fmt: skip
    """Rows of stacked bars on a common scale, which a button makes equally long; `keys` stands for the usual legend."""
    longest = max((sum(row.amounts) for row in rows), default=0.0)
    lines = [_row(row, parts, unit, longest) for row in rows]
    switch = el("button", "As shares", type="button", class_="switch", aria_pressed="true" if as_shares else "false")
    caption = el("figcaption", el("strong", title), switch if len(rows) > 1 else None, keys or legend(parts))
    return el("figure", caption, el("div", lines, class_="rows"), class_=f"bars{' shares' if as_shares else ''}")


def _row(row: Row, parts: Sequence[Part], unit: str, longest: float) -> Markup:
    total = sum(row.amounts)
    shares = [amount / total if total else 0.0 for amount in row.amounts]
    pieces = [
        el("i", class_=part.pattern, style=f"{part.style};flex-grow:{share:.6f}")
        for part, share in zip(parts, shares, strict=True)
        if share
    ]
    told = [
        f"{part.name} {shown(amount, unit)} ({percent(share)})"
        for part, amount, share in zip(parts, row.amounts, shares, strict=True)
        if amount
    ]
    bar = el("div", pieces, class_="bar", style=f"--length:{total / longest * 100 if longest else 0:.3f}%")
    tip = f"{row.name}: {shown(total, unit)}\n" + "\n".join(told)
    label = [el("span", row.name, class_="rowname"), el("div", bar, class_="track")]
    value = el("span", shown(total, unit), el("small", row.remark) if row.remark else None, class_="value")
    return el(
        "div", label, value, class_="row", tabindex=0, role="img", aria_label=tip.replace("\n", ", "), data_tip=tip
    )
