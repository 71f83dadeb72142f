"""The slowest requests, each with its story: stage by stage what it waited for, where it was served and for how long.

A section of a report. Every time is a record's; why a task waited is read off the steps that its client ran meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mist.metrics.latency import e2e_ns
from mist.metrics.stages import PARTS, awaited
from mist.metrics.window import Columns
from mist.metrics.words import counted
from mist.records import DROPPED, NO_CLIENT, SEGMENT_ENDS, STATUSES
from mist.report.html.charts import colour
from mist.report.html.figures import percent, seconds
from mist.report.html.markup import Child, Markup, el, note, section, table
from mist.report.html.view import View
from mist.units import NS_PER_S

NUM_SHOWN = 10
#: of a request with more segments than this the longest are told
MAX_SEGMENTS = 24
#: of a limit, from here on it is said to have been reached
_FULL = 0.97


def slowest(view: View) -> Markup | None:
    """The measured requests that took longest, or were longest in the system where none finished."""
    requests = view.requests
    took = e2e_ns(requests)
    lived = requests["end_ns"] - requests["arrival_ns"]
    chosen = view.measured & (took >= 0)
    rank = np.where(chosen, took, -1) if chosen.any() else np.where(view.measured, lived, -1)
    if not (rank > 0).any():
        return None
    order = [i for i in np.argsort(-rank, kind="stable")[:NUM_SHOWN].tolist() if rank[i] > 0]
    teller = _Teller(view)
    stories = [teller.story(i, open_=number == 0) for number, i in enumerate(order)]
    what = "took longest" if chosen.any() else "were in the system longest (none finished)"
    which = f"The {counted(len(order), 'request')} that {what}."
    lead = f"{which} Reasons for waiting are what the client was doing meanwhile."
    return section("slowest", "Slowest requests", lead, stories)


@dataclass(frozen=True, slots=True)
class _Segment:
    """A task segment's row as numbers, with the time from which on it was on its way, and whether it was waited for."""

    kind: int
    client: int
    before: int
    queued: int
    started: int
    ended: int
    how: int
    #: computed, cached, generated
    tokens: list[int]
    on_path: bool


