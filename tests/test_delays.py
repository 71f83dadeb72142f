"""Delays of pipelines: they end when they should, beside anything else, and nobody counts them as a client's work."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kit import sampled
from mist.batching.chunked import Chunked
from mist.batching.continuous import Continuous
from mist.delays import Delays
from mist.errors import InvariantError, ScenarioError
from mist.metrics import ClientInfo, summarise
from mist.metrics.stages import stage_times
from mist.pipeline import RequestRandom
from mist.pipeline.reasoning import Reasoning
from mist.records import CUT, DONE, DROPPED, FINISHED, NO_CLIENT, REJECTED, UNFINISHED, Records
from mist.registry import register
from mist.report.timeline import write_timeline
from mist.request import DECODE, PREFILL, TOOL, All, Delay, FirstOf, Pipeline, Request, Stage
from mist.scenario.result import task_columns
from mist.scenario.value import load
from mist.testing import PipelineContract
from mist.testing.cluster import KVLink, LinearSteps, Run, play, table

STEPS = LinearSteps(base=100, per_prefill_token=10, per_decode=0, per_context=0, per_prefill=0)


@dataclass
class Waits:
    """A prefill of ten tokens, then whatever `script` yields."""

    script: Any
    kinds: tuple[str, ...] = field(default=(PREFILL, DECODE, TOOL), init=False)
    delays: tuple[str, ...] = field(default=(TOOL,), init=False)
    is_fixed: bool = field(default=False, init=False)
    results: list[Any] = field(default_factory=list)

    def __call__(self, request: Request, rng: RequestRandom) -> Pipeline:
        yield Stage(PREFILL, input_tokens=10, visible=False)
        for each in self.script():
            self.results.append((yield each))


def run(script: Any, num_requests: int = 1, **more: Any) -> Run:
    arrivals = [0] * num_requests
    return play(table(arrivals, [10] * num_requests, [1] * num_requests), pipeline=Waits(script), perf=STEPS, **more)


def column(result: Run, name: str) -> list[int]:
    columns = result.records.requests.as_columns()
    return [int(value) for value in columns[name][np.argsort(columns["request"])]]


def delays_of(result: Run) -> dict[str, Any]:
    tasks = result.records.tasks.as_columns()
    return {name: values[tasks["client"] == NO_CLIENT] for name, values in tasks.items()}


def sums_are_e2e(records: Records) -> bool:
    requests, tasks = records.requests.as_columns(), records.tasks.as_columns()
    finished = {name: values[requests["status"] == FINISHED] for name, values in requests.items()}
    order = np.argsort(tasks["request"], kind="stable")
    tasks = {name: values[order] for name, values in tasks.items()}
    times = stage_times(finished, tasks, len(records.stage_kinds), records.transfers.as_columns())
    whole = finished["end_ns"] - finished["arrival_ns"]
    return bool(times.min(initial=0) >= 0 and np.array_equal(times.sum(axis=(1, 2)), whole))


def test_a_request_goes_on_when_its_tool_has_run() -> None:
    result = run(lambda: [Delay(777), Stage(PREFILL, input_tokens=20)])
    assert column(result, "end_ns") == [200 + 777 + 300]
    tools = delays_of(result)
    assert [tools[name].tolist() for name in ("queued_ns", "started_ns", "end_ns", "how")] == [
        [200], [200], [977], [DONE],
    ]  # fmt: skip
    times = stage_times(result.records.requests.as_columns(), result.records.tasks.as_columns(), 3)
    assert times[0].tolist() == [[0, 500, 0], [0, 0, 0], [0, 777, 0]]
    assert result.coordinator.tenants[0].pipeline.results[0].end_ns == 977  # type: ignore[attr-defined]


def test_a_delay_of_nothing_is_none() -> None:
    result = run(lambda: [Delay(0), Stage(PREFILL, input_tokens=20)])
    assert column(result, "end_ns") == [500]
    assert len(delays_of(result)["how"]) == 0


def test_delays_share_nothing() -> None:
    """Seven requests wait at once, in a step's gap of the client, which works on alone meanwhile."""
    result = run(lambda: [Delay(5000)], 7)
    assert column(result, "end_ns") == [100 + 7 * 100 + 5000] * 7


def test_side_by_side_the_longest_decides() -> None:
    result = run(lambda: [All([Delay(300), Delay(900), Stage(PREFILL, input_tokens=10)])])
    assert column(result, "end_ns") == [200 + 900]
    assert sums_are_e2e(result.records)


def test_a_call_that_times_out_is_given_up() -> None:
    """The race is over at 500: the other's time ends for nobody, and the request has long left then."""
    result = run(lambda: [FirstOf(1, [Delay(9000), Delay(300)])])
    assert column(result, "end_ns") == [500]
    tools = delays_of(result)
    assert sorted(zip(tools["how"].tolist(), tools["end_ns"].tolist(), strict=True)) == [(DONE, 500), (DROPPED, 500)]
    assert not result.coordinator.delays.waiting
    assert sums_are_e2e(result.records)


