"""Clients on one host: alone a step lasts what its model says, beside others as long as its share allows."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from mist.batching.continuous import Continuous
from mist.client import Client
from mist.hardware import Device
from mist.host import Host
from mist.kernel import Kernel
from mist.perf import Demand, HostDeployment, OperatorTime
from mist.pipeline.stages import StageList
from mist.request import Step
from mist.sharing import Channel, Sharing
from mist.testing.cluster import Run, play, table
from mist.units import NS_PER_S

CPU = Device("cpu", {"bf16": 1e12}, 2**40, 100e9, num_cores=8)


@dataclass
class Made:
    """A made-up host model: `step_ns` for each task, on `cores` cores, at `bytes_per_s` of DRAM traffic."""

    step_ns: int = 1000
    cores: int = 8
    bytes_per_s: float = 0.0
    kinds: tuple[str, ...] | None = field(default=None, init=False)

    def supports(self, deployment: HostDeployment) -> str | None:
        return None

    def prepare(self, deployment: HostDeployment) -> None: ...

    def memory_bytes(self) -> int:
        return 0

    def step_time(self, step: Step) -> int:
        return self.step_ns * len(step.chunks)

    def floor_time(self, step: Step) -> int:
        return 1

    def demand(self, step: Step) -> Demand:
        took = self.step_time(step)
        return Demand(took * self.cores, round(took * self.bytes_per_s / NS_PER_S))

    def explain(self, step: Step) -> list[OperatorTime]:
        return []

    def provenance(self) -> dict[str, float]:
        return {"roofline": 1.0}


def run(models: list[Made], arrivals: list[int], *, shared: bool = True, fetch: tuple[int, int] | None = None) -> Run:
    """One client per model and stage, all on one host; `fetch`: (start ns, bytes) of DRAM traffic beside."""
    kinds = tuple(f"stage{i}" for i in range(len(models)))

    def place(kernel: Kernel, clients: list[Client]) -> None:
        cores, dram = Channel("cores", CPU.num_cores * NS_PER_S), Channel("DRAM", CPU.memory_bytes_per_s)
        host = Host(cores, dram, Sharing(kernel))
        for client, model in zip(clients, models, strict=True):
            client.perf = model
            client.demand_of = model.demand
            client.shares = host if shared else None
        if fetch:
            kernel.at(fetch[0], lambda _, now: host.sharing.start((host.dram,), fetch[1], _nobody, None, now), None)

    return play(
        table(arrivals, [1] * len(arrivals), [0] * len(arrivals)), pipeline=StageList(kinds), num_clients=len(models),
        serves=[(kind,) for kind in kinds], prepare=place, policy=lambda: Continuous(max_num_seqs=4),
    )  # fmt: skip


def _nobody(_: object, now: int) -> None: ...


def durations(result: Run) -> list[int]:
    steps = result.records.steps.as_columns()
    return (steps["end_ns"] - steps["start_ns"]).tolist()


@pytest.mark.parametrize("seed", range(20))
def test_alone_on_its_host_a_client_runs_as_if_it_had_one_of_its_own(seed: int) -> None:
    rng = random.Random(seed)
    model = Made(rng.randrange(1, 10**6), rng.randrange(1, 9), rng.choice([0, 1e9, 99e9]))
    arrivals = sorted(rng.randrange(10**6) for _ in range(30))
    alone, own = run([model], arrivals), run([model], arrivals, shared=False)
    assert alone.records.steps.cells == own.records.steps.cells
    assert alone.records.requests.cells == own.records.requests.cells


def test_two_that_want_all_cores_take_twice_as_long() -> None:
    # the second request's first stage runs beside the first one's second
    result = run([Made(1000, 8), Made(1000, 8)], [0, 1000])
    assert sorted(durations(result)) == [1000, 1000, 2000, 2000]


def test_two_that_find_enough_cores_do_not_disturb_each_other() -> None:
    assert durations(run([Made(1000, 4), Made(1000, 4)], [0, 1000])) == [1000] * 4


def test_cores_and_memory_are_shared_apart() -> None:
    memory, cores = Made(1000, 1, 100e9), Made(1000, 7, 0)
    assert durations(run([memory, cores], [0, 1000])) == [1000] * 4


def test_work_slows_down_while_bytes_are_fetched_from_its_memory() -> None:
    search = Made(1000, 8, 100e9)
    assert durations(run([search], [0], fetch=(0, 10**9))) == [2000]
    # for the second half of it: 500 + 2 x 500
    assert durations(run([search], [0], fetch=(500, 10**9))) == [1500]
    # 10,000 bytes at half the bandwidth take 200 ns of the 1,000, in which half of the work is done
    assert durations(run([search], [0], fetch=(0, 10_000))) == [1100]


def test_a_fetch_beside_work_that_leaves_bandwidth_slows_nobody() -> None:
    assert durations(run([Made(1000, 8, 40e9)], [0], fetch=(0, 10**9))) == [1000]


@pytest.mark.parametrize("seed", range(20))
def test_no_more_work_is_done_than_the_host_has(seed: int) -> None:
    rng = random.Random(seed)
    models = [Made(rng.randrange(100, 5000), rng.randrange(1, 9), rng.choice([0, 3e10, 1e11])) for _ in range(3)]
    result = run(models, sorted(rng.randrange(10**5) for _ in range(40)))
    steps = result.records.steps.as_columns()
    core_ns = memory = 0
    for client, num_tasks in zip(steps["client"].tolist(), steps["num_prefills"].tolist(), strict=True):
        demand = models[client].demand(Step(chunks=[(1, 0)] * num_tasks))
        core_ns, memory = core_ns + demand.core_ns, memory + demand.dram_bytes
    elapsed = int(steps["end_ns"].max() - steps["start_ns"].min())
    assert core_ns <= elapsed * CPU.num_cores + 1
    assert memory * NS_PER_S <= elapsed * CPU.memory_bytes_per_s * (1 + 1e-9) + NS_PER_S
    took = steps["end_ns"] - steps["start_ns"]
    assert all(t >= models[c].step_ns * n for c, n, t in
               zip(steps["client"].tolist(), steps["num_prefills"].tolist(), took.tolist(), strict=True))  # fmt: skip
