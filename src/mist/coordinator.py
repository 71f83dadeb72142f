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
from mist.network import Network
from mist.pipeline import PipelineFactory
from mist.records import FINISHED, HAND_OFF, KV_TRANSFER, REFUSED, REJECTED, UNFINISHED, Records
from mist.request import (
    DECODE,
    PREFILL,
    TURNED_AWAY,
    All,
    Branch,
    ClientView,
    Join,
    Pipeline,
    Request,
    Stage,
    StageResult,
    Task,
)
from mist.routing import RoutingPolicy
from mist.workload import RequestTable

_NO_SIZES: Mapping[str, int] = {}


class Coordinator:
    """`routers`: one per stage kind. `rng_of(i)`: a random generator of request i's own, made when a pipeline asks."""

    def __init__(
        self,
        *,
        kernel: Kernel,
        records: Records,
        clients: Sequence[Client],
        network: Network,
        pipeline: PipelineFactory,
        routers: Mapping[str, RoutingPolicy],
        workload: RequestTable,
        rng_of: Callable[[int], np.random.Generator],
    ) -> None:
        self.kernel = kernel
        self.records = records
        self.clients = clients
        self.network = network
        self.pipeline = pipeline
        self.routers = routers
        self.workload = workload
        self.rng_of = rng_of
        self.in_system: dict[int, Request] = {}
        #: called with the number of requests that have left, now and then
        self.on_progress: Callable[[int], None] | None = None
        self.num_arrived = 0
        self.num_left = 0
        #: tasks that are placed and not over
        self.num_tasks = 0
        self._num_posted = 0
        self._reasons: dict[str, int] = {}
        self._serving = {kind: [c for c in clients if kind in c.serves] for kind in pipeline.kinds}
        self._arrival_ns: list[int] = workload.arrival_ns.tolist()
        self._input_tokens: list[int] = workload.input_tokens.tolist()
        self._output_tokens: list[int] = workload.output_tokens.tolist()
        self._sizes = tuple(workload.sizes.items())
        self._hit_tokens: list[int] | None = None if workload.cached_tokens is None else workload.cached_tokens.tolist()
        for client in clients:
            client.coordinator = self
            # what a client fetches or writes shares channels with others
            client.emits = workload.concurrency is not None or client.offload is not None or self._hands_over(client)

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
            {name: int(column[index]) for name, column in self._sizes} if self._sizes else _NO_SIZES,
        )
        self.in_system[index] = request
        self.num_arrived += 1
        branch = Branch(request, self.pipeline(request, lambda: self.rng_of(index)), now)
        self._start(branch, None, None, now)

    # --- stage to stage ---

    def stage_done(self, task: Task, result: StageResult, client: Client, now: int) -> Task | None:
        """`task` ended on `client`; the decode that is to go on with its KV cache, or None."""
        request, stage, branch = task.request, task.stage, task.branch
        assert branch is not None
        if stage.visible:
            request.output_tokens += result.output_tokens
        if stage.gates:
            request.gate_ns = now
        request.num_tasks -= 1
        self.num_tasks -= 1
        return self.advance(branch, result, client, now)

    def advance(self, branch: Branch, result: StageResult | None, here: Client | None, now: int) -> Task | None:
        """Ask for the next stage and place it; a decode is returned, to go on where its prefill left the KV cache."""
        request, pipeline = branch.request, branch.pipeline
        if request.rejected_for:
            self._leave_rejected(request, now)
            return None
        branch.last = result
        try:
            stage = next(pipeline) if result is None else pipeline.send(result)
            while not isinstance(stage, All) and not stage.has_work:
                branch.last = StageResult(now, now)
                stage = pipeline.send(branch.last)  # no work is no stage
        except StopIteration as end:
            self._ended(branch, end.value or branch.last or StageResult(now, now), here, now)
            return None
        if isinstance(stage, All):
            self._fork(branch, stage, here, now)
            return None
        if stage.kind == PREFILL and stage.visible:
            request.prompt_tokens = stage.input_tokens
        task = Task(request, stage, request.num_stages, stage.input_tokens, now, branch)
        request.num_stages += 1
        request.num_tasks += 1
        self.num_tasks += 1
        if stage.kind == DECODE and not stage.input_tokens:
            if here is None:
                raise InvariantError(f"request {request.index}: a decode must follow a stage that leaves a KV cache")
            return task
        self._place(task, here, now)
        return None

    def _place(self, task: Task, here: Client | None, now: int) -> None:
        """Give `task` to a client; what the stage before, on `here`, hands on to it is sent there first."""
        there, stage, network = self._choose(task, now), task.stage, self.network
        if here is None or here is there or not network.carries_all or not stage.input_bytes:
            there.front_end.accept(task, now)
        elif there.front_end.expect(task, now):
            network.send(task.request.index, HAND_OFF, here.index, there.index, stage.input_bytes, self._handed_on,
                         (task, there), now)  # fmt: skip

    def _handed_on(self, transfer: tuple[Task, Client], now: int) -> None:
        task, there = transfer
        task.queued_ns = now
        there.front_end.receive(task, now)

    def _start(self, branch: Branch, result: StageResult | None, here: Client | None, now: int) -> None:
        """Go on where no KV cache is at hand: at a pipeline's begin, or after branches have joined."""
        if self.advance(branch, result, here, now) is not None:
            story = f"request {branch.request.index}"
            raise InvariantError(f"{story}: a decode must directly follow the stage that leaves its KV cache")

    def _fork(self, branch: Branch, fork: All, here: Client | None, now: int) -> None:
        join = Join(branch, [None] * len(fork.branches), len(fork.branches))
        if not fork.branches:
            self._start(branch, StageResult(now, now), here, now)
        for place, part in enumerate(fork.branches):
            if branch.request.rejected_for:
                return
            pipeline = _only(part) if isinstance(part, Stage) else part
            self._start(Branch(branch.request, pipeline, now, join, place), None, here, now)

    def _ended(self, branch: Branch, result: StageResult, here: Client | None, now: int) -> None:
        """A pipeline is over: its request leaves, or what waits for all branches has one less to wait for."""
        join = branch.joins
        if join is None:
            self._leave(branch.request, REFUSED if result is TURNED_AWAY else FINISHED, now)
            return
        join.results[branch.place] = result
        join.num_open -= 1
        if not join.num_open:
            parts = tuple(part for part in join.results if part is not None)
            start, end = min(part.start_ns for part in parts), max(part.end_ns for part in parts)
            tokens = sum(part.output_tokens for part in parts)
            self._start(join.branch, StageResult(start, end, tokens, parts=parts), here, now)

    def hand_over(self, task: Task, following: Task, client: Client, now: int) -> bool:
        """The KV cache of `task` goes from `client` to one that decodes on; False: it can't, and the request left."""
        there = self._choose(following, now)
        if not there.front_end.expect(following, now):
            return False
        transfer = (task, client, following, there)
        num_bytes = following.target_tokens * client.kv_bytes_per_token
        self.network.send(task.request.index, KV_TRANSFER, client.index, there.index, num_bytes, self._handed_over,
                          transfer, now)  # fmt: skip
        return True

    def _handed_over(self, transfer: tuple[Task, Client, Task, Client], now: int) -> None:
        task, here, following, there = transfer
        here.sent(task)
        following.queued_ns = now
        there.front_end.receive(following, now)

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
        """`client` can never serve `task`: its request leaves with the reason, once its other tasks are over."""
        request = task.request
        if task.stage.visible:
            request.output_tokens += task.generated_tokens
        request.num_tasks -= 1
        self.num_tasks -= 1
        request.rejected_for = request.rejected_for or reason
        self._leave_rejected(request, now)

    def _leave_rejected(self, request: Request, now: int) -> None:
        if not request.num_tasks:
            self._leave(request, REJECTED, now, request.rejected_for)

    def cut(self, now: int) -> None:
        """The run stops at `now`: requests still in the system leave as unfinished."""
        self.network.cut(now)
        for client in self.clients:
            for task in client.cut(now):
                if task.stage.visible:
                    task.request.output_tokens += task.generated_tokens
        for request in list(self.in_system.values()):
            self._leave(request, UNFINISHED, now)

    def _leave(self, request: Request, status: int, now: int, reason: str = "") -> None:
        del self.in_system[request.index]
        self.num_left += 1
        first_token_ns = request.first_token_ns
        if 0 <= first_token_ns < request.gate_ns:
            first_token_ns = request.gate_ns
        if self.on_progress is not None and not self.num_left & 0xFF:
            self.on_progress(self.num_left)
        self.records.requests.append(
            (request.index, request.arrival_ns, first_token_ns, now, status, self._reason(reason),
             request.prompt_tokens or request.input_tokens, request.output_tokens, request.cached_tokens,
             request.num_preemptions)
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


def _only(stage: Stage) -> Pipeline:
    """A pipeline of one stage."""
    result = yield stage
    return result
