"""For how long each client served and was there at all, and how a pool's replicas came and went.

Expressions over the table of changes, up to the run's last event: what is set for later changed nothing. It never looks
at what a client did but to tell when one that drained was empty.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from mist.metrics.window import Columns, Window
from mist.records import CLIENT_STATES, DOWN, DRAINING, OFF, STARTING, UP, IntColumn, Records
from mist.units import NS_PER_S

#: why a replica is off that drained and is empty, which no row of changes says
DRAINED = "drained"


class Change(NamedTuple):
    """A replica is in another state (of `CLIENT_STATES`) from an instant on."""

    time_ns: int
    replica: str
    state: int
    reason: str


class LastEnds:
    """When the last task on a client ended in each of its states, and the run's last event; rows come in blocks."""

    def __init__(self, last_ns: int) -> None:
        self.last_ns = last_ns
        #: by client and the number of its changes before
        self._ends: dict[tuple[int, int], int] = {}

    @classmethod
    def of(cls, records: Records) -> LastEnds:
        """Of a run whose records are whole."""
        found = cls(Window.of(records).last_ns)
        found.add(records.tasks.as_columns(), records.changes.as_columns())
        return found

    def add(self, tasks: Columns, changes: Columns) -> None:
        """`changes` are all until the last end of `tasks`, and perhaps later ones."""
        for client in np.unique(changes["client"]).tolist():
            ends = tasks["end_ns"][tasks["client"] == client]
            states = np.searchsorted(changes["time_ns"][changes["client"] == client], ends)
            for state in np.unique(states).tolist():
                last = int(ends[states == state].max())
                self._ends[client, state] = max(last, self._ends.get((client, state), last))

    def of_state(self, clients: Sequence[int], state: int, otherwise: int) -> int:
        """Of `clients` together in their `state`-th state from 0, or `otherwise` if that is later."""
        return max(otherwise, *(self._ends.get((client, state), otherwise) for client in clients))


def state_changes(records: Records, ends: LastEnds | None = None) -> list[Change]:
    """All changes of a run by time, those to "off" of replicas that had drained among them; `ends`: where records
    aren't whole."""
    found = _by_replica(records, ends or LastEnds.of(records))
    return sorted((each for rows in found.values() for each in rows), key=lambda each: each.time_ns)


def up_times(records: Records, ends: LastEnds, num_clients: int, window: Window) -> tuple[IntColumn, IntColumn]:
    """Nanoseconds of the window that each client served, and that it was there, its start-ups included.

    int64[num_clients] each. One that drains serves to the end of its last task, or of what it still sends.
    """
    served, there = (np.full(num_clients, window.span_ns, np.int64) for _ in range(2))
    changes = _by_replica(records, ends)
    for client, name in enumerate(records.client_names):
        if rows := changes.get(replica_of(name)):
            times = np.zeros(len(CLIENT_STATES), np.int64)
            for state, begin, end in _spans(rows, window):
                times[state] += end - begin
            served[client] = times[[UP, DRAINING]].sum()
            there[client] = served[client] + times[STARTING]
    return served, there


def summarise_availability(
    records: Records, ends: LastEnds, clients: Mapping[str, Mapping[str, Any]], window: Window
) -> dict[str, Any] | None:
    """`pools` that changed, with figures over the window, and all `changes` of the run; None where nothing changed.

    `clients`: the figures of each pool, as `summarise_clients` gives them.
    """
    by_replica = _by_replica(records, ends)
    if not by_replica:
        return None
    pools = {}
    for pool, figures in clients.items():
        replicas = dict.fromkeys(replica_of(each["name"]) for each in figures["replicas"])
        if any(name in by_replica for name in replicas):
            rows = [by_replica.get(name, []) for name in replicas]
            pools[pool] = {"replica_s": figures["replica_s"], **_numbers_up(rows, window), **_counts(rows, window)}
    changes = [
        {"time_s": time_ns / NS_PER_S, "client": replica, "state": CLIENT_STATES[state], "reason": reason}
        for time_ns, replica, state, reason in state_changes(records, ends)
    ]
    return {"pools": pools, "changes": changes}


