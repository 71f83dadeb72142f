"""How busy what a run held was, in device-seconds and joules of steps, and whose that was; counted block by block.

Beside the metrics' tally, which brings the rows of steps and tasks, and under `usage`, which tells what came of it. It
knows no price, and nothing of what idle time cost.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from mist.cost.power import FloatColumn, busy_share, busy_watts, peak_shares
from mist.cost.split import Split
from mist.hardware import Device
from mist.metrics import ClientInfo
from mist.metrics.window import Columns, Window
from mist.perf import Deployment
from mist.records import IntColumn, Records
from mist.units import NS_PER_S


@dataclass(frozen=True, slots=True)
class Holding:
    """What each of `count` replicas of a pool holds: `num_devices` devices, of which one of its clients keeps
    `busy_devices` busy during a step (less than one: some cores of a CPU).

    `deployment`: the model that runs there, None where none does. `on_host`: on the host of a node, which is held once
    for all. `power_cap_w`: of each device.
    """

    device: Device
    count: int = 1
    num_devices: int = 1
    busy_devices: float = 1.0
    deployment: Deployment | None = None
    on_host: bool = False
    power_cap_w: float | None = None


@dataclass(slots=True)
class Busy:
    """Device-seconds of the steps of a replica, and their joules; `pool` is whose it is."""

    pool: str
    device_s: float = 0.0
    energy_j: float = 0.0


class BusyTime:
    """By replica how busy it was in a `span`, and whose that was, of `clients` in the order of the records.

    `holdings`: by pool, of those that have devices.
    """

    def __init__(
        self, records: Records, clients: Sequence[ClientInfo], holdings: Mapping[str, Holding], span: Window
    ) -> None:
        self.holdings = holdings
        self.by_replica = {each.replica: Busy(each.pool) for each in clients if each.pool in holdings}
        self._clients, self._span, self._kinds = clients, span, records.stage_kinds
        self._tenants, self._first = zip(*(records.tenants or [("", 0)]), strict=True)
        self._splits = [Split(len(self._tenants) * len(self._kinds), 2) for _ in clients]

    def add(self, steps: Columns, num_before: int, tasks: Columns) -> None:
        """Steps of all clients, the first `num_before` of which were there before, and tasks of requests that left.

        `join_step` and `last_step` of tasks count from the first of these steps.
        """
        rows = (_by_client(table, len(self._clients)) for table in (steps, tasks))
        for info, split, (places, own), (_, tasks_here) in zip(self._clients, self._splits, *rows, strict=True):
            holding = self.holdings.get(info.pool)
            if holding is None:  # a KV store that is nowhere in particular
                continue
            device_s = _seconds_inside(own, self._span) * holding.busy_devices
            joules = device_s * _watts(holding, own)
            counted, busy = int(np.searchsorted(places, num_before)), self.by_replica[info.replica]
            busy.device_s += float(device_s[counted:].sum())
            busy.energy_j += float(joules[counted:].sum())
            tenant = np.searchsorted(self._first, tasks_here["request"], side="right") - 1
            keys = tenant * len(self._kinds) + tasks_here["kind"]
            split.add(own, tasks_here, keys, np.array((device_s, joules)), counted)

    def shares(self) -> list[dict[str, Any]]:
        """`busy_s` and the `energy_j` of steps by pool, tenant and stage."""
        found: dict[tuple[str, str, str], list[float]] = {}
        for info, split in zip(self._clients, self._splits, strict=True):
            for at in (0, 1):
                sums = split.shares(at)
                for key in np.flatnonzero(sums).tolist():
                    tenant, kind = divmod(key, len(self._kinds))
                    whose = (info.pool, self._tenants[tenant], self._kinds[kind])
                    found.setdefault(whose, [0.0, 0.0])[at] += float(sums[key])
        return [
            {"pool": pool, "tenant": tenant, "stage": kind, "busy_s": device_s, "energy_j": joules}
            for (pool, tenant, kind), (device_s, joules) in found.items()
        ]


def _by_client(rows: Columns, num_clients: int) -> Iterator[tuple[IntColumn, dict[str, IntColumn]]]:
    """The places of the rows of each client, in their order, and these rows."""
    if num_clients == 1:
        yield np.arange(len(rows["client"])), dict(rows)
        return
    # of 16 bits, where they do, numpy sorts in linear time
    client = rows["client"].astype(np.int16 if num_clients < 2**15 else np.int32)
    order = np.argsort(client, kind="stable")
    bounds = np.searchsorted(client[order], np.arange(num_clients + 1)).tolist()
    for begin, end in pairwise(bounds):
        places = order[begin:end]
        yield places, {name: column[places] for name, column in rows.items()}


def _seconds_inside(steps: Columns, span: Window) -> FloatColumn:
    """How much of each step lies in the span, s."""
    inside = np.minimum(steps["end_ns"], span.end_ns) - np.maximum(steps["start_ns"], span.start_ns)
    seconds: FloatColumn = np.maximum(inside, 0) / NS_PER_S
    return seconds


def _watts(holding: Holding, steps: Columns) -> FloatColumn:
    """Power of a device during each step; 1 W where none is known, so that shares of energy go by time."""
    every = np.ones(len(steps["start_ns"]))
    if holding.device.tdp_w is None:
        return every
    share = every
    if holding.deployment is not None and not holding.device.num_cores:
        share = busy_share(*peak_shares(holding.deployment, steps))
    return busy_watts(holding.device, share, holding.power_cap_w)
