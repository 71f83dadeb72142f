"""Channels that flows share max-min fairly: links, memory channels, PCIe, storage and the cores of a CPU alike.

Whoever moves bytes (or burns core time) starts a flow over the channels of its path and is called once all of it got
there; in between the rates change only when a flow joins or leaves. It never chooses a path, and knows no clients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from heapq import heapify, heappop, heappush, heapreplace
from math import inf
from operator import attrgetter
from typing import Any

from mist.errors import InvariantError
from mist.kernel import FOREVER, Kernel
from mist.units import NS_PER_S

#: rates closer than this are the same rate, which float arithmetic reached in two ways
_ALIKE = 1 + 1e-12
#: halves of a ns are rounded up, also where float arithmetic misses them by a hair
_HALF_UP = 0.5 + 1e-6


def duration_ns(size: float, per_s: float) -> int:
    """How long `size` units take at `per_s` units a second, to the nearest ns."""
    return int(size * NS_PER_S / per_s + _HALF_UP)


class Channel:
    """What flows share: `capacity_per_s` units (bytes; ns of core time) a second, infinite where it limits nobody.

    `num_flows` are on it now; `carried` are the units of those that have left it. `rated_per_s`: what it has unless it
    is slowed down.
    """

    __slots__ = (
        "_bundles", "_demand", "_left", "_num_open", "_visit", "capacity_per_s", "carried", "name", "num_flows",
        "rated_per_s",
    )  # fmt: skip

    def __init__(self, name: str, capacity_per_s: float) -> None:
        if not capacity_per_s > 0:
            raise InvariantError(f"{name} has a capacity of {capacity_per_s} a second")
        self.name = name
        self.capacity_per_s = self.rated_per_s = capacity_per_s
        self.num_flows = 0
        self.carried = 0
        self._bundles: dict[_Bundle, None] = {}
        self._visit = 0
        #: what its flows would take if they met nobody anywhere
        self._demand = 0.0
        # while rates are filled: capacity that is not given away, and flows that have no rate yet
        self._left = 0.0
        self._num_open = 0

    def _binds(self, more: float = 0.0) -> bool:
        """Whether its flows, and `more`, could want more than it has; else it keeps nobody apart."""
        return self._demand + more > self.capacity_per_s * _ALIKE


class Flow:
    """`size` units on their way over `channels` since `start_ns`, in flight until the last of them has left."""

    __slots__ = (
        "_bundle", "_until", "argument", "channels", "deliver", "latency_ns", "max_rate_per_s", "size", "start_ns",
    )  # fmt: skip

    def __init__(
        self, channels: Sequence[Channel], size: int, start_ns: int, latency_ns: int, max_rate_per_s: float
    ) -> None:
        self.channels = channels
        self.size = size
        self.start_ns = start_ns
        self.latency_ns = latency_ns
        self.max_rate_per_s = max_rate_per_s
        self.deliver: Callable[[Any, int], None]
        self.argument: Any
        self._bundle: _Bundle | None = None
        self._until = 0.0

    @property
    def rate_per_s(self) -> float:
        """Units a second that leave now; 0 once all of them have."""
        return self._bundle.rate if self._bundle else 0.0

    def remaining(self, now: int) -> float:
        """Units that have not left at `now`."""
        return min(self.size, max(0.0, self._until - self._bundle.served_at(now))) if self._bundle else 0.0


class _Bundle:
    """Flows over the same channels under the same cap: they proceed alike, each by `served` units since `anchor_ns`.

    A flow that joins when s units are served ends at s + its size, so joins and leaves move no other flow of its
    bundle. `anchor_ns` moves only when the rate changes, so that ends which nothing touches stay where they are.
    `bound`: what a flow gets at most, alone; `end_ns`: when the first ends.
    """

    __slots__ = (
        "_visit", "anchor_ns", "bound", "channels", "component", "end_ns", "fair", "flows", "key", "rate", "served",
    )  # fmt: skip

    def __init__(self, key: tuple[float, tuple[Channel, ...]], component: _Component, now: int) -> None:
        self.key = key
        self.bound, self.channels = key
        self.end_ns = FOREVER
        self.flows: list[tuple[float, int, Flow]] = []
        self.component = component
        self.rate = 0.0
        self.served: float = 0
        self.anchor_ns = now
        self.fair = 0.0
        self._visit = 0

    def served_at(self, now: int) -> float:
        return self.served + self.rate * (now - self.anchor_ns) / NS_PER_S if now > self.anchor_ns else self.served

    def proceed(self, rate: float, now: int) -> None:
        """At `rate` from now on."""
        self.served = self.served_at(now)
        self.anchor_ns = now
        self.rate = rate
        self.foresee()

    def foresee(self) -> None:
        """When the first of its flows ends, at this rate."""
        self.end_ns = self.anchor_ns + duration_ns(self.flows[0][0] - self.served, self.rate)


class _Component:
    """Bundles that share channels, over some others perhaps, so that their rates depend on each other.

    Its rates are those of `shared_ns`; it has one event pending at `posted_ns`, not after `end_ns`, when the first of
    its flows ends.
    """

    __slots__ = ("bundles", "end_ns", "posted_ns", "shared_ns")

    def __init__(self) -> None:
        self.bundles: list[_Bundle] = []
        self.end_ns = FOREVER
        self.posted_ns = FOREVER
        self.shared_ns = -1


class Sharing:
    """All flows of a run. Those that end at an instant leave before others join at it, so that order doesn't matter."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        #: in flight, oldest first
        self.flows: dict[Flow, None] = {}
        #: by path: the smallest capacity, and the channels that limit anybody
        self._limits: dict[tuple[Channel, ...], tuple[float, tuple[Channel, ...]]] = {}
        self._bundles: dict[tuple[float, tuple[Channel, ...]], _Bundle] = {}
        self._num_started = 0
        self._num_visits = 0

    def start(
        self,
        channels: Sequence[Channel],
        size: int,
        deliver: Callable[[Any, int], None],
        argument: Any,
        now: int,
        *,
        max_rate_per_s: float = inf,
        latency_ns: int = 0,
    ) -> Flow:
        """Send `size` units over all `channels` at once; `deliver(argument, time_ns)` comes latency after the last.

        Every flow gets its max-min fair share, at most `max_rate_per_s`: none could be faster without slowing down one
        that is no faster than it. Alone it takes `duration_ns(size, the smallest capacity)`.
        """
        flow = Flow(channels, size, now, latency_ns, max_rate_per_s)
        flow.deliver, flow.argument = deliver, argument
        key = self._key(flow)
        for channel in key[1]:
            if channel._bundles and channel._binds(key[0]):
                self._end_due(channel, now)
        for channel in channels:
            channel.num_flows += 1
        self.flows[flow] = None
        if size and key[0] < inf:
            self._join(flow, key, size, now)
        else:
            self._deliver(flow, now)
        return flow

    def stop(self, flow: Flow, now: int) -> None:
        """`flow` goes no further: what has not left never will, and nobody is told."""
        if flow not in self.flows:
            return
        left = self._take_out(flow, now)
        del self.flows[flow]
        for channel in flow.channels:
            channel.num_flows -= 1
            channel.carried += flow.size - round(left)

    def change(self, channel: Channel, capacity_per_s: float, now: int) -> None:
        """`channel` has `capacity_per_s` from `now` on, finite before and after; all on it share that from now on."""
        self._end_due(channel, now)
        flows = [flow for _, flow in sorted((n, flow) for bundle in channel._bundles for _, n, flow in bundle.flows)]
        left = [self._take_out(flow, now) for flow in flows]
        channel.capacity_per_s = capacity_per_s
        self._limits.clear()
        for flow, size in zip(flows, left, strict=True):
            self._join(flow, self._key(flow), size, now)

    def _key(self, flow: Flow) -> tuple[float, tuple[Channel, ...]]:
        """Whom it proceeds alike with: its bound, what it gets at most alone, and the channels that limit anybody."""
        channels = tuple(flow.channels)
        limits = self._limits.get(channels)
        if limits is None:
            bound = min([channel.capacity_per_s for channel in channels], default=inf)
            limits = self._limits[channels] = bound, tuple([c for c in channels if c.capacity_per_s < inf])
        return limits if limits[0] <= flow.max_rate_per_s else (flow.max_rate_per_s, limits[1])

    def _take_out(self, flow: Flow, now: int) -> float:
        """Take `flow` out of its bundle; the units that have not left."""
        bundle, left = flow._bundle, flow.remaining(now)
        assert bundle is not None
        flow._bundle = None
        bundle.flows = [each for each in bundle.flows if each[2] is not flow]
        heapify(bundle.flows)
        component = bundle.component
        self._leave(bundle)
        self._share_again(component, [each for each in component.bundles if each.flows], now)
        return left

    def _join(self, flow: Flow, key: tuple[float, tuple[Channel, ...]], size: float, now: int) -> None:
        bundle = self._bundles.get(key)
        if bundle is None:
            bundle = self._bundles[key] = _Bundle(key, _Component(), now)
        bound, is_bound = bundle.bound, False
        for channel in bundle.channels:
            channel._bundles[bundle] = None
            channel._demand = demand = channel._demand + bound
            if demand > channel.capacity_per_s * _ALIKE:
                is_bound = True
        self._num_started += 1
        flow._bundle = bundle
        if not bundle.flows and not is_bound:
            self._begin_alone(flow, bundle, size, now)
            return
        flow._until = bundle.served_at(now) + size
        heappush(bundle.flows, (flow._until, self._num_started, flow))
        if bundle.rate:
            bundle.foresee()
        self._num_visits += 1
        self._share(bundle, now)

    def _begin_alone(self, flow: Flow, bundle: _Bundle, size: float, now: int) -> None:
        """`flow` is all of a new `bundle` and gets its bound, as no channel binds it: nobody's rate depends on it."""
        bundle.flows.append((size, self._num_started, flow))
        bundle.rate = bundle.bound
        flow._until = size
        component = bundle.component
        component.bundles, component.shared_ns = [bundle], now
        component.posted_ns = component.end_ns = bundle.end_ns = end = now + duration_ns(size, bundle.bound)
        self.kernel.at(end, self._due, component)

    def _share(self, seed: _Bundle, now: int) -> None:
        """Recompute the rates of all that depend on `seed`, which become one component, and when the next flow ends."""
        bundles, binding = self._connected(seed)
        component = seed.component
        for bundle in bundles:
            other = bundle.component
            if other is not component:
                other.bundles, other.end_ns = [], FOREVER
                bundle.component = component
        component.bundles, component.shared_ns = bundles, now
        if binding:
            _fill(bundles, binding)
        else:
            seed.fair = seed.bound
        for bundle in bundles:
            if not (bundle.rate <= bundle.fair * _ALIKE and bundle.fair <= bundle.rate * _ALIKE):
                bundle.proceed(bundle.fair, now)
        component.end_ns = end = min([bundle.end_ns for bundle in bundles])
        if end < component.posted_ns:
            component.posted_ns = end
            self.kernel.at(end, self._due, component)

    def _connected(self, seed: _Bundle) -> tuple[list[_Bundle], list[Channel]]:
        """`seed` and all that share channels with it, over others perhaps; and the channels that bind them."""
        visit = self._num_visits
        seed._visit = visit
        found, binding = [seed], []
        for bundle in found:
            for channel in bundle.channels:
                if channel._visit == visit:
                    continue
                channel._visit = visit
                if channel._binds():
                    binding.append(channel)
                    for other in channel._bundles:
                        if other._visit != visit:
                            other._visit = visit
                            found.append(other)
        return found, binding

    def _due(self, component: _Component, now: int) -> None:
        if now != component.posted_ns:
            return  # an earlier event was posted since
        component.posted_ns = FOREVER
        if component.end_ns <= now:
            self._end(component, now)
        elif component.end_ns < FOREVER:
            component.posted_ns = component.end_ns
            self.kernel.at(component.end_ns, self._due, component)

    def _end_due(self, channel: Channel, now: int) -> None:
        """Flows that end now leave `channel` before another joins, unless they joined now."""
        for bundle in list(channel._bundles):
            component = bundle.component
            if component.end_ns <= now and component.shared_ns < now:
                self._end(component, now)

    def _end(self, component: _Component, now: int) -> None:
        """Flows of `component` that are due leave it, oldest first; what remains may fall into several."""
        if len(component.bundles) == 1 and len(component.bundles[0].flows) == 1:
            (bundle,) = component.bundles
            _, _, flow = bundle.flows.pop()
            component.bundles, component.end_ns = [], FOREVER
            self._leave(bundle)
            self._deliver(flow, now)
            return
        ended: list[tuple[int, Flow]] = []
        remaining: list[_Bundle] = []
        for bundle in component.bundles:
            while bundle.end_ns <= now:
                _, number, flow = heappop(bundle.flows)
                ended.append((number, flow))
                self._leave(bundle)
            if bundle.flows:
                remaining.append(bundle)
        for _, flow in sorted(ended):
            self._deliver(flow, now)
        self._share_again(component, remaining, now)

    def _share_again(self, component: _Component, remaining: list[_Bundle], now: int) -> None:
        """Some flows of `component` are gone: the rates of what remains."""
        component.bundles, component.end_ns = [], FOREVER
        self._num_visits += 1
        spare = _Component()
        for bundle in remaining:
            bundle.component = spare
        for bundle in remaining:
            if bundle._visit != self._num_visits:
                bundle.component, component = component, _Component()  # the first keeps the event
                self._share(bundle, now)

    def _leave(self, bundle: _Bundle) -> None:
        """The first flow of `bundle` left it."""
        if bundle.flows:
            bundle.foresee()
            for channel in bundle.channels:
                channel._demand -= bundle.bound
            return
        bundle.end_ns = FOREVER
        del self._bundles[bundle.key]
        for channel in bundle.channels:
            del channel._bundles[bundle]
            # with nobody left, nothing is left of what float arithmetic may have left
            channel._demand = channel._demand - bundle.bound if channel._bundles else 0.0

    def _deliver(self, flow: Flow, now: int) -> None:
        flow._bundle = None
        del self.flows[flow]
        for channel in flow.channels:
            channel.num_flows -= 1
            channel.carried += flow.size
        self.kernel.at(now + flow.latency_ns, flow.deliver, flow.argument)


