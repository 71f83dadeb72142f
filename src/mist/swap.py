"""Preemption by swapping: the KV cache of a preempted decode waits in host memory and is not computed again.

A client's residents that do so, and the space in its host's memory; vLLM v0's preemption_mode swap. Copies are
transfers, and the step that they belong to computes once they are over; nobody else waits for them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mist.network import HOST, Network
from mist.perf import Demand
from mist.records import KV_SWAP
from mist.request import Task
from mist.residents import Residents

if TYPE_CHECKING:
    from mist.client import Client


@dataclass(slots=True, eq=False)
class _Step:
    """A step that began at `begin_ns` and computes for `alone_ns` after its copies; whom to tell at its end."""

    begin_ns: int
    alone_ns: int
    done: Callable[[Any, int], None]
    argument: Any


class SwapSpace:
    """Room for `num_blocks` KV blocks of `client` in its host's memory; whole blocks are copied, one task at a time.

    A step with copies takes as long as these, over channels that they share, and then what it takes without them.
    """

    __slots__ = ("_client", "_due", "_network", "_step", "block_bytes", "num_blocks", "tasks", "used")

    def __init__(self, client: Client, network: Network, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.block_bytes = client.kv_bytes_per_token * client.residents.kv.block_size
        #: blocks of each task that is swapped out, and of all
        self.tasks: dict[Task, int] = {}
        self.used = 0
        self._client = client
        self._network = network
        #: copies that the next step begins with, or the one in flight still waits for: request, from, to, blocks
        self._due: deque[tuple[int, int, int, int]] = deque()
        self._step: _Step | None = None

    def swap_out(self, task: Task, num_blocks: int) -> bool:
        """Copy the blocks of `task` to the host; False, and nothing has changed, if they have no room there."""
        if self.used + num_blocks > self.num_blocks:
            return False
        self.tasks[task] = num_blocks
        self.used += num_blocks
        self._copy(task, num_blocks, self._client.index, HOST)
        return True

    def swap_in(self, task: Task) -> None:
        """Copy the blocks of `task`, which has room again, to the device."""
        self._copy(task, self.tasks[task], HOST, self._client.index)
        self.forget(task)

    def forget(self, task: Task) -> None:
        """What `task` has here, if anything, is needed no more."""
        self.used -= self.tasks.pop(task, 0)

    def clear(self) -> None:
        """Nobody comes back for what is here, and nobody waits for copies."""
        self.tasks.clear()
        self.used = 0
        self._due.clear()
        self._step = self._client.shares = None

    # --- what its client's next step shares with others ---

    def work(self, demand: Demand, alone_ns: int, done: Callable[[Any, int], None], argument: Any, now: int) -> _Step:
        """A step that begins now: its copies, one after another, then `alone_ns`; `done(argument, time_ns)` ends it."""
        self._step = step = _Step(now, alone_ns, done, argument)
        self._next(step, now)
        return step

    def stop(self, step: _Step, now: int) -> None:
        """The step ends for nobody, and so does what it copies."""
        self._step = self._client.shares = None

    def _copy(self, task: Task, num_blocks: int, sender: int, receiver: int) -> None:
        self._due.append((task.request.index, sender, receiver, num_blocks))
        self._client.shares = self

    def _next(self, step: _Step, now: int) -> None:
        if step is not self._step:
            return  # what has left before its client was lost arrives for nobody
        if self._due:
            request, sender, receiver, num_blocks = self._due.popleft()
            num_bytes = num_blocks * self.block_bytes
            self._network.send(request, KV_SWAP, sender, receiver, num_bytes, self._next, step, now,
                               queued_ns=step.begin_ns)  # fmt: skip
        else:
            self._client.kernel.at(now + step.alone_ns, self._over, step)

    def _over(self, step: _Step, now: int) -> None:
        if step is self._step:
            self._step = self._client.shares = None
            step.done(step.argument, now)


class SwappingResidents(Residents):
    """Preempts decodes to `swap`, which its client is given before the first event; where that is full, as ever.

    Those that are swapped out wait among the decodes that were handed over, in front of them, and come back as these
    come in. First come, first served admits nobody before. A prompt that is half computed is computed again, and so are
    decodes that share blocks with others.
    """

    __slots__ = ("swap",)

    swap: SwapSpace

    def preempt(self, task: Task) -> None:
        if task.admission in self.prefilling_tasks or task.shared is not None:
            super().preempt(task)
            return
        num_tokens = self.cohort.context(task)
        has_room = self.swap.swap_out(task, self.kv.blocks_for(num_tokens))
        super().preempt(task)
        if has_room:
            self.waiting.remove(task)
            self.pending_tokens -= task.remaining_tokens
            task.target_tokens = task.computed_tokens = task.inherited_tokens = num_tokens
            self.handed_over.appendleft(task)

    def let_in(self, task: Task) -> None:
        super().let_in(task)
        if task in self.swap.tasks:
            self.swap.swap_in(task)

    def admit(self, task: Task, max_tokens: int, *, whole: bool = False) -> int:
        if self.swap.tasks and self.ranks is None:
            return 0
        return super().admit(task, max_tokens, whole=whole)

    def drop(self, task: Task) -> None:
        self.swap.forget(task)
        super().drop(task)

    def succeed(self, before: Residents) -> None:
        assert isinstance(before, SwappingResidents)
        super().succeed(before)
        self.swap = before.swap
        self.swap.clear()

    def comes_before(self, waiting: Task, handed_over: Task) -> bool:
        if self.ranks is None and handed_over in self.swap.tasks:
            return False
        return super().comes_before(waiting, handed_over)


def give_swap_space(client: Client, network: Network, num_blocks: int) -> SwapSpace:
    """Let `client`, which has `SwappingResidents`, swap to `num_blocks` of its host's memory."""
    assert isinstance(client.residents, SwappingResidents)
    space = client.residents.swap = SwapSpace(client, network, num_blocks)
    return space
