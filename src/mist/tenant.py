"""A tenant: a workload with its pipeline and the clients that it may use. Its requests arrive here.

Beside the coordinator, which takes every request through its stages: open loops, closed loops and sessions are played
alike, each tenant's for itself. It never looks at what a client does.
"""

from __future__ import annotations

from collections.abc import Callable, KeysView, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from mist.admission import AdmissionPolicy
from mist.client import Client
from mist.kernel import Kernel
from mist.pipeline import PipelineFactory
from mist.request import DECODE, NO_DEADLINE, PREFILL, ClientView, Request, Task
from mist.routing import RoutingPolicy
from mist.views import Views
from mist.workload import RequestTable

_NO_SIZES: Mapping[str, int] = {}


@dataclass(slots=True)
class Route:
    """The clients that tasks of one stage kind may go to, and the policy that picks one of them.

    `candidates`: those of them that take tasks now; all, unless some are down. Of clients that differ in what they can
    ever hold, tasks are offered those that can hold them, by the same rule as they are rejected by.
    """

    clients: Sequence[Client]
    router: RoutingPolicy
    candidates: Sequence[Client] = field(init=False)
    #: whether the router reads more of a view than `num_outstanding`, or else `pending_prefill_tokens` of some
    reads_load: bool = field(init=False)
    reads_pending: bool = field(init=False)
    #: how the router chooses where only some can hold a task, if that differs
    choose_of: Callable[[Task, Sequence[ClientView], int, Sequence[int]], ClientView] | None = field(init=False)
    #: tokens of prompt and output that each client can hold, where they differ in what they can; else None
    common_room: int | None = field(init=False)

    def __post_init__(self) -> None:
        self.candidates = self.clients
        self.reads_load = getattr(self.router, "reads_load", True)
        self.reads_pending = getattr(self.router, "reads_pending", False)
        self.choose_of = getattr(self.router, "choose_of", None)
        front_ends = [client.front_end for client in self.clients]
        differ = len({front_end.limits for front_end in front_ends}) > 1
        self.common_room = min(front_end.sure_room for front_end in front_ends) if differ else None


@dataclass(frozen=True, slots=True)
class Patience:
    """When the users of a tenant's requests give up, from arrival on, and with which status each leaves then.

    By the request's place in the workload; an `after_ns` of `NO_DEADLINE` is never.
    """

    after_ns: Sequence[int]
    statuses: Sequence[int]


