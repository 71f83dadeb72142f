"""Replicas that go down, come up, drain and start: what becomes of their tasks, and who takes new ones.

Between the events of a scenario and the coordinator, whose routes it keeps: tasks of a lost replica are placed anew, or
their requests end. It never decides when anything happens, and prices nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from mist.client import Client
from mist.coordinator import Coordinator
from mist.hand_over import Order
from mist.kernel import FOREVER
from mist.records import DOWN, DRAINING, KV_TRANSFER, LOST, OFF, REJECTED, STARTING, UP, Records
from mist.request import Branch, Task
from mist.tenant import Route

RETRY = "retry"
FAIL = "fail"


@dataclass(slots=True, eq=False)
class Replica:
    """Clients that go down and come up together: the lanes of one replica.

    It serves while it `is_wanted` (by whoever scales its pool), is not broken and does not start. `broken_until`: when
    the last of its outages ends; `num_returns`: times that it is to come up whatever these are; `num_plans`: that its
    pool's schedule changes. `is_elastic`: a rule scales its pool.
    """

    name: str
    clients: Sequence[Client]
    is_wanted: bool = True
    is_broken: bool = False
    is_starting: bool = False
    is_elastic: bool = False
    broken_until: int = 0
    num_returns: int = 0
    num_plans: int = 0
    #: counts its starts and losses, so that a start which was overtaken comes to nothing
    epoch: int = 0
    state: int = UP

    @property
    def takes(self) -> bool:
        """Whether it takes tasks."""
        return self.is_wanted and not self.is_broken and not self.is_starting

    @property
    def is_empty(self) -> bool:
        """Whether nobody is on it or is to come, nor anything on its way from it."""
        return not any(
            client.view.num_outstanding or client.residents.sending or client.reservations.num_promised
            for client in self.clients
        )

    @property
    def state_now(self) -> int:
        """What it is, of `CLIENT_STATES`."""
        if self.is_broken:
            return DOWN
        if self.is_starting:
            return STARTING
        return UP if self.is_wanted else OFF if self.is_empty else DRAINING

    @property
    def is_gone(self) -> bool:
        """Whether it is down for good."""
        return self.is_broken and self.broken_until == FOREVER and not self.num_returns

    @property
    def is_due(self) -> bool:
        """Whether it serves, or is to later though no rule starts it."""
        return not self.is_gone and (self.is_wanted or self.num_plans > 0)

    @property
    def will_return(self) -> bool:
        """Whether it may serve later though it doesn't now."""
        return self.is_due or (self.is_elastic and not self.is_gone)


