"""Whole prompts and decodes in one step: the iteration-level batching of Orca, without chunks.

A prompt never waits for decodes: one that doesn't fit beside them is computed before they go on. It never splits a
prompt.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from mist.batching import Budget, CohortView, Queue, admit_whole
from mist.batching.orders import Order
from mist.batching.orders.fcfs import FCFS
from mist.batching.packing import admit_within
from mist.registry import Named, register
from mist.request import Batch, Wait


@register("batching", "mixed")
@dataclass
class Mixed:
    """Steps of at most `max_num_batched_tokens` tokens and `max_num_seqs` sequences, all prompts whole.

    Decodes reserve their KV blocks first, so that no prompt is let in that has to go at once. While the first prompt
    that waits is longer than what they leave of the tokens, steps are of prompts alone, a longer one by itself.
    """

    max_num_batched_tokens: int = 8192
    max_num_seqs: int = 256
    order: Annotated[Order, Named("order")] = field(default_factory=FCFS)

    def __post_init__(self) -> None:
        if self.max_num_seqs < 1 or self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens {self.max_num_batched_tokens} is below max_num_seqs {self.max_num_seqs}, or "
                "that is below 1: decodes would starve"
            )

    def next_batch(self, queue: Queue, cohort: CohortView, budget: Budget, now: int) -> Batch | Wait:
        tokens = self.max_num_batched_tokens - cohort.count * cohort.tokens_per_decode
        if queue.waiting and queue.waiting[0].remaining_tokens > tokens:
            alone = admit_whole(queue, budget, self.max_num_seqs, self.max_num_batched_tokens)
            if alone:
                return Batch(alone, decode=False)
        if cohort.count:
            budget.grow_decodes()
        chunks = admit_within(queue, budget, self.max_num_seqs, tokens)
        return Batch(chunks, decode=cohort.count > 0) if chunks or cohort.count else Wait()
