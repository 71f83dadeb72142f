"""Moves bytes between clients and memories: KV caches, what a stage hands on, and prefixes that are fetched.

Each transfer is a flow over the channels of its path, which it shares with all others; every one that ends is a row of
the records. It never chooses who sends what to whom, and makes no path.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from mist.fabric import Path
from mist.records import Records
from mist.sharing import Flow, Sharing

#: the sender of what comes from a client's own host memory
HOST = -1


class Paths(Protocol):
    """Which channels join two clients; a negative index is the host memory of the other."""

    @property
    def carries_all(self) -> bool:
        """Whether all that a stage hands on takes its time; else KV caches do, and all else comes at once."""
        ...

    def path(self, sender: int, receiver: int) -> Path: ...


@dataclass(slots=True, eq=False)
class Transfer:
    """Bytes of a request on their way since `start_ns`: what they are (`TRANSFER_KINDS`), and whom to tell."""

    request: int
    kind: int
    sender: int
    receiver: int
    num_bytes: int
    start_ns: int
    deliver: Callable[[Any, int], None]
    argument: Any
    queued_ns: int = -1


class Network:
    """Sends bytes over `paths`, each a flow that shares its channels with all others."""

    def __init__(self, paths: Paths, sharing: Sharing, records: Records) -> None:
        self.paths = paths
        self.sharing = sharing
        self.carries_all = paths.carries_all
        self._append = records.transfers.append
        #: that something was sent over, by (sender, receiver)
        self._paths: dict[tuple[int, int], Path] = {}
        #: paths from and to memories outside the nodes' own, by (sender, receiver)
        self.memory_paths: dict[tuple[int, int], Path] = {}
        #: sent and not there yet, oldest first
        self.in_flight: dict[Transfer, Flow] = {}

    def send(
        self,
        request: int,
        kind: int,
        sender: int,
        receiver: int,
        num_bytes: int,
        deliver: Callable[[Any, int], None],
        argument: Any,
        now: int,
        *,
        queued_ns: int = -1,
    ) -> None:
        """Send `num_bytes` from a client (or memory: -1 is that of the receiver's host) to another.

        `deliver(argument, time_ns)` is called once all of it is there. `queued_ns`: since when it was to be sent.
        """
        path = self._paths.get((sender, receiver))
        if path is None:
            path = self._paths[sender, receiver] = self.path(sender, receiver)
        transfer = Transfer(request, kind, sender, receiver, num_bytes, now, deliver, argument, queued_ns)
        self.in_flight[transfer] = self.sharing.start(
            path.channels, num_bytes, self.arrive, transfer, now, latency_ns=path.latency_ns
        )

    def path(self, sender: int, receiver: int) -> Path:
        """The channels between two clients, or a client and a memory, or two memories."""
        return self.memory_paths.get((sender, receiver)) or self.paths.path(sender, receiver)

    def cut(self, now: int) -> None:
        """The simulation stops at `now`: what is on its way stays there."""
        for transfer in self.in_flight:
            self._record(transfer, transfer.start_ns if transfer.start_ns < now else -1, -1)

    def stop(self, transfer: Transfer, now: int) -> None:
        """`transfer`, which is in flight, comes to nobody."""
        self.sharing.stop(self.in_flight.pop(transfer), now)
        self._record(transfer, transfer.start_ns if transfer.start_ns < now else -1, -1)

    def arrive(self, transfer: Transfer, now: int) -> None:
        """All of `transfer` is there."""
        if self.in_flight.pop(transfer, None) is None:
            return  # it was stopped when its last byte had left
        self._record(transfer, transfer.start_ns, now)
        transfer.deliver(transfer.argument, now)

    def _record(self, sent: Transfer, start: int, end: int) -> None:
        queued = sent.start_ns if sent.queued_ns < 0 else sent.queued_ns
        self._append((sent.request, sent.kind, sent.sender, sent.receiver, sent.num_bytes, queued, start, end))
