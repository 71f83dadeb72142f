"""Agents: turns, tools and sub-agents by closed forms, what caches keep of their contexts, and their laws at random."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from kit import sampled
from mist.batching.chunked import Chunked
from mist.batching.continuous import Continuous
from mist.errors import ScenarioError
from mist.metrics.stages import stage_times
from mist.pipeline.agent import Agent
from mist.records import FINISHED, NO_CLIENT
from mist.request import DECODE, PREFILL, TOOL, Context, Request
from mist.routing.prefix_affinity import PrefixAffinity
from mist.scenario.value import load
from mist.testing import PipelineContract
from mist.testing.cluster import KVLink, LinearSteps, Run, play, table
from mist.units import NS_PER_MS
from mist.workload import RequestTable
from mist.workload.synthetic import Uniform

#: a step of 100 ns, and 10 for each token of a prompt
STEPS = LinearSteps(base=100, per_prefill_token=10, per_decode=0, per_context=0, per_prefill=0)
#: every step takes 100 ns, whatever is in it
EVEN = LinearSteps(base=100, per_prefill_token=0, per_decode=0, per_context=0, per_prefill=0)
BLOCK = 16


def one(input_tokens: int = 50, output_tokens: int = 8, unit_tokens: int = 0, num: int = 1) -> RequestTable:
    workload = table([0] * num, [input_tokens] * num, [output_tokens] * num)
    workload.hash_block_size = unit_tokens
    return workload


def run(pipeline: Agent, workload: RequestTable | None = None, **more: Any) -> Run:
    how: dict[str, Any] = {"perf": STEPS, "policy": lambda: Chunked(1 << 20, 4096)} | more
    workload = workload or one()
    return play(workload, pipeline=pipeline, unit_tokens=workload.hash_block_size, **how)


def column(result: Run, name: str) -> list[int]:
    columns = result.records.requests.as_columns()
    return [int(value) for value in columns[name][np.argsort(columns["request"])]]


def tasks_of(result: Run, kind: str) -> dict[str, Any]:
    tasks = result.records.tasks.as_columns()
    rows = tasks["kind"] == result.records.stage_kinds.index(kind)
    order = np.lexsort((tasks["stage_index"][rows], tasks["request"][rows]))
    return {name: values[rows][order] for name, values in tasks.items()}


def sums_are_e2e(result: Run) -> bool:
    records = result.records
    requests, tasks = records.requests.as_columns(), records.tasks.as_columns()
    finished = {name: values[requests["status"] == FINISHED] for name, values in requests.items()}
    order = np.argsort(tasks["request"], kind="stable")
    tasks = {name: values[order] for name, values in tasks.items()}
    times = stage_times(finished, tasks, len(records.stage_kinds), records.transfers.as_columns())
    whole = finished["end_ns"] - finished["arrival_ns"]
    return bool(times.min(initial=0) >= 0 and np.array_equal(times.sum(axis=(1, 2)), whole))


def turn_ns(computed: int, output: int) -> int:
    """The prefill's step, which samples a token, and a step for each of the others."""
    return 100 + 10 * computed + (output - 1) * 100


def left(prompt: int, output: int, *, caching: bool) -> int:
    """What the cache has of a context when a turn has ended, whose last token isn't in it: full blocks."""
    return (prompt + output - 1) // BLOCK * BLOCK if caching else 0


# --- closed forms ---


@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("unit", [0, 32, 64])
def test_alone_an_agent_takes_its_steps_and_its_tools(caching: bool, unit: int) -> None:
    """Of four turns: everything so far is read again, but for what the cache has of it, to the nanosecond."""
    pipeline = Agent(turns=4, call_tokens=12, tool_ms=3, tool_output_tokens=70)
    result = run(pipeline, one(unit_tokens=unit), caching=caching)
    prompt, found, e2e = 50, 0, 0
    for _ in range(3):
        e2e += turn_ns(prompt - found, 12) + 3 * NS_PER_MS
        found = left(prompt, 12, caching=caching)
        prompt += 12 + 70
    first_token = e2e + turn_ns(prompt - found, 1)
    assert column(result, "first_token_ns") == [first_token]
    assert column(result, "end_ns") == [first_token + 7 * 100]
    assert (column(result, "output_tokens"), column(result, "input_tokens")) == ([8], [prompt])
    tools = tasks_of(result, TOOL)
    assert (tools["end_ns"] - tools["started_ns"]).tolist() == [3 * NS_PER_MS] * 3
    assert tools["client"].tolist() == [NO_CLIENT] * 3
    assert sums_are_e2e(result)
    assert result.clients[0].residents.kv.used == 0


