"""The client: one loop for every kind of server. Ask the policy for a batch, the performance model how long it takes,
come back then, and update the tasks.

A client differs from another only in the three parts it is given: a batching policy, a performance model and a memory.
It never chooses another client and never reads a workload.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from functools import partial

from mist.batching import DECODES_ALONE, BatchingPolicy, is_timing
from mist.batching.orders.fcfs import FCFS
from mist.engine import EngineProfile
from mist.errors import InvariantError
from mist.front_end import FrontEnd
from mist.kernel import Kernel
from mist.memory.kv_cache import KVCache
from mist.neighbours import Next, Shares, Waker, Watcher
from mist.offload import KVStore, Offload
from mist.perf import Demand, HostModel, PerfModel
from mist.progress import Progress
from mist.records import CUT, DROPPED, PREEMPTED, Records
from mist.request import DECODE, Batch, ClientView, Step, Task, Wait
from mist.reservations import Reservations
from mist.residents import Residents
from mist.span import Plan, begin_planned, run_span
from mist.speculation import Speculation, SpeculativeCohort

#: steps up to the next end of a task that are too few to be planned
_FEW = 3
#: what a step of decodes alone computes
_DECODES = Batch([], decode=True)


class Client:
    """One server: an engine replica on its devices, or one attention group of one of its lanes.

    `emits`: whether the end of a task here can reach another client; set by the coordinator. `serves`: the stage kinds
    that it takes. A step lasts max(host, device) with an overlapped engine, else host + device time. With `speculation`
    a decode step verifies drafts; `perf` prices them too. With `merges_shared_reads` the blocks that decodes share are
    read once per step for all of them.
    """

    __slots__ = (
        "_cancelled", "_decodes_alone", "_kv_used", "_overlapped", "_pack_step", "_pack_task", "_prefill_ns",
        "_settle", "_step_ns", "_token_ns", "_work", "_write_step", "_write_task", "append_span", "batching",
        "chunks", "coordinator", "decode_times", "decoded", "demand_of", "emits", "ends_ns", "engine", "front_end",
        "idle", "index", "kernel", "kv_bytes_per_token", "max_model_len", "merges_shared_reads", "name", "now",
        "num_drafts", "offload", "perf", "planned", "plans", "progress", "reservations", "residents", "runs_model",
        "serves", "shares", "stage_kinds", "step", "store", "took", "view", "waker", "watcher", "woken",
    )  # fmt: skip

    def __init__(
        self,
        index: int,
        name: str,
        *,
        serves: tuple[str, ...],
        batching: BatchingPolicy,
        perf: PerfModel | HostModel,
        kv: KVCache,
        engine: EngineProfile,
        max_model_len: int,
        kernel: Kernel,
        records: Records,
        speculation: Speculation | None = None,
        kv_bytes_per_token: int = 0,
        merges_shared_reads: bool = False,
        residents: type[Residents] = Residents,
    ) -> None:
        self.index = index
        self.name = name
        self.serves = serves
        steps = records.steps
        self.batching = batching
        self.perf = perf
        self.engine = engine
        self.max_model_len = max_model_len
        self.kernel = kernel
        self.waker: Waker = kernel
        self.coordinator: Next
        self.watcher: Watcher | None = None
        self.emits = True
        self.woken = False
        self.ends_ns = -1
        #: whether steps of decodes alone are planned past what may reach this client; and those that are
        self.plans = False
        self.planned: Plan | None = None
        cohort = SpeculativeCohort(kv.block_size, speculation) if speculation else None
        order = getattr(batching, "order", None)
        self._settle = partial(
            residents,
            kv,
            self._preempted,
            reserves_output=getattr(batching, "reserves_output", engine.reserves_output),
            generates=DECODE in serves,
            order=None if isinstance(order, FCFS) else order,
        )
        self.residents = self._settle(cohort)
        self.num_drafts = speculation.num_draft_tokens if speculation else 0
        self.view = ClientView(index, name, kv_blocks=kv.num_blocks)
        #: of all ranks together
        self.kv_bytes_per_token = kv_bytes_per_token
        #: memories outside the device that it fetches prefixes from and writes to
        self.offload: Offload | None = None
        #: where it is a KV store, what it has
        self.store: KVStore | None = None
        self.merges_shared_reads = merges_shared_reads
        #: room for decodes that come with a KV cache
        self.reservations = Reservations(self.residents)
        self.front_end = FrontEnd(self)
        self._decodes_alone = getattr(batching.next_batch, DECODES_ALONE, False) and not is_timing(batching)
        self.now = 0
        self.idle = True
        self.step = Step(tokens_per_decode=1 + self.num_drafts)
        #: the prefill chunks of the step in flight, as (task, tokens)
        self.chunks: list[tuple[Task, int]] = []
        #: cancelled while the step in flight computes for them
        self._cancelled: list[Task] = []
        self.progress = Progress(self)
        self._kv_used = 0
        #: what the last step took, ns
        self.took = 1
        #: where the model prices steps of decodes alone that follow each other at once: it, and whom it tells what ran
        self.decode_times: Callable[[int, int, int, int], list[int] | None] | None = getattr(perf, "decode_times", None)
        self.decoded: Callable[[int, int, int], None] | None = getattr(perf, "decoded", None)
        self._write_step, self._pack_step, self.append_span = steps.write, steps.pack, steps.append_span
        self._write_task, self._pack_task = records.tasks.write, records.tasks.pack
        self.runs_model = not hasattr(perf, "demand")
        #: the host whose cores and memory its steps share with others, and what they ask of it; or the link to its
        #: host's memory, where its next step begins with copies over it
        self.shares: Shares | None = None
        self._work: object = None
        self.demand_of: Callable[[Step], Demand] = getattr(perf, "demand", no_demand)
        self.stage_kinds = {kind: i for i, kind in enumerate(records.stage_kinds)}
        self._overlapped = engine.overlapped
        self._step_ns = engine.step_overhead_ns
        self._prefill_ns = engine.prefill_overhead_ns
        self._token_ns = engine.token_overhead_ns

    @property
    def _policy(self) -> str:
        return f"{type(self.batching).__name__} of {self.name}"

    def refresh_view(self) -> ClientView:
        """The router's view of this client, brought up to date."""
        self.catch_up()
        view, residents = self.view, self.residents
        kv = residents.kv
        view.num_running = num_running = len(residents.running)
        view.num_waiting = view.num_outstanding - num_running
        view.pending_prefill_tokens = residents.pending_tokens + self.front_end.incoming_tokens
        view.decode_context = residents.cohort.sum_context
        view.kv_blocks_used = kv.num_blocks - kv.free - kv.cached
        return view

    # --- the loop ---

    def start_step(self, now: int) -> None:
        """Start the next step at `now`; run ahead of the clock while nothing can reach this client."""
        kernel = self.kernel
        while True:
            horizon = kernel.horizon()
            # else it would be of one step
            if (now + self.took < horizon or (self.plans and self._can_plan())) and self.has_span():
                now = run_span(self, now, horizon)
                if now < 0:
                    return
            if not self.begin_step(now):
                return
            self.took = self.price_step()
            end = now + self.took
            if self.shares is not None:
                self._work = self.shares.work(self.demand_of(self.step), end - now, self._shared_step_ends, None, now)
                return
            if end >= kernel.horizon() or (self.emits and (self.ends_a_task() or self._has_waiting_fetches())):
                kernel.step_ends(self, end)
                return
            self.finish_step(end)
            now = end

    def catch_up(self) -> None:
        """Somebody comes or looks: what was planned has happened up to now, and at most one step is in flight."""
        plan, kernel = self.planned, self.kernel
        if plan is None:
            return
        now, instants = kernel.now, plan.instants
        num_over = bisect_right(instants, now) - 1
        if num_over and instants[num_over] == now and not kernel.is_settled:
            begin_planned(self, num_over - 1)
            if kernel.comes_later(self):
                kernel.step_ends(self, now)
                return
            self.ends_ns = -1
            self.finish_step(now)
            kernel.wake(self)
            return
        begin_planned(self, num_over)
        if num_over + 2 < len(instants):
            kernel.step_ends(self, instants[num_over + 1])

    def _can_plan(self) -> bool:
        """Whether the next end of a task, and the next block that others would lose, are more than a few steps away."""
        cohort, kv = self.residents.cohort, self.residents.kv
        if not cohort.count or cohort.ends[0] <= cohort.step + _FEW:
            return False
        return kv.free * kv.block_size > cohort.count * _FEW

    def has_span(self) -> bool:
        """Whether the next steps are decodes alone, and nobody watches them, or shares their host or their drafts."""
        if not self._only_decodes() or self.front_end.unseen or self._cancelled:
            return False
        if self.watcher is not None or self.shares is not None or self.num_drafts or self.merges_shared_reads:
            return False
        return self.offload is None or not (self.offload.waiting or self.offload.evicted)

    def begun(self, now: int, kv_used: int) -> None:
        """A step of decodes alone is in flight since `now`, on `kv_used` blocks."""
        cohort = self.residents.cohort
        self.step.decode_context = cohort.sum_context + cohort.count
        self.now, self._kv_used = now, kv_used
        self.residents.decodes_grown()

    def _has_waiting_fetches(self) -> bool:
        """Of a client that emits, as every one does that fetches."""
        return self.offload is not None and bool(self.offload.waiting)

    def _shared_step_ends(self, _: None, now: int) -> None:
        self._work = None
        self.finish_step(now)
        self.waker.wake(self)

    def begin_step(self, now: int) -> bool:
        """Ask the policy for a batch and make it the step in flight; False if the client idles instead."""
        step, residents = self.step, self.residents
        cohort = residents.cohort
        self.now = now
        self.idle = False
        offload = self.offload
        batch: Batch | Wait
        if self._only_decodes():
            residents.grow_decodes()
            batch = _DECODES if cohort.count else Wait()
        else:
            batch = self._ask(now)
        if offload is not None and offload.evicted and residents.running:
            offload.write_back(next(reversed(residents.running.values())).request, now)
        if self.front_end.unseen:
            self.front_end.see()
            if isinstance(batch, Wait):
                return self.begin_step(now)
        if type(batch) is not Batch:
            return self._wait(batch, now)
        num_decodes = cohort.count if batch.decode else 0
        step.num_decodes = step.num_sampled = num_decodes
        step.decode_context = cohort.sum_context + num_decodes if num_decodes else 0
        if self.merges_shared_reads and num_decodes and residents.prefixes:
            step.decode_context -= residents.shared_context
        step.num_prefill_tokens = 0
        self.chunks = batch.chunks
        if batch.chunks or step.chunks:
            self._fill_chunks(batch.chunks, now)
        if not num_decodes and not batch.chunks:
            if not self.reservations.blocks:
                raise InvariantError(f"{self._policy} returned an empty batch at {now} ns")
            return self._wait(Wait(), now)  # the last decode has lost its place to who is on the way
        self._kv_used = residents.kv.used
        return True

    def _only_decodes(self) -> bool:
        """Whether decodes are all that can run, under a policy that then decides nothing."""
        residents, offload = self.residents, self.offload
        if residents.prefilling_tasks or residents.handed_over or not (residents.cohort.count and self._decodes_alone):
            return False
        if offload is not None and offload.waiting and offload.has_room_for_first():
            return False
        return not residents.waiting or residents.comes_after_a_fetch(residents.waiting[0])

    def _ask(self, now: int) -> Batch | Wait:
        """The policy's batch, once all that waits here and could be considered is."""
        residents, offload = self.residents, self.offload
        residents.begin()
        while True:
            if residents.handed_over:
                self.progress.take_over(now)
            if offload is not None and offload.waiting:
                offload.begin_waiting(now)
            num_waiting = len(residents.waiting)
            batch = self.batching.next_batch(residents, residents.cohort, residents, now)
            if type(batch) is Batch or len(residents.waiting) >= num_waiting:
                return batch  # else who was next is fetched for, and others may run meanwhile

    def price_step(self) -> int:
        """What the step that has begun lasts alone, in ns; asked once, when all that shares its devices is known."""
        step = self.step
        host = self.host_ns(step)
        if self.num_drafts:  # they cost the host next to nothing
            step.num_sampled += step.num_decodes * self.num_drafts
            step.decode_context += step.num_decodes * self.num_drafts
        device = self.perf.step_time(step)
        if self.watcher is not None:
            self.watcher.step_started(self, step, device, self.now)
        took = host + device if not self._overlapped else max(host, device)
        return took if took > 1 else 1

    def host_ns(self, step: Step) -> int:
        """Host time of `step`, ns."""
        return self._step_ns + self._token_ns * step.num_sampled + (self._prefill_ns if step.chunks else 0)

    def finish_step(self, now: int) -> None:
        """The step in flight ends at `now`: its tokens exist, tasks move on."""
        if self.planned is not None:
            begin_planned(self, len(self.planned.instants) - 2)
        step, residents = self.step, self.residents
        self._write_step(self._pack_step(
            self.index, self.now, now, len(step.chunks), step.num_prefill_tokens, step.num_decodes,
            step.decode_context, self._kv_used, len(residents.waiting) + len(residents.handed_over),
        ))  # fmt: skip
        if self.watcher is not None:
            self.watcher.step_finished(self, now)
        if step.num_decodes:
            self._decodes_over(now)
        if self.chunks:
            residents.chunks_done()
            for task, num_tokens in self.chunks:
                if residents.computed(task, num_tokens):
                    self.progress.reached(task, now)
            self.chunks = []
        if self._cancelled:
            self._let_go(now)

    def decodes_over(self, now: int) -> None:
        """A step of decodes alone, which is written down already, ends at `now`."""
        self._decodes_over(now)
        if self._cancelled:
            self._let_go(now)

    def _decodes_over(self, now: int) -> None:
        finished = self.residents.decode_step_done()
        if self.progress.shown_at:
            self.progress.show(now)
        if finished is not None:
            for task in finished:
                self.progress.decoded(task, now)

    def _fill_chunks(self, chunks: list[tuple[Task, int]], now: int) -> None:
        step = self.step
        step.chunks = [(num_tokens, task.computed_tokens) for task, num_tokens in chunks]
        has_several = False
        for task, num_tokens in chunks:
            if task.admission < 0:
                story = f"request {task.request.index}"
                raise InvariantError(f"{self._policy} put {story} into a batch at {now} ns, which is not admitted")
            step.num_prefill_tokens += num_tokens
            if task.started_ns < 0:
                task.started_ns = now
                if self.offload is not None:
                    self.offload.admitted(task)
            num_sequences = task.stage.num_sequences
            if num_sequences > 1:
                has_several = True
            if task.computed_tokens + num_tokens == task.target_tokens:
                step.num_sampled += num_sequences
        if has_several:
            step.chunks = [part for task, num_tokens in chunks for part in task.sequences(num_tokens)]
        if not self.runs_model:
            step.kinds = [
                task.stage.kind
                for task, num_tokens in chunks
                for _ in (task.sequences(num_tokens) if task.stage.num_sequences > 1 else (0,))
            ]

    def ends_a_task(self) -> bool:
        """Whether the end of the step that has begun ends a task."""
        cohort = self.residents.cohort
        if self.step.num_decodes and cohort.step + 1 in cohort.calendar:
            return True
        return bool(self.chunks) and any(task.computed_tokens + n == task.target_tokens for task, n in self.chunks)

    def _wait(self, wait: object, now: int) -> bool:
        """The policy has nothing to run: so be it, unless others can come in now that nobody runs."""
        residents = self.residents
        if not residents.running and (self.reservations.are_here or (residents.prefixes and residents.surrender())):
            return self.begin_step(now)
        self._go_idle(wait, now)
        return False

    def _go_idle(self, wait: object, now: int) -> None:
        if not isinstance(wait, Wait):
            raise InvariantError(f"{self._policy} returned {wait!r} at {now} ns; a Batch or a Wait would do")
        self.idle = True
        if self.watcher is not None:
            self.watcher.idles(self, wait, now)
        if wait.until_ns is not None:
            if wait.until_ns <= now:
                raise InvariantError(f"{self._policy} waits until {wait.until_ns} ns, and it is {now} ns already")
            self.kernel.at(wait.until_ns, self._timer, None)
        elif self.reservations.blocks and self.residents.num_waiting:
            self.coordinator.starves(self, now)

    def _timer(self, _: None, now: int) -> None:
        if self.idle:
            self.waker.wake(self)

    def generated(self, task: Task) -> int:
        """Tokens that `task`, which decodes, has generated up to now since it joined the cohort."""
        self.catch_up()
        return self.residents.cohort.generated(task)

    # --- tasks leave ---

    def sent(self, task: Task) -> None:
        """The KV cache of `task` has reached the client that decodes on."""
        self.residents.sent(task)
        if self.idle and (self.residents.num_waiting or self._has_waiting_fetches()):
            self.waker.wake(self)

    def cancel(self, task: Task, now: int) -> None:
        """Let `task` go: at once, or as the step in flight ends if that computes for it."""
        self.catch_up()
        if task not in self.front_end.incoming and self._is_in_flight(task):
            self._cancelled.append(task)
        else:
            self._drop(task, now)

    def _drop(self, task: Task, now: int) -> None:
        if self.offload is not None:
            self.offload.forget(task)
        if task in self.front_end.incoming:
            self.front_end.forget(task)
        else:
            self.record_segment(task, now, DROPPED)
            self.residents.drop(task)
            if self.idle and self.residents.num_waiting:
                self.waker.wake(self)  # there is room now
        self.view.num_outstanding -= 1
        self.coordinator.dropped(task, now)
        if self.offload is not None:
            self.offload.begin_waiting(now)

    def _is_in_flight(self, task: Task) -> bool:
        if self.idle or task.admission < 0:
            return False
        if any(task is each for each, _ in self.chunks):
            return True
        began_before = task.started_ns <= self.now  # not with what the step has just computed
        return self.step.num_decodes > 0 and began_before and task.admission not in self.residents.prefilling_tasks

    def _let_go(self, now: int) -> None:
        """The step that computed for cancelled tasks is over; some have ended with it."""
        cancelled, self._cancelled = self._cancelled, []
        for task in cancelled:
            if self.residents.running.get(task.admission) is task:
                self._drop(task, now)

    def _preempted(self, task: Task) -> None:
        """`task` is about to lose its place and its blocks: close its segment and open the next."""
        self.record_segment(task, self.now, PREEMPTED)
        task.queued_ns = self.now
        task.started_ns = task.joined_ns = -1
        task.cached_tokens = task.inherited_tokens = task.found_tokens = 0

    def cut(self, now: int, how: int = CUT) -> list[Task]:
        """The simulation stops at `now`: close the segments of all tasks here, and return them and those to come."""
        residents = self.residents
        if self.planned is not None:
            begin_planned(self, bisect_left(self.planned.instants, now) - 1)
        tasks = [*residents.running.values(), *residents.waiting, *residents.handed_over]
        for task in tasks:
            self.record_segment(task, now, how)
            if task.join_step >= 0:
                task.generated_tokens += residents.cohort.generated(task)
        return [*tasks, *self.front_end.incoming]

    def void_step(self, now: int) -> None:
        """The step in flight, if there is one, ends at `now` for nobody: a row with nothing in it."""
        work, self._work = self._work, None
        if work is not None and self.shares is not None:
            self.shares.stop(work, now)
        if work is not None or self.waker.void(self, now):
            self._write_step(self._pack_step(self.index, self.now, now, 0, 0, 0, 0, self._kv_used, 0))
            if self.watcher is not None:
                self.watcher.step_lost(self, now)

    def clear(self) -> None:
        """It has nothing and nobody, as at first; the steps of its cohort stay counted."""
        cohort = self.residents.cohort
        for part in (self.residents.kv, cohort, self.front_end, *((self.offload,) if self.offload else ())):
            part.clear()
        before, self.residents = self.residents, self._settle(cohort)
        self.residents.succeed(before)
        self.reservations = Reservations(self.residents)
        self.chunks, self._cancelled = [], []
        self.progress.shown_at.clear()
        self.view.num_outstanding = 0
        self.idle = True

    def record_segment(self, task: Task, now: int, how: int) -> None:
        computed = task.computed_tokens - task.cached_tokens - task.inherited_tokens
        cohort, generated, last_step = self.residents.cohort, int(task.joined_ns >= 0), -1
        if task.join_step >= 0:
            generated += cohort.generated(task)
            last_step = cohort.step
        self._write_task(self._pack_task(
            task.request.index, task.stage_index, self.stage_kinds[task.stage.kind], self.index,
            task.queued_ns, task.started_ns, task.joined_ns, now, how,
            computed, task.cached_tokens, task.join_step, last_step, generated,
        ))  # fmt: skip


def no_demand(step: Step) -> Demand:
    """What a step asks of a host whose share in it isn't known."""
    return Demand()
