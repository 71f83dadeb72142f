"""Single events of the Trace Event Format, as JSON text: names, slices, counters, arrows, and who has which number.

Every part of the timeline writes its events with these, through the `Excerpt` of the run that is shown. They know
nothing of records.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mist.kernel import FOREVER
from mist.records import IntColumn

#: process of the requests, or of the first tenant's; the clients' follow, one of transfers, and those of other tenants
REQUESTS = 1
STEPS_THREAD, STATES_THREAD, LOANS_THREAD = 1, 2, 3

#: a process, a thread of it and an instant there
Point = tuple[int, int, int]


def client_process(client: int) -> int:
    """The process of a client, by its number."""
    return client + 2


def process_name(process: int, name: str, place: int) -> Iterator[str]:
    """The name of a process, and its place from the top."""
    yield _metadata(process, 0, "process_name", "name", name)
    yield _metadata(process, 0, "process_sort_index", "sort_index", place)


def thread_name(process: int, thread: int, name: str) -> str:
    """The name of a thread."""
    return _metadata(process, thread, "thread_name", "name", name)


def new_thread(process: int, thread: int, name: str) -> Iterator[str]:
    """The name of a thread, and its place in its process: by number."""
    yield thread_name(process, thread, name)
    yield _metadata(process, thread, "thread_sort_index", "sort_index", thread)


def _metadata(process: int, thread: int, kind: str, key: str, value: str | int) -> str:
    return f'{{"ph":"M","pid":{process},"tid":{thread},"name":"{kind}","args":{{"{key}":{json.dumps(value)}}}}}'


@dataclass(frozen=True, slots=True)
class Excerpt:
    """What is shown of a run: what overlaps [start_ns, stop_ns). Slices that go beyond it are cut there, and say so."""

    start_ns: int = 0
    stop_ns: int = FOREVER

    def overlaps(self, starts_ns: IntColumn, ends_ns: IntColumn) -> IntColumn:
        """The places of those that are shown, in order; what has no length is where it starts."""
        inside = (starts_ns < self.stop_ns) & ((ends_ns > self.start_ns) | (starts_ns >= self.start_ns))
        return np.flatnonzero(inside)

    def holds(self, at_ns: int) -> bool:
        return self.start_ns <= at_ns < self.stop_ns

    def slice(self, process: int, thread: int, start: int, end: int, category: str, name: str, args: str) -> list[str]:
        """A slice [start, end] in ns, if it is shown; `args` is the inside of a JSON object."""
        if start >= self.stop_ns or (end <= self.start_ns and start < self.start_ns):
            return []
        if start < self.start_ns or end > self.stop_ns:
            sides = [
                side
                for side, is_cut in (("begins earlier", start < self.start_ns), ("ends later", end > self.stop_ns))
                if is_cut
            ]
            told = f'"cut":"{" and ".join(sides)}","whole_us":[{us(start)},{us(end)}]'
            args = f"{args},{told}" if args else told
            start, end = max(start, self.start_ns), min(end, self.stop_ns)
        return [
            f'{{"ph":"X","pid":{process},"tid":{thread},"ts":{us(start)},"dur":{us(end - start)},"cat":"{category}",'
            f'"name":{json.dumps(name)},"args":{{{args}}}}}'
        ]

    def counter(self, process: int, at: int, name: str, unit: str, value: int) -> list[str]:
        """A counter's new value, or what it is where the excerpt begins; viewers put the unit after its name."""
        if at >= self.stop_ns:
            return []
        args = f'{{"{unit}":{value}}}'
        at = max(at, self.start_ns)
        return [f'{{"ph":"C","pid":{process},"tid":0,"ts":{us(at)},"name":{json.dumps(name)},"args":{args}}}']

    def arrow(self, number: int, points: Sequence[Point]) -> Iterator[str]:
        """An arrow through two points or more, each bound to the slice that encloses it on its thread.

        One in a slice that begins earlier is where the excerpt begins.
        """
        shown = [(process, thread, max(at, self.start_ns)) for process, thread, at in points if at < self.stop_ns]
        if len(shown) < 2:
            return
        for phase, (process, thread, at) in zip(["s", *"t" * (len(shown) - 2), 'f","bp":"e'], shown, strict=True):
            yield (
                f'{{"ph":"{phase}","pid":{process},"tid":{thread},"ts":{us(at)},"cat":"request","name":"request",'
                f'"id":{number}}}'
            )


def us(ns: int) -> str:
    """Nanoseconds as microseconds, written out exactly."""
    return f"{ns // 1000}.{ns % 1000:03d}"