@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("num", [1, 3, 7])
def test_equal_sub_agents_take_as_long_as_one(caching: bool, num: int) -> None:
    """Where steps take 100 ns whatever is in them; their reports are read together in the parent's next turn."""
    pipeline = Agent(turns=2, call_tokens=5, tool_ms=2, tool_output_tokens=40, sub_agents=num, fan_out_turns=(1,),
                     sub_agent_turns=3, sub_agent_prompt_tokens=60, sub_agent_output_tokens=9)  # fmt: skip
    result = run(pipeline, perf=EVEN, caching=caching)
    alone = 2 * (5 * 100 + 2 * NS_PER_MS) + 9 * 100
    assert column(result, "end_ns") == [5 * 100 + alone + 8 * 100]
    last = tasks_of(result, PREFILL)
    prompt = 50 + 5 + num * 9
    assert column(result, "input_tokens") == [prompt]
    found = left(50, 5, caching=caching)
    assert (last["cached_tokens"][-1], last["computed_tokens"][-1]) == (found, prompt - found)
    subs = last["cached_tokens"][1:-1]
    kept = [left(60, 5, caching=caching), left(105, 5, caching=caching)]
    assert sorted(subs.tolist()) == sorted([0] * num + kept[:1] * num + kept[1:] * num)
    assert sums_are_e2e(result)


def test_the_parent_waits_for_the_slowest() -> None:
    pipeline = Agent(turns=2, call_tokens=5, tool_ms=Uniform(1, 50), sub_agents=6, fan_out_turns=(1,),
                     sub_agent_turns=Uniform(1, 6), sub_agent_output_tokens=9)  # fmt: skip
    result = run(pipeline, perf=EVEN)
    reports = tasks_of(result, DECODE)["end_ns"][1:-1]
    assert column(result, "end_ns") == [reports.max() + 8 * 100]
    times = stage_times(result.records.requests.as_columns(), result.records.tasks.as_columns(), 3)
    tools = tasks_of(result, TOOL)
    assert times[0, 2, 1] <= (tools["end_ns"] - tools["started_ns"]).sum()
    assert sums_are_e2e(result)


def test_a_tool_on_a_client_takes_its_turn_there() -> None:
    pipeline = Agent(turns=3, call_tokens=12, tool_output_tokens=70, tool_stage="search")
    assert pipeline.delays == ()
    result = run(pipeline, num_clients=2, serves=[(PREFILL, DECODE), ("search",)])
    prompts = [50, 132, 214]
    e2e = sum(turn_ns(prompt, 12) for prompt in prompts[:2]) + 2 * (100 + 120) + turn_ns(prompts[2], 8)
    assert column(result, "end_ns") == [e2e]
    assert tasks_of(result, "search")["computed_tokens"].tolist() == [12, 12]


def test_a_tool_on_the_same_client_leaves_the_contexts_alone() -> None:
    pipeline = Agent(turns=3, call_tokens=12, tool_output_tokens=70, tool_stage="search")
    result = run(pipeline, serves=[(PREFILL, DECODE, "search")], caching=True)
    assert tasks_of(result, PREFILL)["cached_tokens"].tolist() == [0, left(50, 12, caching=True),
                                                                  left(132, 12, caching=True)]  # fmt: skip
    assert tasks_of(result, "search")["cached_tokens"].tolist() == [0, 0]


def test_one_turn_is_plain_answering() -> None:
    workload = table([0, 50, 900], [30, 9, 12], [7, 7, 0])
    plain, agent = play(workload, perf=STEPS), play(workload, perf=STEPS, pipeline=Agent(turns=1))
    assert agent.records.steps.cells == plain.records.steps.cells
    assert agent.records.requests.cells == plain.records.requests.cells


# --- contexts ---


def test_keys_of_a_context_are_the_prompts_and_then_its_own() -> None:
    request = Request(3, 0, 70, 8, block_keys=(11, 12, 13))
    first, longer = (request.keys_of(Context(0, tokens), 32) for tokens in (70, 200))
    assert first == (11, 12)
    assert longer[:2] == first
    assert len(set(longer)) == 6
    assert max(longer[2:]) < 0
    unknown = Request(3, 0, 70, 8).keys_of(Context(0, 200), 32)
    assert unknown[2:] == longer[2:]
    assert not set(longer) & set(request.keys_of(Context(1, 200), 32))
    assert not set(longer) & set(Request(4, 0, 70, 8).keys_of(Context(0, 200), 32))
    assert request.keys_of(Context(0, 200), 0) == ()


def test_a_known_prompt_is_shared_and_what_follows_is_not() -> None:
    """The second agent finds the first one's prompt, of 64 tokens; behind it each finds its own."""
    workload = table([0, 10**9], [70, 70], [4, 4], keys=[(1, 2, 3), (1, 2, 4)])
    workload.hash_block_size = 32
    result = run(Agent(turns=2, call_tokens=12, tool_ms=1, tool_output_tokens=40), workload, caching=True)
    assert tasks_of(result, PREFILL)["cached_tokens"].tolist() == [0, 80, 64, 80]


