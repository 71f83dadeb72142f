"""The page of documentation that a validation makes: tables of the checking part against the bars, and explanations.

The very end: comparisons come in, Markdown goes out. Every number is of the runs; the sentences between named marks
are kept from the page that was there. It never decides what is judged: that is the split and the saturation rule.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mist.validation.evaluate import Comparison
from mist.validation.score import TRUSTED, families, family_of, kind_of, reasons, statistics

#: engines and devices of these families took part in fitting: median errors they are held to, in percent
FITTED = ("apex_plus", "blis", "inferencex_profiling_h200", "llmservingsim_vllm", "silicon", "splitwise_sim",
          "surajssd_a100_40g", "trtllm")  # fmt: skip
BARS = {"tpot": 6.0, "e2e": 6.0, "makespan": 6.0, "throughput": 6.0, "ttft": 10.0}
TTFT_BAR_MS = 5.0
#: of devices that nothing was fitted on, by what prices their steps
LEFT_OUT_BARS = {"kernels": 12.0, "roofline": 20.0}
#: fewer checking points can't judge a family
LEAST_POINTS = 5
#: kinds of metrics in the order of the tables
KINDS = ("ttft", "tpot", "itl", "e2e", "makespan", "throughput", "kv_transfer", "ttft_tail", "tpot_tail", "e2e_tail")
_MAIN = ("ttft", "tpot", "itl", "e2e", "makespan", "throughput")

Errors = Sequence[Comparison]
Row = list[str]


@dataclass(frozen=True, slots=True)
class Judged:
    """What the page is made of: all comparisons, those of the `checking` part, and runs of that part in other ways.

    `ablation` by what was in force, `left_out` by device with constants that were fitted elsewhere, `ratios` as
    `ratio_errors` gives them, `coverage` as in a report, `inputs` the files' names.
    """

    inputs: Sequence[str]
    date: str
    version: str
    coverage: Mapping[str, Any]
    everything: Errors
    checking: Errors
    ablation: Mapping[str, Errors]
    ratios: Mapping[str, Mapping[str, Mapping[str, Any]]]
    left_out: Mapping[str, Errors] = field(default_factory=dict)


def page(judged: Judged, texts: Mapping[str, str], plots: Mapping[str, str]) -> str:
    """The whole page; `texts` by the name of their marks, `plots` paths of pictures by family."""
    fine = _judged(judged.checking)
    saturated = [c for c in judged.checking if c.trust in TRUSTED and c.saturated]
    fitting = {c.point for c in judged.everything} - {c.point for c in judged.checking}
    fitted = _judged([c for c in judged.everything if c.point in fitting])
    parts = [
        _HEAD.format(inputs=", ".join(judged.inputs), date=judged.date, version=judged.version),
        _coverage(judged.coverage),
        "## Errors of the checking part\n",
        _BARS_TEXT,
        _families(fine, fitted),
        _text("families", texts),
        "### By source\n",
        _by(fine, "source", lambda c: c.source),
        "### By engine profile\n",
        _by(fine, "engine profile", lambda c: c.profile),
        "### By device\n",
        _devices(fine, judged.left_out),
        _text("devices", texts),
        "## Saturated\n",
        "Beyond capacity, small errors of the rate grow into large ones of the queue; no bar applies.\n",
        _by(saturated, "source", lambda c: c.source),
        "## What each part is worth\n",
        _ABLATION_TEXT,
        _ablation(judged.ablation),
        _text("ablation", texts),
        "## Ratios between configurations\n",
        _RATIOS_TEXT,
        _ratios(judged.ratios),
        "## What misses, and why\n",
        _text("misses", texts),
        "## Measured against simulated\n",
        "The checking part, trust A and B, not saturated; times in seconds, rates in tokens per second.\n",
        *(f"![{family}]({path})\n" for family, path in plots.items()),
    ]
    return "\n".join(parts)


def texts_of(old: str) -> dict[str, str]:
    """The sentences between the marks of a page, by name."""
    return dict(re.findall(r"<!-- text: (\S+) -->\n(.*?)<!-- end -->", old, re.DOTALL))


def plotted(judged: Judged) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """{family: {kind: (measured, simulated) pairs}} of what is judged, times in seconds."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for c in sorted(_judged(judged.checking), key=lambda c: (family_of(c.source), _place(kind_of(c.metric)))):
        unit = 1e-3 if c.metric.endswith("_ms") else 1.0
        found[family_of(c.source)][kind_of(c.metric)].append((unit * c.measured, unit * c.simulated))
    return found


