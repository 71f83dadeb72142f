"""Memories in scenarios: what may be written, who shares an instance over which channels, and what comes of it."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest

from mist.cli import main
from mist.errors import ScenarioError
from mist.kernel import Kernel
from mist.records import Records
from mist.scenario import Scenario, load
from mist.scenario.fleet import build_fleet, network_of
from mist.scenario.memories import add_memories
from mist.units import GB, KIB
from scenarios import sole_table

HOSTED = {"memory": "ddr5", "hit_rate": 1.0}


def scenario(memories: dict[str, Any] | None = None, tiers: Any = ("host",), **more: Any) -> dict[str, Any]:
    """Requests whose stated hits of 3,000 tokens are in the tiers of two clients."""
    pool = {"device": "h100-sxm", "model": "llama-3.1-8b", "count": 2, "perf": "roofline"}
    mapping: dict[str, Any] = {
        "workload": {"arrivals": {"poisson": {"rate_per_s": 5}}, "num_requests": 20, "input_tokens": 4000,
                     "output_tokens": 4, "cached_tokens": 3000},
        "clients": {"gpu": {**pool, "kv_cache": {"tiers": list(tiers)}}},
        "memories": memories or {"host": HOSTED},
        **more,
    }  # fmt: skip
    return mapping


def changed(mapping: dict[str, Any], **gpu: Any) -> dict[str, Any]:
    made = copy.deepcopy(mapping)
    made["clients"]["gpu"] |= gpu
    return made


def problem(mapping: dict[str, Any]) -> str:
    with pytest.raises(ScenarioError) as caught:
        load(mapping).run()
    return str(caught.value)


def hashed(folder: Path, prompts: list[list[int]], unit: int = 512) -> dict[str, Any]:
    """A workload of a trace in Mooncake's format, one request every ten seconds."""
    lines = [
        f'{{"timestamp": {10_000 * i}, "input_length": {unit * len(keys) + 1}, "output_length": 2, "hash_ids": {keys}}}'
        for i, keys in enumerate(prompts)
    ]
    path = folder / "trace.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return {"trace": str(path), "format": "mooncake"}


# --- what may be written ---


def test_the_resolved_scenario_reads_back() -> None:
    for memories in (
        {"host": HOSTED},
        {"host": {"memory": "ddr5", "eviction": {"ttl": 600.0}, "chunk_tokens": 256, "per": "client"}},
        {"host": {"capacity": "1 TB", "bandwidth": "20 GB/s", "latency": "5 us", "shared_by": 2, "compression": 3.5}},
    ):
        whole = load(scenario(memories))
        assert load(whole.resolved()) == whole
        assert Scenario.from_mapping(whole.resolved()).to_yaml() == whole.to_yaml()


@pytest.mark.parametrize(
    ("memories", "tiers", "message"),
    [
        ({"host": {}}, ["host"], "memories.host: bandwidth is missing"),
        ({"host": HOSTED}, ["hots"], "clients.gpu.kv_cache.tiers.0: there is no memory 'hots'"),
        ({"host": HOSTED, "far": {"memory": "nvme"}}, ["host", "far"], "tiers.1: far has no hit_rate"),
        ({"host": {**HOSTED, "per": "node"}}, ["host"], "memories.host.per: per: node, and the network has no nodes"),
        ({"ho st": HOSTED}, ["ho st"], "'ho st' can't name a memory"),
    ],
)
def test_what_is_refused_is_told_at_its_place(memories: Any, tiers: list[str], message: str) -> None:
    assert message in problem(scenario(memories, tiers))


def test_chunks_that_do_not_go_with_the_hashes_are_told(tmp_path: Path) -> None:
    workload = hashed(tmp_path, [[1, 2]])
    told = problem(scenario({"host": {"memory": "ddr5", "chunk_tokens": 300}}, workload=workload))
    assert "memories.host.chunk_tokens" in told or "chunk_tokens is 300: neither a multiple nor a part of 512" in told
    told = problem(scenario({"host": {"memory": "ddr5", "chunk_tokens": 1024, "write": "back"}}, workload=workload))
    assert "host is written back to" in told


