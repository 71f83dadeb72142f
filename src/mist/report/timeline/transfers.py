"""The transfers of a timeline: what each client and memory sent, to whom, and its bytes in flight.

It reads the transfers' rows. It never shows what took no time: over a link without limits nothing is in flight.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from mist.records import HAND_OFF, TRANSFER_KINDS, IntColumn, Records
from mist.report.timeline.events import Excerpt, client_process, new_thread, us
from mist.report.timeline.rows import Lanes, in_blocks, last_event, level_events
from mist.units import GB, GIB, KB, KIB, MB, MIB

#: KV caches are told in the units of memory, all else in those of networks
_KV_UNITS = ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB"))
_UNITS = ((GB, "GB"), (MB, "MB"), (KB, "kB"))


class Wires:
    """The transfers that took time: by sender, in order of their start, on as many threads as overlap.

    Senders are clients, then the host memory of each client, then other memories.
    """

    def __init__(self, records: Records) -> None:
        self.process = client_process(len(records.client_names))
        self._records = records
        rows = records.transfers.as_columns()
        last = last_event(records)
        rows["arrived"] = (rows["end_ns"] >= 0).astype(np.int64)
        rows["end_ns"] = np.where(rows["end_ns"] >= 0, rows["end_ns"], last)
        source = self._sources(rows["sender"], rows["receiver"])
        shown = np.flatnonzero((rows["start_ns"] >= 0) & (rows["end_ns"] > rows["start_ns"]))
        order = shown[np.lexsort((rows["start_ns"][shown], source[shown]))]
        self._rows = {name: column[order] for name, column in rows.items()}
        #: name, first row, row after the last
        self._senders: list[tuple[str, int, int]] = []
        sources, firsts = np.unique(source[order], return_index=True)
        for number, (first, stop) in zip(sources.tolist(), pairwise([*firsts.tolist(), len(order)]), strict=True):
            self._senders.append((self._source_name(number), first, stop))
        self._threads = self._spread()
        self._by_request = np.lexsort((self._rows["start_ns"], self._rows["request"]))
        self._requests = self._rows["request"][self._by_request]

    def __len__(self) -> int:
        return len(self._requests)

    def of_request(self, request: int) -> list[list[int]]:
        """Receiver, queueing, start, end and thread of each of a request's transfers, by start."""
        if not len(self):
            return []
        first, stop = np.searchsorted(self._requests, (request, request + 1))
        places = self._by_request[first:stop]
        columns = [self._rows[name][places] for name in ("receiver", "queued_ns", "start_ns", "end_ns")]
        rows: list[list[int]] = np.column_stack([*columns, self._threads[places]]).tolist()
        return rows

    def events(self, excerpt: Excerpt) -> Iterator[str]:
        """Slices with their threads' names, and per sender a counter of the bytes in flight."""
        named: set[int] = set()
        names = ("request", "kind", "receiver", "bytes", "queued_ns", "start_ns", "end_ns", "arrived")
        columns = {**{name: self._rows[name] for name in names}, "thread": self._threads}
        for name, first, stop in self._senders:
            num_bytes, start, end = (self._rows[column][first:stop] for column in ("bytes", "start_ns", "end_ns"))
            before = int(self._threads[first]) - 1
            for row in in_blocks(columns, first + excerpt.overlaps(start, end)):
                *transfer, thread = row
                if thread not in named:
                    named.add(thread)
                    more = f" ({thread - before})" if thread > before + 1 else ""
                    yield from new_thread(self.process, thread, f"{name} ->{more}")
                yield from self._slice(transfer, thread, excerpt)
            yield from level_events(self.process, f"{name} -> in flight", "bytes", start, end, num_bytes, excerpt)

    def _slice(self, transfer: list[int], thread: int, excerpt: Excerpt) -> list[str]:
        request, kind, receiver, num_bytes, queued, start, end, arrived = transfer
        what = f"hand-over {_size(num_bytes, _UNITS)}" if kind == HAND_OFF else f"KV {_size(num_bytes, _KV_UNITS)}"
        args = (
            f'"request":{request},"kind":"{TRANSFER_KINDS[kind]}","bytes":{num_bytes},"wait_us":{us(start - queued)},'
            f'"end":"{"arrived" if arrived else "cut"}"'
        )
        name = f"{what} to {self._name(receiver)}"
        return excerpt.slice(self.process, thread, start, end, "transfer", name, args)

    def _spread(self) -> IntColumn:
        """A thread for each transfer, such that those on one don't overlap."""
        threads: list[int] = []
        for _, first, stop in self._senders:
            before, lanes = max(threads, default=0), Lanes()
            spans = in_blocks({name: self._rows[name] for name in ("start_ns", "end_ns")}, np.arange(first, stop))
            threads += [before + lanes.take(start, end)[0] for start, end in spans]
        return np.array(threads, dtype=np.int64)

    def _sources(self, sender: IntColumn, receiver: IntColumn) -> IntColumn:
        """A number for each sender: the host memory of one client isn't that of another."""
        num_clients = len(self._records.client_names)
        memory = np.where((sender == -1) & (receiver >= 0), num_clients + receiver, 2 * num_clients - 1 - sender)
        return np.where(sender >= 0, sender, memory)

    def _source_name(self, number: int) -> str:
        num_clients = len(self._records.client_names)
        if num_clients <= number < 2 * num_clients:
            return f"{self._records.memory_names[0]} of {self._records.client_names[number - num_clients]}"
        return self._name(number if number < num_clients else 2 * num_clients - 1 - number)

    def _name(self, end: int) -> str:
        """What stands at one end of a transfer: a client, or below 0 a memory."""
        return self._records.client_names[end] if end >= 0 else self._records.memory_names[-1 - end]


def _size(num_bytes: int, units: tuple[tuple[int, str], ...]) -> str:
    """ "1.2 GiB", "20 kB", "7 B"."""
    factor, unit = next(((f, u) for f, u in units if num_bytes >= f), (1, "B"))
    value = num_bytes / factor
    return f"{value:.2g} {unit}" if value < 9.95 else f"{value:.0f} {unit}"
