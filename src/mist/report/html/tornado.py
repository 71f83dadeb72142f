"""What would change a deployment's results, as one HTML file: a bar for each parameter, the longest first.

From the document of a sensitivity to a page; every figure on it is in the document. It runs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mist.report.html.figures import digits, percent
from mist.report.html.markup import Markup, el, note, section, table, tabs
from mist.report.html.objectives import name_of
from mist.report.html.page import page

Document = Mapping[str, Any]

#: percent for 1 %, less than which is not drawn
_NOTHING = 0.005


def sensitivity_html(document: Document) -> str:
    """The report of `mist.search.sensitivity.sensitivity`."""
    rows = document["parameters"]
    objectives = list(dict.fromkeys(name for row in rows for name in row["elasticities"]))
    panels = [(name_of(name), tornado(rows, name)) for name in objectives]
    lead = "By how many percent a result changes for 1 % more of a parameter, each moved alone, up and down."
    has_lines = any(each["low"] is not None for row in rows for each in row["elasticities"].values())
    lines = " The lines across bars hold the mean with 95 % confidence." if has_lines else ""
    said = note(f"Steps of {percent(document['step'])}, or of one replica, over {len(document['seeds'])} seeds under "
                f"the same requests.{lines}")  # fmt: skip
    drawn = section("sensitivity", "Sensitivity", lead, tabs("objectives", "Results", panels) if panels else None, said,
                    [note(remark) for remark in document["remarks"]])  # fmt: skip
    failed = any(row["error"] for row in rows)
    heads = ["parameter", "from", "to", *map(name_of, objectives), *(["error"] if failed else [])]
    figures = [[row["parameter"], *_values(row), *(_signed(row["elasticities"][n]) for n in objectives),
                *([row["error"] or ""] if failed else [])] for row in rows]  # fmt: skip
    whole = section("figures", "All figures", None, table(heads, figures, label="Elasticities", wide=True))
    return page(document["name"], "Sensitivity", [drawn, whole], footer="Simulated by MIST.", assets=("explorer.css",))


def tornado(rows: Sequence[Document], objective: str) -> Markup:
    """Bars to the left and right of nothing; what has no value isn't drawn."""
    known = [(row["parameter"], found) for row in rows if (found := row["elasticities"][objective])["mean"] is not None]
    if not known:
        return note("Nothing that was moved has a value here.")
    still = [name for name, found in known if abs(found["mean"]) < _NOTHING]
    known = [(name, found) for name, found in known if abs(found["mean"]) >= _NOTHING]
    unmoved = note(f"Changes nothing: {', '.join(still)}.") if still else None
    known.sort(key=lambda item: -abs(item[1]["mean"]))
    reach = [value for _, found in known for value in found.values() if value is not None]
    low, high = min(0.0, *reach), max(0.0, *reach)
    width = high - low or 1.0
    zero = -low / width * 100
    bars = [_bar(name, found, low, width) for name, found in known]
    left = f"{name_of(objective)} becomes less to the left, more to the right."
    return el("figure", el("figcaption", el("strong", f"{name_of(objective)}, for 1 % more")),
              el("div", bars, class_="rows tornado", style=f"--zero:{zero:.2f}%"), note(left), unmoved)  # fmt: skip


def _bar(name: str, found: Document, low: float, width: float) -> Markup:
    def at(value: float) -> float:
        return (value - low) / width * 100

    mean = found["mean"]
    start, length = at(min(mean, 0.0)), abs(mean) / width * 100
    bar = el("i", class_="less" if mean < 0 else None, style=f"left:{start:.2f}%;width:{length:.2f}%")
    line = None
    if found["low"] is not None:
        line = el("u", style=f"left:{at(found['low']):.2f}%;width:{(found['high'] - found['low']) / width * 100:.2f}%")
    tip = f"{name}: {_signed(found)}"
    return el("div", el("span", name, class_="rowname"), el("div", bar, line, class_="lane"),
              el("span", _signed(found), class_="value"), class_="row", tabindex=0, role="img", aria_label=tip,
              data_tip=tip)  # fmt: skip


def _values(row: Document) -> list[str]:
    """From where to where it was moved; a factor is of what the scenario has."""
    sign = "×" if row.get("is_factor") else ""
    return [f"{sign}{digits(value)}" for value in row["values"]]


def _signed(found: Document) -> str:
    if found["mean"] is None:
        return "-"
    half = "" if found["low"] is None else f" ± {found['mean'] - found['low']:.2f}"
    mean = f"{found['mean']:+.2f}".replace("-", "−")
    return f"{mean[1:] if mean[1:] == '0.00' else mean} %{half}"
