"""What a search found as one HTML file: the gains, the points to explore, the front's scenarios, and what was left out.

From a search's document and the YAML of its deployments to a page. Every figure on it is in the document, and it runs
nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mist.report.html.explorer import MAX_LINES, Explorer
from mist.report.html.figures import NOTHING, digits, percent
from mist.report.html.markup import Markup, el, facts, note, section, table
from mist.report.html.objectives import name_of, told, with_interval
from mist.report.html.page import page

Document = Mapping[str, Any]

#: the engine's defaults, as a name beside those of the best
DEFAULTS = "engine defaults"


def search_html(document: Document, scenarios: Mapping[str, str]) -> str:
    """The report of a search: its result.json, and the YAML of the front's deployments by name."""
    sections = [_headline(document), _gains(document), _explorer(document, scenarios), _left_out(document)]
    return page(document["name"], "Search", [each for each in sections if each is not None],
                footer="Simulated by MIST.", assets=("explorer.css", "explorer.js"))  # fmt: skip


def _headline(document: Document) -> Markup:
    counts = document["configurations"]
    runs = ", ".join(f"{each['runs']:,} on {percent(each['share'])} of the workload" for each in document["runs"])
    rows = [
        ("strategy", document["strategy"]),
        ("configurations", f"{counts['tried']:,}, of which {counts['legal']:,} are legal"),
        ("runs", runs),
        ("objectives", ", ".join(f"{name_of(name)} ({sense})" for name, sense in document["objectives"].items())),
        ("seeds", ", ".join(map(str, document["seeds"]))),
        ("the same on real devices", _real(document["real"])),
    ]
    remarks = [el("li", remark) for remark in document["remarks"]]
    bounds = ", ".join(f"{name_of(name)} {digits(bound)}" for name, bound in document["constraints"].items())
    return section("summary", "Summary", None, el("p", _verdict(document), class_="verdict"),
                   facts([*rows, ("constraints", bounds)] if bounds else rows),
                   el("ul", remarks) if remarks else None)  # fmt: skip


def _verdict(document: Document) -> str:
    if not document["front"]:
        return "Nothing meets the constraints: raise the budget, or relax them."
    number = len(document["front"])
    text = f"{number:,} deployment{'s are' if number > 1 else ' is'} beaten by no other."
    gain = document["gain"]
    if gain is None or gain["factor"]["mean"] is None:
        return text
    times = "" if _is_equal(gain) else f"{_factor(gain)} "
    return f"{text} In {name_of(gain['objective'])} the best is {times}as good as the engine's defaults."


def _real(real: Document) -> str:
    dollars = "" if real["usd"] is None else f", {digits(real['usd'])} USD"
    return f"{digits(real['device_hours'])} device-hours{dollars}"


def _is_equal(gain: Document) -> bool:
    return set(gain["factor"].values()) <= {1.0, None}


def _factor(gain: Document | None) -> str:
    """ "1.3 times [1.2, 1.4]"."""
    if gain is None or gain["factor"]["mean"] is None:
        return NOTHING
    mean, low, high = (gain["factor"][key] for key in ("mean", "low", "high"))
    within = "" if low is None else f" [{digits(low)}, {digits(high)}]"
    return f"{digits(mean)} times{within}"


def _gains(document: Document) -> Markup | None:
    known = {title: each for title, each in document["best"].items() if each is not None}
    if not known:
        return None
    if document["baseline"] is not None:
        known[DEFAULTS] = document["baseline"]
    objectives = list(document["objectives"])
    rows = [
        [_title(title), each.get("front") or NOTHING, *(with_interval(n, each["objectives"][n]) for n in objectives),
         _against(each.get("gain")), f"{each['seeds_met']} of {each['num_seeds']}", _what(each)]
        for title, each in known.items()
    ]  # fmt: skip
    heads = ["which", "deployment", *map(name_of, objectives), "against the defaults", "SLOs met", "choices"]
    lead = (
        "The best by each objective, of a single vendor and of one kind of device; the last two by the first objective."
    )
    shown = table(heads, rows, label="Best deployments", wide=True)
    return section("gains", "The best", lead, shown, _measured(known),
                   note("± and brackets hold the mean over seeds with 95 % confidence."))  # fmt: skip


