"""Clients of a scenario on one host: slower than apart where they want more cores than it has, equal where they don't.

Guards examples/shared-host.yaml, how the fleet shares hosts, and that what they keep must fit into its memory together.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kit import rows
from mist.errors import ScenarioError
from mist.scenario import load
from mist.scenario.host_memory import kept_bytes
from mist.scenario.result import Result
from mist.units import GIB

EXAMPLE = Path(__file__).parent.parent / "examples" / "shared-host.yaml"
APART = "network.placement.text=other"


def runs(*sets: str) -> tuple[Result, Result]:
    """The example with a host for both kinds of work, and with one for each."""
    sets = ("workload.num_requests=1500", *sets)
    return load(EXAMPLE, sets).run(check=True), load(EXAMPLE, [*sets, APART]).run(check=True)


def mean_s(result: Result, stage: str, part: str = "serve_s") -> float:
    return float(result.metrics["stages"][stage][part]["mean"])


def core_s(result: Result) -> float:
    return sum(float(cores["core_s"]) for cores in result.metrics["cores"])


def test_a_search_is_slower_beside_text_work() -> None:
    together, apart = runs()
    assert mean_s(together, "retrieve") > 1.05 * mean_s(apart, "retrieve")
    assert mean_s(together, "tokenize") >= mean_s(apart, "tokenize")
    assert [cores["name"] for cores in together.metrics["cores"]] == ["shared.cores"]
    assert [cores["name"] for cores in apart.metrics["cores"]] == ["other.cores", "shared.cores"]


@pytest.mark.parametrize("cores", [(4, 4), (2, 6), (7, 1)])
def test_clients_that_never_want_more_cores_than_there_are_run_as_if_alone(cores: tuple[int, int]) -> None:
    sets = [f"clients.{name}.cores={n}" for name, n in zip(("text", "index"), cores, strict=True)]
    together, apart = runs(*sets, "workload.arrivals.poisson.rate_per_s=500")
    assert rows(together.records) == rows(apart.records)
    assert core_s(together) == pytest.approx(core_s(apart), rel=1e-12)


WORK = {"tokenize": {"ns_per_token": 20_000}, "detokenize": {"ns_per_token": 30_000}}
HOST = {"host": "azure-d8lds-v5"}
TEXT = {"device": "azure-d8lds-v5", "perf": {"cpu_text": WORK}}


def text_work(*nodes: str) -> Result:
    """Two kinds of work without any cost per batch, on these nodes."""
    return load(
        {
            "seed": 5,
            "workload": {"arrivals": {"poisson": {"rate_per_s": 300}}, "num_requests": 2000,
                         "input_tokens": {"uniform": {"low": 1, "high": 900}}, "output_tokens": 1},
            "pipeline": ["tokenize", "detokenize"],
            "clients": {"one": TEXT | {"serves": ["tokenize"]}, "two": TEXT | {"serves": ["detokenize"]}},
            "network": {"preset": "h100-nvl8", "nodes": {"a": HOST, "b": HOST},
                        "placement": {"one": nodes[0], "two": nodes[-1]}},
        }
    ).run(check=True)  # fmt: skip


def test_work_is_conserved_and_takes_longer_together() -> None:
    together, apart = text_work("a"), text_work("a", "b")
    tokens = int(together.records.requests.as_columns()["input_tokens"].sum())
    assert core_s(together) == pytest.approx(tokens * 50_000 / 1e9, rel=1e-12)
    assert core_s(apart) == pytest.approx(tokens * 50_000 / 1e9, rel=1e-12)
    assert mean_s(together, "tokenize") > mean_s(apart, "tokenize")
    assert together.metrics["e2e_s"]["mean"] > apart.metrics["e2e_s"]["mean"]
    (cores,) = together.metrics["cores"]
    assert 0.3 < cores["utilisation"] <= 1
    assert "a.cores" in str(together)


def fetching(node: str) -> Result:
    """Prompts whose prefixes are fetched from the memory of the GPUs' host; a search reads that of `node`."""
    flat = {"num_vectors": 1_500_000, "dim": 768, "parallel_over": "vectors"}
    return load(
        {
            "seed": 3,
            "workload": {"arrivals": {"poisson": {"rate_per_s": 30}}, "num_requests": 300, "input_tokens": 4000,
                         "output_tokens": 8, "cached_tokens": 3980},
            "pipeline": {"question_answering": {"before": ["retrieve"]}},
            "clients": {
                "gpu": {"device": "h100-sxm", "count": 2, "tp": 4, "model": "llama-3.1-70b", "perf": "roofline",
                        "kv_cache": {"prefix_tier": "cpu", "enable_prefix_caching": True}},
                "index": {"device": "epyc-9554", "serves": ["retrieve"], "perf": {"flat_search": flat}},
            },
            "network": {"preset": "h100-nvl8", "placement": {"index": node},
                        "nodes": {"gpu": {"devices": 8, "host": "epyc-9554"}, "other": {"host": "epyc-9554"}}},
        }
    ).run(check=True)  # fmt: skip