def _judged(comparisons: Iterable[Comparison]) -> list[Comparison]:
    return [c for c in comparisons if c.trust in TRUSTED and not c.saturated]


def _place(kind: str) -> int:
    return KINDS.index(kind) if kind in KINDS else len(KINDS)


def _by_kind(comparisons: Errors, by: Callable[[Comparison], str]) -> dict[str, dict[str, list[Comparison]]]:
    groups: dict[str, dict[str, list[Comparison]]] = defaultdict(lambda: defaultdict(list))
    for c in comparisons:
        groups[by(c)][kind_of(c.metric)].append(c)
    return {
        name: dict(sorted(kinds.items(), key=lambda item: _place(item[0]))) for name, kinds in sorted(groups.items())
    }


# --- tables ---


def _coverage(coverage: Mapping[str, Any]) -> str:
    rows, runnable, run = (coverage[key] for key in ("rows", "runnable", "run"))
    share = f"{100 * run / max(runnable, 1):.1f} %"
    skips = [[str(number), reason] for reason, number in reasons(coverage["skipped"])]
    return (
        f"Of {rows:,} rows, {runnable:,} define a run, and {run:,} of these ({share}) were compared.\n\n"
        f"{_table(['rows', 'why not'], skips)}"
    )


def _families(checking: Errors, fitting: Errors) -> str:
    seen = _by_kind(fitting, lambda c: family_of(c.source))
    rows = []
    for family, kinds in _by_kind(checking, lambda c: family_of(c.source)).items():
        for kind, group in kinds.items():
            also = seen.get(family, {}).get(kind, [])
            rows.append([family, kind, *_figures(group), _one(_median(also)), *_verdict(family, kind, group)])
    head = ["family", "kind", "n", "median", "mean", "P90", "bias", "fitting part's median", "bar", "verdict"]
    means = families(list(checking))["over_families"]
    told = ", ".join(f"{kind} {means[kind]['mean_of_medians']:.1f} %" for kind in KINDS if kind in means)
    return f"{_table(head, rows)}\nMean of the families' medians, each counted once: {told}.\n"


def _verdict(family: str, kind: str, group: Errors) -> Row:
    """The bar, and whether it is met."""
    if family not in FITTED or kind not in BARS:
        return ["", ""]
    bar = f"{BARS[kind]:g} %" + (f" or {TTFT_BAR_MS:g} ms" if kind == "ttft" else "")
    if (points := len({c.point for c in group})) < LEAST_POINTS:
        return [bar, f"too few points ({points})"]
    within_ms = kind == "ttft" and float(np.median([abs(c.simulated - c.measured) for c in group])) <= TTFT_BAR_MS
    return [bar, "met" if _median(group) <= BARS[kind] or within_ms else "**missed**"]


def _by(comparisons: Errors, name: str, by: Callable[[Comparison], str]) -> str:
    """Medians by group and kind, and P90 and bias over all of a group."""
    rows = [
        [group, str(len({c.point for c in every})), *(_one(_median(kinds.get(kind, []))) for kind in _MAIN),
         *_figures(every)[3:]]
        for group, kinds in _by_kind(comparisons, by).items()
        for every in [[c for each in kinds.values() for c in each]]
    ]  # fmt: skip
    return _table([name, "points", *_MAIN, "P90 of all", "bias of all"], rows)


