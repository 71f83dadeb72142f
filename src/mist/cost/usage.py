"""What a run used, as plain data: devices and hosts held, how busy they were and whose that was, energy, memories.

All that `cost` and `energy` read, so that they need neither records nor the scenario; it is part of the summary. It
knows no price.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mist.cost.busy import Busy, BusyTime, Holding
from mist.hardware import Device
from mist.metrics.window import Window
from mist.units import NS_PER_S

Json = dict[str, Any]


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
    busy_time: BusyTime,
    metrics: Mapping[str, Any],
    span: Window,
    *,
    hosts: Sequence[HostUse] = (),
    memories: Sequence[MemoryUse] = (),
    remarks: Sequence[str] = (),
) -> Json:
    """The usage of a run over a `span`; `metrics` is its summary over the same.

    `busy_time` has all its steps. `machines`: the devices of each pool, and hosts of nodes, with the
    `device_s` that they were held (replicas that weren't there aren't counted) and the `whole_device_s` had all been
    there throughout; `busy_s`, the device-seconds of steps; `energy_j`, None where no TDP is known. `shares`: `busy_s`
    and the `energy_j` of steps by pool, tenant and stage.
    """
    busy = busy_time.by_replica
    held = busy_time.holdings.items()
    machines = [_devices(pool, holding, metrics, busy, span) for pool, holding in held if not holding.on_host]
    return {
        "span_s": span.span_ns / NS_PER_S,
        **_rates(metrics),
        "tenants": {name: _rates(tenant) for name, tenant in metrics["tenants"].items()},
        "machines": [*machines, *_alike(_host(host, busy, span) for host in hosts)],
        "memories": [{**asdict(memory), "pools": list(memory.pools)} for memory in memories],
        "shares": busy_time.shares(),
        "remarks": list(remarks),
    }


def _rates(metrics: Mapping[str, Any]) -> Json:
    return {key: metrics["throughput"][key] for key in ("output_tokens_per_s", "total_tokens_per_s", "requests_per_s")}


def _devices(pool: str, holding: Holding, metrics: Mapping[str, Any], busy: Mapping[str, Busy], span: Window) -> Json:
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


def _host(host: HostUse, busy: Mapping[str, Busy], span: Window) -> Json:
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


def _held(device: Device | None, held_s: float, busy: Sequence[Busy]) -> Json:
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