def test_prefix_tier_is_a_tier_of_the_host_and_not_beside_others() -> None:
    mapping = scenario()
    mapping["clients"]["gpu"]["kv_cache"]["prefix_tier"] = "cpu"
    assert "prefix_tier is short for a tier of the host" in problem(mapping)


def test_check_prints_memories(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "s.yaml"
    mapping = scenario({"host": {"memory": "ddr5", "compression": 2.0}})
    mapping["clients"]["store"] = {"memory": "rack-ssd", "serves": ["prefill"], "lookup": "0.1 ms"}
    path.write_text(load(mapping).to_yaml())
    with pytest.raises(SystemExit):
        main(["check", str(path)])
    told = capsys.readouterr().out
    assert "memory host: 1,024 GiB at 307.2 GB/s, 2 times compressed, lru, one per client" in told
    assert "store: 1 x KV store in rack-ssd, 0.1 ms per look-up" in told
    assert "tiers host; fetch: estimate" in told


# --- what comes of it ---


@pytest.mark.parametrize(("weights", "kv", "token_bytes"), [("bf16", "bf16", 320 * KIB), ("fp8", "fp8", 160 * KIB)])
def test_llama_70b_has_320_kib_a_token_in_bf16_and_160_in_fp8(weights: str, kv: str, token_bytes: int) -> None:
    mapping = changed(
        scenario({"host": {**HOSTED, "compression": 1.0}}),
        model="llama-3.1-70b", tp=4, weights_dtype=weights, kv_dtype=kv,
        kv_cache={"tiers": ["host"], "fetch": "always"},
    )  # fmt: skip
    result = load(mapping).run(check=True)
    assert set(result.transfers["bytes"].tolist()) == {3000 * token_bytes}
    assert result.metrics["memories"]["host"]["fetched_bytes"] == 20 * 3000 * token_bytes
    mapping["memories"]["host"]["compression"] = 2.0
    assert set(load(mapping).run(check=True).transfers["bytes"].tolist()) == {1500 * token_bytes}


def test_prefix_tier_cpu_is_a_tier_that_has_every_stated_hit() -> None:
    tier = {"capacity": "1000 TB", "bandwidth": "1e9 GB/s", "latency": "0 s", "hit_rate": 1.0, "per": "client"}
    named = load(changed(scenario({"host": tier}), kv_cache={"tiers": ["host"], "fetch": "always"})).run(check=True)
    short = load(changed(scenario(), kv_cache={"prefix_tier": "cpu"})).run(check=True)
    assert (named.requests["ttft_s"] == short.requests["ttft_s"]).all()
    assert (named.transfers["end_s"] == short.transfers["end_s"]).all()
    assert set(named.transfers["sender"]) == {"host-0", "host-1"}
    assert set(short.transfers["sender"]) == {"host memory"}


def test_figures_of_each_memory_and_their_table(tmp_path: Path) -> None:
    mapping = scenario({"host": {"memory": "ddr5"}}, workload=hashed(tmp_path, [[1, 2], [1, 2], [3], [1, 2, 3]]))
    mapping["clients"]["gpu"] |= {"count": 1, "kv_cache": {"tiers": ["host"], "enable_prefix_caching": False}}
    result = load(mapping).run(check=True)
    figures, unit = result.metrics["memories"]["host"], 512 * 128 * KIB
    assert (figures["hits"], figures["misses"], figures["hit_rate"]) == (4, 4, 0.5)
    assert (figures["held_bytes"], figures["written_bytes"], figures["evicted_bytes"]) == (4 * unit, 4 * unit, 0)
    assert figures["fetched_bytes"] == 4 * unit
    assert result.requests["cached_tokens"].tolist() == [0, 1024, 0, 1024]
    assert "Memories" in str(result)


def test_memories_that_find_nothing_are_told() -> None:
    mapping = scenario({"host": {"memory": "ddr5"}})
    assert any("its tiers find nothing" in note for note in load(mapping).run().metrics["notes"])
    mapping = scenario()
    del mapping["workload"]["cached_tokens"]
    assert any("its tiers have nothing" in note for note in load(mapping).run().metrics["notes"])


# --- who shares what ---


def built(mapping: dict[str, Any]) -> tuple[Any, Any, Records]:
    made = load(mapping)
    size, kernel, records = sole_table(made).hash_block_size, Kernel(), Records(stage_kinds=list(made.stages))
    fleet = build_fleet(made, size, kernel, records)
    network = network_of(made, fleet, kernel, records)
    add_memories(made, fleet, size, network, records)
    return fleet, network, records


NODES = {"preset": "h100-nvl8", "nodes": {"box": {"count": 2, "devices": 2, "host": "epyc-9554"}}, "nodes_per_rack": 1}


@pytest.mark.parametrize(
    ("memory", "network", "shared"),
    [
        ({}, None, [0, 1, 2, 3]),
        ({"per": "client"}, None, [0, 1, 2, 3]),
        ({"per": "cluster"}, None, [0, 0, 0, 0]),
        ({"shared_by": 3}, None, [0, 0, 0, 1]),
        ({"per": "node"}, NODES, [0, 0, 1, 1]),
        ({"per": "rack"}, NODES, [0, 0, 1, 1]),
        ({"per": "cluster"}, NODES, [0, 0, 0, 0]),
    ],
)
def test_who_shares_an_instance(memory: dict[str, Any], network: Any, shared: list[int]) -> None:
    mapping = changed(scenario({"host": {**HOSTED, **memory}}), count=4)
    fleet, _, records = built(mapping | ({"network": network} if network else {}))
    instances = [client.offload.memories[0] for client in fleet.clients]
    assert [-2 - one.index for one in instances] == shared
    assert len({id(one.tier) for one in instances}) == len(set(shared)) == len(records.memory_names) - 1


@pytest.mark.parametrize(
    ("memory", "channels", "latency_ns"),
    [
        ({"memory": "ddr5", "per": "node"}, ["host-0.read", "box-0.dram", "gpu-0.pcie_in"], 100),
        ({"memory": "platform-dram", "per": "node"}, ["host-0.read", "host-0.gpu-0.to_client"], 1_100_000),
        ({"memory": "ddr5", "per": "rack"}, ["host-0.read", "box-0.nic_in", "gpu-0.port_in"], 100),
        ({"memory": "ddr5", "per": "cluster"}, ["host.read", "rack-0.down", "box-0.nic_in", "gpu-0.port_in"], 100),
    ],
)
def test_the_way_from_a_memory(memory: dict[str, Any], channels: list[str], latency_ns: int) -> None:
    mapping = changed(scenario({"host": {**memory, "hit_rate": 1.0}}), count=4) | {"network": NODES}
    fleet, network, _ = built(mapping)
    index = fleet.clients[0].offload.memories[0].index
    path, back = network.path(index, 0), network.path(0, index)
    assert [channel.name for channel in path.channels] == channels
    assert path.latency_ns >= latency_ns
    assert len(back.channels) == len(channels)
    assert back.channels[-1] is path.channels[0], "what is written shares the memory with what is read"


def test_reads_of_a_tier_and_work_on_its_host_share_the_dram() -> None:
    """A search beside it slows a fetch down, where the memory isn't slower than what they share."""
    index = {"num_vectors": 100_000_000, "dim": 96, "n_list": 1024, "n_probe": 64, "m": 48}
    mapping = changed(scenario({"host": {**HOSTED, "per": "node"}}), count=1)
    mapping["network"] = {"preset": "h100-nvl8", "nodes": {"box": {"devices": 1, "host": "epyc-9554"}}}
    mapping["clients"]["index"] = {"device": "epyc-9554", "serves": ["retrieve"], "perf": {"ivf_pq": index}}
    fleet, network, _ = built(mapping | {"pipeline": ["retrieve", "prefill", "decode"]})
    search = next(client for client in fleet.clients if client.name == "index")
    fetch = network.path(fleet.clients[0].offload.memories[0].index, 0) if fleet.clients[0].offload else None
    fetch = fetch or network.path(fleet.clients[1].offload.memories[0].index, 1)
    assert search.shares.dram in fetch.channels


@pytest.mark.parametrize("network", [None, NODES])
@pytest.mark.parametrize(
    "gpu",
    [
        {"count": 4, "kv_cache": {"num_blocks": 300, "layerwise": True, "fetch": "always"}},
        {"count": 2, "pp": 2, "kv_cache": {"num_blocks": 600}},
        {
            "count": 1,
            "tp": 4,
            "kv_cache": {"num_blocks": 300},
            "speculation": {"method": "eagle", "num_draft_tokens": 2, "acceptance": 0.6},
        },
    ],
)
@pytest.mark.parametrize(
    "memories",
    [
        {"near": {"memory": "ddr5", "capacity": "1 GiB"}, "far": {"memory": "rack-ssd", "compression": 3.5}},
        {"near": {"memory": "ddr5", "capacity": "0.5 GiB", "write": "back"}, "far": {"memory": "nvme", "per": "cluster",
         "write": "back", "eviction": "lfu"}},
        {"near": {"memory": "cxl", "chunk_tokens": 256}, "far": {"memory": "ddr5", "shared_by": 3, "chunk_tokens": 1024,
         "capacity": "2 GiB", "eviction": {"ttl": 20.0}}},
    ],
)  # fmt: skip
def test_tiers_in_every_kind_of_deployment_obey_the_laws(
    tmp_path: Path, network: Any, gpu: dict[str, Any], memories: dict[str, Any]
) -> None:
    prompts = [[i % 3, 10 + i % 5, *range(100 * i, 100 * i + i % 4)] for i in range(1, 60)]
    workload = hashed(tmp_path, prompts, unit=512) | {"rate_scale": 200}
    cache = gpu["kv_cache"] | {"tiers": ["near", "far"], "enable_prefix_caching": True}
    mapping = changed(scenario(memories, workload=workload), **gpu | {"kv_cache": cache})
    result = load(mapping | ({"network": network} if network else {})).run(check=True)
    assert result.metrics["requests"]["finished"] == 59
    assert result.metrics["memories"]["near"]["hits"] + result.metrics["memories"]["far"]["hits"] > 0
    assert result.metrics["memories"]["near"]["written_bytes"] > 0


# --- KV stores ---


def with_store(**store: Any) -> dict[str, Any]:
    mapping = scenario(pipeline="kv_reuse", memories={"rack": {"memory": "platform-dram"}}, tiers=())
    mapping["clients"]["store"] = {"memory": "rack", "serves": ["kv_retrieve"], "fetch": "always", **store}
    return mapping


def test_a_store_sends_what_it_found_and_the_rest_is_computed() -> None:
    result = load(with_store(lookup="2 ms")).run(check=True)
    assert result.requests["cached_tokens"].tolist() == [3000] * 20
    assert set(result.transfers["bytes"].tolist()) == {3000 * 128 * KIB}
    assert set(result.transfers["sender"]) == {"store"}
    assert result.metrics["stages"]["kv_retrieve"]["serve_s"]["mean"] >= 0.002
    assert result.metrics["memories"]["store"]["hit_rate"] == 1.0
    alone = 1.1e-3 + 3000 * 128 * KIB / (16 * GB)
    assert min(result.transfers["end_s"] - result.transfers["start_s"]) == pytest.approx(alone)
    whole = load(with_store())
    assert load(whole.resolved()) == whole


def test_a_store_keeps_what_was_computed(tmp_path: Path) -> None:
    mapping = with_store() | {"workload": hashed(tmp_path, [[1, 2, 3], [1, 2, 4], [1, 2, 3]])}
    mapping["clients"]["gpu"]["kv_cache"]["enable_prefix_caching"] = False
    result = load(mapping).run(check=True)
    assert result.requests["cached_tokens"].tolist() == [0, 1024, 1536]
    unit = 512 * 128 * KIB
    moved = list(zip(result.transfers["kind"], result.transfers["bytes"] // unit, strict=True))
    assert moved == [("kv_write", 3), ("prefix_fetch", 2), ("kv_write", 1), ("prefix_fetch", 3)]


def test_what_a_slow_store_has_is_computed() -> None:
    mapping = with_store(fetch="estimate") | {
        "memories": {"rack": {"capacity": "1 TB", "bandwidth": "0.1 GB/s", "latency": "0 s"}}
    }
    result = load(mapping).run(check=True)
    assert not len(result.transfers["bytes"])
    assert result.requests["cached_tokens"].tolist() == [0] * 20


def test_a_store_has_a_place_in_a_network() -> None:
    mapping = with_store() | {"network": {"preset": "h100-nvl8"}}
    assert "clients.store: a KV store in a network with nodes is on one of them" in problem(mapping)
    mapping = with_store(device="epyc-9554") | {"network": {"preset": "h100-nvl8"}}
    fleet, network, _ = built(mapping)
    store = next(client for client in fleet.clients if client.store)
    path = network.path(store.store.memory.index, 0)
    names = [channel.name for channel in path.channels]
    assert names[0] == "store.read"
    assert names[1].endswith("to_client")
    assert any(name.endswith("nic_out") for name in names)
    load(mapping).run(check=True)


@pytest.mark.parametrize(
    ("store", "message"),
    [
        ({"memory": "nowhere"}, "clients.store.memory: there is no memory 'nowhere'"),
        ({"device": "h100-sxm"}, "clients.store.device: h100-sxm is not a CPU"),
        ({"lookup": "soon"}, "clients.store.lookup"),
        ({"serves": ["kv_retreive"]}, "there is no stage 'kv_retreive'"),
    ],
)
def test_what_is_wrong_with_a_store_is_told(store: dict[str, Any], message: str) -> None:
    assert message in problem(with_store(**store))


def test_a_store_is_of_one_model() -> None:
    mapping = with_store()
    mapping["clients"]["other"] = mapping["clients"]["gpu"] | {"model": "mistral-7b"}
    assert "clients.other.model: a KV store is of one model and kv_dtype" in problem(mapping)


# --- a real trace ---


def test_mooncake_on_clients_with_a_host_tier() -> None:
    folders = [Path(p) / "traces" for p in os.environ.get("MIST_DATA", "").split(os.pathsep) if p]
    found = [path for folder in folders for path in sorted(folder.rglob("*conversation_trace.jsonl*"))]
    if not found:
        pytest.skip("needs Mooncake's conversation trace: MIST_DATA=FOLDER with traces/.../conversation_trace.jsonl")
    mapping = changed(
        scenario({"host": {"memory": "ddr5", "capacity": "10000 TB", "per": "cluster"}}),
        count=4, model="llama-3.1-70b", tp=8, weights_dtype="fp8",
        kv_cache={"tiers": ["host"], "enable_prefix_caching": False},
    )  # fmt: skip
    mapping["workload"] = {"trace": str(found[0]), "limit": 2000}
    result = load(mapping).run(check=True)
    memory = result.metrics["memories"]["host"]
    assert 0.1 < memory["hit_rate"] < 0.45
    assert memory["evicted_bytes"] == 0
