"""Pools that scale: how many replicas of one are wanted, by a schedule or by a rule over what waits for it.

Beside the events of a scenario; replicas start and drain in `outages`. It never moves a task, and knows no true output
length.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from mist.availability.outages import Outages, Replica
from mist.client import Client
from mist.request import Request, Task
from mist.units import NS_PER_S


@dataclass(frozen=True, slots=True)
class Rule:
    """`step` replicas more where what is measured passes `above`, as many less where it is under `below`.

    Measured every `every_ns`: "queue", the tasks that wait for each replica that serves; "wait_s", for how long whoever
    waits longest has; or "deadline_share", how much of the time from arrival to deadline has passed, most of those that
    wait and have had no token. The scheme of the Kubernetes Horizontal Pod Autoscaler, with two thresholds.
    """

    measure: str
    above: float
    below: float
    every_ns: int
    step: int = 1


@dataclass(slots=True, eq=False)
class Pool:
    """`replicas` that can be, of which `initial_count` serve at first, never fewer wanted than `min_count`.

    `schedule`: (instant, replicas wanted from then on).
    """

    replicas: Sequence[Replica]
    initial_count: int
    min_count: int = 1
    start_up_ns: int = 0
    schedule: Sequence[tuple[int, int]] = ()
    rule: Rule | None = None


@dataclass(slots=True)
class Scaling:
    """All pools that scale. `is_over`: whether no request will come or is left."""

    outages: Outages
    pools: Sequence[Pool]
    is_over: Callable[[], bool]
    _num_ticks: int = field(default=0, init=False)

    def start(self) -> None:
        """Only the first replicas of each pool serve, and the others when they are wanted."""
        kernel = self.outages.coordinator.kernel
        for pool in self.pools:
            for number, replica in enumerate(pool.replicas):
                replica.is_wanted = number < pool.initial_count
                replica.is_elastic = pool.rule is not None
            self.outages.changed(pool.replicas, "initial_count", kernel.now)
            for at_ns, count in pool.schedule:
                for replica in pool.replicas:
                    replica.num_plans += 1
                kernel.at(at_ns, self._planned, (pool, count))
            if pool.rule is not None:
                self._post_tick(pool, kernel.now)

    def _planned(self, change: tuple[Pool, int], now: int) -> None:
        pool, count = change
        for replica in pool.replicas:
            replica.num_plans -= 1
        self._scale(pool, count, "schedule", now)
        self.outages.changed((), "schedule", now)  # if it was the last plan, nobody need wait for this pool

    def _scale(self, pool: Pool, count: int, cause: str, now: int) -> None:
        """Let `count` replicas be wanted: those that still drain come back first, and the last ones go."""
        there = [replica for replica in pool.replicas if replica.is_wanted and not replica.is_broken]
        absent = [replica for replica in pool.replicas if not replica.is_wanted and not replica.is_broken]
        absent.sort(key=lambda replica: replica.is_empty)
        for replica in absent[: max(0, count - len(there))]:
            self.outages.start(replica, pool.start_up_ns, cause, now)
        for replica in there[count:]:
            self.outages.drain(replica, cause, now)

    # --- the rule ---

    def _post_tick(self, pool: Pool, now: int) -> None:
        assert pool.rule is not None
        self._num_ticks += 1
        self.outages.coordinator.kernel.at(now + pool.rule.every_ns, self._tick, pool)

    def _tick(self, pool: Pool, now: int) -> None:
        """Measure and scale; the last tick is when nothing else is to come and nobody waits for who could still start.

        A pool is not at zero while tasks wait whom no other serves, whatever the rule says: more may never come.
        """
        self._num_ticks -= 1
        rule = pool.rule
        assert rule is not None
        if self.is_over():
            return
        wanted = sum(replica.is_wanted and not replica.is_broken for replica in pool.replicas)
        measured = self._measures[rule.measure](pool, now)
        more, fewer = measured > rule.above, measured < rule.below
        least = max(pool.min_count, int(self._is_needed(pool)))
        count = min(max(wanted + rule.step * (more - fewer), least), len(pool.replicas))
        told = f"{rule.measure} {measured:.3g} " + (f"> {rule.above:g}" if more else f"< {rule.below:g}")
        if count > wanted and not more:
            told = "min_count" if wanted < pool.min_count else "no other serves who waits"
        self._scale(pool, count, f"rule: {told}", now)
        if self.outages.coordinator.kernel.num_pending > self._num_ticks or self._may_start():
            self._post_tick(pool, now)

    @property
    def _measures(self) -> dict[str, Callable[[Pool, int], float]]:
        return {"queue": self._queue, "wait_s": self._longest_wait_s, "deadline_share": self._deadline_share}

    def _queue(self, pool: Pool, now: int) -> float:
        clients = [client for replica in pool.replicas if replica.takes for client in replica.clients]
        num_waiting = sum(client.view.num_outstanding - len(client.residents.running) for client in clients)
        return (num_waiting + len(self._parked(pool))) / max(1, sum(replica.takes for replica in pool.replicas))

    def _longest_wait_s(self, pool: Pool, now: int) -> float:
        return (now - min((task.queued_ns for task in self._waiting(pool)), default=now)) / NS_PER_S

    def _deadline_share(self, pool: Pool, now: int) -> float:
        """1 and more where a deadline has passed."""
        requests = (task.request for task in self._waiting(pool))
        return max((_passed_share(each, now) for each in requests if each.first_token_ns < 0), default=0.0)

    def _waiting(self, pool: Pool) -> list[Task]:
        tasks = self._parked(pool)
        for client in (client for replica in pool.replicas for client in replica.clients):
            residents = client.residents
            tasks += [*residents.waiting, *residents.handed_over, *client.front_end.incoming]
        return tasks

    def _parked(self, pool: Pool) -> list[Task]:
        """Those for whom no client is up, and whom this pool would serve."""
        own = {client for replica in pool.replicas for client in replica.clients}
        serves = {key: not own.isdisjoint(clients) for key, clients in self._awaited().items()}
        return [task for task, clients in self.outages.coordinator.parked.items() if serves[id(clients)]]

    def _awaited(self) -> dict[int, Collection[Client]]:
        """The sets of clients that tasks wait for, by their ids: many wait for one set."""
        return {id(clients): clients for clients in self.outages.coordinator.parked.values()}

    def _is_needed(self, pool: Pool) -> bool:
        """Whether tasks wait for this pool for whom nobody else serves or will."""
        own = set(pool.replicas)
        awaited = [set(self.outages.replicas_of(clients)) for clients in self._awaited().values()]
        return any(each & own and not any(replica.is_due for replica in each - own) for each in awaited)

    def _may_start(self) -> bool:
        """Whether tasks wait for a replica that a rule may start."""
        awaited = (replica for clients in self._awaited().values() for replica in self.outages.replicas_of(clients))
        return any(replica.is_elastic and replica.will_return for replica in awaited)


def _passed_share(request: Request, now: int) -> float:
    """How much of the time from its arrival to its deadline has passed."""
    return (now - request.arrival_ns) / max(1, request.deadline_ns - request.arrival_ns)
