"""A KV cache that leaves while it is computed: chunk by chunk and layer by layer, in one transfer over one path.

Between the steps of a prefill client, which it watches, and the network. It never decides where a KV cache goes, and
delays no step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING, Any

from mist.memory.hierarchy import Found
from mist.network import Network, Transfer
from mist.records import KV_TRANSFER
from mist.request import Step, Task, Wait
from mist.units import NS_PER_S

if TYPE_CHECKING:
    from mist.client import Client
    from mist.neighbours import Watcher


class Stream:
    """The KV cache of one prompt from `sender` to `receiver`: pieces, each sent when the one before has left.

    A piece of which the last byte is computed at `until_ns` leaves no faster than it is computed, so that nothing is
    sent before it exists. Latency comes once, after the last byte.
    """

    __slots__ = ("_is_closed", "_is_over", "_is_sending", "_network", "_path", "_pieces", "num_tokens", "transfer")

    def __init__(self, network: Network, request: int, sender: int, receiver: int) -> None:
        self._network = network
        self._path = network.path(sender, receiver)
        self._pieces: deque[tuple[int, int]] = deque()
        self._is_sending = False
        self._is_closed = self._is_over = False
        #: tokens at the front of the prompt that were offered, or will be by the end of the step in flight
        self.num_tokens = 0
        self.transfer = Transfer(request, KV_TRANSFER, sender, receiver, 0, -1, _for_nobody, None)

    def offer(self, piece: tuple[int, int], now: int) -> None:
        """Send so many bytes, of which the last is computed at the instant given."""
        if not self._is_closed:
            self._pieces.append(piece)
            self._send(now)

    def close(self, deliver: Callable[[Any, int], None], argument: Any) -> None:
        """The prefill ends now, and its last piece is offered at this instant; `deliver` comes when all is there."""
        self.transfer.deliver, self.transfer.argument = deliver, argument

    def end(self, now: int) -> None:
        """Nothing more is offered."""
        if self._is_over:
            return
        self._is_closed = True
        if self.transfer.start_ns < 0 and not self._pieces and self.transfer.argument is not None:
            self._pieces.append((0, now))
        self._send(now)

    def abandon(self, now: int) -> None:
        """Nobody waits for it any more: what is on its way arrives for nobody, and the rest isn't sent."""
        self._is_closed = True
        self._pieces.clear()
        self._send(now)

    def stop(self) -> None:
        """An end of it is gone: nothing more is sent. Whoever says so stops what is on its way."""
        self._is_closed = self._is_over = True
        self._pieces.clear()

    def _send(self, now: int) -> None:
        transfer = self.transfer
        if self._is_sending:
            return
        if not self._pieces:
            if self._is_closed and not self._is_over and transfer.start_ns >= 0:
                self._is_over = True
                self._network.sharing.kernel.at(now + self._path.latency_ns, self._arrive, None)
            return
        num_bytes, until_ns = self._pieces.popleft()
        if transfer.start_ns < 0:
            transfer.start_ns = now
        transfer.num_bytes += num_bytes
        self._is_sending = True
        rate = num_bytes * NS_PER_S / (until_ns - now) if until_ns > now else inf
        start = self._network.sharing.start
        self._network.in_flight[transfer] = start(
            self._path.channels, num_bytes, self._left, None, now, max_rate_per_s=rate
        )

    def _left(self, _: None, now: int) -> None:
        self._is_sending = False
        self._send(now)

    def _arrive(self, _: None, now: int) -> None:
        self._network.arrive(self.transfer, now)


@dataclass(slots=True)
class Streaming:
    """Watches a prefill client, for `streams` of its tasks, and lets another watcher see all that it sees.

    A step computes `num_layers` layers one after another in its device time, each in the same time, after its host
    time unless that overlaps. So of a chunk that is computed from s in a time C and has F bytes, all but the last layer
    are sent from s + C/L on, at F/C at most, and the last from the end: alone over a link that takes a time T for all,
    they are there max(T/L, T - C (L-1)/L) after the chunk's end. Source: the overlap of layers in Splitwise (arXiv
    2311.18677, section IV-C), with the formula of `memory.hierarchy.exposed_ns`. What was found in the prefix cache is
    sent from the first step on.
    """

    num_layers: int
    streams: dict[Task, Stream] = field(default_factory=dict)
    beside: Watcher | None = None

    def step_started(self, client: Client, step: Step, device_ns: int, now: int) -> None:
        if self.beside is not None:
            self.beside.step_started(client, step, device_ns, now)
        if not self.streams:
            return
        begin = now if client.engine.overlapped else now + client.host_ns(step)
        first, end = begin + device_ns // self.num_layers, begin + device_ns
        for task, num_tokens in client.chunks:
            if (stream := self.streams.get(task)) is None:
                continue
            num_found = task.computed_tokens - stream.num_tokens
            if num_found > 0:
                stream.num_tokens += num_found
                self._offer(client, stream, num_found * client.kv_bytes_per_token, now, now)
            num_new = task.computed_tokens + num_tokens - stream.num_tokens
            but_last = max(0, num_new) * client.kv_bytes_per_token * (self.num_layers - 1) // self.num_layers
            if but_last:
                self._offer(client, stream, but_last, end, first)

    def step_finished(self, client: Client, now: int) -> None:
        if self.beside is not None:
            self.beside.step_finished(client, now)
        if not self.streams:
            return
        for task, num_tokens in client.chunks:
            if (stream := self.streams.get(task)) is None:
                continue
            num_new = max(0, task.computed_tokens + num_tokens - stream.num_tokens)
            stream.num_tokens += num_new
            num_bytes = num_new * client.kv_bytes_per_token
            last = num_bytes - num_bytes * (self.num_layers - 1) // self.num_layers
            if last:
                self._offer(client, stream, last, now, now)
            if task.computed_tokens + num_tokens == task.target_tokens:
                del self.streams[task]
                client.kernel.at(now, _end, stream)

    def step_lost(self, client: Client, now: int) -> None:
        if self.beside is not None:
            self.beside.step_lost(client, now)

    def fetches(self, client: Client, task: Task, first_token: int, found: Sequence[Found], now: int) -> None:
        if self.beside is not None:
            self.beside.fetches(client, task, first_token, found, now)

    def idles(self, client: Client, wait: Wait, now: int) -> None:
        if self.beside is not None:
            self.beside.idles(client, wait, now)

    def _offer(self, client: Client, stream: Stream, num_bytes: int, until_ns: int, at_ns: int) -> None:
        """At that instant, which may lie ahead of the clock."""
        client.kernel.at(at_ns, _offer, (stream, (num_bytes, until_ns)))


def _offer(offered: tuple[Stream, tuple[int, int]], now: int) -> None:
    stream, piece = offered
    stream.offer(piece, now)


def _end(stream: Stream, now: int) -> None:
    stream.end(now)


def _for_nobody(_: Any, now: int) -> None:
    """What was abandoned arrives."""
