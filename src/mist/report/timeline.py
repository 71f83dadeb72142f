"""A run as a timeline for Perfetto (ui.perfetto.dev) or chrome://tracing: the debugger for schedules.

It reads a result's records and writes the Trace Event Format's JSON, event by event: clients as processes with their
steps as slices and counters, requests as lanes of nested slices, and arrows from each request to the steps that served
it. It never computes a time: every timestamp is a record's.
"""

from __future__ import annotations

import gzip
import heapq
import io
import json
import os
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import IO

import numpy as np

from mist.records import REJECTED, SEGMENT_ENDS, STATUSES, IntColumn, Records
from mist.scenario.result import Result

#: process of the requests; client c is process c + 2
_REQUESTS = 1
_STEPS_THREAD = 1
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
    yield from _names(records)
    yield from _steps(records)
    yield from _requests(records)


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


def _names(records: Records) -> Iterator[str]:
    """What processes and threads are called, and their order from the top."""
    processes = [(_REQUESTS, "requests"), *((c + 2, name) for c, name in enumerate(records.client_names))]
    for place, (pid, name) in enumerate(processes):
        yield _metadata(pid, 0, "process_name", "name", name)
        yield _metadata(pid, 0, "process_sort_index", "sort_index", place)
    for pid, _ in processes[1:]:
        yield _metadata(pid, _STEPS_THREAD, "thread_name", "name", "steps")


def _metadata(pid: int, tid: int, kind: str, key: str, value: str | int) -> str:
    return f'{{"ph":"M","pid":{pid},"tid":{tid},"name":"{kind}","args":{{"{key}":{json.dumps(value)}}}}}'


def _steps(records: Records) -> Iterator[str]:
    """Each client's steps with their batches, and counters wherever they change."""
    rows = records.steps.as_columns()
    order = np.lexsort((rows["start_ns"], rows["client"]))
    shown: list[int | None] = [None, None, None]
    client, end = -1, 0
    for row in _rows(rows, order):
        if row[0] != client:
            if client >= 0:
                yield _counter(client, end, "running", 0)
            client, end, shown = row[0], row[1], [None, None, None]
        _, start, stop, prefills, tokens, decodes, context, blocks, waiting = row
        if start > end and shown[0]:
            yield _counter(client, end, "running", 0)
            shown[0] = 0
        for i, (name, value) in enumerate(
            (("running", prefills + decodes), ("waiting", waiting), ("KV blocks", blocks))
        ):
            if shown[i] != value:
                yield _counter(client, start, name, value)
                shown[i] = value
        yield (
            f'{{"ph":"X","pid":{client + 2},"tid":{_STEPS_THREAD},"ts":{_us(start)},"dur":{_us(stop - start)},'
            f'"cat":"step","name":"{_batch_name(prefills, tokens, decodes)}","args":{{"num_prefills":{prefills},'
            f'"num_prefill_tokens":{tokens},"num_decodes":{decodes},"decode_context":{context},"kv_blocks":{blocks},'
            f'"num_waiting":{waiting}}}}}'
        )
        end = stop
    if client >= 0:
        yield _counter(client, end, "running", 0)


def _batch_name(prefills: int, tokens: int, decodes: int) -> str:
    """What a step is called on its slice: "prefill 512 + 61 decodes"."""
    parts = [f"prefill {tokens}"] if prefills else []
    if decodes:
        parts.append(f"{decodes} decode{'s' if decodes > 1 else ''}")
    return " + ".join(parts) or "step"


#: what a counter counts, which viewers put after its name
_COUNTED = {"running": "sequences", "waiting": "tasks", "KV blocks": "used"}


def _counter(client: int, at: int, name: str, value: int) -> str:
    args = f'{{"{_COUNTED[name]}":{value}}}'
    return f'{{"ph":"C","pid":{client + 2},"tid":0,"ts":{_us(at)},"name":"{name}","args":{args}}}'


def _requests(records: Records) -> Iterator[str]:
    """Each request as a slice in a lane that is free, around the waiting, serving and handing over of its stages."""
    rows = records.requests.as_columns()
    last = _last_event(records)
    ends = np.where(rows["end_ns"] >= 0, rows["end_ns"], last)
    segments, finder, lanes = _ByRequest(records), _StepFinder(records), _Lanes()
    order = np.lexsort((rows["request"], rows["arrival_ns"]))
    for row, end in zip(_rows(rows, order), ends[order].tolist(), strict=True):
        request, arrival, first_token, _, status, reason, inputs, outputs, cached, preemptions = row
        lived = segments.rows(request)
        if status == REJECTED and not lived:
            why = json.dumps(records.reasons[reason] if reason >= 0 else "")
            yield (
                f'{{"ph":"i","pid":{_REQUESTS},"tid":0,"ts":{_us(end)},"s":"p","cat":"request",'
                f'"name":"request {request} rejected","args":{{"reason":{why},"input_tokens":{inputs}}}}}'
            )
            continue
        lane, is_new = lanes.take(arrival, end)
        if is_new:
            yield _metadata(_REQUESTS, lane, "thread_name", "name", f"lane {lane}")
            yield _metadata(_REQUESTS, lane, "thread_sort_index", "sort_index", lane)
        first = "null" if first_token < 0 else _us(first_token - arrival)
        args = (
            f'"status":"{STATUSES[status]}","input_tokens":{inputs},"output_tokens":{outputs},'
            f'"cached_tokens":{cached},"num_preemptions":{preemptions},"ttft_us":{first}'
        )
        yield _slice(lane, arrival, end, f"request {request}", args)
        yield from _life(records, lived, lane, arrival, end)
        yield from _flow(request, lane, arrival, lived, finder)


