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
from mist.batching.packing import admit_chunks, go_on
from mist.registry import Named, register
from mist.request import Batch, Wait


@register("batching", "chunked")
@dataclass
class Chunked:
    """Mixed steps of at most `max_num_batched_tokens` tokens and `max_num_seqs` sequences.

    `long_prefill_token_threshold`: a step computes no more tokens of one prompt, so that others get through beside a
    long one; 0: no limit, as in vLLM.
    """

    max_num_batched_tokens: int = 2048
    max_num_seqs: int = 256
    order: Annotated[Order, Named("order")] = field(default_factory=FCFS)
    long_prefill_token_threshold: int = 0

    def __post_init__(self) -> None:
        if self.max_num_seqs < 1:
            raise ValueError(f"max_num_seqs is {self.max_num_seqs}; at least 1 would do")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens {self.max_num_batched_tokens} is below max_num_seqs {self.max_num_seqs}: "
                "decodes would starve; raise the first or lower the second"
            )
        if self.long_prefill_token_threshold < 0:
            raise ValueError(f"long_prefill_token_threshold is {self.long_prefill_token_threshold}; 0 means no limit")

    @decodes_alone
    def next_batch(self, queue: Queue, cohort: CohortView, budget: Budget, now: int) -> Batch | Wait:
        if cohort.count:
            budget.grow_decodes()
        if not queue.waiting and not queue.prefilling:  # most steps
            return Batch([], decode=True) if cohort.count else Wait()
        longest = self.long_prefill_token_threshold
        chunks, tokens = go_on(queue, cohort, budget, self.max_num_batched_tokens, longest)
        if queue.waiting:
            chunks += admit_chunks(queue, budget, self.max_num_seqs, tokens, longest)
        return Batch(chunks, decode=True) if chunks or cohort.count else Wait()
