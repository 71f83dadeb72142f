"""Decodes and nothing else: for the decode pool of a disaggregated deployment, whose KV caches are handed over.

What a preemption took is computed again, each context whole, in a step without decodes. It never computes a prompt
that has not been preempted here; a scenario refuses it for a client that serves anything but decodes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from mist.batching import Budget, CohortView, Queue
from mist.batching.orders import Order
from mist.batching.orders.fcfs import FCFS
from mist.registry import Named, register
from mist.request import DECODE, Batch, Wait


@register("batching", "decode_only")
@dataclass
class DecodeOnly:
    """Steps of all decodes, at most `max_num_seqs`; a preempted context is computed again by itself, once it fits.

    `max_num_batched_tokens` sizes the largest step for the memory of its activations; it limits no context.
    """

    serves: ClassVar[tuple[str, ...]] = (DECODE,)
    max_num_batched_tokens: int = 8192
    max_num_seqs: int = 256
    order: Annotated[Order, Named("order")] = field(default_factory=FCFS)

    def __post_init__(self) -> None:
        if self.max_num_seqs < 1 or self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError("max_num_batched_tokens must be at least max_num_seqs, and that at least 1")

    def next_batch(self, queue: Queue, cohort: CohortView, budget: Budget, now: int) -> Batch | Wait:
        if queue.waiting and budget.num_running < self.max_num_seqs:
            task = queue.waiting[0]
            if chunk := budget.admit(task, task.remaining_tokens, whole=True):
                return Batch([(task, chunk)], decode=False)
        if cohort.count:
            budget.grow_decodes()
        return Batch([], decode=True) if cohort.count else Wait()
