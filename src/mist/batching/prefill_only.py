"""Whole prompts and nothing else: for the prefill pool of a disaggregated deployment.

What `continuous` does where nothing decodes; the name says it, and a scenario refuses it for a client that decodes.
It never computes a decode step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from mist.batching import Budget, CohortView, Queue, admit_whole
from mist.batching.orders import Order
from mist.batching.orders.fcfs import FCFS
from mist.registry import Named, register
from mist.request import PREFILL, Batch, Wait


@register("batching", "prefill_only")
@dataclass
class PrefillOnly:
    """Steps of whole prompts, together at most `max_num_batched_tokens` tokens; a longer one is computed alone."""

    serves: ClassVar[tuple[str, ...]] = (PREFILL,)
    max_num_batched_tokens: int = 8192
    max_num_seqs: int = 256
    order: Annotated[Order, Named("order")] = field(default_factory=FCFS)

    def __post_init__(self) -> None:
        if self.max_num_seqs < 1 or self.max_num_batched_tokens < 1:
            raise ValueError("max_num_seqs and max_num_batched_tokens must be at least 1")

    def next_batch(self, queue: Queue, cohort: CohortView, budget: Budget, now: int) -> Batch | Wait:
        chunks = admit_whole(queue, budget, self.max_num_seqs, self.max_num_batched_tokens)
        return Batch(chunks, decode=False) if chunks else Wait()