class Tenant:
    """`routes`: one per stage kind of the pipeline. `rng_of(i)`: a random generator of its request i's own, made when a
    pipeline asks.

    `priority` (lower first) and `deadline_after_ns` (from arrival) are those of its requests, unless their sizes tell
    others. A request is let in if no policy of `admission` refuses it. `index`: its place among the tenants.
    `first_request` and `first_session`: the number of its first ones in the run, where those of tenants before it come
    first.
    """

    def __init__(
        self,
        workload: RequestTable,
        pipeline: PipelineFactory,
        routes: Mapping[str, Route],
        rng_of: Callable[[int], np.random.Generator],
        *,
        priority: int = 0,
        deadline_after_ns: int = NO_DEADLINE,
        admission: Sequence[AdmissionPolicy] = (),
        patience: Patience | None = None,
        index: int = 0,
        first_request: int = 0,
        first_session: int = 0,
    ) -> None:
        self.workload = workload
        self.pipeline = pipeline
        self.routes = routes
        self.rng_of = rng_of
        self.priority = priority
        self.deadline_after_ns = deadline_after_ns
        self.admission = admission
        self.patience = patience
        self.index = index
        self.first_request = first_request
        self._reach: Mapping[int, frozenset[int]] = {}
        #: by stage kind one client of each that differ in what they can hold; and sets of clients, by which of these do
        self._unlike: dict[str, list[Client]] = {}
        self._holders: dict[tuple[str, frozenset[object]], KeysView[Client]] = {}
        self._first_session = first_session
        self._num_posted = 0
        # views give whole numbers as lists do, and take no memory
        self._arrival_ns = workload.arrival_ns.data
        self._input_tokens = workload.input_tokens.data
        self._output_tokens = workload.output_tokens.data
        self._sizes = tuple(workload.sizes.items())
        self._mean_output_tokens = round(workload.output_tokens.mean()) if len(workload) else 0
        self._hit_tokens = None if workload.cached_tokens is None else workload.cached_tokens.data
        self._sessions = None if workload.sessions is None else workload.sessions.data
        #: requests with a time of their own, in their order, and by request those that come after its end
        self._openers: Sequence[int] = range(len(workload))
        self._followers: dict[int, list[tuple[int, int]]] = {}
        if workload.after is not None and workload.think_ns is not None:
            self._openers = np.flatnonzero(workload.after < 0).tolist()
            for index, (before, think_ns) in enumerate(
                zip(workload.after.tolist(), workload.think_ns.tolist(), strict=True)
            ):
                if before >= 0:
                    self._followers.setdefault(before, []).append((index, think_ns))

    @property
    def waits(self) -> bool:
        """Whether requests arrive when others have ended: a closed loop, or sessions."""
        return self.workload.concurrency is not None or self.workload.after is not None

    def passes_on(self, client: Client) -> bool:
        """Whether the end of one of its tasks on `client` can reach another client, or bring a request.

        Not where each stage is the last, or decodes on there.
        """
        if not any(client in route.clients for route in self.routes.values()):
            return False
        if self.waits or not self.pipeline.is_fixed:
            return True
        here = [kind for kind, route in self.routes.items() if client in route.clients]
        return any(
            kind in here and (following != DECODE or DECODE not in here)
            for kind, following in pairwise(self.pipeline.kinds)
        )

    def lets_plan(self, client: Client) -> bool:
        """Whether no router or admission policy reads the load of `client`, and nobody hands KV caches over to it."""
        if self.admission or any(
            route.reads_load and len(route.clients) > 1 and client in route.clients for route in self.routes.values()
        ):
            return False
        prefill = self.routes.get(PREFILL)
        return DECODE not in client.serves or prefill is None or all(DECODE in each.serves for each in prefill.clients)

    def ask(self, views: Views) -> None:
        """Its routers and admission policies will look at its clients."""
        for route in self.routes.values():
            choosing = [route.router] if len(route.clients) > 1 else []
            for policy in (*choosing, *self.admission):
                views.ask(route.clients, policy)

    def refuses(self, request: Request, views: Views, now: int, *, before_decode: bool = False) -> str:
        """Why `request` isn't let in, or isn't let go on to decode elsewhere; "" where it is."""
        asked = [each for each in self.admission if not before_decode or getattr(each, "asks_before_decode", False)]
        if not asked:
            return ""
        kinds = (DECODE,) if before_decode else tuple(self.routes)
        routes = {kind: self.routes[kind] for kind in kinds}
        seen = {kind: views.of(route.candidates or route.clients, now) for kind, route in routes.items()}
        return next((reason for each in asked if (reason := each.refuses(request, seen, now))), "")

    # --- who can ever hold a task ---

    def hands_over(self, reach: Mapping[int, frozenset[int]]) -> None:
        """Clients hand over to those of `reach` alone: a prompt goes to one from where its decode finds room."""
        prefill, decode = self.routes.get(PREFILL), self.routes.get(DECODE)
        if reach and prefill is not None and decode is not None and decode.common_room is not None:
            self._reach = reach
            rooms = (prefill.common_room, decode.common_room)
            prefill.common_room = min(room for room in rooms if room is not None)

    def able(self, tasks: Sequence[Task], among: Sequence[Client]) -> Sequence[Client]:
        """Those `among` the clients of a route that can ever hold each of `tasks`; nobody, where only some down can.

        All where none can: whoever is chosen rejects them with the reason.
        """
        route = self.routes[tasks[0].stage.kind]
        outputs = (task.stage.oracle_output_tokens or task.request.oracle_output_tokens for task in tasks)
        needed = max(task.target_tokens + output for task, output in zip(tasks, outputs, strict=True))
        if route.common_room is None or needed <= route.common_room:
            return among
        holders = self.holders(tasks)
        able = [client for client in among if client in holders]
        if able:
            return among if len(able) == len(among) else able
        return () if any(client not in route.candidates for client in holders) else among

    def holders(self, tasks: Sequence[Task]) -> KeysView[Client]:
        """The clients, up or down, that can ever hold each of `tasks`, and hand it over to one that can, in order.

        Of clients that are alike one is asked; the same clients are the same object.
        """
        kind = tasks[0].stage.kind
        clients = self.routes[kind].clients
        if kind not in self._unlike:
            self._unlike[kind] = list({self._limits(client): client for client in clients}.values())
        able = [client for client in self._unlike[kind] if all(self._holds(client, task) for task in tasks)]
        limits = frozenset(map(self._limits, able))
        if (kind, limits) not in self._holders:
            held = [client for client in clients if self._limits(client) in limits]
            self._holders[kind, limits] = dict.fromkeys(held).keys()
        return self._holders[kind, limits]

    def _limits(self, client: Client) -> object:
        """All that `_holds` goes by."""
        return client.front_end.limits, self._reach.get(client.index)

    def _holds(self, client: Client, task: Task) -> bool:
        if client.front_end.never_fits(task):
            return False
        reach = self._reach.get(client.index) if task.stage.kind == PREFILL else None
        if reach is None or DECODE in client.serves or task.generates or task.request.oracle_output_tokens < 2:
            return True  # nothing of it goes on elsewhere
        decode = task.following_decode(task.queued_ns)
        receivers = (each for each in self.routes[DECODE].clients if each.index in reach)
        return any(not each.front_end.never_fits(decode) for each in receivers)

    # --- arrivals ---

    def start(self, kernel: Kernel, begin: Callable[[Tenant, Request, int], None]) -> None:
        """Post the first arrival (open loop), or as many as may be in flight; `begin` is called with each request."""
        self._kernel, self._begin = kernel, begin
        if self.workload.concurrency is None:
            if self._openers:
                kernel.at(self._arrival_ns[self._openers[0]], self._arrive_and_post_next, 0)
            return
        for _ in range(min(self.workload.concurrency, len(self.workload))):
            self._post_next(self._arrival_ns[self._num_posted])

    def left(self, request: Request, now: int) -> None:
        """`request` has left: those that wait for its end come."""
        if self.workload.concurrency is not None and self._num_posted < len(self.workload):
            self._post_next(now)
        for index, think_ns in self._followers.pop(request.index - self.first_request, ()):
            self._kernel.at(now + think_ns, self._arrive, index)

    def _post_next(self, time_ns: int) -> None:
        self._kernel.at(time_ns, self._arrive, self._num_posted)
        self._num_posted += 1

    def _arrive_and_post_next(self, place: int, now: int) -> None:
        following = place + 1
        if following < len(self._openers):
            self._kernel.at(self._arrival_ns[self._openers[following]], self._arrive_and_post_next, following)
        self._arrive(self._openers[place], now)

    def _arrive(self, index: int, now: int) -> None:
        keys = self.workload.block_keys
        request = Request(
            self.first_request + index,
            now,
            self._input_tokens[index],
            self._output_tokens[index],
            keys[index] if keys is not None else (),
            self._hit_tokens[index] if self._hit_tokens is not None else 0,
            {name: int(column[index]) for name, column in self._sizes} if self._sizes else _NO_SIZES,
            self._first_session + self._sessions[index] if self._sessions is not None else -1,
            self.index,
            self.priority,
            now + self.deadline_after_ns,
            self._mean_output_tokens,
        )
        self._begin(self, request, now)
