"""Lanes: what the schedulers of one replica share. Attention groups keep step, and lanes contend for the stages.

A lane stands between the kernel and its clients, one per attention group: it starts and ends their steps together. It
never chooses a batch, prices a step or moves a task.
"""

from __future__ import annotations

from collections.abc import Sequence

from mist.client import Client
from mist.kernel import Kernel
from mist.perf import Demand


class Stages:
    """The pipeline stages of a replica: each holds one step at a time, and steps pass all of them in order.

    Performance models tell the time through all stages, so each of P stages is taken to hold a step for 1/P of what
    it lasts alone; host time and the messages between stages are spread likewise, and a step that has left a stage
    waits for the next one without blocking it. Step i leaves stage s at C(i, s) = max(C(i, s-1), C(i-1, s)) + d_i / P:
    a permutation flow shop (Pinedo, Scheduling: Theory, Algorithms, and Systems, section 6.1). Instants are kept in
    units of 1/P ns, so that equal stages are exactly equal; a step ends in the ns in which it leaves the last stage.
    """

    __slots__ = ("_free",)

    def __init__(self, num_stages: int) -> None:
        self._free = [0] * num_stages

    def leave(self, now: int, duration: int) -> int:
        """When a step that lasts `duration` ns alone and comes at `now` is through; `now` never falls between calls."""
        free = self._free
        at = now * len(free)
        for stage, free_from in enumerate(free):
            at = free[stage] = max(at, free_from) + duration
        return at // len(free)

    def void(self, now: int) -> None:
        """All steps under way end for nobody."""
        self._free = [min(at, now * len(self._free)) for at in self._free]


class Lane:
    """The attention groups of one replica that run in lockstep, with one common step in flight.

    A common step begins when one is due and a group has work. The experts of a layer take, and wait for, everybody's
    tokens: each group's part is priced once all have their batches, and the step lasts as long as the longest. A group
    without work takes part with a dummy batch, which has no tokens and no row in the records; what reaches it meanwhile
    starts with the next common step.
    """

    def __init__(self, clients: Sequence[Client], stages: Stages, kernel: Kernel) -> None:
        self.index = clients[0].index
        self.woken = False
        self.ends_ns = -1
        self.clients = clients
        self.stages = stages
        self.kernel = kernel
        #: the groups with work in the common step in flight
        self.stepping: list[Client] = []
        #: of these, how many still copy KV caches before it enters the stages, and what it takes there
        self._num_copying = 0
        self._duration = 0
        for client in clients:
            client.waker = self

    @property
    def emits(self) -> bool:
        return any(client.emits for client in self.clients)

    def wake(self, client: Client) -> None:
        """Let `client` take part in the next common step, which begins now unless one is in flight."""
        client.woken = True
        if not self.stepping:
            self.kernel.wake(self)

    def void(self, client: Client, now: int) -> bool:
        """The replica goes down: the step that `client` has in flight ends for nobody; False if it has none."""
        client.woken = False
        if client not in self.stepping:
            return False
        self.stepping.remove(client)
        if not self.stepping:
            self.kernel.void(self, now)
            self.stages.void(now)
        return True

    def start_step(self, now: int) -> None:
        """Begin a common step of all groups that have work. It never runs ahead: other lanes use the stages too."""
        stepping, num_groups = self.stepping, len(self.clients)
        for client in self.clients:
            if client.woken:
                client.woken = False
                if client.begin_step(now):
                    stepping.append(client)
        if not stepping:
            return
        if num_groups > 1:
            mean = -(-sum(client.step.num_tokens for client in stepping) // num_groups)
            for client in stepping:
                client.step.shared_tokens = mean
        self._duration = max(client.price_step() for client in stepping)
        copying = [client.shares for client in stepping if client.shares is not None]
        self._num_copying = len(copying)
        for each in copying:
            each.work(Demand(), 0, self._copied, None, now)
        if not copying:
            self._enter(now)

    def _copied(self, _: None, now: int) -> None:
        self._num_copying -= 1
        if not self._num_copying:
            self._enter(now)

    def _enter(self, now: int) -> None:
        self.kernel.step_ends(self, self.stages.leave(now, self._duration))

    def finish_step(self, now: int) -> None:
        """The common step ends at `now`, in order of the groups; the kernel wakes the lane."""
        stepped, self.stepping = self.stepping, []
        for client in stepped:
            client.finish_step(now)
            client.woken = True


def share_stages(clients: Sequence[Client], num_stages: int, kernel: Kernel) -> None:
    """Make `clients` one replica of `num_stages` lanes: as many attention groups in each, lane after lane."""
    stages, num_groups = Stages(num_stages), len(clients) // num_stages
    for start in range(0, len(clients), num_groups):
        Lane(clients[start : start + num_groups], stages, kernel)
