"""Links over which KV caches move: from a prefill client to the one that decodes, and from host memory to a device.

Between two stages of a request, and before a task's first step; every transfer that ends is a row of the records. It
never chooses who sends what to whom, and knows no paths: each sender has one link of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Any, Protocol

from mist.fabric import Path
from mist.kernel import Kernel
from mist.records import Records
from mist.sharing import Flow, Sharing
from mist.units import NS_PER_S

#: the sender of what comes from a client's own host memory
HOST = -1


@dataclass(frozen=True, slots=True)
class KVLink:
    """What a link carries: `bytes_per_token` of KV cache at `bytes_per_s`, there `latency_ns` after they left."""

    bytes_per_token: int = 0
    bytes_per_s: float = inf
    latency_ns: int = 0

    def wire_ns(self, num_bytes: int) -> int:
        """How long `num_bytes` keep the link busy, in ns."""
        return round(num_bytes * NS_PER_S / self.bytes_per_s)


@dataclass(slots=True, eq=False)
class _Transfer:
    """A row of the records in the making, and whom to tell."""

    request: int
    receiver: int
    num_bytes: int
    queued_ns: int
    start_ns: int
    deliver: Callable[[Any, int], None]
    argument: Any


class Channel:
    """The link of one sender, first come first served.

    It is busy while bytes leave, and latencies overlap: a transfer that finds it free takes bytes / bandwidth +
    latency. `sender`: its client, or `HOST`.
    """

    def __init__(self, link: KVLink, sender: int, kernel: Kernel, records: Records) -> None:
        self.link = link
        self.sender = sender
        self.kernel = kernel
        self._append = records.transfers.append
        self._free_at = 0
        #: sent and not there yet, oldest first
        self.in_flight: dict[_Transfer, None] = {}

    def send(
        self, request: int, receiver: int, num_tokens: int, deliver: Callable[[Any, int], None], argument: Any, now: int
    ) -> None:
        """Send the KV cache of `num_tokens`; `deliver(argument, time_ns)` is called once all of it is there."""
        num_bytes = num_tokens * self.link.bytes_per_token
        start = max(now, self._free_at)
        self._free_at = start + self.link.wire_ns(num_bytes)
        transfer = _Transfer(request, receiver, num_bytes, now, start, deliver, argument)
        self.in_flight[transfer] = None
        self.kernel.at(self._free_at + self.link.latency_ns, self._arrive, transfer)

    def cut(self, now: int) -> None:
        """The simulation stops at `now`: what is on its way stays there."""
        for transfer in self.in_flight:
            self._record(transfer, transfer.start_ns if transfer.start_ns < now else -1, -1)

    def _arrive(self, transfer: _Transfer, now: int) -> None:
        del self.in_flight[transfer]
        self._record(transfer, transfer.start_ns, now)
        transfer.deliver(transfer.argument, now)

    def _record(self, transfer: _Transfer, start: int, end: int) -> None:
        self._append(
            (transfer.request, self.sender, transfer.receiver, transfer.num_bytes, transfer.queued_ns, start, end)
        )


class Paths(Protocol):
    """Which channels join two clients; a negative index is the host memory of the other."""

    def path(self, sender: int, receiver: int) -> Path: ...


@dataclass(slots=True, eq=False)
class Transfer:
    """Bytes of a request on their way since `start_ns`, and whom to tell."""

    request: int
    sender: int
    receiver: int
    num_bytes: int
    start_ns: int
    deliver: Callable[[Any, int], None]
    argument: Any


class Network:
    """Sends bytes over `paths`, each a flow that shares its channels with all others."""

    def __init__(self, paths: Paths, sharing: Sharing, records: Records) -> None:
        self.paths = paths
        self.sharing = sharing
        self._append = records.transfers.append
        #: sent and not there yet, oldest first
        self.in_flight: dict[Transfer, Flow] = {}

    def send(
        self,
        request: int,
        sender: int,
        receiver: int,
        num_bytes: int,
        deliver: Callable[[Any, int], None],
        argument: Any,
        now: int,
    ) -> None:
        """Send `num_bytes` from a client (or memory: -1 is that of the receiver's host) to another.

        `deliver(argument, time_ns)` is called once all of it is there.
        """
        path = self.paths.path(sender, receiver)
        transfer = Transfer(request, sender, receiver, num_bytes, now, deliver, argument)
        self.in_flight[transfer] = self.sharing.start(
            path.channels, num_bytes, self._arrive, transfer, now, latency_ns=path.latency_ns
        )

    def cut(self, now: int) -> None:
        """The simulation stops at `now`: what is on its way stays there."""
        for transfer in self.in_flight:
            self._record(transfer, transfer.start_ns if transfer.start_ns < now else -1, -1)

    def _arrive(self, transfer: Transfer, now: int) -> None:
        del self.in_flight[transfer]
        self._record(transfer, transfer.start_ns, now)
        transfer.deliver(transfer.argument, now)

    def _record(self, sent: Transfer, start: int, end: int) -> None:
        self._append((sent.request, sent.sender, sent.receiver, sent.num_bytes, sent.start_ns, start, end))
