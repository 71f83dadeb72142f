"""Continuous batching, prefill first (Orca; vLLM v0): a step computes whole prompts or decodes, never both.

Waiting prompts are admitted whenever they fit, so a burst of arrivals stalls the decodes; unless they are made to wait
for others to be batched with. It never splits a prompt.
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


@register("batching", "continuous")
@dataclass
class Continuous:
    """Prefill steps of at most `max_num_batched_tokens` tokens (a longer prompt runs alone), else decode steps.

    `max_num_seqs`: running sequences at most. Prompts that wait are held back
    with `delay_factor`, while something runs, until the oldest has waited longer than so many times the last prefill
    step, decided to decided (vLLM v0's `delay_factor`);
    with `max_queue_delay_ms` until they fill a batch or the oldest has waited so long (the batch window of a dynamic
    batcher, such as Triton's). Both 0: not at all.
    """

    max_num_batched_tokens: int = 8192
    max_num_seqs: int = 256
    order: Annotated[Order, Named("order")] = field(default_factory=FCFS)
    delay_factor: float = 0.0
    max_queue_delay_ms: float = 0.0
    _last_prefill_ns: int = field(init=False, default=0)
    _prefill_began_ns: int = field(init=False, default=-1)

    def __post_init__(self) -> None:
        if self.max_num_seqs < 1 or self.max_num_batched_tokens < 1:
            raise ValueError("max_num_seqs and max_num_batched_tokens must be at least 1")
        if self.delay_factor < 0 or self.max_queue_delay_ms < 0:
            raise ValueError("delay_factor and max_queue_delay_ms must be at least 0")

    @property
    def times_steps(self) -> bool:
        """Whether it has to be asked before each step: one of decodes must not count for the prefill before it."""
        return self.delay_factor > 0

    @decodes_alone
    def next_batch(self, queue: Queue, cohort: CohortView, budget: Budget, now: int) -> Batch | Wait:
        held_until = self._held_until(queue, budget, now) if self.delay_factor or self.max_queue_delay_ms else 0
        if held_until <= now:
            chunks = admit_whole(queue, budget, self.max_num_seqs, self.max_num_batched_tokens)
            if chunks:
                self._prefill_began_ns = now
                return Batch(chunks, decode=False)
        if cohort.count:
            budget.grow_decodes()
            return Batch([], decode=True)
        return Wait(held_until) if held_until > now else Wait()

    def _held_until(self, queue: Queue, budget: Budget, now: int) -> int:
        """When those that wait may be admitted, ns."""
        if 0 <= self._prefill_began_ns < now:
            self._last_prefill_ns, self._prefill_began_ns = now - self._prefill_began_ns, -1
        if not queue.waiting:
            return 0
        until = 0
        if self.delay_factor and budget.num_running:
            delay = int(self.delay_factor * self._last_prefill_ns)
            until = min(task.queued_ns for task in queue.waiting) + delay + 1  # longer than, not as long as
        if self.max_queue_delay_ms:
            free_seqs = self.max_num_seqs - budget.num_running
            delay = round(self.max_queue_delay_ms * NS_PER_MS)
            until = max(until, window_ends(queue, free_seqs, self.max_num_batched_tokens, delay))
        return until
