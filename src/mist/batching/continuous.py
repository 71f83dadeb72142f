"""Continuous batching, prefill first (Orca; vLLM v0): a step computes whole prompts or decodes, never both.

Waiting prompts are admitted whenever they fit, so a burst of arrivals stalls the decodes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from mist.batching import Budget, CohortView, Queue, admit_whole, decodes_alone
from mist.batching.orders import Order
from mist.batching.orders.fcfs import FCFS
from mist.registry import Named, register
from mist.request import Batch, Wait


@register("batching", "continuous")
@dataclass
class Continuous:
    """Prefill steps of at most `max_num_batched_tokens` tokens (a longer prompt runs alone), else decode steps.

    `max_num_seqs`: running sequences at most.
    """

    max_num_batched_tokens: int = 8192
    max_num_seqs: int = 256
    order: Annotated[Order, Named("order")] = field(default_factory=FCFS)

    def __post_init__(self) -> None:
        if self.max_num_seqs < 1 or self.max_num_batched_tokens < 1:
            raise ValueError("max_num_seqs and max_num_batched_tokens must be at least 1")

    @decodes_alone
    def next_batch(self, queue: Queue, cohort: CohortView, budget: Budget, now: int) -> Batch | Wait:
        chunks = admit_whole(queue, budget, self.max_num_seqs, self.max_num_batched_tokens)
        if chunks:
            return Batch(chunks, decode=False)
        if cohort.count:
            budget.grow_decodes()
            return Batch([], decode=True)
        return Wait()
