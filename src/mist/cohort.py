"""The decode cohort: sequences that gain one token per decode step of their client, kept as sums.

Decoding is lazy: a sequence's progress is a function of the cohort's step counter, so a step costs O(finishes), not
O(batch). It never allocates memory and never decides anything.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush

from mist.request import Task


class Cohort:
    """Decoding sequences of one client: a step counter, sums, and a calendar of last tokens.

    `step`: decode steps completed. `count`: sequences. `sum_context`: tokens in their KV caches. `calendar`: step ->
    the tasks whose last token that step generates; `ends`: its steps, a heap. A sequence that joined at step j with
    context c holds c + step - j tokens, so the sequences whose last block is full are those with step = (j - c) modulo
    the block size: `boundary` counts the sequences by (j - c) modulo the block size. `tokens_per_decode`: tokens that a
    step computes for each.
    """

    __slots__ = ("block_size", "boundary", "calendar", "count", "ends", "step", "sum_context", "tokens_per_decode")

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.tokens_per_decode = 1
        self.step = 0
        self.count = 0
        self.sum_context = 0
        self.calendar: dict[int, list[Task]] = {}
        self.ends: list[int] = []
        self.boundary = [0] * block_size

    def context(self, task: Task) -> int:
        """Tokens that `task` holds in the KV cache after the steps completed so far."""
        return task.target_tokens + self.generated(task)

    def generated(self, task: Task) -> int:
        """Tokens that `task` has generated in the cohort since it joined."""
        return self.step - task.join_step

    def step_of(self, task: Task, num_tokens: int) -> int:
        """The step counter once `task` has generated `num_tokens` since it joined."""
        return task.join_step + num_tokens

    def reserved_tokens(self, task: Task, growing: bool) -> int:
        """Tokens that `task` has KV blocks for: after the last step, or for the next one if it is `growing`."""
        return self.context(task) + growing

    def num_new_blocks(self) -> int:
        """KV blocks that the next step needs for all."""
        return self.boundary[self.step % self.block_size]  # those whose last block is full

    def join(self, task: Task, num_tokens: int) -> None:
        """Add a fully computed task that has `num_tokens` >= 1 to go."""
        self._enter(task, num_tokens)
        self.sum_context += task.target_tokens
        self.boundary[(self.step - task.target_tokens) % self.block_size] += 1

    def _enter(self, task: Task, num_steps: int) -> None:
        task.join_step = self.step
        task.finish_step = finish = self.step + num_steps
        self.count += 1
        finishing = self.calendar.get(finish)
        if finishing is None:
            self.calendar[finish] = [task]
            heappush(self.ends, finish)
        else:
            finishing.append(task)

    def advance(self) -> list[Task] | None:
        """Complete one decode step of everybody; the tasks that generated their last token, by admission, or None."""
        self.step += 1
        self.sum_context += self.count
        finishing = self.calendar.pop(self.step, None)
        if finishing is not None:
            heappop(self.ends)
            if len(finishing) > 1:
                finishing.sort(key=_by_admission)
            for task in finishing:
                self._drop(task)
        return finishing

    def leave(self, task: Task) -> None:
        """Take out a task before its last token."""
        finishing = self.calendar[task.finish_step]
        finishing.remove(task)
        if not finishing:
            del self.calendar[task.finish_step]
            self.ends.remove(task.finish_step)
            heapify(self.ends)
        self._drop(task)

    def clear(self) -> None:
        """Nobody is left; the steps completed so far stay counted."""
        self.count = self.sum_context = 0
        self.calendar.clear()
        self.ends.clear()
        self.boundary = [0] * self.block_size

    def _drop(self, task: Task) -> None:
        self.count -= 1
        self.sum_context -= task.target_tokens + self.step - task.join_step
        self.boundary[(task.join_step - task.target_tokens) % self.block_size] -= 1


def _by_admission(task: Task) -> int:
    return task.admission