def _devices(comparisons: Errors, left_out: Mapping[str, Errors]) -> str:
    """As by any group; and with nothing fitted on the device, against the bar of what prices it."""
    rows = []
    for device, kinds in _by_kind(comparisons, lambda c: c.device).items():
        main = [c for kind in _MAIN for c in kinds.get(kind, [])]
        priced = max(("kernels", "roofline"), key=lambda perf: sum(c.perf == perf for c in main))
        medians = [_one(_median(kinds.get(kind, []))) for kind in _MAIN]
        without = [c for c in _judged(left_out.get(device, [])) if kind_of(c.metric) in _MAIN]
        judged = ["", "", ""]
        if without:
            bar = LEFT_OUT_BARS[priced]
            judged = [_one(_median(without)), f"{bar:g} %", "met" if _median(without) <= bar else "**missed**"]
        rows.append([device, priced, str(len({c.point for c in main})), *medians, _one(_median(main)), *judged])
    return _table(["device", "priced by", "points", *_MAIN, "all", "left out", "bar", "verdict"], rows)


def _ablation(ablation: Mapping[str, Errors]) -> str:
    """The mean of the families' medians, and below it the median of all values."""
    rows = []
    for name, comparisons in ablation.items():
        fine = _judged(comparisons)
        means = families(fine)["over_families"]
        kinds = _by_kind(fine, lambda c: "").get("", {})
        cells = [
            f"{means[kind]['mean_of_medians']:.1f} ({_one(_median(kinds[kind]))})" if kind in means else ""
            for kind in _MAIN
        ]
        rows.append([name, *cells])
    return _table(["in force", *_MAIN], rows)


def _ratios(ratios: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    rows = [
        [axis, kind, str(kinds[kind]["n"]), *(f"{kinds[kind][key]:.1f}" for key in ("median_ape", "p90_ape", "bias"))]
        for axis, kinds in ratios.items()
        for kind in sorted(kinds, key=_place)
    ]
    return _table(["what differs", "kind", "pairs", "median", "P90", "bias"], rows)


def _figures(group: Errors) -> Row:
    figures = statistics([c.error for c in group])
    return [str(figures["n"]), *(f"{figures[key]:.1f}" for key in ("median_ape", "mean_ape", "p90_ape", "bias"))]


def _median(group: Errors) -> float:
    return float(np.median([c.ape for c in group])) if group else float("nan")


def _one(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.1f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |\n" for line in lines)


def _text(name: str, texts: Mapping[str, str]) -> str:
    return f"<!-- text: {name} -->\n{texts.get(name, '')}<!-- end -->\n"


_HEAD = """\
# Validation

How far MIST is off measured deployments. This page is made by `make validate` from {inputs} (MIST {version}, {date});
only the text between `<!-- text -->` marks is written by hand. Errors are absolute percentage errors of one value each.

- **One row, one run.** Every point becomes a scenario from its columns alone; what they leave empty is the engine
  version's default. `mist validate points.csv` does it for any file of the same columns.
- **Split.** A point is of the checking part where `zlib.crc32(point.encode()) % 5 < 2` of its name, with all its rows:
  two of five. Fits left it out; what was set by hand with it in view is listed below the first table.
- **Trust** A and B are judged, C is not. **Saturated** runs stand apart: an open loop or trace whose measured output
  rate is below 0.95 of what was offered (without a rate, whose mean TTFT exceeds 5 s), a closed loop with more tokens
  in flight than the KV cache holds, and every offline run.
"""
_BARS_TEXT = """\
`ttft`, `tpot` and `e2e` are means and medians of a run, `*_tail` its P90 and P99. Bars hold for families whose engine
and device took part in fitting; with fewer than 5 checking points a family can't be judged by them.
"""
_ABLATION_TEXT = """\
The checking part with less and less left out: the mean of the families' medians, and in brackets the median of all
values. The engines' limits and memory rules are in force throughout, for without them nothing runs.
"""
_RATIOS_TEXT = """\
What a search relies on: of two points of one source that differ in one thing, how far the simulated ratio of their
values is off the measured one.
"""
