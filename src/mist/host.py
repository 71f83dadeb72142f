"""A host: the cores and memory channels of a node, shared by the clients that work on it and by what is fetched there.

A client's step takes what its performance model says where it has the host to itself, and longer where others slow it
down. It knows nothing of clients' tasks or of paths between nodes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mist.perf import Demand
from mist.sharing import Channel, Flow, Sharing
from mist.units import NS_PER_S


@dataclass(slots=True, eq=False)
class Work:
    """A step under way: how many of its parts aren't over, and whom to tell, unless it `is_void`."""

    num_open: int
    done: Callable[[Any, int], None]
    argument: Any
    flows: list[Flow] = field(default_factory=list)
    is_void: bool = False


class Host:
    """`cores` (in ns of core time a second) and `dram` (bytes a second), which clients and transfers share."""

    def __init__(self, cores: Channel, dram: Channel, sharing: Sharing) -> None:
        self.cores = cores
        self.dram = dram
        self.sharing = sharing

    def work(self, demand: Demand, alone_ns: int, done: Callable[[Any, int], None], argument: Any, now: int) -> Work:
        """Work that takes `alone_ns` where nothing else is here; `done(argument, time_ns)` comes at its end.

        Core time and memory traffic are spread evenly over it, so that alone each needs all of that time, and the
        slower of the two ends it where others take their fair shares.
        """
        parts = [(self.cores, demand.core_ns), (self.dram, demand.dram_bytes)]
        under_way = Work(sum(size > 0 for _, size in parts), done, argument)
        if not under_way.num_open:
            self.sharing.kernel.at(now + alone_ns, self._over, under_way)
        for channel, size in parts:
            if size:
                rate = size * NS_PER_S / alone_ns
                flow = self.sharing.start((channel,), size, self._part_over, under_way, now, max_rate_per_s=rate)
                under_way.flows.append(flow)
        return under_way

    def stop(self, work: Work, now: int) -> None:
        """Nobody does `work` any more, and nobody is told of its end."""
        work.is_void = True
        for flow in work.flows:
            self.sharing.stop(flow, now)

    def _part_over(self, work: Work, now: int) -> None:
        work.num_open -= 1
        if not work.num_open:
            self._over(work, now)

    def _over(self, work: Work, now: int) -> None:
        if not work.is_void:
            work.done(work.argument, now)
