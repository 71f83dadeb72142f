"""What becomes of a client's tasks when a step is over: tokens come out, decodes go on, stages end.

Behind the client's loop, which calls it as steps end and as decodes come in. It never decides what runs, and never says
where a task goes next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mist.records import DONE
from mist.request import DECODE, PREFILL, StageResult, Task

if TYPE_CHECKING:
    from mist.client import Client


class Progress:
    """The tasks of `client`, to which all of this belongs."""

    __slots__ = ("_client", "shown_at")

    def __init__(self, client: Client) -> None:
        self._client = client
        #: step of the cohort -> decodes that begin with a thought and whose first visible token it generates
        self.shown_at: dict[int, list[Task]] = {}

    def reached(self, task: Task, now: int) -> None:
        """All of a task's target is computed: one that generates has sampled a token and goes on, others are done."""
        client = self._client
        if client.offload is not None and task.is_known and task.stage.input_tokens:
            client.offload.computed(task, now)
        if task.generates:
            self._join(task, now)
            return
        result = StageResult(task.started_ns, now, found_tokens=client.store.find(task, now) if client.store else 0)
        followings = client.coordinator.stage_done(task, result, client, now)
        if DECODE in client.serves:
            followings = [each for each in followings if client.front_end.fits(each, task.computed_tokens, now)]
        if followings and DECODE in client.serves:
            client.record_segment(task, now, DONE)
            self._decode_on(task, followings, now)
            return
        client.view.num_outstanding -= 1
        for following in followings:
            if following.stage.oracle_output_tokens == 1 or client.engine.first_token == PREFILL:
                task.joined_ns = now
                _emit(following, now)
        client.record_segment(task, now, DONE)
        if not followings or not self._hand_over(task, followings, now):
            client.residents.leave(task, task.computed_tokens, task.computed_tokens)

    def _decode_on(self, task: Task, followings: Sequence[Task], now: int) -> None:
        """Decodes take over the context of `task`: the first its place, others theirs while there is room for them."""
        client = self._client
        residents = client.residents
        client.view.num_outstanding += len(followings) - 1
        waiting: list[Task] = []
        if len(followings) == 1:
            residents.follow(task, followings[0])
        else:
            waiting = residents.fork(task, followings, client.batching.max_num_seqs)
        for following in followings:
            assert following.branch is not None
            following.branch.client = client.index
            following.started_ns = now
        for following in waiting:
            following.started_ns = -1
            residents.enqueue(following)
        for following in followings:
            if following.branch.is_cancelled:  # type: ignore[union-attr]
                continue
            if following.admission >= 0:
                self._join(following, now)
            elif following.stage.oracle_output_tokens == 1:
                self._answered(following, now)

    def _answered(self, task: Task, now: int) -> None:
        """A decode that waits for a place needs none: its only token was sampled with the prefill."""
        client = self._client
        task.started_ns = task.joined_ns = now
        _emit(task, now)
        client.record_segment(task, now, DONE)
        client.residents.drop(task)
        client.view.num_outstanding -= 1
        client.coordinator.stage_done(task, StageResult(now, now, 1), client, now)

    def _hand_over(self, task: Task, followings: Sequence[Task], now: int) -> bool:
        """Decodes whose first token was sampled here: whether `task`'s blocks must stay for a client to go on with."""
        client = self._client
        going = []
        for following in followings:
            following.target_tokens = following.computed_tokens = following.inherited_tokens = task.computed_tokens
            if following.branch.is_cancelled:  # type: ignore[union-attr]
                continue
            if following.stage.oracle_output_tokens == 1:
                client.coordinator.stage_done(following, StageResult(now, now, 1), client, now)
            else:
                going.append(following)
        if not going or not client.coordinator.hand_over(task, going, client, now):
            return False
        client.residents.hold(task)
        return True

    def take_over(self, now: int) -> None:
        """Decodes whose KV cache was handed over join the cohort while they fit; their next token is the step's.

        The one that the prefill sampled comes out now, unless it did there.
        """
        client = self._client
        while (task := client.reservations.take_over(client.batching.max_num_seqs)) is not None:
            task.started_ns = now
            if task.generated_tokens:
                self._enter_cohort(task, task.stage.oracle_output_tokens - task.generated_tokens)
            else:
                self._join(task, now)

    def _join(self, task: Task, now: int) -> None:
        """A decode whose context is computed emits a token now, and the rest with the cohort's next steps."""
        client = self._client
        task.joined_ns = now
        _emit(task, now)
        num_tokens = task.stage.oracle_output_tokens - task.generated_tokens
        if num_tokens:
            self._enter_cohort(task, num_tokens)
        else:
            task.join_step = client.residents.cohort.step
            self.decoded(task, now)

    def _enter_cohort(self, task: Task, num_tokens: int) -> None:
        client = self._client
        cohort = client.residents.cohort
        cohort.join(task, num_tokens)
        to_first = task.stage.hidden_tokens + 1 - task.generated_tokens
        if task.stage.hidden_tokens and 0 < to_first <= num_tokens:
            self.shown_at.setdefault(cohort.step_of(task, to_first), []).append(task)

    def show(self, now: int) -> None:
        """The decode step that is over may have generated first visible tokens; some of those meant here are gone."""
        client = self._client
        for task in self.shown_at.pop(client.residents.cohort.step, ()):
            is_here = client.residents.running.get(task.admission) is task and task.join_step >= 0
            if is_here and task.stage.seen_by_user(task.generated_tokens + client.residents.cohort.generated(task)):
                task.request.show(now)

    def decoded(self, task: Task, now: int) -> None:
        client = self._client
        cohort = client.residents.cohort
        client.record_segment(task, now, DONE)
        generated = cohort.generated(task)
        client.residents.leave(task, task.target_tokens + generated, cohort.reserved_tokens(task, False))
        task.generated_tokens += generated
        client.view.num_outstanding -= 1
        result = StageResult(task.started_ns, now, task.generated_tokens)
        client.coordinator.stage_done(task, result, client, now)


def _emit(task: Task, now: int) -> None:
    """A token comes out of the decode `task` that its context ends in."""
    task.generated_tokens += 1
    if task.stage.seen_by_user(task.generated_tokens):
        task.request.show(now)
