"""What a run used, as plain data: devices and hosts held, how busy they were and whose that was, energy, memories.

All that `cost` and `energy` read, so that they need neither records nor the scenario; it is part of the summary. It
knows no price.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
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

Json = dict[str, Any]

_STEP_COLUMNS = ("start_ns", "end_ns", "num_prefills", "num_prefill_tokens", "num_decodes", "decode_context")
_TASK_COLUMNS = (
    "request", "kind", "started_ns", "joined_ns", "end_ns", "computed_tokens", "join_step", "last_step"
)  # fmt: skip


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


@dataclass(frozen=True, slots=True)
class HostUse:
    """The host of a node: its `device` (None: not known), the `replicas` on it, pools on accelerators
    `beside` it."""

    name: str
    device: Device | None
    replicas: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """A memory of the scenario, by its name and that of its catalogue's entry; bytes of each of its `instances`.

    `pools`: those that read it.
    """

    name: str
    kind: str
    instances: int
    capacity_bytes: int
    pools: tuple[str, ...] = ()


def used(
    records: Records,
    metrics: Mapping[str, Any],
    *,
    clients: Sequence[ClientInfo],
    holdings: Mapping[str, Holding],
    hosts: Sequence[HostUse] = (),
    memories: Sequence[MemoryUse] = (),
    window: tuple[int | None, int | None] = (None, None),
    remarks: Sequence[str] = (),
) -> Json:
    """The usage of a run over the span of `window`; `metrics` is the summary of `records` over the same.

    `holdings`: by pool, of those that have devices. `machines`: the devices of each pool, and hosts of nodes, with the
    `device_s` that they were held (replicas that weren't there aren't counted) and the `whole_device_s` had all been
    there throughout; `busy_s`, the device-seconds of steps; `energy_j`, None where no TDP is known. `shares`: `busy_s`
    and the `energy_j` of steps by pool, tenant and stage.
    """
    span = Window.of(records, window)
    busy, shares = _busy(records, clients, holdings, span)
    machines = [_devices(pool, h, metrics, busy, span) for pool, h in holdings.items() if not h.on_host]
    return {
        "span_s": span.span_ns / NS_PER_S,
        **_rates(metrics),
        "tenants": {name: _rates(tenant) for name, tenant in metrics["tenants"].items()},
        "machines": [*machines, *_alike(_host(host, busy, span) for host in hosts)],
        "memories": [{**asdict(memory), "pools": list(memory.pools)} for memory in memories],
        "shares": shares,
        "remarks": list(remarks),
    }


def _rates(metrics: Mapping[str, Any]) -> Json:
    return {key: metrics["throughput"][key] for key in ("output_tokens_per_s", "total_tokens_per_s", "requests_per_s")}


@dataclass(slots=True)
class _Busy:
    """Device-seconds of the steps of a replica, and their joules; `pool` is whose it is."""

    pool: str
    device_s: float = 0.0
    energy_j: float = 0.0


def _busy(
    records: Records, clients: Sequence[ClientInfo], holdings: Mapping[str, Holding], span: Window
) -> tuple[dict[str, _Busy], list[Json]]:
    """By replica how busy it was, and whose that was."""
    busy: dict[str, _Busy] = {}
    found: dict[tuple[str, str, str], list[float]] = {}
    names, first = zip(*(records.tenants or [("", 0)]), strict=True)
    kinds = records.stage_kinds
    tables = (
        _by_client(records.steps.as_columns(), _STEP_COLUMNS, len(clients)),
        _by_client(records.tasks.as_columns(), _TASK_COLUMNS, len(clients)),
    )
    for info, steps, tasks in zip(clients, *tables, strict=True):
        holding = holdings.get(info.pool)
        if holding is None:  # a KV store that is nowhere in particular
            continue
        device_s = _seconds_inside(steps, span) * holding.busy_devices
        joules = device_s * _watts(holding, steps)
        own = busy.setdefault(info.replica, _Busy(info.pool))
        own.device_s += float(device_s.sum())
        own.energy_j += float(joules.sum())
        split = Split.of(steps, tasks)
        keys = (np.searchsorted(first, tasks["request"], side="right") - 1) * len(kinds) + tasks["kind"]
        for at, amounts in enumerate((device_s, joules)):
            sums = np.bincount(keys, split.shares(amounts))
            for key in np.flatnonzero(sums).tolist():
                whose = (info.pool, names[key // len(kinds)], kinds[key % len(kinds)])
                found.setdefault(whose, [0.0, 0.0])[at] += float(sums[key])
    shares = [
        {"pool": pool, "tenant": tenant, "stage": kind, "busy_s": device_s, "energy_j": joules}
        for (pool, tenant, kind), (device_s, joules) in found.items()
    ]
    return busy, shares


def _by_client(rows: Columns, columns: Sequence[str], num_clients: int) -> Iterator[dict[str, IntColumn]]:
    """Some columns of the rows of each client, in their order."""
    # of 16 bits, where they do, numpy sorts in linear time
    client = rows["client"].astype(np.int16 if num_clients < 2**15 else np.int32)
    order = np.argsort(client, kind="stable")
    bounds = np.searchsorted(client[order], np.arange(num_clients + 1)).tolist()
    for begin, end in pairwise(bounds):
        yield {name: rows[name][order[begin:end]] for name in columns}


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


def _devices(pool: str, holding: Holding, metrics: Mapping[str, Any], busy: Mapping[str, _Busy], span: Window) -> Json:
    """The devices of a pool that aren't hosts of nodes."""
    held_s = metrics["clients"][pool]["replica_s"] * holding.num_devices
    num_devices = holding.count * holding.num_devices
    mine = [each for each in busy.values() if each.pool == pool]
    return {
        "name": pool,
        "kind": "devices",
        "pools": [pool],
        "beside": [],
        "num_devices": num_devices,
        "whole_device_s": num_devices * (span.span_ns / NS_PER_S),
        **_held(holding.device, held_s, mine),
    }


