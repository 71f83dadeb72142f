"""Hand-over: a KV cache goes from the client that computed it to the one that decodes on, once this has room for it.

Beside the coordinator, which says when a prefill begins and ends: the decode client is chosen here, its blocks are
reserved, and the cache is converted and sent. It never decides what runs, and knows no pipeline.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from mist.client import Client
from mist.kernel import Kernel
from mist.network import Network
from mist.records import KV_TRANSFER
from mist.request import DECODE, PREFILL, Task
from mist.residents import share_prefix
from mist.streams import Stream, Streaming


@dataclass(frozen=True, slots=True)
class Conversion:
    """From the sender's dtype to the receiver's, in `ns_per_token`; on the sender where `is_before` it is sent."""

    ns_per_token: float
    is_before: bool = False


@dataclass(frozen=True, slots=True)
class Terms:
    """How KV caches are handed over.

    `at_arrival`: the decode client is chosen as the prompt gets to its prefill client, not as its prefill ends. With
    `reserves_early` the prompt then waits there until the decode client has reserved blocks for it; without, these are
    reserved before the transfer, as always. `layerwise`: layers are sent while those behind them are computed, which
    needs both. `reach`: by the index of a client those that it may hand over to, where not to all. `conversions`: by
    the indices of sender and receiver.
    """

    at_arrival: bool = False
    reserves_early: bool = True
    layerwise: bool = False
    reach: Mapping[int, frozenset[int]] = field(default_factory=dict)
    conversions: Mapping[tuple[int, int], Conversion] = field(default_factory=dict)


class Chooser(Protocol):
    def __call__(
        self, task: Task, now: int, among: Sequence[Client] | None = None, others: Sequence[Task] = ()
    ) -> Client | None: ...


@dataclass(slots=True, eq=False)
class Order:
    """The KV cache of `task`, from `here` to where `followings` go on with it; `queued_ns`: when it was computed.

    While its prefill is still to begin it has no followings, and `then` lets it begin. `stream`: what brings it, if
    that began before the prefill had ended.
    """

    task: Task
    here: Client
    there: Client
    followings: list[Task] = field(default_factory=list)
    queued_ns: int = -1
    then: Callable[[Task, int], None] | None = None
    stream: Stream | None = None
    has_arrived: bool = False

    @property
    def next(self) -> Task:
        """Who goes on where it comes, or the prompt while that is still to begin."""
        return self.followings[0] if self.followings else self.task


@dataclass(slots=True, eq=False)
class _Early:
    """What was decided as a prompt arrived; `stream`: its KV cache on its way, layer by layer."""

    here: Client
    there: Client
    is_reserved: bool = False
    stream: Stream | None = None


class HandOver:
    """`routes(task)`: the clients that may decode for it; `choose`: asks the router of its tenant for one of some.

    `again`: places decodes anew that no client takes now.
    """

    def __init__(
        self,
        kernel: Kernel,
        network: Network,
        terms: Terms,
        routes: Callable[[Task], Sequence[Client]],
        choose: Chooser,
        again: Callable[[Sequence[Task], int], None],
    ) -> None:
        self.terms = terms
        self._kernel = kernel
        self._network = network
        self._routes = routes
        self._choose = choose
        self._again = again
        #: all that are under way, or will be
        self.orders: dict[Order, None] = {}
        #: by the index of a client without room: those that wait for it, in its order
        self.awaiting: dict[int, list[Order]] = {}
        #: under way between two dtypes
        self.converting: dict[Order, None] = {}
        #: by prefills that aren't over
        self.early: dict[Task, _Early] = {}
        #: clients whose tasks' ends reach others only as long as somebody waits for their blocks
        self._made_to_emit: set[Client] = set()

    @property
    def awaited(self) -> set[Order]:
        """Those of them that wait for room."""
        return {order for queue in self.awaiting.values() for order in queue}

    # --- as a prompt arrives ---

    def is_early(self, task: Task, here: Client) -> bool:
        """Whether a decode client has to be chosen for the prompt `task`, which is placed on `here`, now."""
        if not self.terms.at_arrival or task.stage.kind != PREFILL or DECODE in here.serves or task.generates:
            return False
        return bool(self._routes(task))

    def prepare(self, task: Task, here: Client, then: Callable[[Task, int], None], now: int) -> None:
        """Choose who will decode after `task`, and call `then` once it may begin on `here`.

        Where nobody can be chosen now, it is as its prefill ends.
        """
        decode = task.following_decode(now)
        there = self._choose(decode, now, self._within_reach(decode, here))
        if there is None:
            then(task, now)
            return
        self.early[task] = _Early(here, there)
        there.reservations.num_promised += 1
        # else its first token must be its last; whether all of its output fits is known when it comes
        if self.terms.reserves_early and there.reservations.has_room_ever(task, task.target_tokens):
            self._reserve(Order(task, here, there, queued_ns=now, then=then), now)
        else:
            then(task, now)

    def _begin_early(self, order: Order, now: int) -> None:
        task, here, there = order.task, order.here, order.there
        del self.orders[order]
        early = self.early[task]
        early.is_reserved = True
        if self.terms.layerwise:
            early.stream = Stream(self._network, task.request.index, here.index, there.index)
            self._streams_of(here)[task] = early.stream
        assert order.then is not None
        order.then(task, now)

    def _streams_of(self, client: Client) -> dict[Task, Stream]:
        assert isinstance(client.watcher, Streaming)
        return client.watcher.streams

    def settle(self, task: Task, now: int) -> None:
        """The prefill `task` is over: what was decided early is taken back, unless it is handed over at once."""
        if task in self.early:
            self._kernel.at(now, self.forget, task)

    def forget(self, task: Task, now: int) -> None:
        """`task` goes no further, or was cancelled: nothing is kept for it any more."""
        if (early := self.early.get(task)) is None:
            return
        self._end_early(task)
        if early.stream is not None:
            early.stream.abandon(now)
            self._streams_of(early.here).pop(task, None)
        queue = self.awaiting.get(early.there.index, [])
        for order in [each for each in queue if each.task is task]:
            queue.remove(order)
            del self.orders[order]
            self.room_came(early.there, now)  # for the next one
        self.give_back(task, early.there, now)

    def _end_early(self, task: Task) -> _Early:
        early = self.early.pop(task)
        early.there.reservations.num_promised -= 1
        return early

    # --- as its prefill ends ---

    def begin(self, task: Task, followings: Sequence[Task], here: Client, now: int) -> bool:
        """Send the KV cache of `task` to who decodes on; False: none can, and they begin anew or their request left.

        Those that go on with one context go together, and it is sent once.
        """
        early = self.early.get(task)
        if early and any(early.there.front_end.never_fits(following) for following in followings):
            self.forget(task, now)  # more goes on than was known, perhaps somewhere else
            early = None
        elif early:
            self._end_early(task)
        among = self._within_reach(followings[0], here)
        there = early.there if early else self._choose(followings[0], now, among, followings[1:])
        if there is None:
            self._again([following.anew(now) for following in followings], now)
            return False
        order = Order(task, here, there, queued_ns=now)
        for following in followings:
            assert following.branch is not None
            following.branch.client = there.index
            if not following.branch.is_cancelled and there.front_end.expect(following, now):
                order.followings.append(following)
        if not order.followings:
            if early and early.stream:
                early.stream.abandon(now)
            self.give_back(task, there, now)
            return False
        share_prefix(order.followings, task.computed_tokens // there.residents.kv.block_size)
        self.orders[order] = None
        if early is None or not early.is_reserved:
            self._reserve(order, now)
            return True
        there.reservations.pass_on(task, order.followings[0])
        if early.stream is None:
            self._convert_and_send(order, now)
        else:
            order.stream = early.stream
            order.stream.close(self._arrived, order)
        return True

    def drop(self, task: Task, client: Client, now: int) -> None:
        """`task` was cancelled on `client`: others that go on with its KV cache get its room, or nobody does."""
        self.forget(task, now)
        if not client.reservations.blocks and client.index not in self.awaiting:
            return
        for order in [each for each in self.orders if task in each.followings]:
            order.followings.remove(task)
            if order.followings and task in client.reservations.blocks:
                client.reservations.pass_on(task, order.followings[0])
            elif not order.followings and order in self.awaiting.get(client.index, ()):
                self.awaiting[client.index].remove(order)
                del self.orders[order]
                order.here.sent(order.task)
                self.room_came(client, now)
        self.give_back(task, client, now)

    def give_back(self, task: Task, client: Client, now: int) -> None:
        """`task` is wanted no more: blocks that `client` has reserved for it are free."""
        if client.reservations.give_back(task):
            if client.idle and client.residents.num_waiting:
                client.waker.wake(client)
            self.room_came(client, now)

    def _within_reach(self, task: Task, here: Client) -> Sequence[Client]:
        clients = self._routes(task)
        reach = self.terms.reach.get(here.index)
        return clients if reach is None else [client for client in clients if client.index in reach]

    # --- room for it ---

    def _reserve(self, order: Order, now: int) -> None:
        """Go on once there is room: now, or when tasks have left, whose ends can then reach others."""
        there = order.there
        self.orders[order] = None
        queue = self.awaiting.get(there.index, [])
        place = bisect_right(queue, _key(order), key=_key)
        if not place and self._has_reserved(order):
            self._go_on(order, now)
            return
        queue.insert(place, order)
        self.awaiting[there.index] = queue
        if order.followings:
            self.room_came(there, now)  # if only that of prompts
        there.residents.hand_over_waits((queue[0].queued_ns, _key(queue[0])))
        if not there.emits:
            there.emits = True
            self._made_to_emit.add(there)
            self._kernel.surface(there, there.waker)

    def _has_reserved(self, order: Order) -> bool:
        return order.there.reservations.make(order.next, order.task.target_tokens)

    def _go_on(self, order: Order, now: int) -> None:
        if order.followings:
            self._convert_and_send(order, now)
        else:
            self._begin_early(order, now)

    def room_came(self, client: Client, now: int) -> None:
        """A task has left `client`: once all has been settled at this instant, those that wait for room are next."""
        if client.index in self.awaiting:
            self._kernel.at(now, self._let_in, client)

    def _let_in(self, client: Client, now: int) -> None:
        queue = self.awaiting.get(client.index)
        while queue and (order := self._next(queue, client)):
            queue.remove(order)
            self._go_on(order, now)
        if queue:
            client.residents.hand_over_waits((queue[0].queued_ns, _key(queue[0])))
            if any(order.followings for order in queue):
                self.relieve(client, now)
        elif queue is not None:
            client.residents.hand_over_waits(None)
            del self.awaiting[client.index]
            client.emits = client not in self._made_to_emit
            self._made_to_emit.discard(client)

    def _next(self, queue: Sequence[Order], there: Client) -> Order | None:
        """Who waits for `there` and goes on now: the first, or the first that is computed where nobody else goes on."""
        order = queue[0]
        if not order.followings and self._is_deserted(there):
            order = next((each for each in queue if each.followings), order)
        return order if self._has_reserved(order) else None

    def relieve(self, client: Client, now: int) -> None:
        """Somebody waits on `client` or for it, and nobody runs there: prompts that aren't computed lose their room.

        They may be waiting for the very blocks that the others hold.
        """
        if self.early and self._is_deserted(client):
            for prompt in [t for t, early in self.early.items() if early.there is client and early.is_reserved]:
                self.forget(prompt, now)

    def _is_deserted(self, client: Client) -> bool:
        """Whether nobody runs on `client`, and nobody is on the way with a KV cache."""
        if client.residents.num_running:
            return False
        waiting = self.awaiting.get(client.index, ())
        return not any(o.there is client and o.followings and o not in waiting for o in self.orders)

    # --- on its way ---

    def _convert_and_send(self, order: Order, now: int) -> None:
        conversion = self._conversion(order)
        if conversion is not None and conversion.is_before:
            self._convert(order, conversion, self._send, now)
        else:
            self._send(order, now)

    def _conversion(self, order: Order) -> Conversion | None:
        return self.terms.conversions.get((order.here.index, order.there.index))

    def _convert(self, order: Order, conversion: Conversion, then: Callable[[Order, int], None], now: int) -> None:
        self.converting[order] = None
        took = round(conversion.ns_per_token * order.task.computed_tokens)

        def is_done(order: Order, now: int) -> None:
            if order in self.converting:
                del self.converting[order]
                then(order, now)

        self._kernel.at(now + took, is_done, order)

    def _send(self, order: Order, now: int) -> None:
        if not order.followings:  # they were cancelled while it was converted
            del self.orders[order]
            order.here.sent(order.task)
            return
        conversion = self._conversion(order)
        sent_as = order.there if conversion is not None and conversion.is_before else order.here
        num_bytes = order.task.computed_tokens * sent_as.kv_bytes_per_token
        self._network.send(order.task.request.index, KV_TRANSFER, order.here.index, order.there.index, num_bytes,
                           self._arrived, order, now, queued_ns=order.queued_ns)  # fmt: skip

    def _arrived(self, order: Order, now: int) -> None:
        """All of it is there: the sender's blocks are free, and the decodes go on, perhaps in another dtype."""
        order.has_arrived = True
        order.here.sent(order.task)
        for following in order.followings:
            following.queued_ns = now
        conversion = self._conversion(order)
        if conversion is not None and not conversion.is_before:
            self._convert(order, conversion, self._receive, now)
        else:
            self._receive(order, now)

    def _receive(self, order: Order, now: int) -> None:
        del self.orders[order]
        for following in order.followings:
            order.there.front_end.receive(following, now)

    # --- clients that are lost ---

    def lose(self, clients: Sequence[Client], now: int) -> list[Order]:
        """`clients` are lost: what waits for them or is on its way from or to them is given up, and returned.

        Those that computed it or are to go on with it are not told. A prompt that is under way elsewhere is to go on
        with whom is chosen as its prefill ends.
        """
        for client in clients:
            client.reservations.clear()
        broken = [order for order in self.orders if _is_held_by(order, clients)]
        for order in broken:
            del self.orders[order]
            self.converting.pop(order, None)
            if order in self.awaiting.get(order.there.index, ()):
                self.awaiting[order.there.index].remove(order)
                self.room_came(order.there, now)
            if order.stream is not None:
                order.stream.stop()
            for task in order.followings:
                self.give_back(task, order.there, now)
        for task, early in list(self.early.items()):
            if early.here in clients or early.there in clients:
                if early.stream is not None:
                    early.stream.stop()
                self.forget(task, now)
        return broken


def _key(order: Order) -> tuple[int, ...]:
    """Its place among those that wait for the same client; the same for all where first come is first served."""
    ranks = order.there.residents.ranks
    return () if ranks is None else ranks.order.key(order.next)


def _is_held_by(order: Order, clients: Sequence[Client]) -> bool:
    """Whether `order` comes to nothing without `clients`."""
    return order.there in clients or (order.here in clients and not order.has_arrived)