def test_a_search_and_the_fetches_of_kv_caches_from_its_memory_slow_each_other() -> None:
    together, apart = fetching("gpu"), fetching("other")
    assert mean_s(together, "retrieve") > 1.02 * mean_s(apart, "retrieve")
    fetched = [run.metrics["prefix_fetch"]["time_s"]["mean"] for run in (together, apart)]
    assert fetched[0] > 1.01 * fetched[1]
    carried = [sum(link["carried_bytes"] for link in run.metrics["links"] if link["name"].endswith(".dram"))
               for run in (together, apart)]  # fmt: skip
    assert carried[0] == pytest.approx(carried[1], rel=0.05), "but for batches of several searches"


# --- memory ---

SMALL = {"device": "azure-d8lds-v5", "model": "llama-3.2-1b", "serves": ["prefill"], "perf": "roofline"}


def on_one_host(**more: Any) -> dict[str, Any]:
    """A model and an index of about 4 GiB on a host of 16."""
    index = {"num_vectors": 40_000_000, "dim": 768, "n_list": 65536, "n_probe": 8, "m": 64}
    return {
        "workload": {"arrivals": {"poisson": {"rate_per_s": 1}}, "num_requests": 5, "input_tokens": 10,
                     "output_tokens": 1},
        "pipeline": ["retrieve", "prefill"],
        "clients": {"llm": SMALL | more,
                    "index": {"device": "azure-d8lds-v5", "serves": ["retrieve"], "perf": {"ivf_pq": index}}},
        "network": {"preset": "h100-nvl8", "nodes": {"cpu": HOST},
                    "placement": {"llm": "cpu", "index": "cpu"}},
    }  # fmt: skip


def test_what_the_clients_of_a_host_keep_must_fit_together() -> None:
    with pytest.raises(ScenarioError) as caught:
        load(on_one_host())
    told = str(caught.value)
    assert "network.placement.index: cpu has 16.0 GiB of memory, and its clients keep 1" in told
    assert ": llm 14.4, index 3." in told
    assert "kv_cache: {gpu_memory_utilization: 0.3}" in told


def test_a_smaller_kv_cache_makes_room() -> None:
    made = load(on_one_host(kv_cache={"gpu_memory_utilization": 0.7}))
    kept = sum(kept_bytes(pool) for pool in made.clients.values())
    assert kept <= 16 * GIB
    assert made.run(check=True).metrics["requests"]["finished"] == 5


def test_an_encoder_keeps_no_cache() -> None:
    made = load(on_one_host(model="e5-base-v2"))
    assert kept_bytes(made.clients["llm"]) < 2 * GIB


def test_two_indexes_that_fit_apart_may_not_fit_together() -> None:
    given = on_one_host(model="e5-base-v2")
    given["clients"]["index"] |= {"count": 5}
    with pytest.raises(ScenarioError, match=r"index-0 3.*, index-4 3[.\d]*\n +place them apart"):
        load(given)
    given["network"] = {"preset": "h100-nvl8"}
    assert load(given).placement is not None, "each has a host of its own where it isn't placed"
