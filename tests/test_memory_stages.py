"""Which tasks and clients memories are for: prompts alone, one model's KV caches in a store, and no encoder's.

On whole scenarios of a few requests; the ledger watches every run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mist.errors import ScenarioError
from mist.pipeline.parts import answer, find_kv
from mist.registry import register
from mist.request import Request, Stage
from mist.scenario import load
from test_memory_scenarios import built, changed, hashed, problem, scenario, with_store

TOLD = {"host": {"memory": "ddr5", "hit_rate": 1.0}}


def of_stages(result: Any) -> set[tuple[str, int]]:
    """(stage kind, tokens found) of all tasks."""
    return set(zip(result.tasks["stage"], result.tasks["cached_tokens"].tolist(), strict=True))


def guarded(memories: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A guard on the client that answers, which reads a text of its own."""
    mapping = scenario(memories, pipeline={"guarded_qa": {"input_guards": ["guard"], "output_guards": []}}, **more)
    cache = {"tiers": ["host"], "fetch": "always", "enable_prefix_caching": False}
    return changed(mapping, count=1, serves=["guard", "prefill", "decode"], kv_cache=cache)


def test_only_prompts_find_what_memories_have_of_prompts(tmp_path: Path) -> None:
    by_rate = load(guarded(TOLD)).run(check=True)
    assert of_stages(by_rate) == {("guard", 0), ("prefill", 3000), ("decode", 0)}
    workload = hashed(tmp_path, [[1, 2], [1, 2]])
    by_content = load(guarded({"host": {"memory": "ddr5"}}, workload=workload)).run(check=True)
    assert of_stages(by_content) == {("guard", 0), ("prefill", 0), ("prefill", 1024), ("decode", 0)}
    assert list(by_content.transfers["kind"]) == ["kv_write", "prefix_fetch"]


@register("pipeline", "guarded_reuse")
@dataclass
class GuardedReuse:
    """A guard, then an answer with what a KV store has of its prompt."""

    kinds = ("guard", "kv_retrieve", "prefill", "decode")
    is_fixed = False

    def __call__(self, request: Request, rng: Any) -> Iterator[Any]:
        yield Stage("guard", request.input_tokens, visible=False)
        found = yield from find_kv(request, "kv_retrieve", request.input_tokens)
        yield from answer(request, request.input_tokens, found_tokens=found)


@pytest.mark.parametrize("guard_first", [True, False])
def test_a_store_finds_what_it_has_whatever_pools_come_first(tmp_path: Path, guard_first: bool) -> None:
    mapping = scenario({"host": {"memory": "ddr5"}}, workload=hashed(tmp_path, [[1, 2], [1, 2]]), tiers=())
    mapping["pipeline"] = "guarded_reuse"
    pools = {
        "guard": {"device": "l4", "model": "llama-guard-3-1b", "serves": ["guard"], "kv_cache": {"tiers": ["host"]}},
        "gpu": changed(mapping, count=1, kv_cache={"enable_prefix_caching": False})["clients"]["gpu"],
    }
    mapping["clients"] = {name: pools[name] for name in sorted(pools, reverse=guard_first)}
    mapping["clients"]["store"] = {"memory": "platform-dram", "serves": ["kv_retrieve"], "fetch": "always"}
    result = load(mapping).run(check=True)
    assert result.metrics["memories"]["store"]["hits"] == 2
    assert ("prefill", 1024) in of_stages(result)


@pytest.mark.parametrize("cache", [{"tiers": ["host"]}, {"prefix_tier": "cpu"}])
def test_an_encoder_keeps_no_kv_cache(cache: dict[str, Any]) -> None:
    mapping = changed(scenario(TOLD), model="bge-m3", serves=["embed"], kv_cache=cache) | {"pipeline": ["embed"]}
    told = problem(mapping)
    assert f"clients.gpu.kv_cache.{next(iter(cache))}" in told
    assert "an encoder keeps no KV cache" in told


def test_no_store_is_asked_for_what_an_encoder_reads() -> None:
    mapping = changed(scenario(TOLD, tiers=(), pipeline=["kv_retrieve", "prefill"]), model="bge-m3", serves=["prefill"])
    mapping["clients"]["gpu"]["kv_cache"] = {"enable_prefix_caching": False}
    mapping["clients"]["store"] = {"memory": "platform-dram", "serves": ["kv_retrieve"], "fetch": "always"}
    result = load(mapping).run(check=True)
    assert of_stages(result) == {("kv_retrieve", 0), ("prefill", 0)}
    assert not len(result.transfers["kind"])


