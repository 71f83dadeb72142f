"""From records to answers: `summarise` turns a run's tables into one document of figures. One file per kind of figure.

It stands after the run, or beside it where a `Tally` counts what has left: the simulator writes records and never
imports this. Each figure is an expression over the records, defined in `docs/metrics.md`, and never needs all of them
at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mist.metrics.availability import summarise_availability, up_times
from mist.metrics.clients import ClientInfo, ratio, summarise_clients
from mist.metrics.distribution import PERCENTILES, FloatColumn, distribution
from mist.metrics.latency import e2e_ns, tpot_ns, ttft_ns
from mist.metrics.memories import MemoryInfo, summarise_memories
from mist.metrics.offered import offered_load
from mist.metrics.portion import Portion
from mist.metrics.quality import summarise_quality
from mist.metrics.saturation import judge, unjudged
from mist.metrics.slo import SLO_METRICS, SLOWDOWNS, Targets, percentiles_of, slowdowns_ns, summarise_slo
from mist.metrics.tally import Tally
from mist.metrics.tenants import TenantInfo, all_levels, fairness, rows_of
from mist.metrics.transfers import summarise_transfers
from mist.metrics.window import BoolColumn, Bounds, Columns, Window
from mist.metrics.words import counted
from mist.records import FINISHED, STATUSES, UNFINISHED, IntColumn, Records
from mist.units import NS_PER_S

__all__ = [
    "SCHEMA_VERSION",
    "SLO_METRICS",
    "ClientInfo",
    "MemoryInfo",
    "Tally",
    "Targets",
    "TenantInfo",
    "summarise",
    "summary_of",
]

SCHEMA_VERSION = 1


def summarise(
    records: Records,
    *,
    clients: Sequence[ClientInfo],
    window: Bounds = (None, None),
    open_loop: bool = True,
    slo: Targets | None = None,
    memories: Sequence[MemoryInfo] = (),
    provenance: Mapping[str, Any] | None = None,
    oracle_output_tokens: IntColumn | None = None,
    quality: Mapping[str, float] | None = None,
    alone: Mapping[str, FloatColumn] | None = None,
    tenants: Sequence[TenantInfo] = (),
) -> dict[str, Any]:
    """The summary document of a run: JSON values only, seconds and fractions, None for what has no value.

    `clients` in the order of `records.client_names`. `window` (ns on the run's clock, None: open) picks the requests
    that arrive in it; rates and clients' figures are over its span. `open_loop` False where the workload waits for the
    system (closed loop, all at once), which can't be saturated. `slo` adds verdicts and goodput, and its percentiles to
    the latency figures; `provenance` (which model answered which share) is carried over. `oracle_output_tokens`
    (int64[requests], by request number) are those that the workload asks for, which the offered load is made of; left
    out, those generated stand for them. `alone` (float64[requests] in ns by metric, by request number, -1 for none) is
    what requests take by themselves, which slowdowns in `slo` are relative to. `quality` of an answer by the stage kind
    that gave it. `tenants`, where there are several, have figures of their own, and what they say stands for `slo` and
    `quality`. Raises ValueError for an SLO metric or statistic that isn't known.
    """
    arrivals = records.requests.as_columns()["arrival_ns"]
    whole = TenantInfo(
        open_loop=open_loop, slo=slo or {}, oracle_output_tokens=oracle_output_tokens, quality=quality,
        alone=alone or {},
    )  # fmt: skip
    first_ns = int(arrivals.min()) if len(arrivals) else 0
    tally = Tally(records, clients=clients, first_ns=first_ns, window=window, whole=whole, tenants=tenants)
    tally.finish()
    return summary_of(tally, memories=memories, provenance=provenance)


def summary_of(
    tally: Tally, *, memories: Sequence[MemoryInfo] = (), provenance: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The same, of a run that was counted while it went on; the tally is finished."""
    records, clients, span, whole = tally.records, tally.clients, tally.window, tally.whole
    requests, transfers = records.requests.as_columns(), records.transfers.as_columns()
    asked = [portion.asked for portion in tally.tenants]
    figures = _figures(whole, requests, transfers, span, _statistics(*(each.slo for each in (whole.asked, *asked))))
    by_tenant = {
        each.name: {
            "priority": each.priority,
            **_figures(portion, each.rows(requests), each.rows(transfers), span, _statistics(each.slo)),
        }
        for portion, each in zip(tally.tenants, asked, strict=True)
    }
    sums = tally.activity
    sums.output_tokens = whole.emitted
    verdict = unjudged()
    if tally.is_judged:
        pressed = [rows_of(tally.pressing, table) if tally.pressing else table for table in (requests, transfers)]
        verdict = judge(pressed[0], tally.queues, pressed[1], clients, sums, span)
    of_clients = summarise_clients(clients, sums, up_times(records, tally.last_ends, len(clients), span))
    return {
        "schema_version": SCHEMA_VERSION,
        **figures,
        "slo": all_levels(by_tenant) if asked else figures["slo"],
        "tenants": by_tenant,
        "fairness": fairness(by_tenant) if asked else None,
        "duration_s": (span.last_ns - span.first_ns) / NS_PER_S,
        "window": {name: getattr(span, f"{name[:-2]}_ns") / NS_PER_S for name in ("start_s", "end_s", "span_s")},
        "clients": of_clients,
        "availability": summarise_availability(records, tally.last_ends, of_clients, span),
        "memories": summarise_memories(memories, transfers),
        "open_loop": whole.asked.open_loop,
        **verdict,
        "notes": _notes(requests, span.holds(requests["arrival_ns"]), span, whole.asked.open_loop, tally.pressing),
        "provenance": dict(provenance or {}),
    }


def _statistics(*slos: Targets | None) -> list[float]:
    """The percentiles of latencies: those always told, and those that targets name."""
    targets: dict[str, Mapping[str, float]] = {}
    for number, slo in enumerate(slos):
        if unknown := set(slo or {}) - {*SLO_METRICS, *SLOWDOWNS}:
            raise ValueError(f"no SLO metric {sorted(unknown)[0]!r}; known: {', '.join((*SLO_METRICS, *SLOWDOWNS))}")
        targets |= {f"{number}.{metric}": bounds for metric, bounds in (slo or {}).items()}
    return sorted({*PERCENTILES, *percentiles_of(targets)})


def _figures(
    portion: Portion, requests: Columns, transfers: Columns, span: Window, percentiles: Sequence[float]
) -> dict[str, Any]:
    """What came of some requests: counts, latencies, transfers, load, throughput, stages, quality and SLOs."""
    asked, targets = portion.asked, dict(portion.asked.slo)
    chosen = span.holds(requests["arrival_ns"])
    times: dict[str, IntColumn | FloatColumn] = {
        "ttft_s": ttft_ns(requests), "tpot_s": tpot_ns(requests), "e2e_s": e2e_ns(requests)
    }  # fmt: skip
    of = {name: distribution(column[chosen & (column >= 0)], percentiles) for name, column in times.items()}
    itl = portion.gaps.distribution(percentiles)
    latencies = {"ttft_s": of["ttft_s"], "tpot_s": of["tpot_s"], "itl_s": itl, "e2e_s": of["e2e_s"]}
    if "itl_s" in targets:
        times["itl_s"] = portion.longest_gap_ns.whole()
    slowdowns = {name: metric for name, metric in SLOWDOWNS.items() if name in targets}
    for name, metric in slowdowns.items():
        times[name] = slowdowns_ns(times[metric], asked.alone[metric][requests["request"] - asked.first_request])
    judged = {name: distribution(times[name][chosen & (times[name] >= 0)], percentiles) for name in slowdowns}
    oracle = asked.oracle_output_tokens
    offered = offered_load(requests, chosen, oracle, asked.first_request) if asked.open_loop else None
    visible = _visible(int(portion.emitted.sum()), portion.generated, requests)
    return {
        "requests": _counts(requests, chosen),
        **latencies,
        **summarise_transfers(transfers, requests, chosen, percentiles),
        "offered": offered,
        "throughput": _throughput(requests, visible, span),
        "stages": portion.stages.summary(),
        "quality": summarise_quality(asked.quality or {}, portion.answered),
        "slo": summarise_slo(targets, times, latencies | judged, requests, chosen, span) if targets else None,
    }


def _counts(requests: Columns, chosen: BoolColumn) -> dict[str, int]:
    by_status = np.bincount(requests["status"][chosen], minlength=len(STATUSES))
    return {"arrived": int(by_status.sum()), **{name: int(by_status[i]) for i, name in enumerate(STATUSES)}}


def _visible(emitted: int, generated: int, requests: Columns) -> int:
    """Of the tokens emitted in a window those that users see: of all that were generated, the share of the answers."""
    shown = int(requests["output_tokens"].sum())
    return emitted if shown >= generated else round(emitted * shown / generated)


def _throughput(requests: Columns, output_tokens: int, window: Window) -> dict[str, float | None]:
    """Rates over the window's span: requests by their end, output tokens as emitted, prompts by their first token."""
    ended = (requests["status"] == FINISHED) & window.holds(requests["end_ns"])
    answered = np.where(requests["first_token_ns"] >= 0, requests["first_token_ns"], requests["end_ns"])
    # a prompt without any output counts at its end, if it was served
    served = (requests["first_token_ns"] >= 0) | (requests["status"] == FINISHED)
    prompts = int(requests["input_tokens"][served & window.holds(answered)].sum())
    return {
        "requests_per_s": ratio(int(np.count_nonzero(ended)) * NS_PER_S, window.span_ns),
        "output_tokens_per_s": ratio(output_tokens * NS_PER_S, window.span_ns),
        "total_tokens_per_s": ratio((prompts + output_tokens) * NS_PER_S, window.span_ns),
    }


def _notes(
    requests: Columns, chosen: BoolColumn, window: Window, open_loop: bool, pressing: Sequence[TenantInfo]
) -> list[str]:
    """What the figures cover and what they leave out, in words."""
    counts = _counts(requests, chosen)
    notes = []
    if not window.is_whole_run:
        start, end = ((t - window.first_ns) / NS_PER_S for t in (window.start_ns, window.end_ns))
        notes.append(
            f"Measured are {counts['arrived']:,} of {counted(len(chosen), 'request')}: those that arrived from "
            f"{start:,.1f} s to {end:,.1f} s after the first one; throughput and clients' figures are over that span."
            if window.span_ns
            else f"The window lies outside the run, whose last event is {start:,.1f} s after the first arrival: "
            "no request is measured."
        )
    if counts["arrived"]:
        notes += _coverage(requests, chosen, counts, window)
    if pressing:
        names = ", ".join(tenant.name for tenant in pressing)
        notes.append(f"Saturation is judged by the tenants whose load doesn't wait for the system: {names}.")
    elif not open_loop:
        notes.append("The load waits for the system (it isn't open loop), so saturation doesn't apply.")
    elif len(chosen) and not np.ptp(requests["arrival_ns"]):
        one = "Only one request arrived" if len(chosen) == 1 else "All requests arrived at one instant"
        notes.append(f"{one}: whether such load would saturate can't be told.")
    return notes


def _coverage(requests: Columns, chosen: BoolColumn, counts: Mapping[str, int], window: Window) -> list[str]:
    """Whose latencies these are, and what is known of the others."""
    cut = "" if window.start_ns > window.first_ns else ", with no warm-up cut"
    if counts["arrived"] == counts["finished"]:
        all_of = "the only request" if counts["finished"] == 1 else f"all {counts['finished']:,} requests"
        return [f"Latencies are of {all_of}{cut}."]
    others = ", ".join(f"{counts[name]:,} {name.replace('_', ' ')}" for name in STATUSES[1:] if counts[name])
    if not counts["finished"]:
        return [f"No request finished, so there are no latencies: {others}."]
    verb = "is" if counts["arrived"] - counts["finished"] == 1 else "are"
    done = counted(counts["finished"], "request")
    notes = [f"Latencies are of the {done} that finished{cut}; {others} {verb} left out."]
    if counts[STATUSES[UNFINISHED]]:
        left = chosen & (requests["status"] == UNFINISHED)
        longest = float((requests["end_ns"] - requests["arrival_ns"])[left].max()) / NS_PER_S
        notes.append(
            f"The unfinished had been in the system for up to {longest:,.3g} s: true percentiles may be higher."
        )
    return notes
