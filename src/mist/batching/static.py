"""Static batching: admit only when nothing runs, then decode the whole batch until its last sequence ends.

The batch is formed from whatever waits at that moment; later arrivals wait for the next one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from mist.batching import Budget, CohortView, Queue, admit_whole, decodes_alone
from mist.batching.orders import Order
from mist.batching.orders.fcfs import FCFS
from mist.batching.packing import window_ends
from mist.registry import Named, register
from mist.request import Batch, Wait
from mist.units import NS_PER_MS


@register("batching", "static")
@dataclass
class Static:
    """Batches of at most `max_num_seqs` sequences; `max_num_batched_tokens` bounds the prompts of one batch.

    With `max_queue_delay_ms` a batch begins once it is full or its oldest task has waited so long.
    """

    max_num_batched_tokens: int = 16_384
    max_num_seqs: int = 32
    order: Annotated[Order, Named("order")] = field(default_factory=FCFS)
    max_queue_delay_ms: float = 0.0

    def __post_init__(self) -> None:
        if self.max_num_seqs < 1 or self.max_num_batched_tokens < 1:
            raise ValueError("max_num_seqs and max_num_batched_tokens must be at least 1")
        if self.max_queue_delay_ms < 0:
            raise ValueError(f"max_queue_delay_ms is {self.max_queue_delay_ms}; 0 or more would do")

    @decodes_alone
    def next_batch(self, queue: Queue, cohort: CohortView, budget: Budget, now: int) -> Batch | Wait:
        if not budget.num_running:
            if self.max_queue_delay_ms and queue.waiting:
                delay = round(self.max_queue_delay_ms * NS_PER_MS)
                until = window_ends(queue, self.max_num_seqs, self.max_num_batched_tokens, delay)
                if until > now:
                    return Wait(until)
            chunks = admit_whole(queue, budget, self.max_num_seqs, self.max_num_batched_tokens)
            if chunks:
                return Batch(chunks, decode=False)
        if cohort.count:
            budget.grow_decodes()
            return Batch([], decode=True)
        return Wait()
