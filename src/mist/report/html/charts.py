"""Charts as HTML and SVG that need no script to be seen: lines with envelopes, and rows of shaded stretches.

Series and scales come in, fragments go out; `report.js` adds what a pointer, a finger or the arrow keys ask for, from
the values that each chart carries. Shapes stretch with the page and texts don't. They know nothing of results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mist.metrics.distribution import FloatColumn
from mist.report.html.markup import Markup, el, embedded
from mist.report.html.scales import Scale

#: how many colours there are (`--c0` ..), and units of a shape along each axis
NUM_COLOURS = 10
_WIDTH, _HEIGHT = 4000, 1000
#: the name of a series that needs no legend where it is alone
ALL = "all"
#: shades of a row
_SHADES = 10


@dataclass(frozen=True, slots=True)
class Series:
    """A line through (x, y), perhaps with an envelope from `low` to `high`; float64[n] each. `colour`: its number."""

    name: str
    x: FloatColumn
    y: FloatColumn
    low: FloatColumn | None = None
    high: FloatColumn | None = None
    colour: int = 0


@dataclass(frozen=True, slots=True)
class Mark:
    """A value on an axis that something is held against, such as a target."""

    value: float
    name: str
    across: bool = False


def colour(number: int) -> str:
    """The style that gives an element the colour of the series of this number."""
    return f"--c:var(--c{number % NUM_COLOURS})"


def line_chart(
    title: str, series: Sequence[Series], x: Scale, y: Scale, *, marks: Sequence[Mark] = (), x_name: str = "",
    is_time: bool = False, steps: bool = False,
) -> Markup:  # fmt: skip
    """Lines over a common axis, with `steps` level from each value to the next one.

    All charts of a page with `is_time` are zoomed together; `marks` are lines across an axis.
    """
    shapes = [_line(each, x, y, steps) for each in series]
    grid = "".join(f"M0 {_HEIGHT - place * _HEIGHT:.0f}H{_WIDTH}" for place, _ in y.ticks(5))
    drawn = _svg(_HEIGHT, [el("path", d=grid, class_="grid"), shapes])
    data = {
        "series": [_values(each) for each in series],
        "x": _axis(x), "y": _axis(y), "time": is_time,
    }  # fmt: skip
    lines = [_mark(mark, x, y) for mark in marks]
    keys = [
        el("button", each.name, type="button", class_="key", aria_pressed="true", style=colour(each.colour))
        for each in series
    ]
    legend = el("div", keys, class_="legend") if len(series) > 1 or series[0].name != ALL else None
    return _chart(title, "lines", legend, [drawn, lines], x, y, x_name, data)


def heat_chart(title: str, rows: Sequence[tuple[str, FloatColumn]], x: Scale, *, x_name: str = "") -> Markup:
    """A row of stretches for each name, the darker the nearer its value is to 1; all rows have as many values."""
    num = len(rows[0][1])
    data = {
        "rows": [{"name": name, "v": np.round(values * 100).astype(int).tolist()} for name, values in rows],
        "x": _axis(x), "time": True,
    }  # fmt: skip
    lines = [
        el("div", el("span", name, class_="rowname"), _shades(values, num), class_="row")
        for name, values in rows
    ]  # fmt: skip
    shades = [el("i", style=f"opacity:{_opacity(i):.2f}") for i in range(_SHADES + 1)]
    legend = el("div", "0 %", el("span", shades, class_="ramp", aria_hidden="true"), "100 %", class_="legend")
    plot = el("div", lines, _tick_line(x), class_="heat")
    caption = el("figcaption", el("strong", title), legend)
    name = el("p", x_name, class_="axis") if x_name else None
    return el("figure", caption, el("div", plot, class_="plot", **_focusable(title)), name,
              embedded(data, class_="data"), class_="chart", data_kind="heat")  # fmt: skip


def _chart(
    title: str, kind: str, legend: Markup | None, drawn: Any, x: Scale, y: Scale, x_name: str, data: dict[str, Any]
) -> Markup:
    y_ticks = [el("span", text, style=f"top:{100 - place * 100:.2f}%") for place, text in y.ticks(5)]
    plot = el(
        "div",
        el("div", y_ticks, class_="yticks", aria_hidden="true"),
        el("div", drawn, class_="area"),
        _tick_line(x),
        class_="plot", **_focusable(title),
    )  # fmt: skip
    caption = el("figcaption", el("strong", title), legend)
    name = el("p", x_name, class_="axis") if x_name else None
    return el("figure", caption, plot, name, embedded(data, class_="data"), class_="chart", data_kind=kind)


def _focusable(title: str) -> dict[str, Any]:
    label = f"{title}. A chart: arrow keys read its values."
    return {"tabindex": 0, "role": "group", "aria_roledescription": "chart", "aria_label": label}


def _tick_line(x: Scale) -> Markup:
    ticks = [el("span", text, style=f"left:{place * 100:.2f}%") for place, text in x.ticks()]
    return el("div", ticks, class_="xticks", aria_hidden="true")


def _line(series: Series, x: Scale, y: Scale, steps: bool) -> Markup:
    across = np.round(x.at(series.x) * _WIDTH).astype(int)
    parts = []
    if series.low is not None and series.high is not None:
        upper, lower = (_heights(y, values) for values in (series.high, series.low))
        shape = _points(np.append(across, across[::-1]), np.append(upper, lower[::-1]))
        parts.append(el("path", d=f"{shape}Z", class_="band"))
    down = _heights(y, series.y)
    parts.append(el("path", d=_stairs(across, down) if steps else _points(across, down), class_="line"))
    return el("g", parts, style=colour(series.colour))


def _heights(y: Scale, values: FloatColumn) -> FloatColumn:
    heights: FloatColumn = np.round(_HEIGHT - y.at(values) * _HEIGHT)
    return heights


def _points(across: Any, down: FloatColumn) -> str:
    pairs = [f"{a} {d:.0f}" for a, d in zip(across.tolist(), down.tolist(), strict=True)]
    return f"M{'L'.join(pairs)}" if len(pairs) != 1 else f"M{pairs[0]}h1"


def _stairs(across: Any, down: FloatColumn) -> str:
    pairs = zip(across[1:].tolist(), down[1:].tolist(), strict=True)
    return f"M{across[0]} {down[0]:.0f}" + "".join(f"H{a}V{d:.0f}" for a, d in pairs)


def _mark(mark: Mark, x: Scale, y: Scale) -> Markup | None:
    scale = y if mark.across else x
    if not scale.low <= mark.value <= scale.high:
        return None
    place = float(scale.at(np.array([mark.value]))[0]) * 100
    side = f"top:{100 - place:.2f}%" if mark.across else f"left:{place:.2f}%"
    turned = " left" if not mark.across and place > 70 else ""
    return el("div", el("span", mark.name), class_=f"mark {'across' if mark.across else 'down'}{turned}", style=side)


def _shades(values: FloatColumn, num: int) -> Markup:
    """One path for each shade, so that thousands of stretches stay small."""
    shade = np.ceil(np.clip(values, 0, 1) * _SHADES).astype(int)
    bounds = np.flatnonzero(np.diff(shade, prepend=-1, append=-1))
    shapes: dict[int, list[str]] = {}
    for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        shapes.setdefault(int(shade[begin]), []).append(f"M{begin} 0h{end - begin}v1h{begin - end}z")
    paths = [el("path", d="".join(d), style=f"opacity:{_opacity(level):.2f}") for level, d in sorted(shapes.items())]
    return el("svg", paths, viewBox=f"0 0 {num} 1", preserveAspectRatio="none", class_="zoomable", aria_hidden="true",
              focusable="false")  # fmt: skip


def _opacity(shade: int) -> float:
    return 0.04 + 0.96 * shade / _SHADES


def _svg(height: int, children: Any) -> Markup:
    return el("svg", children, viewBox=f"0 0 {_WIDTH} {height}", preserveAspectRatio="none", class_="zoomable",
              aria_hidden="true", focusable="false")  # fmt: skip


def _axis(scale: Scale) -> dict[str, Any]:
    return {"low": scale.low, "high": scale.high, "unit": scale.unit, "log": scale.log}


def _values(series: Series) -> dict[str, Any]:
    columns = {"x": series.x, "y": series.y, "lo": series.low, "hi": series.high}
    return {"name": series.name} | {name: _short(values) for name, values in columns.items() if values is not None}


def _short(values: FloatColumn) -> list[float]:
    """Six digits: what a chart says under a pointer has three."""
    return [float(f"{value:.6g}") for value in values.tolist()]
