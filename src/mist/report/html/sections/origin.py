"""Where the figures come from, what they cost, and the scenario that gives them again.

The last sections of a report: cost and energy where the summary has them, provenance, and the resolved scenario.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote

from mist.errors import ScenarioError
from mist.report.html.bars import Part, Row, bar_chart
from mist.report.html.charts import colour
from mist.report.html.figures import FRACTION, digits
from mist.report.html.markup import Child, Markup, el, facts, section, table
from mist.report.html.view import View
from mist.scenario import catalogue
from mist.scenario.value import to_yaml


def cost_and_energy(view: View) -> Markup | None:
    blocks = [(name, view.summary.get(name)) for name in ("cost", "energy")]
    shown = [_block(name.capitalize(), block) for name, block in blocks if block]
    return section("cost", "Cost and energy", "Over the span that rates are over.", shown) if shown else None


def _block(title: str, block: Mapping[str, Any]) -> Markup:
    """A block's own figures, then a table for each mapping in it, and its remarks."""
    plain = [(_words(key), _value(value)) for key, value in block.items() if not isinstance(value, Mapping | list)]
    nested = [
        el("details", el("summary", _words(key)), table(["figure", "value"], _leaves(value), label=_words(key)))
        for key, value in block.items()
        if isinstance(value, Mapping) and value
    ]
    remarks = [el("li", str(text)) for key, value in block.items() if isinstance(value, list) for text in value]
    return el("div", el("h3", title), facts(plain), nested, el("ul", remarks) if remarks else None)


def _leaves(block: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    for key, value in block.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{before}{key} · ")
        else:
            yield f"{before}{_words(key)}", _value(value)


def _words(key: str) -> str:
    return str(key).replace("_", " ").replace("usd", "USD")


def _value(value: Any) -> str:
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return "-" if value is None else str(value)
    return digits(value) if isinstance(value, int | float) else ", ".join(map(str, value))


def provenance(view: View) -> Markup:
    summary, simulator = view.summary, view.summary["simulator"]
    shares = {name: share for name, share in summary["provenance"].items() if isinstance(share, float) and share}
    rows = [
        ("Simulator", f"MIST {simulator.get('version', '')}"),
        ("Seed", str(view.scenario.get("seed", "-"))),
        ("Steps, events", f"{simulator.get('steps', 0):,}, {simulator.get('events', 0):,}"),
    ]
    parts = [Part(name, colour(i)) for i, name in enumerate(shares)]
    row = Row("step times", list(shares.values()))
    bar = bar_chart("Share of busy time by where the step times come from", parts, [row], FRACTION, as_shares=True)
    said = (
        "measured: in a table of the device; interpolated, extrapolated: from such a table; roofline: from data-sheet "
        "peaks and efficiencies."
    )
    heads = ["pool", "engine", "device", "step times by", "checked points"]
    devices = [_device(name, pools) for name, pools in _devices(view).items()]
    return section("provenance", "Provenance", "Which figures this result rests on, and who says so.", facts(rows),
                   table(heads, _pools(summary), label="Pools"),
                   [bar, el("p", said, class_="note")] if shares else None, devices)  # fmt: skip


def _pools(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [
        (pool, each["engine"], each["device"], each["perf"] or "-", f"{each['points']:,}" if each["points"] else "none")
        for pool, each in summary.get("expected_error", {}).items()
    ]


def _devices(view: View) -> dict[str, list[str]]:
    """The catalogue's devices that are used, with the pools that do."""
    found: dict[str, list[str]] = {}
    for pool in view.pools:
        device = view.settings(pool).get("device")
        if isinstance(device, str):
            found.setdefault(device, []).append(pool)
    return found


def _device(name: str, pools: list[str]) -> Child:
    try:
        data = catalogue.mapping("devices", name)
    except (ScenarioError, KeyError):
        return None
    sources: Mapping[str, str] = data.get("sources", {})
    rows = [(key, _figure(data, key), el("span", source)) for key, source in sources.items()]
    used = f"{name} ({', '.join(pools)})"
    return el(
        "details",
        el("summary", f"Sources of {used}"),
        table(["figure", "value", "source"], rows, label=used, wide=True),
    )


def _figure(data: Mapping[str, Any], key: str) -> Markup:
    """The values of a key of `sources`, which may name several, or one within a mapping."""
    values = []
    for each in key.split(", "):
        name, _, inner = each.partition(".")
        value = data.get(name, "")
        value = value.get(inner, "") if inner and isinstance(value, Mapping) else value
        values.append(", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, Mapping) else str(value))
    return el("span", "; ".join(values))


def scenario(view: View) -> Markup | None:
    if not view.scenario:
        return None
    text = to_yaml(view.scenario)
    link = el(
        "a",
        "Save as scenario.yaml",
        href=f"data:text/yaml;charset=utf-8,{quote(text)}",
        download="scenario.yaml",
        class_="save",
    )
    lead = "With every default filled in: mist run scenario.yaml gives the same result."
    code = el("pre", el("code", text), tabindex=0, role="region", aria_label="The scenario as YAML")
    return section("scenario", "Scenario", lead, el("p", link), code)
