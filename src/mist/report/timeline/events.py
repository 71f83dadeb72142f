"""Single events of the Trace Event Format, as JSON text: names, slices, counters, arrows, and who has which number.

Every part of the timeline writes its events with these. They know nothing of records.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

#: process of the requests; the clients' follow, and one of transfers
REQUESTS = 1
STEPS_THREAD, STATES_THREAD = 1, 2

#: a process, a thread of it and an instant there
Point = tuple[int, int, int]


def client_process(client: int) -> int:
    """The process of a client, by its number."""
    return client + 2


def process_name(process: int, name: str) -> Iterator[str]:
    """The name of a process, and its place from the top: by number."""
    yield _metadata(process, 0, "process_name", "name", name)
    yield _metadata(process, 0, "process_sort_index", "sort_index", process - REQUESTS)


def thread_name(process: int, thread: int, name: str) -> str:
    """The name of a thread."""
    return _metadata(process, thread, "thread_name", "name", name)


def new_thread(process: int, thread: int, name: str) -> Iterator[str]:
    """The name of a thread, and its place in its process: by number."""
    yield thread_name(process, thread, name)
    yield _metadata(process, thread, "thread_sort_index", "sort_index", thread)


def _metadata(process: int, thread: int, kind: str, key: str, value: str | int) -> str:
    return f'{{"ph":"M","pid":{process},"tid":{thread},"name":"{kind}","args":{{"{key}":{json.dumps(value)}}}}}'


def slice_event(process: int, thread: int, start: int, end: int, category: str, name: str, args: str) -> str:
    """A slice [start, end] in ns; `args` is the inside of a JSON object."""
    return (
        f'{{"ph":"X","pid":{process},"tid":{thread},"ts":{us(start)},"dur":{us(end - start)},"cat":"{category}",'
        f'"name":{json.dumps(name)},"args":{{{args}}}}}'
    )


def counter(process: int, at: int, name: str, unit: str, value: int) -> str:
    """A counter's new value; viewers put the unit after its name."""
    args = f'{{"{unit}":{value}}}'
    return f'{{"ph":"C","pid":{process},"tid":0,"ts":{us(at)},"name":{json.dumps(name)},"args":{args}}}'


def arrow(number: int, points: Sequence[Point]) -> Iterator[str]:
    """An arrow through two points or more, each bound to the slice that encloses it on its thread."""
    for phase, (process, thread, at) in zip(["s", *"t" * (len(points) - 2), 'f","bp":"e'], points, strict=True):
        yield (
            f'{{"ph":"{phase}","pid":{process},"tid":{thread},"ts":{us(at)},"cat":"request","name":"request",'
            f'"id":{number}}}'
        )


def us(ns: int) -> str:
    """Nanoseconds as microseconds, written out exactly."""
    return f"{ns // 1000}.{ns % 1000:03d}"