class _Teller:
    def __init__(self, view: View) -> None:
        self._view = view
        steps = view.steps
        order = np.lexsort((steps["start_ns"], steps["client"]))
        self._steps = {name: column[order] for name, column in steps.items()}
        self._firsts = np.searchsorted(self._steps["client"], np.arange(len(view.records.client_names) + 1))
        self._pool_names = list(view.pools)

    def story(self, place: int, *, open_: bool) -> Markup:
        row = {name: int(column[place]) for name, column in self._view.requests.items()}
        request, arrival, end = row["request"], row["arrival_ns"], row["end_ns"]
        found = self._segments(request, arrival)
        tenant = self._view.tenant_of(request)
        first = f", first token after {_s(row['first_token_ns'] - arrival)}" if row["first_token_ns"] >= 0 else ""
        status = "" if STATUSES[row["status"]] == "finished" else f" ({STATUSES[row['status']].replace('_', ' ')})"
        head = [
            el("strong", f"Request {request:,}"), f" {tenant}" if tenant else "", status,
            f": {_s(end - arrival)}{first}; {row['input_tokens']:,} tokens in, {row['output_tokens']:,} out. ",
            self._mostly(request),
        ]  # fmt: skip
        longest = sorted(found, key=lambda each: each.before - each.ended)[:MAX_SEGMENTS]
        rows = [self._row(each, arrival) for each in found if each in longest]
        cut = note(f"The {MAX_SEGMENTS} longest of {len(found):,} stages.") if len(found) > MAX_SEGMENTS else None
        heads = ["stage", "client", "after arrival", "handed over", "waited", "served", "tokens", "what happened"]
        body = [
            self._bar(found, arrival, end),
            table(heads, rows, label=f"Stages of request {request}", wide=True),
            cut,
        ]
        return el("details", el("summary", head), body, class_="story", open=open_)

    def _segments(self, request: int, arrival: int) -> list[_Segment]:
        """Those of a request in order; what ran beside and wasn't waited for began when it was sent."""
        tasks = self._view.tasks
        first, stop = np.searchsorted(tasks["request"], (request, request + 1))
        names = ("kind", "client", "queued_ns", "started_ns", "end_ns", "how", "computed_tokens", "cached_tokens",
                 "generated_tokens")  # fmt: skip
        rows = np.column_stack([tasks[name][first:stop] for name in names]).tolist()
        moved = self._view.transfers
        mine = moved["request"] == request
        ways = zip(moved["receiver"][mine].tolist(), moved["end_ns"][mine].tolist(), strict=True)
        left = dict(zip(ways, moved["queued_ns"][mine].tolist(), strict=True))
        sent = [left.get((client, queued), queued) if client != NO_CLIENT else queued for _, client, queued, *_ in rows]
        lasting = [i for i, row in enumerate(rows) if row[5] != DROPPED]
        path = awaited([sent[i] for i in lasting], [rows[i][4] for i in lasting])
        on_path = {i for i, kept in zip(lasting, path, strict=True) if kept}
        found, before = [], arrival
        for i, (kind, client, queued, started, ended, how, *tokens) in enumerate(rows):
            origin = before if i in on_path else sent[i]
            begin = started if started >= 0 else ended
            found.append(_Segment(kind, client, origin, queued, begin, ended, how, tokens, i in on_path))
            before = ended if i in on_path else before
        return found

    def _mostly(self, request: int) -> str:
        """The largest part of its time."""
        numbers = self._view.finished["request"]
        place = int(np.searchsorted(numbers, request))
        if place == len(numbers) or numbers[place] != request:
            return ""
        times = self._view.stage_ns[place]
        kind, part = divmod(int(times.argmax()), len(PARTS))
        what = ("waiting for", "in", "on the way to")[part]
        return f"Mostly {what} {self._view.kinds[kind]}: {percent(float(times.max() / times.sum()))}."

    def _row(self, each: _Segment, arrival: int) -> list[Child]:
        records = self._view.records
        client = records.client_names[each.client] if each.client != NO_CLIENT else "-"
        named = zip(each.tokens, ("computed", "cached", "generated"), strict=True)
        tokens = [f"{number:,} {name}" for number, name in named if number]
        happened = [self.why(each)] if each.started > each.queued and each.client != NO_CLIENT else []
        happened += [SEGMENT_ENDS[each.how]] if each.how else []
        happened += [] if each.on_path else ["beside the critical path"]
        spent = (each.queued - each.before, each.started - each.queued, each.ended - each.started)
        times = [_s(each.before - arrival), *(_s(ns) if ns else "-" for ns in spent)]
        return [records.stage_kinds[each.kind], client, *times,
                el("span", ", ".join(tokens)), "; ".join(happened)]  # fmt: skip

    def why(self, each: _Segment) -> str:
        """What the client was doing while the task waited, in words."""
        view, rows = self._view, self._while(each)
        num = len(rows["start_ns"])
        if not num:
            return "no step ran: the engine took it in"
        pool = self._pool_names[int(view.pool_of[each.client])]
        limits, blocks = view.limits(pool), int(view.kv_blocks[each.client])
        running = int((rows["num_prefills"] + rows["num_decodes"]).max())
        full = float(rows["kv_blocks"].max()) / blocks if blocks else 0.0
        tokens = rows["num_prefill_tokens"] + rows["num_decodes"]
        budget, seqs = (limits.get(f"max_num_{what}", 0) for what in ("batched_tokens", "seqs"))
        reasons = []
        if full >= _FULL:
            reasons.append(f"KV cache {percent(full)} full")
        if seqs and running >= seqs:
            reasons.append(f"batch full at {running:,}")
        if budget and float(tokens.mean()) >= _FULL * budget:
            reasons.append(f"steps full of tokens ({budget:,})")
        waiting = int(rows["num_waiting"].max())
        if waiting > 1:
            reasons.append(f"up to {waiting:,} waited")
        said = ", ".join(reasons) or "for a step that ran"
        return f"waited {said}" if num == 1 and not reasons else f"{said}, over {counted(num, 'step')}"

    def _while(self, each: _Segment) -> Columns:
        first, stop = self._firsts[each.client : each.client + 2].tolist()
        mine = {name: column[first:stop] for name, column in self._steps.items()}
        begin = int(np.searchsorted(mine["end_ns"], each.queued, side="right"))
        end = int(np.searchsorted(mine["start_ns"], each.started, side="left"))
        return {name: column[begin : max(begin, end)] for name, column in mine.items()}

    def _bar(self, found: list[_Segment], arrival: int, end: int) -> Markup:
        """A line for each stage kind on the request's own time: light while it waits, striped on its way."""
        whole = max(1, end - arrival)
        lines: dict[int, list[Markup]] = {}
        for each in found:
            pieces = lines.setdefault(each.kind, [])
            for begin, stop, look in ((each.before, each.queued, "striped"), (each.queued, each.started, "light"),
                                      (each.started, each.ended, "solid")):  # fmt: skip
                if stop > begin:
                    place = f"left:{(begin - arrival) / whole * 100:.3f}%;width:{(stop - begin) / whole * 100:.3f}%"
                    pieces.append(el("i", class_=look, style=f"{place};{colour(each.kind)}"))
        rows = [
            el(
                "div",
                el("span", self._view.kinds[kind], class_="rowname"),
                el("div", pieces, class_="lane"),
                class_="row",
            )
            for kind, pieces in lines.items()
        ]
        return el("div", rows, class_="gantt", aria_hidden="true")


def _s(time_ns: int) -> str:
    return seconds(time_ns / NS_PER_S)
