"""Who is where: the replicas of each pool on the nodes of the network, as the user placed them or packed in order.

Between the network section and the run: nodes and clients come in, a `Topology` and a place for each replica go out, or
what doesn't fit. It knows nothing of stages, models and time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from mist.errors import Problem, nearest
from mist.hardware import Device
from mist.metrics.words import counted
from mist.scenario.clients import Pool
from mist.scenario.host_memory import overfull
from mist.scenario.named import Located
from mist.scenario.network import Network, NodeGroup, numbered
from mist.scenario.pools import AnyClient
from mist.topology import Node, Place, Topology
from mist.units import GB

#: nodes that an error names before it says how many more there are
MAX_NAMED = 4
#: nodes that are listed one by one
MAX_LISTED = 40


@dataclass(frozen=True, slots=True)
class Placement:
    """`places`: by pool, one for each replica. `network` is the section with the nodes and the placement in it."""

    topology: Topology
    places: Mapping[str, tuple[Place, ...]]
    network: Network

    def lines(self) -> Iterator[str]:
        """What it comes to, to read: the tiers as transfers reach them, then who is on each node."""
        nodes = self.topology.nodes
        num_racks = nodes[-1].rack + 1
        tiers = {"node": self.topology.node, "rack": self.topology.rack, "pod": self.topology.pod}
        each = ", ".join(f"{name} {_gb(tier.reached_bytes_per_s)} {tier.latency_ns / 1e3:g} us"
                         for name, tier in tiers.items())  # fmt: skip
        uplinks = f", uplinks {_gb(self.topology.uplink_bytes_per_s)}" if num_racks > 1 else ""
        yield f"{counted(len(nodes), 'node')} in {counted(num_racks, 'rack')}{uplinks}; links of a device: {each}"
        here: list[list[str]] = [[] for _ in nodes]
        for replicas in self.places.values():
            for place in replicas:
                what = "host" if place.on_host else f"{place.num_devices} {place.device.name}"
                for index in place.nodes:
                    here[index].append(f"{place.name} ({what})")
        for node, clients in list(zip(nodes, here, strict=True))[:MAX_LISTED]:
            nics = f"rack {node.rack}, NICs {_gb(node.nic_bytes_per_s)}"
            yield f"  {node.name} ({nics}): {', '.join(clients) or 'nobody'}"
        if len(nodes) > MAX_LISTED:
            yield f"  and {counted(len(nodes) - MAX_LISTED, 'more node')}"


@dataclass(slots=True, eq=False)
class _Slots:
    """A node while it is being filled: devices that are free, of which kind they are, and who runs on its host."""

    group: str
    num_devices: int
    host: Device | None
    name: str = ""
    free: int = field(init=False)
    device: str = ""
    on_host: int = 0

    def __post_init__(self) -> None:
        self.free = self.num_devices

    def takes(self, device: Device) -> bool:
        """Whether it may hold this kind of accelerator: all of a node are of one kind."""
        return self.device in ("", device.name)

    def __str__(self) -> str:
        kind = f" ({self.device})" if self.device else ""
        return f"{self.free} of {self.num_devices} on {self.name}{kind}"


class _Unplaced(Exception):
    """A replica that fits nowhere: what and why."""


def place(network: Network, pools: Mapping[str, AnyClient]) -> Placement | list[Located]:
    """The clients on the nodes of `network`, or what keeps them from it, located below the scenario.

    What the user placed comes first. A client takes the first node that has room for all of its devices, or fills as
    many free nodes as it needs; one of a CPU takes a host of its own. Without `nodes` there are as many as that takes.
    """
    packing = _Packing(network)
    found: list[Located] = []
    taken: dict[str, list[list[_Slots]]] = {}
    given = network.placement or {}
    for name in given:
        if name not in pools:
            message = f"there are no clients {name!r}"
            found.append((("network", "placement", name), Problem(message, hint=nearest(name, pools))))
    for name in sorted(pools, key=lambda name: name not in given):
        try:
            taken[name] = list(packing.replicas(name, pools[name], given.get(name)))
        except _Unplaced as error:
            path = ("network", "placement", name) if name in given else ("network", "nodes")
            hint = "place it elsewhere, or leave its placement out" if name in given else "give more nodes"
            found.append((path, Problem(str(error), hint=hint)))
    if found:
        return found
    placement = packing.placement({name: taken[name] for name in pools}, pools)
    return list(overfull(placement.topology.nodes, placement.places, pools)) or placement


class _Packing:
    """The nodes of a scenario while clients are placed; it adds nodes where the user named none."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.grows = network.nodes is None
        self.nodes: list[_Slots] = []
        for group, each in (network.nodes or {}).items():
            self.nodes += [_Slots(group, each.devices, each.host, name) for name in numbered(group, each.count)]

    def replicas(self, name: str, pool: AnyClient, given: Sequence[str] | None) -> Iterator[list[_Slots]]:
        """The nodes of each replica, taken; `given` are the names of nodes or groups that the user chose."""
        choices = [[node for node in self.nodes if each in (node.name, node.group)] for each in given or ()]
        together = [node for nodes in choices for node in nodes]
        num_devices = _num_devices(pool)
        spans = num_devices > max((node.num_devices for node in together), default=0)
        for index, replica in enumerate(numbered(name, pool.count)):
            if given is None:
                candidates = self.nodes
            elif spans:
                candidates = together
            else:
                candidates = choices[index * len(choices) // pool.count]
            device = _device(pool)
            if device.num_cores and num_devices > 1:
                raise _Unplaced(f"{replica} takes {num_devices} {device.name}, and a node has one host")
            if device.num_cores:
                yield [self._on_host(replica, name, device, candidates, given is not None)]
            else:
                yield self._on_devices(replica, device, num_devices, candidates)

    def placement(self, taken: Mapping[str, list[list[_Slots]]], pools: Mapping[str, AnyClient]) -> Placement:
        """What the packing came to, as values."""
        groups: dict[str, list[_Slots]] = {}
        for slots in self.nodes:
            groups.setdefault(slots.group, []).append(slots)
        ordered = [slots for members in groups.values() for slots in members]
        for group, members in groups.items():
            for slots, name in zip(members, numbered(group, len(members)), strict=True):
                slots.name = name
        index = {slots.name: i for i, slots in enumerate(ordered)}
        network = self.network
        if self.grows:
            made = {
                group: NodeGroup.model_construct(count=len(m), devices=m[0].num_devices, host=m[0].host)
                for group, m in groups.items()
            }
            network = network.model_copy(update={"nodes": made})
        names = {pool: [slots.name for replica in taken[pool] for slots in replica] for pool in pools}
        places = {
            pool: tuple(
                Place(replica, tuple(index[s.name] for s in nodes), _device(each), _num_devices(each))
                for replica, nodes in zip(numbered(pool, each.count), taken[pool], strict=True)
            )
            for pool, each in pools.items()
        }
        return Placement(_topology(network, ordered), places, network.model_copy(update={"placement": names}))

    def _on_host(self, replica: str, pool: str, device: Device, nodes: list[_Slots], chosen: bool) -> _Slots:
        """The host with the fewest clients, first of all one with none, which it must be unless the user chose it."""
        fitting = [node for node in nodes if node.host == device and (chosen or not node.on_host)]
        if not fitting:
            if not self.grows:
                of = ", ".join(f"{node.name} has {_host(node)}" for node in nodes[:MAX_NAMED]) if chosen else ""
                why = f": {of}" if of else ", one that nobody else is on"
                raise _Unplaced(f"no host for {replica}, which runs on {device.name}{why}")
            fitting = [_Slots(f"{pool}-host", 0, device)]
            self.nodes += fitting
        node = min(fitting, key=lambda node: node.on_host)
        node.on_host += 1
        return node

    def _on_devices(self, replica: str, device: Device, wanted: int, nodes: list[_Slots]) -> list[_Slots]:
        room = next((node for node in nodes if node.free >= wanted and node.takes(device)), None)
        if room is not None:
            room.free -= wanted
            room.device = device.name
            return [room]
        whole: list[_Slots] = []
        if self.grows:
            size = self.network.devices_per_node or 1
            whole = [_Slots("node", size, None) for _ in range(-(-wanted // size))]
            self.nodes += whole
        elif wanted > max((node.num_devices for node in nodes), default=0):
            free = (node for node in nodes if node.free == node.num_devices > 0 and node.takes(device))
            whole = list(_until(wanted, free))
        if sum(node.num_devices for node in whole) < wanted:
            left = ", ".join(str(node) for node in nodes[:MAX_NAMED])
            more = f" and {len(nodes) - MAX_NAMED} more nodes" if len(nodes) > MAX_NAMED else ""
            raise _Unplaced(f"no room for {replica}, which takes {wanted} {device.name}; free are {left}{more}")
        for node in whole:
            node.free = node.num_devices - wanted if len(whole) == 1 else 0
            node.device = device.name
        return whole


def _device(pool: AnyClient) -> Device:
    assert pool.device is not None
    return pool.device


def _num_devices(pool: AnyClient) -> int:
    """Accelerators of a replica, or sockets."""
    return pool.platform.num_devices if isinstance(pool, Pool) else 1


def _until(wanted: int, nodes: Iterable[_Slots]) -> Iterator[_Slots]:
    """The first of `nodes` that have `wanted` devices together."""
    for node in nodes:
        if wanted <= 0:
            return
        wanted -= node.num_devices
        yield node


def _gb(bytes_per_s: float) -> str:
    return f"{bytes_per_s / GB:,.4g} GB/s"


def _host(node: _Slots) -> str:
    return node.host.name if node.host else "none"


def _topology(network: Network, nodes: Sequence[_Slots]) -> Topology:
    assert network.node
    assert network.rack
    assert network.pod
    assert network.nodes_per_rack
    rack, pod = network.rack.link, network.pod.link
    widest = max([1, *(node.num_devices for node in nodes)])
    uplink = network.uplink.bytes_per_s if network.uplink else network.nodes_per_rack * widest * pod.bytes_per_s
    made = []
    for index, node in enumerate(nodes):
        nic = (network.nodes or {})[node.group].nic
        bytes_per_s = nic.bytes_per_s if nic else max(1, node.num_devices) * rack.bytes_per_s
        made.append(
            Node(node.name, index // network.nodes_per_rack, node.num_devices, bytes_per_s * rack.efficiency, node.host)
        )
    return Topology(network.node.link, rack, pod, tuple(made), uplink * pod.efficiency)
