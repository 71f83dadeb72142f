"""What batching policies have in common: how a step's tokens are filled with prompts, in chunks or whole.

Called by a policy with the budget that it was given. It never looks at decodes beyond their number, and keeps nothing.
"""

from __future__ import annotations

from mist.batching import Budget, CohortView, Queue
from mist.request import Task

Chunks = list[tuple[Task, int]]


def go_on(
    queue: Queue, cohort: CohortView | None, budget: Budget, max_tokens: int, longest: int = 0
) -> tuple[Chunks, int]:
    """Chunks of the admitted prompts in what the decodes leave of `max_tokens`, and the tokens that are left then.

    `cohort` is None where no decode takes part in the step. No chunk is longer than `longest`, if that isn't 0. Whoever
    has to go for another's KV blocks gives back the tokens that this step had for it, as in vLLM: its chunk is taken
    out.
    """
    chunks: Chunks = []
    left = max_tokens - (cohort.count * cohort.tokens_per_decode if cohort is not None else 0)
    prefilling = queue.prefilling
    num_running = budget.num_running if prefilling else 0
    for task in prefilling:
        chunk = min(task.remaining_tokens, longest or max_tokens, left)
        if chunk <= 0:
            break
        if budget.grow(task, chunk):
            chunks.append((task, chunk))
            left -= chunk
        if budget.num_running < num_running:
            num_running = budget.num_running
            chunks = [each for each in chunks if each[0].admission >= 0]
            left = max_tokens - (cohort.count * cohort.tokens_per_decode if cohort is not None else 0)
            left -= sum(num_tokens for _, num_tokens in chunks)
    return chunks, left


def admit_chunks(queue: Queue, budget: Budget, max_num_seqs: int, max_tokens: int, longest: int = 0) -> Chunks:
    """First chunks of waiting prompts, in the order of the queue, that fill `max_tokens`; none beyond `longest`."""
    chunks: Chunks = []
    while max_tokens > 0 and queue.waiting and budget.num_running < max_num_seqs:
        task = queue.waiting[0]
        chunk = budget.admit(task, min(max_tokens, longest or max_tokens))
        if not chunk:
            break
        chunks.append((task, chunk))
        max_tokens -= chunk
    return chunks


def admit_within(queue: Queue, budget: Budget, max_num_seqs: int, max_tokens: int) -> Chunks:
    """Admit waiting tasks in the order of the queue, each whole, until one doesn't fit into `max_tokens`."""
    chunks: Chunks = []
    while queue.waiting and budget.num_running < max_num_seqs:
        task = queue.waiting[0]
        chunk = budget.admit(task, max_tokens, whole=True)
        if not chunk:
            break
        chunks.append((task, chunk))
        max_tokens -= chunk
    return chunks


def window_ends(queue: Queue, num_seqs: int, num_tokens: int, max_queue_delay_ns: int) -> int:
    """When the tasks that wait are to be started (ns): now (0) if they fill a batch, else when the oldest is due.

    A batch is full with `num_seqs` tasks or `num_tokens` tokens.
    """
    tokens = 0
    for place, task in enumerate(queue.waiting, 1):
        tokens += task.remaining_tokens
        if place >= num_seqs or tokens >= num_tokens:
            return 0
    return min(task.queued_ns for task in queue.waiting) + max_queue_delay_ns
