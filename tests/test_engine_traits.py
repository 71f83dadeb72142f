"""What engine versions do differently: deciding a step ahead, busy front ends, room for whole answers, time factors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kit import LinearSteps, engine, play, table
from mist.batching.chunked import Chunked
from mist.engine import OPERATOR_CLASSES, EngineProfile
from mist.errors import ScenarioError
from mist.hardware import Platform
from mist.perf import Deployment
from mist.perf.roofline import Roofline
from mist.records import PREEMPTED
from mist.request import Step
from mist.scenario import catalogue
from mist.speculation import Speculation
from mist.testing.cluster import KVLink

ONE = LinearSteps(base=1000, per_prefill_token=0, per_decode=0, per_context=0, per_prefill=0)


def first_tokens(run: Any) -> list[int]:
    rows = run.records.requests.as_columns()
    return [ns for _, ns in sorted(zip(rows["request"].tolist(), rows["first_token_ns"].tolist(), strict=True))]


def deployment(**changes: Any) -> Deployment:
    model = catalogue.read("models", changes.pop("model", "llama-3.1-8b"), None)[0]  # type: ignore[arg-type]
    device = catalogue.read("devices", "h100-sxm", None)[0]  # type: ignore[arg-type]
    return Deployment(model, Platform(device, tp=changes.pop("tp", 1)), "bf16", "bf16", 2048, 64, **changes)


# --- deciding a step ahead ---


def test_what_arrives_during_a_step_joins_the_one_after_the_next() -> None:
    workload = table([0, 500], [10, 10], [50, 2])
    at_once = first_tokens(play(workload, perf=ONE))
    ahead = first_tokens(play(workload, perf=ONE, engine_profile=replace(engine(), async_scheduling=True)))
    assert at_once == [1000, 2000]
    assert ahead == [1000, 3000]


def test_an_idle_engine_takes_what_arrives_at_once() -> None:
    workload = table([0, 5000], [10, 10], [2, 2])
    ahead = first_tokens(play(workload, perf=ONE, engine_profile=replace(engine(), async_scheduling=True)))
    assert ahead == [1000, 6000]


def test_the_last_step_before_idling_lets_in_what_it_did_not_see() -> None:
    workload = table([0, 500], [10, 10], [1, 1])
    ahead = first_tokens(play(workload, perf=ONE, engine_profile=replace(engine(), async_scheduling=True)))
    assert ahead == [1000, 2000]


@pytest.mark.parametrize("seed", range(40))
def test_laws_hold_a_step_ahead_with_a_front_end(seed: int) -> None:
    rng = np.random.default_rng(seed)
    profile = replace(engine(step_ns=50, token_ns=3), async_scheduling=True, request_serial_ns=200,
                      prompt_token_overhead_ns=2, prefill_overhead_ns=70)  # fmt: skip
    arrivals = np.sort(rng.integers(0, 5000, 12))
    workload = table(arrivals, rng.integers(1, 170, 12), rng.integers(1, 60, 12))
    run = play(workload, engine_profile=profile, num_blocks=int(rng.integers(16, 40)))
    assert run.coordinator.num_left == 12


# --- the front end ---


def test_a_front_end_serves_requests_one_by_one() -> None:
    profile = replace(engine(request_ns=700), request_serial_ns=300, prompt_token_overhead_ns=2)
    run = play(table([0, 0, 0], [10, 10, 100], [1, 1, 1]), perf=ONE, engine_profile=profile)
    tasks = run.records.tasks.as_columns()
    started = tasks["started_ns"][tasks["kind"] == 0].tolist()
    # ready at 720, 1020 (300 later) and 600 + 700 + 200; each step takes 1000
    assert started == [720, 1720, 1720]


def test_prefills_cost_the_host_more() -> None:
    profile = replace(engine(step_ns=100), prefill_overhead_ns=400)
    run = play(table([0], [10], [3]), perf=ONE, engine_profile=profile)
    steps = run.records.steps.as_columns()
    assert (steps["end_ns"] - steps["start_ns"]).tolist() == [1500, 1100, 1100]


# --- room for whole answers ---


def test_an_engine_that_reserves_the_whole_answer_never_preempts() -> None:
    workload = table([0] * 6, [16] * 6, [100] * 6)
    free = play(workload, num_blocks=16)
    kept = play(workload, num_blocks=16, engine_profile=replace(engine(), reserves_output=True))
    assert free.records.requests.as_columns()["num_preemptions"].sum() > 0
    rows = kept.records.requests.as_columns()
    assert rows["num_preemptions"].sum() == 0
    # an answer of 100 after 16 tokens ends in 8 blocks: two at a time
    assert max(kept.records.steps.as_columns()["num_decodes"].tolist()) == 2


def test_room_for_drafts_is_reserved_too() -> None:
    drafts = Speculation(3, 0.5, lambda *place: np.random.default_rng(place))
    profile = replace(engine(), reserves_output=True)
    run = play(table([0] * 6, [64] * 6, [65] * 6), num_blocks=24, engine_profile=profile, speculation=drafts)
    assert run.records.requests.as_columns()["num_preemptions"].sum() == 0


def test_prompts_that_are_handed_over_reserve_their_own_room_alone() -> None:
    def handed_over(**profile: Any) -> int:
        run = play(table([0] * 6, [100] * 6, [30] * 6), num_clients=2, serves=[("prefill",), ("decode",)],
                   num_blocks=10, engine_profile=replace(engine(), **profile), nic=KVLink(10, 1e9, 50_000),
                   policy=lambda: Chunked(max_num_batched_tokens=64, max_num_seqs=8))  # fmt: skip
        assert run.coordinator.num_left == 6
        tasks = run.records.tasks.as_columns()
        return int(((tasks["how"] == PREEMPTED) & (tasks["client"] == 0)).sum())

    # a prompt of 7 blocks beside one that is being sent: the second starts, and doesn't fit
    assert handed_over() > 0
    assert handed_over(reserves_output=True) == 0


def test_reserving_changes_nothing_where_there_is_room() -> None:
    workload = table([0, 10, 2000], [30, 16, 50], [20, 5, 9])
    plain, kept = (play(workload, engine_profile=replace(engine(), reserves_output=r)) for r in (False, True))
    assert (
        plain.records.requests.as_columns()["end_ns"].tolist() == kept.records.requests.as_columns()["end_ns"].tolist()
    )


def test_a_share_of_what_is_free() -> None:
    model = catalogue.read("models", "llama-3.1-8b", None)[0]  # type: ignore[arg-type]
    device = catalogue.read("devices", "h100-sxm", None)[0]  # type: ignore[arg-type]
    of = {}
    for rule in (False, True):
        profile = EngineProfile("x", gpu_memory_utilization=0.9, utilization_of_free=rule)
        of[rule] = profile.kv_blocks(model, Platform(device), "bf16", "bf16", 2048, 64)
    used = of[True].weight_bytes + of[True].activation_bytes
    assert of[True].kv_bytes == int(0.9 * (device.memory_bytes - used))
    assert of[True].kv_bytes > of[False].kv_bytes
    assert "0.9 x (" in str(of[True])


# --- time factors ---


def times(d: Deployment, step: Step) -> dict[str, float]:
    roofline = Roofline()
    roofline.prepare(d)
    return {o.name: o.time_ns for o in roofline.explain(step)}


DECODES = Step(num_decodes=32, decode_context=32 * 2048, num_sampled=32)
PREFILL = Step(chunks=[(2048, 0)], num_prefill_tokens=2048, num_sampled=1)


@pytest.mark.parametrize(
    ("factor", "slower"),
    [
        ("gemm", {"qkv", "o_proj", "gate_up", "down", "classifier"}),
        ("attention_decode", {"attention_decode"}),
        ("attention_decode_gqa", {"attention_decode"}),
        ("elementwise", {"embedding"}),
        ("network", {"all_reduce"}),
    ],
)
def test_a_factor_multiplies_its_class_alone(factor: str, slower: set[str]) -> None:
    before = times(deployment(tp=2), DECODES)
    after = times(deployment(tp=2, time_factors={factor: 1.25}), DECODES)
    changed = {name for name in before if after[name] != pytest.approx(before[name], rel=1e-9)}
    for name in changed:
        assert after[name] == pytest.approx(1.25 * before[name], rel=1e-6)
    assert {n for n in before if any(n.startswith(s) for s in slower)} <= changed


def test_a_compute_factor_leaves_alone_what_memory_binds() -> None:
    slow = deployment(time_factors={"gemm_compute": 1.5})
    assert times(slow, DECODES) == times(deployment(), DECODES)
    before, after = times(deployment(), PREFILL), times(slow, PREFILL)
    assert after["gate_up"] > 1.4 * before["gate_up"]


def test_factors_of_4_bit_experts_are_for_these_alone() -> None:
    factors = {"experts_4bit": 2.0}
    wide = deployment(model="qwen3-30b-a3b", time_factors=factors)
    assert wide.time_factor("grouped_gemm") == 1.0
    narrow = replace(deployment(model="gpt-oss-20b", time_factors=factors), weights_dtype="mxfp4")
    assert narrow.time_factor("grouped_gemm") == 2.0
    assert narrow.time_factor("gemm") == 1.0


@pytest.mark.parametrize(
    ("factors", "says"),
    [
        ({"gem": 2}, "has no 'gem'"),
        ({"gemm": 0}, "where 0.1 to 100 would do"),
        ({"gemm": "fast"}, "where 0.1 to 100 would do"),
        ({"gemm_compute": 0.5}, "where 1 or more would do"),
    ],
)
def test_factors_that_can_not_be_are_told(factors: dict[str, Any], says: str) -> None:
    with pytest.raises(ScenarioError, match=says):
        EngineProfile.from_mapping({"name": "x", "time_factors": factors})


def test_every_class_of_operators_can_have_a_factor() -> None:
    profile = EngineProfile.from_mapping({"name": "x", "time_factors": dict.fromkeys(OPERATOR_CLASSES, 1.5)})
    assert set(profile.time_factors) == set(OPERATOR_CLASSES)


def test_no_factor_beats_the_link() -> None:
    roofline = Roofline()
    roofline.prepare(deployment(tp=8, time_factors={"network": 0.1}))
    found = [o for o in roofline.explain(DECODES) if o.bound_by == "network" or "all_reduce" in o.name]
    assert found
    assert all(o.time_ns >= o.floor_ns * (1 - 1e-9) for o in found)


# --- windows ---


def capacity(model: str, *, frees_windows: bool, max_num_seqs: int) -> int:
    spec = catalogue.read("models", model, None)[0]  # type: ignore[arg-type]
    device = catalogue.read("devices", "h200-sxm", None)[0]  # type: ignore[arg-type]
    profile = EngineProfile("x", frees_windows=frees_windows)
    return profile.kv_blocks(spec, Platform(device), "mxfp4", "bf16", 8192, max_num_seqs).num_tokens


def test_windows_that_are_freed_leave_room_for_longer_contexts() -> None:
    kept = capacity("gpt-oss-20b", frees_windows=False, max_num_seqs=64)
    freed = capacity("gpt-oss-20b", frees_windows=True, max_num_seqs=64)
    # every second layer has a window of 128 tokens, which 64 sequences fill
    assert 1.9 * kept < freed < 2 * kept


def test_freeing_windows_never_takes_room() -> None:
    kept = capacity("gpt-oss-20b", frees_windows=False, max_num_seqs=100_000)
    assert capacity("gpt-oss-20b", frees_windows=True, max_num_seqs=100_000) >= kept


def test_freeing_windows_is_nothing_to_a_model_without() -> None:
    few = {frees: capacity("llama-3.1-8b", frees_windows=frees, max_num_seqs=64) for frees in (False, True)}
    assert few[False] == few[True]
