"""The requests of a timeline: a lane for each while it lives, with what it waited for, and arrows to what served it.

It reads the rows of requests and of their segments. A request's own lane is its critical path, which fills its life;
what ran beside it and wasn't waited for has lanes of its own below. It never computes a metric.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import count

import numpy as np

from mist.metrics.stages import awaited
from mist.records import DROPPED, NO_CLIENT, REJECTED, SEGMENT_ENDS, STATUSES, Records
from mist.report.timeline.events import (
    REQUESTS,
    STEPS_THREAD,
    Excerpt,
    Point,
    client_process,
    new_thread,
    us,
)
from mist.report.timeline.rows import ByRequest, Lanes, in_blocks, last_event, level_events
from mist.report.timeline.steps import StepFinder
from mist.report.timeline.transfers import Wires

#: a segment's row, and since when the request was on its way there
_Leg = tuple[list[int], int]
#: a process and a thread of it
_Place = tuple[int, int]


def processes(records: Records, wires: Wires) -> list[tuple[int, str]]:
    """The processes of requests and their names: one, or one for each tenant."""
    if not records.tenants:
        return [(REQUESTS, "requests")]
    others = range(wires.process + 1, wires.process + len(records.tenants))
    return [
        (process, f"requests of {name}")
        for process, (name, _) in zip([REQUESTS, *others], records.tenants, strict=True)
    ]


def request_events(records: Records, segments: ByRequest, wires: Wires, excerpt: Excerpt) -> Iterator[str]:
    """Each request as a slice in a lane that is free, around the waiting, serving and handing over of its stages."""
    rows = records.requests.as_columns()
    ends = np.where(rows["end_ns"] >= 0, rows["end_ns"], last_event(records))
    shown = excerpt.overlaps(rows["arrival_ns"], ends)
    order = shown[np.lexsort((rows["request"][shown], rows["arrival_ns"][shown]))]
    firsts = [first for _, first in records.tenants] or [0]
    tenant = np.searchsorted(firsts, rows["request"][order], side="right") - 1
    lives = _Lives(records, segments, wires, excerpt)
    for number, (process, _) in enumerate(processes(records, wires)):
        mine = order[tenant == number]
        yield from lives.of(process, in_blocks(rows, mine), ends[mine].tolist())
        yield from level_events(process, "in the system", "requests", rows["arrival_ns"][mine], ends[mine],
                                np.ones(len(mine), np.int64), excerpt)  # fmt: skip


def _rejection(records: Records, process: int, row: list[int], end: int) -> str:
    request, reason, inputs = row[0], row[5], row[6]
    why = json.dumps(records.reasons[reason] if reason >= 0 else "")
    return (
        f'{{"ph":"i","pid":{process},"tid":0,"ts":{us(end)},"s":"p","cat":"request",'
        f'"name":"request {request} rejected","args":{{"reason":{why},"input_tokens":{inputs}}}}}'
    )


def _arguments(row: list[int]) -> str:
    _, arrival, first_token, _, status, _, inputs, outputs, cached, preemptions = row
    first = "null" if first_token < 0 else us(first_token - arrival)
    return (
        f'"status":"{STATUSES[status]}","input_tokens":{inputs},"output_tokens":{outputs},'
        f'"cached_tokens":{cached},"num_preemptions":{preemptions},"ttft_us":{first}'
    )


class _Lives:
    """Writes what is within requests: nested slices, lanes beside, arrows; stretches without length are left out."""

    def __init__(self, records: Records, segments: ByRequest, wires: Wires, excerpt: Excerpt) -> None:
        self._records = records
        self._segments = segments
        self._wires = wires
        self._excerpt = excerpt
        self._finder = StepFinder(records, excerpt)
        self._threads_per_lane = _most_side_by_side(segments)
        self._named: set[tuple[int, int]] = set()
        self._arrow_numbers = count(1 + int(records.requests.as_columns()["request"].max(initial=-1)))

    def of(self, process: int, rows: Iterable[list[int]], ends: Iterable[int]) -> Iterator[str]:
        """The requests of one process, in order of their arrival."""
        # slices that touch could be taken for nested ones where one has no length
        lanes = Lanes(gap_ns=1)
        for row, end in zip(rows, ends, strict=True):
            request, arrival, status = row[0], row[1], row[4]
            lived = self._segments.rows(request)
            if status == REJECTED and not lived:
                if self._excerpt.holds(end):
                    yield _rejection(self._records, process, row, end)
                continue
            lane, is_new = lanes.take(arrival, end)
            place = process, lane * self._threads_per_lane
            if is_new:
                yield from new_thread(*place, f"lane {lane}")
            yield from self._excerpt.slice(*place, arrival, end, "request", f"request {request}", _arguments(row))
            yield from self._within(request, place, arrival, end, lived)

    def _within(self, request: int, place: _Place, arrival: int, end: int, segments: list[list[int]]) -> Iterator[str]:
        path, beside, before = [], [], arrival
        sent = [self._sent(segment) for segment in segments]
        lasting = [segment for segment in segments if segment[8] != DROPPED]
        waited_for = iter(awaited([self._sent(segment) for segment in lasting], [segment[7] for segment in lasting]))
        on_path = [segment[8] != DROPPED and next(waited_for) for segment in segments]
        for segment, left, is_awaited in zip(segments, sent, on_path, strict=True):
            if is_awaited:
                path.append((segment, before))
                before = segment[7]
            else:
                beside.append((segment, left))
        for leg in path:
            yield from self._slices(place, leg, "")
        if path and end > before:
            yield from self._excerpt.slice(*place, before, end, "request", "hand-over", "")
        yield from self._arrow(request, (*place, arrival), path)
        if beside:
            yield from self._beside(request, place, sorted(beside, key=lambda leg: leg[1]))

    def _beside(self, request: int, lane: _Place, legs: list[_Leg]) -> Iterator[str]:
        """What nobody waited for, in as many threads as overlap, and an arrow from each to its steps."""
        (process, first), places = lane, Lanes()
        for segment, sent in legs:
            if segment[7] == sent:
                continue
            number, _ = places.take(sent, segment[7])
            place = process, first + number
            if sent >= self._excerpt.stop_ns or segment[7] <= self._excerpt.start_ns:
                continue
            if place not in self._named:
                self._named.add(place)
                more = f" ({number})" if number > 1 else ""
                yield from new_thread(*place, f"lane {first // self._threads_per_lane}, beside{more}")
            yield from self._slices(place, (segment, sent), f'"request":{request},')
            yield from self._arrow(next(self._arrow_numbers), (*place, sent), [(segment, sent)])

    def _slices(self, place: _Place, leg: _Leg, common: str) -> Iterator[str]:
        """The parts of a segment: on its way, waiting, served."""
        (_, _, kind, client, queued, started, _, ended, how, computed, cached, *_), sent = leg
        name, server = self._records.stage_kinds[kind], "null"
        if client != NO_CLIENT:
            server = json.dumps(self._records.client_names[client])
        admitted = started if started >= 0 else ended
        served = f'"client":{server},"computed_tokens":{computed},"cached_tokens":{cached},"end":"{SEGMENT_ENDS[how]}"'
        for start, end, part, args in (
            (sent, queued, "hand-over", f'"to":{server}'),
            (queued, admitted, f"wait for {name}", f'"client":{server}'),
            (admitted, ended, name, served),
        ):
            if end > start:
                yield from self._excerpt.slice(*place, start, end, "request", part, common + args)

    def _sent(self, segment: list[int]) -> int:
        """When what a segment works on left for its client; at its queueing where no transfer brought it."""
        request, client, queued = segment[0], segment[3], segment[4]
        if client == NO_CLIENT:
            return queued
        wires = self._wires.of_request(request)
        return next((sent for receiver, sent, _, end, _ in wires if (receiver, end) == (client, queued)), queued)

    def _arrow(self, number: int, origin: Point, legs: list[_Leg]) -> Iterator[str]:
        """From a request's lane through the transfers to each segment, its first step and its last.

        Points bind to the slices that enclose them on their threads, which is why each is at a slice's start.
        """
        points = [origin]
        wires = self._wires.of_request(legs[0][0][0]) if legs else []
        for segment, sent in legs:
            client, started, ended = segment[3], segment[5], segment[7]
            if started < 0 or client == NO_CLIENT:
                continue
            for receiver, _, start, end, thread in wires:
                if receiver == client and sent <= start and end <= started and end > self._excerpt.start_ns:
                    points.append((self._wires.process, thread, start))
            for at in self._finder.steps(client, started, ended):
                point = (client_process(client), STEPS_THREAD, at)
                if point != points[-1]:
                    points.append(point)
        yield from self._excerpt.arrow(number, points)


def _most_side_by_side(segments: ByRequest) -> int:
    """Threads to set aside for a lane: one, unless segments overlap somewhere; then as many as a request has."""
    request, queued, ended = (segments.columns[name] for name in ("request", "queued_ns", "end_ns"))
    if not np.any((request[1:] == request[:-1]) & (queued[1:] < ended[:-1])):
        return 1
    return int(np.unique(request, return_counts=True)[1].max())
