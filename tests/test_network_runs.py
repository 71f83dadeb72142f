"""The network through whole runs: true bytes over real paths, contention, latencies, and what changes nothing.

Guards how scenario, coordinator and fabric work together; paths and placement have tests of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kit import LinearSteps, Run, play, rows, table
from mist.batching.chunked import Chunked
from mist.fabric import Fabric
from mist.hardware import Device
from mist.pipeline.stages import StageList
from mist.records import FINISHED, HAND_OFF, KV_TRANSFER
from mist.request import Request
from mist.scenario import load
from mist.scenario.result import Result
from mist.scenario.seeds import random_of
from mist.sharing import duration_ns
from mist.testing import record_bytes
from mist.testing.cluster import KVLink
from mist.topology import Link, Node, Place, Topology
from mist.units import KIB
from test_closed_forms import agrees, poisson
from test_sharing import SIZES

INDEX = {"num_vectors": 1_000_000, "dim": 768, "n_list": 1024, "n_probe": 8, "m": 64}
SMALL = {"model": "llama-3.1-8b", "device": "h100-sxm"}
NEWS: dict[str, Any] = {
    "seed": 4,
    "workload": {"arrivals": {"poisson": {"rate_per_s": 40}}, "num_requests": 120, "input_tokens": 100,
                 "output_tokens": {"uniform": {"low": 2, "high": 30}}},
    "pipeline": {"news_search": {"candidates": 20, "query_tokens": 30, "passage_tokens": 400}},
    "clients": {
        "embed": {"device": "epyc-9554", "model": "e5-base-v2", "serves": ["embed"]},
        "index": {"device": "epyc-9554", "serves": ["retrieve"], "perf": {"ivf_pq": INDEX}},
        "rerank": {"device": "l4", "count": 2, "model": "bge-reranker-base", "serves": ["rerank"]},
        "prefill": SMALL | {"serves": ["prefill"]},
        "decode": SMALL | {"serves": ["decode"], "count": 2},
    },
    "perf": "roofline",
    "network": {
        "preset": "h100-nvl8",
        "nodes": {"cpu": {"host": "epyc-9554"}, "l4": {"devices": 2}, "gpu": {"count": 3, "devices": 1}},
        "placement": {"embed": "cpu", "index": "cpu"},
    },
}  # fmt: skip


def pools(*, num_requests: int = 60, rate_per_s: float = 5, **network: Any) -> dict[str, Any]:
    """Prefill and decode on two clients each."""
    return {
        "seed": 2,
        "workload": {"arrivals": {"poisson": {"rate_per_s": rate_per_s}}, "num_requests": num_requests,
                     "input_tokens": {"uniform": {"low": 10, "high": 2000}}, "output_tokens": 20},
        "clients": {"prefill": SMALL | {"serves": ["prefill"], "count": 2},
                    "decode": SMALL | {"serves": ["decode"], "count": 2}},
        "perf": "roofline",
        **({"network": network} if network else {}),
    }  # fmt: skip


def moved(result: Result | Run, kind: int) -> dict[str, np.ndarray]:
    """The rows of one kind of transfer, by column."""
    columns = result.records.transfers.as_columns()
    return {name: column[columns["kind"] == kind] for name, column in columns.items()}


def took_ns(result: Result | Run, kind: int = KV_TRANSFER) -> list[int]:
    transfers = moved(result, kind)
    return list((transfers["end_ns"] - transfers["start_ns"]).tolist())


# --- true bytes ---


@pytest.mark.parametrize(("kv_dtype", "kib"), [("auto", 320), ("fp8", 160)])
def test_a_token_of_70b_is_320_kib_or_half_in_fp8_and_moves_once(kv_dtype: str, kib: int) -> None:
    given = pools(preset="h100-nvl8")
    for pool in given["clients"].values():
        pool |= {"model": "meta-llama/Llama-3.1-70B-Instruct", "tp": 2, "weights_dtype": "fp8", "kv_dtype": kv_dtype}
    result = load(given).run(check=True)
    transfers, requests = moved(result, KV_TRANSFER), result.records.requests.as_columns()
    prompts = dict(zip(requests["request"].tolist(), requests["input_tokens"].tolist(), strict=True))
    assert sorted(transfers["request"].tolist()) == sorted(prompts), "each KV cache moves once"
    assert transfers["bytes"].tolist() == [kib * KIB * prompts[r] for r in transfers["request"].tolist()]


def test_stages_hand_on_the_bytes_that_the_pipeline_says() -> None:
    scenario = load(NEWS)
    result = scenario.run(check=True)
    requests, hand_offs = result.records.requests.as_columns(), moved(result, HAND_OFF)
    assert (requests["status"] == FINISHED).all()
    pipeline = scenario.tenants[""].pipeline.build()
    for i, request in enumerate(requests["request"].tolist()):
        prompt, output = (int(requests[name][i]) for name in ("input_tokens", "output_tokens"))
        asked = prompt - pipeline.passages * pipeline.passage_tokens  # the passages are in the prompt that was answered
        stages: Any = pipeline(Request(request, 0, asked, output), partial(random_of, 4, "pipeline", request))
        wanted = [stage.input_bytes for stage in stages if stage.kind not in ("embed", "decode")]
        assert hand_offs["bytes"][hand_offs["request"] == request].tolist() == wanted
        assert all(wanted)


# --- what changes nothing ---

MAX = {"bandwidth": "1000000000 GB/s"}
INFINITE: dict[str, Any] = {"node": MAX, "rack": MAX, "pod": MAX, "uplink": MAX}


@pytest.mark.parametrize("nodes_per_rack", [1, 8])
@pytest.mark.parametrize("rate", [5, 40])
def test_infinite_links_are_no_network(rate: int, nodes_per_rack: int) -> None:
    """Exactly: at the largest bandwidth that may be written, 1e18 bytes/s, less than half a GB takes 0 ns."""
    without = load(pools(rate_per_s=rate)).run(check=True)
    assert moved(without, KV_TRANSFER)["bytes"].max() < 5e8
    within = load(pools(rate_per_s=rate, devices_per_node=1, nodes_per_rack=nodes_per_rack, **INFINITE)).run(check=True)
    assert set(took_ns(within)) == {0}
    assert rows(within.records) == rows(without.records)


def test_infinite_links_are_no_network_with_branches_and_a_host() -> None:
    """Stages on a CPU too, beside each other; what they hand on is recorded, and takes no time."""
    host = {"name": "host", "peak_tflops": {"bf16": 1}, "memory_bytes": "1 TiB",
            "memory_bytes_per_s": "1000000000 GB/s", "num_cores": 16}  # fmt: skip
    guards: dict[str, Any] = {"input_guards": ["regex_guard", "llm_guard"], "output_guards": [], "beside": True}
    guards |= {"refused": 0.2, "verdict_tokens": {"llm_guard": 3}}
    given = pools(rate_per_s=40) | {"pipeline": {"guarded_qa": guards}}
    given["clients"] |= {
        "text": {"device": host, "serves": ["regex_guard"], "perf": "cpu_text"},
        "guard": {"device": "l4", "model": "llama-guard-3-1b", "serves": ["llm_guard"]},
    }
    without = rows(load(given).run(check=True).records)
    within = rows(load(given | {"network": INFINITE | {"devices_per_node": 2}}).run(check=True).records)
    hand_offs = [row for row in within["transfers"] if row[1] == HAND_OFF]
    within["transfers"] = [row for row in within["transfers"] if row[1] != HAND_OFF]
    assert hand_offs
    assert all(row[-1] == row[-2] for row in hand_offs)
    assert within == without


def test_nodes_may_be_called_otherwise() -> None:
    given = pools(nodes={"a": {"count": 2, "devices": 1}, "b": {"count": 2, "devices": 1}}, preset="h100-nvl8",
                  placement={"prefill": "a", "decode": "b"}, nodes_per_rack=4)  # fmt: skip
    renamed = given | {
        "network": given["network"] | {"placement": {"prefill": ["b-1", "a-0"], "decode": ["a-1", "b-0"]}}
    }
    assert record_bytes(load(given).run().records) == record_bytes(load(renamed).run().records)


def test_twice_the_bandwidth_halves_the_transfers_and_nothing_else() -> None:
    """Of requests that never meet: each ends earlier by what its transfer saves."""
    slow, fast = (
        load(pools(rate_per_s=0.01, num_requests=20, **network(devices_per_node=1, scale=scale))).run(check=True)
        for scale in (1, 2)
    )
    wires = [np.array(took_ns(run)) - 120_000 for run in (slow, fast)]
    assert np.abs(wires[0] - 2 * wires[1]).max() <= 1, "each is rounded to a ns"
    ends = [run.records.requests.as_columns()["end_ns"] for run in (slow, fast)]
    assert (ends[0] - ends[1]).tolist() == (wires[0] - wires[1]).tolist()


def network(*, scale: int = 1, **more: Any) -> dict[str, Any]:
    tiers = {"node": (400, 20), "rack": (40, 100), "pod": (4, 1000)}
    made = {name: {"bandwidth": f"{gb * scale} GB/s", "latency": f"{us} us"} for name, (gb, us) in tiers.items()}
    return made | {"nodes_per_rack": 8} | more


# --- which tier ---


@pytest.mark.parametrize(
    ("layout", "gb_per_s", "latency_us"),
    [
        ({"devices_per_node": 4}, 400, 20),
        ({"devices_per_node": 1}, 40, 120),
        ({"devices_per_node": 1, "nodes_per_rack": 2}, 8, 1120),
        ({"devices_per_node": 1, "nodes_per_rack": 2, "uplink": {"bandwidth": "30 GB/s"}}, 30, 1120),
        ({"devices_per_node": 1, "nodes_per_rack": 2, "uplink": {"bandwidth": "300 GB/s"}}, 40, 1120),
    ],
)
def test_transfers_pay_the_tiers_that_they_cross(layout: dict[str, Any], gb_per_s: int, latency_us: int) -> None:
    """Prefill fills the first two devices, decode the others: of the node, of the rack, or in another rack."""
    result = load(pools(rate_per_s=0.01, num_requests=20, **network(**layout))).run(check=True)
    wires = [duration_ns(n, gb_per_s * 1e9) + 1000 * latency_us for n in moved(result, KV_TRANSFER)["bytes"].tolist()]
    assert took_ns(result) == wires


def test_what_is_handed_on_pays_its_path_too() -> None:
    result = load(NEWS | {"workload": NEWS["workload"] | {"arrivals": {"constant": {"rate_per_s": 0.1}}}}).run(
        check=True
    )
    hand_offs = moved(result, HAND_OFF)
    for sender, receiver, gb_per_s, latency_ns in ((0, 1, None, 0), (1, 2, 45, 30_000), (2, 4, 45, 30_000)):
        mine = (hand_offs["sender"] == sender) & (hand_offs["receiver"] == receiver)
        wires = [duration_ns(n, gb_per_s * 1e9) if gb_per_s else 0 for n in hand_offs["bytes"][mine].tolist()]
        assert wires
        assert (hand_offs["end_ns"] - hand_offs["start_ns"])[mine].tolist() == [wire + latency_ns for wire in wires]


# --- contention and closed forms, with made-up step times ---

CARD = Device("card", {"bf16": 1e15}, 80 * 10**9, 3e12)
#: one byte per ns out of each node and into it, there 500 ns later
PORT = Link(1e9, 500)
LINK = KVLink(10)


def apart(num_prefills: int, num_decodes: int = 1) -> Fabric:
    """A node for each client, in one rack."""
    num = num_prefills + num_decodes
    nodes = tuple(Node(f"node-{i}", 0, 1, 1e9) for i in range(num))
    places = [Place(f"gpu-{i}", (i,), CARD) for i in range(num)]
    return Fabric(Topology(Link(9e9, 0), PORT, PORT, nodes), places)


@pytest.mark.parametrize("num", [1, 2, 3, 7])
def test_caches_sent_into_one_client_share_its_nic(num: int) -> None:
    """From as many senders, each with a NIC of its own: the receiver's lets each have 1/k."""
    serves = [("prefill",)] * num + [("decode",)]
    run = play(table([0] * num, [300] * num, [5] * num), num_clients=num + 1, serves=serves, nic=LINK, paths=apart(num))
    assert sorted(moved(run, KV_TRANSFER)["sender"].tolist()) == list(range(num))
    assert took_ns(run) == [3000 * num + 500] * num


