"""The summary as a person reads it: a few aligned tables and sentences, for a terminal or as plain text.

It takes the summary document and gives back something that rich can print; every number in it is in the document. It
never shows wall times: what is printed is the same for the same seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

Summary = Mapping[str, Any]

_LATENCIES = {"ttft_s": "TTFT", "tpot_s": "TPOT", "itl_s": "ITL", "e2e_s": "E2E"}
_STATISTICS = {"mean": "mean", "p50": "P50", "p90": "P90", "p99": "P99"}
_NOTHING = "-"


def render(name: str, summary: Summary) -> RenderableType:
    """The whole page; sections that say nothing are left out."""
    sections = [
        _headline(name, summary),
        _latencies(summary),
        _clients(summary),
        _stages(summary),
        *([_objectives(summary)] if summary["slo"] else []),
        _remarks(summary),
    ]
    spaced = [part for section in sections for part in (section, Text(""))]
    return Group(*spaced[:-1])


def _headline(name: str, summary: Summary) -> RenderableType:
    requests, throughput = summary["requests"], summary["throughput"]
    outcomes = [f"{requests['arrived']:,} arrived", f"{requests['finished']:,} finished"]
    outcomes += [
        f"{number:,} {status.replace('_', ' ')}"
        for status, number in requests.items()
        if number and status not in ("arrived", "finished")
    ]
    rates = [
        f"{_rate(throughput[f'{what}_per_s'])} {what.replace('_', ' ')}/s"
        for what in ("requests", "output_tokens", "total_tokens")
    ]
    rows = Table.grid(padding=(0, 2))
    rows.add_row("Requests", ", ".join(outcomes))
    rows.add_row("Throughput", f"{', '.join(rates)} over {_clock(summary['window']['span_s'])}")
    return Group(Text(name, style="bold"), Text(""), rows)


def _latencies(summary: Summary) -> RenderableType:
    further = [s for s in summary["e2e_s"] if s not in _STATISTICS]
    statistics = sorted({*_STATISTICS, *further}, key=lambda s: -1.0 if s == "mean" else float(s[1:]))
    table = _table("Latency", *(s if s == "mean" else s.upper() for s in statistics), "")
    for metric, label in _LATENCIES.items():
        cells, unit = _scaled([summary[metric][s] for s in statistics])
        table.add_row(label, *cells, Text(unit, style="dim"))
    return table


def _clients(summary: Summary) -> RenderableType:
    pools = summary["clients"]
    has_kv = any(pool["kv_tokens_capacity"] for pool in pools.values())
    has_hits = any(pool["prefix_hit_rate"] for pool in pools.values())
    kv_heads = ["KV tokens", "KV peak", "KV mean"] if has_kv else []
    hit_heads = ["prefix hits"] if has_hits else []
    table = _table("Clients", "utilisation", "mean batch", *kv_heads, *hit_heads, "preemptions")
    for name, pool in pools.items():
        cells = [_percent(pool["utilisation"]), _number(pool["mean_batch"])]
        if has_kv:
            capacity = pool["kv_tokens_capacity"]
            cells += [f"{capacity:,}" if capacity else _NOTHING, _percent(pool["kv_peak"]), _percent(pool["kv_mean"])]
        if has_hits:
            cells.append(_percent(pool["prefix_hit_rate"]))
        replicas = len(pool["replicas"])
        label = f"{replicas} x {name}" if replicas > 1 else name
        table.add_row(Text(label), *cells, f"{pool['preemptions']:,}")
    return table


def _stages(summary: Summary) -> RenderableType:
    """Means per request and stage, which add up to the mean E2E, and their share of it."""
    total = summary["e2e_s"]["mean"]
    table = _table("Where time went", "wait", "serve", "transfer", "", "share of E2E")
    rows = {
        kind: [parts[part]["mean"] for part in ("wait_s", "serve_s", "transfer_s")]
        for kind, parts in summary["stages"].items()
    }
    known = [value for means in rows.values() for value in means]
    cells, unit = _scaled(known, zero=_NOTHING)
    for i, (kind, means) in enumerate(rows.items()):
        share = sum(means) / total if total else None
        table.add_row(Text(kind), *cells[3 * i : 3 * i + 3], Text(unit, style="dim"), _percent(share))
    return table


def _objectives(summary: Summary) -> RenderableType:
    slo = summary["slo"]
    table = _table("SLO", "target", "actual", "", "verdict")
    for target in slo["targets"]:
        (bound, actual), unit = _scaled([target["target_s"], target["actual_s"]])
        label = f"{_LATENCIES[target['metric']]} {target['statistic'].replace('p', 'P')}"
        verdict = {True: Text("met", "green"), False: Text("missed", "bold red"), None: Text("no data", "yellow")}
        table.add_row(label, f"≤ {bound}", actual, Text(unit, style="dim"), verdict[target["met"]])
    goodput = (
        f"Goodput {_rate(slo['goodput_requests_per_s'])} requests/s; {_percent(slo['attainment'])} of requests met all."
    )
    return Group(table, Text(goodput))


def _remarks(summary: Summary) -> RenderableType:
    lines = []
    if summary["saturated"]:
        lines.append(Text(f"Saturated: {summary['saturation_reason']}.", style="bold red"))
    elif summary["open_loop"] and summary["requests"]["arrived"]:
        lines.append(Text("Not saturated: no queue kept growing while requests arrived.", style="green"))
    lines += [Text(note, style="yellow") for note in summary["notes"]]
    origin = _provenance(summary["provenance"])
    simulator = summary.get("simulator", {})
    facts = [f"Step times: {origin}."] if origin else []
    if "steps" in simulator:
        facts.append(f"{simulator['steps']:,} steps, {simulator['events']:,} events, MIST {simulator['version']}.")
    if facts:
        lines.append(Text(" ".join(facts), style="dim"))
    return Group(*lines)


def _provenance(provenance: Summary) -> str:
    """ "roofline 100%", or one such clause per pool where shares are given by pool."""
    if any(isinstance(shares, Mapping) for shares in provenance.values()):
        clauses = {pool: _provenance(shares) for pool, shares in provenance.items()}
        if len(set(clauses.values())) == 1:
            return next(iter(clauses.values()))
        return "; ".join(f"{pool} {clause}" for pool, clause in clauses.items())
    shares = sorted(((share, name) for name, share in provenance.items() if share), key=lambda pair: -pair[0])
    return ", ".join(f"{name} {_percent(share)}" for share, name in shares)


def _table(title: str, *heads: str) -> Table:
    """No lines but under the heads; the first column says what a row is, the others are numbers."""
    table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="bold")
    table.add_column(title, min_width=14, overflow="fold")
    for head in heads:
        table.add_column(head, justify="right" if head else "left", no_wrap=True, min_width=7 if head else 0)
    return table


def _scaled(seconds: Sequence[float | None], zero: str = "0") -> tuple[list[str], str]:
    """The values in the one unit that suits the largest, with as many decimals as it deserves."""
    largest = max((abs(value) for value in seconds if value is not None), default=0.0)
    factor, unit = next(
        (scale for limit, scale in ((1, (1.0, "s")), (1e-3, (1e3, "ms"))) if largest >= limit), (1e6, "µs")
    )
    decimals = 2 if largest * factor < 100 else 1
    if not any(seconds):
        return [_NOTHING if value is None else zero for value in seconds], ""
    return [
        _NOTHING if value is None else f"{value * factor:,.{decimals}f}" if value else zero for value in seconds
    ], unit


def _percent(fraction: float | None) -> str:
    if fraction is None:
        return _NOTHING
    if 0 < fraction < 0.0995:
        return f"{fraction:.1%}" if fraction >= 0.0005 else "<0.1%"
    return f"{fraction:.0%}"


def _number(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:,.1f}"


def _rate(per_s: float | None) -> str:
    if per_s is None:
        return _NOTHING
    return f"{per_s:,.0f}" if per_s >= 100 else f"{per_s:.3g}"


def _clock(seconds: float) -> str:
    """A span of time with the units a person would use."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min {rest:02} s" if hours else f"{minutes} min {rest:02} s"
