"""The summary as a person reads it: a few aligned tables and sentences, for a terminal or as plain text.

It takes the summary document and gives back something that rich can print; every number in it is in the document. It
never shows wall times: what is printed is the same for the same seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mist.metrics.words import counted, share
from mist.scenario.fitted import Fitted
from mist.units import GB, KB, MB, TB

Summary = Mapping[str, Any]

_LATENCIES = {"ttft_s": "TTFT", "tpot_s": "TPOT", "itl_s": "ITL", "e2e_s": "E2E"}
_TRANSFERS = {"kv_transfer": "KV transfer", "prefix_fetch": "prefix fetch", "hand_off": "hand-off",
              "kv_write": "KV write"}  # fmt: skip
_STATISTICS = {"mean": "mean", "p50": "P50", "p90": "P90", "p99": "P99"}
_NOTHING = "-"
#: links and cores that were busy for more of the run than this are shown, so many of them at most
BUSY, NUM_BUSIEST = 0.3, 8


def render(name: str, summary: Summary) -> RenderableType:
    """The whole page; sections that say nothing are left out."""
    sections = [
        _headline(name, summary),
        _latencies(summary),
        *([_tenants(summary)] if summary["tenants"] else []),
        _clients(summary),
        *([_availability(summary)] if summary["availability"] else []),
        *([_memories(summary)] if summary["memories"] else []),
        _stages(summary),
        *([busiest] if (busiest := _busiest(summary)) else []),
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
    rows = Table.grid(padding=(0, 2))
    rows.add_column(no_wrap=True)
    rows.add_row("Requests", Text(", ".join(outcomes)))
    offered = summary["offered"]
    if offered is not None and offered["requests_per_s"] is not None:
        rows.add_row("Offered", f"{_rates(offered)} over {_clock(offered['span_s'])} of arrivals")
    rows.add_row("Throughput", f"{_rates(throughput)} over {_clock(summary['window']['span_s'])}")
    if (quality := summary["quality"]) is not None and quality["mean"] is not None:
        shares = ", ".join(f"{kind} {_percent(part)}" for kind, part in quality["answered_by"].items())
        rows.add_row("Quality", f"{quality['mean']:.4g} on average; answered by {shares}")
    if (lending := summary.get("lending")) is not None:
        share_lent = _percent(lending["share_of_time"])
        took = f"took {counted(lending['prompts'], 'prompt')}"
        rows.add_row("Lending", f"{counted(lending['loans'], 'loan')}, {share_lent} of the lenders' time, {took}")
    for label, told in _costs(summary):
        rows.add_row(label, told)
    return Group(Text(name, style="bold"), Text(""), rows)


def _costs(summary: Summary) -> Iterator[tuple[str, str]]:
    """Dollars and joules, where they are known."""
    cost, energy = summary.get("cost"), summary.get("energy")
    if cost and cost["usd_per_hour"] is not None:
        per = {
            "usd_per_million_output_tokens": "per M output tokens",
            "usd_per_thousand_requests": "per 1,000 requests",
        }
        each = [f"${_rate(cost[key])} {name}" for key, name in per.items() if cost[key] is not None]
        bought = "" if cost["purchase"] == "flat" else f", {cost['purchase'].replace('_', ' ')}"
        by = cost["prices"] + bought
        hourly = f"${_rate(cost['usd_per_hour'])}/h"
        yield "Cost", f"{', '.join([hourly, *each])} ({by})"
    if energy and energy["mean_w"] is not None:
        told = [f"{_rate(energy['mean_w'])} W"]
        if energy["joules_per_output_token"] is not None:
            told.append(f"{_rate(energy['joules_per_output_token'])} J per output token")
        if energy["wh_per_request"] is not None:
            told.append(f"{_rate(energy['wh_per_request'])} Wh per request")
        if energy["carbon_g"] is not None:
            told.append(f"{_rate(energy['carbon_g'])} g CO2e")
        yield "Energy", ", ".join(told)


def _rates(per_s: Summary) -> str:
    return ", ".join(
        f"{_rate(per_s[f'{what}_per_s'])} {what.replace('_', ' ')}/s"
        for what in ("requests", "output_tokens", "total_tokens")
        if f"{what}_per_s" in per_s
    )


def _latencies(summary: Summary) -> RenderableType:
    further = [s for s in summary["e2e_s"] if s not in _STATISTICS]
    statistics = sorted({*_STATISTICS, *further}, key=lambda s: -1.0 if s == "mean" else float(s[1:]))
    table = Fitted("Latency", [*(s if s == "mean" else s.upper() for s in statistics), ""])
    rows = {label: summary[metric] for metric, label in _LATENCIES.items()}
    rows |= {label: summary[moved]["time_s"] for moved, label in _TRANSFERS.items() if summary[moved]}
    for label, figures in rows.items():
        cells, unit = _scaled([figures[s] for s in statistics])
        table.add_row(label, *cells, unit)
    return table


def _tenants(summary: Summary) -> RenderableType:
    """A line for each tenant."""
    heads = ["finished", "TTFT P50", "TTFT P99", "E2E P99", "", "TPOT P50", "", "tokens/s", "SLOs met"]
    costs = (summary.get("cost") or {}).get("tenants", {})
    has_costs = any(cost["usd_per_million_output_tokens"] is not None for cost in costs.values())
    heads += ["$/M output"] if has_costs else []
    table = Fitted("Tenants", heads)
    for name, tenant in summary["tenants"].items():
        requests, slo = tenant["requests"], tenant["slo"]
        figures = [tenant["ttft_s"]["p50"], tenant["ttft_s"]["p99"], tenant["e2e_s"]["p99"]]
        cells = [_NOTHING if figure is None else f"{figure:,.3f}" for figure in figures]
        tpot_s = tenant["tpot_s"]["p50"]
        attained = _NOTHING if slo is None else _percent(slo["attainment"])
        tokens = _rate(tenant["throughput"]["total_tokens_per_s"])
        table.add_row(name, f"{requests['finished']:,} of {requests['arrived']:,}", *cells, "s",
                      f"{tpot_s * 1e3:,.1f}" if tpot_s else _NOTHING, "ms", tokens, attained,
                      *([_number(costs[name]["usd_per_million_output_tokens"])] if has_costs else []))  # fmt: skip
    return Group(table, Text(_fairness(summary["fairness"])))


def _fairness(fairness: Summary) -> str:
    names = {"total_tokens_per_s": "tokens/s", "served_share": "shares served", "slo_attainment": "SLOs met"}
    known = [f"{fairness[key]:.3f} of {name}" for key, name in names.items() if fairness[key] is not None]
    return f"Jain's fairness index: {', '.join(known)}." if known else ""


def _clients(summary: Summary) -> RenderableType:
    pools = summary["clients"]
    has_kv = any(pool["kv_tokens_capacity"] for pool in pools.values())
    has_hits = any(pool["prefix_hit_rate"] for pool in pools.values())
    kv_heads = ["KV tokens", "KV peak", "KV mean"] if has_kv else []
    hit_heads = ["prefix hits"] if has_hits else []
    table = Fitted("Clients", ["busy", "mean batch", *kv_heads, *hit_heads, "preemptions"])
    for name, pool in pools.items():
        cells = [_percent(pool["utilisation"]), _number(pool["mean_batch"])]
        if has_kv:
            capacity = pool["kv_tokens_capacity"]
            cells += [f"{capacity:,}" if capacity else _NOTHING, _percent(pool["kv_peak"]), _percent(pool["kv_mean"])]
        if has_hits:
            cells.append(_percent(pool["prefix_hit_rate"]))
        replicas = len(pool["replicas"])
        label = f"{replicas} x {name}" if replicas > 1 else name
        table.add_row(label, *cells, f"{pool['preemptions']:,}")
    return table


def _availability(summary: Summary) -> RenderableType:
    """Of the pools whose replicas came and went."""
    heads = ["mean up", "fewest up", "most up", "went down", "scaled up", "scaled down", "replica time", ""]
    table = Fitted("Availability", heads)
    for name, pool in summary["availability"]["pools"].items():
        counts = [f"{pool[key]:,}" for key in ("min_up", "max_up", "num_down", "num_scaled_up", "num_scaled_down")]
        mean = _NOTHING if pool["mean_up"] is None else f"{pool['mean_up']:.2f}"
        label = f"{len(summary['clients'][name]['replicas'])} x {name}"
        table.add_row(label, mean, *counts, f"{pool['replica_s']:,.1f}", "s")
    return table


def _memories(summary: Summary) -> RenderableType:
    table = Fitted("Memories", ["hits", "misses", "hit rate", "held", "fetched", "written", "evicted"])
    for name, memory in summary["memories"].items():
        label = f"{memory['instances']} x {name}" if memory["instances"] > 1 else name
        sizes = [_size(memory[f"{what}_bytes"]) for what in ("held", "fetched", "written", "evicted")]
        table.add_row(label, f"{memory['hits']:,}", f"{memory['misses']:,}", _percent(memory["hit_rate"]), *sizes)
    return table


def _size(num_bytes: int) -> str:
    """Bytes with three digits, in the unit that suits them."""
    for unit, name in ((TB, "TB"), (GB, "GB"), (MB, "MB"), (KB, "kB")):
        if num_bytes >= 0.9995 * unit:
            return f"{_rate(num_bytes / unit)} {name}"
    return f"{num_bytes} B" if num_bytes else _NOTHING


def _stages(summary: Summary) -> RenderableType:
    """Means per request and stage, which add up to the mean E2E, and their shares of it and of the mean TTFT."""
    totals = {whole: summary[whole]["mean"] for whole in ("e2e_s", "ttft_s")}
    table = Fitted("Where time went", ["wait", "serve", "transfer", "", "share of E2E", "share of TTFT"])
    for kind, parts in summary["stages"].items():
        means = [parts[part]["mean"] for part in ("wait_s", "serve_s", "transfer_s")]
        cells, unit = _scaled(means, zero=_NOTHING)
        spent = {"e2e_s": sum(mean or 0.0 for mean in means), "ttft_s": parts["ttft_s"]["mean"]}
        shares = [_percent(spent[whole] / total if total else None) for whole, total in totals.items()]
        table.add_row(kind, *cells, unit, *shares)
    return table


def _busiest(summary: Summary) -> RenderableType | None:
    """What is shared and was busy for a good part of the run, busiest first; None where nothing was."""
    shared = [(each, "GB/s", each["capacity_bytes_per_s"] / GB) for each in summary.get("links", ())]
    shared += [(each, "cores", each["num_cores"]) for each in summary.get("cores", ())]
    busy = [each for each in shared if (each[0]["utilisation"] or 0) > BUSY]
    if not busy:
        return None
    table = Fitted("Busiest links", ["busy", "of", ""])
    for each, unit, capacity in sorted(busy, key=lambda e: (-e[0]["utilisation"], e[0]["name"]))[:NUM_BUSIEST]:
        table.add_row(each["name"], _percent(each["utilisation"]), _rate(capacity), unit)
    if len(busy) <= NUM_BUSIEST:
        return table
    return Group(table, Text(f"{len(busy) - NUM_BUSIEST} more were busy for over {BUSY:.0%} of the run."))


def _objectives(summary: Summary) -> RenderableType:
    slo = summary["slo"]
    table = Fitted("SLO", ["target", "actual", "verdict"])
    for target in slo["targets"]:
        is_slowdown = "target_slowdown" in target
        name = _LATENCIES[f"{target['metric'].partition('_')[0]}_s"] + (" slowdown" if is_slowdown else "")
        label = f"{name} {target['statistic'].replace('p', 'P')}"
        if "tenant" in target:
            label = f"{target['tenant']}: {label}"
        verdict = {True: Text("met", "green"), False: Text("missed", "bold red"), None: Text("no data", "yellow")}
        if is_slowdown:
            actual, unit, bound = _times(target["actual_slowdown"]), "", f"{target['target_slowdown']:,.10g} x"
        else:
            (actual,), unit = _scaled([target["actual_s"]])
            bound = _exact(target["target_s"])
        told = verdict[target["met"]]
        if target["num_lost"]:
            told = told + Text(f" ({target['num_lost']:,} lost)")
        table.add_row(label, f"≤ {bound}", f"{actual} {unit}".strip(), told)
    goodput = (
        f"Goodput {_rate(slo['goodput_requests_per_s'])} requests/s; {_percent(slo['attainment'])} of requests met all."
    )
    return Group(table, Text(goodput))


def _remarks(summary: Summary) -> RenderableType:
    lines = []
    if (verdict := saturation_verdict(summary)) is not None:
        lines.append(verdict)
    told = [
        *summary["notes"],
        *(r for kind in ("cost", "energy") for r in (summary.get(kind) or {}).get("remarks", ())),
    ]
    lines += [Text(note, style="yellow") for note in dict.fromkeys(told)]
    origin = _provenance(summary["provenance"])
    simulator = summary.get("simulator", {})
    facts = [f"Step times: {origin}."] if origin else []
    if "steps" in simulator:
        steps, events = (counted(simulator[f"{what}s"], what) for what in ("step", "event"))
        facts.append(f"{steps}, {events}, MIST {simulator['version']}.")
    if facts:
        lines.append(Text(" ".join(facts), style="dim"))
    return Group(*lines)


def saturation_verdict(summary: Summary) -> Text | None:
    """What was seen of the queues while load arrived, and no more than that; None where there is nothing to say."""
    queue = summary["backlog"]
    if summary["saturated"]:
        return Text(f"Saturated: {summary['saturation_reason']}.", style="bold red")
    if summary["requests"]["arrived"] and not summary["requests"]["finished"]:
        return Text("Nothing was served: no request finished.", style="bold red")
    if queue is None:
        return None
    if summary["near_capacity"]:
        return Text(
            f"Near capacity: the queue of {queue['pool']} grew from {_mean(queue['waiting_first'])} to "
            f"{_mean(queue['waiting_last'])} waiting over the run; a longer run would tell whether it is saturated.",
            style="bold yellow",
        )
    requests = summary["requests"]
    lost = ""
    if requests["rejected"]:
        rejected = share(requests["rejected"] / requests["arrived"])
        lost = f" {rejected} of the requests were rejected ({requests['rejected']:,} of {requests['arrived']:,})."
    if not queue["waiting_peak"]:
        return Text(f"Not saturated: no request waited.{lost}", style="bold yellow" if lost else "green")
    return Text(
        f"Not saturated: at most {counted(queue['waiting_peak'], 'request')} waited for {queue['pool']} while load "
        f"arrived, {_mean(queue['waiting_first'])} on average in its first tenth and {_mean(queue['waiting_last'])} "
        f"in its last.{lost}",
        style="bold yellow" if lost else "green",
    )


def _provenance(provenance: Summary) -> str:
    """ "roofline 100%", or one such clause per pool where shares are given by pool."""
    if any(isinstance(shares, Mapping) for shares in provenance.values()):
        clauses = {pool: _provenance(shares) for pool, shares in provenance.items()}
        if len(set(clauses.values())) == 1:
            return next(iter(clauses.values()))
        return "; ".join(f"{pool} {clause}" for pool, clause in clauses.items())
    shares = sorted(((share, name) for name, share in provenance.items() if share), key=lambda pair: -pair[0])
    return ", ".join(f"{name} {_percent(share)}" for share, name in shares)


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


def _exact(seconds: float) -> str:
    """A time that a user wrote, in the unit that suits it and with the digits it was given."""
    factor, unit = (1.0, "s") if seconds >= 1 else (1e3, "ms") if seconds >= 1e-3 else (1e6, "µs")
    return f"{seconds * factor:,.10g} {unit}"


def _times(factor: float | None) -> str:
    return _NOTHING if factor is None else f"{factor:,.2f} x"


def _percent(fraction: float | None) -> str:
    return _NOTHING if fraction is None else share(fraction)


def _number(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:,.1f}"


def _mean(number: float) -> str:
    """A mean count: to the tenth while it is small."""
    return f"{number:,.0f}" if number >= 9.95 or number == 0 else f"{number:.1f}" if number >= 0.05 else "under 0.1"


def _rate(per_s: float | None) -> str:
    """Three digits, the last ones zeros or not."""
    if per_s is None:
        return _NOTHING
    for decimals, least in enumerate((99.95, 9.995, 0.9995)):
        if per_s >= least:
            return f"{per_s:,.{decimals}f}"
    return f"{per_s:.3g}"


def _clock(seconds: float) -> str:
    """A span of time with the units a person would use."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min {rest:02} s" if hours else f"{minutes} min {rest:02} s"
