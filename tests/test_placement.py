"""Where clients go: packed in order or as the user says, the topology that results, and what is refused where.

Guards `mist.scenario.placement` and the network section of a scenario.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mist.errors import ScenarioError
from mist.scenario import Scenario, load
from mist.units import GB

WORKLOAD = {"arrivals": {"poisson": {"rate_per_s": 4}}, "num_requests": 5, "input_tokens": 100, "output_tokens": 5}
Clients = dict[str, dict[str, Any]]


def clients(**pools: Any) -> Clients:
    """Pools of a small model: count and tp of each, or a mapping of what else they have."""
    made = {}
    for name, pool in pools.items():
        count, tp, more = (*pool, {})[:3]
        made[name] = {
            "device": "h100-sxm",
            "model": "llama-3.1-8b",
            "count": count,
            "tp": tp,
            "perf": "roofline",
        } | more
    return made


def embedder(count: int = 1) -> Any:
    return (count, 1, {"device": "epyc-9554", "serves": ["prefill"], "kv_cache": {"capacity_tokens": 10_000}})


def scenario(pools: Clients, **network: Any) -> Scenario:
    return load({"workload": WORKLOAD, "clients": pools, "network": {"preset": "h100-nvl8"} | network})


def nodes_of(pools: Clients, **network: Any) -> dict[str, list[list[str]]]:
    """The nodes of each replica, by pool."""
    made = scenario(pools, **network)
    assert made.placement is not None
    nodes = made.placement.topology.nodes
    again = load(made.resolved())
    assert again.placement == made.placement, "the resolved form places everybody at the same place"
    assert again == made
    return {
        pool: [[nodes[i].name for i in place.nodes] for place in places]
        for pool, places in made.placement.places.items()
    }


def problems(pools: Clients, **network: Any) -> str:
    with pytest.raises(ScenarioError) as caught:
        scenario(pools, **network)
    return str(caught.value)


# --- packed ---


def test_without_a_network_nobody_is_anywhere() -> None:
    made = load({"workload": WORKLOAD, "clients": clients(gpu=(1, 1))})
    assert made.placement is None
    assert "network" not in made.resolved()


def test_a_node_is_filled_before_the_next() -> None:
    assert nodes_of(clients(a=(3, 4), b=(2, 2))) == {
        "a": [["node-0"], ["node-0"], ["node-1"]],
        "b": [["node-1"], ["node-1"]],
    }
    assert nodes_of(clients(a=(1, 8), b=(1, 1))) == {"a": [["node-0"]], "b": [["node-1"]]}
    assert nodes_of(clients(a=(1, 1))) == {"a": [["node"]]}


def test_a_later_client_takes_the_first_room_that_is_left() -> None:
    assert nodes_of(clients(a=(2, 4), b=(1, 8), c=(1, 2)), devices_per_node=10) == {
        "a": [["node-0"], ["node-0"]],
        "b": [["node-1"]],
        "c": [["node-0"]],
    }


def test_a_client_larger_than_a_node_fills_whole_ones() -> None:
    pools = clients(small=(1, 1), large=(2, 8, {"pp": 2}), other=(1, 1))
    assert nodes_of(pools) == {
        "small": [["node-0"]],
        "large": [["node-1", "node-2"], ["node-3", "node-4"]],
        "other": [["node-0"]],
    }


def test_devices_of_two_kinds_are_on_nodes_of_their_own() -> None:
    pools = clients(a=(1, 2), b=(1, 2, {"device": "a100-sxm-80gb"}), c=(1, 2))
    assert nodes_of(pools) == {"a": [["node-0"]], "b": [["node-1"]], "c": [["node-0"]]}


def test_a_client_of_a_cpu_has_a_host_of_its_own() -> None:
    pools = clients(embed=embedder(2), gpu=(2, 8))
    made = nodes_of(pools)
    assert made == {"embed": [["embed-host-0"], ["embed-host-1"]], "gpu": [["node-0"], ["node-1"]]}


def test_racks_are_filled_in_the_order_of_the_nodes() -> None:
    made = scenario(clients(a=(5, 8)), nodes_per_rack=2)
    assert made.placement is not None
    assert [node.rack for node in made.placement.topology.nodes] == [0, 0, 1, 1, 2]


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(1, 4), st.sampled_from([1, 2, 4, 8])), min_size=1, max_size=4))
def test_no_device_is_given_twice(pools: list[tuple[int, int]]) -> None:
    made = clients(**{f"pool{i}": each for i, each in enumerate(pools)})
    placed = nodes_of(made)
    used: dict[str, int] = {}
    for (_, tp), replicas in zip(pools, placed.values(), strict=True):
        for nodes in replicas:
            for node in nodes:
                used[node] = used.get(node, 0) + tp // len(nodes)
    assert max(used.values()) <= 8
    assert sum(used.values()) == sum(count * tp for count, tp in pools)


# --- as the user says ---

CLUSTER = {"cpu": {"host": "epyc-9554"}, "gpu": {"count": 3, "devices": 8, "host": "epyc-9554"}}


def test_a_pool_is_on_the_nodes_or_groups_that_are_named() -> None:
    pools = clients(embed=embedder(), prefill=(2, 2), decode=(2, 8))
    placement = {"embed": "cpu", "prefill": ["gpu-0", "gpu-0"], "decode": "gpu"}
    assert nodes_of(pools, nodes=CLUSTER, placement=placement) == {
        "embed": [["cpu"]],
        "prefill": [["gpu-0"], ["gpu-0"]],
        "decode": [["gpu-1"], ["gpu-2"]],
    }


def test_a_list_splits_the_replicas_evenly() -> None:
    pools = clients(prefill=(2, 2), decode=(4, 1))
    assert nodes_of(pools, nodes=CLUSTER, placement={"prefill": ["gpu-1", "gpu-2"], "decode": ["gpu-2", "gpu-0"]}) == {
        "prefill": [["gpu-1"], ["gpu-2"]],
        "decode": [["gpu-2"], ["gpu-2"], ["gpu-0"], ["gpu-0"]],
    }
    spanning = clients(large=(1, 8, {"pp": 2}))
    assert nodes_of(spanning, nodes=CLUSTER, placement={"large": ["gpu-2", "gpu-0"]}) == {"large": [["gpu-2", "gpu-0"]]}


def test_who_is_placed_comes_before_who_is_packed() -> None:
    pools = clients(packed=(1, 8), placed=(1, 1))
    assert nodes_of(pools, nodes=CLUSTER, placement={"placed": "gpu-0"}) == {
        "packed": [["gpu-1"]],
        "placed": [["gpu-0"]],
    }


def test_clients_of_a_cpu_share_a_host_where_they_are_placed_on_it() -> None:
    pools = clients(embed=embedder(2), gpu=(1, 1))
    assert nodes_of(pools, nodes=CLUSTER, placement={"embed": "gpu-1"})["embed"] == [["gpu-1"], ["gpu-1"]]
    assert nodes_of(pools, nodes=CLUSTER, placement={"embed": "gpu"})["embed"] == [["gpu-0"], ["gpu-1"]]
    assert nodes_of(pools, nodes=CLUSTER)["embed"] == [["cpu"], ["gpu-0"]]


def test_bandwidths_of_nics_and_uplinks() -> None:
    made = scenario(clients(gpu=(1, 1)), nodes=CLUSTER)
    assert made.placement is not None
    topology = made.placement.topology
    assert [node.nic_bytes_per_s / GB for node in topology.nodes] == pytest.approx([45, 360, 360, 360])
    assert topology.uplink_bytes_per_s == pytest.approx(64 * 12.5 * 0.6 * GB)
    narrow = {"gpu": {"devices": 8, "nic": {"bandwidth": "50 GB/s", "count": 2}}}
    made = scenario(clients(gpu=(1, 1)), nodes=narrow, uplink={"bandwidth": "100 GB/s", "count": 4})
    assert made.placement is not None
    assert made.placement.topology.nodes[0].nic_bytes_per_s == pytest.approx(90 * GB)
    assert made.placement.topology.uplink_bytes_per_s == pytest.approx(240 * GB)
    assert load(made.resolved()).placement == made.placement


def test_a_tier_that_is_given_is_not_the_presets() -> None:
    made = scenario(clients(gpu=(1, 1)), rack={"bandwidth": "25 GB/s"})
    assert made.placement is not None
    assert made.placement.topology.rack.bytes_per_s == 25 * GB
    assert made.placement.topology.node.bytes_per_s == 450 * GB


def test_a_network_of_ones_own(tmp_path: Path) -> None:
    text = "node: {bandwidth: 900 GB/s}\nrack: {bandwidth: 100 GB/s}\npod: {bandwidth: 10 GB/s}\ndevices_per_node: 72\n"
    (tmp_path / "nvl72.yaml").write_text(text)
    mapping = {"workload": WORKLOAD, "clients": clients(gpu=(9, 8)), "network": {"preset": "nvl72.yaml"}}
    made = Scenario.from_mapping(mapping, folder=tmp_path)
    assert made.placement is not None
    assert len(made.placement.topology.nodes) == 1
    assert load(made.resolved()) == made, "it reads back without the file"


def test_the_placement_reads_back_in_words() -> None:
    pools = clients(embed=embedder(), prefill=(2, 2), large=(1, 8, {"pp": 2}))
    made = scenario(pools, nodes=CLUSTER, placement={"prefill": "gpu-0"}, nodes_per_rack=2)
    assert made.placement is not None
    assert list(made.placement.lines()) == [
        "4 nodes in 2 racks, uplinks 120 GB/s; links of a device: node 292.5 GB/s 10 us, rack 45 GB/s 20 us,"
        " pod 7.5 GB/s 200 us",
        "  cpu (rack 0, NICs 45 GB/s): embed (host)",
        "  gpu-0 (rack 0, NICs 360 GB/s): prefill-0 (2 h100-sxm), prefill-1 (2 h100-sxm)",
        "  gpu-1 (rack 1, NICs 360 GB/s): large (16 h100-sxm)",
        "  gpu-2 (rack 1, NICs 360 GB/s): large (16 h100-sxm)",
    ]
    many = scenario(clients(gpu=(50, 8))).placement
    assert many is not None
    assert list(many.lines())[-1] == "  and 10 more nodes"


# --- what is refused ---


@pytest.mark.parametrize(
    ("network", "told"),
    [
        ({"preset": "h100"}, "network.preset: there is no network 'h100' in the catalogue"),
        ({"preset": {"node": {"bandwidth": "1 GB"}}}, "network.preset.node.bandwidth: '1 GB' is not a number"),
        ({"preset": {"nodes": {}}}, "network.preset.nodes: there is no key 'nodes'"),
        ({"preset": {}}, "the network has no node and no rack and no pod"),
        ({"kv_transfer": {"bandwidth": "1 GB/s"}}, "kv_transfer and preset are both given"),
        ({"placement": {"gpu": "gpu"}}, "there are no nodes to place clients on"),
        ({"nodes": CLUSTER, "placement": {"gpo": "gpu"}}, "network.placement.gpo: there are no clients 'gpo'"),
        ({"nodes": CLUSTER, "placement": {"gpu": "gpu-3"}}, "there is no node 'gpu-3'\n    did you mean 'gpu-2'"),
        ({"nodes": CLUSTER, "placement": {"gpu": []}}, "network.placement.gpu: must be a list or mapping"),
        ({"nodes": CLUSTER, "placement": {"gpu": "cpu"}}, "no room for gpu-0, which takes 4 h100-sxm; free are 0 of 0"),
        ({"nodes": {"x": {}}}, "network.nodes.x: the node has neither devices nor a host"),
        ({"nodes": {"x": {"host": "h100-sxm"}}}, "network.nodes.x.host: h100-sxm is not a CPU"),
        ({"nodes": {"x y": {"devices": 8}}}, "'x y' can't name a node"),
        ({"nodes": {"n": {"count": 2, "devices": 1}, "n-1": {"devices": 1}}}, "n has a node 'n-1' already"),
        ({"nodes": {"n": {"devices": 8}}}, "no room for gpu-2, which takes 4 h100-sxm; free are 0 of 8 on n"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told_at_its_place(network: dict[str, Any], told: str) -> None:
    assert told in problems(clients(gpu=(3, 4)), **network)


def test_a_full_node_is_told_with_figures() -> None:
    pools = clients(a=(1, 4), b=(3, 2))
    told = problems(pools, nodes=CLUSTER, placement={"a": "gpu-0", "b": "gpu-0"})
    assert "network.placement.b: no room for b-2, which takes 2 h100-sxm; free are 0 of 8 on gpu-0 (h100-sxm)" in told


def test_a_cpu_runs_on_its_own_kind_of_host() -> None:
    own = {"name": "own", "peak_tflops": {"bf16": 1}, "memory_bytes": "1 TiB", "memory_bytes_per_s": "400 GB/s"}
    pools = clients(embed=embedder(), gpu=(1, 1))
    nodes = {"cpu": {"host": own | {"num_cores": 8}}, "gpu": {"devices": 8}}
    told = problems(pools, nodes=nodes, placement={"embed": ["cpu"]})
    assert "network.placement.embed: no host for embed, which runs on epyc-9554: cpu has own" in told
    told = problems(pools, nodes=nodes)
    assert "network.nodes: no host for embed, which runs on epyc-9554, one that nobody else is on" in told


def test_places_of_problems(tmp_path: Path) -> None:
    text = (
        "workload: {arrivals: {poisson: {rate_per_s: 4}}, num_requests: 5, input_tokens: 9, output_tokens: 5}\n"
        "clients: {gpu: {device: h100-sxm, model: llama-3.1-8b, tp: 4, count: 3, perf: roofline}}\n"
        "network:\n"
        "  preset: h100-nvl8\n"
        "  nodes: {a: {devices: 8}, b: {devices: 8}}\n"
        "  placement: {gpu: a}\n"
    )
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(ScenarioError) as caught:
        load(tmp_path / "s.yaml")
    (problem,) = caught.value.problems
    assert (problem.line, problem.column) == (6, 20)
    assert "no room for gpu-2" in problem.message
