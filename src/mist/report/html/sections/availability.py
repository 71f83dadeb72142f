"""Who was there: replicas up over time, when and why that changed, and the events of the scenario.

A section of a report, for runs in which replicas came and went or something was to happen. The changes are the
summary's, so that a result which was read back tells the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice, pairwise
from typing import Any

import numpy as np

from mist.metrics.availability import replica_of
from mist.metrics.words import counted
from mist.records import CLIENT_STATES, UP
from mist.report.html import reduce
from mist.report.html.charts import Mark
from mist.report.html.figures import NUMBER, SECONDS, shown
from mist.report.html.markup import Markup, note, section, table
from mist.report.html.sections.over_time import TimeAxis
from mist.report.html.view import View
from mist.units import NS_PER_S

#: changes that are listed, and events that are marked in the chart, at most
MAX_CHANGES, MAX_MARKS = 200, 12


def availability(view: View) -> Markup | None:
    found, events = view.summary.get("availability"), list(_events(view.scenario))
    if not found and not events:
        return None
    chart = _chart(view, found, events) if found and view.span.last_ns > view.span.first_ns else None
    happening = table(["at", "event"], [(shown(at, SECONDS), told) for at, told in events], label="Events")
    return section(
        "availability", "Availability", "Who took tasks, and why that changed; times are on the run's clock.",
        chart, happening if events else None, _changes(found["changes"]) if found else None,
    )  # fmt: skip


def _events(scenario: Mapping[str, Any]) -> Iterator[tuple[float, str]]:
    """When and what, as the scenario has it."""
    for each in sorted(scenario.get("events") or (), key=lambda each: float(each["at_s"])):
        for key, what in (("client_down", "goes down"), ("client_up", "comes up")):
            if each.get(key):
                told = f"{each[key]} {what}"
        if each.get("link"):
            told = f"{each['link']} at {1.0 if each.get('factor') is None else each['factor']:.3g} of its bandwidth"
        yield float(each["at_s"]), told + (f" for {shown(each['for_s'], SECONDS)}" if each.get("for_s") else "")


def _chart(view: View, found: Mapping[str, Any], events: list[tuple[float, str]]) -> Markup | None:
    """Replicas that take tasks, by pool."""
    time, changes = TimeAxis(view), dict[str, list[tuple[int, bool]]]()
    for each in found["changes"]:
        at_ns, is_up = round(each["time_s"] * NS_PER_S), each["state"] == CLIENT_STATES[UP]
        changes.setdefault(each["client"], []).append((at_ns, is_up))
    series = []
    for number, pool in enumerate(found["pools"]):
        spans = [
            (begin, end)
            for replica in dict.fromkeys(replica_of(each["name"]) for each in view.summary["clients"][pool]["replicas"])
            for (begin, is_up), (end, _) in pairwise(
                [(view.span.first_ns, True), *changes.get(replica, ()), (view.span.last_ns, True)]
            )
            if is_up and end > begin
        ]
        begins, ends = (np.array([span[i] for span in spans], np.int64) for i in (0, 1))
        series.append(time.series(pool, reduce.levels(begins, ends, time.bounds), number))
    first_s = view.span.first_ns / NS_PER_S
    time.marks += [Mark(at_s - first_s, told) for at_s, told in islice(events, MAX_MARKS)]
    return time.chart("Replicas up, by pool", series, NUMBER)


def _changes(changes: list[Mapping[str, Any]]) -> list[Markup]:
    rows = [
        (shown(each["time_s"], SECONDS), each["client"], each["state"], each["reason"])
        for each in changes[:MAX_CHANGES]
    ]
    listed = table(["at", "replica", "is", "because of"], rows, label="Changes")
    left = len(changes) - MAX_CHANGES
    return [listed, *([note(f"{counted(left, 'later change')} in changes.parquet.")] if left > 0 else [])]
