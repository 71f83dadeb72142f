"""Preemption by swapping: the KV cache of a preempted decode waits in host memory and is not computed again.

A client's residents that do so, and the space in its host's memory; vLLM v0's preemption_mode swap. Copies take their
time before the step that they belong to computes; they share their link with nobody.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mist.network import HOST, Network
from mist.records import KV_SWAP, Records
from mist.request import Step, Task
from mist.residents import Residents
from mist.sharing import duration_ns

if TYPE_CHECKING:
    from mist.client import Client


class SwapSpace:
    """Room for `num_blocks` KV blocks of `client` in its host's memory; whole blocks are copied, one task at a time."""

    __slots__ = ("_client", "_due_ns", "_network", "_records", "block_bytes", "num_blocks", "tasks", "used")

    def __init__(self, client: Client, network: Network, records: Records, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.block_bytes = client.kv_bytes_per_token * client.residents.kv.block_size
        #: blocks of each task that is swapped out, and of all
        self.tasks: dict[Task, int] = {}
        self.used = 0
        self._client = client
        self._network = network
        self._records = records
        self._due_ns = 0

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
        """Nobody comes back for what is here."""
        self.tasks.clear()
        self.used = self._due_ns = 0

    def due_ns(self) -> int:
        """What the copies since the last call take, one after another, in ns."""
        due, self._due_ns = self._due_ns, 0
        return due

    def _copy(self, task: Task, num_blocks: int, sender: int, receiver: int) -> None:
        path = self._network.path(sender, receiver)
        num_bytes, now = num_blocks * self.block_bytes, self._client.now
        wire = max((duration_ns(num_bytes, channel.capacity_per_s) for channel in path.channels), default=0)
        start, self._due_ns = now + self._due_ns, self._due_ns + path.latency_ns + wire
        row = (task.request.index, KV_SWAP, sender, receiver, num_bytes, now, start, now + self._due_ns)
        self._records.transfers.append(row)


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


class _WithCopies:
    """A performance model whose steps begin with the copies of a swap space: those of its client, not estimates."""

    def __init__(self, perf: Any, client: Client, space: SwapSpace) -> None:
        self._perf = perf
        self._client = client
        self._space = space

    def __getattr__(self, name: str) -> Any:
        return getattr(self._perf, name)

    def step_time(self, step: Step) -> int:
        copies = self._space.due_ns() if step is self._client.step else 0
        num_ns: int = self._perf.step_time(step)
        return copies + num_ns


def give_swap_space(client: Client, network: Network, records: Records, num_blocks: int) -> SwapSpace:
    """Let `client`, which has `SwappingResidents`, swap to `num_blocks` of its host's memory."""
    assert isinstance(client.residents, SwappingResidents)
    space = client.residents.swap = SwapSpace(client, network, records, num_blocks)
    client.perf = _WithCopies(client.perf, client, space)
    client.decode_times = client.decoded = None  # each step is asked for
    return space
