"""SGLang's scheduler: prefills first, in chunks, and admission by an estimate of the tokens still to be generated.

Facts from its documentation ("Hyperparameter tuning", "Server arguments") and its scheduler's constants. It estimates
by predicted answers, never by true ones, and preempts as every policy here: from the running tail or by the order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from mist.batching import Budget, CohortView, Queue
from mist.batching.orders import Order
from mist.batching.orders.fcfs import FCFS
from mist.batching.packing import Chunks, go_on
from mist.registry import Named, register
from mist.request import Batch, Task, Wait

#: the share of what is still to be generated that is set aside: at first, and at least as a part of that
INIT_NEW_TOKEN_RATIO, MIN_NEW_TOKEN_RATIO_FACTOR = 0.7, 0.14
#: decode steps from the first to the least; steps that a retraction looks ahead
NEW_TOKEN_RATIO_DECAY_STEPS, RETRACT_DECODE_STEPS = 600, 20
#: tokens of one answer that an estimate counts at most
CLIP_MAX_NEW_TOKENS = 4096


@register("batching", "sglang")
@dataclass
class SGLang:
    """Prefill steps of at most `max_num_batched_tokens` tokens (its chunked_prefill_size), else decode steps.

    `max_num_seqs`: its max_running_requests. A prompt is admitted where the KV cache has room for it, its own predicted
    answer, and `new_token_ratio` of what all that run are predicted to generate yet. The ratio begins at 0.7 x
    `schedule_conservativeness` (1 at most), falls to 0.14 of that within 600 decode steps, rises to what is seen when
    tasks have to be preempted, and begins anew when nothing runs. With `enable_mixed_chunk` decodes take part in
    prefill steps, and their tokens count.
    """

    max_num_batched_tokens: int = 8192
    max_num_seqs: int = 256
    order: Annotated[Order, Named("order")] = field(default_factory=FCFS)
    schedule_conservativeness: float = 1.0
    enable_mixed_chunk: bool = False
    #: the share of predicted tokens that admission sets aside now
    new_token_ratio: float = field(init=False)

    def __post_init__(self) -> None:
        if self.max_num_seqs < 1 or self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError("max_num_batched_tokens must be at least max_num_seqs, and that at least 1")
        if self.schedule_conservativeness < 0:
            raise ValueError(f"schedule_conservativeness is {self.schedule_conservativeness}; 0 or more would do")
        self.new_token_ratio = self._first_ratio

    @property
    def _first_ratio(self) -> float:
        return min(1.0, INIT_NEW_TOKEN_RATIO * self.schedule_conservativeness)

    def next_batch(self, queue: Queue, cohort: CohortView, budget: Budget, now: int) -> Batch | Wait:
        if not budget.num_running:
            self.new_token_ratio = self._first_ratio
        if self.enable_mixed_chunk and cohort.count:
            self._grow_decodes(cohort, budget)
        beside = cohort if self.enable_mixed_chunk else None
        chunks, tokens = go_on(queue, beside, budget, self.max_num_batched_tokens)
        if tokens > 0 and queue.waiting:
            room = self._room(cohort, budget) - sum(task.remaining_tokens - num for task, num in chunks)
            chunks += self._admit(queue, budget, tokens, room)
        if chunks or (self.enable_mixed_chunk and cohort.count):
            return Batch(chunks, decode=self.enable_mixed_chunk and cohort.count > 0)
        if cohort.count:
            self._grow_decodes(cohort, budget)
            return Batch([], decode=True)
        return Wait()

    def _admit(self, queue: Queue, budget: Budget, tokens: int, room: float) -> Chunks:
        """Waiting prompts that there is `room` for with their answers; the first is admitted where nothing runs."""
        admitted: Chunks = []
        while tokens > 0 and queue.waiting and budget.num_running < self.max_num_seqs:
            task = queue.waiting[0]
            needed = task.remaining_tokens + _still_to_generate(task, task.generated_tokens)
            if needed >= room and budget.num_running:
                break
            chunk = budget.admit(task, tokens)
            if not chunk:
                break
            admitted.append((task, chunk))
            tokens -= chunk
            room -= needed
        return admitted

    def _room(self, cohort: CohortView, budget: Budget) -> float:
        """Tokens of the KV cache that are left besides what is expected of all that run."""
        left = sum(_still_to_generate(task, _generated(task, cohort)) for task in budget.running.values())
        return budget.num_available_blocks * cohort.block_size - self.new_token_ratio * left

    def _grow_decodes(self, cohort: CohortView, budget: Budget) -> None:
        if not budget.grow_decodes():
            step = self._first_ratio * (1 - MIN_NEW_TOKEN_RATIO_FACTOR) / NEW_TOKEN_RATIO_DECAY_STEPS
            self.new_token_ratio = max(self._first_ratio * MIN_NEW_TOKEN_RATIO_FACTOR, self.new_token_ratio - step)
            return
        tasks = list(budget.running.values())
        generated = sum(_generated(task, cohort) for task in tasks) + RETRACT_DECODE_STEPS * len(tasks)
        self.new_token_ratio = min(1.0, generated / max(1, sum(map(_predicted, tasks))))


def _predicted(task: Task) -> int:
    """Tokens that a task is predicted to generate, its predecessor's first included."""
    return task.request.predicted_output_tokens


def _generated(task: Task, cohort: CohortView) -> int:
    return task.generated_tokens + (cohort.generated(task) if task.join_step >= 0 else 0)


def _still_to_generate(task: Task, generated: int) -> int:
    return max(0, min(CLIP_MAX_NEW_TOKENS, _predicted(task) - generated))