@pytest.mark.parametrize("unit", [0, 32])
def test_idle_contexts_are_evicted_least_recently_used_first(unit: int) -> None:
    """Room for one: while the first one's tool runs, the other's prompt takes its place."""
    workload = table([0, 2000], [160, 160], [4, 4])
    workload.hash_block_size = unit
    pipeline = Agent(turns=2, call_tokens=8, tool_ms=1, tool_output_tokens=20)
    found = [
        tasks_of(run(pipeline, workload, caching=True, num_blocks=blocks), PREFILL)["cached_tokens"].tolist()
        for blocks in (13, 100)
    ]
    assert found[1] == [0, 160, 0, 160]
    assert found[0][1] < 160


def test_an_agent_follows_its_prefix_from_client_to_client() -> None:
    pipeline = Agent(turns=6, call_tokens=12, tool_ms=1, sub_agents=3, fan_out=0.5, sub_agent_turns=3)
    workload = one(3000, unit_tokens=32, num=6)
    stays = run(pipeline, workload, caching=True, num_clients=3, router=PrefixAffinity())
    roams = run(pipeline, workload, caching=True, num_clients=3)
    shares = []
    for each in (stays, roams):
        read = tasks_of(each, PREFILL)
        shares.append(read["cached_tokens"].sum() / (read["cached_tokens"] + read["computed_tokens"]).sum())
    assert shares[0] > 1.3 * shares[1]


# --- draws ---


def lengths(result: Run) -> list[list[tuple[str, int]]]:
    """Of each request the tokens that each decode generates and the times of its tools, whatever their order."""
    decodes, tools = tasks_of(result, DECODE), tasks_of(result, TOOL)
    found = []
    for request in range(len(result.records.requests)):
        mine = [("d", n) for n in decodes["generated_tokens"][decodes["request"] == request].tolist()]
        took = (tools["end_ns"] - tools["started_ns"])[tools["request"] == request].tolist()
        found.append(sorted([*mine, *(("t", ns) for ns in took)]))
    return found


def test_an_agent_does_the_same_under_every_policy() -> None:
    pipeline = Agent(turns=Uniform(1, 8), call_tokens=Uniform(2, 30), tool_ms=Uniform(1, 9), sub_agents=3,
                     sub_agent_turns=Uniform(1, 4), sub_agent_output_tokens=Uniform(1, 60))  # fmt: skip
    results = [
        run(pipeline, one(num=5), policy=policy, num_clients=num_clients, caching=num_clients > 1)
        for policy, num_clients in ((Chunked, 1), (lambda: Continuous(max_num_seqs=2), 1), (Chunked, 3))
    ]
    assert lengths(results[0]) == lengths(results[1]) == lengths(results[2])
    assert len({len(each) for each in lengths(results[0])}) > 1


@pytest.mark.parametrize("seed", sampled(range(150), 50))
def test_random_agents_obey_the_laws(seed: int) -> None:
    rng = random.Random(seed)
    num = rng.randint(1, 6)
    unit = rng.choice([0, 8, 16])
    keys = [tuple(rng.choice([(1, 2, 3), (1, 2, 4), (5,)])) for _ in range(num)] if unit and seed % 2 else None
    workload = table(sorted(rng.randrange(20_000) for _ in range(num)), [rng.randint(1, 60) for _ in range(num)],
                     [rng.randint(0, 9) for _ in range(num)], keys=keys)  # fmt: skip
    workload.hash_block_size = unit
    pipeline = Agent(
        turns=Uniform(1, 5), call_tokens=Uniform(1, 9), tool_ms=1, tool_output_tokens=Uniform(1, 30),
        tool_stage=rng.choice(["", "search"]), sub_agents=rng.randint(0, 4), fan_out=0.5,
        sub_agent_turns=Uniform(1, 3), sub_agent_prompt_tokens=Uniform(1, 40), sub_agent_output_tokens=Uniform(1, 9),
    )  # fmt: skip
    apart = rng.random() < 0.4
    both = [(PREFILL, DECODE, "search")] * 2
    result = run(
        pipeline, workload, serves=[(PREFILL, "search"), (PREFILL,), (DECODE,)] if apart else both,
        num_clients=3 if apart else 2, nic=KVLink(rng.randint(1, 50), 1e9, rng.choice([0, 500])), block_size=4,
        num_blocks=rng.choice([90, 150, 1000]), router=rng.choice([None, PrefixAffinity()]),
        policy=lambda: (Chunked if rng.random() < 0.5 else Continuous)(
            max_num_seqs=rng.randint(1, 6), max_num_batched_tokens=rng.randint(8, 64)),
        caching=rng.random() < 0.7, until_ns=rng.choice([1 << 62, rng.randrange(1, 5_000_000)]),
    )  # fmt: skip
    assert not result.coordinator.in_system
    assert not result.coordinator.delays.waiting
    assert sums_are_e2e(result)
    requests = result.records.requests.as_columns()
    wanted = np.asarray(workload.output_tokens)[requests["request"]]
    assert (requests["output_tokens"] == wanted)[requests["status"] == FINISHED].all()
    for residents in (client.residents for client in result.clients):
        if not residents.running and not residents.sending and not residents.num_waiting:
            assert residents.kv.used == 0


