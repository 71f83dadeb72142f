"""Forecasts of one client: how long its longest decode goes on, and what its steps take, as a router would reckon.

Behind the views, for policies that ask. A look costs O(log n) for each task that came or moved on since the last one,
never O(batch); nothing here is told of steps, and nothing changes a client.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heapify, heappop, heappush
from math import ceil

from mist.client import Client
from mist.request import DECODE, Branch, ClientView, Step, Task


def predicted_tokens(task: Task) -> int:
    """What a predictor says of the request's output."""
    return task.request.predicted_output_tokens


def true_tokens(task: Task) -> int:
    """The truth, for policies whose names begin with `oracle_`."""
    return task.stage.oracle_output_tokens or task.request.oracle_output_tokens


class LongestDecode:
    """The most decode steps that any task on a client still has, by the lengths that `length_of` says.

    Two heaps whose tops are looked at when somebody asks: those that don't decode yet, by their whole length, which is
    no less than what they have left once they do; and those that decode, by the step of their last token, whose order
    never changes. A task is found by its branch, which its prefill and its decode have in common.
    """

    def __init__(self, client: Client, length_of: Callable[[Task], int]) -> None:
        self._client = client
        self._length_of = length_of
        self._decodes_here = DECODE in client.serves and DECODE in client.stage_kinds
        self._before: list[tuple[int, int, Branch]] = []
        self._decoding: list[tuple[int, int, Task]] = []
        speculation = getattr(client.residents.cohort, "speculation", None)
        self._tokens_per_step: float = speculation.tokens_per_step if speculation else 1
        self._num_pushed = 0
        self._max_num_kept = 64
        self._num_preemptions = 0

    def came(self, task: Task) -> None:
        """`task` goes to the client."""
        if task.branch is not None and (task.generates or self._decodes_here):
            self._num_pushed += 1
            heappush(self._before, (-self._left(task), self._num_pushed, task.branch))
            if len(self._before) + len(self._decoding) > self._max_num_kept:
                self._prune()

    def num_steps(self) -> int:
        """Of the longest one, 0 where there is none, or where all have outlived their lengths."""
        if self._num_preemptions != self._client.residents.num_preemptions:
            self._num_preemptions = self._client.residents.num_preemptions
            self._start_over()
        before = self._longest_before()
        return max(0, ceil(before / self._tokens_per_step), self._longest_decoding())

    def _longest_before(self) -> int:
        heap = self._before
        while heap:
            tokens, _, branch = heap[0]
            task = self._task_here(branch)
            left = self._left(task) if task is not None else 0
            if task is not None and task.join_step < 0 and left == -tokens:
                return left
            heappop(heap)
            if task is None:
                for each in branch.fork.branches if branch.fork else ():
                    if (forked := self._task_here(each)) is not None:
                        self.came(forked)
            elif task.join_step < 0:
                self.came(task)
            else:
                self._num_pushed += 1
                finish = task.join_step + ceil(left / self._tokens_per_step)
                heappush(self._decoding, (-finish, self._num_pushed, task))
        return 0

    def _longest_decoding(self) -> int:
        heap, residents = self._decoding, self._client.residents
        while heap:
            finish, _, task = heap[0]
            if residents.running.get(task.admission) is task:
                return -finish - residents.cohort.step
            heappop(heap)
        return 0

    def _start_over(self) -> None:
        """Some that decoded wait again: whoever does is as good as one that hasn't begun."""
        decoding, self._decoding = self._decoding, []
        for _, _, task in decoding:
            self.came(task)

    def _prune(self) -> None:
        """Forget whoever has left beneath a longer one; what is kept may double before the next time."""
        running = self._client.residents.running
        self._before = [each for each in self._before if self._is_here(each[2])]
        self._decoding = [each for each in self._decoding if running.get(each[2].admission) is each[2]]
        heapify(self._before)
        heapify(self._decoding)
        self._max_num_kept = 64 + 2 * (len(self._before) + len(self._decoding))

    def _is_here(self, branch: Branch) -> bool:
        is_wanted = not branch.is_over and not branch.is_cancelled and not branch.request.rejected_for
        return is_wanted and branch.client == self._client.index

    def _task_here(self, branch: Branch) -> Task | None:
        return branch.task if self._is_here(branch) else None

    def _left(self, task: Task) -> int:
        """Tokens from its join on, or from now where it hasn't joined."""
        return max(0, self._length_of(task) - task.generated_tokens)


class Prices:
    """What steps of a client and its like take, from four that its performance model explains before the run.

    A decode step is taken to be linear in its sequences and their context, and a chunk to add what it takes alone.
    """

    def __init__(self, client: Client) -> None:
        self._chunk_tokens = chunk = min(client.batching.max_num_batched_tokens, client.max_model_len)
        num_seqs, kv = max(2, client.batching.max_num_seqs), client.residents.kv
        context = max(2 * num_seqs, min(kv.num_blocks * kv.block_size, num_seqs * client.max_model_len))
        per_decode = 1 + client.num_drafts

        def decodes(num_decodes: int, context: int) -> int:
            rows = num_decodes * per_decode
            context += rows - num_decodes
            return _step_ns(client, Step(num_decodes, context, num_sampled=rows, tokens_per_decode=per_decode))

        one, many, full = decodes(1, 1), decodes(num_seqs, num_seqs), decodes(num_seqs, context)
        self._per_context = (full - many) / (context - num_seqs)
        self._per_decode = (many - one) / (num_seqs - 1) - self._per_context
        self._base = one - self._per_decode - self._per_context
        self._chunk_ns = _step_ns(client, Step(chunks=[(chunk, 0)], num_prefill_tokens=chunk, num_sampled=1))

    def fill(self, view: ClientView, num_decodes: int, context: int) -> None:
        """The prices with so many decodes, of so many tokens of context together."""
        beside = self._per_decode * num_decodes + self._per_context * context
        view.chunk_tokens = self._chunk_tokens
        view.chunk_ns = round(self._chunk_ns + beside)
        view.decode_ns = max(1, round(self._base + beside + self._per_decode))


def _step_ns(client: Client, step: Step) -> int:
    """As `Client.price_step`, but not counted among the answers that the model gave."""
    host, device = client.host_ns(step), round(sum(part.time_ns for part in client.perf.explain(step)))
    return max(1, host, device) if client.engine.overlapped else max(1, host + device)