def test_caches_sent_to_several_clients_share_the_senders() -> None:
    serves = [("prefill",), ("decode",), ("decode",)]
    run = play(table([0, 0], [300, 300], [5, 5]), num_clients=3, serves=serves, nic=LINK, paths=apart(1, 2))
    assert sorted(moved(run, KV_TRANSFER)["receiver"].tolist()) == [1, 2]
    assert took_ns(run) == [6500, 6500]


def test_prefill_and_decode_are_two_stations_in_series() -> None:
    """M/D/1, a link that nobody else is on, and a constant station behind it, where nobody waits; to the ns."""
    rng, num, service = np.random.default_rng(3), 5000, 1000
    arrivals = poisson(rng, num, service / 0.8)
    steps = LinearSteps(base=service, per_prefill_token=0, per_decode=0, per_context=0, per_prefill=0)
    run = play(
        table(arrivals, [40] * num, [2] * num), num_clients=2, serves=[("prefill",), ("decode",)], nic=LINK, perf=steps,
        paths=apart(1), policy=lambda: Chunked(max_num_batched_tokens=1000, max_num_seqs=1),
    )  # fmt: skip
    ends, free = [], 0
    for arrival in arrivals.tolist():
        free = max(arrival, free) + service
        ends.append(free + 400 + 500 + service)
    assert run.records.requests.as_columns()["end_ns"].tolist() == ends


