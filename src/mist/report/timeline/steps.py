"""The clients of a timeline: their steps as slices named by what they computed, and counters of what is there.

It reads the steps' rows, and tasks' rows only for the names of steps that serve no language model. It never tells which
request was in a step: that is what the arrows are for.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise, repeat

import numpy as np

from mist.records import IntColumn, Records
from mist.report.timeline.events import STEPS_THREAD, client_process, counter, slice_event
from mist.report.timeline.rows import in_blocks
from mist.request import DECODE, PREFILL

#: counters of a client and what they count
_COUNTERS = (("running", "sequences"), ("waiting", "tasks"), ("KV blocks", "used"))


def step_events(records: Records) -> Iterator[str]:
    """Each client's steps with their batches, and counters wherever they change."""
    for client, rows in enumerate(_by_client(records)):
        if len(rows["client"]):
            yield from _client_events(records, client, rows)


def _client_events(records: Records, client: int, rows: dict[str, IntColumn]) -> Iterator[str]:
    process, tasks = client_process(client), _task_names(records, client, rows["start_ns"])
    # a counter that never leaves zero, such as the KV blocks of a vector index, isn't shown at all
    shown = [0, 0, 0]
    end = 0
    for row, named in zip(in_blocks(rows, np.arange(len(rows["client"]))), tasks, strict=True):
        _, start, stop, prefills, tokens, decodes, context, blocks, waiting = row
        if start > end and shown[0]:
            yield _counter(process, end, 0, 0)
            shown[0] = 0
        for i, value in enumerate((prefills + decodes, waiting, blocks)):
            if shown[i] != value:
                yield _counter(process, start, i, value)
                shown[i] = value
        name = _batch_name(named, prefills, tokens, decodes)
        args = (
            f'"num_prefills":{prefills},"num_prefill_tokens":{tokens},"num_decodes":{decodes},'
            f'"decode_context":{context},"kv_blocks":{blocks},"num_waiting":{waiting}'
        )
        yield slice_event(process, STEPS_THREAD, start, stop, "step", name, args)
        end = stop
    yield _counter(process, end, 0, 0)


def _counter(process: int, at: int, which: int, value: int) -> str:
    return counter(process, at, *_COUNTERS[which], value)


def _batch_name(tasks: str, prefills: int, tokens: int, decodes: int) -> str:
    """What a step is called on its slice: "prefill 512 + 61 decodes", or "retrieve x 3"."""
    parts = [tasks or f"prefill {tokens}"] if prefills else []
    if decodes:
        parts.append(f"{decodes} decode{'s' if decodes > 1 else ''}")
    return " + ".join(parts) or "step"


def _task_names(records: Records, client: int, starts: IntColumn) -> Iterator[str]:
    """What was computed in each step but decodes: "embed x 2 + retrieve x 1" for tasks begun and not computed before.

    "" where the client serves prefills or decodes, whose tokens say more.
    """
    rows = records.tasks.as_columns()
    rows = {name: rows[name][rows["client"] == client] for name in ("kind", "started_ns", "joined_ns", "end_ns")}
    kinds = np.unique(rows["kind"]).tolist()
    names = [records.stage_kinds[kind] for kind in kinds]
    if not names or {PREFILL, DECODE} & set(names):
        return repeat("", len(starts))
    computed = np.where(rows["joined_ns"] >= 0, rows["joined_ns"], rows["end_ns"])
    num_tasks = {}
    for kind, name in zip(kinds, names, strict=True):
        begun = (rows["kind"] == kind) & (rows["started_ns"] >= 0)
        num_begun = np.searchsorted(np.sort(rows["started_ns"][begun]), starts, side="right")
        num_tasks[name] = num_begun - np.searchsorted(np.sort(computed[begun]), starts, side="right")
    return (
        " + ".join(f"{name} x {number}" for name, number in zip(names, numbers, strict=True) if number)
        for numbers in in_blocks(num_tasks, np.arange(len(starts)))
    )


def _by_client(records: Records) -> Iterator[dict[str, IntColumn]]:
    """The steps of each client, in order of their start."""
    rows = records.steps.as_columns()
    order = np.lexsort((rows["start_ns"], rows["client"]))
    bounds = np.searchsorted(rows["client"][order], np.arange(len(records.client_names) + 1))
    for first, stop in pairwise(bounds.tolist()):
        yield {name: column[order[first:stop]] for name, column in rows.items()}


class StepFinder:
    """Where a segment's first and last steps are on its client's thread."""

    def __init__(self, records: Records) -> None:
        steps = [(rows["start_ns"], rows["end_ns"]) for rows in _by_client(records)]
        self._starts = [starts for starts, _ in steps]
        self._ends = [ends for _, ends in steps]

    def steps(self, client: int, started: int, ended: int) -> list[int]:
        """When the first and the last step within [started, ended] began; fewer where there are fewer."""
        starts = self._starts[client]
        first = int(np.searchsorted(starts, started))
        last = int(np.searchsorted(self._ends[client], ended, side="right")) - 1
        return [int(starts[step]) for step in sorted({first, last})] if first <= last else []
