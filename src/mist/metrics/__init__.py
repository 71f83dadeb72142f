"""From records to answers: `summarise` turns a run's tables into one document of figures. One file per kind of figure.

It stands after the run: the simulator writes records and never imports this. It never changes a record, and no figure
is kept anywhere but in the records: each is an expression over them, defined in `docs/metrics.md`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mist.metrics.availability import summarise_availability, up_times
from mist.metrics.clients import ClientInfo, activity, ratio, summarise_clients
from mist.metrics.distribution import PERCENTILES, Distribution, FloatColumn, distribution, weighted_distribution
from mist.metrics.latency import e2e_ns, tpot_ns, ttft_ns
from mist.metrics.memories import MemoryInfo, summarise_memories
from mist.metrics.offered import offered_load
from mist.metrics.quality import summarise_quality
from mist.metrics.saturation import judge, unjudged
from mist.metrics.slo import SLO_METRICS, SLOWDOWNS, Targets, percentiles_of, slowdowns_ns, summarise_slo
from mist.metrics.stages import stage_times, summarise_stages
from mist.metrics.tenants import TenantInfo, all_levels, fairness, rows_of
from mist.metrics.tokens import DecodeSteps, Segments, longest_gaps, token_gaps, tokens_by_client
from mist.metrics.transfers import summarise_transfers
from mist.metrics.window import BoolColumn, Columns, Window
from mist.metrics.words import counted
from mist.records import FINISHED, STATUSES, UNFINISHED, IntColumn, Records
from mist.units import NS_PER_S

__all__ = ["SCHEMA_VERSION", "SLO_METRICS", "ClientInfo", "MemoryInfo", "Targets", "TenantInfo", "summarise"]

SCHEMA_VERSION = 1


def summarise(
    records: Records,
    *,
    clients: Sequence[ClientInfo],
    window: tuple[int | None, int | None] = (None, None),
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
    span = Window.of(records, window)
    run = _Rows.of(records, len(clients))
    sums = activity(run.steps, run.tasks, run.tokens_by_client(span), len(clients), span)
    whole = TenantInfo(
        open_loop=open_loop, slo=slo or {}, oracle_output_tokens=oracle_output_tokens, quality=quality,
        alone=alone or {},
    )  # fmt: skip
    figures = _figures(run, whole, span, _statistics(slo, *(tenant.slo for tenant in tenants)))
    by_tenant = {
        each.name: {"priority": each.priority, **_figures(run.of_tenant(each), each, span, _statistics(each.slo))}
        for each in tenants
    }
    pressing = [tenant for tenant in tenants if tenant.open_loop] if not open_loop else []
    verdict = unjudged()
    if open_loop or pressing:
        requests, tasks, transfers = (
            rows_of(pressing, table) if pressing else table for table in (run.requests, run.tasks, run.transfers)
        )
        verdict = judge(requests, tasks, transfers, clients, sums, span)
    of_clients = summarise_clients(clients, sums, up_times(records, len(clients), span))
    return {
        "schema_version": SCHEMA_VERSION,
        **figures,
        "slo": all_levels(by_tenant) if tenants else figures["slo"],
        "tenants": by_tenant,
        "fairness": fairness(by_tenant) if tenants else None,
        "duration_s": (span.last_ns - span.first_ns) / NS_PER_S,
        "window": {name: getattr(span, f"{name[:-2]}_ns") / NS_PER_S for name in ("start_s", "end_s", "span_s")},
        "clients": of_clients,
        "availability": summarise_availability(records, of_clients, span),
        "memories": summarise_memories(memories, run.transfers),
        "open_loop": open_loop,
        **verdict,
        "notes": _notes(run.requests, span.holds(run.requests["arrival_ns"]), span, open_loop, pressing),
        "provenance": dict(provenance or {}),
    }


@dataclass(frozen=True, slots=True)
class _Rows:
    """The tables of a run, or what one tenant's requests have in them."""

    requests: Columns
    tasks: Columns
    transfers: Columns
    steps: Columns
    decode_steps: DecodeSteps
    segments: Segments
    kinds: Sequence[str]

    @classmethod
    def of(cls, records: Records, num_clients: int) -> _Rows:
        tasks, steps = _together(records.tasks.as_columns()), records.steps.as_columns()
        decode_steps = DecodeSteps.of(steps, num_clients)
        segments = Segments.of(tasks, decode_steps)
        requests, transfers = records.requests.as_columns(), records.transfers.as_columns()
        return cls(requests, tasks, transfers, steps, decode_steps, segments, records.stage_kinds)

    def of_tenant(self, tenant: TenantInfo) -> _Rows:
        """The same with the rows of a tenant's requests; steps are everybody's."""
        own = [number for number, kind in enumerate(self.kinds) if kind in tenant.stages]
        tasks = tenant.rows(self.tasks)
        tasks = {**tasks, "kind": np.searchsorted(own, tasks["kind"])}
        kinds = [self.kinds[number] for number in own]
        segments = Segments.of(tasks, self.decode_steps)
        requests, transfers = tenant.rows(self.requests), tenant.rows(self.transfers)
        return _Rows(requests, tasks, transfers, self.steps, self.decode_steps, segments, kinds)

    def tokens_by_client(self, span: Window) -> IntColumn:
        return tokens_by_client(self.segments, self.decode_steps, span)


