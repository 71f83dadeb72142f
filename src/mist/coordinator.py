"""The coordinator: stage to stage. Ask the pipeline for the next stage and the router for a client; hand the task over.

It plays the workload's arrivals and writes a row for every request that leaves. It never looks into a client: routers
see views, and clients report through `stage_done` and `rejected`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import numpy as np

from mist.client import Client
from mist.errors import InvariantError
from mist.kernel import Kernel
from mist.pipeline import PipelineFactory
from mist.records import FINISHED, REJECTED, UNFINISHED, Records
from mist.request import DECODE, ClientView, Request, StageResult, Task
from mist.routing import RoutingPolicy
from mist.workload import RequestTable


class Coordinator:
    """`routers`: one per stage kind. `rng_of(i)`: a random generator of request i's own, made when a pipeline asks."""

    def __init__(
        self,
        *,
        kernel: Kernel,
        records: Records,
        clients: Sequence[Client],
        pipeline: PipelineFactory,
        routers: Mapping[str, RoutingPolicy],
        workload: RequestTable,
        rng_of: Callable[[int], np.random.Generator],
    ) -> None:
        self.kernel = kernel
        self.records = records
        self.clients = clients
        self.pipeline = pipeline
        self.routers = routers
        self.workload = workload
        self.rng_of = rng_of
        self.in_system: dict[int, Request] = {}
        #: called with the number of requests that have left, now and then
        self.on_progress: Callable[[int], None] | None = None
        self.num_arrived = 0
        self.num_left = 0
        self._num_posted = 0
        self._reasons: dict[str, int] = {}
        self._serving = {kind: [c for c in clients if kind in c.serves] for kind in pipeline.kinds}
        self._arrival_ns: list[int] = workload.arrival_ns.tolist()
        self._input_tokens: list[int] = workload.input_tokens.tolist()
        self._output_tokens: list[int] = workload.output_tokens.tolist()
        self._hit_tokens: list[int] | None = None if workload.cached_tokens is None else workload.cached_tokens.tolist()
        for client in clients:
            client.coordinator = self
            client.emits = workload.concurrency is not None or self._hands_over(client)

    # --- arrivals ---

    def start(self) -> None:
        """Post the first arrival (open loop), or as many as may be in flight (closed loop)."""
        if self.workload.concurrency is None:
            if len(self.workload):
                self.kernel.at(self._arrival_ns[0], self._arrive_and_post_next, 0)
            return
        for _ in range(min(self.workload.concurrency, len(self.workload))):
            self._post_next(self._arrival_ns[self._num_posted])

    def _post_next(self, time_ns: int) -> None:
        self.kernel.at(time_ns, self._arrive, self._num_posted)
        self._num_posted += 1

    def _arrive_and_post_next(self, index: int, now: int) -> None:
        following = index + 1
        if following < len(self._arrival_ns):
            self.kernel.at(self._arrival_ns[following], self._arrive_and_post_next, following)
        self._arrive(index, now)

    def _arrive(self, index: int, now: int) -> None:
        keys = self.workload.block_keys
        request = Request(
            index,
            now,
            self._input_tokens[index],
            self._output_tokens[index],
            keys[index] if keys is not None else (),
            self._hit_tokens[index] if self._hit_tokens is not None else 0,
        )
        request.pipeline = self.pipeline(request, lambda: self.rng_of(index))
        self.in_system[index] = request
        self.num_arrived += 1
        self.advance(request, None, None, now)

    # --- stage to stage ---

    def stage_done(self, task: Task, result: StageResult, client: Client, now: int) -> Task | None:
        """`task` ended on `client`; the decode that is to go on with its KV cache, or None."""
        request = task.request
        if task.stage.visible:
            request.output_tokens += result.output_tokens
        return self.advance(request, result, client, now)

    def hand_over(self, task: Task, following: Task, client: Client, now: int) -> bool:
        """The KV cache of `task` goes from `client` to one that decodes on; False: it can't, and the request left."""
        there = self._choose(following, now)
        if not there.front_end.expect(following, now):
            return False
        transfer = (task, client, following, there)
        client.nic.send(task.request.index, there.index, following.target_tokens, self._handed_over, transfer, now)
        return True

    def _handed_over(self, transfer: tuple[Task, Client, Task, Client], now: int) -> None:
        task, here, following, there = transfer
        here.sent(task)
        following.queued_ns = now
        there.front_end.receive(following, now)

    def advance(self, request: Request, result: StageResult | None, here: Client | None, now: int) -> Task | None:
        """Ask for the next stage and place it; a decode is returned, to go on where its prefill left the KV cache."""
        pipeline = request.pipeline
        assert pipeline is not None
        try:
            stage = next(pipeline) if result is None else pipeline.send(result)
            while not stage.input_tokens and not stage.oracle_output_tokens:
                stage = pipeline.send(StageResult(now, now))  # no work is no stage
        except StopIteration:
            self._leave(request, FINISHED, now)
            return None
        task = Task(request, stage, request.num_stages, stage.input_tokens, now)
        request.num_stages += 1
        if stage.kind == DECODE:
            if here is None:
                raise InvariantError(f"request {request.index}: a decode must follow a stage that leaves a KV cache")
            return task
        self._choose(task, now).front_end.accept(task, now)
        return None

    def _choose(self, task: Task, now: int) -> Client:
        kind = task.stage.kind
        candidates = self._serving.get(kind)
        if not candidates:
            raise InvariantError(f"the pipeline yielded a stage {kind!r} that it did not announce")
        if len(candidates) == 1:
            return candidates[0]
        views = [candidate.refresh_view() for candidate in candidates]
        router = self.routers[kind]
        chosen = router.choose(task, views, now)
        if not isinstance(chosen, ClientView) or kind not in self.clients[chosen.index].serves:
            name = type(router).__name__
            raise InvariantError(f"{name} chose {chosen!r} for request {task.request.index}: none of its choices")
        return self.clients[chosen.index]

    def _hands_over(self, client: Client) -> bool:
        """Whether a task's end on `client` can reach another: not where each stage is the last, or decodes on here."""
        if not self.pipeline.is_fixed:
            return True
        here = client.serves
        return any(
            kind in here and (following != DECODE or DECODE not in here)
            for kind, following in pairwise(self.pipeline.kinds)
        )

    # --- requests leave ---

    def rejected(self, task: Task, client: Client, reason: str, now: int) -> None:
        """`client` can never serve `task`: its request leaves, with the reason."""
        if task.stage.visible:
            task.request.output_tokens += task.generated_tokens
        self._leave(task.request, REJECTED, now, reason)

    def cut(self, now: int) -> None:
        """The run stops at `now`: requests still in the system leave as unfinished."""
        for client in self.clients:
            for task in client.cut(now):
                if task.stage.visible:
                    task.request.output_tokens += task.generated_tokens
        for request in list(self.in_system.values()):
            self._leave(request, UNFINISHED, now)

    def _leave(self, request: Request, status: int, now: int, reason: str = "") -> None:
        del self.in_system[request.index]
        request.pipeline = None
        self.num_left += 1
        if self.on_progress is not None and not self.num_left & 0xFF:
            self.on_progress(self.num_left)
        self.records.requests.append(
            (request.index, request.arrival_ns, request.first_token_ns, now, status, self._reason(reason),
             request.input_tokens, request.output_tokens, request.cached_tokens, request.num_preemptions)
        )  # fmt: skip
        if self.workload.concurrency is not None and status != UNFINISHED and self._num_posted < len(self.workload):
            self._post_next(now)

    def _reason(self, reason: str) -> int:
        if not reason:
            return -1
        index = self._reasons.setdefault(reason, len(self._reasons))
        if index == len(self.records.reasons):
            self.records.reasons.append(reason)
        return index
