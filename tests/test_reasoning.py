"""Pipelines that reason, on small clients: blocks, reads, scores and first visible tokens by formulas written out here.

Every run is under the ledger. Lengths are chosen so that each figure can be recounted by hand.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from kit import sampled
from mist.batching.chunked import Chunked
from mist.batching.continuous import Continuous
from mist.errors import InvariantError, ScenarioError
from mist.metrics import ClientInfo, summarise
from mist.metrics.stages import stage_times
from mist.perf.roofline import Roofline
from mist.pipeline.beam import Beam
from mist.pipeline.best_of_n import BestOfN
from mist.pipeline.multi_turn_reasoning import MultiTurnReasoning
from mist.pipeline.reasoning import Reasoning
from mist.pipeline.thinking import Thinking
from mist.records import DROPPED, FINISHED, PREEMPTED, REJECTED
from mist.request import DECODE, PREFILL, Request, Step
from mist.residents import Residents
from mist.scenario.value import load
from mist.speculation import Speculation
from mist.testing import small_deployment
from mist.testing.cluster import KVLink, LinearSteps, Run, play, table
from mist.workload import RequestTable

STEPS = LinearSteps(base=100, per_prefill_token=10, per_decode=0, per_context=0, per_prefill=0)
READS = LinearSteps(base=1000, per_prefill_token=10, per_decode=3, per_context=1, per_prefill=0)
#: one client that generates, one that scores
APART: list[tuple[str, ...]] = [(PREFILL, DECODE), ("score",)]


def run(pipeline: Any, prompt: int = 10, output: int = 8, **more: Any) -> Run:
    how: dict[str, Any] = {
        "perf": STEPS,
        "num_clients": 2,
        "serves": APART,
        "policy": lambda: Chunked(8192, 256),
    } | more
    return play(table([0], [prompt], [output]), pipeline=pipeline, **how)


def column(result: Run, name: str) -> list[int]:
    columns = result.records.requests.as_columns()
    return [int(value) for value in columns[name][np.argsort(columns["request"])]]


def tasks_of(result: Run, kind: str) -> dict[str, Any]:
    tasks = result.records.tasks.as_columns()
    return {name: values[tasks["kind"] == result.records.stage_kinds.index(kind)] for name, values in tasks.items()}


def steps_of(result: Run, client: int = 0) -> dict[str, Any]:
    steps = result.records.steps.as_columns()
    return {name: values[steps["client"] == client] for name, values in steps.items()}


def holds_nothing(result: Run) -> bool:
    return all(
        not client.residents.kv.used and not client.residents.prefixes and not client.residents.running
        for client in result.clients
    )


# --- one path ---


def test_a_scale_of_one_is_plain_decoding() -> None:
    workload = table([0, 50, 900], [30, 9, 12], [7, 7, 0])
    plain = play(workload, perf=READS)
    for pipeline in (Reasoning(scale=1), BestOfN(n=1, scale=1), BestOfN(n=1, scale=1, select="majority")):
        thinking = play(workload, perf=READS, pipeline=pipeline, merges_shared_reads=True)
        for name in ("requests", "tasks", "steps"):
            assert getattr(thinking.records, name).cells == getattr(plain.records, name).cells


def test_a_thought_is_decoded_like_output_and_shown_like_none() -> None:
    """A step of 200 for the prompt and the first token, then 100 each: of 40 tokens the 33rd is the answer's first."""
    result = run(Reasoning(scale=5))
    plain = run(Reasoning(scale=1), output=40)
    assert result.records.steps.cells == plain.records.steps.cells
    assert column(result, "first_token_ns") == [200 + 32 * 100]
    assert column(result, "end_ns") == [200 + 39 * 100]
    assert (column(result, "output_tokens"), column(plain, "output_tokens")) == ([8], [40])


def test_tokens_that_the_workload_tells_and_a_cap() -> None:
    def thoughts(pipeline: Thinking, sizes: dict[str, int]) -> list[int]:
        return pipeline.thoughts(Request(0, 0, 10, 8, sizes=sizes), lambda: np.random.default_rng(1), 2)

    assert thoughts(Reasoning(scale=5), {}) == [32, 32]
    assert thoughts(Reasoning(scale=5), {"reasoning_tokens": 7}) == [7, 7]
    assert thoughts(Reasoning(scale=5), {"reasoning_tokens": 0}) == [0, 0]
    assert thoughts(Reasoning(scale=5, cv=1), {"reasoning_tokens": 0}) == [0, 0]
    assert thoughts(Reasoning(scale=5, max_thought_tokens=20), {}) == [20, 20]


