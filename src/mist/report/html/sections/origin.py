"""Where the figures come from, what they cost, and the scenario that gives them again.

The last sections of a report: cost and energy where the summary has them, provenance, and the resolved scenario.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from mist.errors import ScenarioError
from mist.report.html.bars import Part, Row, bar_chart
from mist.report.html.charts import colour
from mist.report.html.figures import FRACTION, digits, percent
from mist.report.html.markup import Child, Markup, el, facts, section, table
from mist.report.html.view import View
from mist.scenario import catalogue
from mist.scenario.value import to_yaml

#: figures of the two blocks, with their names and what stands before and behind them
_COST = {
    "usd": ("Cost", "$", ""), "usd_per_hour": ("Per hour", "$", ""),
    "usd_per_million_output_tokens": ("Per million output tokens", "$", ""),
    "usd_per_million_total_tokens": ("Per million tokens in all", "$", ""),
    "usd_per_thousand_requests": ("Per thousand requests", "$", ""),
    "output_tokens_per_usd": ("Output tokens per USD", "", ""), "prices": ("Prices", "", ""),
    "purchase": ("Purchase", "", ""),
}  # fmt: skip
_ENERGY = {
    "joules": ("Energy", "", " J"), "mean_w": ("Mean power", "", " W"),
    "joules_per_output_token": ("Per output token", "", " J"), "joules_per_total_token": ("Per token in all", "", " J"),
    "wh_per_request": ("Per request", "", " Wh"), "carbon_g": ("Carbon dioxide", "", " g"),
}  # fmt: skip
_WHOSE = {"pools": "pool", "hosts": "host", "memories": "memory", "stages": "stage", "tenants": "tenant"}


def cost_and_energy(view: View) -> Markup | None:
    cost, energy = (view.summary.get(name) or {} for name in ("cost", "energy"))
    if not cost and not energy:
        return None
    blocks = [
        [el("h3", title), facts(shown), [el("p", text, class_="note") for text in block.get("remarks", ())]]
        for title, block, names in (("Cost", cost, _COST), ("Energy", energy, _ENERGY))
        if (shown := _facts(block, names))
    ]
    quotes = [(name, *map(_value, quote.values())) for name, quote in cost.get("quotes", {}).items()]
    heads = ["paid for", *next(iter(cost["quotes"].values()))] if quotes else []
    prices = table([*map(_words, heads)], quotes, label="Prices")
    return section(
        "cost", "Cost and energy", "Over the span that rates are over; idle time is charged to whom it was kept for.",
        blocks, _whose(cost, energy), el("details", el("summary", "Prices"), prices) if quotes else None,
    )  # fmt: skip


def _facts(block: Mapping[str, Any], names: Mapping[str, tuple[str, str, str]]) -> list[tuple[str, str]]:
    return [
        (name, f"{before}{_value(block[key])}{behind}")
        for key, (name, before, behind) in names.items()
        if block.get(key) is not None
    ]


def _whose(cost: Mapping[str, Any], energy: Mapping[str, Any]) -> Child:
    """Who costs and draws how much, and which share of all."""
    totals, rows = (cost.get("usd"), energy.get("joules")), []
    for key, name in _WHOSE.items():
        for owner in dict.fromkeys([*cost.get(key, {}), *energy.get(key, {})]):
            row = [f"{name} {owner}"]
            for block, figure, whole in ((cost, "usd", totals[0]), (energy, "joules", totals[1])):
                value = block.get(key, {}).get(owner)
                value = value.get(figure) if isinstance(value, Mapping) else value
                row += [_value(value), percent(value / whole if whole and value is not None else None)]
            rows.append(row)
    heads = ["whose", "USD", "share", "joules", "share"]
    return table(heads, rows, label="Whose cost and energy") if rows else None


def _words(key: str) -> str:
    return key.replace("_", " ").replace("usd", "USD")


def _value(value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return digits(value)
    return "-" if value is None else str(value).replace("_", " ")


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
