"""Views: what routers and admission policies see of the clients, as of now or as of the last refresh.

Between the coordinator and the clients. What a view tells beyond a client's own counts is worked out here, when
somebody looks, for the clients of policies that ask for it; clients and their steps know nothing of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import fields, replace

from mist.client import Client
from mist.forecast import LongestDecode, Prices, predicted_tokens, true_tokens
from mist.load import PRICES
from mist.request import DECODE, PREFILL, ClientView, Task


class Views:
    """With `refresh_ns` everybody sees a client as it was when somebody first looked at it in the period
    [k x refresh_ns, (k + 1) x refresh_ns) that `now` is in; with 0 as it is.

    So a view is less than `refresh_ns` old, all decisions of a period about a client see one state of it, their own
    effects not included, and a period in which nobody looks costs nothing.
    """

    def __init__(self, refresh_ns: int = 0) -> None:
        self._refresh_ns = refresh_ns
        #: whether decodes are promised to clients while their prompts are under way elsewhere
        self.count_promises = False
        self._outlooks: dict[int, _Outlook] = {}
        #: by performance model, which the replicas of a pool have in common
        self._prices: dict[int, Prices] = {}
        #: by client, the period that its view is of, and the view
        self._seen: dict[int, tuple[int, ClientView]] = {}
        #: the clients that somebody looked at last `as_read`, and these views of them
        self._clients_as_read: Sequence[Client] = ()
        self._as_read: tuple[ClientView, ...] = ()

    def ask(self, clients: Iterable[Client], policy: object) -> None:
        """`policy` will look at `clients`: from now on their views tell what it `needs`."""
        needs: frozenset[str] = getattr(policy, "needs", frozenset())
        for client in clients if needs else ():
            if needs & PRICES and client.runs_model and id(client.perf) not in self._prices:
                self._prices[id(client.perf)] = Prices(client)
            outlook = self._outlooks.setdefault(client.index, _Outlook(client))
            outlook.ask(needs, self._prices.get(id(client.perf)))

    def of(
        self, clients: Sequence[Client], now: int, *, with_load: bool = True, as_read: bool = False
    ) -> Sequence[ClientView]:
        """The views of `clients`, in their order; without the load for who reads `num_outstanding` at most.

        `as_read`: for who reads `pending_prefill_tokens` too, but not of every client; told as of when it is read.
        """
        if self._refresh_ns:
            return [self._last(client, now // self._refresh_ns) for client in clients]
        if self._outlooks or self.count_promises:
            return [self._fresh(client) for client in clients]
        if with_load:
            return [client.refresh_view() for client in clients]
        if not as_read:
            return [client.view for client in clients]
        if clients is not self._clients_as_read:
            self._clients_as_read, self._as_read = clients, tuple([_AsRead(client) for client in clients])
        return self._as_read

    def placed(self, task: Task, client: Client) -> None:
        """`task` goes to `client`."""
        if outlook := self._outlooks.get(client.index):
            outlook.came(task)

    def _fresh(self, client: Client) -> ClientView:
        view = client.refresh_view()
        if outlook := self._outlooks.get(client.index):
            outlook.fill(view)
        if num := client.reservations.num_promised:
            view = replace(view, num_outstanding=view.num_outstanding + num, num_waiting=view.num_waiting + num)
        return view

    def _last(self, client: Client, period: int) -> ClientView:
        seen = self._seen.get(client.index)
        if seen is None or seen[0] != period:
            seen = self._seen[client.index] = period, copy(self._fresh(client))
        return seen[1]


class _AsRead(ClientView):
    """A view whose number of tasks and pending tokens are those of when they are read; the others are as at first."""

    __slots__ = ("_client",)

    def __init__(self, client: Client) -> None:
        self._client = client
        for each in fields(ClientView):
            if each.name not in ("num_outstanding", "pending_prefill_tokens"):
                setattr(self, each.name, getattr(client.view, each.name))

    @property
    def num_outstanding(self) -> int:  # type: ignore[override]
        return self._client.view.num_outstanding

    @property
    def pending_prefill_tokens(self) -> int:  # type: ignore[override]
        client = self._client
        return client.residents.pending_tokens + client.front_end.incoming_tokens


class _Outlook:
    """The fields of one client's view that somebody asked for."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._only_prefills = PREFILL in client.serves and DECODE not in client.serves
        self._counts_decodes = False
        self._prices: Prices | None = None
        self._predicted: LongestDecode | None = None
        self._true: LongestDecode | None = None

    def ask(self, needs: frozenset[str], prices: Prices | None) -> None:
        client = self._client
        self._counts_decodes |= "num_decodes" in needs
        if needs & PRICES:
            self._prices = prices
        if self._predicted is None and "longest_decode" in needs:
            self._predicted = LongestDecode(client, predicted_tokens)
        if self._true is None and "oracle_longest_decode" in needs:
            self._true = LongestDecode(client, true_tokens)

    def came(self, task: Task) -> None:
        for longest in (self._predicted, self._true):
            if longest is not None:
                longest.came(task)

    def fill(self, view: ClientView) -> None:
        """Bring the fields up to date."""
        if self._counts_decodes or self._prices is not None:
            residents, incoming = self._client.residents, self._client.front_end.incoming
            coming = [*residents.handed_over, *(task for task in incoming if not task.remaining_tokens)]
            view.num_decodes = residents.cohort.count + len(coming) + self._client.reservations.num_promised
            if self._prices is not None:
                context = residents.cohort.sum_context + sum(task.target_tokens for task in coming)
                self._prices.fill(view, view.num_decodes, context)
                if self._only_prefills:
                    view.decode_ns = 0
        if self._predicted is not None:
            view.longest_decode = self._predicted.num_steps()
        if self._true is not None:
            view.oracle_longest_decode = self._true.num_steps()