def test_drawn_lengths_have_the_mean_and_spread_that_were_asked_for() -> None:
    pipeline = Reasoning(cv=0.6)
    request = Request(0, 0, 10, 8, sizes={"reasoning_tokens": 500})
    drawn = np.array(pipeline.thoughts(request, lambda: np.random.default_rng(3), 40_000))
    assert drawn.mean() == pytest.approx(500, rel=0.02)
    assert drawn.std() / drawn.mean() == pytest.approx(0.6, rel=0.03)
    assert drawn.min() >= 1


def test_the_answer_has_the_gaps_between_its_own_tokens() -> None:
    result = run(Reasoning(scale=5), serves=[(PREFILL, DECODE)], num_clients=1, perf=READS)
    metrics = summarise(result.records, clients=[ClientInfo("gpu-0", "gpu", 1 << 40, 16, 256)])
    ends = steps_of(result)["end_ns"]
    assert metrics["ttft_s"]["mean"] * 1e9 == pytest.approx(ends[32])
    gaps = np.diff(ends[32:])
    assert metrics["itl_s"]["mean"] * 1e9 == pytest.approx(gaps.mean())
    assert metrics["itl_s"]["p50"] * 1e9 == pytest.approx(np.median(gaps))


@pytest.mark.parametrize("seed", range(60))
def test_the_first_visible_token_after_preemptions(seed: int) -> None:
    rng = random.Random(seed)
    output = rng.randint(1, 12)
    num = rng.randint(2, 4)
    workload = table([0] * num, [rng.randint(1, 30) for _ in range(num)], [output] * num)
    hidden = rng.randint(1, 20)
    workload.sizes = {"reasoning_tokens": np.full(num, hidden)}
    policy: Any = rng.choice([Chunked, Continuous])
    result = play(
        workload, pipeline=Reasoning(), perf=READS, num_blocks=rng.randint(16, 24), block_size=4,
        policy=lambda: policy(max_num_seqs=4, max_num_batched_tokens=16), caching=rng.random() < 0.5,
    )  # fmt: skip
    requests, tasks = result.records.requests.as_columns(), result.records.tasks.as_columns()
    assert (requests["status"] == FINISHED).all()
    decodes = tasks["kind"] == 1
    steps = steps_of(result)
    ends = steps["end_ns"][steps["num_decodes"] > 0]
    for request, first in zip(requests["request"].tolist(), requests["first_token_ns"].tolist(), strict=True):
        times: list[int] = []
        for row in np.flatnonzero(decodes & (tasks["request"] == request)):
            if tasks["joined_ns"][row] >= 0:
                times.append(int(tasks["joined_ns"][row]))
                times += ends[tasks["join_step"][row] : tasks["last_step"][row]].tolist()
        assert len(times) == hidden + output
        assert first == times[hidden]
    assert column(result, "output_tokens") == [output] * num


def test_the_first_visible_token_of_verified_drafts() -> None:
    """All drafts are accepted, so 39 tokens take ten steps, evenly: 32 of them, 3.9 a step, are there after nine."""
    speculation = Speculation(3, 1.0, lambda request, stage: np.random.default_rng((request, stage)))
    result = run(Reasoning(scale=5), speculation=speculation)
    assert column(result, "first_token_ns") == [200 + 9 * 100]
    assert column(result, "end_ns") == [200 + 10 * 100]


def test_a_thought_decoded_on_another_client_is_hidden_there() -> None:
    result = run(Reasoning(scale=5), serves=[(PREFILL,), (DECODE,)], nic=KVLink(10, 1e9))
    joined = 200 + 100
    assert column(result, "first_token_ns") == [joined + 32 * 100]


