"""What a user may write of what lies between the clients: tiers, nodes and who is placed where; or one plain link.

A part of the schema. A validated `Network` with tiers has all three, from its preset where they were left out. It never
looks at the clients: `placement` puts them on its nodes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Set
from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator

from mist.errors import Problem, nearest
from mist.hardware import Device
from mist.scenario.catalogued import Catalogued
from mist.scenario.clients import Fraction
from mist.scenario.named import Located, Section, Short, problem, problems, short
from mist.scenario.quantities import Bandwidth, Latency
from mist.topology import Link
from mist.units import parse_bytes_per_s, parse_time_ns


def _node_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]*", value):
        raise problem(f"{short(value)} can't name a node", "use letters, digits, - and _")
    return value


def _is_a_cpu(device: Device) -> Device:
    if not device.num_cores:
        raise problem(f"{device.name} is not a CPU: it has no num_cores", "such as host: epyc-9554")
    return device


NodeName = Annotated[str, AfterValidator(_node_name)]
Nodes = Annotated[list[str], Field(min_length=1), Short(lambda value: [value] if isinstance(value, str) else value)]


class Tier(Section):
    """The links of one tier of the network."""

    bandwidth: Bandwidth
    """bytes that a device's link carries each way at its best, such as 50 GB/s"""
    latency: Latency = "0 s"
    """time that each transfer takes besides, such as 1 ms"""
    efficiency: Fraction = 1.0
    """share of the bandwidth that transfers reach"""

    @property
    def link(self) -> Link:
        return Link(parse_bytes_per_s(self.bandwidth), parse_time_ns(self.latency), self.efficiency)


class KVTransfer(Section):
    """The link of each prefill client, which the KV caches that it sends share."""

    bandwidth: Bandwidth
    """bytes that it carries at its best, such as 50 GB/s"""
    latency: Latency = "0 s"
    """time that each transfer takes besides, such as 1 ms"""
    efficiency: Fraction = 1.0
    """share of the bandwidth that transfers reach"""

    @property
    def bytes_per_s(self) -> float:
        return parse_bytes_per_s(self.bandwidth) * self.efficiency

    @property
    def latency_ns(self) -> int:
        return parse_time_ns(self.latency)


class Ports(Section):
    """Equal ports that many share."""

    bandwidth: Bandwidth
    """bytes that one carries each way at its best, such as 50 GB/s"""
    count: Annotated[int, Field(ge=1, le=100_000)] = 1
    """how many there are"""

    @property
    def bytes_per_s(self) -> float:
        return parse_bytes_per_s(self.bandwidth) * self.count


class NodeGroup(Section):
    """Equal nodes: NAME, or NAME-0, NAME-1 and so on where there are more."""

    count: Annotated[int, Field(ge=1, le=100_000)] = 1
    """how many there are"""
    devices: Annotated[int, Field(ge=0, le=1024)] = 0
    """accelerators of each"""
    host: Annotated[Device, Catalogued("devices"), AfterValidator(_is_a_cpu)] | None = None
    """the CPU of each: a name of `mist list devices`, the path of a YAML file, or a mapping"""
    nic: Ports | None = None
    """the NICs of each, of the rack's efficiency; left out, one for each device at the rack's bandwidth"""

    @model_validator(mode="after")
    def _holds_something(self) -> NodeGroup:
        if not self.devices and self.host is None:
            raise problem("the node has neither devices nor a host", "such as devices: 8")
        return self


class Tiers(Section):
    """The tiers of a network, and how many share them."""

    node: Tier | None = None
    """between the devices of a node"""
    rack: Tier | None = None
    """between the nodes of a rack"""
    pod: Tier | None = None
    """between racks: a device's share of its rack's uplink"""
    devices_per_node: Annotated[int, Field(ge=1, le=1024)] | None = None
    """accelerators of a node, where `nodes` are left out; the preset's, or 8"""
    nodes_per_rack: Annotated[int, Field(ge=1, le=1024)] | None = None
    """nodes of a rack, in their order; the preset's, or 8"""


class Preset(Tiers):
    """A network of the catalogue."""

    name: str
    """what it is called"""
    sources: dict[str, str] = {}  # noqa: RUF012
    """where each figure comes from"""


class Network(Tiers):
    """What lies between the clients; left out, nothing: what they send is there at once."""

    preset: Annotated[Any, Catalogued("networks"), AfterValidator(Preset.model_validate)] = None
    """what is left out of the tiers: a name of `mist list networks`, the path of a YAML file, or a mapping"""
    uplink: Ports | None = None
    """the uplinks of a rack, of the pod's efficiency; left out, the pod's bandwidth for each device of a full rack"""
    nodes: Annotated[dict[NodeName, NodeGroup], Field(min_length=1)] | None = None
    """groups of equal nodes, by name; left out, as many as the clients fill"""
    placement: dict[str, Nodes] | None = None
    """the nodes, or groups of nodes, of a pool's replicas, which a list splits evenly; left out, the first with room"""
    kv_transfer: KVTransfer | None = None
    """how KV caches get from prefill to decode clients, in place of all that; left out, they take no time"""

    @classmethod
    def conflicts(cls, given: Set[str]) -> Iterator[Located]:
        """One plain link and a network of nodes exclude each other; only nodes that are named hold anybody."""
        if "kv_transfer" in given and (others := sorted(given - {"kv_transfer"})):
            hint = f"remove kv_transfer, or {' and '.join(others)}"
            yield ("kv_transfer",), Problem(f"kv_transfer and {others[0]} are both given", hint=hint)
        if "placement" in given and "nodes" not in given:
            hint = "such as nodes: {gpu: {count: 2, devices: 8}}"
            yield ("placement",), Problem("there are no nodes to place clients on", hint=hint)

    @model_validator(mode="after")
    def _complete(self) -> Network:
        if not self.model_fields_set - {"kv_transfer"}:
            return self
        whole = {key: getattr(self, key) or getattr(self.preset, key, None) for key in Tiers.model_fields}
        sizes = {key: whole[key] or 8 for key in ("devices_per_node", "nodes_per_rack")}
        if missing := [key for key, value in (whole | sizes).items() if value is None]:
            hint = "such as preset: h100-nvl8, or rack: {bandwidth: 50 GB/s, latency: 20 us, efficiency: 0.9}"
            raise problem(f"the network has no {' and no '.join(missing)}", hint)
        if found := list(self._misnamed()):
            raise problems(found)
        return self.model_copy(update=whole | sizes | {"preset": None})

    @property
    def has_nodes(self) -> bool:
        """Whether clients are on nodes, and share what joins these."""
        return self.node is not None

    def node_names(self) -> dict[str, list[str]]:
        """The nodes of each group."""
        return {group: numbered(group, each.count) for group, each in (self.nodes or {}).items()}

    def _misnamed(self) -> Iterator[Located]:
        """Nodes that have the same name, and names of `placement` that nothing has."""
        owner: dict[str, str] = {}
        for group, nodes in self.node_names().items():
            for name in dict.fromkeys((group, *nodes)):
                if owner.setdefault(name, group) != group:
                    message = f"{owner[name]} has a node {name!r} already"
                    yield ("nodes", group), Problem(message, hint="call it otherwise")
        for pool, given in (self.placement or {}).items():
            for index, name in enumerate(given):
                if name not in owner:
                    yield ("placement", pool, index), Problem(f"there is no node {name!r}", hint=nearest(name, owner))


def numbered(name: str, count: int) -> list[str]:
    """The names of `count` equals: the name itself, or numbered from 0 where there are more."""
    return [f"{name}-{i}" for i in range(count)] if count > 1 else [name]
