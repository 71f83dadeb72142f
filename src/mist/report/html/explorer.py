"""The points of a search to look at: two objectives against each other, and all choices and objectives side by side.

Points of a search's document come in, fragments go out; places on every axis and texts are made here, so that
`explorer.js` moves points and computes nothing. It decides neither what is in the front nor what is feasible.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import permutations
from typing import Any

import numpy as np

from mist.report.html.figures import NOTHING, percent, shown
from mist.report.html.markup import Markup, el, embedded
from mist.report.html.objectives import name_of, short, told, unit_of
from mist.report.html.scales import Scale

Point = Mapping[str, Any]

#: lines beside each other that can still be told apart
MAX_LINES = 300
#: a ratio of the largest value to the least from which on an axis is logarithmic
_WIDE = 30.0
_KINDS = {"front": "in the front", "beaten": "dominated", "missed": "misses a constraint, or failed"}


class Explorer:
    """The measured `points`; `senses`: "minimise" or "maximise" by objective, in the order of the search."""

    def __init__(self, points: Sequence[Point], senses: Mapping[str, str]) -> None:
        self.points = points
        self.senses = senses

    @cached_property
    def scales(self) -> dict[str, Scale]:
        return {name: _scale([each["objectives"][name] for each in self.points], name) for name in self.senses}

    def places(self, name: str) -> list[float | None]:
        """Fractions of the way along the axis of an objective; None where a point has no value."""
        values = [each["objectives"][name] for each in self.points]
        known = iter(self.scales[name].at(np.array([v for v in values if v is not None], dtype=float)).tolist())
        return [None if value is None else round(next(known), 4) for value in values]

    def front_line(self, across: str, up: str) -> str:
        """The path of steps through the front's points that no other of them beats in these two objectives."""
        members = [i for i, each in enumerate(self.points) if each["front"]]
        best_first = {name: (1.0 if sense == "minimise" else -1.0) for name, sense in self.senses.items()}
        xs, ys = self.places(across), self.places(up)
        placed = sorted((best_first[across] * x, best_first[up] * y)
                        for i in members if (x := xs[i]) is not None and (y := ys[i]) is not None)  # fmt: skip
        path, least = "", np.inf
        for x, y in placed:
            if y < least:
                left, top = 4000 * abs(x), 1000 - 1000 * abs(y)
                path += f"H{left:.0f}V{top:.0f}" if path else f"M{left:.0f} {top:.0f}"
                least = y
        return f"{path}h1" if path else ""

    def tip(self, i: int) -> str:
        """A point in lines: what it is, its choices and its figures."""
        point = self.points[i]
        lines = [f"{point['front'] or _KINDS[kind_of(point)]}{_prefix(point)}", told(point["choices"])]
        lines += [f"{name_of(n)}: {shown(value, unit_of(n))}" for n, value in point["objectives"].items()]
        if point["missed"]:
            lines.append(f"misses a constraint by {percent(point['missed'])}")
        return "\n".join(line for line in lines if line)

    def scatter(self) -> Markup:
        """Two objectives against each other; the script lets others be chosen."""
        names = list(self.senses)
        across, up = names[0], names[min(1, len(names) - 1)]
        axes: dict[str, dict[str, Any]] = {
            name: {"at": self.places(name), "ticks": self.scales[name].ticks(), "title": self._title(name)}
            for name in names
        }
        lines = {f"{a} {b}": self.front_line(a, b) for a, b in [*permutations(names, 2), (across, up)]}
        line = el("path", d=lines[f"{across} {up}"], class_="line", style="--c:var(--c0)")
        svg = el("svg", line, viewBox="0 0 4000 1000", preserveAspectRatio="none", aria_hidden="true",
                 focusable="false")  # fmt: skip
        order = sorted(range(len(self.points)), key=lambda i: bool(self.points[i]["front"]))
        buttons = [self._button(i, axes[across]["at"][i], axes[up]["at"][i]) for i in order]
        xticks = [el("span", text, style=f"left:{at * 100:.2f}%") for at, text in axes[across]["ticks"]]
        yticks = [el("span", text, style=f"top:{100 - at * 100:.2f}%") for at, text in axes[up]["ticks"]]
        plot = el("div", el("div", yticks, class_="yticks", aria_hidden="true"),
                  el("div", svg, buttons, class_="area"), el("div", xticks, class_="xticks", aria_hidden="true"),
                  class_="plot", role="group",
                  aria_label="Deployments: arrow keys go from one to the next")  # fmt: skip
        chosen = [self._choice("across", across), self._choice("up", up)] if len(names) > 1 else []
        keys = el("div", [el("span", el("i", class_=f"point {kind}"), text) for kind, text in _KINDS.items()],
                  class_="legend")  # fmt: skip
        caption = el("figcaption", el("strong", "What was measured"), chosen, keys)
        title = el("p", self._title(across), class_="axis")
        return el("figure", caption, el("p", self._title(up), class_="axis above"), plot, title,
                  el("p", id="chosen", class_="note", aria_live="polite"),
                  embedded({"axes": axes, "lines": lines}, class_="data"), id="explorer")  # fmt: skip

    def _title(self, name: str) -> str:
        return f"{name_of(name)} ({'less' if self.senses[name] == 'minimise' else 'more'} is better)"

    def _choice(self, axis: str, chosen: str) -> Markup:
        options = [el("option", name_of(name), value=name, selected=name == chosen) for name in self.senses]
        return el("label", axis.capitalize(), el("select", options, data_axis=axis))

    def _button(self, i: int, x: float | None, y: float | None) -> Markup:
        point, tip = self.points[i], self.tip(i)
        place = None if x is None or y is None else f"left:{x * 100:.2f}%;top:{100 - y * 100:.2f}%"
        kind = f"point {kind_of(point)}{' early' if point['share'] < 1 else ''}"
        return el("button", type="button", class_=kind, style=place, hidden=place is None, data_point=i, tabindex=-1,
                  data_tip=tip, data_front=point["front"], aria_label=tip.replace("\n", ", "))  # fmt: skip

    def parallel(self) -> Markup:
        """A line for each point through what was chosen and what came of it; the front on top."""
        chosen = sorted(range(len(self.points)), key=lambda i: (not self.points[i]["front"], i))[:MAX_LINES]
        columns = [*self._choices(chosen), *self._figures(chosen)]
        width = 1000 * max(len(columns) - 1, 1)
        paths = []
        for row, i in reversed(list(enumerate(chosen))):
            at = [(1000 * k, 1000 - 1000 * ys[row]) for k, (_, _, ys) in enumerate(columns)]
            path = "M" + "L".join(f"{x} {y:.0f}" for x, y in at)
            paths.append(el("path", d=path, class_=f"way {kind_of(self.points[i])}", data_point=i,
                            data_tip=self.tip(i)))  # fmt: skip
        svg = el("svg", paths, viewBox=f"0 0 {width} 1000", preserveAspectRatio="none", aria_hidden="true",
                 focusable="false")  # fmt: skip
        axes = [_column(k / max(len(columns) - 1, 1), name, ticks) for k, (name, ticks, _) in enumerate(columns)]
        drawn = el("div", svg, axes, class_="ways", style=f"min-width:{130 * len(columns)}px")
        caption = el("figcaption", el("strong", "Choices and what came of them"))
        box = el("div", drawn, class_="scroll", tabindex=0, role="region", aria_label="Parallel coordinates")
        return el("figure", caption, box)

    def _choices(self, chosen: Sequence[int]) -> list[tuple[str, list[tuple[float, str]], list[float]]]:
        found = []
        for path in dict.fromkeys(path for i in chosen for path in self.points[i]["choices"]):
            labels = [self.points[i]["choices"].get(path, NOTHING) for i in chosen]
            kinds = _ordered(dict.fromkeys(labels))
            if len(kinds) > 1:
                at = {label: k / (len(kinds) - 1) for k, label in enumerate(kinds)}
                found.append((short(path), [(at[label], label) for label in kinds], [at[each] for each in labels]))
        return found

    def _figures(self, chosen: Sequence[int]) -> list[tuple[str, list[tuple[float, str]], list[float]]]:
        found = []
        for name, sense in self.senses.items():
            places = self.places(name)
            worst = 1.0 if sense == "minimise" else 0.0
            at = [worst if (place := places[i]) is None else place for i in chosen]
            arrow = "↓" if sense == "minimise" else "↑"
            found.append((f"{name_of(name)} {arrow}", self.scales[name].ticks(5), at))
        return found