@dataclass(slots=True)
class Outages:
    """All `replicas` of a run by name. What it does takes effect at once."""

    coordinator: Coordinator
    records: Records
    replicas: Mapping[str, Replica]
    _routes: Sequence[Route] = field(init=False)
    _of: dict[Client, Replica] = field(init=False)
    _causes: dict[str, int] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        routes = (route for tenant in self.coordinator.tenants for route in tenant.routes.values())
        self._routes = list({id(route): route for route in routes}.values())
        self._of = {client: replica for replica in self.replicas.values() for client in replica.clients}
        self.coordinator.nobody_comes = self._nobody_comes

    # --- what happens to replicas ---

    def down(self, replica: Replica, on_loss: str, until_ns: int, now: int) -> None:
        """`replica` goes down with all that its devices hold; its tasks are placed anew (`RETRY`), or end (`FAIL`).

        One that is down already stays so until the last of its outages ends.
        """
        was_broken = replica.is_broken
        replica.broken_until = max(until_ns, replica.broken_until if was_broken else 0)
        replica.is_broken, replica.is_starting = True, False
        replica.epoch += not was_broken
        self.changed([replica], "event", now)
        if not was_broken:
            self._lose(replica, on_loss, now)

    def up(self, replica: Replica, now: int) -> None:
        """All outages of `replica` are over: it is there again, empty, and serves if its pool wants it."""
        replica.is_broken = False
        self.changed([replica], "event", now)

    def outage_ended(self, replica: Replica, now: int) -> None:
        """An outage of `replica` is over: it is there again unless another one lasts."""
        if replica.is_broken and replica.broken_until <= now:
            self.up(replica, now)

    def start(self, replica: Replica, start_up_ns: int, cause: str, now: int) -> None:
        """`replica` is wanted: one that is still draining serves on, any other needs `start_up_ns`."""
        replica.is_wanted = True
        if replica.is_empty and not replica.is_broken:
            for client in replica.clients:
                client.clear()
            replica.epoch += 1
            if start_up_ns:
                replica.is_starting = True
                self.coordinator.kernel.at(now + start_up_ns, self._started, (replica, replica.epoch))
        self.changed([replica], cause, now)

    def drain(self, replica: Replica, cause: str, now: int) -> None:
        """`replica` is wanted no more: it takes nothing new, and goes when it is empty."""
        replica.is_wanted = replica.is_starting = False
        replica.epoch += 1
        self.changed([replica], cause, now)

    def _started(self, which: tuple[Replica, int], now: int) -> None:
        replica, epoch = which
        if replica.epoch == epoch:
            replica.is_starting = False
            self.changed([replica], "started", now)

    # --- who takes tasks ---

    def changed(self, replicas: Iterable[Replica], cause: str, now: int) -> None:
        """Bring records and routes up to date with `replicas`, and place tasks that wait for what came up."""
        for replica in replicas:
            state = replica.state_now
            if state != replica.state:
                replica.state = state
                for client in replica.clients:
                    self.records.changes.append((client.index, state, now, self._number(cause)))
        for route in self._routes:
            route.candidates = [client for client in route.clients if self._of[client].takes]
        if self.coordinator.parked:
            self.coordinator.unpark(now)

    def _number(self, cause: str) -> int:
        number = self._causes.setdefault(cause, len(self._causes))
        if number == len(self.records.causes):
            self.records.causes.append(cause)
        return number

    def _nobody_comes(self, clients: Collection[Client]) -> str:
        """Why tasks that only these `clients` can serve, all of them down, need not wait for one to come up."""
        if any(self._of[client].will_return for client in clients):
            return ""
        replicas = self.replicas_of(clients)
        broken = ", ".join(replica.name for replica in replicas if replica.is_broken)
        unwanted = ", ".join(replica.name for replica in replicas if not replica.is_broken)
        told = [f"{broken} went down for good"] if broken else []
        told += [f"{unwanted} went out of service for good"] if unwanted else []
        return ", ".join(told)

    def replicas_of(self, clients: Iterable[Client]) -> Iterable[Replica]:
        """Those that `clients` are lanes of."""
        return dict.fromkeys(self._of[client] for client in clients)

    # --- what is lost ---

    def _lose(self, replica: Replica, on_loss: str, now: int) -> None:
        lost: dict[Branch, Task] = {}
        lending, handing = self.coordinator.lending, self.coordinator.handing
        broken = handing.lose(replica.clients, now)
        for client in replica.clients:
            if lending is not None:
                lending.lost(client, now)
            self._empty(client, lost, now)
        self._stop_transfers(replica, now)
        resent = self._kept(broken, replica, lost)
        for branch, task in lost.items():
            branch.task, branch.client = task, -1
        if on_loss == FAIL:
            for branch in lost:
                self.coordinator.withdraw(branch, REJECTED, f"lost with {replica.name}", now)
        for order in broken:
            if order.then is not None and order.task in order.here.front_end.incoming:
                handing.prepare(order.task, order.here, order.then, now)
        for done, here, followings in resent:
            going = [following for following in followings if not _branch(following).is_cancelled]
            for following in going:
                _branch(following).task = following
                del lost[_branch(following)]
            if not going or not self.coordinator.hand_over(done, going, here, now):
                here.sent(done)
        self.coordinator.again(list(lost.values()), now)

    def _stop_transfers(self, replica: Replica, now: int) -> None:
        """What comes to `replica` comes to nobody, and KV caches that leave it are lost.

        What it hands on otherwise, or writes to a memory, has left.
        """
        network, gone = self.coordinator.network, {client.index for client in replica.clients}
        for transfer in list(network.in_flight):
            if transfer.receiver in gone or (transfer.sender in gone and transfer.kind == KV_TRANSFER):
                network.stop(transfer, now)

    def _kept(
        self, broken: Sequence[Order], replica: Replica, lost: dict[Branch, Task]
    ) -> list[tuple[Task, Client, list[Task]]]:
        """KV caches of `broken` that are still where they were; `lost` gets those that waited for any other elsewhere.

        Of each the task that has it, its client, and the decodes that are to go on with it.
        """
        kept = []
        for order in broken:
            there, is_lost = order.there, order.here in replica.clients
            if not is_lost and not order.has_arrived and order.then is None:
                going = [replace(each, shared=None) for each in order.followings if _branch(each) in lost]
                kept.append((order.task, order.here, going))
            for following in order.followings if is_lost else ():
                if following in there.front_end.incoming:
                    there.front_end.forget(following)
                    there.view.num_outstanding -= 1
                    lost[_branch(following)] = following.anew(following.queued_ns)
        return kept

    def _empty(self, client: Client, lost: dict[Branch, Task], now: int) -> None:
        """`client` loses all that its devices hold; the tasks that were there or to come are to be computed anew."""
        cohort, came = client.residents.cohort, client.front_end.incoming.copy()
        client.void_step(now)
        contexts = {t: cohort.context(t) for t in client.residents.running.values() if t.join_step >= 0}
        for task in client.cut(now, LOST):
            again = task.anew(task.queued_ns if task in came else now)
            if task in contexts:
                again.target_tokens = contexts[task] + 1  # the token sampled last isn't in the cache yet
            if _branch(task).is_cancelled:
                self.coordinator.dropped(task, now)
            else:
                lost[_branch(task)] = again
        client.clear()


def _branch(task: Task) -> Branch:
    assert task.branch is not None
    return task.branch
