"""Remarks on a scenario: what it tells and nobody reads, and what costs nothing here.

Reads scenarios without running them. Remarks on memory, devices and expected errors are tested with these.
"""

from __future__ import annotations

from typing import Any

import pytest

from mist.scenario import load
from mist.scenario.remarks import remarks

GPU = {"device": "h100-sxm", "model": "llama-3.1-8b"}
INDEX = {"device": "epyc-9554", "perf": {"flat_search": {"num_vectors": 1000, "dim": 768}}, "serves": ["retrieve"]}
ENCODER = {"device": "l4", "model": "bge-base-en-v1.5", "serves": ["embed"]}


def told(word: str, **sections: Any) -> list[str]:
    """The remarks with `word` in them."""
    workload = {"arrivals": "all_at_once", "num_requests": 2, "input_tokens": 9, "output_tokens": 9}
    workload |= sections.pop("workload", {})
    scenario = load({"clients": {"gpu": GPU}, "workload": workload, **sections})
    return [remark for remark in remarks(scenario) if word in remark]


def test_a_memory_that_nobody_names() -> None:
    memories = {name: {"memory": memory} for name, memory in {"host": "ddr5", "spare": "nvme", "kept": "cxl"}.items()}
    clients = {
        "gpu": {**GPU, "kv_cache": {"tiers": ["host"]}},
        "store": {"memory": "kept", "serves": ["kv_retrieve"]},
    }
    found = told("memories", memories=memories, clients=clients, pipeline="kv_reuse")
    assert found == ["memories.spare: no client's tiers or KV store name it."]


@pytest.mark.parametrize(
    ("sizes", "remark"),
    [
        (["query_tokens", "num_passages", "passage_tokens"], []),
        (["query_tokens", "querry_tokens", "pasages"],
         ["workload.sizes: news_search reads query_tokens, num_passages, passage_tokens, "
          "so the others change nothing: querry_tokens, pasages."]),
    ],
)  # fmt: skip
def test_sizes_that_the_pipeline_does_not_read(sizes: list[str], remark: list[str]) -> None:
    clients = {"gpu": GPU, "index": INDEX, "encoder": ENCODER}
    workload = {"sizes": dict.fromkeys(sizes, 7)}
    assert told("workload.sizes", workload=workload, clients=clients, pipeline="news_search") == remark


def test_a_list_of_stages_reads_no_sizes() -> None:
    remark = "workload.sizes: stages reads none, so the others change nothing: query_tokens."
    assert told("workload.sizes", workload={"sizes": {"query_tokens": 7}}) == [remark]


@pytest.mark.parametrize("decoder", ["bf16", "fp8"])
def test_kv_caches_that_are_converted(decoder: str) -> None:
    clients = {
        "first": {**GPU, "serves": ["prefill"]},
        "then": {**GPU, "serves": ["decode"], "kv_dtype": decoder},
        "both": {**GPU, "kv_dtype": "fp8"},
    }
    expected = {
        "bf16": ["first, both: KV caches are converted from bf16 to fp8 on both, at its memory bandwidth."],
        "fp8": [
            f"first, {name}: KV caches are converted from bf16 to fp8 on {name}, at its memory bandwidth."
            for name in ("then", "both")
        ],
    }
    assert told("converted", clients=clients) == expected[decoder]


@pytest.mark.parametrize(
    ("own", "num_remarks"), [({"bits": 8}, 0), ({"bits": 4}, 1), ({"bits": 4, "fast_scan_lookup_ns": 0.3}, 0)]
)
def test_a_rate_of_another_machine(own: dict[str, Any], num_remarks: int) -> None:
    index = {"num_vectors": 10**6, "dim": 768, "n_list": 1024, "n_probe": 8, "m": 64, **own}
    clients = {"gpu": GPU, "index": {**INDEX, "perf": {"ivf_pq": index}}, "encoder": ENCODER}
    found = told("can't be compared", clients=clients, pipeline="news_search")
    assert (
        found
        == ["index: its rate with 4 bits is of another machine than that with 8, so the two can't be compared."]
        * num_remarks
    )


@pytest.mark.parametrize(
    ("sections", "remark"),
    [
        ({"routing": {"decode": "random"}},
         "routing.decode: decodes stay where their prefills were, so random changes nothing."),
        ({"routing": "random"}, ""),
        ({"routing": {"prefill": "random"}}, ""),
        ({"routing": {"decode": "random"}, "events": [{"at_s": 1, "client_down": "gpu-0"}]}, ""),
        ({"routing": {"decode": "random"},
          "clients": {"a": {**GPU, "serves": ["prefill"]}, "b": {**GPU, "serves": ["decode"], "count": 2}}}, ""),
    ],
)  # fmt: skip
def test_a_policy_for_decodes_that_are_never_routed(sections: dict[str, Any], remark: str) -> None:
    clients = {"gpu": {**GPU, "count": 2}}
    assert told("routing.decode", **{"clients": clients, **sections}) == ([remark] if remark else [])


def test_scaling_by_nothing() -> None:
    remark = "clients.gpu.scaling has neither a schedule nor a rule: 1 of 3 replicas serve all the time."
    assert told("scaling", clients={"gpu": {**GPU, "count": 3, "scaling": {}}}) == [remark]
    assert not told("scaling", clients={"gpu": {**GPU, "scaling": {"schedule": [{"at_s": 1, "count": 1}]}}})


def test_clients_that_come_up_and_are_up() -> None:
    events = [
        {"at_s": 9, "client_up": "gpu-0"}, {"at_s": 1, "client_down": "gpu"}, {"at_s": 2, "client_up": "gpu-1"},
        {"at_s": 3, "client_up": "gpu"}, {"at_s": 4, "client_down": "gpu-1", "for_s": 2},
        {"at_s": 7, "client_up": "gpu-1"},
    ]  # fmt: skip
    assert told("client_up", clients={"gpu": {**GPU, "count": 2}}, events=events) == [
        "events.5: gpu-1 isn't down at 7 s, so client_up changes nothing.",
        "events.0: gpu-0 isn't down at 9 s, so client_up changes nothing.",
    ]
