"""The states of a timeline's clients: a slice for as long as one is up, down, starting, draining or off, or lent.

On threads of each client that changes state, or is lent to prompts, at all, below its steps. It never tells whose
requests were lost: those are in the requests' lanes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import groupby, pairwise

import numpy as np

from mist.metrics.availability import Change, replica_of, state_changes
from mist.records import CLIENT_STATES, UP, Records
from mist.report.timeline.events import LOANS_THREAD, STATES_THREAD, Excerpt, client_process, new_thread
from mist.report.timeline.rows import in_blocks, last_event


def state_events(records: Records, excerpt: Excerpt) -> Iterator[str]:
    """A slice from each change to the next one, or to the run's last event; the lanes of a replica have the same."""
    changes = state_changes(records)
    for client, name in enumerate(records.client_names):
        own = [change for change in changes if change.replica == replica_of(name)]
        if not own:
            continue
        process = client_process(client)
        yield from new_thread(process, STATES_THREAD, "state")
        first, last = Change(0, "", UP, "at first"), Change(last_event(records), "", UP, "")
        for change, following in pairwise([first, *own, last]):
            if following.time_ns > change.time_ns:
                args = f'"reason":{json.dumps(change.reason)}'
                state = CLIENT_STATES[change.state]
                yield from excerpt.slice(
                    process, STATES_THREAD, change.time_ns, following.time_ns, "state", state, args
                )


def loan_events(records: Records, excerpt: Excerpt) -> Iterator[str]:
    """A slice for each time that a client was lent, to the run's last event where it had not returned."""
    rows, last = records.loans.as_columns(), last_event(records)
    order = np.lexsort((rows["start_ns"], rows["client"]))
    for client, loans in groupby(in_blocks(rows, order), key=lambda loan: loan[0]):
        process = client_process(client)
        yield from new_thread(process, LOANS_THREAD, "lent")
        for _, start, end in loans:
            returned, stop = ("true", end) if end >= 0 else ("false", last)
            args = f'"returned":{returned}'
            yield from excerpt.slice(process, LOANS_THREAD, start, stop, "loan", "lent to prompts", args)
