"""A run as a timeline for Perfetto (ui.perfetto.dev) or chrome://tracing: the debugger for schedules.

It reads a result's records and writes the Trace Event Format's JSON, event by event: requests as lanes of nested
slices, clients as processes with slices of their steps and states and counters, transfers as slices of their senders,
and arrows from each request to what served it. It never computes a time: every timestamp is a record's, or a bound of
the excerpt that was asked for.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import numpy as np

from mist.errors import Problem, ScenarioError
from mist.metrics.window import Window
from mist.records import Records
from mist.report.timeline.events import STEPS_THREAD, Excerpt, client_process, process_name, thread_name
from mist.report.timeline.requests import processes, request_events
from mist.report.timeline.rows import ByRequest, last_event
from mist.report.timeline.states import loan_events, state_events
from mist.report.timeline.steps import step_events
from mist.report.timeline.transfers import Wires
from mist.scenario.result import Result
from mist.units import NS_PER_S, seconds_to_ns

__all__ = ["MANY_EVENTS", "Span", "excerpt_of", "is_timeline", "num_events", "trace_events", "write_timeline"]

#: seconds after the first arrival, from and to; None: to the end
Span = tuple[float, float | None]

#: so many take Perfetto's trace processor half a minute and 1.5 of the 4 GB that it can have in a browser
MANY_EVENTS = 4_000_000
_BUFFERED_EVENTS = 4096
_WHOLE = Excerpt()
_BEGINNING = '{"displayTimeUnit": "ns",\n"otherData": '
#: how a document begins, up to who wrote it, and bytes that surely hold that
_OURS = re.compile(re.escape(_BEGINNING) + r'\{"scenario": "(?:[^"\\]|\\.)*", "simulator": "MIST[ "]')
_HEAD_BYTES = 1 << 16


def write_timeline(result: Result, path: str | Path, span_s: Span | None = None) -> Path:
    """Write the timeline of `result` to `path`, gzipped if its name ends in .gz; the same bytes for the same records.

    `span_s`: only what overlaps it, cut to it; ScenarioError where the run was over by then. Google, "Trace Event
    Format": complete events (X) for slices, C for counters, s/t/f for arrows, M for names, i for rejections; `ts` and
    `dur` in µs with the nanoseconds as decimals. The file appears when it is whole.
    """
    target, excerpt = Path(path), excerpt_of(result.records, span_s)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as raw:
            if target.suffix == ".gz":
                # no name and no time in the header: they would differ between equal runs
                with gzip.GzipFile("", "wb", compresslevel=6, fileobj=raw, mtime=0) as packed:
                    _write_document(result, excerpt, packed)
            else:
                _write_document(result, excerpt, raw)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def excerpt_of(records: Records, span_s: Span | None) -> Excerpt:
    """What a span takes of a run; ScenarioError where that is nothing."""
    if span_s is None:
        return _WHOLE
    first_ns, (start_s, end_s) = Window.of(records).first_ns, span_s
    lasted_s = (last_event(records) - first_ns) / NS_PER_S
    if start_s > lasted_s:
        over = f"the run was over {lasted_s:.6g} s after the first arrival"
        told = f"the timeline has nothing from {start_s:g} s on: {over}"
        raise ScenarioError(Problem(told, hint="choose a span of time that begins earlier"))
    stop_ns = _WHOLE.stop_ns if end_s is None else first_ns + seconds_to_ns(min(end_s, lasted_s + 1))
    return Excerpt(first_ns + seconds_to_ns(start_s), stop_ns)


def num_events(records: Records, span_s: Span | None = None) -> int:
    """About how many events a timeline has; counters change with four steps of five."""
    excerpt, last = excerpt_of(records, span_s), last_event(records)
    total = 0.0
    for table, start, weight in (
        (records.steps, "start_ns", 1.8), (records.tasks, "queued_ns", 4), (records.transfers, "start_ns", 4),
        (records.requests, "arrival_ns", 4),
    ):  # fmt: skip
        rows = table.as_columns()
        ends = np.where(rows["end_ns"] >= 0, rows["end_ns"], last)
        total += weight * len(excerpt.overlaps(rows[start], ends))
    return round(total)


def is_timeline(path: Path) -> bool:
    """Whether `write_timeline` made the regular file `path`, whatever its name, by how it begins; OSError if unread."""
    with path.open("rb") as raw:
        head = raw.read(_HEAD_BYTES)
    if path.suffix == ".gz":
        try:
            head = zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(head, _HEAD_BYTES)
        except zlib.error:
            return False
    return _OURS.match(head.decode(errors="replace")) is not None


def trace_events(records: Records, excerpt: Excerpt = _WHOLE) -> Iterator[str]:
    """Every event as a JSON object, a process at a time; the slices of a thread are in order of time."""
    segments, wires = ByRequest(records.tasks), Wires(records)
    yield from _names(records, wires)
    yield from step_events(records, excerpt)
    yield from state_events(records, excerpt)
    yield from loan_events(records, excerpt)
    yield from request_events(records, segments, wires, excerpt)
    yield from wires.events(excerpt)


def _write_document(result: Result, excerpt: Excerpt, out: IO[bytes] | gzip.GzipFile) -> None:
    text = io.TextIOWrapper(out, encoding="utf-8", newline="\n", write_through=False)
    metadata = {"scenario": result.name, "simulator": f"MIST {result.simulator.get('version', '')}".strip()}
    if excerpt != _WHOLE:
        metadata["excerpt"] = _told(result.records, excerpt)
    text.write(_BEGINNING + json.dumps(metadata) + ',\n"traceEvents": [\n')
    separator = ""
    for batch in _batches(trace_events(result.records, excerpt)):
        text.write(separator + ",\n".join(batch))
        separator = ",\n"
    text.write("\n]}\n")
    text.flush()
    text.detach()


def _batches(events: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    for event in events:
        batch.append(event)
        if len(batch) == _BUFFERED_EVENTS:
            yield batch
            batch = []
    if batch:
        yield batch


def _told(records: Records, excerpt: Excerpt) -> str:
    first_ns, last_ns = Window.of(records).first_ns, last_event(records)
    start_s, stop_s, whole_s = (
        (at - first_ns) / NS_PER_S for at in (excerpt.start_ns, min(excerpt.stop_ns, last_ns), last_ns)
    )
    return f"{start_s:.9g} s to {stop_s:.9g} s after the first arrival, of {whole_s:.9g} s; slices are cut there"


def _names(records: Records, wires: Wires) -> Iterator[str]:
    """What processes and their first threads are called, and the order of processes from the top."""
    clients = [(client_process(client), name) for client, name in enumerate(records.client_names)]
    transfers = [(wires.process, "transfers")] if len(wires) else []
    for place, (process, name) in enumerate([*processes(records, wires), *clients, *transfers]):
        yield from process_name(process, name, place)
    for process, _ in clients:
        yield thread_name(process, STEPS_THREAD, "steps")