@pytest.mark.long
@pytest.mark.parametrize("sizes", SIZES)
def test_the_link_of_a_prefill_client_is_processor_sharing(sizes: str) -> None:
    """M/G/1-PS: E[T] = E[S] / (1 - ρ), whatever the distribution (Kleinrock, Queueing Systems II, 4.4).

    Steps of 1 ns that hold all that waits let prompts through as they arrive, so that their caches are Poisson too.
    """
    rng, num, rho, mean = np.random.default_rng(8), 40_000, 0.7, 100_000
    tokens = np.maximum(1, mean / 10 * SIZES[sizes](rng, num)).astype(np.int64)
    steps = LinearSteps(base=1, per_prefill_token=0, per_decode=0, per_context=0, per_prefill=0)
    run = play(
        table(poisson(rng, num, mean / rho), tokens, [2] * num), num_clients=2, serves=[("prefill",), ("decode",)],
        nic=LINK, perf=steps, paths=apart(1), policy=lambda: Chunked(1 << 60, 1 << 30), ledger=False,
    )  # fmt: skip
    transfers = moved(run, KV_TRANSFER)
    order = np.argsort(transfers["start_ns"], kind="stable")
    agrees((np.array(took_ns(run))[order] - 500) / mean, 1 / (1 - rho), at_most=0.2)


