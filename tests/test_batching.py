"""Batching policies beside each other: what they agree on, pools and windows under the ledger, their scenarios."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kit import LinearSteps, Run, play, rows, table
from mist.batching.chunked import Chunked
from mist.batching.continuous import Continuous
from mist.batching.decode_only import DecodeOnly
from mist.batching.mixed import Mixed
from mist.batching.prefill_only import PrefillOnly
from mist.batching.sglang import SGLang
from mist.batching.static import Static
from mist.batching.tensorrt_llm import TensorRTLLM
from mist.engine import EngineProfile
from mist.records import FINISHED
from mist.testing import BatchingContract, random_scenario, record_bytes
from mist.testing.cluster import KVLink
from scenarios import SMALL, problems, read

#: policies with parameters that aren't their defaults
VARIANTS: dict[str, Any] = {
    "threshold": partial(Chunked, long_prefill_token_threshold=3),
    "delay": partial(Continuous, delay_factor=0.5),
    "window": partial(Continuous, max_queue_delay_ms=0.002),
    "both": partial(Continuous, delay_factor=2.0, max_queue_delay_ms=0.001),
    "static window": partial(Static, max_queue_delay_ms=0.003),
    "max_utilization": partial(TensorRTLLM, capacity_scheduler_policy="max_utilization"),
    "static_batch": partial(TensorRTLLM, capacity_scheduler_policy="static_batch"),
    "chunked context": partial(TensorRTLLM, enable_chunked_context=True),
    "mixed chunk": partial(SGLang, enable_mixed_chunk=True),
    "careless": partial(SGLang, schedule_conservativeness=0.0),
    "careful": partial(SGLang, schedule_conservativeness=3.0),
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("check", [each for each in dir(BatchingContract) if each.startswith("test_")])
def test_variants_keep_the_contract(name: str, check: str) -> None:
    getattr(type("Suite", (BatchingContract,), {"policy": staticmethod(VARIANTS[name])})(), check)()


# --- what two of them agree on ---


def same(seed: int, one: Any, other: Any, **more: Any) -> None:
    scenario = random_scenario(seed)
    assert record_bytes(scenario.play(one, **more).records) == record_bytes(scenario.play(other, **more).records), seed


def test_a_threshold_of_a_whole_step_is_none() -> None:
    for seed in range(100):
        same(seed, Chunked, partial(Chunked, long_prefill_token_threshold=64))


def test_a_prefill_pool_is_continuous() -> None:
    apart: dict[str, Any] = {"num_clients": 2, "serves": [("prefill",), ("decode",)], "nic": KVLink(10, 1e9, 500)}
    for seed in range(60):
        policies = [iter([first, Chunked]) for first in (PrefillOnly, Continuous)]
        same(seed, *(lambda of=of, **limits: next(of)(**limits) for of in policies), **apart)


def test_a_decode_pool_without_preemptions_is_continuous_and_chunked() -> None:
    for seed in range(60):
        scenario = random_scenario(seed, roomy=True)
        runs = []
        for second in (DecodeOnly, Continuous, Chunked):
            of = iter([Chunked, second])
            apart: dict[str, Any] = {"num_clients": 2, "serves": [("prefill",), ("decode",)]}
            runs.append(record_bytes(scenario.play(lambda of=of, **limits: next(of)(**limits), **apart).records))
        assert runs[0] == runs[1] == runs[2], seed


def test_guaranteed_no_evict_is_what_a_profile_reserves() -> None:
    """With chunks TensorRT-LLM's scheduler is vLLM's but for admission: with the same admission they are one."""
    profiles = [EngineProfile("test", reserves_output=reserves) for reserves in (False, True)]
    for seed in range(80):
        scenario = random_scenario(seed)
        for reserves, profile in zip((False, True), profiles, strict=True):
            name: Any = "guaranteed_no_evict" if reserves else "max_utilization"
            named = partial(TensorRTLLM, capacity_scheduler_policy=name, enable_chunked_context=True)
            runs = [scenario.play(named), scenario.play(Chunked, engine_profile=profile)]
            assert record_bytes(runs[0].records) == record_bytes(runs[1].records), seed


# --- pools of one stage, under pressure ---


@pytest.mark.parametrize("second", [DecodeOnly, Chunked, SGLang, Mixed, TensorRTLLM])
def test_pools_of_one_stage_serve_everybody(second: Any) -> None:
    preemptions = 0
    for seed in range(150):
        rng = random.Random(seed)
        n = rng.randint(2, 14)
        prompts, outputs = ([rng.randint(1, most) for _ in range(n)] for most in (30, 40))
        workload = table(sorted(rng.randint(0, 3000) for _ in range(n)), prompts, outputs)
        of = iter([partial(PrefillOnly, 24, 8), partial(second, 24, 6), partial(second, 24, 6)])
        serves, nic = [("prefill",), ("decode",), ("decode",)], KVLink(5, 1e9, rng.choice([0, 700]))
        pools: dict[str, Any] = {"num_clients": 3, "serves": serves, "nic": nic, "num_blocks": 20, "block_size": 4}
        run = play(workload, policy=lambda of=of: next(of)(), **pools)
        assert set(run.records.requests.as_columns()["status"].tolist()) == {FINISHED}
        assert all(client.residents.kv.used == 0 for client in run.clients)
        preemptions += sum(client.residents.num_preemptions for client in run.clients)
    assert preemptions > 20 or second is TensorRTLLM


# --- windows ---


def starts(run: Run) -> list[tuple[int, int]]:
    steps = run.records.steps.as_columns()
    return list(zip(steps["start_ns"].tolist(), steps["num_prefill_tokens"].tolist(), strict=True))


@pytest.mark.parametrize("policy", [Continuous, Static])
def test_a_window_by_hand(policy: Any) -> None:
    """Two within 5 µs; three that fill a batch at once; one that is alone for its whole window."""
    arrivals, prompts = [0, 4000, 50_000, 50_001, 50_002, 90_000], [3, 5, 2, 2, 2, 7]
    run = play(table(arrivals, prompts, [0] * 6), policy=lambda: policy(100, 3, max_queue_delay_ms=0.005))
    assert starts(run) == [(5000, 8), (50_002, 6), (95_000, 7)]


def test_a_window_bounds_the_wait_and_batches_more() -> None:
    """Poisson arrivals: nobody waits longer than the window and the step in flight; wider windows, fewer steps."""
    rng = np.random.default_rng(3)
    arrivals = np.cumsum(rng.exponential(2000, 400)).astype(np.int64)
    workload = table(arrivals, [10] * 400, [0] * 400)
    num_steps = []
    for delay_ms in (0.0, 0.004, 0.016):
        run = play(workload, policy=lambda d=delay_ms: Continuous(10_000, 64, max_queue_delay_ms=d))
        tasks, steps = run.records.tasks.as_columns(), run.records.steps.as_columns()
        longest = int((steps["end_ns"] - steps["start_ns"]).max())
        assert int((tasks["started_ns"] - tasks["queued_ns"]).max()) <= delay_ms * 1e6 + longest
        num_steps.append(len(steps["start_ns"]))
    assert num_steps[0] > 2 * num_steps[1] > 4 * num_steps[2]


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_a_delay_is_of_the_last_prefill_step_alone(factor: float) -> None:
    """It took 2000 ns, and 98 decode steps of 1000 ns since then change nothing: a prompt waits longer than that."""
    steps = LinearSteps(base=1000, per_prefill_token=10, per_decode=0, per_context=0, per_prefill=0)
    run = play(table([0, 100_000], [100, 100], [200, 3]), policy=lambda: Continuous(delay_factor=factor), perf=steps)
    tasks = run.records.tasks.as_columns()
    (started,) = tasks["started_ns"][(tasks["request"] == 1) & (tasks["kind"] == 0)]
    assert started == 101_000 + 2000 * factor  # the first step that begins after it


def test_a_delay_factor_of_nothing_changes_nothing_and_a_large_one_saves_prefill_steps() -> None:
    rng = np.random.default_rng(4)
    arrivals = np.cumsum(rng.exponential(900, 200)).astype(np.int64)
    workload = table(arrivals, [20] * 200, [30] * 200)
    plain, none, much = (
        play(workload, policy=lambda f=factor: Continuous(400, 64, delay_factor=f)) for factor in (0.0, 1e-9, 3.0)
    )
    assert rows(plain.records) == rows(none.records)
    count = [int((run.records.steps.as_columns()["num_prefill_tokens"] > 0).sum()) for run in (plain, much)]
    assert count[1] < 0.7 * count[0]


# --- scenarios ---


@pytest.mark.parametrize(
    ("batching", "serves", "says"),
    [
        ("prefill_only", "[prefill, decode]", "prefill_only serves prefill alone, and the client serves decode too"),
        ("decode_only", "[prefill, decode]", "decode_only serves decode alone, and the client serves prefill too"),
        ("{tensorrt_llm: {capacity_scheduler_policy: no_evict}}", "[prefill, decode]", "guaranteed_no_evict"),
        ("{chunked: {long_prefill_token_threshold: -1}}", "[prefill, decode]", "0 means no limit"),
    ],
)
def test_scenarios_refuse_what_does_not_go_together(tmp_path: Path, batching: str, serves: str, says: str) -> None:
    sets = f"clients.gpu.batching={batching}", f"clients.gpu.serves={serves}"
    found = problems(tmp_path, SMALL, *sets)
    assert any(says in f"{each.message} {each.hint}" for each in found), found


def test_a_decode_pool_of_static_batches_is_refused_by_either_name(tmp_path: Path) -> None:
    text = SMALL.replace(
        "{device: h100-sxm, model: llama-3.1-8b}", "{device: h100-sxm, model: llama-3.1-8b, serves: [prefill]}"
    )
    text += "  d: {device: h100-sxm, model: llama-3.1-8b, serves: [decode]}\n"
    assert read(tmp_path, text)
    for batching in ("static", "{tensorrt_llm: {capacity_scheduler_policy: static_batch}}"):
        found = problems(tmp_path, text, f"clients.d.batching={batching}")
        assert "which no static batch can" in found[0].message


def test_encoders_and_hosts_take_no_policy_that_cuts(tmp_path: Path) -> None:
    text = SMALL.replace("model: llama-3.1-8b", "model: bge-large, serves: [prefill]") + "pipeline: [prefill]\n"
    assert read(tmp_path, text, "clients.gpu.batching={continuous: {max_queue_delay_ms: 2}}")
    assert read(tmp_path, text, "clients.gpu.batching=prefill_only")
    for batching in ("sglang", "{tensorrt_llm: {enable_chunked_context: true}}"):
        found = problems(tmp_path, text, f"clients.gpu.batching={batching}")
        assert "no sequence can be cut" in found[0].message, found
