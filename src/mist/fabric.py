"""The channels of a network whose clients are placed: ports, NICs, uplinks, and what the clients of a host share.

Between the topology, a value, and the flows that `sharing` plays over its channels: it says which of them a transfer
takes. It never sends anything, and knows no requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from mist.sharing import Channel
from mist.topology import Link, Place, Topology
from mist.units import NS_PER_S


@dataclass(frozen=True, slots=True)
class Path:
    """The channels that a transfer takes at once, and the latency after its last byte left."""

    channels: tuple[Channel, ...] = ()
    latency_ns: int = 0


class PlainLinks:
    """A link of its own for each client's KV caches, and one each way to its host's memory; all else comes at no cost.

    `links` and `host_links` by client; with efficiency 1 and no latency an infinite one takes no time.
    """

    carries_all = False

    def __init__(self, links: Sequence[Link], host_links: Sequence[Link]) -> None:
        self._paths = [Path((Channel(f"{i}.out", link.reached_bytes_per_s),), link.latency_ns)
                       for i, link in enumerate(links)]  # fmt: skip
        self._from_host, self._to_host = (
            [Path((Channel(f"{i}.{way}", link.reached_bytes_per_s),), link.latency_ns)
             for i, link in enumerate(host_links)]
            for way in ("from_host", "to_host")
        )  # fmt: skip

    def path(self, sender: int, receiver: int) -> Path:
        """Out of the sender; from and to host memory over the link of the client that reads or writes there."""
        if sender < 0:
            return self._from_host[receiver]
        return self._to_host[sender] if receiver < 0 else self._paths[sender]


class Fabric:
    """`places`: where each client is, by its index. Channels are made when a path or a host asks for them first.

    A client has a port of all its devices to its node, to the rack and to its host; nodes have NICs, racks uplinks.
    A client on several nodes has their NICs together, and leaves by the uplink of its first.
    """

    carries_all = True

    def __init__(self, topology: Topology, places: Sequence[Place]) -> None:
        self.topology = topology
        self.places = places
        #: all that were asked for, by name
        self.channels: dict[str, Channel] = {}
        self._paths: dict[tuple[int, int], Path] = {}

    def path(self, sender: int, receiver: int) -> Path:
        """From a client to another, or from or to the memory of the other's host where one of them is negative."""
        path = self._paths.get((sender, receiver))
        if path is None:
            path = self._paths[sender, receiver] = self._path(sender, receiver)
        return path

    def cores(self, client: int) -> Channel:
        """The cores of its host, in ns of core time a second."""
        node = self.topology.nodes[self.places[client].nodes[0]]
        return self._channel(f"{node.name}.cores", node.host.num_cores * NS_PER_S if node.host else inf)

    def dram(self, client: int) -> Channel:
        """The memory channels of its host."""
        node = self.topology.nodes[self.places[client].nodes[0]]
        return self._channel(f"{node.name}.dram", node.host.memory_bytes_per_s if node.host else inf)

    def beyond_node(self, client: int, way: str, is_far: bool) -> Path:
        """Between a client and what is in its rack, or beyond that if `is_far`, on no node; `way` is "in" or "out"."""
        topology, place = self.topology, self.places[client]
        channels = [self._nic(place, way), self._end(client, way)]
        latency = topology.node.latency_ns + topology.rack.latency_ns
        if is_far:
            latency += topology.pod.latency_ns
            port = f"rack-{topology.nodes[place.nodes[0]].rack}.{'down' if way == 'in' else 'up'}"
            channels.insert(0, self._channel(port, topology.uplink_bytes_per_s))
        return Path(tuple(channels if way == "in" else reversed(channels)), latency)

    def _path(self, sender: int, receiver: int) -> Path:
        if sender < 0 or receiver < 0:
            return self._host_link(receiver if sender < 0 else sender, sender < 0)
        here, there = self.places[sender], self.places[receiver]
        if here.name == there.name:
            return Path()
        if not set(here.nodes) & set(there.nodes):
            return self._between_nodes(sender, receiver)
        if here.on_host and there.on_host:
            return Path()
        if here.on_host or there.on_host:
            return self._host_link(receiver if here.on_host else sender, here.on_host)
        link = self.topology.node
        leaves = self._port(here, "scale_up_out", link.reached_bytes_per_s)
        return Path((leaves, self._port(there, "scale_up_in", link.reached_bytes_per_s)), link.latency_ns)

    def _between_nodes(self, sender: int, receiver: int) -> Path:
        """Out of a node and into another; the latencies of all tiers that are crossed add up."""
        topology, here, there = self.topology, self.places[sender], self.places[receiver]
        racks = [topology.nodes[place.nodes[0]].rack for place in (here, there)]
        channels = [self._end(sender, "out"), self._nic(here, "out")]
        latency = topology.node.latency_ns + topology.rack.latency_ns
        if racks[0] != racks[1]:
            latency += topology.pod.latency_ns
            channels.append(self._channel(f"rack-{racks[0]}.up", topology.uplink_bytes_per_s))
            channels.append(self._channel(f"rack-{racks[1]}.down", topology.uplink_bytes_per_s))
        channels += [self._nic(there, "in"), self._end(receiver, "in")]
        return Path(tuple(channels), latency)

    def _host_link(self, client: int, to_device: bool) -> Path:
        """Between a client's devices and its host's memory; a client of the host itself reads it where it is."""
        place = self.places[client]
        if place.on_host:
            return Path((self.dram(client),))
        port = self._port(place, "pcie_in" if to_device else "pcie_out", place.device.host_link_bytes_per_s)
        channels = (self.dram(client), port) if to_device else (port, self.dram(client))
        return Path(channels, place.device.host_link_latency_ns)

    def _end(self, client: int, way: str) -> Channel:
        """Where what goes between nodes begins or ends: the NIC ports of a client's devices, or a host's memory."""
        place = self.places[client]
        if place.on_host:
            return self.dram(client)
        return self._port(place, f"port_{way}", self.topology.rack.reached_bytes_per_s)

    def _nic(self, place: Place, way: str) -> Channel:
        nodes = [self.topology.nodes[i] for i in place.nodes]
        name = nodes[0].name if len(nodes) == 1 else f"{nodes[0].name}..{nodes[-1].name}"
        return self._channel(f"{name}.nic_{way}", sum(node.nic_bytes_per_s for node in nodes))

    def _port(self, place: Place, name: str, bytes_per_s: float) -> Channel:
        return self._channel(f"{place.name}.{name}", place.num_devices * bytes_per_s)

    def _channel(self, name: str, capacity_per_s: float) -> Channel:
        channel = self.channels.get(name)
        if channel is None:
            channel = self.channels[name] = Channel(name, capacity_per_s)
        return channel
