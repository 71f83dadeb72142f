"""Clients without a model in a scenario: what may be written, what is refused and where, and what comes of it."""

from __future__ import annotations

from typing import Any

import pytest

from mist.errors import ScenarioError
from mist.scenario import load
from mist.scenario.hosts import HostPool, host_models

INDEX = {"num_vectors": 1_000_000, "dim": 96, "n_list": 1024, "n_probe": 16, "m": 48}


def scenario(index: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {
        "workload": {"arrivals": {"poisson": {"rate_per_s": 20}}, "num_requests": 50, "input_tokens": 100,
                     "output_tokens": 5},
        "pipeline": ["retrieve", "prefill", "decode"],
        "clients": {
            "index": {"device": "epyc-9554", "serves": ["retrieve"], "perf": {"ivf_pq": INDEX}} | (index or {}),
            "gpu": {"device": "h100-sxm", "model": "llama-3.1-8b", "perf": "roofline"},
        },
        **more,
    }  # fmt: skip


def problem(mapping: dict[str, Any]) -> str:
    with pytest.raises(ScenarioError) as caught:
        load(mapping)
    return str(caught.value)


def test_a_client_without_a_model_serves_its_stage() -> None:
    result = load(scenario()).run(check=True)
    assert result.metrics["requests"]["finished"] == 50
    index = result.metrics["clients"]["index"]
    assert index["utilisation"] > 0
    assert (index["kv_peak"], index["kv_tokens_capacity"]) == (None, 0)
    assert result.metrics["stages"]["retrieve"]["serve_s"]["mean"] > 0


def test_the_resolved_scenario_reads_back() -> None:
    whole = load(scenario())
    assert load(whole.resolved()) == whole
    host = whole.clients["index"]
    assert isinstance(host, HostPool)
    assert (host.cores, host.count) == (64, 1)
    assert str(host) == "1 x 64 cores of epyc-9554, ivf_pq, 0.1 GiB in memory"


def test_fewer_cores_take_longer() -> None:
    few, all_of_it = (
        load(scenario({"cores": cores}), **{"workload.arrivals": "all_at_once"}).run().metrics["stages"]["retrieve"]
        for cores in (4, 64)
    )
    assert few["serve_s"]["mean"] > all_of_it["serve_s"]["mean"]


@pytest.mark.parametrize(
    ("index", "message", "hint"),
    [
        ({"cores": 4, "workers": 5}, "clients.index.workers: 5 workers share 4 cores", "at most one"),
        ({"cores": 65}, "clients.index.cores: epyc-9554 has 64 cores, not 65", "lower it"),
        ({"device": "h100-sxm"}, "clients.index.device: h100-sxm is not a CPU", "take one, such as epyc-9554"),
        ({"serves": ["retreive"]}, "clients.index.serves.0: there is no stage 'retreive'", "retrieve"),
        (
            {"model": "llama-3.1-8b"},
            "clients.index.perf.0: ivf_pq runs no model, and there is one",
            "leave `model` out",
        ),
        ({"perf": "roofline"}, "clients.index.model", ""),
        ({"perf": {"ivf_pq": INDEX | {"num_vectors": 10**11}}}, "clients.index.perf.ivf_pq: ", "another device"),
        ({"perf": {"ivf_pq": INDEX | {"n_probe": 0}}}, "clients.index.perf.ivf_pq.n_probe", ""),
        ({"batching": "continous"}, "clients.index.batching", "continuous"),
        ({"tp": 2}, "clients.index.tp", ""),
        ({"batching": "chunked"}, "clients.index.batching.chunked: chunked cuts tasks into chunks", "continuous"),
        (
            {"serves": ["retrieve", "prefill"]},
            "clients.index.serves.1: prefill runs a model, and there is none",
            "share",
        ),
    ],
)
def test_what_is_refused_is_told_at_its_place(index: dict[str, Any], message: str, hint: str) -> None:
    told = problem(scenario(index))
    assert message in told
    assert hint in told


def test_every_host_model_is_known_without_being_listed() -> None:
    assert "ivf_pq" in host_models()
    assert "roofline" not in host_models()


def test_a_stage_that_generates_finds_no_model_on_a_host() -> None:
    text = {
        "device": "epyc-9554",
        "serves": ["guard_input", "guard_output"],
        "perf": {"cpu_text": {"stages": {kind: {"ns_per_token": 10} for kind in ("guard_input", "guard_output")}}},
    }
    guarded = {"guarded_qa": {"verdict_tokens": {"guard_input": 3}}}
    mapping = scenario(text, pipeline=guarded)
    result = load(mapping).run(check=True)
    assert result.metrics["requests"]["rejected"] == 50
    assert "index runs no model, and the stage guard_input generates tokens" in str(result)


def test_replicas_of_two_pools_have_names_of_their_own() -> None:
    mapping = scenario()
    mapping["clients"] |= {"gpu-0": mapping["clients"]["gpu"], "gpu": mapping["clients"]["gpu"] | {"count": 2}}
    assert "gpu-0: gpu has a replica 'gpu-0' already" in problem(mapping) or "has a replica 'gpu-0'" in problem(mapping)


@pytest.mark.parametrize("model", ["qwen3-0.6b", "qwen3-30b-a3b", "e5-base-v2"])
def test_a_model_alone_on_a_host_takes_what_it_takes_without_a_network(model: str) -> None:
    """Weights of experts that nobody goes to are read neither here nor there."""
    stages = ["embed"] if model.startswith("e5") else ["prefill", "decode"]
    mapping = {
        "workload": {"concurrency": 1, "num_requests": 3, "input_tokens": 100, "output_tokens": 5},
        "pipeline": stages,
        "clients": {"cpu": {"device": "epyc-9554", "model": model, "perf": "roofline", "serves": stages}},
    }
    alone = load(mapping | {"network": {"preset": "h100-nvl8"}}).run(check=True)
    assert alone.records.steps.cells == load(mapping).run().records.steps.cells


def test_a_model_on_two_sockets_has_no_node() -> None:
    mapping = scenario(network={"preset": "h100-nvl8"})
    mapping["clients"]["gpu"] |= {"device": "epyc-9554", "tp": 2}
    assert "gpu takes 2 epyc-9554, and a node has one host" in problem(mapping)


def test_workers_keep_idle_cores_busy_with_one_index() -> None:
    """At a load of half the cores one batch at a time leaves searches waiting; sixteen workers don't."""
    slow = {"perf": {"ivf_pq": INDEX | {"num_vectors": 100_000_000, "n_probe": 64}}, "cores": 16}
    at_once = {"workload.arrivals.poisson.rate_per_s": 60, "workload.num_requests": 400}
    one, many = (
        load(scenario(slow | {"workers": workers}), **at_once).run(check=True).metrics["stages"]["retrieve"]
        for workers in (1, 16)
    )
    assert many["wait_s"]["mean"] < 0.2 * one["wait_s"]["mean"]
    host = load(scenario(slow | {"workers": 16})).clients["index"]
    assert isinstance(host, HostPool)
    assert str(host).startswith("1 x 16 workers on 16 cores of epyc-9554, ivf_pq, ")
    assert host.prepared().memory_bytes() < 1.2 * load(scenario(slow)).hosts["index"].prepared().memory_bytes()


def test_workers_share_the_memory_channels() -> None:
    """Sixteen that would read all of the bandwidth together get no more than there is."""
    searches = {
        "perf": {"flat_search": {"num_vectors": 1_000_000, "dim": 1024, "stream_bytes_per_s": 4e10}},
        "cores": 64,
    }
    all_at_once = {"workload.arrivals": "all_at_once", "workload.num_requests": 64}
    times = {}
    for workers in (1, 16):
        batching = {"batching": {"continuous": {"max_num_seqs": 1}}}
        records = load(scenario(searches | batching | {"workers": workers}), **all_at_once).run(check=True).records
        steps = records.steps.as_columns()
        mine = steps["client"] < workers
        times[workers] = int(steps["end_ns"][mine].max() - steps["start_ns"][mine].min())
    # 64 scans of 4 GB, whoever makes them, at 460.8 GB/s
    assert min(times.values()) >= 64 * 4.096e9 / 460.8e9 * 1e9 * 0.999
