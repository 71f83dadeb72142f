"""Laws of clients that go down and come up, over the records of a run that is over.

Beside the ledger, which asks for breaches once it closes. It changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mist.kernel import FOREVER
from mist.records import CLIENT_STATES, DOWN, LOST, OFF, STARTING, Records


def breaches(records: Records) -> Iterator[str]:
    """time: busy + idle + down = elapsed. Whoever is down or off, or only starts, computes nothing and serves nobody.

    What is lost is lost with a client as it goes down.
    """
    steps, tasks, changes = (t.as_columns() for t in (records.steps, records.tasks, records.changes))
    for i in np.unique(changes["client"]).tolist():
        mine, name = changes["client"] == i, records.client_names[i]
        states, begins = changes["state"][mine], changes["time_ns"][mine]
        computing, served = steps["client"] == i, (tasks["client"] == i) & (tasks["started_ns"] >= 0)
        for state, begin, end in zip(states, begins, np.append(begins[1:], FOREVER), strict=True):
            if state not in (DOWN, OFF, STARTING) or begin == end:
                continue
            if np.any(computing & (steps["end_ns"] > begin) & (steps["start_ns"] < end)):
                yield f"{name} computes while it is {CLIENT_STATES[state]}"
            if np.any(served & (tasks["end_ns"] > begin) & (tasks["started_ns"] < end)):
                yield f"{name} serves while it is {CLIENT_STATES[state]}"
    down = changes["state"] == DOWN
    losses = set(zip(changes["client"][down].tolist(), changes["time_ns"][down].tolist(), strict=True))
    lost = tasks["how"] == LOST
    elsewhere = set(zip(tasks["client"][lost].tolist(), tasks["end_ns"][lost].tolist(), strict=True)) - losses
    if elsewhere:
        yield f"tasks are lost with clients that don't go down then: {sorted(elsewhere)[:3]}"
