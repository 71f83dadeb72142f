"""The clock: take the next instant, deliver every event of that instant, then let each woken client start a step.

Within an instant, step ends come first (in client order), then other events in the order they were posted; no
client starts a step before all of them are delivered. The kernel knows nothing of requests, policies or hardware.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heapify, heappop, heappush
from typing import Any, Protocol

FOREVER = 1 << 62
_AFTER_STEP_ENDS = 1 << 32


class Stepper(Protocol):
    """What the kernel knows of a client, or of a lane of several that keep step."""

    index: int
    woken: bool
    #: when the step that it has in flight ends; another instant that was told before is void
    ends_ns: int

    @property
    def emits(self) -> bool:
        """Whether the end of one of its tasks can reach another client: a hand-off, or a closed loop's next arrival."""
        ...

    def start_step(self, now: int) -> None: ...

    def finish_step(self, now: int) -> None: ...


class Kernel:
    """Event heap and clock, in integer ns.

    A client *runs ahead* of the clock, finishing and starting steps inline, while each step ends strictly before the
    `horizon`: the next event that can reach it. Step ends of clients that don't emit (`quiet`) can't reach others,
    so they live in a heap of their own and limit nobody. Running ahead saves heap traffic and changes no result. A
    client that *plans* tells the end of many steps; whoever reaches it before makes it end one of them sooner.
    """

    __slots__ = (
        "_crowded", "_delivering", "_events", "_posted", "_quiet", "_settled_ns", "_until", "_woken", "now",
        "on_instant",
    )  # fmt: skip

    def __init__(self) -> None:
        self.now = 0
        #: called after each instant is settled; used by the ledger
        self.on_instant: Callable[[int], None] | None = None
        self._events: list[tuple[int, int, Callable[[Any, int], None], Any]] = []
        self._quiet: list[tuple[int, int, Stepper]] = []
        self._woken: list[Stepper] = []
        self._posted = _AFTER_STEP_ENDS
        self._until = FOREVER
        self._crowded = False
        #: the place among the events of its instant of the one that is delivered
        self._delivering = 0
        #: the last instant whose events were all delivered
        self._settled_ns = -1

    @property
    def num_events(self) -> int:
        """Events posted, step ends aside: the records have those."""
        return self._posted - _AFTER_STEP_ENDS

    @property
    def num_pending(self) -> int:
        """Events and step ends to come, and clients that are about to start a step."""
        return len(self._events) + len(self._quiet) + len(self._woken)

    def at(self, time_ns: int, deliver: Callable[[Any, int], None], argument: Any) -> None:
        """Call `deliver(argument, time_ns)` at that instant; it can reach any client."""
        self._posted += 1
        heappush(self._events, (time_ns, self._posted, deliver, argument))

    def step_ends(self, client: Stepper, time_ns: int) -> None:
        """The step that `client` has in flight ends at `time_ns`, and no more at what was told of it before."""
        client.ends_ns = time_ns
        if client.emits:
            heappush(self._events, (time_ns, client.index, self._finish, client))
        else:
            heappush(self._quiet, (time_ns, client.index, client))

    @property
    def is_settled(self) -> bool:
        """Whether clients have started their steps of this instant, and what comes now comes after that."""
        return self._settled_ns == self.now

    def comes_later(self, client: Stepper) -> bool:
        """Whether a step of `client` that ends at this instant hasn't been told to have ended."""
        return client.emits and client.index >= self._delivering

    def void(self, client: Stepper, now: int) -> bool:
        """The step that `client` has in flight ends for nobody; False if it has none."""
        events = [e for e in self._events if e[3] is not client or e[2] != self._finish]
        quiet = [e for e in self._quiet if e[2] is not client]
        is_in_flight = len(events) + len(quiet) < len(self._events) + len(self._quiet)
        self._events[:], self._quiet[:] = events, quiet  # `run` holds these lists
        heapify(self._events)
        heapify(self._quiet)
        return is_in_flight

    def surface(self, *steppers: object) -> None:
        """The steps that these have in flight can reach others after all, as their next ones say by `emits`."""
        found = [entry for entry in self._quiet if any(entry[2] is each for each in steppers)]
        for time_ns, index, client in found:
            self._quiet.remove((time_ns, index, client))
            heappush(self._events, (time_ns, index, self._finish, client))
        if found:
            heapify(self._quiet)

    def wake(self, client: Stepper) -> None:
        """Let `client` start a step once this instant's events are delivered."""
        if not client.woken:
            client.woken = True
            self._woken.append(client)

    def horizon(self) -> int:
        """The instant before which nothing can reach the client that is starting a step now."""
        if self._crowded:
            return self.now
        events = self._events
        return events[0][0] if events and events[0][0] < self._until else self._until

    def run(self, until_ns: int = FOREVER) -> None:
        """Play all events at instants < `until_ns`."""
        self._until = until_ns
        events, quiet = self._events, self._quiet
        while events or quiet:
            now = events[0][0] if events else FOREVER
            if quiet and quiet[0][0] <= now:
                now = quiet[0][0]
                if now >= until_ns:
                    break
                self.now = now
                while quiet and quiet[0][0] == now:
                    self._finish(heappop(quiet)[2], now)
            elif now >= until_ns:
                break
            else:  # the first of them without being looked at again
                self.now = now
                _, self._delivering, deliver, argument = heappop(events)
                deliver(argument, now)
            while events and events[0][0] == now:
                _, self._delivering, deliver, argument = heappop(events)
                deliver(argument, now)
            self._settled_ns = now
            if self._woken:
                self._start_woken(now)
            if self.on_instant is not None:
                self.on_instant(now)

    def _finish(self, client: Stepper, now: int) -> None:
        if client.ends_ns != now:
            return  # it ended sooner
        client.ends_ns = -1
        client.finish_step(now)
        if not client.woken:
            client.woken = True
            self._woken.append(client)

    def _start_woken(self, now: int) -> None:
        woken = self._woken
        if len(woken) == 1:
            client = woken.pop()
            client.woken = False
            client.start_step(now)
            return
        self._woken = []
        if len(woken) > 1:
            woken.sort(key=lambda client: client.index)
            # Another woken client may emit before the horizon that the heap shows.
            self._crowded = any(client.emits for client in woken)
        for client in woken:
            client.woken = False
            client.start_step(now)
        self._crowded = False
