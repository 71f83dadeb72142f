"""What a search found as a person reads it: what was refused, the front, the best, the baseline, and what it saved.

From the document to text; every number here is in it. It never shows wall times.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mist.metrics.words import counted, share

Document = Mapping[str, Any]

_NOTHING = "-"
#: share of step times by a bare roofline from which on that is told
_UNMEASURED = 0.5


def render(document: Document) -> RenderableType:
    """The whole page."""
    parts: list[RenderableType] = [Text(document["name"], style="bold"), Text(_counts(document))]
    if document["configurations"]["refused"] or document["configurations"]["failed"]:
        parts.append(_refused(document["configurations"]))
    parts += [Text(remark, style="yellow") for remark in document["remarks"]]
    if document["front"]:
        parts += [_deployments("Pareto front", document["front"], [d["name"] for d in document["front"]], document)]
        known = {title: best for title, best in document["best"].items() if best is not None}
        if document["baseline"] is not None:
            known["engine defaults"] = document["baseline"]
        parts += [_deployments("The best", list(known.values()), list(known), document)]
        parts += [Text(line, style="yellow") for line in _unmeasured(known)]
    else:
        parts.append(Text("Nothing meets the constraints: raise the budget, or relax them.", style="bold red"))
    parts += [Text(line) for line in (_gain(document), _real(document["real"])) if line]
    spaced = [each for part in parts for each in (part, Text(""))]
    return Group(*spaced[:-1])


def _counts(document: Document) -> str:
    counts = document["configurations"]
    runs = ", ".join(
        f"{counted(each['runs'], 'run')} on {share(each['share'])} of the workload" for each in document["runs"]
    )
    legal = f"{counts['legal']:,} of {counts['tried']:,} configurations are legal"
    if counts.get("deployments", counts["legal"]) != counts["legal"]:
        legal += f", {counts['deployments']:,} deployments under several loads"
    return f"{legal}; by {document['strategy']}: {runs}."


def _refused(configurations: Document) -> RenderableType:
    table = Table("Not run, because", "configurations", box=None, pad_edge=False)
    table.columns[1].justify = "right"
    for each in configurations["refused"]:
        table.add_row(each["reason"], f"{each['count']:,}")
    for each in configurations["failed"]:
        table.add_row(f"failed: {each['error'].splitlines()[0]}", f"{each['count']:,}")
    return table


def _deployments(
    title: str, deployments: Sequence[Document], names: Sequence[str], document: Document
) -> RenderableType:
    """A line for each: what was chosen, where the deployments differ, and the objectives with their half intervals."""
    objectives = list(document["objectives"])
    table = Table(title, "deployment", *objectives, "SLOs met", box=None, pad_edge=False)
    for column in table.columns[2:]:
        column.justify = "right"
    for name, deployment in zip(names, deployments, strict=True):
        figures = [_figure(deployment["objectives"][each]) for each in objectives]
        met = f"{deployment['seeds_met']} of {deployment['num_seeds']}"
        table.add_row(name, _told(deployment), *figures, met)
    return table


def _told(deployment: Document) -> str:
    """The choices, each by the end of its path, without the labels of the alternatives around it."""
    told = []
    for path, label in deployment["choices"].items():
        key = path.rpartition(".")[2] if "." in path else path
        told.append(label if key in ("clients", "device") else f"{key.partition('[')[0]} {label}")
    return ", ".join(told) or f"{deployment['devices']} x {', '.join(deployment['kinds'])}"


def _figure(interval: Document) -> str:
    mean, low = interval["mean"], interval["low"]
    if mean is None:
        return _NOTHING
    half = 0.0 if low is None else mean - low
    return f"{mean:,.4g}" if half < 5e-4 * abs(mean) else f"{mean:,.4g} ±{half:,.2g}"


def _gain(document: Document) -> str:
    gain = document["gain"]
    if gain is None or gain["factor"]["mean"] is None:
        return ""
    factor, by_seed = gain["factor"], gain["by_seed"]
    within = "" if factor["low"] is None else f" (95 % confidence {factor['low']:.3g} to {factor['high']:.3g}"
    within += f", {len(by_seed)} seeds)" if within else ""
    return f"{gain['objective']}: {factor['mean']:.3g} times as good as the engine's defaults{within}."


def _real(real: Document) -> str:
    dollars = "" if real["usd"] is None else f" and {real['usd']:,.0f} USD"
    return f"Measured on real devices, these runs take {real['device_hours']:,.1f} device-hours{dollars}."


def _unmeasured(known: Mapping[str, Document]) -> list[str]:
    """Which of the best rest on data sheets rather than on measured operators."""
    found = [name for name, each in known.items() if each["step_times"].get("roofline", 0.0) > _UNMEASURED]
    return [f"Step times by the roofline, not by measured operators: {', '.join(found)}."] if found else []
