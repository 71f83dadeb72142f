"""Events of a scenario at their times: replicas go down and come up, links slow down.

Between a scenario, which lists them, and the kernel, which no client outruns past them. It never chooses what becomes
of lost tasks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mist.availability.outages import RETRY, Outages, Replica
from mist.kernel import FOREVER, Kernel
from mist.sharing import Channel, Sharing

#: what is left of a link that is cut: less than any run sees, and more than nothing, by which one can't divide
CUT_SHARE = 1e-18


@dataclass(frozen=True, slots=True)
class Down:
    """`replica` goes down at `at_ns`, and all that its devices hold is lost; `on_loss`: what becomes of its tasks.

    It comes up at `until_ns`, unless another outage lasts longer.
    """

    at_ns: int
    replica: str
    on_loss: str = RETRY
    until_ns: int = FOREVER


@dataclass(frozen=True, slots=True)
class Up:
    """`replica` is there again, empty, whatever outages it has."""

    at_ns: int
    replica: str


@dataclass(frozen=True, slots=True)
class LinkChange:
    """`channel` has `share` (0: it is cut, to 1) of what it is rated at, from `at_ns` on."""

    at_ns: int
    channel: Channel
    share: float


Event = Down | Up | LinkChange


@dataclass(frozen=True, slots=True)
class Events:
    """Posts events, and plays each when its time comes."""

    kernel: Kernel
    outages: Outages
    sharing: Sharing

    def post(self, events: Iterable[Event]) -> None:
        """To be played at their times; those of one instant in the order that they are given in."""
        for event in events:
            if isinstance(event, Up):
                self._replica(event).num_returns += 1
            self.kernel.at(event.at_ns, self._play, event)
            if isinstance(event, Down) and event.until_ns < FOREVER:
                self.kernel.at(event.until_ns, self.outages.outage_ended, self._replica(event))

    def _play(self, event: Event, now: int) -> None:
        if isinstance(event, LinkChange):
            channel = event.channel
            self.sharing.change(channel, channel.rated_per_s * max(event.share, CUT_SHARE), now)
        elif isinstance(event, Down):
            self.outages.down(self._replica(event), event.on_loss, event.until_ns, now)
        else:
            replica = self._replica(event)
            replica.num_returns -= 1
            self.outages.up(replica, now)

    def _replica(self, event: Down | Up) -> Replica:
        return self.outages.replicas[event.replica]