def test_thoughts_longer_than_the_cache_are_rejected() -> None:
    result = run(Reasoning(scale=50), num_blocks=10, block_size=4)
    assert column(result, "status") == [REJECTED]
    assert "more tokens than the KV cache" in result.records.reasons[0]
    assert holds_nothing(result)
    several = run(BestOfN(scale=50), num_blocks=10, block_size=4)
    assert column(several, "status") == [REJECTED]
    assert holds_nothing(several)


# --- best of n ---


@pytest.mark.parametrize("prompt", [16, 21, 64])
@pytest.mark.parametrize("n", [2, 5, 16])
@pytest.mark.parametrize("select", ["reward", "majority"])
def test_the_kv_peak_is_the_prompt_once_and_every_thought(prompt: int, n: int, select: Any) -> None:
    """Of 40 tokens each in blocks of 4: the prompt's full blocks once, and what lies behind them for each."""
    result = run(BestOfN(n=n, select=select), prompt, block_size=4)
    full = prompt // 4
    assert steps_of(result)["kv_blocks"].max() == full + n * (-(-(prompt + 39) // 4) - full)
    assert holds_nothing(result)


def test_a_reward_model_reads_prompt_and_thought_of_each_as_it_ends() -> None:
    result = run(BestOfN(n=5, cv=0.8), 40, perf=READS)
    thoughts, scores = tasks_of(result, DECODE), tasks_of(result, "score")
    assert len(set(thoughts["generated_tokens"].tolist())) == 5
    assert scores["computed_tokens"].tolist() == sorted(40 + thoughts["generated_tokens"])
    assert sorted(scores["queued_ns"].tolist()) == sorted(thoughts["end_ns"].tolist())
    steps = steps_of(result, 1)
    took = (steps["end_ns"] - steps["start_ns"]).tolist()
    assert took == [1000 + 10 * tokens for tokens in steps["num_prefill_tokens"].tolist()]
    assert steps["num_prefill_tokens"].sum() == scores["computed_tokens"].sum()


def test_the_answer_is_shown_when_it_is_chosen() -> None:
    """Four of 40 tokens end together; their rewards take a step of 100 and 10 a token."""
    result = run(BestOfN())
    end = 200 + 39 * 100 + 100 + 10 * 4 * 50
    assert column(result, "end_ns") == column(result, "first_token_ns") == [end]
    assert column(result, "output_tokens") == [8]
    voted = run(BestOfN(select="majority"))
    assert column(voted, "end_ns") == column(voted, "first_token_ns") == [200 + 39 * 100]


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_the_first_k_decide_and_the_rest_frees_all(k: int) -> None:
    result = run(BestOfN(n=5, k=k, cv=0.8, select="majority"))
    rng = np.random.default_rng((7, 0))
    lengths = sorted(8 + thought for thought in BestOfN(cv=0.8).thoughts(Request(0, 0, 10, 8), lambda: rng, 5))
    assert column(result, "end_ns") == [200 + (lengths[k - 1] - 1) * 100]
    thoughts = tasks_of(result, DECODE)
    assert (thoughts["how"] == DROPPED).sum() == 5 - k
    assert set(thoughts["generated_tokens"][thoughts["how"] == DROPPED].tolist()) <= {lengths[k - 1]}
    assert column(result, "output_tokens") == [8]
    assert holds_nothing(result)


@pytest.mark.parametrize("select", ["reward", "majority"])
def test_the_same_thoughts_under_every_policy_and_number(select: Any) -> None:
    workload = table([0, 10, 20], [30, 9, 12], [7, 9, 11])

    def lengths(n: int, policy: Any, num_clients: int) -> list[list[int]]:
        kinds = ((PREFILL, DECODE, "score"),) * num_clients
        result = play(workload, pipeline=BestOfN(n=n, cv=1, select=select), perf=READS, num_clients=num_clients,
                      serves=kinds, policy=policy)  # fmt: skip
        tasks = tasks_of(result, DECODE)
        by_stage = np.argsort(tasks["stage_index"], kind="stable")
        return [tasks["generated_tokens"][by_stage][tasks["request"][by_stage] == i].tolist() for i in range(3)]

    some = lengths(3, Chunked, 1)
    assert some == lengths(3, lambda: Continuous(max_num_seqs=2), 1) == lengths(3, Chunked, 2)
    assert [each[:3] for each in lengths(6, Chunked, 1)] == some


# --- merged reads ---


@pytest.mark.parametrize("prompt", [3, 16, 61])
@pytest.mark.parametrize("n", [1, 2, 7])
def test_merged_reads_count_the_shared_blocks_once(prompt: int, n: int) -> None:
    """In blocks of 4, of which n decodes share the prompt's full ones."""
    workload = BestOfN(n=n, select="majority")
    apart, merged = (run(workload, prompt, block_size=4, perf=READS, merges_shared_reads=on) for on in (False, True))
    single = run(BestOfN(n=1), prompt, block_size=4, perf=READS)
    contexts = [steps_of(result)["decode_context"][1:] for result in (apart, merged, single)]
    assert contexts[0].tolist() == [n * (prompt + i + 1) for i in range(39)]
    assert (contexts[0] - contexts[1]).tolist() == [(n - 1) * (prompt // 4 * 4)] * 39
    times = [np.diff(steps_of(result)["end_ns"]) for result in (apart, merged, single)]
    assert times[1].tolist() == (1000 + 3 * n + contexts[1]).tolist()
    assert (times[2] <= times[1]).all()
    assert (times[1] <= times[0]).all()
    assert (times[0] <= n * times[2]).all()


def test_merged_reads_in_the_time_of_a_real_step() -> None:
    """The attention of 16 thoughts over a prompt of 4,096 reads it once; everything else stays."""
    model = Roofline()
    model.prepare(small_deployment())
    alone, apart, merged = (
        {o.name: o.time_ns for o in model.explain(Step(n, context, num_sampled=n))}
        for n, context in ((1, 4196), (16, 16 * 4196), (16, 4096 + 16 * 100))
    )
    attention = "attention_decode"
    assert alone[attention] < merged[attention] < apart[attention] < 16 * alone[attention]
    assert {name: t for name, t in apart.items() if name != attention} == {
        name: t for name, t in merged.items() if name != attention
    }


def test_reads_that_are_merged_wrongly_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Residents, "shared_context", 8)
    with pytest.raises(InvariantError, match=r"gpu-0: decode context: \d+ is not \d+"):
        run(BestOfN(select="majority"), 21, block_size=4, merges_shared_reads=True)


def test_reads_are_merged_while_they_are_shared() -> None:
    """Thoughts of 10, 20 and 40 tokens: the prompt's 16 tokens are counted twice too often, then once, then rightly."""
    pipeline = BestOfN(n=3, select="majority")
    pipeline.thoughts = lambda request, rng, num_thoughts: [2, 12, 32]  # type: ignore[method-assign]
    apart, merged = (run(pipeline, 16, block_size=4, perf=READS, merges_shared_reads=on) for on in (False, True))
    saved = steps_of(apart)["decode_context"] - steps_of(merged)["decode_context"]
    assert saved.tolist() == [0, *[32] * 9, *[16] * 10, *[0] * 20]


def test_merged_reads_of_drafts() -> None:
    speculation = Speculation(3, 1.0, lambda request, stage: np.random.default_rng((request, stage)))
    apart, merged = (
        run(BestOfN(select="majority"), 21, block_size=4, speculation=speculation, merges_shared_reads=on)
        for on in (False, True)
    )
    saved = steps_of(apart)["decode_context"] - steps_of(merged)["decode_context"]
    assert saved.tolist() == [0, *[3 * 20] * 10]


def test_merged_reads_are_an_option_of_a_pool() -> None:
    sections = {
        "workload": {"arrivals": "all_at_once", "num_requests": 2, "input_tokens": 900, "output_tokens": 20},
        "clients": {"gpu": {"device": "h100-sxm", "model": "llama-3.1-8b", "kv_cache": {"merge_shared_reads": True}}},
        "pipeline": {"best_of_n": {"n": 8, "select": "majority"}},
        "perf": "roofline",
    }
    merged = load(sections)
    assert load(merged.resolved()).resolved() == merged.resolved()
    apart = load({**sections, "clients": {"gpu": {"device": "h100-sxm", "model": "llama-3.1-8b"}}})
    ends = [scenario.run(check=True).metrics["e2e_s"]["mean"] for scenario in (merged, apart)]
    assert ends[0] < ends[1]
    sections["clients"]["gpu"] |= {"model": "deepseek-v2-lite"}  # type: ignore[index]
    with pytest.raises(ScenarioError, match="reads of latent attention"):
        load(sections)


# --- several turns ---


@pytest.mark.parametrize(("caching", "found"), [(False, [0, 0, 0]), (True, [0, 12, 24])])
def test_each_turn_reads_everything_so_far(caching: bool, found: list[int]) -> None:
    """Turns of 2 + 2 tokens and 8 added, on a prompt of 10: the 13 tokens computed then are three blocks of 4."""
    pipeline = MultiTurnReasoning(scale=2, turn_tokens=8)
    result = run(pipeline, output=2, block_size=4, caching=caching)
    prefills = tasks_of(result, PREFILL)
    assert prefills["cached_tokens"].tolist() == found
    assert (prefills["computed_tokens"] + prefills["cached_tokens"]).tolist() == [10, 22, 34]
    assert column(result, "output_tokens") == [2]
    last = tasks_of(result, DECODE)
    assert column(result, "first_token_ns") == [int(last["joined_ns"][-1]) + 2 * 100]
    assert holds_nothing(result)


def test_a_turn_finds_nothing_on_another_client() -> None:
    both: list[tuple[str, ...]] = [(PREFILL, DECODE)] * 2
    result = run(MultiTurnReasoning(scale=2, turn_tokens=8), output=2, block_size=4, caching=True, serves=both)
    assert tasks_of(result, PREFILL)["client"].tolist() == [0, 1, 0]  # round robin
    assert tasks_of(result, PREFILL)["cached_tokens"].tolist() == [0, 0, 12]


def test_a_turn_computes_what_others_have_evicted() -> None:
    """Two requests whose contexts don't fit side by side for long: less is found, and nothing is lost."""
    workload = table([0, 0], [40, 40], [8, 8])
    roomy, narrow = (
        play(workload, pipeline=MultiTurnReasoning(scale=3), perf=STEPS, block_size=4, caching=True, num_blocks=blocks)
        for blocks in (1000, 84)
    )
    found = [int(tasks_of(result, PREFILL)["cached_tokens"].sum()) for result in (roomy, narrow)]
    assert found[1] < found[0]
    assert column(narrow, "status") == [FINISHED] * 2


# --- beams ---


def test_a_beam_is_a_prefill_per_survivor_and_a_score_per_continuation() -> None:
    pipeline = Beam(width=2, expansion=3, rounds=3, round_tokens=5)
    result = run(pipeline, output=4, block_size=4)
    prefills, scores = tasks_of(result, PREFILL), tasks_of(result, "score")
    assert sorted(prefills["computed_tokens"].tolist()) == [10, 15, 15, 20, 20, 25]
    assert sorted(scores["computed_tokens"].tolist()) == [15] * 6 + [20] * 6 + [25] * 6
    decodes = tasks_of(result, DECODE)
    assert sorted(decodes["generated_tokens"].tolist()) == [4, *[5] * 18]
    assert column(result, "output_tokens") == [4]
    assert column(result, "first_token_ns") == [int(decodes["joined_ns"].max())]
    assert holds_nothing(result)


def test_a_round_holds_each_beam_once_and_its_continuations() -> None:
    """The last of three rounds is the largest: of 2 beams with 16 + 10 tokens, each is held once, with 3 tails of 5."""
    result = run(Beam(width=2, expansion=3, rounds=3, round_tokens=5), 16, block_size=4)
    behind = -(-(26 + 4) // 4) - 26 // 4
    assert steps_of(result)["kv_blocks"].max() == 2 * (26 // 4 + 3 * behind)


def test_a_beam_finds_its_prompt_in_the_prefix_cache() -> None:
    workload = table([0], [16], [4], keys=[(1, 2)])
    workload.hash_block_size = 8
    result = play(workload, pipeline=Beam(width=2, expansion=2, rounds=2, round_tokens=5), perf=STEPS, num_clients=2,
                  serves=APART, block_size=4, caching=True, unit_tokens=8)  # fmt: skip
    assert tasks_of(result, PREFILL)["cached_tokens"].tolist() == [0, 16, 16, 16]


# --- all of them ---


def anything(rng: random.Random) -> Any:
    """A pipeline that reasons, with small lengths."""
    scale, cv, n = rng.choice([1, 2, 4.5]), rng.choice([0, 0.7]), rng.randint(1, 5)
    return rng.choice(
        [
            Reasoning(scale, cv),
            BestOfN(scale, cv, n=n, k=rng.choice([None, 1, n]), select=rng.choice(["reward", "majority"])),
            MultiTurnReasoning(scale, cv, turns=rng.randint(1, 4), turn_tokens=rng.randint(1, 9)),
            Beam(rng.randint(1, 3), rng.randint(1, 3), rng.randint(1, 3), rng.randint(1, 9), cv),
        ]
    )


def prompts(rng: random.Random, caching: bool) -> RequestTable:
    num = rng.randint(1, 8)
    keys = [tuple(rng.choice([(1, 2, 3), (1, 2, 4), (5,)])) for _ in range(num)]
    workload = table(sorted(rng.randrange(20_000) for _ in range(num)), [rng.randint(1, 60) for _ in range(num)],
                     [rng.randint(0, 9) for _ in range(num)], keys=keys if caching else None)  # fmt: skip
    workload.hash_block_size = 8 if caching else 0
    if rng.random() < 0.3:
        workload.sizes = {"reasoning_tokens": np.array([rng.randint(0, 25) for _ in range(num)])}
    return workload


@pytest.mark.parametrize("seed", sampled(range(400), 100))
def test_random_reasoning_obeys_the_laws(seed: int) -> None:
    rng = random.Random(seed)
    caching, pipeline = rng.random() < 0.5, anything(rng)
    apart = rng.random() < 0.3
    serves = [("score", PREFILL), (PREFILL,), (DECODE,)] if apart else [(PREFILL, DECODE, "score"), (PREFILL, DECODE)]
    draws = Speculation(2, 0.5, lambda request, stage: np.random.default_rng((request, stage)))
    until = rng.choice([1 << 62, 1 << 62, rng.randrange(1, 60_000)])
    result = play(
        prompts(rng, caching), pipeline=pipeline, num_clients=len(serves), serves=serves,
        nic=KVLink(rng.randint(1, 50), 1e9, rng.choice([0, 500])), num_blocks=rng.choice([40, 60, 1000]), block_size=4,
        policy=lambda: (Chunked if rng.random() < 0.5 else Continuous)(
            max_num_seqs=rng.randint(1, 6), max_num_batched_tokens=rng.randint(18, 64)),
        caching=caching, unit_tokens=8 if caching else 0, until_ns=until, merges_shared_reads=rng.random() < 0.7,
        speculation=draws if rng.random() < 0.2 else None,
    )  # fmt: skip
    if until < 1 << 62:
        return
    requests, tasks = result.records.requests.as_columns(), result.records.tasks.as_columns()
    finished = requests["status"] == FINISHED
    assert (finished | (requests["status"] == REJECTED)).all()
    assert holds_nothing(result)
    asked = result.coordinator.tenants[0].workload.output_tokens[requests["request"]]
    assert (requests["output_tokens"] == asked)[finished].all()
    rows = {name: values[finished] for name, values in requests.items()}
    order = np.argsort(tasks["request"], kind="stable")
    by_request = {name: values[order] for name, values in tasks.items()}
    times = stage_times(rows, by_request, len(result.records.stage_kinds), result.records.transfers.as_columns())
    assert times.sum(axis=(1, 2)).tolist() == (rows["end_ns"] - rows["arrival_ns"]).tolist()
    assert times.min(initial=0) >= 0


def test_random_reasoning_reaches_what_it_is_meant_to() -> None:
    """Preemptions while blocks are shared, with merged reads: the scenarios above are narrow enough."""
    pipeline = BestOfN(n=4, cv=0.7, select="majority")
    workload = table([0, 100, 200], [20, 31, 17], [6, 7, 8])
    result = play(workload, pipeline=pipeline, perf=READS, num_blocks=40, block_size=4, merges_shared_reads=True,
                  policy=lambda: Chunked(max_num_seqs=12, max_num_batched_tokens=64))  # fmt: skip
    assert (result.records.tasks.as_columns()["how"] == PREEMPTED).sum() > 3
    assert column(result, "status") == [FINISHED] * 3