class TestAgent(PipelineContract):
    def pipeline(self) -> Agent:
        own = {"sub_agents": 2, "sub_agent_turns": 2, "sub_agent_prompt_tokens": 70, "sub_agent_output_tokens": 12}
        return Agent(turns=Uniform(1, 4), call_tokens=9, tool_ms=1, tool_output_tokens=60, **own)


class TestAgentWithTools(PipelineContract):
    def pipeline(self) -> Agent:
        return Agent(turns=3, tool_stage="tool", call_tokens=9, tool_output_tokens=60)


# --- in a scenario ---

SCENARIO: dict[str, Any] = {
    "seed": 5,
    "workload": {"arrivals": {"poisson": {"rate_per_s": 4}}, "num_requests": 30, "input_tokens": 3000,
                 "output_tokens": 50},
    "pipeline": {"agent": {"turns": {"uniform": {"low": 2, "high": 6}}, "call_tokens": 40, "sub_agents": 2,
                           "tool_ms": {"lognormal": {"mean": 900, "cv": 1}}}},
    "clients": {"gpu": {"device": "h100-sxm", "model": "llama-3.1-8b",
                        "kv_cache": {"num_blocks": 3000, "tiers": ["host"]}}},
    "memories": {"host": {"memory": "ddr5", "capacity": "64 GiB", "chunk_tokens": 256}},
    "perf": "roofline",
}  # fmt: skip


def test_idle_contexts_are_kept_offloaded_or_dropped() -> None:
    """A small device: its tiers have most of what it has evicted, and without any cache all is computed."""
    settings: dict[str, dict[str, Any]] = {
        "kept": {"tiers": [], "num_blocks": 40_000},
        "offloaded": {},
        "evicted": {"tiers": []},
        "dropped": {"tiers": [], "enable_prefix_caching": False},
    }
    computed = {}
    for name, given in settings.items():
        result = load(SCENARIO, **{f"clients.gpu.kv_cache.{key}": value for key, value in given.items()}).run(
            check=True
        )
        computed[name] = result.metrics["clients"]["gpu"]["prefill_tokens"]
    assert computed["kept"] <= computed["offloaded"] < computed["evicted"] < computed["dropped"]


@pytest.mark.parametrize("write", ["through", "back"])
@pytest.mark.parametrize("seed", sampled(range(4), 2))
def test_tiers_of_agents_obey_the_laws(seed: int, write: str) -> None:
    sections = {**SCENARIO, "seed": seed, "memories": {"host": {"memory": "ddr5", "capacity": "4 GiB", "write": write}}}
    more: dict[str, Any] = {"clients.gpu.count": 2, "routing": "prefix_affinity"}
    result = load(sections, **more).run(check=True)
    assert result.metrics["memories"]["host"]["hits"] > 0
    assert sum(result.requests["output_tokens"]) == 30 * 50


def test_what_it_resolves_to_reads_back() -> None:
    scenario = load(SCENARIO)
    resolved = scenario.resolved()
    assert resolved["pipeline"]["agent"]["turns"] == {"uniform": {"low": 2, "high": 6}}
    assert resolved["pipeline"]["agent"]["call_tokens"] == {"fixed": {"tokens": 40}}
    assert load(resolved) == scenario


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"turns": 0}, "tokens is 0: give a number of tokens, at least 1 and below 2**40"),
        ({"turns": {"uniform": {"low": 3, "high": 2}}}, "high is 2 and low is 3"),
        ({"turns": {"uniforn": {}}}, "there is no length distribution 'uniforn'"),
        ({"sub_agents": -1}, "sub_agents is -1"),
        ({"sub_agents": 2, "fan_out": 1.5}, "fan_out is 1.5"),
        ({"fan_out_turns": [2]}, "fan_out_turns are turns"),
        ({"turns": 3, "sub_agents": 2, "fan_out_turns": [1, 3]}, "turn 3, the last, answers: give turns below 3"),
        ({"tool_stage": "decode"}, "tool_stage is 'decode'"),
        ({"hash_block_size": 0}, "hash_block_size is 0"),
    ],
)
def test_what_no_agent_can_do_is_refused(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ScenarioError) as caught:
        load({**SCENARIO, "pipeline": {"agent": parameters}})
    assert [message in problem.message for problem in caught.value.problems] == [True]