def test_a_plain_list_of_stages_hands_nothing_on() -> None:
    run = play(
        table([0], [40], [0]), num_clients=2, serves=[("a",), ("b",)], paths=apart(1), pipeline=StageList(("a", "b"))
    )
    assert not len(run.records.transfers)


# --- what is told of it ---


def test_bytes_carried_are_those_of_the_transfers() -> None:
    result = load(NEWS).run(check=True)
    links = {link["name"]: link for link in result.metrics["links"]}
    sent = sum(moved(result, KV_TRANSFER)["bytes"].tolist())
    assert links["prefill.port_out"]["carried_bytes"] == sent == links["gpu-0.nic_out"]["carried_bytes"]
    assert sum(links[f"decode-{i}.port_in"]["carried_bytes"] for i in range(2)) == sent
    span = result.metrics["duration_s"]
    for link in links.values():
        assert link["utilisation"] == pytest.approx(link["carried_bytes"] / link["capacity_bytes_per_s"] / span)
    (cores,) = result.metrics["cores"]
    assert cores["name"] == "cpu.cores"
    assert cores["utilisation"] == pytest.approx(cores["core_s"] / 64 / span)
    assert load(pools()).run().metrics["links"] == []


def test_what_was_on_its_way_when_the_clock_ended_counts_as_far_as_it_came() -> None:
    given = pools(num_requests=1, **network(devices_per_node=1, rack={"bandwidth": "1 MB/s"}))
    given["workload"] |= {"input_tokens": 1000, "arrivals": {"constant": {"rate_per_s": 1}}}
    result = load(given | {"max_time_s": 10}).run(check=True)
    (start,) = moved(result, KV_TRANSFER)["start_ns"].tolist()
    for link in result.metrics["links"]:
        assert link["carried_bytes"] == pytest.approx((10e9 - start) / 1e3, abs=1)
    assert "Busiest links" in str(result)
    assert "prefill-0.port_out" in str(result)


DIGEST = """
from hashlib import sha256
from mist.testing import record_bytes
from test_network_runs import NEWS, load
print(sha256(b"".join(record_bytes(load(NEWS).run().records))).hexdigest())
"""


def test_another_process_with_another_hash_seed_gives_equal_bytes() -> None:
    source = Path(sys.modules["mist.ledger"].__file__ or "").parents[1]
    path = os.pathsep.join([str(source), str(Path(__file__).parent)])
    digests = {
        subprocess.run(
            [sys.executable, "-c", DIGEST], env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": path},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("0", "4242")
    }  # fmt: skip
    assert len(digests) == 1
