"""The ledger: conservation laws checked while a run is going on, and once more over its records.

It watches clients and the coordinator and recounts by brute force what they keep as sums (`--check`; on in every test).
It changes nothing: a run with and without it gives equal bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from mist.availability.laws import breaches
from mist.client import Client
from mist.coordinator import Coordinator
from mist.errors import InvariantError
from mist.kernel import FOREVER, Kernel
from mist.lanes import Lane
from mist.memory.hierarchy import Found
from mist.metrics.load import littles_identity
from mist.offload import Memory
from mist.pipeline.stages import StageList
from mist.records import (
    CANCELLED,
    FINISHED,
    KV_WRITE,
    NO_CLIENT,
    PREEMPTED,
    PREFIX_FETCH,
    TIMED_OUT,
    Records,
)
from mist.request import DECODE, Step, Task, Wait
from mist.speculation import PACE_BITS, SpeculativeCohort
from mist.streams import Streaming
from mist.swap import SwappingResidents
from mist.tenant import Tenant
from mist.transfer_laws import hand_over_breaches, transfer_breaches, under_way_of

#: waiting tasks, or requests, above which they are recounted only every that many steps or instants
LONG_QUEUE = 256
#: steps and instants that are recounted by brute force, each; later ones are only once in so many
DENSE, SPARSE = 4096, 64
#: instants between two recounts of all that memories hold
LONG_RECOUNT = 8192


class Ledger:
    """Attach it before the run; `close()` after. Every breach is an `InvariantError` with the numbers."""

    def __init__(self, kernel: Kernel, coordinator: Coordinator, clients: Sequence[Client], records: Records) -> None:
        self.coordinator = coordinator
        self.clients = clients
        self.records = records
        self.num_checks = 0
        self._num_steps = self._num_instants = 0
        self._now = 0
        #: each part of a transfer ends in a whole ns
        self._rounding_ns = 1000 if coordinator.handing.terms.layerwise else 1
        self._busy_until = [0] * len(clients)
        self._device_until = [0] * len(clients)
        self._told_to_wait = [False] * len(clients)
        #: stored bytes that were to be fetched, by request, memory and client
        self._fetched_bytes: dict[tuple[int, int, int], int] = {}
        memories = {memory for client in clients if client.offload for memory in client.offload.memories}
        self._memories = sorted(memories, key=lambda memory: -memory.index)
        kernel.on_instant = self.check_instant
        for client in clients:
            if isinstance(client.watcher, Streaming):
                client.watcher.beside = self
            else:
                client.watcher = self

    def check_instant(self, now: int) -> None:
        """requests, tasks and places: each task is one client's, perhaps on its way; each request has one or more."""
        self._num_instants += 1
        if self._num_instants > DENSE and self._num_instants % SPARSE:
            return
        self.check_requests(now)
        delayed = self.coordinator.delays.waiting
        placed = sum(client.view.num_outstanding for client in self.clients)
        placed += len(delayed) + len(self.coordinator.parked)
        self._equal("tasks in exactly one place", placed, self.coordinator.num_tasks + self.coordinator.num_cancelled)
        for memory in self._memories:
            self._check_memory(memory, recount=not self._num_instants % LONG_RECOUNT)
        in_system = self.coordinator.in_system.values()
        if len(in_system) > LONG_QUEUE and self._num_instants % LONG_QUEUE:  # a multiple of SPARSE
            return
        self._equal("tasks of requests", sum(request.num_tasks for request in in_system), self.coordinator.num_tasks)
        self._true(all(request.num_tasks for request in in_system), "a request in the system has no task")
        self._true(all(until > now for until in delayed.values()), "a delay is over, and its request still waits")

    def check_requests(self, now: int) -> None:
        """requests: arrived = left + in the system; tasks: accepted = incoming + waiting + running.

        work: no client sleeps through what came in, unless it is next in a lane whose common step is in flight.
        """
        coordinator = self.coordinator
        under_way, leaving = under_way_of(coordinator, self.clients)
        self._now = now
        for breach in hand_over_breaches(coordinator.handing, coordinator.network, self.clients):
            self._true(False, breach)
        self._equal("arrived", coordinator.num_arrived, coordinator.num_left + len(coordinator.in_system))
        for client in self.clients:
            residents = client.residents
            incoming = client.view.num_outstanding - len(residents.running) - residents.num_waiting
            self._equal(f"{client.name}: incoming tasks", incoming, len(client.front_end.incoming))
            at_front_end = incoming - under_way[client.index]
            possible = at_front_end == 0 or (at_front_end > 0 and client.engine.has_front_end)
            self._true(possible, f"{client.name}: {at_front_end} tasks at the front end")
            self._equal(f"{client.name}: KV caches being sent", len(residents.sending), leaving[client.index])
            may_sleep = self._told_to_wait[client.index] or residents.sending or client.reservations.blocks
            asleep = client.idle and not may_sleep and residents.num_waiting > 0
            told = not asleep or _is_next(client)
            self._true(told, f"{client.name} was not woken for {residents.num_waiting} waiting tasks")

    # --- what clients report ---

    def step_started(self, client: Client, step: Step, device_ns: int, now: int) -> None:
        """floor, time, memory and cohort laws of the step that starts."""
        self._now = now
        self._true(now >= self._busy_until[client.index], f"{client.name}: a step starts inside another")
        self._busy_until[client.index] = FOREVER
        self._device_until[client.index] = now + device_ns
        self._num_steps += 1
        if self._num_steps > DENSE and self._num_steps % SPARSE:
            return
        floor = client.perf.floor_time(step)
        self._true(device_ns >= floor, f"{client.name}: a step of {device_ns} ns beats its floor of {floor} ns: {step}")
        self._check_cohort(client)
        self._check_context(client, step)
        self._check_blocks(client)
        self._check_pending(client)

    def step_finished(self, client: Client, now: int) -> None:
        """time: steps of a client follow each other. floor: a step lasts as long as the device computes."""
        self._now = now
        due = self._device_until[client.index]
        if now >= due and self._busy_until[client.index] == FOREVER:
            self.num_checks += 2  # at every step: words only where there is something to say
        else:
            self._true(now >= due, f"{client.name}: a step ends {due - now} ns before its device has computed it")
            self._true(False, f"{client.name}: a step ends that never started")
        self._busy_until[client.index] = now

    def step_lost(self, client: Client, now: int) -> None:
        """time: what is lost was under way."""
        self._now = now
        self._true(self._busy_until[client.index] == FOREVER, f"{client.name}: a step is lost that never started")
        self._busy_until[client.index] = now

    def idles(self, client: Client, wait: Wait, now: int) -> None:
        """work: a client that could work and is not told when to try again is a bug of its policy."""
        self._now = now
        residents = client.residents
        self._told_to_wait[client.index] = wait.until_ns is not None
        # blocks that are being sent come back, and the client is woken then
        returning = residents.sending or client.reservations.blocks
        idle_for_good = wait.until_ns is None and not returning and (residents.running or residents.num_waiting)
        tasks = f"{len(residents.running)} running tasks, {residents.num_waiting} waiting"
        self._true(not idle_for_good, f"{client.name} idles with {tasks}, {residents.kv.available} free blocks")
        self._check_blocks(client)

    def fetches(self, client: Client, task: Task, first_token: int, found: Sequence[Found], now: int) -> None:
        """memories: a fetch is of what the memory has of a prompt, right behind what is there already."""
        self._now = now
        self._true(task.is_known, f"{client.name}: KV of the prompt is fetched for the stage {task.stage.kind}")
        assert client.offload is not None
        self._check_room(client)
        hierarchy, request, token = client.offload.hierarchy, task.request, first_token
        self._equal(f"{client.name}: found here", client.residents.kv.match(task).num_tokens, token)
        for tier, num_tokens in found:
            story = f"{client.name}: {num_tokens} tokens of request {request.index} from {tier.spec.name}"
            memory = next(memory for memory in client.offload.memories if memory.tier is tier)
            self._true(0 < num_tokens < task.target_tokens - token, f"{story} leave nothing to compute")
            if memory.goes_by_statement(request):
                self._true(token + num_tokens <= request.hit_tokens, f"{story} are more than it is said to have")
            else:
                keys, unit = client.offload.keys(memory, task, token + num_tokens), hierarchy.unit_tokens
                units = range(token // unit, (token + num_tokens) // unit)
                size = tier.entry_units
                entries = {keys[min(i // size * size + size, len(keys)) - 1] for i in units}
                self._true(all(key in tier for key in entries), f"{story} aren't there")
            to, num_bytes = (request.index, memory.index, client.index), num_tokens * hierarchy.token_bytes
            self._fetched_bytes[to] = self._fetched_bytes.get(to, 0) + tier.spec.stored_bytes(num_bytes)
            token += num_tokens

    def _check_room(self, client: Client) -> None:
        """memories: a fetch begins where there is room for all that is fetched, besides the blocks in use."""
        residents, kv = client.residents, client.residents.kv
        assert client.offload is not None
        fetches = client.offload.fetching.values()
        stretches = [(fetch.first_token, fetch.first_token + fetch.num_tokens) for fetch in fetches]
        if len(residents.waiting) <= LONG_QUEUE:
            tasks = [task for tasks in (residents.waiting, client.front_end.unseen) for task in tasks]
            stretches += [(task.found_from, task.found_tokens) for task in tasks if task.found_tokens]
        fetched = sum(kv.blocks_for(last) - kv.blocks_for(first) for first, last in stretches)
        told = f"{client.name}: {kv.used} blocks in use and {fetched} fetched, of {kv.num_blocks}"
        self._true(kv.used + fetched <= kv.num_blocks, told)

    # --- once the run is over ---

    def close(self, now: int) -> None:
        """Recount the records: tokens, times, and Little's identity over a drained run."""
        self._now = now
        self.check_requests(now)
        steps, tasks, requests = (
            t.as_columns() for t in (self.records.steps, self.records.tasks, self.records.requests)
        )
        for i, client in enumerate(self.clients):
            mine, here = steps["client"] == i, tasks["client"] == i
            self._equal(f"{client.name}: prefill tokens", _sum(steps["num_prefill_tokens"], mine),
                        _sum(tasks["computed_tokens"], here))  # fmt: skip
            decoded = here & (tasks["join_step"] >= 0)
            self._equal(f"{client.name}: decode tokens", _sum(steps["num_decodes"], mine),
                        _sum(tasks["last_step"] - tasks["join_step"], decoded))  # fmt: skip
            num_steps, gained = (
                (tasks["last_step"] - tasks["join_step"])[decoded],
                (tasks["generated_tokens"] - (tasks["joined_ns"] >= 0))[decoded],
            )
            most = client.residents.cohort.tokens_per_decode * num_steps
            self._true(bool(np.all((num_steps <= gained) & (gained <= most))), f"{client.name}: tokens of decode steps")
            starts, ends = steps["start_ns"][mine], steps["end_ns"][mine]
            self._true(bool(np.all(starts[1:] >= ends[:-1])), f"{client.name}: steps overlap")
        self._check_common_steps(steps)
        for breach in breaches(self.records):
            self._true(False, breach)
        self._equal("requests recorded", len(requests["request"]), self.coordinator.num_arrived)
        first = requests["first_token_ns"]
        in_order = (first < 0) | ((requests["arrival_ns"] <= first) & (first <= requests["end_ns"]))
        self._true(bool(np.all(in_order)), "a first token lies outside its request")
        self._equal("preemptions", int(requests["num_preemptions"].sum()), int((tasks["how"] == PREEMPTED).sum()))
        self._check_tasks(tasks, requests)
        for tenant in self.coordinator.tenants:
            its_tasks, its_requests = _of(tenant, tasks), _of(tenant, requests)
            self._check_lengths(tenant, its_tasks, its_requests)
            allowed = {client.index for route in tenant.routes.values() for client in route.clients} | {NO_CLIENT}
            elsewhere = set(np.unique(its_tasks["client"]).tolist()) - allowed
            self._true(not elsewhere, f"tenant {tenant.index} was on clients {sorted(elsewhere)}, which aren't its own")
        for breach in transfer_breaches(self.records, self.coordinator.network, self._rounding_ns):
            self._true(False, breach)
        self._check_memories()
        if not self.coordinator.in_system:
            integral, sojourns = littles_identity(requests, int(requests["end_ns"].max(initial=0)))
            self._equal("Little's integral", integral, sojourns)

    def _check_common_steps(self, steps: dict[str, np.ndarray]) -> None:
        """time: the groups of a lane step together or not at all."""
        for lane in dict.fromkeys(client.waker for client in self.clients if isinstance(client.waker, Lane)):
            mine = np.isin(steps["client"], [client.index for client in lane.clients])
            common = np.unique(np.stack((steps["start_ns"][mine], steps["end_ns"][mine])), axis=1)
            name = lane.clients[0].name
            self._true(bool(np.all(common[0, 1:] >= common[1, :-1])), f"{name}: the groups of its lane don't keep step")

    def _check_tasks(self, tasks: dict[str, np.ndarray], requests: dict[str, np.ndarray]) -> None:
        """time: queued <= started <= joined <= end; tokens: computed again only after a preemption."""
        last = tasks["queued_ns"]
        for name in ("started_ns", "joined_ns", "end_ns"):
            in_order = (tasks[name] < 0) | (tasks[name] >= last)
            self._true(bool(np.all(in_order)), f"{name} of a task lies before what comes before it")
            last = np.maximum(last, tasks[name])
        kinds = self.records.stage_kinds
        decodes = tasks["kind"] == (kinds.index(DECODE) if DECODE in kinds else -1)
        preempted = requests["request"][requests["num_preemptions"] > 0]
        again = decodes & ~np.isin(tasks["request"], [*preempted.tolist(), *self.coordinator.begun_anew])
        self._equal("tokens computed again without a preemption", _sum(tasks["computed_tokens"], again), 0)

    def _check_lengths(self, tenant: Tenant, tasks: dict[str, np.ndarray], requests: dict[str, np.ndarray]) -> None:
        """tokens: those that a tenant's requests asked for came out, where every one goes through the same stages."""
        if tenant.pipeline.is_fixed:
            finished = requests["status"] == FINISHED
            generates = DECODE in tenant.pipeline.kinds
            wanted = np.asarray(tenant.workload.output_tokens)[requests["request"] - tenant.first_request] * generates
            self._true(bool(np.all((requests["output_tokens"] == wanted)[finished])), "a request ended short of tokens")
            self._check_emitted(tenant, tasks, requests)
        if type(tenant.pipeline) is StageList:
            self._check_prompts(tenant.pipeline.kinds, tasks, requests)

    def _check_emitted(self, tenant: Tenant, tasks: dict[str, np.ndarray], requests: dict[str, np.ndarray]) -> None:
        """tokens: users got all that was emitted, but for those who gave up while a step computed for them."""
        emitted = np.zeros(len(tenant.workload), np.int64)
        np.add.at(emitted, tasks["request"] - tenant.first_request, tasks["generated_tokens"])
        emitted, shown = emitted[requests["request"] - tenant.first_request], requests["output_tokens"]
        gone = np.isin(requests["status"], (CANCELLED, TIMED_OUT))
        self._equal("tokens emitted", _sum(emitted, ~gone), _sum(shown, ~gone))
        self._true(bool(np.all(emitted >= shown)), "a user got tokens that nobody emitted")

    def _check_prompts(
        self, kinds: Sequence[str], tasks: dict[str, np.ndarray], requests: dict[str, np.ndarray]
    ) -> None:
        """tokens: computed + found in the prefix cache = prompt, per stage, unless a preemption computed some again."""
        done = np.zeros(int(requests["request"].max(initial=-1)) + 1, np.int64)
        np.add.at(done, tasks["request"], tasks["computed_tokens"] + tasks["cached_tokens"])
        plain = (requests["status"] == FINISHED) & (requests["num_preemptions"] == 0)
        plain &= ~np.isin(requests["request"], list(self.coordinator.begun_anew))
        wanted = requests["input_tokens"] * (len(kinds) - (DECODE in kinds))
        as_wanted = (done[requests["request"]] == wanted)[plain]
        self._true(bool(np.all(as_wanted)), "computed and found tokens of a request are not those of its prompt")

    def _check_memories(self) -> None:
        """memories: all that was to be fetched was sent, or will be, and all that a tier got was written to it."""
        rows = self.records.transfers.as_columns()
        for memory in self._memories:
            self._check_memory(memory, recount=True)
            written = (rows["kind"] == KV_WRITE) & (rows["receiver"] == memory.index)
            name, inserted = memory.tier.spec.name, memory.tier.inserted_bytes
            self._equal(f"{name}: bytes written", _sum(rows["bytes"], written), inserted)
        sent: dict[tuple[int, int, int], int] = {}
        fetched = rows["kind"] == PREFIX_FETCH
        columns = (rows[name][fetched].tolist() for name in ("request", "sender", "receiver", "bytes"))
        for request, sender, receiver, num_bytes in zip(*columns, strict=True):
            sent[request, sender, receiver] = sent.get((request, sender, receiver), 0) + num_bytes
        self._equal("fetches recorded", sent.keys(), self._fetched_bytes.keys())
        cut = set(rows["request"][fetched & (rows["end_ns"] < 0)].tolist())  # the rest of a layer-wise fetch isn't sent
        whole = {to: n for to, n in self._fetched_bytes.items() if to[0] not in cut}
        self._equal("bytes fetched", {to: n for to, n in sent.items() if to[0] not in cut}, whole)

    # --- recounting ---

    def _check_memory(self, memory: Memory, *, recount: bool) -> None:
        """memories: held = inserted - evicted <= capacity; what can't be found yet is on its way there."""
        tier = memory.tier
        name, held = tier.spec.name, tier.held_bytes
        self._equal(f"{name}: bytes held", held, tier.inserted_bytes - tier.evicted_bytes)
        self._true(0 <= held <= tier.spec.capacity_bytes, f"{name}: {held} bytes in {tier.spec.capacity_bytes}")
        if recount:
            self._equal(f"{name}: bytes held", held, tier.count_held_bytes())
            pending = tier.count_pending_bytes()
            under_way = sum(t.num_bytes for t in self.coordinator.network.in_flight if t.receiver == memory.index)
            self._true(
                pending <= under_way, f"{name}: {pending} bytes can't be found, and {under_way} are on their way"
            )

    def _check_cohort(self, client: Client) -> None:
        cohort, residents = client.residents.cohort, client.residents
        decoding = [t for key, t in residents.running.items() if key not in residents.prefilling_tasks]
        self._equal(f"{client.name}: cohort count", cohort.count, len(decoding))
        if isinstance(cohort, SpeculativeCohort):
            self._check_paces(client, cohort, decoding)
        else:
            contexts = [cohort.context(t) for t in decoding]
            self._equal(f"{client.name}: cohort context", cohort.sum_context, sum(contexts))
            boundary = [0] * cohort.block_size
            for context in contexts:
                boundary[(cohort.step - context) % cohort.block_size] += 1
            self._equal(f"{client.name}: cohort block boundaries", cohort.boundary, boundary)
        for task in decoding:
            self._check_calendar(client, task)

    def _check_context(self, client: Client, step: Step) -> None:
        """A step reads every decode's context, or blocks that several share once where reads are merged."""
        residents = client.residents
        context = residents.cohort.sum_context + step.num_decodes * step.tokens_per_decode if step.num_decodes else 0
        users = Counter(task.shared for task in residents.running.values() if task.shared)
        running = {each: each.num_running for each in residents.prefixes if each.num_running}
        self._equal(f"{client.name}: decodes that share prefixes", running, dict(users))
        if client.merges_shared_reads and step.num_decodes:
            context -= sum((n - 1) * shared.num_blocks for shared, n in users.items()) * residents.kv.block_size
        self._equal(f"{client.name}: decode context", step.decode_context, context)

    def _check_paces(self, client: Client, cohort: SpeculativeCohort, decoding: Sequence[Task]) -> None:
        """Exact contexts, and the blocks of the next step, which none of these holds yet or all do."""
        exact = sum((t.target_tokens << PACE_BITS) + (cohort.step - t.join_step) * t.pace for t in decoding)
        self._equal(f"{client.name}: cohort context", cohort.sum_context, exact >> PACE_BITS)
        held, growing = (
            sum(client.residents.kv.blocks_for(cohort.reserved_tokens(t, growing)) for t in decoding)
            for growing in (False, True)
        )
        self._equal(f"{client.name}: cohort block boundaries", cohort.num_new_blocks(), growing - held)

    def _check_calendar(self, client: Client, task: Task) -> None:
        cohort = client.residents.cohort
        steps = task.stage.oracle_output_tokens - task.generated_tokens
        if task.pace:
            steps = -(-(steps << PACE_BITS) // task.pace)
        left = steps - (cohort.step - task.join_step)
        if task.finish_step - cohort.step == left and task in cohort.calendar.get(task.finish_step, ()):
            self.num_checks += 2  # for every decode of every step: words only where there is something to say
            return
        story = f"{client.name}: request {task.request.index}"
        self._equal(f"{story}: steps to its last token", task.finish_step - cohort.step, left)
        self._true(task in cohort.calendar.get(task.finish_step, []), f"{story} is missing in the calendar")

    def _check_pending(self, client: Client) -> None:
        """pending tokens, recounted; a long queue only now and then, or checking would take quadratic time."""
        residents = client.residents
        if len(residents.waiting) > LONG_QUEUE and self._num_steps % LONG_QUEUE:
            return
        pending = sum(t.remaining_tokens for tasks in (residents.waiting, residents.prefilling) for t in tasks)
        self._equal(f"{client.name}: pending tokens", residents.pending_tokens, pending)

    def _check_blocks(self, client: Client) -> None:
        residents, kv = client.residents, client.residents.kv
        private = sum(residents.held_blocks(t) - t.num_indexed * kv.unit_blocks for t in residents.running.values())
        private += sum(
            kv.blocks_for(t.computed_tokens) - t.num_indexed * kv.unit_blocks for t in residents.sending.values()
        )
        private += sum(client.reservations.blocks.values())
        private += sum(p.num_blocks - p.holder.num_indexed * kv.unit_blocks for p in residents.prefixes)
        referenced = private + kv.count_referenced_units()
        self._equal(f"{client.name}: KV blocks", kv.free + kv.cached + referenced, kv.num_blocks)
        self._equal(f"{client.name}: cached KV blocks", kv.cached, kv.count_evictable())
        self._true(kv.free >= 0, f"{client.name}: {kv.free} free KV blocks")
        if isinstance(residents, SwappingResidents):
            self._check_swap(client.name, residents)

    def _check_swap(self, name: str, residents: SwappingResidents) -> None:
        """swap: its space holds the contexts of those that wait swapped out, whole and nothing else."""
        swap = residents.swap
        contexts = {task: residents.kv.blocks_for(task.computed_tokens) for task in swap.tasks}
        self._equal(f"{name}: blocks swapped out", swap.tasks, contexts)
        self._equal(f"{name}: swap space in use", swap.used, sum(contexts.values()))
        self._true(swap.used <= swap.num_blocks, f"{name}: {swap.used} blocks in a swap space of {swap.num_blocks}")
        lost = [task.request.index for task in swap.tasks if task not in residents.handed_over]
        self._true(not lost, f"{name}: requests {lost} are swapped out and don't wait")

    def _equal(self, law: str, left: object, right: object) -> None:
        if left == right:
            self.num_checks += 1  # some of these are long to write out
        else:
            self._true(False, f"{law}: {left} is not {right}")

    def _true(self, holds: bool, law: str) -> None:
        self.num_checks += 1
        if not holds:
            raise InvariantError(f"at {self._now} ns: {law}")


def _is_next(client: Client) -> bool:
    """Whether its lane has a common step in flight and knows that it has work for the next."""
    return client.woken and isinstance(client.waker, Lane) and bool(client.waker.stepping)


def _of(tenant: Tenant, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The rows of a tenant's requests."""
    place = rows["request"] - tenant.first_request
    mine = (place >= 0) & (place < len(tenant.workload))
    return {name: column[mine] for name, column in rows.items()}


def _sum(column: np.ndarray, where: np.ndarray) -> int:
    return int(column[where].sum())