def kind_of(point: Point) -> str:
    """Whether it is in the front, is dominated, or misses a constraint."""
    if point["front"]:
        return "front"
    return "missed" if point["missed"] is None or point["missed"] > 0 else "beaten"


def _prefix(point: Point) -> str:
    return f", on {percent(point['share'])} of the workload" if point["share"] < 1 else ""


def _scale(values: Sequence[float | None], name: str) -> Scale:
    """An axis with room at its ends."""
    known = np.array([value for value in values if value is not None], dtype=float)
    log = bool(len(known) and known.min() > 0 and known.max() > _WIDE * known.min())
    scale = Scale.over(known, unit_of(name), log=log)
    if log:
        return Scale(scale.low / 1.1, scale.high * 1.1, scale.unit, True)
    room = (scale.high - scale.low) * 0.06
    low = scale.low - room
    return Scale(max(low, 0.0) if scale.low >= 0 else low, scale.high + room, scale.unit)


def _column(place: float, name: str, ticks: Sequence[tuple[float, str]]) -> Markup:
    texts = [el("span", text, style=f"top:{100 - at * 100:.2f}%") for at, text in ticks]
    # names of parameters are broken behind their underscores
    title = el("strong", name.replace("_", "_\u200b"))
    return el("div", title, texts, class_="way-axis", style=f"--at:{place:.4f}")


def _ordered(labels: Mapping[str, None]) -> list[str]:
    """Numbers by their size, words in the order of their first use; none at all before both."""
    rest = [label for label in labels if label != NOTHING]
    with suppress(ValueError):
        rest.sort(key=float)
    return [NOTHING, *rest] if NOTHING in labels else rest
