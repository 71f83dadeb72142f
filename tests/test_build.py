"""From scenario to run: what is drawn, what is refused, what is said beside the figures."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

import mist
from kit import play, table
from mist import registry
from mist.batching.chunked import Chunked
from mist.errors import InvariantError, ScenarioError
from mist.request import Batch, Wait
from mist.routing.join_shortest_queue import JoinShortestQueue
from mist.testing import engine


def scenario(**changes: Any) -> dict[str, Any]:
    workload = {"arrivals": {"poisson": {"rate_per_s": 20}}, "num_requests": 50, "input_tokens": 100}
    gpu = {"device": "h100-sxm", "model": "llama-3.1-8b"}
    return {
        "workload": {**workload, "output_tokens": 5, **changes.pop("workload", {})},
        "clients": {"gpu": {**gpu, **changes.pop("gpu", {})}},
        "perf": "roofline",
        **changes,
    }


def notes(**changes: Any) -> list[str]:
    found: list[str] = mist.run(scenario(**changes)).summary()["notes"]
    return found


@pytest.mark.parametrize(
    "arrivals",
    [
        {"poisson": {"rate_per_s": 1e-12}},
        {"constant": {"rate_per_s": 1e-300}},
        {"gamma": {"rate_per_s": 1e-12, "cv": 2}},
        {"bursty": {"rate_per_s": 1e-9}},
        {"closed_loop": {"concurrency": 10, "ramp_s": 1e30}},
    ],
)
def test_arrivals_beyond_the_clock_are_refused(arrivals: dict[str, Any]) -> None:
    with pytest.raises(ScenarioError, match=r"rate|ramp_s"):
        mist.run(scenario(workload={"arrivals": arrivals}))


def test_a_long_ramp_stays_in_order() -> None:
    workload = {"arrivals": {"closed_loop": {"concurrency": 10_000, "ramp_s": 1e6}}, "num_requests": 10_000}
    requests = mist.run(scenario(workload={**workload, "output_tokens": 1})).requests
    assert (requests["arrival_s"][1:] >= requests["arrival_s"][:-1]).all()
    assert requests["arrival_s"][0] == 0


def test_a_closed_loop_has_no_rate() -> None:
    workload = {"arrivals": {"closed_loop": {"concurrency": 2}}, "rate_scale": 2.0}
    with pytest.raises(ScenarioError, match="no rate to scale"):
        mist.run(scenario(workload=workload))


def test_a_window_after_the_last_arrival_is_refused() -> None:
    with pytest.raises(ScenarioError, match=r"no request arrives after the first 1e\+06 s"):
        mist.run(scenario(warmup_s=1e6))


def test_rejections_are_told_with_their_reason() -> None:
    found = notes(gpu={"max_model_len": 104})
    assert "50 rejected: more tokens than max_model_len 104 of gpu." in found
    assert not any("rejected:" in note for note in notes(gpu={"max_model_len": 105}))


def test_memory_that_is_not_there_is_told() -> None:
    assert any("only" in note and "fit by" in note for note in notes(gpu={"kv_cache": {"num_blocks": 10**8}}))
    assert any("fewer than max_model_len" in note for note in notes(gpu={"kv_cache": {"num_blocks": 100}}))
    too_large = {"model": "llama-3.1-70b", "kv_cache": {"num_blocks": 1000}}
    with pytest.raises(ScenarioError, match="does not fit"):
        mist.run(scenario(gpu=too_large))


def test_generic_figures_are_told() -> None:
    assert any("generic efficiencies" in note for note in notes(gpu={"device": "mi300x"}))
    assert not any("generic" in note for note in notes())


def test_a_cpu_that_runs_no_model_needs_no_efficiencies() -> None:
    text = {"device": "epyc-9554", "serves": ["tokenize"], "perf": "cpu_text"}
    clients = {"gpu": {"device": "h100-sxm", "model": "llama-3.1-8b"}, "text": text}
    made = scenario() | {"pipeline": ["tokenize", "prefill", "decode"], "clients": clients}
    (told,) = [note for note in mist.run(made).summary()["notes"] if note.startswith("epyc-9554")]
    assert told == "epyc-9554: unverified are memory_bytes, tdp_w."


def test_every_result_says_what_error_to_expect() -> None:
    assert notes()[-1].startswith("Expected error")
    unchecked = {
        "device": {"name": "d", "peak_tflops": {"bf16": 500}, "memory_bytes": "80 GiB", "memory_bytes_per_s": "2 TB/s"}
    }
    assert notes(gpu=unchecked)[-1].startswith("Expected error: not validated")


@pytest.mark.parametrize(
    ("arrivals", "open_loop"),
    [
        ({"constant": {"rate_per_s": 1e12}}, True),
        ({"gamma": {"rate_per_s": 6, "cv": 1000}}, True),
        ({"closed_loop": {"concurrency": 2, "ramp_s": 10}}, False),
        ("all_at_once", False),
    ],
)
def test_the_arrival_process_makes_the_loop_open(arrivals: Any, open_loop: bool) -> None:
    summary = mist.run(scenario(workload={"arrivals": arrivals})).summary()
    assert summary["open_loop"] == open_loop
    assert (summary["offered"] is None) != open_loop
    assert any("isn't open loop" in note for note in summary["notes"]) != open_loop


def test_the_offered_load_is_what_was_asked_for() -> None:
    result = mist.run(scenario(gpu={"max_model_len": 104}))
    times = result.requests["arrival_s"]
    offered = result.summary()["offered"]
    assert offered["requests_per_s"] == pytest.approx(49 / (times.max() - times.min()))
    assert offered["output_tokens_per_s"] == pytest.approx(5 * offered["requests_per_s"])


def test_a_run_that_was_cut_says_so() -> None:
    result = mist.run(scenario(max_time_s=1.0), check=True)
    counts = result.summary()["requests"]
    told = (
        f"max_time_s cut the run at 1 s: of 50 requests, {counts['unfinished']} had not finished and "
        f"{50 - counts['arrived']} had not arrived."
    )
    assert told in result.summary()["notes"]
    assert counts["arrived"] < 50
    assert any("0 had not finished and 50 had not arrived" in note for note in notes(max_time_s=1e-6))
    assert not any("cut the run" in note for note in notes(max_time_s=1e6))


@pytest.mark.parametrize("num_requests", [2, 20])
def test_the_end_of_the_clock_is_said_as_such(num_requests: int) -> None:
    device = {"name": "abacus", "peak_tflops": {"bf16": 1e-6}, "memory_bytes": "80 GiB", "memory_bytes_per_s": 1}
    workload = {"num_requests": num_requests}
    result = mist.run(scenario(workload=workload, gpu={"device": device}), check=True)
    told = "The clock ends after 2**62 ns (146 years), which cut the run: "
    assert any(note.startswith(told) for note in result.summary()["notes"])
    assert result.summary()["requests"]["unfinished"] == num_requests


def test_a_window_outside_a_closed_loop_says_so() -> None:
    workload = {"arrivals": {"closed_loop": {"concurrency": 2}}}
    assert notes(workload=workload, window_s="1000:2000")[0].startswith("The window lies outside the run")


def test_shares_of_one_origin_are_one() -> None:
    result = mist.run(scenario(gpu={"count": 3}))
    assert result.summary()["provenance"]["roofline"] == 1
    assert sum(result.summary()["provenance"].values()) == 1


@pytest.fixture
def sleeper() -> Any:
    class Sleeper(Chunked):
        def next_batch(self, *args: Any) -> Batch | Wait:
            return Wait()

    registry.register("batching", "sleeper")(Sleeper)
    yield
    del registry._registered["batching"]["sleeper"]


@pytest.mark.usefixtures("sleeper")
def test_a_policy_that_never_works_is_no_censoring() -> None:
    with pytest.raises(InvariantError, match="nothing happens any more"):
        mist.run(scenario(gpu={"batching": "sleeper"}))


@pytest.fixture
def limitless() -> Any:
    @dataclasses.dataclass
    class Limitless:
        max_num_seqs: int = 8

        def next_batch(self, *args: Any) -> Batch | Wait:
            return Wait()

    registry.register("batching", "limitless")(Limitless)
    yield
    del registry._registered["batching"]["limitless"]


@pytest.mark.usefixtures("limitless")
def test_a_policy_without_limits_is_refused_where_it_is_named() -> None:
    with pytest.raises(ScenarioError, match="limitless has no max_num_batched_tokens") as told:
        mist.run(scenario(gpu={"batching": "limitless"}))
    assert "clients.gpu.batching" in str(told.value)


def test_a_router_sees_what_is_at_the_front_end() -> None:
    """Four simultaneous prompts, 7 ms at the front end: two for each of two clients."""
    run = play(
        table([0, 1, 2, 3], [100] * 4, [1] * 4),
        num_clients=2,
        router=JoinShortestQueue(),
        engine_profile=engine(request_ns=7_000_000),
    )
    assert sorted(run.records.tasks.as_columns()["client"].tolist()) == [0, 0, 0, 0, 1, 1, 1, 1]


def test_pipeline_stages_are_lanes_with_a_share_of_the_cache() -> None:
    one, two = (mist.run(scenario(gpu={"pp": pp, "kv_cache": {"num_blocks": 1000}})) for pp in (1, 2))
    assert one.records.client_names == ["gpu"]
    assert two.records.client_names == ["gpu.0", "gpu.1"]
    capacities = [r.summary()["clients"]["gpu"]["kv_tokens_capacity"] for r in (one, two)]
    assert capacities == [16_000, 16_000]
    alone = [r.requests["ttft_s"].min() for r in (one, two)]
    assert alone[1] > alone[0]  # the messages between stages


def test_attention_groups_have_caches_of_their_own() -> None:
    gpu = {"device": "h200-sxm", "model": "qwen3-30b-a3b", "tp": 1, "attn_dp": 4, "ep": 4, "count": 2}
    result = mist.run(scenario(gpu=gpu), check=True)
    assert result.records.client_names == [f"gpu-{replica}.{group}" for replica in range(2) for group in range(4)]
    assert result.summary()["requests"]["finished"] == 50


def test_what_kernels_can_not_price_is_told() -> None:
    found = notes(perf=["kernels", "roofline"], gpu={"device": "mi300x"})
    assert any(note.startswith("gpu: step times by roofline, not by kernels: ") for note in found)


@pytest.mark.parametrize(("model", "kind"), [("llama-3.1-8b", "prefill"), ("BAAI/bge-large-en-v1.5", "embed")])
def test_a_pipeline_without_decode_generates_nothing(model: str, kind: str) -> None:
    """The workload's outputs are nobody's then: they neither have to be generated nor have to fit."""
    gpu = {"model": model, "serves": [kind], "max_model_len": 100}
    summary = mist.run(scenario(gpu=gpu, pipeline=[kind]), check=True).summary()
    assert summary["requests"]["finished"] == 50
    assert summary["throughput"]["output_tokens_per_s"] == 0
    assert summary["ttft_s"]["mean"] is None
    assert list(summary["stages"]) == [kind]


def test_an_encoder_decodes_nothing() -> None:
    with pytest.raises(ScenarioError, match="is an encoder: it decodes nothing"):
        mist.run(scenario(gpu={"model": "BAAI/bge-large-en-v1.5"}))


def test_parallel_degrees_are_blamed_themselves() -> None:
    with pytest.raises(ScenarioError, match=r"clients.gpu.pp: .* 32 layers, too few for pp = 33"):
        mist.run(scenario(gpu={"pp": 33}))
    with pytest.raises(ScenarioError, match=r"clients.gpu.ep: .* no experts"):
        mist.run(scenario(gpu={"ep": 2}))