def test_a_delay_gives_up_what_takes_longer() -> None:
    def script() -> list[Any]:
        return [FirstOf(1, [Delay(150), Stage("prefill", input_tokens=100)]), Stage(PREFILL, input_tokens=1)]

    result = run(script)
    assert column(result, "end_ns") == [200 + 1100 + 110]  # the step in flight ends
    assert column(result, "status") == [FINISHED]


def test_delays_that_nobody_waits_for_keep_the_request() -> None:
    result = run(lambda: [FirstOf(1, [Delay(9000), Delay(300)], cancel_rest=False)])
    assert column(result, "end_ns") == [200 + 9000]


def test_the_clock_cuts_a_delay() -> None:
    result = run(lambda: [Delay(9000)], until_ns=1000)
    assert (column(result, "status"), column(result, "end_ns")) == ([UNFINISHED], [1000])
    assert delays_of(result)["how"].tolist() == [CUT]
    assert delays_of(result)["end_ns"].tolist() == [1000]


def test_a_request_rejected_beside_a_delay_leaves_when_that_is_over() -> None:
    result = run(lambda: [All([Delay(5000), Stage(PREFILL, input_tokens=500)])], max_model_len=100)
    assert (column(result, "status"), column(result, "end_ns")) == ([REJECTED], [5200])


def test_no_decode_goes_on_from_a_delay() -> None:
    with pytest.raises(InvariantError, match="a decode must follow a stage that leaves a KV cache"):
        run(lambda: [Delay(10), Stage(DECODE, oracle_output_tokens=5)])


def test_a_client_does_not_run_ahead_of_a_tools_end() -> None:
    """One decodes for long; the other comes back from its tool within that, at an instant of its own."""

    @dataclass
    class Mixed(Waits):
        def __call__(self, request: Request, rng: RequestRandom) -> Pipeline:
            yield Stage(PREFILL, input_tokens=10)
            if request.index:
                yield Stage(DECODE, oracle_output_tokens=200)
            else:
                yield Delay(1050)
                yield Stage(PREFILL, input_tokens=30)

    result = play(table([0, 0], [10, 10], [1, 1]), pipeline=Mixed(None), perf=STEPS)
    steps = result.records.steps.as_columns()
    assert delays_of(result)["end_ns"].tolist() == [1350]
    back = np.flatnonzero(steps["num_prefill_tokens"] == 30).tolist()
    assert steps["start_ns"][back].tolist() == [1400]


def test_a_delay_that_never_ends_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(self: Delays, task: Any, delay: Any, now: int) -> None:
        task.started_ns = now
        self.waiting[task] = now + delay.duration_ns

    monkeypatch.setattr(Delays, "begin", never)
    with pytest.raises(InvariantError, match="a delay is over, and its request still waits"):
        play(table([0, 900], [10, 10], [1, 1]), pipeline=Waits(lambda: [Delay(10)]), perf=STEPS)


def test_readers_know_that_no_client_served_it() -> None:
    """The last client, which -1 would also mean, has done nothing but its own."""
    serves = [(PREFILL, DECODE), ("other",)]
    result = run(lambda: [Delay(700), Stage(PREFILL, input_tokens=20)], 40, num_clients=2, serves=serves)
    assert set(task_columns(result.records)["client"].tolist()) == {"gpu-0", None}
    infos = [ClientInfo("gpu-0", "gpu"), ClientInfo("gpu-1", "other")]
    metrics = summarise(result.records, clients=infos, open_loop=True)
    assert metrics["clients"]["other"]["utilisation"] == 0
    assert metrics["stages"][TOOL]["serve_s"]["mean"] == pytest.approx(700e-9)


@dataclass
class Errands:
    """Any mixture of branches, delays and decodes, drawn by the request."""

    kinds: tuple[str, ...] = field(default=(PREFILL, DECODE, TOOL, "judge"), init=False)
    delays: tuple[str, ...] = field(default=(TOOL,), init=False)
    is_fixed: bool = field(default=False, init=False)

    def __call__(self, request: Request, rng: RequestRandom) -> Pipeline:
        yield from self._some(rng(), 0)

    def _some(self, draws: np.random.Generator, depth: int) -> Pipeline:
        result = None
        for choice in draws.integers(0, 6 if depth < 3 else 4, 3).tolist():
            if choice == 0:
                result = yield Delay(int(draws.integers(0, 4000)))
            elif choice == 1:
                result = yield Stage("judge", input_tokens=int(draws.integers(1, 20)), visible=False)
            elif choice in (2, 3):
                yield Stage(PREFILL, input_tokens=int(draws.integers(1, 40)))
                said = [self._said(draws) for _ in range(choice - 1)]
                result = (yield FirstOf(1, said)) if choice == 3 else (yield from said[0])
            else:
                branches: list[Stage | Pipeline] = [
                    Delay(int(draws.integers(1, 4000))),
                    *(self._some(draws, depth + 1) for _ in range(2)),
                ]
                k = int(draws.integers(1, 4))
                result = yield (All(branches) if choice == 4 else FirstOf(k, branches, bool(draws.integers(0, 2))))
        return result

    def _said(self, draws: np.random.Generator) -> Pipeline:
        result = yield Stage(DECODE, oracle_output_tokens=int(draws.integers(1, 12)))
        yield Delay(int(draws.integers(0, 500)))
        return result


