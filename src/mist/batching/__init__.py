"""Batching policies: which tasks of a client make up its next step. One file per policy.

A policy decides and reserves KV blocks through `Budget`; it never sees the clock's future, true output lengths or
other clients. It sees the decode cohort as sums (count, context), since decoding is lazy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

from mist.request import Batch, Task, Wait

#: what `decodes_alone` leaves on a method
DECODES_ALONE = "decodes_alone"


Decision = TypeVar("Decision", bound=Callable[..., Batch | Wait])


class Queue(Protocol):
    """A client's tasks that still have tokens to compute."""

    @property
    def waiting(self) -> Sequence[Task]:
        """Tasks not yet admitted, by the client's order; first come first served has preempted ones in front."""
        ...

    @property
    def prefilling(self) -> Sequence[Task]:
        """Admitted tasks with tokens left to compute, in order of admission."""
        ...

    def __len__(self) -> int:
        """Number of waiting tasks."""
        ...


class CohortView(Protocol):
    """The sequences that are decoding on this client, as sums; a step computes `tokens_per_decode` for each."""

    count: int
    sum_context: int
    tokens_per_decode: int
    #: tokens of a KV block
    block_size: int

    def generated(self, task: Task) -> int:
        """Tokens that a task which decodes here (`join_step` >= 0) has generated since it joined."""
        ...


class Budget(Protocol):
    """The client's KV blocks and sequence slots; reserving through it is all that a policy may change."""

    @property
    def num_running(self) -> int:
        """Admitted tasks, prefilling and decoding."""
        ...

    @property
    def running(self) -> Mapping[int, Task]:
        """These by `admission`, in its order, for a policy that has to look at each: takes as long as they are many."""
        ...

    @property
    def num_available_blocks(self) -> int:
        """Blocks that are free or hold unreferenced cached content."""
        ...

    def grow_decodes(self) -> int:
        """Reserve the tokens of a step for every decode, preempting from the running tail if blocks run out.

        Another order than first come, first served preempts whoever is last in it. Returns the number of tasks
        preempted. They are waiting again, and nothing is admitted before the next step, as in vLLM.
        """
        ...

    def grow(self, task: Task, num_tokens: int) -> bool:
        """Reserve blocks for `num_tokens` more of an admitted task, preempting as above; False if it had to go itself.

        A policy that has chunks of several prompts takes those out of its batch whose task had to go (`admission` < 0).
        """
        ...

    def admit(self, task: Task, max_tokens: int, *, whole: bool = False) -> int:
        """Admit a waiting task: look up its prefix, reserve its first chunk, and move it to the running tasks.

        Returns the tokens of the chunk (at most `max_tokens`; with `whole` all that remains or nothing), 0 if blocks
        or budget don't suffice or this step has preempted (nothing has then changed), or where the task has left the
        queue, since the KV cache of its prefix is fetched.
        """
        ...


class BatchingPolicy(Protocol):
    """Registered under the kind `batching`; a dataclass whose fields are its parameters.

    One that takes tasks from the front of the queue may have a field `order` (`mist.batching.orders`), which the
    client then keeps; without it, first come is first served. A class attribute `serves` names the stage kinds that it
    can serve, where these aren't all; one `reserves_output`, a bool, goes before that of the engine's profile;
    `times_steps`, a bool, has it asked before every step, whatever is marked.
    """

    max_num_seqs: int
    max_num_batched_tokens: int

    def next_batch(self, queue: Queue, cohort: CohortView, budget: Budget, now: int) -> Batch | Wait:
        """The next step's batch at time `now` (ns), or `Wait`."""
        ...


def decodes_alone(next_batch: Decision) -> Decision:
    """Mark a `next_batch` that, where nothing prefills and the first that waits, if any does, can't be admitted, grows
    the decodes and runs them, whatever the time: it admits in order.

    The client then does that itself, and asks only where there is something to decide.
    """
    setattr(next_batch, DECODES_ALONE, True)
    return next_batch


def is_timing(policy: BatchingPolicy) -> bool:
    """Whether `policy` tells how long steps take by when it is asked."""
    return bool(getattr(policy, "times_steps", False))


def admit_whole(queue: Queue, budget: Budget, max_num_seqs: int, max_tokens: int) -> list[tuple[Task, int]]:
    """Admit waiting tasks in the order of the queue, each whole, within `max_tokens`; a longer prompt runs alone."""
    chunks: list[tuple[Task, int]] = []
    tokens = max_tokens
    while queue.waiting and budget.num_running < max_num_seqs:
        task = queue.waiting[0]
        chunk = budget.admit(task, tokens if chunks else max(tokens, task.remaining_tokens), whole=True)
        if not chunk:
            break
        chunks.append((task, chunk))
        tokens -= chunk
    return chunks
