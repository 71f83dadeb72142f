"""Steps that clients plan past what happens elsewhere: the same rows as one step after another, whoever comes between.

The oracle is the same run under the ledger, where nothing is planned and every step is an event. Times are multiples of
one tick, so that arrivals, ends and users who give up meet in one instant all the time.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from kit import LinearSteps, play, rows, sampled, table
from mist import client as client_module
from mist.engine import EngineProfile
from mist.pipeline import RequestRandom
from mist.pipeline.stages import StageList
from mist.records import CANCELLED
from mist.request import FirstOf, Pipeline, Request, Stage, Step
from mist.routing import RoutingPolicy
from mist.routing.join_shortest_queue import JoinShortestQueue
from mist.routing.least_outstanding import LeastOutstanding
from mist.routing.prefix_affinity import PrefixAffinity
from mist.routing.round_robin import RoundRobin
from mist.tenant import Patience

TICK = 1000
ROUTERS: list[Callable[[], RoutingPolicy]] = [RoundRobin, LeastOutstanding, PrefixAffinity, JoinShortestQueue]


class Ticks(LinearSteps):
    """Steps of whole ticks, told a stretch at once."""

    def step_time(self, step: Step) -> int:
        return TICK * (1 + step.num_prefill_tokens // 40 + step.num_decodes // 4)

    def decode_times(self, num_decodes: int, decode_context: int, num_steps: int, host_ns: int) -> list[int]:
        return [TICK * (1 + num_decodes // 4) + host_ns] * min(num_steps, 7)

    def decoded(self, num_decodes: int, decode_context: int, num_steps: int) -> None:
        assert num_steps > 0


def _prefix(rng: Random, number: int, num_blocks: int) -> tuple[int, ...]:
    """Blocks that begin as one of three documents does, and go on as no other request's."""
    document, shared = rng.randint(0, 2), rng.randint(0, num_blocks)
    return tuple(100 * document + i if i < shared else 1000 * number + i for i in range(num_blocks))


class Race:
    """Two answers side by side, of which the first is taken."""

    kinds, sizes, is_fixed = ("prefill", "decode"), (), False

    def __call__(self, request: Request, rng: RequestRandom) -> Pipeline:
        def answer(num_tokens: int) -> Pipeline:
            yield Stage("prefill", input_tokens=request.input_tokens)
            yield Stage("decode", oracle_output_tokens=num_tokens)

        yield FirstOf(1, [answer(request.oracle_output_tokens), answer(request.oracle_output_tokens + 9)])


def drawn(seed: int) -> tuple[Any, dict[str, Any]]:
    """A workload and what else `play` is given."""
    rng = Random(seed)
    number = rng.randint(5, 40)
    arrivals = sorted(TICK * rng.randint(0, rng.choice([0, 40, 300])) for _ in range(number))
    outputs = [rng.choice([1, 2, 30, rng.randint(1, 90)]) for _ in range(number)]
    given: dict[str, Any] = {"num_clients": rng.randint(2, 5), "router": rng.choice(ROUTERS), "perf": Ticks}
    if rng.random() < 0.3:
        given["num_blocks"] = rng.randint(12, 40)
    if rng.random() < 0.3:
        given |= {"caching": True, "unit_tokens": 16}
    if rng.random() < 0.3:
        after = [TICK * rng.randint(1, 60) for _ in range(number)]
        given["patience"] = Patience(after, [CANCELLED] * number)
    if rng.random() < 0.3:
        given["until_ns"] = TICK * rng.randint(1, 150)
    if rng.random() < 0.3:
        reads_ns = TICK * rng.randint(0, 2)
        given["engine_profile"] = EngineProfile("test", async_scheduling=True, request_overhead_ns=reads_ns)
    if rng.random() < 0.4:
        serves = [("prefill", "decode")] * given["num_clients"]
        serves[rng.randrange(len(serves))] = ("rerank",)  # whose ends reach clients before and after it
        given |= {"pipeline": StageList(("rerank", "prefill", "decode")), "serves": serves}
    elif rng.random() < 0.2:
        given["pipeline"] = Race()
    inputs = [16 * rng.randint(1, 8) for _ in range(number)]
    keys = [_prefix(rng, number, size // 16) for number, size in enumerate(inputs, start=1)]
    concurrency = rng.randint(1, 9) if rng.random() < 0.3 else None
    return table(arrivals, inputs, outputs, keys, concurrency), given


def played(seed: int, *, ledger: bool) -> Any:
    workload, given = drawn(seed)
    made = {name: given[name]() for name in ("router", "perf")}
    return play(workload, **{**given, **made}, ledger=ledger)


@pytest.mark.parametrize("seed", sampled(range(3000), 60))
def test_a_plan_is_one_step_after_another(seed: int) -> None:
    planned, stepped = played(seed, ledger=False), played(seed, ledger=True)
    assert rows(planned.records) == rows(stepped.records)


def test_plans_are_made_and_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one instant, too, with an end before it and after it, so that the test above is one."""
    found = {"whole": 0, "cut": 0, "met": 0}
    begin, catch_up = client_module.begin_planned, client_module.Client.catch_up

    def counted(client: client_module.Client, num_over: int) -> None:
        assert client.planned is not None
        found["whole" if num_over == len(client.planned.instants) - 2 else "cut"] += 1
        begin(client, num_over)

    def counted_meetings(client: client_module.Client) -> None:
        if client.planned is not None:
            found["met"] += client.kernel.now in client.planned.instants[1:]
        catch_up(client)

    monkeypatch.setattr(client_module, "begin_planned", counted)
    monkeypatch.setattr(client_module.Client, "catch_up", counted_meetings)
    for seed in range(60):
        played(seed, ledger=False)
    assert min(found.values()) > 50, found


def test_clients_that_somebody_looks_at_plan_nothing() -> None:
    workload = table([0] * 4, [64] * 4, [50] * 4)
    for router, plans in ((RoundRobin(), True), (JoinShortestQueue(), False)):
        run = play(workload, num_clients=2, router=router, perf=Ticks(), ledger=False)
        assert [client.plans for client in run.clients] == [plans] * 2
    assert not play(workload, perf=Ticks(), ledger=False).clients[0].plans
