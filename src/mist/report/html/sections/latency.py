"""Latencies as distributions: TTFT, TPOT, ITL and E2E, of all and by tenant, and the time that each stage took.

A section of a report. Every curve goes through times that occurred, and percentiles are those of the summary.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mist.metrics.distribution import FloatColumn, Multiset, distribution
from mist.metrics.latency import e2e_ns, tpot_ns, ttft_ns
from mist.metrics.tokens import DecodeSteps, Segments, token_gaps
from mist.metrics.window import Columns
from mist.records import IntColumn
from mist.report.html import reduce
from mist.report.html.charts import ALL, Mark, Series, line_chart
from mist.report.html.figures import FRACTION, SECONDS, seconds
from mist.report.html.markup import Markup, el, note, section, table, tabs
from mist.report.html.scales import Scale
from mist.report.html.sections.headline import LATENCIES, LONG
from mist.report.html.view import View
from mist.units import NS_PER_S

_SHOWN = (50.0, 90.0, 95.0, 99.0, 99.9, 100.0)
#: a distribution: values in ns and how often each occurs, None for once
Times = tuple[IntColumn | FloatColumn, IntColumn | None]


def latency(view: View) -> Markup | None:
    if not len(view.finished["request"]):
        return None
    found = {metric: _by_tenant(view, metric) for metric in LATENCIES}
    panels = [
        (LATENCIES[metric], _charts(f"{LATENCIES[metric]}: {LONG[metric]}", lines, _targets(view, metric)))
        for metric, lines in found.items()
        if any(len(values) for values, _ in lines.values())
    ]
    stages = _stages(view)
    if stages:
        panels.append(("By stage", _charts("Time in a stage: waiting, served and handed over", stages, [])))
    rows = [
        [name if who == ALL else f"{name} · {who}", *_row(times)]
        for metric, name in LATENCIES.items()
        for who, times in found[metric].items()
        if len(times[0])
    ]
    rows += [[f"stage {kind}", *_row(times)] for kind, times in stages.items()]
    heads = ["latency", "values", "mean", "P50", "P90", "P95", "P99", "P99.9", "max"]
    lead = "The share of finished requests, or of gaps between tokens for ITL, that took at most or more than a time."
    figures = table(heads, rows, label="Percentiles")
    return section("latency", "Latency", lead, tabs("latency", "Latencies", panels), _reduced(found),
                   el("details", el("summary", "Percentiles"), figures, open=len(rows) <= 12))  # fmt: skip


def times_of(view: View, metric: str, chosen: Columns) -> Times:
    """The values of a latency over some finished requests, without those that have none."""
    if metric == "itl_s":
        return _gaps(view, chosen)
    values = {"ttft_s": ttft_ns, "tpot_s": tpot_ns, "e2e_s": e2e_ns}[metric](chosen)
    return values[values >= 0], None  # type: ignore[return-value]  # what of either kind is chosen stays of it


def _by_tenant(view: View, metric: str) -> dict[str, Times]:
    found = {ALL: times_of(view, metric, view.finished)}
    numbers = view.finished["request"]
    for name, (first, stop) in view.tenants.items():
        chosen = (numbers >= first) & (numbers < stop)
        found[name] = times_of(view, metric, {key: column[chosen] for key, column in view.finished.items()})
    return found


def _gaps(view: View, chosen: Columns) -> Times:
    steps = DecodeSteps.of(view.steps, len(view.records.client_names))
    first = np.full(int(view.requests["request"].max(initial=-1)) + 1, -1, np.int64)
    first[chosen["request"]] = chosen["first_token_ns"]
    gaps, weights = token_gaps(Segments.of(view.tasks, steps).since(first, steps), steps)
    return gaps[weights > 0], weights[weights > 0]


def _stages(view: View) -> dict[str, Times]:
    """What each stage took of the requests that spent time in it, where there are several."""
    spent = view.stage_ns.sum(axis=2)
    found = {kind: (spent[spent[:, k] > 0, k], None) for k, kind in enumerate(view.kinds)}
    return {kind: times for kind, times in found.items() if len(times[0])} if len(view.kinds) > 1 else {}


def _targets(view: View, metric: str) -> list[Mark]:
    slo = view.summary["slo"] or {"targets": []}
    return [
        Mark(t["target_s"], f"{t.get('tenant', '')} {t['statistic'].replace('p', 'P')} target".strip())
        for t in slo["targets"]
        if t["metric"] == metric
    ]


def _charts(title: str, found: Mapping[str, Times], targets: list[Mark]) -> Markup:
    """The distribution, and its upper end by powers of ten."""
    series, tails = [], []
    for number, (name, times) in enumerate(found.items()):
        x, y = reduce.cdf(*times)
        if len(x):
            # from nothing at the least value on
            series.append(Series(name, np.append(x[:1], x) / NS_PER_S, np.append(0.0, y), colour=number))
            tails.append(Series(name, np.append(x[:1], x) / NS_PER_S, 1.0 - np.append(0.0, y), colour=number))
    every = np.concatenate([each.x for each in series])
    axis = Scale.over(np.append(every, [t.value for t in targets]), SECONDS, log=True)
    whole = line_chart(title, series, axis, Scale(0.0, 1.0, FRACTION), marks=targets, x_name="took at most this long",
                       steps=True)  # fmt: skip
    shares = np.concatenate([each.y for each in tails])
    least = float(shares[shares > 0].min(initial=0.1))
    down = Scale(max(least, 1e-7), 1.0, FRACTION, log=True)
    name = f"{title.partition(':')[0]}: the slowest"
    tail = line_chart(name, tails, axis, down, marks=targets, x_name="took longer than this", steps=True)
    return el("div", whole, tail, class_="pair")


def _row(times: Times) -> list[str]:
    values, weights = times
    if weights is None:
        figures = distribution(values, _SHOWN)
    else:
        counted = Multiset()
        counted.add(values.astype(np.int64), weights)
        figures = counted.distribution(_SHOWN)
    num = len(values) if weights is None else int(weights.sum())
    return [f"{num:,}", *(seconds(figure) for figure in figures.values())]


def _reduced(found: Mapping[str, Mapping[str, Times]]) -> Markup | None:
    most = max((len(values) for lines in found.values() for values, _ in lines.values()), default=0)
    if most <= reduce.MAX_POINTS:
        return None
    return note(
        f"Curves of more than {reduce.MAX_POINTS} values are drawn through about {reduce.MAX_POINTS} of them, each "
        "exact, more densely towards the slowest, which is among them. Percentiles in the table are of all values."
    )
