"""The network between placed clients: which channels a transfer takes, how long that takes, and what is recorded.

Guards `mist.fabric` and `mist.network.Network`, and the figures of the presets.
"""

from __future__ import annotations

from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mist.fabric import Fabric
from mist.fabric import Path as Route
from mist.hardware import Device
from mist.kernel import Kernel
from mist.network import HOST, Network
from mist.records import HAND_OFF, Records
from mist.scenario import catalogue
from mist.scenario.network import Preset
from mist.sharing import Sharing, duration_ns
from mist.topology import Link, Node, Place, Topology
from mist.units import GB

GPU = Device("card", {"bf16": 1e15}, 80 * 10**9, 3e12, host_link_bytes_per_s=50.0 * GB, host_link_latency_ns=9_000)
CPU = Device("cpu", {"bf16": 1e12}, 10**12, 400.0 * GB, num_cores=64)
NODE, RACK, POD = Link(450.0 * GB, 10, 0.5), Link(50.0 * GB, 20, 0.8), Link(10.0 * GB, 200, 0.6)
#: two racks of two nodes
TOPOLOGY = Topology(
    NODE,
    RACK,
    POD,
    tuple(Node(f"node-{i}", i // 2, 8, 320.0 * GB, CPU) for i in range(4)),
    uplink_bytes_per_s=96.0 * GB,
)
PLACES = (
    Place("a", (0,), GPU, 2),
    Place("b", (0,), GPU, 4),
    Place("c", (1,), GPU, 8),
    Place("d", (2,), GPU, 1),
    Place("big", (2, 3), GPU, 16),
    Place("index", (0,), CPU),
    Place("tokeniser", (0,), CPU),
    Place("elsewhere", (1,), CPU),
    Place("a", (0,), GPU, 2),  # another lane of the first
)
A, B, C, D, BIG, INDEX, TOKENISER, ELSEWHERE, LANE = range(len(PLACES))


def names(path: Route) -> list[str]:
    return [channel.name for channel in path.channels]


@pytest.mark.parametrize(
    ("sender", "receiver", "channels", "latency_ns"),
    [
        (A, B, ["a.scale_up_out", "b.scale_up_in"], 10),
        (A, C, ["a.port_out", "node-0.nic_out", "node-1.nic_in", "c.port_in"], 30),
        (C, D, ["c.port_out", "node-1.nic_out", "rack-0.up", "rack-1.down", "node-2.nic_in", "d.port_in"], 230),
        (BIG, A, ["big.port_out", "node-2..node-3.nic_out", "rack-1.up", "rack-0.down", "node-0.nic_in", "a.port_in"],
         230),
        (A, LANE, [], 0),
        (A, A, [], 0),
        (INDEX, TOKENISER, [], 0),
        (INDEX, A, ["node-0.dram", "a.pcie_in"], 9_000),
        (B, TOKENISER, ["b.pcie_out", "node-0.dram"], 9_000),
        (INDEX, C, ["node-0.dram", "node-0.nic_out", "node-1.nic_in", "c.port_in"], 30),
        (A, ELSEWHERE, ["a.port_out", "node-0.nic_out", "node-1.nic_in", "node-1.dram"], 30),
        (HOST, A, ["node-0.dram", "a.pcie_in"], 9_000),
        (A, HOST, ["a.pcie_out", "node-0.dram"], 9_000),
        (HOST, INDEX, ["node-0.dram"], 0),
    ],
)  # fmt: skip
def test_paths(sender: int, receiver: int, channels: list[str], latency_ns: int) -> None:
    path = Fabric(TOPOLOGY, PLACES).path(sender, receiver)
    assert names(path) == channels
    assert path.latency_ns == latency_ns


def test_capacities_are_those_of_all_devices() -> None:
    fabric = Fabric(TOPOLOGY, PLACES)
    for sender, receiver in ((A, B), (A, C), (C, D), (BIG, A), (INDEX, A)):
        fabric.path(sender, receiver)
    expected = {
        "a.scale_up_out": 2 * 450 * 0.5, "b.scale_up_in": 4 * 450 * 0.5, "a.port_out": 2 * 50 * 0.8,
        "c.port_in": 8 * 50 * 0.8, "node-0.nic_out": 320, "node-2..node-3.nic_out": 640, "rack-0.up": 96,
        "rack-0.down": 96, "node-0.dram": 400, "a.pcie_in": 2 * 50, "d.port_in": 50 * 0.8,
    }  # fmt: skip
    assert {name: fabric.channels[name].capacity_per_s / GB for name in expected} == pytest.approx(expected)
    assert fabric.cores(INDEX).capacity_per_s == 64e9
    assert fabric.cores(INDEX) is fabric.cores(TOKENISER) is not fabric.cores(ELSEWHERE)
    assert fabric.dram(INDEX) is fabric.path(HOST, A).channels[0], "clients and fetches share the host's memory"


def test_an_unknown_host_limits_nobody() -> None:
    nodes = tuple(replace(node, host=None) for node in TOPOLOGY.nodes)
    fabric = Fabric(replace(TOPOLOGY, nodes=nodes), PLACES)
    assert fabric.dram(A).capacity_per_s == inf
    assert fabric.cores(A).capacity_per_s == inf


@given(st.integers(0, len(PLACES) - 1), st.integers(0, len(PLACES) - 1))
def test_the_way_back_mirrors_the_way(sender: int, receiver: int) -> None:
    fabric = Fabric(TOPOLOGY, PLACES)
    there, back = fabric.path(sender, receiver), fabric.path(receiver, sender)
    mirrored = {"out": "in", "in": "out", "up": "down", "down": "up"}

    def mirror(name: str) -> str:
        stem, _, way = name.rpartition(".")
        kind, _, end = way.rpartition("_")
        return f"{stem}.{kind}{'_' if kind else ''}{mirrored.get(end, end)}"

    assert [mirror(name) for name in reversed(names(there))] == names(back)
    assert there.latency_ns == back.latency_ns
    assert all(ours.capacity_per_s == fabric.channels[mirror(ours.name)].capacity_per_s for ours in there.channels)


# --- transfers ---


def send(*transfers: tuple[int, int, int, int, int], cut_ns: int | None = None) -> list[tuple[int, ...]]:
    """Rows of (request, sender, receiver, bytes, instant), sent over TOPOLOGY."""
    kernel, records = Kernel(), Records()
    network = Network(Fabric(TOPOLOGY, PLACES), Sharing(kernel), records)
    came: list[tuple[int, int]] = []

    def start(transfer: tuple[int, int, int, int, int], now: int) -> None:
        request, sender, receiver, num_bytes, _ = transfer
        network.send(request, HAND_OFF, sender, receiver, num_bytes, lambda i, at: came.append((i, at)), request, now)

    for each in transfers:
        kernel.at(each[-1], start, each)
    kernel.run() if cut_ns is None else kernel.run(cut_ns)
    if cut_ns is not None:
        network.cut(cut_ns)
    columns = records.transfers.as_columns()
    assert set(columns.pop("kind").tolist()) == {HAND_OFF}
    rows = list(zip(*(column.tolist() for column in columns.values()), strict=True))
    assert came == [(row[0], row[-1]) for row in rows if row[-1] >= 0]
    assert len(network.in_flight) == sum(row[-1] < 0 for row in rows)
    return rows


def test_alone_a_transfer_takes_its_bytes_over_the_narrowest_channel_and_the_latency() -> None:
    num_bytes = 123_456_789
    assert send((7, D, A, num_bytes, 100)) == [(7, D, A, num_bytes, 100, 100, 100 + duration_ns(num_bytes, 40e9) + 230)]
    assert send((7, A, LANE, num_bytes, 5)) == [(7, A, LANE, num_bytes, 5, 5, 5)]
    assert send((7, HOST, A, num_bytes, 5))[0][-1] == 5 + duration_ns(num_bytes, 100e9) + 9_000


def test_clients_of_a_node_share_its_nic_and_a_rack_its_uplink() -> None:
    """Four of eight devices each could send 160 GB/s; their NIC has 320, and the uplink 96."""
    size = 10**9
    within = send((0, B, C, size, 0), (1, A, C, size, 0))
    assert [row[-1] for row in within] == [duration_ns(size, 160e9) + 30, duration_ns(size, 80e9) + 30]
    across = send((0, B, BIG, size, 0), (1, C, BIG, size, 0), (2, B, BIG, size, 0))
    assert {row[-1] for row in across} == {duration_ns(size, 32e9) + 230}


def test_a_fetch_slows_down_while_the_host_memory_is_read() -> None:
    """The index reads all of the DRAM alone; beside it and another reader a fetch gets its fair share of 400 GB/s."""
    size = 4 * 10**8
    alone = send((0, HOST, B, size, 0))[0]
    beside = {
        row[0]: row for row in send((0, HOST, B, size, 0), (1, HOST, INDEX, size, 0), (2, HOST, TOKENISER, size, 0))
    }
    assert alone[-1] == duration_ns(size, 200e9) + 9_000
    assert beside[0][-1] == duration_ns(size, 400e9 / 3) + 9_000


def test_what_is_cut_has_no_end() -> None:
    rows = send((0, A, B, 10**9, 0), (1, A, B, 10, 0), (2, B, A, 5, 999), cut_ns=1000)
    assert rows == [(1, A, B, 10, 0, 0, 10), (0, A, B, 10**9, 0, 0, -1), (2, B, A, 5, 999, 999, -1)]


# --- presets ---


@pytest.mark.parametrize(
    ("name", "gb_per_s"),
    [("h100-nvl8", (450, 50, 12.5)), ("a100-nvl8", (300, 25, 6.25))],
)
def test_presets_have_the_figures_of_their_devices(name: str, gb_per_s: tuple[float, ...]) -> None:
    mapping: Any = catalogue.read("networks", name, Path())[0]
    preset = Preset.model_validate(mapping)
    assert preset.node
    assert preset.rack
    assert preset.pod
    links = [tier.link for tier in (preset.node, preset.rack, preset.pod)]
    assert [link.bytes_per_s / GB for link in links] == list(gb_per_s)
    assert [link.latency_ns for link in links] == [10_000, 20_000, 200_000]
    assert [link.efficiency for link in links] == [0.65, 0.9, 0.6]
    assert (preset.devices_per_node, preset.nodes_per_rack) == (8, 8)
    device = catalogue.read("devices", {"h100-nvl8": "h100-sxm", "a100-nvl8": "a100-sxm-80gb"}[name], Path())[0]
    assert (device.link_bytes_per_s, device.inter_node_bytes_per_s) == (links[0].bytes_per_s, links[1].bytes_per_s)
    assert {"node.bandwidth", "rack.bandwidth", "pod.bandwidth"} <= preset.sources.keys()