@pytest.mark.parametrize("network", [{}, {"kv_transfer": {"bandwidth": "1 GB/s", "latency": "5 ms"}}])
def test_what_is_written_to_the_host_takes_the_link_to_the_host(tmp_path: Path, network: dict[str, Any]) -> None:
    mapping = scenario({"host": {"memory": "ddr5"}}, workload=hashed(tmp_path, [[1, 2], [1, 2]]))
    cache = {"tiers": ["host"], "fetch": "always", "enable_prefix_caching": False}
    made = load(changed(mapping, count=1, kv_cache=cache) | {"network": network})
    moved = made.run(check=True).transfers
    assert list(moved["kind"]) == ["kv_write", "prefix_fetch"]
    written, fetched = (moved["end_s"] - moved["start_s"]).tolist()
    device, num_bytes = made.pools["gpu"].device, moved["bytes"].tolist()[0]
    assert written == pytest.approx(fetched)
    assert written > num_bytes / device.host_link_bytes_per_s
    _, links, _ = built(changed(mapping, kv_cache=cache))
    assert not set(links.path(0, -2).channels) & set(links.path(-1, 0).channels), "each way has a channel of its own"


def test_a_store_finds_what_is_there(tmp_path: Path) -> None:
    """Writes take 2.7 s, and prompts come every ten seconds or every second."""
    for rate_scale, found in ((1, [0, 1024]), (10, [0, 0])):
        mapping = with_store() | {"workload": hashed(tmp_path, [[1, 2], [1, 2]]) | {"rate_scale": rate_scale}}
        mapping["clients"]["gpu"]["kv_cache"] = {"enable_prefix_caching": False}
        mapping["memories"]["rack"]["write_bandwidth"] = "0.05 GB/s"
        assert load(mapping).run(check=True).requests["cached_tokens"].tolist() == found


@pytest.mark.parametrize(
    ("far", "other", "is_told"),
    [({}, None, True), ({"per": "cluster"}, None, False), ({"write": "through"}, None, False),
     ({"per": "cluster"}, ["near"], True), ({"per": "cluster"}, ["near", "far"], False)],
)  # fmt: skip
def test_what_a_shared_tier_evicts_goes_to_one_memory(
    tmp_path: Path, far: dict[str, Any], other: list[str] | None, is_told: bool
) -> None:
    """A cluster's tier above one of each client, or above one that another pool doesn't have."""
    memories = {"near": {"memory": "ddr5", "per": "cluster"}, "far": {"memory": "nvme", "write": "back", **far}}
    workload = hashed(tmp_path, [[1, 2], [1, 2]])
    mapping = changed(scenario(memories, workload=workload), kv_cache={"tiers": ["near", "far"]})
    if other is not None:
        mapping["clients"]["more"] = changed(mapping, kv_cache={"tiers": other})["clients"]["gpu"]
    if not is_told:
        load(mapping).run(check=True)
        return
    with pytest.raises(ScenarioError) as caught:
        load(mapping)
    told = str(caught.value)
    assert f"clients.{'gpu' if other is None else 'more'}.kv_cache.tiers" in told
    assert "share near, and not the memory that takes what it evicts" in told
    assert "give far write: through" in told


@pytest.mark.parametrize("network", [{}, {"preset": "h100-nvl8"}])
def test_channels_of_memories_are_links_of_the_run(tmp_path: Path, network: dict[str, Any]) -> None:
    mapping = scenario({"host": {"memory": "ddr5"}}, workload=hashed(tmp_path, [[1, 2], [1, 2]]), network=network)
    cache = {"tiers": ["host"], "fetch": "always", "enable_prefix_caching": False}
    result = load(changed(mapping, count=1, kv_cache=cache)).run(check=True)
    (read,) = [link for link in result.metrics["links"] if link["name"] == "host.read"]
    moved = sum(result.metrics["memories"]["host"][key] for key in ("fetched_bytes", "written_bytes"))
    assert read["carried_bytes"] == moved > 0
