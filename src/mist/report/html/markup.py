"""Pieces of HTML: elements whose texts are escaped as they are put in, and what every section is made of.

Under all parts of a page. A fragment is a `Markup`; whatever else is put into an element is a text, so names that a
user chose can't become markup. It knows nothing of results.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any


class Markup(str):
    """HTML that is put in as it is."""

    __slots__ = ()


#: what may stand in an element; None and False leave nothing
Child = Markup | str | int | None | bool | Iterable["Child"]
#: cells that are set to the right
_NUMERIC = frozenset("0123456789")


def el(name: str, *children: Child, **attributes: Any) -> Markup:
    """An element: `el("p", "a < b", class_="note")`; underscores in attribute names are hyphens, one at the end goes.

    An attribute that is None or False is left out, True stands alone.
    """
    shown = ((key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items())
    given = "".join(
        f" {key}" if value is True else f' {key}="{escape(str(value))}"'
        for key, value in shown
        if value is not None and value is not False
    )
    return Markup(f"<{name}{given}>{join(children)}</{name}>")


def join(children: Child) -> Markup:
    """Fragments and texts, one behind the other."""
    if children is None or isinstance(children, bool):
        return Markup("")
    if isinstance(children, Markup):
        return children
    if isinstance(children, str | int):
        return Markup(escape(str(children)))
    return Markup("".join(join(child) for child in children))


def embedded(data: Any, **attributes: Any) -> Markup:
    """JSON for the page's script, which can't end the element that it is in."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return el("script", Markup(text.replace("<", "\\u003c")), type="application/json", **attributes)


def table(heads: Sequence[Child], rows: Iterable[Sequence[Child]], *, label: str, wide: bool = False) -> Markup:
    """A table that scrolls in its own box; cells that begin with a digit are set to the right."""
    first = [[*row] for row in rows]
    numeric = [i > 0 and all(_is_number(row[i]) or row[i] in ("-", "") for row in first) for i in range(len(heads))]
    align = ["n" if right else None for right in numeric]
    head = el("tr", [el("th", cell, scope="col", class_=a) for cell, a in zip(heads, align, strict=True)])
    body = [el("tr", [_cell(i, cell, align[i]) for i, cell in enumerate(row)]) for row in first]
    whole = el("table", el("thead", head), el("tbody", body), class_="wide" if wide else None)
    return el("div", whole, class_="scroll", tabindex=0, role="region", aria_label=label)


def _cell(column: int, cell: Child, align: str | None) -> Markup:
    return el("th", cell, scope="row", class_=align) if column == 0 else el("td", cell, class_=align)


def _is_number(cell: Child) -> bool:
    if isinstance(cell, int) and not isinstance(cell, bool):
        return True
    return (
        isinstance(cell, str)
        and not isinstance(cell, Markup)
        and cell.lstrip("<>≤±−+$ ")[:1] in _NUMERIC
        and bool(cell)
    )


def note(*children: Child) -> Markup:
    """A remark under a figure."""
    return el("p", children, class_="note")


def facts(rows: Iterable[tuple[Child, Child]]) -> Markup:
    """Names and values, in two columns."""
    return el("dl", [el("div", el("dt", name), el("dd", value)) for name, value in rows], class_="facts")


def section(anchor: str, title: str, lead: Child, *children: Child) -> Markup:
    """A part of a page that its navigation leads to; `lead` says in a sentence or two what it shows."""
    head = el("h2", title, id=f"{anchor}-title")
    return el("section", head, el("p", lead, class_="lead") if lead else None, children, id=anchor,
              aria_labelledby=f"{anchor}-title")  # fmt: skip


def tabs(anchor: str, label: str, panels: Sequence[tuple[str, Child]]) -> Markup:
    """Panels of which one is shown at a time; all of them on paper and where no script runs."""
    if len(panels) == 1:
        return el("div", panels[0][1])
    buttons = [
        el("button", name, type="button", role="tab", id=f"{anchor}-t{i}", aria_controls=f"{anchor}-p{i}",
           aria_selected="true" if i == 0 else "false", tabindex=0 if i == 0 else -1)
        for i, (name, _) in enumerate(panels)
    ]  # fmt: skip
    shown = [
        el("div", el("h3", name, class_="printed"), content, role="tabpanel", id=f"{anchor}-p{i}",
           aria_labelledby=f"{anchor}-t{i}", class_=None if i == 0 else "later")
        for i, (name, content) in enumerate(panels)
    ]  # fmt: skip
    return el("div", el("div", buttons, role="tablist", aria_label=label), shown, class_="tabs")