def _statistics(*slos: Targets | None) -> list[float]:
    """The percentiles of latencies: those always told, and those that targets name."""
    targets: dict[str, Mapping[str, float]] = {}
    for number, slo in enumerate(slos):
        if unknown := set(slo or {}) - {*SLO_METRICS, *SLOWDOWNS}:
            raise ValueError(f"no SLO metric {sorted(unknown)[0]!r}; known: {', '.join((*SLO_METRICS, *SLOWDOWNS))}")
        targets |= {f"{number}.{metric}": bounds for metric, bounds in (slo or {}).items()}
    return sorted({*PERCENTILES, *percentiles_of(targets)})


def _figures(run: _Rows, asked: TenantInfo, span: Window, percentiles: Sequence[float]) -> dict[str, Any]:
    """What came of some requests: counts, latencies, transfers, load, throughput, stages, quality and SLOs."""
    requests, segments, decode_steps, targets = run.requests, run.segments, run.decode_steps, dict(asked.slo)
    chosen = span.holds(requests["arrival_ns"])
    times: dict[str, IntColumn | FloatColumn] = {
        "ttft_s": ttft_ns(requests), "tpot_s": tpot_ns(requests), "e2e_s": e2e_ns(requests)
    }  # fmt: skip
    latencies = _latencies(requests, chosen, times, segments, decode_steps, percentiles)
    finished = {name: column[chosen & (requests["status"] == FINISHED)] for name, column in requests.items()}
    if "itl_s" in targets:
        first_tokens = _first_tokens(requests, requests["status"] == FINISHED)
        longest = longest_gaps(segments.since(first_tokens, decode_steps), decode_steps, len(first_tokens))
        times["itl_s"] = longest[requests["request"]]
    slowdowns = {name: of for name, of in SLOWDOWNS.items() if name in targets}
    for name, of in slowdowns.items():
        times[name] = slowdowns_ns(times[of], asked.alone[of][requests["request"] - asked.first_request])
    judged = {name: distribution(times[name][chosen & (times[name] >= 0)], percentiles) for name in slowdowns}
    oracle = asked.oracle_output_tokens
    offered = offered_load(requests, chosen, oracle, asked.first_request) if asked.open_loop else None
    visible = _visible(int(run.tokens_by_client(span).sum()), requests, run.tasks)
    return {
        "requests": _counts(requests, chosen),
        **latencies,
        **summarise_transfers(run.transfers, requests, chosen, percentiles),
        "offered": offered,
        "throughput": _throughput(requests, visible, span),
        "stages": _stages(finished, run.tasks, run.kinds, run.transfers),
        "quality": summarise_quality(asked.quality or {}, finished, run.tasks, run.kinds),
        "slo": summarise_slo(targets, times, latencies | judged, requests, chosen, span) if targets else None,
    }


def _together(tasks: Columns) -> dict[str, IntColumn]:
    """Task rows with each request's rows side by side; among them the order of recording, which is that of time."""
    order = np.argsort(tasks["request"], kind="stable")
    return {name: column[order] for name, column in tasks.items()}


def _first_tokens(requests: Columns, chosen: BoolColumn) -> IntColumn:
    """First visible token in ns by request number; -1 for those not chosen or not finished."""
    counted = chosen & (requests["status"] == FINISHED)
    first = np.full(int(requests["request"].max(initial=-1)) + 1, -1, np.int64)
    first[requests["request"][counted]] = requests["first_token_ns"][counted]
    return first


def _latencies(
    requests: Columns,
    chosen: BoolColumn,
    times: Mapping[str, IntColumn | FloatColumn],
    segments: Segments,
    decode_steps: DecodeSteps,
    percentiles: Sequence[float],
) -> dict[str, Distribution]:
    """TTFT, TPOT, ITL and E2E of the finished among the chosen requests."""
    of = {name: distribution(column[chosen & (column >= 0)], percentiles) for name, column in times.items()}
    gaps, weights = token_gaps(segments.since(_first_tokens(requests, chosen), decode_steps), decode_steps)
    itl = weighted_distribution(gaps, weights, percentiles)
    return {"ttft_s": of["ttft_s"], "tpot_s": of["tpot_s"], "itl_s": itl, "e2e_s": of["e2e_s"]}


def _stages(finished: Columns, tasks: Columns, kinds: Sequence[str], transfers: Columns) -> dict[str, Any]:
    """Where the time of finished requests went, and until the first token of those that have one."""
    spoken = {name: column[finished["first_token_ns"] >= 0] for name, column in finished.items()}
    before_token = stage_times(spoken, tasks, len(kinds), transfers, "first_token_ns")
    return summarise_stages(stage_times(finished, tasks, len(kinds), transfers), kinds, before_token)


def _counts(requests: Columns, chosen: BoolColumn) -> dict[str, int]:
    by_status = np.bincount(requests["status"][chosen], minlength=len(STATUSES))
    return {"arrived": int(by_status.sum()), **{name: int(by_status[i]) for i, name in enumerate(STATUSES)}}


def _visible(emitted: int, requests: Columns, tasks: Columns) -> int:
    """Of the tokens emitted in a window those that users see: of all that were generated, the share of the answers."""
    generated, shown = int(tasks["generated_tokens"].sum()), int(requests["output_tokens"].sum())
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
