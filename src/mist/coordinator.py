"""The coordinator: stage to stage. Ask the pipeline for the next stage and the router for a client; hand the task over.

It writes a row for every request that leaves. It never looks into a client: routers see views, and clients report
through `stage_done` and `rejected`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial

from mist.client import Client
from mist.delays import Delays
from mist.errors import InvariantError
from mist.hand_over import HandOver, Terms
from mist.kernel import Kernel
from mist.lending import Lending
from mist.network import Network
from mist.records import FINISHED, HAND_OFF, REFUSED, REJECTED, UNFINISHED, Records
from mist.request import (
    DECODE,
    NO_DEADLINE,
    PREFILL,
    TURNED_AWAY,
    Branch,
    ClientView,
    Delay,
    FirstOf,
    Fork,
    Join,
    Pipeline,
    Request,
    Stage,
    StageResult,
    Task,
)
from mist.swap import SwappingResidents
from mist.tenant import Route, Tenant
from mist.views import Views


class Coordinator:
    """Takes the requests of all `tenants` through their stages."""

    def __init__(
        self,
        *,
        kernel: Kernel,
        records: Records,
        clients: Sequence[Client],
        network: Network,
        tenants: Sequence[Tenant],
        views: Views | None = None,
        terms: Terms | None = None,
        lending: Lending | None = None,
    ) -> None:
        self.kernel = kernel
        self.records = records
        self.clients = clients
        self.network = network
        self.tenants = tenants
        self.delays = Delays(kernel, records, self._delay_ended)
        #: what routers and admission policies see of the clients
        self.views = views or Views()
        for tenant in tenants:
            tenant.ask(self.views)
        terms = terms or Terms()
        for tenant in tenants:
            tenant.hands_over(terms.reach)
        self.views.count_promises = terms.at_arrival
        self.handing = HandOver(kernel, network, terms, self._decoders, self._choose, self.again)
        self.lending = lending
        self.in_system: dict[int, Request] = {}
        #: called with the number of requests that have left, now and then
        self.on_progress: Callable[[int], None] | None = None
        self.num_arrived = 0
        self.num_left = 0
        #: tasks that are placed and not over
        self.num_tasks = 0
        #: tasks that nobody waits for, until their clients have let them go
        self.num_cancelled = 0
        #: tasks for which no client is up, in order, and the clients that each waits for
        self.parked: dict[Task, Collection[Client]] = {}
        #: requests with tasks that began anew
        self.begun_anew: set[int] = set()
        #: why none of some clients will come up, if so; None where clients don't go down
        self.nobody_comes: Callable[[Collection[Client]], str] | None = None
        self._reasons: dict[str, int] = {}
        for client in clients:
            client.coordinator = self
            # what a client fetches, writes or swaps shares channels with others
            moves = client.offload is not None or isinstance(client.residents, SwappingResidents)
            client.emits = moves or any(tenant.passes_on(client) for tenant in tenants)

    def start(self, tenants: Sequence[Tenant] | None = None) -> None:
        """Let the first requests arrive, of all tenants or of some."""
        for client in self.clients:
            client.plans = self._lets_plan(client)
        for tenant in self.tenants if tenants is None else tenants:
            tenant.start(self.kernel, self._begin)

    def _lets_plan(self, client: Client) -> bool:
        """Whether nobody but who comes to `client` or leaves it looks at what it does, and most go to others."""
        if len(self.clients) == 1 or self.nobody_comes is not None or self.lending is not None:
            return False
        return client.offload is None and all(tenant.lets_plan(client) for tenant in self.tenants)

    def _begin(self, tenant: Tenant, request: Request, now: int) -> None:
        self.in_system[request.index] = request
        self.num_arrived += 1
        if tenant.admission and (reason := tenant.refuses(request, self.views, now)):
            self._leave(request, REJECTED, now, reason)
            return
        index = request.index - tenant.first_request
        branch = Branch(request, tenant.pipeline(request, lambda: tenant.rng_of(index)), now)
        if tenant.patience is not None and tenant.patience.after_ns[index] < NO_DEADLINE:
            self.kernel.at(
                now + tenant.patience.after_ns[index], self._give_up, (branch, tenant.patience.statuses[index])
            )
        self._start(branch, None, None, now)

    # --- stage to stage ---

    def stage_done(self, task: Task, result: StageResult, client: Client | None, now: int) -> Sequence[Task]:
        """`task` ended on `client`; the decodes that are to go on with its KV cache, if any."""
        request, stage, branch = task.request, task.stage, task.branch
        assert branch is not None
        if branch.is_cancelled:
            self.dropped(task, now)
            return ()
        request.output_tokens += stage.seen_by_user(result.output_tokens)
        if stage.gates:
            request.gate_ns = now
        request.num_tasks -= 1
        self.num_tasks -= 1
        if client is not None and (self.lending is not None or self.handing.awaiting or self.handing.early):
            self._left(task, client, now)
        return self.advance(branch, result, client, now)

    def _left(self, task: Task, client: Client, now: int) -> None:
        """`task` is over on `client`, perhaps before its end: others may have been waiting for its place."""
        if self.handing.awaiting:
            self.handing.room_came(client, now)
        if self.handing.early:
            self.handing.settle(task, now)
        if self.lending is not None:
            self.lending.ended(task, client, now)

    def advance(self, branch: Branch, result: StageResult | None, here: Client | None, now: int) -> Sequence[Task]:
        """Ask for the next stage and place it; decodes are returned, to go on where their prefill left the KV cache."""
        request, pipeline = branch.request, branch.pipeline
        branch.task = branch.fork = None
        if request.rejected_for:
            self._leave_if_over(request, now)
            return ()
        branch.last = result
        try:
            stage = next(pipeline) if result is None else pipeline.send(result)
            while isinstance(stage, Stage) and not stage.has_work:
                if stage.shown_tokens:
                    _show(request, stage.shown_tokens, now)
                branch.last = StageResult(now, now)
                stage = pipeline.send(branch.last)  # no work is no stage
        except StopIteration as end:
            self._ended(branch, end.value or branch.last or StageResult(now, now), here, now)
            return ()
        if not isinstance(stage, Stage):
            return self._fork(branch, stage, here, now)
        if stage.kind == PREFILL and stage.visible:
            request.prompt_tokens = stage.input_tokens
        task = Task(request, stage, request.num_stages, stage.input_tokens, now, branch)
        if stage.context is not None:
            unit_tokens = self.tenants[request.tenant].workload.hash_block_size
            task.context_keys = request.keys_of(stage.context, unit_tokens)
        branch.task = task
        request.num_stages += 1
        request.num_tasks += 1
        self.num_tasks += 1
        if isinstance(stage, Delay):
            self.delays.begin(task, stage, now)
            return ()
        if stage.kind == DECODE and not stage.input_tokens:
            if here is None:
                raise InvariantError(f"request {request.index}: a decode must follow a stage that leaves a KV cache")
            branch.client = -1
            return (task,)
        self._place(task, here, now)
        return ()

    def _place(self, task: Task, here: Client | None, now: int) -> None:
        """Give `task` to a client; what the stage before, on `here`, hands on to it is sent there first."""
        there = self._choose(task, now)
        if there is None:
            self._park(task, now)
            return
        if self.lending is not None:
            there = self.lending.place(task, there, self._decoders(task), now)
        self.views.placed(task, there)
        task.branch.client = there.index  # type: ignore[union-attr]
        if not there.front_end.expect(task, now):
            return
        if self.handing.terms.at_arrival and self.handing.is_early(task, there):
            self.handing.prepare(task, there, partial(self._bring, here, there), now)
        else:
            self._bring(here, there, task, now)

    def _bring(self, here: Client | None, there: Client, task: Task, now: int) -> None:
        stage, network = task.stage, self.network
        if here is None or here is there or not network.carries_all or not stage.input_bytes:
            there.front_end.receive(task, now)
        else:
            network.send(task.request.index, HAND_OFF, here.index, there.index, stage.input_bytes, self._handed_on,
                         (task, there), now)  # fmt: skip

    def _delay_ended(self, task: Task, now: int) -> None:
        self.stage_done(task, StageResult(task.started_ns, now), None, now)

    def _handed_on(self, transfer: tuple[Task, Client], now: int) -> None:
        task, there = transfer
        task.queued_ns = now
        there.front_end.receive(task, now)

    def _start(self, branch: Branch, result: StageResult | None, here: Client | None, now: int) -> None:
        """Go on where no KV cache is at hand: at a pipeline's begin, or after branches have joined."""
        if self.advance(branch, result, here, now):
            story = f"request {branch.request.index}"
            raise InvariantError(f"{story}: a decode must directly follow the stage that leaves its KV cache")

    def _fork(self, branch: Branch, fork: Fork, here: Client | None, now: int) -> Sequence[Task]:
        """Start the branches of `fork`; one that is over at once, or rejected, may end it before all have begun."""
        num_branches = len(fork.branches)
        num_needed = min(fork.k, num_branches) if isinstance(fork, FirstOf) else num_branches
        join = Join(branch, num_needed, isinstance(fork, FirstOf) and fork.cancel_rest)
        if not num_needed:
            self._start(branch, StageResult(now, now), here, now)
            return ()
        branch.fork = join
        pipelines = [_only(part) if isinstance(part, Stage) else part for part in fork.branches]
        join.branches = [Branch(branch.request, each, now, join, place) for place, each in enumerate(pipelines)]
        decodes: list[Task] = []
        branch.request.num_tasks += 1  # it stays until all have begun
        for each in join.branches:
            if branch.request.rejected_for or each.is_cancelled:
                break
            decodes += self.advance(each, None, here, now)
        branch.request.num_tasks -= 1
        self._leave_if_over(branch.request, now)
        return [task for task in decodes if not task.branch.is_cancelled]  # type: ignore[union-attr]

    def _ended(self, branch: Branch, result: StageResult, here: Client | None, now: int) -> None:
        """A pipeline is over: its request may leave, or what waits for branches has one less to wait for."""
        branch.is_over = True
        join, request = branch.joins, branch.request
        if join is None:
            request.is_answered = True
            request.is_refused = result is TURNED_AWAY
        else:
            join.results[branch.place] = result
            join.num_needed -= 1
            if not join.num_needed:
                self._join(join, here, now)
        self._leave_if_over(request, now)

    def _join(self, join: Join, here: Client | None, now: int) -> None:
        """Enough branches have ended: their results, in the order of the branches, go to the pipeline that forked."""
        if join.cancels_rest:
            for each in join.branches:
                self._cancel(each, now)
        running_on = [b for b in join.branches if b.left_behind or not (b.is_over or b.is_cancelled)]
        join.branch.left_behind += running_on
        parts = tuple(result for _, result in sorted(join.results.items()))
        start, end = min(part.start_ns for part in parts), max(part.end_ns for part in parts)
        tokens = sum(part.output_tokens for part in parts)
        self._start(join.branch, StageResult(start, end, tokens, parts=parts), here, now)

    def _cancel(self, branch: Branch, now: int) -> None:
        """Give up what `branch` still waits for, and all that it has forked into."""
        if branch.is_over or branch.is_cancelled:
            return
        branch.is_cancelled = True
        if branch.fork is not None:
            for each in branch.fork.branches:
                self._cancel(each, now)
        if (task := branch.task) is not None:
            branch.request.num_tasks -= 1
            self.num_tasks -= 1
            if task in self.delays.waiting:
                self.delays.cancel(task, now)
            elif branch.client >= 0:
                self.num_cancelled += 1
                self.clients[branch.client].cancel(task, now)
            else:
                self.parked.pop(task, None)

    def dropped(self, task: Task, now: int) -> None:
        """A cancelled task has left its client."""
        self.num_cancelled -= 1
        assert task.branch is not None
        client = self.clients[task.branch.client]
        self.handing.drop(task, client, now)
        self._left(task, client, now)

    def hand_over(self, task: Task, followings: Sequence[Task], client: Client, now: int) -> bool:
        """The KV cache of `task` goes from `client` to one that decodes on; False: it can't, and others have them."""
        if self._turned_away(followings, client, now) or not self.handing.begin(task, followings, client, now):
            return False
        for following in followings:
            self.views.placed(following, self.clients[following.branch.client])  # type: ignore[union-attr]
        return True

    def starves(self, client: Client, now: int) -> None:
        """`client` idles though tasks wait there: room that is kept for others may be what they lack."""
        if self.handing.early:
            self.kernel.at(now, self.handing.relieve, client)

    def _turned_away(self, followings: Sequence[Task], client: Client, now: int) -> bool:
        """Whether admission, asked again, refuses these decodes, which are then rejected."""
        request = followings[0].request
        tenant = self.tenants[request.tenant]
        reason = tenant.admission and tenant.refuses(request, self.views, now, before_decode=True)
        for following in followings if reason else ():
            if not following.branch.is_cancelled:  # type: ignore[union-attr]
                self.rejected(following, client, str(reason), now)
        return bool(reason)

    def _decoders(self, task: Task) -> Sequence[Client]:
        route = self.tenants[task.request.tenant].routes.get(DECODE)
        return route.candidates if route is not None else ()

    def _route(self, task: Task) -> Route:
        route = self.tenants[task.request.tenant].routes.get(task.stage.kind)
        if route is None or not route.clients:
            raise InvariantError(f"the pipeline yielded a stage {task.stage.kind!r} that it did not announce")
        return route

    def _choose(
        self, task: Task, now: int, among: Sequence[Client] | None = None, others: Sequence[Task] = ()
    ) -> Client | None:
        """One of the clients that take such tasks now, or `among` some of them; None where there is none.

        It is to hold the `others` too, which go with `task`.
        """
        route = self._route(task)
        candidates = everyone = route.candidates if among is None else among
        if route.common_room is not None:
            candidates = self.tenants[task.request.tenant].able((task, *others), candidates)
        if len(candidates) < 2:
            return candidates[0] if candidates else None
        views = self.views.of(candidates, now, with_load=route.reads_load, as_read=route.reads_pending)
        if candidates is everyone or route.choose_of is None:
            chosen = route.router.choose(task, views, now)
        else:
            chosen = route.choose_of(task, views, now, [client.index for client in everyone])
        client = self.clients[chosen.index] if isinstance(chosen, ClientView) else None
        if client not in candidates:
            name = type(route.router).__name__
            raise InvariantError(f"{name} chose {chosen!r} for request {task.request.index}: none of its choices")
        return client

    # --- clients that are lost, and those that come ---

    def again(self, tasks: Sequence[Task], now: int) -> None:
        """Tasks that begin anew, for their contexts are lost: each is placed where it can be."""
        for task in tasks:
            branch = task.branch
            assert branch is not None
            if not branch.is_cancelled:
                branch.task = task
                task.request.num_losses += 1
                self.begun_anew.add(task.request.index)
                self._place(task, None, now)

    def _park(self, task: Task, now: int) -> None:
        """Nobody takes `task` now: it waits for a client to come up, or is rejected if none ever will."""
        assert task.branch is not None
        task.branch.client = -1
        route = self._route(task)
        clients = self.tenants[task.request.tenant].holders((task,)) or route.clients
        reason = self.nobody_comes(clients) if self.nobody_comes is not None else ""
        if reason:
            self.rejected(task, next(iter(clients)), reason, now)
        else:
            self.parked[task] = clients

    def unpark(self, now: int) -> None:
        """Clients have come up, or have gone for good: tasks that wait for one are placed as if they came now."""
        waits: dict[int, bool] = {}  # by the set of clients, of which there are few
        for task, clients in list(self.parked.items()):
            if id(clients) not in waits:
                is_up = not set(self._route(task).candidates).isdisjoint(clients)
                waits[id(clients)] = not (is_up or (self.nobody_comes is not None and self.nobody_comes(clients)))
            if task in self.parked and not waits[id(clients)]:
                del self.parked[task]
                self._place(task, None, now)

    # --- requests leave ---

    def _give_up(self, who: tuple[Branch, int], now: int) -> None:
        self.withdraw(*who, "", now)

    def withdraw(self, branch: Branch, status: int, reason: str, now: int) -> None:
        """The request that `branch` is of leaves with `status`, if it hasn't; all its tasks are cancelled."""
        while branch.joins is not None:
            branch = branch.joins.branch
        request = branch.request
        if self.in_system.get(request.index) is not request:
            return
        for each in list(_everything(branch)):
            task = each.task
            if task is not None and not each.is_cancelled:
                is_decoding = each.client >= 0 and task.join_step >= 0
                more = self.clients[each.client].generated(task) if is_decoding else 0
                request.output_tokens += task.stage.seen_by_user(task.generated_tokens + more)
            self._cancel(each, now)
        self._leave(request, status, now, reason)

    def rejected(self, task: Task, client: Client, reason: str, now: int) -> None:
        """`client` can never serve `task`: its request leaves with the reason, once its other tasks are over."""
        request = task.request
        request.output_tokens += task.stage.seen_by_user(task.generated_tokens)
        request.num_tasks -= 1
        self.num_tasks -= 1
        task.branch.task = None  # type: ignore[union-attr]
        if self.lending is not None:
            self.lending.ended(task, client, now)
        request.rejected_for = request.rejected_for or reason
        self._leave_if_over(request, now)

    def _leave_if_over(self, request: Request, now: int) -> None:
        if request.num_tasks or request.index not in self.in_system:
            return
        if request.rejected_for:
            self._leave(request, REJECTED, now, request.rejected_for)
        elif request.is_answered:
            self._leave(request, REFUSED if request.is_refused else FINISHED, now)

    def cut(self, now: int) -> None:
        """The run stops at `now`: requests still in the system leave as unfinished."""
        self.network.cut(now)
        self.delays.cut(now)
        if self.lending is not None:
            self.lending.cut()
        for tasks in (self.parked, *(client.cut(now) for client in self.clients)):
            for task in tasks:
                task.request.output_tokens += task.stage.seen_by_user(task.generated_tokens)
        for request in list(self.in_system.values()):
            self._leave(request, UNFINISHED, now)

    def _leave(self, request: Request, status: int, now: int, reason: str = "") -> None:
        del self.in_system[request.index]
        self.num_left += 1
        first_token_ns = request.first_token_ns
        if 0 <= first_token_ns < request.gate_ns:
            first_token_ns = request.gate_ns
        table = self.records.requests
        table.write(table.pack(
            request.index, request.arrival_ns, first_token_ns, now, status, self._reason(reason) if reason else -1,
            request.prompt_tokens or request.input_tokens, request.output_tokens, request.cached_tokens,
            request.num_preemptions,
        ))  # fmt: skip
        if self.on_progress is not None and not self.num_left & 0xFF:
            self.on_progress(self.num_left)
        if status == UNFINISHED:
            return
        self.tenants[request.tenant].left(request, now)

    def _reason(self, reason: str) -> int:
        index = self._reasons.setdefault(reason, len(self._reasons))
        if index == len(self.records.reasons):
            self.records.reasons.append(reason)
        return index


def _show(request: Request, num_tokens: int, now: int) -> None:
    """Tokens that were generated unseen come out all at once."""
    request.output_tokens += num_tokens
    request.show(now)


def _everything(branch: Branch) -> Iterator[Branch]:
    """`branch` and all that it has forked into and still runs."""
    yield branch
    for each in (*branch.left_behind, *(branch.fork.branches if branch.fork else ())):
        yield from _everything(each)


def _only(stage: Stage) -> Pipeline:
    """A pipeline of one stage."""
    result = yield stage
    return result
