"""Deployments against the first one as one HTML file: differences with their intervals, and paired distributions.

From the document of a comparison, and the pairs it was made of, to a page. Every figure of its tables is in the
document; it runs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from mist.metrics.distribution import FloatColumn
from mist.metrics.words import load_verdict, slo_verdict
from mist.report.html.charts import ALL, Mark, Series, line_chart
from mist.report.html.figures import FRACTION, NOTHING, SECONDS, percent, seconds, shown
from mist.report.html.markup import Markup, el, note, section, table, tabs
from mist.report.html.objectives import name_of, unit_of
from mist.report.html.page import page
from mist.report.html.reduce import MAX_POINTS, cdf
from mist.report.html.scales import Scale

Document = Mapping[str, Any]
Pairs = Mapping[str, tuple[FloatColumn, FloatColumn]]

#: a ratio of the largest time to the least from which on an axis is logarithmic
_WIDE = 30.0


def compare_html(document: Document, pairs: Sequence[Pairs]) -> str:
    """The report of `mist.search.compare.compare`.

    `pairs`: for each deployment that is held against the first, of each metric the times of the same requests in
    either: float64[n], s.
    """
    by = document["interval"]["by"]
    several = document["num_seeds"] > 1
    pooled = (
        " Tables hold means over the seeds' own figures, curves the requests of all seeds together." if several else ""
    )
    said = note("Requests are paired by number, so that what both have in common cancels. Intervals hold the "
                f"difference with {percent(document['interval']['level'])} confidence, by {by}; "
                f"seeds: {document['num_seeds']}.{pooled}")  # fmt: skip
    heads = ["deployment", "arrived", "finished", "rejected", "lost", "load", "SLO"]
    served = table(heads, _served(document["deployments"]), label="What became of the requests")
    sections = [section("deployments", "Deployments", None, served, *map(note, document["notes"]))]
    sections += [
        _against(i, document["baseline"], against, its)
        for i, (against, its) in enumerate(zip(document["against"], pairs, strict=True))
    ]
    sections[-1] = Markup(sections[-1].removesuffix("</section>") + said + "</section>")
    return page(f"Against {document['baseline']}", "Comparison", sections, footer="Simulated by MIST.")


def _served(deployments: Sequence[Document]) -> Iterator[list[Any]]:
    for each in deployments:
        counts = [f"{each[key]:,}" for key in ("arrived", "finished", "rejected", "lost")]
        yield [str(each["label"]), *counts, load_verdict(each), slo_verdict(each)]


def _against(i: int, baseline: str, against: Document, pairs: Pairs) -> Markup:
    lead = f"{against['label']} against {baseline}: {against['num_pairs']:,} requests in pairs."
    left_out = None
    if set(against["num_finished"]) != {against["num_pairs"]}:
        one, two = against["num_finished"]
        left_out = note(f"Of {one:,} that finished in the one and {two:,} in the other; all others are left out.")
    figures = ["figure", "in the first", "in this one", "difference", "interval", "share"]
    heads = [*figures, "faster", "slower"]
    panels = [
        (name_of(metric.removesuffix("_s")).upper(), _drawn(metric, baseline, against["label"], *times))
        for metric, times in pairs.items()
        if len(times[0])
    ]
    return section(f"against-{i}", str(against["label"]), lead, left_out,
                   table(heads, _requests(against["requests"]), label="Latencies"),
                   tabs(f"metrics-{i}", "Latencies", panels) if panels else None,
                   table(figures, _runs(against["runs"]), label="Whole runs"))  # fmt: skip


def _requests(requests: Document) -> Iterator[list[Any]]:
    for metric, found in requests.items():
        for statistic in ("mean", "p50", "p99") if found else ():
            each = found[statistic]
            shares = [percent(found[key]) for key in ("share_faster", "share_slower")]
            yield [
                name_of(f"{metric}.{statistic}"), seconds(each["baseline_s"]), seconds(each["value_s"]),
                *_difference(each["baseline_s"], each["difference_s"], each["low_s"], each["high_s"], seconds),
                *(shares if statistic == "mean" else ["", ""]),
            ]  # fmt: skip


def _runs(runs: Document) -> Iterator[list[Any]]:
    for name, each in runs.items():
        say = partial(shown, unit=unit_of(name))
        yield [name_of(name), say(each["baseline"]), say(each["value"]),
               *_difference(each["baseline"], each["difference"], each["low"], each["high"], say)]  # fmt: skip


def _difference(
    baseline: float, difference: float, low: float | None, high: float | None, say: Callable[[float], str]
) -> list[str]:
    def signed(value: float) -> str:
        return ("−" if value < 0 else "+" if value > 0 else "") + say(abs(value))

    within = NOTHING if low is None or high is None else f"{signed(low)} to {signed(high)}"
    share = f"{difference / baseline:+.1%}" if baseline else ""
    share = share[1:] if share[1:] == "0.0%" else share
    return [signed(difference), within, share.replace("-", "−").replace("%", " %")]


def _drawn(metric: str, baseline: str, label: str, one: FloatColumn, two: FloatColumn) -> Markup:
    """Both distributions, and that of each request's difference, in which its own size cancels."""
    title = metric.removesuffix("_s").upper()
    both = [(str(name), *cdf(times)) for name, times in ((baseline, one), (label, two))]
    scale = _scale(np.concatenate((one, two)))
    sides = line_chart(f"{title} of either", [Series(name, x, y, colour=i) for i, (name, x, y) in enumerate(both)],
                       scale, Scale(0, 1, FRACTION), x_name="at most this", steps=True)  # fmt: skip
    x, y = cdf(two - one)
    span = Scale.over(np.append(two - one, 0.0), SECONDS)
    differences = line_chart(f"{title}: this one minus the first, by request", [Series(ALL, x, y)],
                             span, Scale(0, 1, FRACTION), marks=[Mark(0.0, "the same")],
                             x_name="at most this", steps=True)  # fmt: skip
    told = (
        note(f"Curves go through at most about {MAX_POINTS} of {len(one):,} values.") if len(one) > MAX_POINTS else None
    )
    return el("div", el("div", sides, differences, class_="pair"), told)


def _scale(times: FloatColumn) -> Scale:
    known = times[times > 0]
    log = bool(len(known) and known.max() > _WIDE * known.min())
    return Scale.over(times, SECONDS, log=log)
