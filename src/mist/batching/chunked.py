"""Chunked prefill in the order of vLLM v1 (Sarathi-Serve): decodes first, then prefills in chunks, then admissions.

Every step takes one token per decode, or those that it verifies; admitted prompts and then waiting ones fill what is
left of the token budget. The budget admits nothing on a step that preempted.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from mist.batching import Budget, CohortView, Queue, decodes_alone
from mist.batching.orders import Order
from mist.batching.orders.fcfs import FCFS
from mist.registry import Named, register
from mist.request import Batch, Wait


@register("batching", "chunked")
@dataclass
class Chunked:
    """Mixed steps of at most `max_num_batched_tokens` tokens and `max_num_seqs` sequences."""

    max_num_batched_tokens: int = 2048
    max_num_seqs: int = 256
    order: Annotated[Order, Named("order")] = field(default_factory=FCFS)

    def __post_init__(self) -> None:
        if self.max_num_seqs < 1:
            raise ValueError(f"max_num_seqs is {self.max_num_seqs}; at least 1 would do")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens {self.max_num_batched_tokens} is below max_num_seqs {self.max_num_seqs}: "
                "decodes would starve; raise the first or lower the second"
            )

    @decodes_alone
    def next_batch(self, queue: Queue, cohort: CohortView, budget: Budget, now: int) -> Batch | Wait:
        if cohort.count:
            budget.grow_decodes()
        batch = Batch([], decode=True)
        tokens = self.max_num_batched_tokens - cohort.count * cohort.tokens_per_decode
        for task in queue.prefilling:
            chunk = min(task.remaining_tokens, tokens)
            if chunk <= 0 or not budget.grow(task, chunk):
                break
            batch.chunks.append((task, chunk))
            tokens -= chunk
        while tokens > 0 and queue.waiting and budget.num_running < self.max_num_seqs:
            task = queue.waiting[0]
            chunk = budget.admit(task, tokens)
            if not chunk:
                break
            batch.chunks.append((task, chunk))
            tokens -= chunk
        return batch if batch.chunks or cohort.count else Wait()
