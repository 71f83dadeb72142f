"""A run as a timeline for Perfetto (ui.perfetto.dev) or chrome://tracing: the debugger for schedules.

It reads a result's records and writes the Trace Event Format's JSON, event by event: requests as lanes of nested
slices, clients as processes with slices of their steps and states and counters, transfers as slices of their senders,
and arrows from each request to what served it. It never computes a time: every timestamp is a record's.
"""

from __future__ import annotations

import gzip
import io
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from mist.records import Records
from mist.report.timeline.events import REQUESTS, STEPS_THREAD, client_process, process_name, thread_name
from mist.report.timeline.requests import request_events
from mist.report.timeline.rows import ByRequest
from mist.report.timeline.states import state_events
from mist.report.timeline.steps import step_events
from mist.report.timeline.transfers import Wires
from mist.scenario.result import Result

__all__ = ["trace_events", "write_timeline"]

_BUFFERED_EVENTS = 4096


def write_timeline(result: Result, path: str | Path) -> Path:
    """Write the timeline of `result` to `path`, gzipped if its name ends in .gz; the same bytes for the same records.

    Google, "Trace Event Format": complete events (X) for slices, C for counters, s/t/f for arrows, M for names, i for
    rejections; `ts` and `dur` in µs with the nanoseconds as decimals. The file appears when it is whole.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as raw:
            if target.suffix == ".gz":
                # no name and no time in the header: they would differ between equal runs
                with gzip.GzipFile("", "wb", compresslevel=6, fileobj=raw, mtime=0) as packed:
                    _write_document(result, packed)
            else:
                _write_document(result, raw)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def trace_events(records: Records) -> Iterator[str]:
    """Every event as a JSON object, a process at a time; the slices of a thread are in order of time."""
    segments, wires = ByRequest(records.tasks), Wires(records)
    yield from _names(records, wires)
    yield from step_events(records)
    yield from state_events(records)
    yield from request_events(records, segments, wires)
    yield from wires.events()


def _write_document(result: Result, out: IO[bytes] | gzip.GzipFile) -> None:
    text = io.TextIOWrapper(out, encoding="utf-8", newline="\n", write_through=False)
    metadata = {"scenario": result.name, "simulator": f"MIST {result.simulator.get('version', '')}".strip()}
    text.write('{"displayTimeUnit": "ns",\n"otherData": ' + json.dumps(metadata) + ',\n"traceEvents": [\n')
    separator = ""
    for batch in _batches(trace_events(result.records)):
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


def _names(records: Records, wires: Wires) -> Iterator[str]:
    """What processes and their first threads are called, and the order of processes from the top."""
    yield from process_name(REQUESTS, "requests")
    for client, name in enumerate(records.client_names):
        yield from process_name(client_process(client), name)
    if len(wires):
        yield from process_name(wires.process, "transfers")
    for client in range(len(records.client_names)):
        yield thread_name(client_process(client), STEPS_THREAD, "steps")
