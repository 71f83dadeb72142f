"""The clients of a timeline: their steps as slices named by what they computed, and counters of what is there.

It reads rows of steps, and of tasks only for the names of steps that are neither prefill nor decode. It never tells
which request was in a step: that is what the arrows are for.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise, repeat

import numpy as np

from mist.records import IntColumn, Records
from mist.report.timeline.events import STEPS_THREAD, Excerpt, client_process
from mist.report.timeline.rows import in_blocks
from mist.request import DECODE, PREFILL

#: counters of a client and what they count
_COUNTERS = (("running", "sequences"), ("waiting", "tasks"), ("KV blocks", "used"))


def step_events(records: Records, excerpt: Excerpt) -> Iterator[str]:
    """Each client's steps with their batches, and counters wherever they change."""
    steps = records.steps.as_columns()
    decoding = set(np.unique(steps["client"][steps["num_decodes"] > 0]).tolist())
    for client, rows in enumerate(_by_client(records, excerpt, num_before=1)):
        if len(rows["client"]):
            yield from _client_events(records, client, client in decoding, rows, excerpt)


def _client_events(
    records: Records, client: int, decodes_at_all: bool, rows: dict[str, IntColumn], excerpt: Excerpt
) -> Iterator[str]:
    process, kinds = client_process(client), _kinds(records, client)
    tells_tasks = bool(kinds) and not {PREFILL, DECODE} & set(kinds)
    tasks = _task_names(records, client, kinds, rows["start_ns"]) if tells_tasks else repeat("", len(rows["client"]))
    # what only encodes or searches keeps no KV cache
    num_counters = 2 if tells_tasks and not decodes_at_all else 3
    shown = [0] * num_counters
    end = 0
    for row, named in zip(in_blocks(rows, np.arange(len(rows["client"]))), tasks, strict=True):
        _, start, stop, prefills, tokens, decodes, context, blocks, waiting = row
        if start > end and shown[0]:
            yield from excerpt.counter(process, end, *_COUNTERS[0], 0)
            shown[0] = 0
        for i, value in enumerate((prefills + decodes, waiting, blocks)[:num_counters]):
            if shown[i] != value:
                yield from excerpt.counter(process, start, *_COUNTERS[i], value)
                shown[i] = value
        name = _batch_name(named, prefills, tokens, decodes)
        args = (
            f'"num_prefills":{prefills},"num_prefill_tokens":{tokens},"num_decodes":{decodes},'
            f'"decode_context":{context},"kv_blocks":{blocks},"num_waiting":{waiting}'
        )
        yield from excerpt.slice(process, STEPS_THREAD, start, stop, "step", name, args)
        end = stop
    yield from excerpt.counter(process, end, *_COUNTERS[0], 0)


def _batch_name(tasks: str, prefills: int, tokens: int, decodes: int) -> str:
    """What a step is called on its slice: "prefill 512 + 61 decodes", or "retrieve x 3"."""
    parts = [tasks or f"prefill {tokens}"] if prefills else []
    if decodes:
        parts.append(f"{decodes} decode{'s' if decodes > 1 else ''}")
    return " + ".join(parts) or "step"


def _kinds(records: Records, client: int) -> dict[str, int]:
    """The stage kinds that a client has served, with their numbers."""
    rows = records.tasks.as_columns()
    return {records.stage_kinds[kind]: kind for kind in np.unique(rows["kind"][rows["client"] == client]).tolist()}


def _task_names(records: Records, client: int, kinds: dict[str, int], starts: IntColumn) -> Iterator[str]:
    """What each step computes: "embed x 2 + retrieve x 1" for the tasks that have begun and aren't computed yet."""
    rows = records.tasks.as_columns()
    computed = np.where(rows["joined_ns"] >= 0, rows["joined_ns"], rows["end_ns"])
    num_tasks = {}
    for name, kind in kinds.items():
        begun = (rows["client"] == client) & (rows["kind"] == kind) & (rows["started_ns"] >= 0)
        num_begun = np.searchsorted(np.sort(rows["started_ns"][begun]), starts, side="right")
        num_tasks[name] = num_begun - np.searchsorted(np.sort(computed[begun]), starts, side="right")
    for numbers in in_blocks(num_tasks, np.arange(len(starts))):
        yield " + ".join(f"{name} x {number}" for name, number in zip(num_tasks, numbers, strict=True) if number)


def _by_client(records: Records, excerpt: Excerpt, num_before: int = 0) -> Iterator[dict[str, IntColumn]]:
    """The steps of each client that are shown, in order of their start, and so many before them."""
    rows = records.steps.as_columns()
    order = np.lexsort((rows["start_ns"], rows["client"]))
    bounds = np.searchsorted(rows["client"][order], np.arange(len(records.client_names) + 1))
    for first, stop in pairwise(bounds.tolist()):
        mine = order[first:stop]
        begin = int(np.searchsorted(rows["end_ns"][mine], excerpt.start_ns, side="right"))
        end = int(np.searchsorted(rows["start_ns"][mine], excerpt.stop_ns))
        yield {name: column[mine[max(0, begin - num_before) : end]] for name, column in rows.items()}


class StepFinder:
    """Where a segment's first and last steps are on its client's thread, of those that are shown."""

    def __init__(self, records: Records, excerpt: Excerpt) -> None:
        steps = [(rows["start_ns"], rows["end_ns"]) for rows in _by_client(records, excerpt)]
        self._starts = [starts for starts, _ in steps]
        self._ends = [ends for _, ends in steps]

    def steps(self, client: int, started: int, ended: int) -> list[int]:
        """When the first and the last step within [started, ended] began; fewer where there are fewer."""
        starts = self._starts[client]
        first = int(np.searchsorted(starts, started))
        last = int(np.searchsorted(self._ends[client], ended, side="right")) - 1
        return [int(starts[step]) for step in sorted({first, last})] if first <= last else []