def _host(host: HostUse, busy: Mapping[str, _Busy], span: Window) -> Json:
    """The host of a node, once whoever shares it; it stays throughout."""
    mine, span_s = [busy[name] for name in host.replicas], span.span_ns / NS_PER_S
    return {
        "name": host.name,
        "kind": "host",
        "pools": sorted({each.pool for each in mine}),
        "beside": list(host.beside),
        "num_devices": 1,
        "whole_device_s": span_s,
        **_held(host.device, span_s, mine),
    }


def _held(device: Device | None, held_s: float, busy: Sequence[_Busy]) -> Json:
    """Energy of devices held for `held_s`: idle power all the time, and what steps draw beyond it.

    Steps of clients that share a host slow each other down, and count at most as long as it was held.
    """
    busy_s, energy_j = sum(each.device_s for each in busy), None
    if device is not None and device.idle_watts is not None and device.tdp_w is not None:
        beyond = sum(each.energy_j for each in busy) - device.idle_watts * busy_s
        most = (device.tdp_w - device.idle_watts) * held_s
        energy_j = device.idle_watts * held_s + min(max(0.0, beyond), most)
    name, is_cpu = (None, True) if device is None else (device.name, device.num_cores > 0)
    return {"device": name, "is_cpu": is_cpu, "device_s": held_s, "busy_s": min(busy_s, held_s), "energy_j": energy_j}


def _alike(hosts: Iterable[Json]) -> list[Json]:
    """Hosts of one kind with the same pools as one machine, called as the first."""
    found: dict[tuple[Any, ...], Json] = {}
    for host in hosts:
        first = found.setdefault((host["device"], *host["pools"], "", *host["beside"]), host)
        if first is not host:
            for key in ("num_devices", "whole_device_s", "device_s", "busy_s"):
                first[key] += host[key]
            first["energy_j"] = None if host["energy_j"] is None else first["energy_j"] + host["energy_j"]
    return list(found.values())
