"""The states of a timeline's clients: a slice for as long as one is up, down, starting, draining or off.

On a thread of each client that changes state at all, below its steps. It never tells whose requests were lost: those
are in the requests' lanes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise

from mist.metrics.availability import Change, replica_of, state_changes
from mist.records import CLIENT_STATES, UP, Records
from mist.report.timeline.events import STATES_THREAD, client_process, new_thread, slice_event
from mist.report.timeline.rows import last_event


def state_events(records: Records) -> Iterator[str]:
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
                yield slice_event(process, STATES_THREAD, change.time_ns, following.time_ns, "state", state, args)
