"""Laws of what is on its way: KV caches that are handed over, the room and the promises kept for them, all transfers.

Beside the ledger, which asks for breaches at each instant and once it closes. It changes nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from mist.client import Client
from mist.coordinator import Coordinator
from mist.hand_over import HandOver, Order
from mist.network import Network
from mist.records import HAND_OFF, KV_SWAP, Records
from mist.request import DECODE
from mist.units import NS_PER_S


def under_way_of(coordinator: Coordinator, clients: Sequence[Client]) -> tuple[list[int], list[int]]:
    """Transfers that tasks wait for on their way to each client, and KV caches on their way from each."""
    handing, network = coordinator.handing, coordinator.network
    to, leaving = [0] * len(clients), [0] * len(clients)
    for client in clients:
        if client.offload is not None:
            to[client.index] = sum(task in client.front_end.incoming for task in client.offload.tasks)
    for transfer in network.in_flight:
        if transfer.receiver >= 0 and transfer.kind == HAND_OFF:
            expected = clients[transfer.receiver].front_end.incoming
            to[transfer.receiver] += sum(part in expected for part in transfer.argument)
    for order in _orders(handing, network):
        if not order.followings and order.then is not None:
            to[order.here.index] += 1  # its prompt waits for room where it will be decoded
            continue
        to[order.there.index] += sum(task in order.there.front_end.incoming for task in order.followings)
        leaving[order.here.index] += not order.has_arrived
    return to, leaving


def hand_over_breaches(handing: HandOver, network: Network, clients: Sequence[Client]) -> Iterator[str]:
    """room: a KV cache is on its way to blocks that are reserved. promises: one for each prompt decided on early."""
    for order in _orders(handing, network):
        if order.followings and order not in handing.awaited and order.next not in order.there.reservations.blocks:
            yield f"{order.there.name}: request {order.task.request.index} comes, and there is no room for it"
    promised = Counter(early.there for early in handing.early.values())
    for client in clients:
        if promised[client] != client.reservations.num_promised:
            yield f"{client.name}: promises: {client.reservations.num_promised} is not {promised[client]}"


def transfer_breaches(records: Records, network: Network, rounding_ns: int) -> Iterator[str]:
    """transfers: none beats its path; a decode goes on elsewhere only with its KV cache; what is swapped in was out."""
    rows, tasks = records.transfers.as_columns(), records.tasks.as_columns()
    for sender, receiver in np.unique(np.stack((rows["sender"], rows["receiver"])), axis=1).T.tolist():
        mine = (rows["sender"] == sender) & (rows["receiver"] == receiver) & (rows["end_ns"] >= 0)
        path = network.path(sender, receiver)
        slowest = min((channel.rated_per_s for channel in path.channels), default=np.inf)
        took = (rows["end_ns"] - rows["start_ns"])[mine] - path.latency_ns
        if np.any(took < rows["bytes"][mine] / slowest * NS_PER_S - rounding_ns):
            yield f"a transfer from {sender} to {receiver} beats its path"
    came = set(zip(*(rows[name].tolist() for name in ("request", "receiver", "end_ns")), strict=True))
    came |= set(zip(*(tasks[name].tolist() for name in ("request", "client", "end_ns")), strict=True))  # or was here
    kinds = records.stage_kinds
    on = (tasks["join_step"] >= 0) & (tasks["kind"] == (kinds.index(DECODE) if DECODE in kinds else -1))
    on &= tasks["computed_tokens"] + tasks["cached_tokens"] == 0
    went = set(zip(*(tasks[name][on].tolist() for name in ("request", "client", "queued_ns")), strict=True))
    if not went <= came:
        yield f"decodes went on without their KV cache: {sorted(went - came)[:3]}"
    swaps = rows["kind"] == KV_SWAP
    out, back = (
        Counter(zip(rows["request"][way].tolist(), rows["bytes"][way].tolist(), strict=True))
        for way in (swaps & (rows["receiver"] < 0), swaps & (rows["sender"] < 0))
    )
    if not back <= out:
        yield f"more came back than was swapped out: {(back - out).most_common(3)}"


def _orders(handing: HandOver, network: Network) -> set[Order]:
    """KV caches that wait for room, are converted or are on a link."""
    moving = {transfer.argument for transfer in network.in_flight if isinstance(transfer.argument, Order)}
    return handing.awaited | handing.converting.keys() | moving
