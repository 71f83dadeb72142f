"""Where the time of requests went, from the fastest to the slowest: waiting, served and handed over in each stage.

A section of a report. The parts of each bar add up to the mean latency of its requests, exactly.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from mist.metrics.stages import PARTS, stage_times
from mist.metrics.words import counted
from mist.records import IntColumn
from mist.report.html.bars import Part, Row, bar_chart
from mist.report.html.charts import colour
from mist.report.html.figures import SECONDS
from mist.report.html.markup import Markup, el, section, tabs
from mist.report.html.view import View
from mist.units import NS_PER_S

#: requests are told apart at these percentiles of their latency
BANDS = (0, 25, 50, 75, 90, 95, 99, 100)
PATTERNS = {"wait_s": ("waiting", "light"), "serve_s": ("served", "solid"), "transfer_s": ("handed over", "striped")}


def stages(view: View) -> Markup | None:
    finished = view.finished
    if not len(finished["request"]):
        return None
    spoken = finished["first_token_ns"] >= 0
    panels = [("Until the end", _chart(view, "End-to-end latency by stage", view.stage_ns))]
    if spoken.any():
        answered = {name: column[spoken] for name, column in finished.items()}
        times = stage_times(answered, view.tasks, len(view.kinds), view.transfers, "first_token_ns")
        panels.insert(0, ("Until the first token", _chart(view, "Time to first token by stage", times)))
        panels.reverse()
    lead = (
        "Requests in order of their latency, from the fastest quarter to the slowest hundredth: the mean time in each "
        "stage. The parts of a bar add up to the mean latency of its requests; of stages side by side those count that "
        "were waited for."
    )
    return section("stages", "Where the time went", lead, tabs("stages", "Until when", panels))


def bands(totals: IntColumn) -> list[tuple[str, IntColumn]]:
    """Names of the bands and the places of their members; bands with nobody in them are left out."""
    order = np.argsort(totals, kind="stable")
    bounds = [round(len(order) * percentile / 100) for percentile in BANDS]
    found = []
    for i, (first, stop) in enumerate(pairwise(bounds)):
        if stop > first:
            found.append((f"P{BANDS[i]}–P{BANDS[i + 1]}", order[first:stop]))
    return found


def _chart(view: View, title: str, times: IntColumn) -> Markup:
    used = [(k, p) for k in range(len(view.kinds)) for p in range(len(PARTS)) if times[:, k, p].any()]
    parts = [
        Part(f"{view.kinds[k]}, {PATTERNS[PARTS[p]][0]}", colour(k), PATTERNS[PARTS[p]][1]) for k, p in used
    ]  # fmt: skip
    rows = [
        Row(name, [float(times[members, k, p].mean()) / NS_PER_S for k, p in used], counted(len(members), "request"))
        for name, members in bands(times.sum(axis=(1, 2)))
    ]
    rows.append(Row("all", [float(times[:, k, p].mean()) / NS_PER_S for k, p in used], counted(len(times), "request")))
    return bar_chart(title, parts, rows, SECONDS, keys=_keys(view, used))


def _keys(view: View, used: list[tuple[int, int]]) -> Markup:
    """A colour for each stage, a pattern for each part."""
    kinds = dict.fromkeys(k for k, _ in used)
    patterns = [PATTERNS[PARTS[p]] for p in dict.fromkeys(p for _, p in sorted(used, key=lambda each: each[1]))]
    swatches = [el("span", el("i", class_="swatch solid", style=colour(k)), view.kinds[k]) for k in kinds]
    swatches += [
        el("span", el("i", class_=f"swatch {look}", style="--c:var(--muted)"), name) for name, look in patterns
    ]
    return el("div", swatches, class_="legend")
