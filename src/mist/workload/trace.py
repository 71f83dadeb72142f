"""Traces: find the file, tell its format, read it, and change its rate or length.

The front door of the trace formats, used when a scenario is built. It never looks inside a format: each says by
itself whether a file is its own.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from mist.errors import Problem, ScenarioError, nearest
from mist.registry import lookup, names
from mist.workload import RequestTable, TraceFormat
from mist.workload.rows import first_line

_PUBLIC_COPIES = (
    "public traces: the GitHub repositories Azure/AzurePublicDataset (azure), kvcache-ai/Mooncake (mooncake) and "
    "flashserve/RAGPulse (ragpulse); put them in a folder and name it in MIST_DATA"
)
#: for the scenario of a result names a trace that lay beside it by its whole path
_MOVED = "has it moved? give the whole path of its new place, here or by --set workload.trace=PATH"


def find_trace(path: str | Path, beside: Path, environ: Mapping[str, str]) -> Path:
    """The file that a scenario's trace path means.

    A relative path is looked up in the folder `beside`, then in each folder of MIST_DATA and in its `traces`.
    ScenarioError says where it was looked for, and which file has nearly that name or where public copies come from.
    """
    path = Path(path).expanduser()
    folders = [beside]
    for folder in filter(None, environ.get("MIST_DATA", "").split(os.pathsep)):
        folders += [Path(folder), Path(folder) / "traces"]
    places = list(dict.fromkeys(folder / path for folder in folders))
    for place in places:
        if place.is_file():
            return place
    for place in places:
        if place.is_dir():
            inside = ", ".join(sorted(p.name for p in place.iterdir() if p.is_file())[:5]) or "no file"
            raise ScenarioError(Problem(f"trace {str(path)!r} is a folder", hint=f"name a file: it holds {inside}"))
    looked = ", ".join(map(str, places))
    there = (beside / path).parent
    alike = nearest(path.name, [each.name for each in there.iterdir()] if there.is_dir() else ())
    hint = _MOVED if path.is_absolute() else _PUBLIC_COPIES
    hint = alike if alike.startswith("did you mean") else hint
    looked = "" if path.is_absolute() else f"; looked for {looked}"
    raise ScenarioError(Problem(f"trace {str(path)!r} is not there{looked}", hint=hint))


def detect(path: Path) -> TraceFormat:
    """The format of a trace, by its first line; ScenarioError lists the formats where none knows it."""
    line = first_line(path)
    formats = names("trace")
    for name in formats:
        candidate: TraceFormat = lookup("trace", name)()
        if candidate.matches(path, line):
            return candidate
    shown = repr(line[:80].decode("utf-8", "replace").strip())
    which = "columns: {arrival: NAME, input_tokens: NAME, output_tokens: NAME}"
    hint = f"say which of its columns is which, under workload: {which}; formats known without: {', '.join(formats)}"
    raise ScenarioError(Problem(f"no trace format knows this first line: {shown}", str(path), 1, hint=hint))


def read_trace(path: Path, trace_format: TraceFormat | None = None) -> RequestTable:
    """The requests of a trace, in the given format or the one that its first line tells."""
    return (trace_format or detect(path)).read(path)


def rate_scale(table: RequestTable, scale: float) -> RequestTable:
    """The same requests at `scale` times their rate: arrivals divided by it, rounded to the nanosecond.

    Closed-loop sessions begin at `scale` times their rate and think as long as before.
    ScenarioError unless the scale is a positive number that leaves the times below 2**62 ns.
    """
    latest = float(table.arrival_ns.max(initial=0))
    if not 0 < scale < float("inf"):
        raise ScenarioError(Problem(f"rate_scale is {scale}", hint="give a number > 0; 2 halves all arrival times"))
    if latest / scale >= 2**62:
        message = f"at a rate_scale of {scale} the last request would arrive in more than a century"
        raise ScenarioError(Problem(message, hint="give a larger one; 2 halves all arrival times"))
    return replace(table, arrival_ns=np.rint(table.arrival_ns / scale).astype(np.int64))


def limit(table: RequestTable, num_requests: int) -> RequestTable:
    """The first `num_requests` requests (all of them if there are fewer); ScenarioError if that is below 1."""
    if num_requests < 1:
        raise ScenarioError(Problem(f"limit is {num_requests}", hint="give the number of requests to keep, at least 1"))
    return replace(
        table,
        arrival_ns=table.arrival_ns[:num_requests],
        input_tokens=table.input_tokens[:num_requests],
        output_tokens=table.output_tokens[:num_requests],
        block_keys=None if table.block_keys is None else table.block_keys[:num_requests],
        cached_tokens=None if table.cached_tokens is None else table.cached_tokens[:num_requests],
        sizes={name: values[:num_requests] for name, values in table.sizes.items()},
        sessions=None if table.sessions is None else table.sessions[:num_requests],
        after=None if table.after is None else table.after[:num_requests],
        think_ns=None if table.think_ns is None else table.think_ns[:num_requests],
    )
