"""For how long each client served, and for how long it was there at all, off the records of its states.

An expression over the table of changes for `clients`, which divides by it. It never looks at what a client did but to
tell when one that drained was empty.
"""

from __future__ import annotations

import numpy as np

from mist.metrics.window import Columns, Window
from mist.records import DRAINING, STARTING, UP, IntColumn, Records


def up_times(records: Records, num_clients: int, window: Window) -> tuple[IntColumn, IntColumn]:
    """Nanoseconds of the window that each client served, and that it was there, its start-ups included.

    int64[num_clients] each. One that drains serves to the end of its last task, or of what it still sends.
    """
    served, there = (np.full(num_clients, window.span_ns, np.int64) for _ in range(2))
    changes, tasks, transfers = (t.as_columns() for t in (records.changes, records.tasks, records.transfers))
    for client in np.unique(changes["client"]).tolist():
        mine = changes["client"] == client
        states, begins = (changes[name][mine].tolist() for name in ("state", "time_ns"))
        bounds = [window.first_ns, *begins, window.last_ns]
        served[client] = there[client] = 0
        for state, begin, end in zip([UP, *states], bounds[:-1], bounds[1:], strict=True):
            if state == DRAINING:
                end = min(end, _last_end(client, begin, end, tasks, transfers))
            inside = max(0, min(end, window.end_ns) - max(begin, window.start_ns))
            served[client] += inside * (state in (UP, DRAINING))
            there[client] += inside * (state in (UP, DRAINING, STARTING))
    return served, there


def _last_end(client: int, begin: int, end: int, tasks: Columns, transfers: Columns) -> int:
    """When the last of what was on `client` at `begin` was gone, if that was before `end`."""
    ends = [
        rows["end_ns"][(rows[where] == client) & (rows["queued_ns"] <= end) & (rows["end_ns"] <= end)]
        for rows, where in ((tasks, "client"), (transfers, "sender"))
    ]
    return max(begin, *(int(each.max(initial=begin)) for each in ends))
