"""Random small clusters on random topologies, with branches and hosts, under the ledger: everything drains or is cut.

Guards that whatever goes over whichever path is there once, that channels carried what was sent, and that times add up.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest

from kit import LinearSteps, Run, engine, play, rows, sampled
from mist.batching import BatchingPolicy
from mist.batching.chunked import Chunked
from mist.batching.continuous import Continuous
from mist.client import Client
from mist.fabric import Fabric
from mist.hardware import Device
from mist.host import Host
from mist.kernel import Kernel
from mist.metrics.stages import stage_times
from mist.perf import Demand
from mist.pipeline import RequestRandom
from mist.records import FINISHED, HAND_OFF, KV_TRANSFER, PREFIX_FETCH, REJECTED, UNFINISHED
from mist.request import DECODE, PREFILL, All, Pipeline, Request, Stage, Step
from mist.routing import RoutingPolicy
from mist.routing.join_shortest_queue import JoinShortestQueue
from mist.routing.least_outstanding import LeastOutstanding
from mist.routing.round_robin import RoundRobin
from mist.testing import random_scenario, record_bytes
from mist.testing.cluster import KVLink
from mist.topology import Link, Node, Place, Topology

NUM_SEEDS = 400
CARD = Device("card", {"bf16": 1e15}, 80 * 10**9, 3e12, host_link_bytes_per_s=2e9, host_link_latency_ns=90)
CPU = Device("cpu", {"bf16": 1e12}, 10**12, 4e9, num_cores=4)


@dataclass
class Searching:
    """A search on a host, a guard beside the answer, and text work on a host behind: each is sent to, at random."""

    is_fixed: bool = field(default=False, init=False)
    kinds: tuple[str, ...] = field(default=("search", "guard", PREFILL, DECODE, "text"), init=False)

    def __call__(self, request: Request, rng: RequestRandom) -> Pipeline:
        draw = rng()
        sizes = [int(size) for size in draw.integers(0, 4000, 4)]
        if draw.random() < 0.7:
            yield Stage("search", input_tokens=3, input_bytes=sizes[0])
        guard = Stage("guard", input_tokens=9, input_bytes=sizes[1], gates=True, visible=False)
        if draw.random() < 0.5:
            yield All([guard, self._answer(request, sizes[2])])
        else:
            yield guard
            yield from self._answer(request, sizes[2])
        yield Stage("text", input_tokens=1 + request.input_tokens, input_bytes=sizes[3], visible=False)

    def _answer(self, request: Request, num_bytes: int) -> Pipeline:
        yield Stage(PREFILL, input_tokens=request.input_tokens, input_bytes=num_bytes)
        if request.oracle_output_tokens:
            yield Stage(DECODE, oracle_output_tokens=request.oracle_output_tokens)


def topology(rng: random.Random) -> Topology:
    """Up to five nodes in racks of one to three, with tiers of any speed, hosts here and there."""
    tiers = [Link(rng.choice([1e8, 1e9, 3e10]), rng.choice([0, 10, 700]), rng.choice([0.5, 1.0])) for _ in range(3)]
    in_rack = rng.randint(1, 3)
    nodes = tuple(
        Node(f"node-{i}", i // in_rack, 8, rng.choice([1e8, 2e9]), CPU if rng.random() < 0.7 or not i else None)
        for i in range(rng.randint(1, 5))
    )
    node, rack, pod = tiers
    return Topology(node, rack, pod, nodes, rng.choice([1e8, 1e10]))


def random_cluster(seed: int) -> Callable[[], Run]:
    """Clients of every kind on random nodes; those of a host share it. Cut or not."""
    rng = random.Random(seed)
    made = topology(rng)
    serves: list[tuple[str, ...]] = [(PREFILL,), (DECODE,), ("guard",), ("search",), ("text",)]
    serves += rng.choices([(PREFILL,), (DECODE,), (PREFILL, DECODE), ("guard", PREFILL), ("search", "text")],
                          k=rng.randint(0, 4))  # fmt: skip
    hosts = [i for i, node in enumerate(made.nodes) if node.host]
    on_host = [not {PREFILL, DECODE, "guard"} & set(each) for each in serves]
    places = [
        Place(f"gpu-{i}", (rng.choice(hosts) if here else rng.randrange(len(made.nodes)),), CPU if here else CARD)
        for i, here in enumerate(on_host)
    ]
    scenario = random_scenario(seed)
    policies: list[Callable[[int, int], BatchingPolicy]] = [Chunked, Continuous]
    policy = rng.choice(policies)
    routers: list[Callable[[], RoutingPolicy]] = [RoundRobin, LeastOutstanding, JoinShortestQueue]
    router = rng.choice(routers)
    options: dict[str, Any] = {"until_ns": rng.randint(1, 90_000)} if rng.random() < 0.25 else {}
    options["nic"] = link = KVLink(rng.randint(1, 900))
    options["num_blocks"] = 1 + rng.randint(30, 90) // scenario.block_size
    workload, limits = scenario.workload(), (scenario.max_num_batched_tokens, scenario.max_num_seqs)
    workload.arrival_ns //= rng.choice([1, 4, 20])
    if rng.random() < 0.3:  # prefixes are in the memory of the host
        options |= {"host": link, "caching": True}
        workload.cached_tokens = np.array([rng.randrange(n) for n in workload.input_tokens.tolist()])
    traffic = [(rng.randint(0, 4 * CPU.num_cores), rng.choice([0, 1, 3])) for _ in serves]
    profile = engine(request_ns=rng.choice([0, 0, 300]), step_ns=rng.choice([0, 70]))

    def run() -> Run:
        fabric = Fabric(made, places)

        def share(kernel: Kernel, clients: list[Client]) -> None:
            sharing = clients[0].coordinator.network.sharing
            for client, here, (cores, per_ns) in zip(clients, on_host, traffic, strict=True):
                if here:
                    client.batching = Continuous(max_num_seqs=3)
                    client.shares = Host(fabric.cores(client.index), fabric.dram(client.index), sharing)
                    client.demand_of = partial(demand, cores=cores, bytes_per_ns=per_ns)

        return play(
            workload, policy=lambda: policy(*limits), num_clients=len(serves), serves=serves, pipeline=Searching(),
            router=router(), paths=fabric, engine_profile=profile, prepare=share, block_size=scenario.block_size,
            **options,
        )  # fmt: skip

    return run


def demand(step: Step, cores: int, bytes_per_ns: int) -> Demand:
    took, used = LinearSteps().step_time(step), min(cores, CPU.num_cores)
    return Demand(took * used, took * bytes_per_ns)


def sent_over(run: Run) -> dict[str, int]:
    """Bytes of the transfers that ended, by channel of their path."""
    fabric = run.coordinator.network.paths
    sent: dict[str, int] = {}
    for _, _, sender, receiver, size, _, _, end in zip(*run.records.transfers.as_columns().values(), strict=True):
        for channel in fabric.path(int(sender), int(receiver)).channels if end >= 0 else ():
            sent[channel.name] = sent.get(channel.name, 0) + int(size)
    return sent


@pytest.mark.parametrize("part", sampled(range(4), 1))
def test_random_clusters_drain_under_the_ledger(part: int) -> None:
    seen = np.zeros(8, np.int64)
    for seed in range(part * NUM_SEEDS // 4, (part + 1) * NUM_SEEDS // 4):
        run, told = random_cluster(seed)(), f"random_cluster({seed})"
        tables = (run.records.requests, run.records.tasks, run.records.transfers)
        requests, tasks, transfers = (each.as_columns() for each in tables)
        cut = int((requests["status"] == UNFINISHED).sum())
        if not cut:
            fabric = run.coordinator.network.paths
            assert isinstance(fabric, Fabric)
            sent = sent_over(run)
            for name, channel in fabric.channels.items():
                if not name.endswith((".cores", ".dram")):  # those work too
                    assert channel.carried == sent.get(name, 0), f"{told}: {name}"
                assert not channel.num_flows, f"{told}: {name}"
            assert not run.coordinator.network.in_flight, told
            assert (transfers["end_ns"] >= transfers["start_ns"]).all(), told
        done = requests["status"] == FINISHED
        finished = {name: column[done] for name, column in requests.items()}
        order = np.argsort(tasks["request"], kind="stable")
        times = stage_times(finished, {k: v[order] for k, v in tasks.items()}, len(run.records.stage_kinds))
        assert times.min(initial=0) >= 0, told
        assert times.sum(axis=(1, 2)).tolist() == (finished["end_ns"] - finished["arrival_ns"]).tolist(), told
        kinds = [int((transfers["kind"] == kind).sum()) for kind in (KV_TRANSFER, HAND_OFF, PREFIX_FETCH)]
        seen += (len(finished["status"]), cut, *kinds, requests["num_preemptions"].sum(),
                 (requests["status"] == REJECTED).sum(), slowed(run))  # fmt: skip
    assert seen.min() > 0, (
        f"finished, cut, caches, hand-offs, prefixes, preemptions, rejected, slowed: {seen}: proves little"
    )


def slowed(run: Run) -> int:
    """Steps on a host that took longer than alone."""
    steps = run.records.steps.as_columns()
    on_host = np.isin(steps["client"], [client.index for client in run.clients if client.shares is not None])
    alone = LinearSteps()
    own = alone.per_prefill_token * steps["num_prefill_tokens"] + alone.per_prefill * steps["num_prefills"]
    least = alone.base + own
    return int((steps["end_ns"] - steps["start_ns"] > least + 70)[on_host].sum())


@pytest.mark.parametrize("part", sampled(range(3), 1))
def test_running_ahead_changes_nothing_on_a_network(part: int) -> None:
    for seed in range(50 * part, 50 * (part + 1)):
        ahead = random_cluster(seed)()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Kernel, "horizon", lambda kernel: kernel.now)
            assert rows(ahead.records) == rows(random_cluster(seed)().records), f"random_cluster({seed})"


def test_a_second_run_gives_equal_bytes() -> None:
    for seed in range(50):
        cluster = random_cluster(seed)
        assert record_bytes(cluster().records) == record_bytes(cluster().records), f"random_cluster({seed})"
