"""What came to each pool: when, how long it waited, and how long each request was served there.

Beside the sums of `clients`, added up block by block as requests leave; `saturation` judges by it once the run is over.
It never tells a backlog by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mist.metrics.clients import ClientInfo, pools
from mist.metrics.distribution import Blocks
from mist.metrics.window import Columns
from mist.records import CUT


@dataclass(frozen=True, slots=True)
class Arrivals:
    """What came to one pool.

    `arrived_ns`: when each request came there first. `service_ns`: how long each of those that were served whole was.
    `queued_ns`, `started_ns`: between which each task waited, of those that did.
    """

    arrived_ns: Blocks = field(default_factory=Blocks)
    service_ns: Blocks = field(default_factory=Blocks)
    queued_ns: Blocks = field(default_factory=Blocks)
    started_ns: Blocks = field(default_factory=Blocks)

    def add(self, tasks: Columns) -> None:
        """The segments here of some requests, each one's together."""
        request, queued, ended = (tasks[name] for name in ("request", "queued_ns", "end_ns"))
        if not len(request):
            return
        served = tasks["started_ns"] >= 0
        started = np.where(served, tasks["started_ns"], ended)
        first = np.flatnonzero(np.append(True, request[1:] != request[:-1]))
        whole = np.logical_and.reduceat(served & (tasks["how"] != CUT), first)
        self.arrived_ns.add(queued[first])
        self.service_ns.add(np.add.reduceat(ended - started, first)[whole])
        waited = started != queued
        self.queued_ns.add(queued[waited])
        self.started_ns.add(started[waited])


class Queues(dict[str, Arrivals]):
    """`Arrivals` by pool."""

    def __init__(self, clients: Sequence[ClientInfo]) -> None:
        self._members = pools(clients)
        super().__init__({pool: Arrivals() for pool in self._members})

    def add(self, tasks: Columns, last_ns: int) -> None:
        """The segments of some requests that were queued until `last_ns`, each request's together."""
        for pool, members in self._members.items():
            rows = np.isin(tasks["client"], members) & (tasks["queued_ns"] <= last_ns)
            self[pool].add({name: tasks[name][rows] for name in _COLUMNS})


_COLUMNS = ("request", "queued_ns", "started_ns", "end_ns", "how")