def _fill(bundles: list[_Bundle], binding: list[Channel]) -> None:
    """Set `fair` of every bundle: progressive filling (Bertsekas and Gallager, Data Networks, 2nd ed., 6.5.2).

    All rates rise together; the flows of a channel that is full stop there, and those at their bound. A channel's equal
    share of what is left only grows while others stop, so the heap of shares may lag behind and is put right when read.
    """
    heap: list[tuple[float, int, Channel]] = []
    for channel in binding:
        channel._left, channel._num_open = channel.capacity_per_s, channel.num_flows
        heap.append((channel._left / channel._num_open, len(heap), channel))
    heapify(heap)
    for bundle in bundles:
        bundle.fair = 0.0
    bounded = sorted(bundles, key=_BOUND, reverse=True)
    level = 0.0
    while bounded:
        if bounded[-1].fair:
            bounded.pop()
            continue
        share = bounded[-1].bound
        stopping: Iterable[_Bundle] = (bounded[-1],)
        if heap and heap[0][0] < share:
            share, order, channel = heap[0]
            if not channel._num_open:
                heappop(heap)
                continue
            if channel._left > share * channel._num_open * _ALIKE:
                heapreplace(heap, (channel._left / channel._num_open, order, channel))
                continue
            stopping = channel._bundles
        if share > level * _ALIKE:
            level = share
        for bundle in stopping:
            if not bundle.fair:
                bundle.fair = level
                num_flows = len(bundle.flows)
                taken = level * num_flows
                for channel in bundle.channels:
                    channel._left -= taken
                    channel._num_open -= num_flows


_BOUND = attrgetter("bound")
