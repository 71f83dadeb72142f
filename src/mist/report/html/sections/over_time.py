"""The run over time: arrivals, queues, batches, KV caches, how busy clients and links were.

A section of a report. Each stretch of time shows its mean and, as a band, the least and the most that there was in it,
so no peak is lost however long the run is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from mist.metrics.distribution import FloatColumn
from mist.metrics.window import BoolColumn
from mist.records import UNFINISHED, IntColumn
from mist.report.html import reduce
from mist.report.html.charts import NUM_COLOURS, Mark, Series, heat_chart, line_chart
from mist.report.html.figures import BYTES_PER_S, FRACTION, NUMBER, PER_S, SECONDS, seconds
from mist.report.html.markup import Markup, note, section
from mist.report.html.scales import Scale
from mist.report.html.view import View
from mist.report.link_use import link_uses
from mist.units import NS_PER_S

#: clients that are shown one by one, and links, at most
MAX_ROWS, MAX_LINKS = 48, 8
_AXIS = "time since the first arrival"


def over_time(view: View) -> Markup | None:
    if not len(view.requests["request"]) or view.span.last_ns == view.span.first_ns:
        return None
    time = TimeAxis(view)
    makes = (_arrivals, _queues, _batches, _kv, _busy, _lent, _flows, _links)
    charts = [chart for make in makes if (chart := make(view, time))]
    width = seconds(float(time.bounds[1] - time.bounds[0]) / NS_PER_S)
    said = note(
        f"Lines are means over stretches of {width}; the bands around them reach from the least to the most at any "
        "instant of each. Drag across a chart to look at a part of the run; Escape or a double click "
        "shows all of it again."
    )
    return section("time", "Over time", "All requests of the run, measured or not.", said, charts)


class TimeAxis:
    """The axis that the charts have in common."""

    def __init__(self, view: View) -> None:
        span = view.span
        self.bounds = reduce.edges(span.first_ns, span.last_ns)
        self.x = ((self.bounds[:-1] + self.bounds[1:]) / 2 - span.first_ns) / NS_PER_S
        self.scale = Scale(0.0, (span.last_ns - span.first_ns) / NS_PER_S, SECONDS)
        cut = ((view.window.start_ns, "measured from here"), (view.window.end_ns, "measured to here"))
        self.marks = [
            Mark((at - span.first_ns) / NS_PER_S, name) for at, name in cut if span.first_ns < at < span.last_ns
        ]

    def series(self, name: str, found: reduce.Levels, colour: int) -> Series:
        return Series(name, self.x, found.mean, found.least, found.most, colour)

    def chart(self, title: str, series: list[Series], unit: str) -> Markup | None:
        """The chart of the series that have anything; the largest where there are more than colours."""
        series = [each for each in series if (each.y if each.high is None else each.high).any()]
        if not series:
            return None
        if len(series) > NUM_COLOURS:
            title += f" (the largest {NUM_COLOURS} of {len(series)})"
            series = sorted(series, key=lambda each: -float(each.y.sum()))[:NUM_COLOURS]
        tops = [each.y if each.high is None else each.high for each in series]
        y = Scale.over(np.concatenate(tops), unit, least=0.0)
        return line_chart(title, series, self.scale, Scale(y.low, y.high * 1.04, unit), marks=self.marks,
                          x_name=_AXIS, is_time=True)  # fmt: skip


def _arrivals(view: View, time: TimeAxis) -> Markup | None:
    requests = view.requests
    gone = requests["end_ns"][requests["status"] != UNFINISHED]
    width_s = np.diff(time.bounds) / NS_PER_S
    series = [
        Series(name, time.x, np.histogram(times, time.bounds)[0] / width_s, colour=number)
        for number, (name, times) in enumerate((("arrivals", requests["arrival_ns"]), ("departures", gone)))
    ]
    return time.chart("Arrivals and departures", series, PER_S)


def _queues(view: View, time: TimeAxis) -> Markup | None:
    tasks = view.tasks
    admitted = np.where(tasks["started_ns"] >= 0, tasks["started_ns"], tasks["end_ns"])
    return time.chart("Tasks waiting, by pool", [
        time.series(pool, reduce.levels(tasks["queued_ns"][mine], admitted[mine], time.bounds), number)
        for number, (pool, clients) in enumerate(view.pools.items())
        for mine in [np.isin(tasks["client"], clients)]
    ], NUMBER)  # fmt: skip


def _batches(view: View, time: TimeAxis) -> Markup | None:
    steps = view.steps
    running = steps["num_prefills"] + steps["num_decodes"]
    return time.chart("Tasks in steps, by pool", [
        time.series(pool, reduce.levels(*_spans(view, mine), time.bounds, running[mine]), number)
        for number, (pool, mine) in enumerate(_steps_by_pool(view))
    ], NUMBER)  # fmt: skip


def _kv(view: View, time: TimeAxis) -> Markup | None:
    series = []
    for number, (pool, mine) in enumerate(_steps_by_pool(view)):
        capacity = int(view.kv_blocks[view.pools[pool]].sum())
        if capacity:
            used = reduce.levels(*_spans(view, mine), time.bounds, view.steps["kv_blocks"][mine] / capacity)
            series.append(time.series(pool, used, number))
    return time.chart("KV cache in use during steps, by pool", series, FRACTION)


def _steps_by_pool(view: View) -> Iterator[tuple[str, BoolColumn]]:
    pool = view.pool_of[view.steps["client"]]
    for number, name in enumerate(view.pools):
        yield name, pool == number


def _spans(view: View, mine: BoolColumn | IntColumn) -> tuple[IntColumn, IntColumn]:
    return view.steps["start_ns"][mine], view.steps["end_ns"][mine]


def _busy(view: View, time: TimeAxis) -> Markup | None:
    """How busy each client was, or some of many."""
    names = view.records.client_names
    steps, busy = view.steps, dict[str, FloatColumn]()
    bounds = reduce.edges(view.span.first_ns, view.span.last_ns, reduce.NUM_STRETCHES // 2)
    order = np.argsort(steps["client"], kind="stable")
    firsts = np.searchsorted(steps["client"][order], np.arange(len(names) + 1))
    for number, name in enumerate(names):
        mine = order[firsts[number] : firsts[number + 1]]
        busy[name] = reduce.levels(*_spans(view, mine), bounds).mean
    rows, title = _some(busy)
    return heat_chart(f"Share of time in a step, by client{title}", rows, time.scale, x_name=_AXIS)


def _some(busy: Mapping[str, FloatColumn]) -> tuple[list[tuple[str, FloatColumn]], str]:
    """All rows, or evenly many from the busiest to the idlest, and how to say so."""
    rows = list(busy.items())
    if len(rows) <= MAX_ROWS:
        return rows, ""
    ranked = sorted(rows, key=lambda row: -float(row[1].mean()))
    places = np.linspace(0, len(ranked) - 1, MAX_ROWS).round().astype(int)
    return [ranked[i] for i in places.tolist()], f" ({MAX_ROWS} of {len(rows)}, from the busiest to the idlest)"


def _lent(view: View, time: TimeAxis) -> Markup | None:
    """Clients that took prompts for others, by pool."""
    loans = view.records.loans.as_columns()
    ends = np.where(loans["end_ns"] >= 0, loans["end_ns"], view.span.last_ns)
    return time.chart("Clients lent to prompts, by pool", [
        time.series(pool, reduce.levels(loans["start_ns"][mine], ends[mine], time.bounds), number)
        for number, (pool, clients) in enumerate(view.pools.items())
        for mine in [np.isin(loans["client"], clients)]
    ], NUMBER)  # fmt: skip


def _flows(view: View, time: TimeAxis) -> Markup | None:
    """Bytes under way between pools and memories, each spread evenly over the time of its transfer."""
    moved, names = view.transfers, list(view.pools)
    ended = (moved["start_ns"] >= 0) & (moved["end_ns"] > moved["start_ns"])
    rows = {name: column[ended] for name, column in moved.items()}
    if not len(rows["bytes"]):
        return None
    ends = [_place(view, rows[way]) for way in ("sender", "receiver")]
    rates = rows["bytes"] / (rows["end_ns"] - rows["start_ns"]) * NS_PER_S
    series: list[Series] = []
    for pair in np.unique(np.column_stack(ends), axis=0).tolist():
        mine = (ends[0] == pair[0]) & (ends[1] == pair[1])
        found = reduce.levels(rows["start_ns"][mine], rows["end_ns"][mine], time.bounds, rates[mine])
        name = " → ".join(names[end] if end >= 0 else view.records.memory_names[-1 - end] for end in pair)
        series.append(time.series(name, found, len(series)))
    return time.chart("Bytes under way between pools", series, BYTES_PER_S)


def _links(view: View, time: TimeAxis) -> Markup | None:
    """The share of its bandwidth that each link carried, the busiest of them; peaks would all be at 1."""
    uses = link_uses(view.result)
    series = [
        Series(use.name, time.x, reduce.levels(use.starts_ns, use.ends_ns, time.bounds, use.shares).mean, colour=number)
        for number, use in enumerate(uses[:MAX_LINKS])
    ]
    some = f" (the busiest {MAX_LINKS} of {len(uses)})" if len(uses) > MAX_LINKS else ""
    return time.chart(f"Bandwidth in use, by link{some}", series, FRACTION)


def _place(view: View, ends: IntColumn) -> IntColumn:
    """The pool of each end of a transfer; memories stay below 0."""
    return np.where(ends >= 0, view.pool_of[np.maximum(ends, 0)], ends)
