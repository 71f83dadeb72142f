"""Speculative decoding: the distribution of accepted drafts, its closed forms in whole runs, prices, and scenarios.

Bit-for-bit agreement with the naive scheduler is in `test_reference.py`. The ledger is on in every run here.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from kit import POLICIES, LinearSteps, play, table
from mist.batching import BatchingPolicy
from mist.batching.chunked import Chunked
from mist.cohort import Cohort
from mist.errors import InvariantError
from mist.hardware import Device, Platform
from mist.metrics.tokens import DecodeSteps, Segments, tokens_by_client
from mist.metrics.window import Window
from mist.model import LatentAttention, LayerGroup, ModelSpec
from mist.perf import Deployment
from mist.perf.drafted import Drafted
from mist.perf.operators import forward_pass
from mist.perf.roofline import Roofline
from mist.records import FINISHED, REJECTED
from mist.request import DECODE, PREFILL, Step
from mist.scenario import catalogue
from mist.speculation import PACE_BITS, AcceptedLengths, Speculation, SpeculativeCohort
from mist.testing import random_scenario, record_bytes, small_deployment

DRAFTS = [(1, 0.3), (2, 0.9), (3, 0.6), (5, 0.25), (8, 0.55)]


def speculation(k: int, acceptance: float, seed: int = 0) -> Speculation:
    return Speculation(k, acceptance, lambda *key: np.random.default_rng((seed, *key)))


def emitted_probabilities(s: Speculation) -> list[float]:
    """P(a step emits 1, 2, ..., k + 1 tokens)."""
    at_least = [1.0, *s._thresholds[::-1].tolist(), 0.0]
    return [here - following for here, following in pairwise(at_least)]


def mean_steps(s: Speculation, num_tokens: int) -> tuple[float, float]:
    """Mean and variance of the steps that `num_tokens` take, by the renewal recursion."""
    probabilities = emitted_probabilities(s)
    first, second = [0.0], [0.0]
    for n in range(1, num_tokens + 1):
        before = [(p, max(0, n - i)) for i, p in enumerate(probabilities, 1)]
        first.append(1 + sum(p * first[m] for p, m in before))
        second.append(1 + sum(p * (2 * first[m] + second[m]) for p, m in before))
    return first[-1], second[-1] - first[-1] ** 2


# --- the distribution ---


@pytest.mark.parametrize(("k", "acceptance"), [*DRAFTS, (3, 0.0), (3, 1.0)])
def test_the_mean_of_accepted_drafts_is_exact(k: int, acceptance: float) -> None:
    s = speculation(k, acceptance)
    probabilities = emitted_probabilities(s)
    assert sum(probabilities) == pytest.approx(1, abs=1e-12)
    assert sum(i * p for i, p in enumerate(probabilities, 1)) == pytest.approx(1 + k * acceptance, abs=1e-12)
    assert s.tokens_per_step == 1 + k * acceptance


@pytest.mark.parametrize(("k", "acceptance"), DRAFTS)
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 40])
def test_steps_drawn_have_the_mean_of_the_renewal_process(k: int, acceptance: float, num_tokens: int) -> None:
    s, rng, draws = speculation(k, acceptance), np.random.default_rng(1), 4000
    drawn = np.array([s.num_steps(num_tokens, rng) for _ in range(draws)])
    mean, variance = mean_steps(s, num_tokens)
    assert abs(drawn.mean() - mean) <= 3.9 * math.sqrt(variance / draws) + 1e-9  # alpha = 1e-4
    assert drawn.min() >= -(-num_tokens // (k + 1))
    assert drawn.max() <= num_tokens


@pytest.mark.parametrize(("k", "acceptance"), DRAFTS)
def test_a_long_answer_emits_one_and_the_accepted_per_step(k: int, acceptance: float) -> None:
    s, num_tokens = speculation(k, acceptance), 400_000
    steps = s.num_steps(num_tokens, np.random.default_rng(3))
    moments = [sum(i**m * p for i, p in enumerate(emitted_probabilities(s), 1)) for m in (1, 2)]
    error = 3.9 * math.sqrt((moments[1] - moments[0] ** 2) / steps) + (k + 1) / steps
    assert abs(num_tokens / steps - (1 + k * acceptance)) <= error


@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4, 5, 100, 1023])
def test_all_or_nothing_is_certain(k: int, num_tokens: int) -> None:
    rng = np.random.default_rng(0)
    assert speculation(k, 0.0).num_steps(num_tokens, rng) == num_tokens
    assert speculation(k, 1.0).num_steps(num_tokens, rng) == -(-num_tokens // (k + 1))


def test_a_longer_answer_takes_the_same_path_further() -> None:
    s = speculation(3, 0.6)
    steps = [s.num_steps(n, np.random.default_rng(5)) for n in range(1, 300)]
    assert all(0 <= following - before <= 1 for before, following in pairwise(steps))


# --- acceptance as it was measured ---

MEASURED = catalogue.names("acceptance")


def measured(name: str) -> AcceptedLengths:
    value, _ = catalogue.read("acceptance", name, Path())
    assert isinstance(value, AcceptedLengths)
    return value


def test_measured_curves_have_a_source_and_can_be() -> None:
    assert len(MEASURED) == 14
    for name in MEASURED:
        curve = measured(name)
        assert curve.sources["accepted_lengths"]
        assert curve.model
        assert curve.method in ("mtp", "eagle3", "dspark")
        assert name.startswith(curve.model.lower())
        assert all(1 <= length <= k + 1 for k, length in enumerate(curve.accepted_lengths, 1))


GOLDEN = Path(os.environ.get("MIST_DATA", "")) / "profiles" / "acceptance" / "golden_al_distribution"


@pytest.mark.skipif("MIST_DATA" not in os.environ or not GOLDEN.is_dir(), reason="MIST_DATA has no acceptance lengths")
def test_measured_curves_are_those_published() -> None:
    published = {}
    for path in GOLDEN.glob("*.yaml"):
        ((_, modes),) = yaml.safe_load(path.read_text()).items()
        for mode, curve in modes.items():
            published[path.name, mode.removeprefix("thinking_")] = tuple(curve[k] for k in sorted(curve))
    ours = {}
    for name in MEASURED:
        source = measured(name).sources["accepted_lengths"]
        (file,) = (word.strip(",") for word in source.split() if word.endswith(".yaml,"))
        ours[file, source.split()[-1]] = measured(name).accepted_lengths
    assert ours == published


@pytest.mark.parametrize("name", MEASURED)
def test_tokens_per_verify_step_are_those_measured(name: str) -> None:
    """1 + k x (accepted / drafted): exactly as a mean, and within sampling error of the steps drawn."""
    for k, length in enumerate(measured(name).accepted_lengths, 1):
        s = speculation(k, (length - 1) / k)
        probabilities = emitted_probabilities(s)
        assert sum(i * p for i, p in enumerate(probabilities, 1)) == pytest.approx(length, abs=1e-12)
        num_tokens = 50_000
        steps = s.num_steps(num_tokens, np.random.default_rng(k))
        variance = sum(i * i * p for i, p in enumerate(probabilities, 1)) - length**2
        assert abs(num_tokens / steps - length) <= 4.5 * math.sqrt(variance / steps) + (k + 1) / steps


# --- whole runs ---


@pytest.mark.parametrize("policy", POLICIES)
def test_without_drafts_a_speculating_client_decodes_as_ever(policy: type[BatchingPolicy]) -> None:
    for seed in range(60):
        scenario = random_scenario(seed)
        plain, speculating = (scenario.play(policy, speculation=s) for s in (None, speculation(0, 0.5)))
        assert record_bytes(plain.records) == record_bytes(speculating.records)


@pytest.mark.parametrize(("k", "output"), [(1, 8), (3, 9), (3, 10), (3, 1), (3, 2), (5, 40)])
@pytest.mark.parametrize("acceptance", [0, 1])
def test_a_lone_answer_is_a_closed_form(k: int, output: int, acceptance: int) -> None:
    """Each of S steps computes k + 1 tokens over a context that grows by 1 + k x acceptance."""
    steps, gain = LinearSteps(), 1 + k * acceptance
    played = play(table([0], [20], [output]), perf=steps, speculation=speculation(k, acceptance))
    num_steps = -(-(output - 1) // gain)
    exact = [20 + (j * (output - 1) / num_steps if acceptance else j) for j in range(num_steps)]
    contexts = [math.floor(c + 1e-9) + k + 1 for c in exact]
    rows = played.records.steps.as_columns()
    assert rows["decode_context"].tolist() == [0, *contexts]
    end = steps.of(20, 0, 0, 1) + sum(steps.of(0, 1, c, 0) for c in contexts)
    request = played.records.requests.as_columns()
    assert (request["end_ns"][0], request["output_tokens"][0]) == (end, output)


@pytest.mark.parametrize("acceptance", [0.0, 0.37, 1.0])
def test_blocks_hold_the_drafts_too(acceptance: float) -> None:
    """While a step runs, a lone sequence holds blocks for its context and k + 1 tokens, and no more."""
    size, k, output = 4, 6, 61
    played = play(table([0], [10], [output]), block_size=size, speculation=speculation(k, acceptance))
    rows, task = (t.as_columns() for t in (played.records.steps, played.records.tasks))
    held, contexts = rows["kv_blocks"].tolist()[1:], rows["decode_context"].tolist()[1:]
    assert held == [-(-context // size) for context in contexts]  # that of a step includes its k + 1 tokens
    assert int(task["generated_tokens"][-1]) == output


def test_tokens_per_step_in_a_run() -> None:
    k, acceptance, count, output = 3, 0.6, 3000, 200
    s = speculation(k, acceptance)
    played = play(table([0] * count, [8] * count, [output] * count), speculation=s, ledger=False)
    task = {name: column[column.size and slice(None)] for name, column in played.records.tasks.as_columns().items()}
    joined = task["join_step"] >= 0
    steps = (task["last_step"] - task["join_step"])[joined]
    mean, variance = mean_steps(s, output - 1)
    assert abs(steps.mean() - mean) <= 3.9 * math.sqrt(variance / count)
    # what the last steps drop is part of the mean: 1 + k x acceptance tokens are verified per step
    surplus = mean * s.tokens_per_step - (output - 1)
    assert 0 < surplus < k
    assert (output - 1 + surplus) / steps.mean() == pytest.approx(1 + k * acceptance, rel=0.005)


def test_paths_do_not_depend_on_the_policy() -> None:
    """Roomy or preempting, chunked or not: a request has one pace for life."""
    arrivals, prompts, outputs = [0] * 12, [9] * 12, [40] * 12
    paces = set()
    for policy, num_blocks in ((Chunked, 1000), (Chunked, 40), *((p, 60) for p in POLICIES)):
        seen: dict[int, int] = {}
        original = SpeculativeCohort._drop

        def drop(cohort: Any, task: Any, seen: dict[int, int] = seen, original: Any = original) -> None:
            assert seen.setdefault(task.request.index, task.pace) == task.pace
            original(cohort, task)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SpeculativeCohort, "_drop", drop)
            play(table(arrivals, prompts, outputs), policy=policy, num_blocks=num_blocks, block_size=4,
                 speculation=speculation(3, 0.5))  # fmt: skip
        paces.add(tuple(sorted(seen.items())))
    assert len(paces) == 1
    assert all((1 << PACE_BITS) <= pace <= (4 << PACE_BITS) for _, pace in paces.pop())


@pytest.mark.parametrize("seed", range(20))
def test_windows_share_out_all_tokens(seed: int) -> None:
    played = random_scenario(seed).play(speculation=speculation(4, 0.7))
    records = played.records
    ends = DecodeSteps.of(records.steps.as_columns(), 1)
    segments = Segments.of(records.tasks.as_columns(), ends)
    whole = Window.of(records, (None, None))
    middle = (whole.start_ns + whole.end_ns) // 2
    parts = [tokens_by_client(segments, ends, Window.of(records, w)).sum() for w in ((None, middle), (middle, None))]
    total = int(records.requests.as_columns()["output_tokens"].sum())
    assert tokens_by_client(segments, ends, whole).sum() == total
    assert sum(parts) == total


def test_the_ledger_sees_lost_blocks_and_contexts(monkeypatch: pytest.MonkeyPatch) -> None:
    original = SpeculativeCohort.join
    for plant, says in (
        (lambda cohort: cohort.new_blocks.clear(), "block boundaries"),
        (lambda cohort: setattr(cohort, "sum_context", cohort.sum_context + 1), "cohort context"),
        (lambda cohort: cohort.calendar.clear(), "missing in the calendar"),
    ):

        def join(cohort: Any, task: Any, num_tokens: int, plant: Any = plant) -> None:
            original(cohort, task, num_tokens)
            plant(cohort)

        monkeypatch.setattr(SpeculativeCohort, "join", join)
        with pytest.raises(InvariantError, match=says):
            play(table([0], [9], [30]), block_size=4, speculation=speculation(3, 0.5))


def test_leaving_early_takes_the_plan_along() -> None:
    cohort = SpeculativeCohort(4, speculation(3, 0.5))
    assert isinstance(cohort, Cohort)
    assert cohort.tokens_per_decode == 4
    scenario = random_scenario(3)
    played = scenario.play(speculation=speculation(2, 0.4))
    left = played.clients[0].residents.cohort
    assert isinstance(left, SpeculativeCohort)
    assert (left.count, left.sum_context) == (0, 0)
    assert not any(left.new_blocks.values())


# --- limits and memory ---


@pytest.mark.parametrize(("k", "acceptance"), [(1, 0.5), (3, 0.0), (3, 0.6), (7, 1.0)])
def test_a_budget_counts_every_drafted_token(k: int, acceptance: float) -> None:
    """A prompt gets what the k + 1 tokens of each decode leave of the budget, whatever is accepted."""
    seqs, chunk = 6, 5
    budget = seqs * (k + 1) + chunk
    prompts = [40] * 12
    played = play(table([i * 100 for i in range(12)], prompts, [30] * 12), speculation=speculation(k, acceptance),
                  policy=lambda: Chunked(max_num_seqs=seqs, max_num_batched_tokens=budget))  # fmt: skip
    rows = played.records.steps.as_columns()
    tokens = rows["num_prefill_tokens"] + rows["num_decodes"] * (k + 1)
    assert tokens.max() == budget
    is_mixed = (rows["num_decodes"] > 0) & (rows["num_prefill_tokens"] > 0)
    assert is_mixed.any()
    left = budget - rows["num_decodes"] * (k + 1)
    assert (rows["num_prefill_tokens"] <= left).all()
    assert int(rows["num_prefill_tokens"].sum()) == sum(prompts)


@pytest.mark.parametrize(("k", "acceptance"), [(1, 0.5), (3, 0.0), (3, 1.0), (5, 0.4)])
def test_what_just_fits_leaves_room_for_the_drafts(k: int, acceptance: float) -> None:
    """A request needs blocks for its context, but the last token, and k drafts: with one block fewer it is rejected."""
    size, prompt, output = 4, 10, 23
    needed = -(-(prompt + output - 1 + k) // size)
    for blocks, status in ((needed, FINISHED), (needed - 1, REJECTED)):
        played = play(table([0], [prompt], [output]), block_size=size, num_blocks=blocks,
                      speculation=speculation(k, acceptance))  # fmt: skip
        assert played.records.requests.as_columns()["status"].tolist() == [status]


@pytest.mark.parametrize("acceptance", [0.0, 1.0])
def test_look_ahead_preempts_where_plain_decoding_would_not(acceptance: float) -> None:
    """Two requests that fill the pool to the last block without drafts: the look-ahead of k tokens doesn't fit."""
    size, k, prompt, output = 4, 4, 8, 13
    blocks = 2 * -(-(prompt + output - 1) // size)
    given = table([0, 0], [prompt] * 2, [output] * 2)
    plain, drafted = (play(given, block_size=size, num_blocks=blocks, speculation=s)
                      for s in (None, speculation(k, acceptance)))  # fmt: skip
    for played, is_preempted in ((plain, False), (drafted, True)):
        requests = played.records.requests.as_columns()
        assert bool(requests["num_preemptions"].sum()) == is_preempted
        assert requests["output_tokens"].tolist() == [output] * 2
        assert (requests["status"] == FINISHED).all()
        assert played.clients[0].residents.kv.used == 0


@pytest.mark.parametrize("acceptance", [0.0, 0.5, 1.0])
def test_only_the_client_that_decodes_on_reserves_drafts(acceptance: float) -> None:
    """Handed over, a decode needs room for its drafts where it goes on; the prefill client holds the context alone."""
    size, k, prompt, output = 4, 3, 16, 9
    played = play(table([0], [prompt], [output]), block_size=size, num_clients=2, serves=[(PREFILL,), (DECODE,)],
                  speculation=speculation(k, acceptance))  # fmt: skip
    rows = played.records.steps.as_columns()
    held = {client: rows["kv_blocks"][rows["client"] == client].tolist() for client in (0, 1)}
    assert held[0] == [prompt // size]
    assert held[1][0] == -(-(prompt + k + 1) // size)


def test_costs_of_drafts_and_verification_make_the_speed_up() -> None:
    """A lone long answer: S steps of (1 + k x cost) verifications against n plain steps, S = n / (1 + k x share)."""
    k, cost, output = 3, 0.1, 60_001
    base = 1_000_000  # neither tokens nor contexts cost anything: verification is a plain step
    flat = LinearSteps(base=base, per_prefill_token=0, per_decode=0, per_context=0, per_prefill=0)
    for acceptance, tolerance in ((0.0, 0.0), (0.6, 0.012), (1.0, 0.0)):
        ends = []
        for perf, s in ((flat, None), (Drafted(flat, k, draft_cost=cost), speculation(k, acceptance))):
            played = play(table([0], [1], [output]), perf=perf, speculation=s, ledger=False)
            requests = played.records.requests.as_columns()
            ends.append(int(requests["end_ns"][0] - requests["first_token_ns"][0]))
        speed_up = (1 + k * acceptance) / (1 + k * cost)
        assert ends[0] / ends[1] == pytest.approx(speed_up, rel=tolerance or 1e-9)


# --- prices ---

LATENT = LatentAttention(q_lora_rank=96, kv_lora_rank=64, qk_nope_size=32, rope_size=16, v_size=24)
MODELS = {
    "grouped": ModelSpec("grouped", (LayerGroup(2, 256, 8, 2, 32, 512),), 1000, False, 4096),
    "latent": ModelSpec("latent", (LayerGroup(2, 256, 8, 8, 48, 512, latent=LATENT),), 1000, False, 4096),
}


def deployment(name: str, q: int) -> Deployment:
    device = Device("test", {"bf16": 100e12}, 16 << 30, 1e12)
    return Deployment(MODELS[name], Platform(device), "bf16", "bf16", 512, 64, tokens_per_decode=q)


@pytest.mark.parametrize("name", MODELS)
def test_a_context_is_read_once_for_all_queries(name: str) -> None:
    one, four = ({o.name: o for o in forward_pass(deployment(name, q))} for q in (1, 4))
    assert one.keys() == four.keys()
    for key, o in four.items():
        if o.driver != "decodes":
            assert o == one[key]
            continue
        assert o.flop == {driver: 4 * n for driver, n in one[key].flop.items()}
        assert o.bytes.get("decode_context") == one[key].bytes.get("decode_context")
        assert o.bytes.get("decodes") == 4 * one[key].bytes.get("decodes", math.nan)
        assert (o.weight_bytes, o.kv_bytes) == (one[key].weight_bytes, one[key].kv_bytes)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("chunks", [[], [(100, 30)]])
def test_dense_layers_and_classifier_see_every_drafted_token(name: str, chunks: list[tuple[int, int]]) -> None:
    q, n, tokens = 4, 10, sum(c for c, _ in chunks)
    models = {size: Roofline() for size in (1, q)}
    for size, model in models.items():
        model.prepare(deployment(name, size))
    step = Step(n, n * 500, chunks, tokens, n * q, q)
    assert step.num_tokens == tokens + n * q
    found = {o.name: o for o in models[q].explain(step)}
    as_many = {o.name: o for o in models[1].explain(Step(n * q, n * 500, chunks, tokens, n * q))}
    for key, o in found.items():
        if key != "attention_decode":
            assert (o.flop, o.time_ns) == pytest.approx((as_many[key].flop, as_many[key].time_ns))
    assert found["attention_decode"].bytes == pytest.approx(as_many["attention_decode"].bytes)
    assert sum(o.time_ns for o in found.values()) == pytest.approx(models[q].step_time(step), abs=1.01)
    assert models[q].floor_time(step) <= models[q].step_time(step)
    assert models[q].step_time(step) >= models[1].step_time(replace(step, num_sampled=n, tokens_per_decode=1))


def prepared(q: int = 1) -> Roofline:
    model = Roofline()
    model.prepare(replace(small_deployment(), tokens_per_decode=q))
    return model


def test_drafts_take_k_passes_and_the_prefills_one() -> None:
    k, n, context = 3, 12, 12 * 700
    target, draft = prepared(k + 1), prepared()
    drafted = Drafted(target, k, draft)
    decodes = Step(n, context, num_sampled=n)
    step = Step(n, context, num_sampled=n * (k + 1), tokens_per_decode=k + 1)
    assert drafted.step_time(step) == target.step_time(step) + k * draft.step_time(decodes)
    chunks = [(64, 0), (30, 500)]
    mixed = replace(step, chunks=chunks, num_prefill_tokens=94, num_sampled=n * (k + 1) + 1)
    first = replace(decodes, chunks=chunks, num_prefill_tokens=94)
    passes = draft.step_time(first) + (k - 1) * draft.step_time(decodes)
    assert drafted.step_time(mixed) == target.step_time(mixed) + passes
    alone = Step(0, 0, chunks, 94, 1, k + 1)
    ahead = Step(0, 0, chunks, 94, 0)
    assert drafted.step_time(alone) == target.step_time(alone) + draft.step_time(ahead)
    for each in (step, mixed, alone):
        assert sum(o.time_ns for o in drafted.explain(each)) == pytest.approx(drafted.step_time(each), abs=k + 2)
        assert 0 < drafted.floor_time(each) <= drafted.step_time(each)
    assert drafted.provenance() == {"roofline": 1.0}


def test_an_assumed_cost_is_a_share_of_the_step_that_verifies() -> None:
    step = Step(8, 8000, num_sampled=32, tokens_per_decode=4)
    target = prepared(4)
    drafted = Drafted(target, 3, draft_cost=0.05)
    assert drafted.step_time(step) == target.step_time(step) + round(0.15 * target.step_time(step))
    assert Drafted(target, 3).step_time(step) == target.step_time(step)
    assert drafted.explain(step)[0].name == "drafts"
