"""TensorRT-LLM's scheduler: a capacity policy says who may hold KV blocks, then decodes go first and contexts follow.

Facts from its documentation ("Scheduler", "KV cache management", "Runtime configuration options for performance").
It decides admission and the batch; the blocks that an answer may come to need are counted by the client's budget.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from mist.batching import Budget, CohortView, Queue, admit_whole
from mist.batching.orders import Order
from mist.batching.orders.fcfs import FCFS
from mist.batching.packing import admit_chunks, admit_within, go_on
from mist.registry import Named, register
from mist.request import Batch, Wait


@register("batching", "tensorrt_llm")
@dataclass
class TensorRTLLM:
    """Decodes first, then contexts, whole unless `enable_chunked_context`.

    `max_num_batched_tokens`, `max_num_seqs`: its max_num_tokens and max_batch_size.
    `capacity_scheduler_policy`: guaranteed_no_evict admits a request only where it and all that run have KV blocks to
    their last token, whatever the engine profile says; max_utilization as soon as its context fits, and preempts when
    blocks run out; static_batch, in addition to guaranteed_no_evict, only when nothing runs. A context that doesn't fit
    beside the decodes waits, and so do all behind it; one that is longer than a step runs alone.
    """

    max_num_batched_tokens: int = 8192
    max_num_seqs: int = 2048
    order: Annotated[Order, Named("order")] = field(default_factory=FCFS)
    capacity_scheduler_policy: Literal["guaranteed_no_evict", "max_utilization", "static_batch"] = "guaranteed_no_evict"
    enable_chunked_context: bool = False

    def __post_init__(self) -> None:
        if self.max_num_seqs < 1 or self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError("max_num_batched_tokens must be at least max_num_seqs, and that at least 1")

    @property
    def reserves_output(self) -> bool:
        """Whether the client admits only what it can serve to its last token: asked by the client once."""
        return self.capacity_scheduler_policy != "max_utilization"

    def next_batch(self, queue: Queue, cohort: CohortView, budget: Budget, now: int) -> Batch | Wait:
        is_closed = self.capacity_scheduler_policy == "static_batch" and budget.num_running > 0
        max_num_seqs = 0 if is_closed else self.max_num_seqs
        if cohort.count:
            budget.grow_decodes()
        chunks, tokens = go_on(queue, cohort, budget, self.max_num_batched_tokens)
        if self.enable_chunked_context:
            chunks += admit_chunks(queue, budget, max_num_seqs, tokens)
        elif budget.num_running:
            chunks += admit_within(queue, budget, max_num_seqs, tokens)
        else:
            chunks = admit_whole(queue, budget, max_num_seqs, tokens)
        return Batch(chunks, decode=cohort.count > 0) if chunks or cohort.count else Wait()
