"""The front end of a client: what a task passes before it waits for the scheduler.

It turns away what can never fit, takes the engine's time to read a request, and fetches prefixes that are kept outside
device memory. It never decides what runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mist.request import DECODE, Task

if TYPE_CHECKING:
    from mist.client import Client


class FrontEnd:
    """Tasks on their way to the queue of `client`, to which all of this belongs."""

    __slots__ = ("_client", "_free_ns", "_takes_time", "_tokens_that_fit", "incoming", "incoming_tokens", "unseen")

    def __init__(self, client: Client) -> None:
        self._client = client
        self._free_ns = 0
        engine, kv = client.engine, client.residents.kv
        self._takes_time = bool(
            engine.request_serial_ns or engine.request_overhead_ns or engine.prompt_token_overhead_ns
        )
        #: prompt and output together that the KV cache has room for anyhow; more may fit or not
        self._tokens_that_fit = (kv.num_blocks - kv.watermark_blocks) * kv.block_size
        #: tasks of this client that don't wait yet: they or their KV cache are under way, or here; True for those that
        #: were the first in the queue, and go back to its front
        self.incoming: dict[Task, bool] = {}
        #: tokens that these will have to compute
        self.incoming_tokens = 0
        #: arrived since the step in flight was decided, where the engine decides on the next one at its start
        self.unseen: list[Task] = []

    @property
    def limits(self) -> tuple[int, ...]:
        """All that `never_fits` goes by: clients with the same ones reject the same tasks."""
        client, kv = self._client, self._client.residents.kv
        decodes = DECODE in client.serves
        blocks = (kv.num_blocks, kv.watermark_blocks, kv.block_size)
        return (client.max_model_len, client.num_drafts, client.runs_model, decodes, *blocks)

    @property
    def sure_room(self) -> int:
        """Prompt and output tokens up to which no task is rejected here."""
        client = self._client
        return min(client.max_model_len, self._tokens_that_fit - client.num_drafts) if client.runs_model else 0

    def expect(self, task: Task, now: int) -> bool:
        """Whether `task` may come, and counts as the client's from now on; it is rejected with the reason if not."""
        client = self._client
        reason = self.never_fits(task)
        if reason:
            client.coordinator.rejected(task, client, reason, now)
            return False
        client.view.num_outstanding += 1
        self.incoming[task] = False
        self.incoming_tokens += task.target_tokens - task.computed_tokens
        return True

    def fits(self, following: Task, context: int, now: int) -> bool:
        """Whether a decode can go on here from `context` tokens to its end; it is rejected with the reason if not."""
        request, branch = following.request, following.branch
        was_expected = following.stage.oracle_output_tokens <= request.oracle_output_tokens  # when its prefill came
        if was_expected or branch is None or branch.is_cancelled:
            return True
        following.target_tokens = context
        reason = self.never_fits(following)
        if reason:
            self._client.coordinator.rejected(following, self._client, reason, now)
        return not reason

    def receive(self, task: Task, now: int) -> None:
        """An expected task is here: it passes the front end, then its prefix is fetched, then it waits."""
        if task not in self.incoming:
            return
        client = self._client
        then = self._enqueue if client.offload is None else self._fetch
        if not self._takes_time:
            then(task, now)
            return
        engine = client.engine
        begin = self._free_ns if self._free_ns > now else now
        self._free_ns = begin + engine.request_serial_ns
        num_tokens = task.stage.input_tokens or task.request.input_tokens
        ready = begin + engine.request_overhead_ns + engine.prompt_token_overhead_ns * num_tokens
        if ready < self._free_ns:
            ready = self._free_ns
        if ready > now:
            client.kernel.at(ready, then, task)
        else:
            then(task, now)

    def forget(self, task: Task) -> None:
        """`task` was cancelled on its way: what brings it arrives for nobody."""
        del self.incoming[task]
        self.incoming_tokens -= task.remaining_tokens
        if task in self.unseen:
            self.unseen.remove(task)

    def fetch_again(self, task: Task) -> bool:
        """The device has less of the next task's prefix than when memories were asked: whether that is fetched now.

        The task is back here then; it goes to the front of the queue once its prefix has come.
        """
        client = self._client
        if not task.is_known or client.offload is None or not client.offload.fetch(task, self._enqueue, client.now):
            return False
        client.residents.drop(task)
        self.incoming[task] = True
        self.incoming_tokens += task.remaining_tokens
        return True

    def clear(self) -> None:
        """Nobody is on the way here any more."""
        self._free_ns = self.incoming_tokens = 0
        self.incoming.clear()
        self.unseen.clear()

    def see(self) -> None:
        """The next batch may hold what arrived before this one was decided."""
        for task in self.unseen:
            self._let_in(task)
        self.unseen.clear()

    def _fetch(self, task: Task, now: int) -> None:
        if task not in self.incoming:
            return
        offload = self._client.offload
        reads = offload is not None and task.is_known and task.remaining_tokens > 0
        if offload is None or not reads or not offload.fetch(task, self._enqueue, now):
            self._enqueue(task, now)

    def _enqueue(self, task: Task, now: int) -> None:
        if task not in self.incoming:
            return
        client = self._client
        if client.planned is not None:
            client.catch_up()
        if client.engine.async_scheduling and not client.idle:
            self.unseen.append(task)
            return
        self._let_in(task)
        if client.idle:
            client.waker.wake(client)

    def _let_in(self, task: Task) -> None:
        is_back, residents = self.incoming.pop(task), self._client.residents
        self.incoming_tokens -= task.target_tokens - task.computed_tokens
        if is_back:
            residents.put_back(task)
        else:
            residents.enqueue(task)

    def never_fits(self, task: Task) -> str:
        """Why `task` can never be served here; empty where it can."""
        client = self._client
        # The client generates, so it may compare the true length with its memory, as an engine does with max_tokens.
        stage = task.stage
        tokens = task.target_tokens + (stage.oracle_output_tokens or task.request.oracle_output_tokens)
        has_room = tokens <= client.max_model_len and tokens + client.num_drafts <= self._tokens_that_fit
        if has_room and (client.runs_model or not stage.oracle_output_tokens):
            return ""
        if stage.oracle_output_tokens and not client.runs_model:
            return f"{client.name} runs no model, and the stage {stage.kind} generates tokens"
        decodes = DECODE in client.stage_kinds and DECODE in client.serves
        output = stage.oracle_output_tokens or (task.request.oracle_output_tokens if decodes else 0)
        if task.remaining_tokens:
            output -= task.generated_tokens  # which are in its target then
        if -(-task.target_tokens // stage.num_sequences) + output > client.max_model_len:
            return f"more tokens than max_model_len {client.max_model_len:,} of {client.name}"
        kv = client.residents.kv
        in_cache = task.target_tokens + max(0, output - 1)  # the last token is never computed
        if output > 1:
            in_cache += client.num_drafts  # of the step that ends it
        if kv.blocks_for(in_cache) + kv.watermark_blocks > kv.num_blocks:
            capacity = (kv.num_blocks - kv.watermark_blocks) * kv.block_size
            return f"more tokens than the KV cache of {client.name} holds ({capacity:,})"
        return ""