def replica_of(client: str) -> str:
    """The replica that a client is, or that it is a lane of: gpu-0 of gpu-0.1."""
    return client.partition(".")[0]


def _counts(replicas: Sequence[Sequence[Change]], window: Window) -> dict[str, int]:
    """How often one that was there went down, and how often more or fewer were wanted by the schedule or a rule."""
    inside = [each for rows in replicas for each in rows if window.start_ns <= each.time_ns < window.stop_ns]
    scaled = [each.state for each in inside if each.reason.startswith(("schedule", "rule"))]
    return {
        "num_down": sum(_num_lost(rows, window) for rows in replicas),
        "num_scaled_up": sum(state in (STARTING, UP) for state in scaled),
        "num_scaled_down": sum(state in (DRAINING, OFF) for state in scaled),
    }


def _num_lost(rows: Sequence[Change], window: Window) -> int:
    """How often a replica went down within the window; not where there was none, which is then down and no loss."""
    before = [UP, *(each.state for each in rows)]
    went = (each for each, earlier in zip(rows, before, strict=False) if each.state == DOWN and earlier != OFF)
    return sum(window.start_ns <= each.time_ns < window.stop_ns for each in went)


def _numbers_up(replicas: Sequence[Sequence[Change]], window: Window) -> dict[str, float | None]:
    """How many replicas took tasks: the mean over time, the fewest and the most."""
    spans = [(b, e) for rows in replicas for state, b, e in _spans(rows, window) if state == UP and e > b]
    begins, ends = (np.sort([span[i] for span in spans]).astype(np.int64) for i in (0, 1))
    at = np.unique(np.concatenate([[window.start_ns], begins, ends[ends < window.end_ns]]).astype(np.int64))
    numbers = np.searchsorted(begins, at, side="right") - np.searchsorted(ends, at, side="right")
    mean = int((ends - begins).sum()) / window.span_ns if window.span_ns else None
    return {"mean_up": mean, "min_up": int(numbers.min()), "max_up": int(numbers.max())}


def _spans(rows: Sequence[Change], window: Window) -> Iterator[tuple[int, int, int]]:
    """(state, begin, end) of a replica within the window; it is up at first."""
    bounds = [(window.first_ns, UP), *((each.time_ns, each.state) for each in rows), (window.last_ns, UP)]
    for (begin, state), (end, _) in pairwise(bounds):
        first, last = max(begin, window.start_ns), min(end, window.end_ns)
        yield state, first, max(first, last)


def _by_replica(records: Records, last_ends: LastEnds) -> dict[str, list[Change]]:
    """The changes of each replica that has any, to the run's last event; one that drains is off when it is empty."""
    if not len(records.changes):
        return {}
    last = last_ends.last_ns
    members: dict[str, list[int]] = {}
    for client, name in enumerate(records.client_names):
        members.setdefault(replica_of(name), []).append(client)
    columns = records.changes.as_columns()
    found = {}
    for replica, clients in members.items():
        # the lanes of a replica change together
        mine = (columns["client"] == clients[0]) & (columns["time_ns"] <= last)
        times, states, causes = (columns[name][mine].tolist() for name in ("time_ns", "state", "cause"))
        rows: list[Change] = []
        ends = [*times, last][1:]
        for place, (time_ns, state, cause, end) in enumerate(zip(times, states, causes, ends, strict=True), 1):
            rows.append(Change(time_ns, replica, state, records.causes[cause]))
            if state == DRAINING:
                empty_ns = max(last_ends.of_state(clients, place, time_ns), _last_sent(records, clients, time_ns, end))
                if empty_ns < end:
                    rows.append(Change(empty_ns, replica, OFF, DRAINED))
        if rows:
            found[replica] = rows
    return found


def _last_sent(records: Records, clients: Sequence[int], begin: int, end: int) -> int:
    """When the last of what `clients` sent was gone, if that was before `end`."""
    rows = records.transfers.as_columns()
    mine = np.isin(rows["sender"], clients) & (rows["queued_ns"] <= end) & (rows["end_ns"] <= end)
    return int(rows["end_ns"][mine].max(initial=begin))
