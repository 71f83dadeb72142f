"""Where clients are and what joins them, as values: links, nodes with their hosts, racks, and a place for each client.

The scenario makes them from a user's network section; a `Fabric` makes channels of them. Nothing here moves a byte or
chooses a place.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from mist.hardware import Device


@dataclass(frozen=True, slots=True)
class Link:
    """A tier's link of one device, each way: peak `bytes_per_s`, of which transfers reach `efficiency`.

    A message is there `latency_ns` after it left.
    """

    bytes_per_s: float
    latency_ns: int = 0
    efficiency: float = 1.0

    @property
    def reached_bytes_per_s(self) -> float:
        return self.bytes_per_s * self.efficiency


@dataclass(frozen=True, slots=True)
class Node:
    """`num_devices` accelerators and a host, which may be unknown (None); `nic_bytes_per_s` in and out, as reached."""

    name: str
    rack: int
    num_devices: int
    nic_bytes_per_s: float
    host: Device | None = None


@dataclass(frozen=True, slots=True)
class Topology:
    """Nodes in racks in one pod, and the links of each tier. `uplink_bytes_per_s`: of a rack, in and out, as reached.

    `node` joins the devices of a node, `rack` the nodes of a rack, `pod` the racks.
    """

    node: Link
    rack: Link
    pod: Link
    nodes: tuple[Node, ...]
    uplink_bytes_per_s: float = inf


@dataclass(frozen=True, slots=True)
class Place:
    """Where a client is: on `num_devices` of a node's devices, or on several nodes that it fills; `name` is its own.

    A client of a CPU runs on the host of its node. The lanes of a replica are in one place.
    """

    name: str
    nodes: tuple[int, ...]
    device: Device
    num_devices: int = 1

    @property
    def on_host(self) -> bool:
        return self.device.num_cores > 0