def _life(records: Records, segments: list[list[int]], lane: int, arrival: int, end: int) -> Iterator[str]:
    """The nested slices of one request; stretches without length are left out."""
    before = arrival
    for segment in segments:
        _, _, kind, client, queued, started, _, ended, how, computed, cached, *_ = segment
        name, server = records.stage_kinds[kind], json.dumps(records.client_names[client])
        admitted = started if started >= 0 else ended
        if queued > before:
            yield _slice(lane, before, queued, "hand-over", f'"to":{server}')
        if admitted > queued:
            yield _slice(lane, queued, admitted, f"wait for {name}", f'"client":{server}')
        if ended > admitted:
            args = (
                f'"client":{server},"computed_tokens":{computed},"cached_tokens":{cached},"end":"{SEGMENT_ENDS[how]}"'
            )
            yield _slice(lane, admitted, ended, name, args)
        before = ended
    if segments and end > before:
        yield _slice(lane, before, end, "hand-over", "")


def _slice(lane: int, start: int, end: int, name: str, args: str) -> str:
    return (
        f'{{"ph":"X","pid":{_REQUESTS},"tid":{lane},"ts":{_us(start)},"dur":{_us(end - start)},"cat":"request",'
        f'"name":{json.dumps(name)},"args":{{{args}}}}}'
    )


class _Lanes:
    """Numbers for requests in order of arrival such that two in one lane never overlap: the lowest that is free."""

    def __init__(self) -> None:
        self._free: list[int] = []
        self._taken: list[tuple[int, int]] = []
        self._count = 0

    def take(self, start: int, end: int) -> tuple[int, bool]:
        """A lane for [start, end], counted from 1, and whether it is a new one."""
        # slices that touch could be taken for nested ones where one has no length
        while self._taken and self._taken[0][0] < start:
            heapq.heappush(self._free, heapq.heappop(self._taken)[1])
        is_new = not self._free
        if is_new:
            self._count += 1
        lane = self._count if is_new else heapq.heappop(self._free)
        heapq.heappush(self._taken, (end, lane))
        return lane, is_new


class _ByRequest:
    """The task rows of each request, in order."""

    def __init__(self, records: Records) -> None:
        columns = list(records.tasks.as_columns().values())
        order = np.argsort(columns[0], kind="stable")
        self._requests = columns[0][order]
        self._rows = np.column_stack([column[order] for column in columns])

    def rows(self, request: int) -> list[list[int]]:
        first, stop = np.searchsorted(self._requests, (request, request + 1))
        rows: list[list[int]] = self._rows[first:stop].tolist()
        return rows


class _StepFinder:
    """Where a segment's first and last steps are on its client's thread."""

    def __init__(self, records: Records) -> None:
        rows = records.steps.as_columns()
        order = np.lexsort((rows["start_ns"], rows["client"]))
        bounds = np.searchsorted(rows["client"][order], np.arange(len(records.client_names) + 1))
        spans = list(pairwise(bounds.tolist()))
        self._starts = [rows["start_ns"][order[first:stop]] for first, stop in spans]
        self._ends = [rows["end_ns"][order[first:stop]] for first, stop in spans]

    def steps(self, client: int, started: int, ended: int) -> list[int]:
        """When the first and the last step within [started, ended] began; fewer where there are fewer."""
        starts = self._starts[client]
        first = int(np.searchsorted(starts, started))
        last = int(np.searchsorted(self._ends[client], ended, side="right")) - 1
        return [int(starts[step]) for step in sorted({first, last})] if first <= last else []


def _flow(request: int, lane: int, arrival: int, segments: list[list[int]], finder: _StepFinder) -> Iterator[str]:
    """An arrow from the request's lane through the first step of each segment to its last step.

    Its points bind to the slices that enclose them on their threads, which is why each is at a step's start.
    """
    points: list[tuple[int, int]] = []
    for segment in segments:
        client, started, ended = segment[3], segment[5], segment[7]
        steps = finder.steps(client, started, ended) if started >= 0 else []
        points += [(client, at) for at in steps if (client, at) not in points[-1:]]
    if not points:
        return
    common = f'"cat":"request","name":"request","id":{request}'
    yield f'{{"ph":"s","pid":{_REQUESTS},"tid":{lane},"ts":{_us(arrival)},{common}}}'
    for client, at in points[:-1]:
        yield f'{{"ph":"t","pid":{client + 2},"tid":{_STEPS_THREAD},"ts":{_us(at)},{common}}}'
    client, at = points[-1]
    yield f'{{"ph":"f","bp":"e","pid":{client + 2},"tid":{_STEPS_THREAD},"ts":{_us(at)},{common}}}'


def _last_event(records: Records) -> int:
    tables = (records.requests, records.tasks, records.steps)
    return max((int(table.as_columns()["end_ns"].max()) for table in tables if len(table)), default=0)


def _rows(columns: dict[str, IntColumn], order: IntColumn) -> Iterator[list[int]]:
    """Rows as lists of Python integers, a block at a time."""
    for start in range(0, len(order), _BUFFERED_EVENTS):
        block = order[start : start + _BUFFERED_EVENTS]
        yield from np.column_stack([column[block] for column in columns.values()]).tolist()


def _us(ns: int) -> str:
    """Nanoseconds as microseconds, written out exactly."""
    return f"{ns // 1000}.{ns % 1000:03d}"