@pytest.mark.parametrize("seed", sampled(range(150), 50))
def test_random_errands_obey_the_laws(seed: int) -> None:
    rng = random.Random(seed)
    num = rng.randint(1, 10)
    workload = table(sorted(rng.randrange(20_000) for _ in range(num)), [rng.randint(1, 60) for _ in range(num)],
                     [1] * num, concurrency=rng.choice([None, None, 2]))  # fmt: skip
    apart = rng.random() < 0.4
    serves = [(PREFILL, "judge"), (PREFILL,), (DECODE,)] if apart else [(PREFILL, DECODE, "judge")] * 2
    result = play(
        workload, pipeline=Errands(), num_clients=len(serves), serves=serves, block_size=4,
        nic=KVLink(rng.randint(1, 50), 1e9, rng.choice([0, 500])), num_blocks=rng.choice([30, 60, 1000]),
        policy=lambda: (Chunked if rng.random() < 0.5 else Continuous)(
            max_num_seqs=rng.randint(1, 6), max_num_batched_tokens=rng.randint(8, 64)),
        caching=rng.random() < 0.5, until_ns=rng.choice([1 << 62, rng.randrange(1, 60_000)]),
    )  # fmt: skip
    assert not result.coordinator.delays.waiting
    assert not result.coordinator.in_system
    tools = delays_of(result)
    assert set(tools["how"].tolist()) <= {DONE, DROPPED, CUT}
    assert (tools["queued_ns"] == tools["started_ns"]).all()
    assert not tools["generated_tokens"].any()
    assert sums_are_e2e(result.records)


class TestErrands(PipelineContract):
    def pipeline(self) -> Errands:
        return Errands()


# --- in a scenario ---


@register("pipeline", "think_then_call")
@dataclass
class ThinkThenCall(Reasoning):
    """A call of a tool before the answer."""

    tool_ns: int = 1000
    delays: tuple[str, ...] = field(default=(TOOL,), init=False)

    @property
    def kinds(self) -> tuple[str, ...]:
        return (TOOL, PREFILL, DECODE)

    def __call__(self, request: Request, rng: RequestRandom) -> Pipeline:
        yield Delay(self.tool_ns)
        yield from super().__call__(request, rng)


SCENARIO: dict[str, Any] = {
    "workload": {"arrivals": "all_at_once", "num_requests": 3, "input_tokens": 90, "output_tokens": 5},
    "pipeline": {"think_then_call": {"tool_ns": 3_000_000}},
    "clients": {"gpu": {"device": "h100-sxm", "model": "llama-3.1-8b"}},
    "perf": "roofline",
}


def test_nobody_has_to_serve_a_delay() -> None:
    scenario = load(SCENARIO)
    assert scenario.stages == (TOOL, PREFILL, DECODE)
    assert set(scenario.routing) == {PREFILL, DECODE}
    assert load(scenario.resolved()).resolved() == scenario.resolved()
    result = scenario.run(check=True)
    assert result.metrics["stages"][TOOL]["serve_s"]["mean"] == 3e-3
    plain = load({**SCENARIO, "pipeline": "reasoning"}).run()
    assert (result.requests["e2e_s"] - 3e-3).tolist() == pytest.approx(plain.requests["e2e_s"].tolist())


def test_a_timeline_and_tables_tell_no_client(tmp_path: Path) -> None:
    result = load(SCENARIO).run()
    path = tmp_path / "timeline.json"
    write_timeline(result, path)
    events = json.loads(path.read_text())["traceEvents"]
    served = [each for each in events if each.get("name") == TOOL]
    assert [each["args"]["client"] for each in served] == [None] * 3
    tasks = result.tasks
    assert {client for client, stage in zip(tasks["client"], tasks["stage"], strict=True) if stage == TOOL} == {None}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"routing": {TOOL: "round_robin"}}, "routing.tool: the stage 'tool' is a delay, which no client serves"),
        (
            {"clients": {"gpu": {"device": "h100-sxm", "model": "llama-3.1-8b", "serves": [PREFILL, DECODE, TOOL]}}},
            "clients.gpu.serves.2: the stage 'tool' is a delay, which no client serves",
        ),
    ],
)
def test_a_delay_has_no_client_and_no_route(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ScenarioError) as caught:
        load({**SCENARIO, **sections})
    assert [problem.message for problem in caught.value.problems] == [message]


def test_max_time_cuts_a_scenario_during_its_delays() -> None:
    result = load(SCENARIO, max_time_s=0.002).run(check=True)
    assert result.metrics["requests"]["unfinished"] == 3