def _title(title: str) -> str:
    return f"best {name_of(title.removeprefix('best '))}" if title.startswith("best ") else title


def _against(gain: Document | None) -> str:
    if gain is None:
        return NOTHING
    return f"{'the same' if _is_equal(gain) else _factor(gain)} in {name_of(gain['objective'])}"


def _what(each: Document) -> str:
    return told(each["choices"]) or f"{each['devices']} x {', '.join(each['kinds'])}"


def _measured(known: Mapping[str, Document]) -> Markup | None:
    """Which of the best rest on data sheets rather than on measured operators."""
    found = [name for name, each in known.items() if each["step_times"].get("roofline", 0.0) > 0.5]
    return note(f"Step times by the roofline, not by measured operators: {', '.join(found)}.") if found else None


def _explorer(document: Document, scenarios: Mapping[str, str]) -> Markup | None:
    points = document.get("points", [])
    if not any(value is not None for point in points for value in point["objectives"].values()):
        return None
    front = [_deployment(each, scenarios.get(each["name"])) for each in document["front"]]
    explorer = Explorer(points, document["objectives"])
    lead = ("Each point is a deployment: hover it, or go there with Tab and the arrow keys, for its choices and "
            "figures; click it or press Enter for its scenario.")  # fmt: skip
    return section("front", "Deployments", lead, explorer.scatter(), note(" ".join(_said(document, points))),
                   el("div", front, class_="fronts"),
                   explorer.parallel())  # fmt: skip


def _said(document: Document, points: Sequence[Document]) -> Iterator[str]:
    early = sum(point["share"] < 1 for point in points)
    if early:
        yield (f"{early:,} small points ran on the beginning of the workload alone: they were not promising there, and "
               "what a prefix says may lie beyond the front.")  # fmt: skip
    if legal := max(document["configurations"]["legal"] - len(points), 0):
        yield f"{legal:,} more configurations are not shown."
    hidden = sum(None in point["objectives"].values() for point in points)
    if hidden:
        yield f"{hidden:,} have no value in some objective, and are not on its axis."
    if len(points) > MAX_LINES:
        yield f"Lines beside each other are the front and the first others, {MAX_LINES} in all."


def _deployment(each: Document, scenario: str | None) -> Markup:
    rows = [(name_of(name), with_interval(name, found)) for name, found in each["objectives"].items()]
    rows += [("accelerators", f"{each['devices']} ({', '.join(each['kinds'])})")]
    rows += [("SLOs met", f"{each['seeds_met']} of {each['num_seeds']} seeds")]
    rows += [
        (f"{name_of(name.removeprefix('slo.'))} against its bound", _off(share))
        for name, share in each["constraints"].items()
    ]
    rows += [(f"step times: {origin}", percent(share)) for origin, share in each["step_times"].items()]
    choices = facts((path, label) for path, label in each["choices"].items())
    run = [note(f"mist run {each['name']}.yaml, with this file beside the result:"),
           el("pre", scenario, tabindex=0, role="region", aria_label=f"Scenario of {each['name']}")]  # fmt: skip
    return el("details", el("summary", f"{each['name']}: {_what(each)}"), facts(rows), el("h3", "Choices"), choices,
              run if scenario is not None else None, class_="story", id=f"deployment-{each['name']}")  # fmt: skip


def _in_a_line(message: str) -> str:
    """A message and its remedy."""
    return "; ".join(line.strip() for line in message.splitlines())


def _off(share: float | None) -> str:
    """How far from a bound: below 0 where it is held."""
    return NOTHING if share is None else f"{share:+.1%}".replace("%", " %").replace("-", "−")


def _left_out(document: Document) -> Markup | None:
    counts = document["configurations"]
    rows = [[each["reason"], each["count"], _in_a_line(each["example"])] for each in counts["refused"]]
    rows += [["failed when run", each["count"], _in_a_line(each["error"])] for each in counts["failed"]]
    if not rows:
        return None
    lead = (
        f"{counts['tried'] - counts['legal']:,} of {counts['tried']:,} configurations can't be run, for these reasons."
    )
    return section("left-out", "Left out", lead,
                   table(["because", "configurations", "for example"], rows, label="Reasons", wide=True))  # fmt: skip
