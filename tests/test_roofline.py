"""The roofline and its operators: the formulas term by term, the floor, monotonicity, and measured steps.

Guards the law that no step beats max(FLOP / peak, bytes / bandwidth). Never runs a simulation.
"""

from __future__ import annotations

import math
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mist import registry
from mist.hardware import Device, Platform
from mist.model import LayerGroup, ModelSpec
from mist.perf import Deployment, PerfModel
from mist.perf.operators import Operator, StepSums, forward_pass
from mist.perf.roofline import Roofline
from mist.request import Step
from test_hardware import DEVICES, OWN, device, model

IDEAL = {"efficiency": dict.fromkeys(("gemm", "gemm_memory", "attention_prefill", "attention_decode"), 1.0)
         | {"elementwise": 1.0, "allreduce": 1.0}, "kernel_launch_ns": 0, "attention_ramp_tokens": 0}  # fmt: skip

TINY = ModelSpec("tiny", (LayerGroup(3, 256, 8, 2, 32, 512),), 1000, False, 4096)


@cache
def prepared(name: str, device_name: str, tp: int, weights: str = "bf16", kv: str = "bf16") -> Roofline:
    roofline = Roofline()
    deployment = Deployment(model(name), Platform(device(device_name), tp), weights, kv, 2048, 256)
    assert roofline.supports(deployment) is None
    roofline.prepare(deployment)
    return roofline


def step(chunks: list[tuple[int, int]] | None = None, decodes: int = 0, context: int = 0, sampled: int = -1) -> Step:
    chunks = chunks or []
    tokens = sum(c for c, _ in chunks)
    return Step(decodes, context, chunks, tokens, sampled if sampled >= 0 else decodes)


def tiny(tp: int = 1, weights: str = "bf16", kv: str = "bf16", **changes: object) -> Deployment:
    return Deployment(TINY, Platform(Device.from_mapping(OWN | changes), tp), weights, kv, 64, 8)


def by_name(deployment: Deployment) -> dict[str, Operator]:
    return {o.name: o for o in forward_pass(deployment)}


def test_registered_and_a_perf_model() -> None:
    contract: PerfModel = Roofline()
    assert registry.lookup("perf", "roofline") is Roofline
    assert contract.provenance() == {"roofline": 1.0}


def test_dense_flop_are_two_per_parameter_and_token() -> None:
    work = step([(16, 0)], sampled=16)
    sums = StepSums.of(work)
    gemms = [o for o in forward_pass(tiny()) if o.kind == "gemm"]
    weights = 3 * TINY.layers[0].num_matrix_parameters() + 1000 * 256
    assert sum(o.flop_of(sums) for o in gemms) == 2 * 16 * weights
    assert sum(o.compulsory_bytes_of(sums) for o in gemms) == 2 * weights


def test_classifier_runs_on_sampled_rows_only() -> None:
    head = by_name(tiny())["lm_head"]
    assert head.flop_of(StepSums.of(step([(16, 0)], sampled=0))) == 0
    assert head.bytes_of(StepSums.of(step([(16, 0)], sampled=0))) == 0
    assert head.flop_of(StepSums.of(step([(16, 0)], sampled=1))) == 2 * 1000 * 256


def test_attention_formulas() -> None:
    operators = by_name(tiny(kv="fp8"))
    sums = StepSums.of(step([(10, 30), (4, 0)], decodes=2, context=100))
    area = 10 * (30 + 5) + 4 * 2
    assert operators["attention_prefill"].flop_of(sums) == 3 * 4 * area * 8 * 32
    assert operators["attention_prefill"].compulsory_bytes_of(sums) == 3 * 2 * (40 + 4) * 2 * 32
    assert operators["attention_decode"].flop_of(sums) == 3 * 4 * 100 * 8 * 32
    assert operators["attention_decode"].compulsory_bytes_of(sums) == 3 * 2 * 100 * 2 * 32 * 1


def test_chunks_of_a_prompt_do_the_work_of_the_whole() -> None:
    whole = StepSums.of(step([(100, 0)]))
    parts = [StepSums.of(step([(c, s)])) for c, s in ((40, 0), (50, 40), (10, 90))]
    assert whole.prefill_area == sum(p.prefill_area for p in parts)


def test_tensor_parallel_shards_heads_and_ffn_and_replicates_kv() -> None:
    one, four = by_name(tiny()), by_name(tiny(tp=4))
    sums = StepSums.of(step(decodes=4, context=400))
    assert "all_reduce" not in one
    assert four["down"].flop_of(sums) == one["down"].flop_of(sums) / 4
    assert four["qkv"].shape == (8 // 4 * 32 + 2 * 32, 256), "two KV heads over four ranks: one each"
    assert four["attention_decode"].compulsory_bytes_of(sums) == one["attention_decode"].compulsory_bytes_of(sums) / 2
    assert four["all_reduce"].repeats == 2 * 3 + 1, "two a layer, and the embedding"
    assert four["all_reduce"].bytes_of(sums) == 7 * 4 * 256 * 2


def test_fp8_weights_without_fp8_units_save_bytes_but_not_time_to_compute() -> None:
    weight_only = by_name(tiny(weights="fp8"))["gate_up"]
    native = by_name(tiny(weights="fp8", peak_tflops={"bf16": 500, "fp8": 1000}))["gate_up"]
    assert (weight_only.dtype, native.dtype) == ("bf16", "fp8")
    assert weight_only.weight_bytes == native.weight_bytes == 2 * 512 * 256
    assert weight_only.bytes["tokens"] == native.bytes["tokens"] + 256


def test_step_time_is_the_sum_of_its_operators() -> None:
    """An independent evaluation, operator by operator, without tables; two ranks, all kinds of work in one step."""
    deployment = tiny(tp=2)
    roofline = Roofline()
    roofline.prepare(deployment)
    work = step([(20, 12), (5, 0)], decodes=6, context=900, sampled=7)
    sums, dev = StepSums.of(work), deployment.platform.device
    total = 0.0
    for o in forward_pass(deployment):
        if o.kind == "allreduce":
            total += o.repeats * deployment.platform.all_reduce_ns(31 * 512)
            continue
        if o.kind == "allgather":
            total += deployment.platform.all_gather_ns(7 * 1000 * 2, 2)
            continue
        memory_class = "gemm_memory" if o.kind == "gemm" else o.kind
        flop, kind = o.flop_of(sums), o.kind
        if o.kind == "attention_prefill":
            flop += o.repeats * 4 * 4 * 32 * 25 * dev.attention_ramp_tokens
            memory_class = "gemm_memory"
        if o.kind == "attention_decode":
            kind = "gemm"
        compute = flop / (dev.peak(o.dtype) * dev.efficiency_of(kind, o.dtype))
        memory = o.bytes_of(sums) / (dev.memory_bytes_per_s * dev.efficiency_of(memory_class, o.dtype))
        total += max(compute, memory) * 1e9
        if o.kind != "attention_decode":
            total += o.repeats * dev.launch_ns(o.kind)
    assert roofline.step_time(work) == math.floor(total) + 1


def test_an_ideal_device_reaches_the_floor() -> None:
    """Efficiencies of one and no launches: a memory-bound step takes its weights, KV and little else."""
    dev = Device.from_mapping(OWN | IDEAL)
    roofline = Roofline()
    roofline.prepare(Deployment(model("llama-3.1-8b"), Platform(dev), "bf16", "bf16", 2048, 256))
    work = step(decodes=1, context=100_000)
    assert roofline.floor_time(work) <= roofline.step_time(work) <= 1.01 * roofline.floor_time(work)
    weights = model("llama-3.1-8b").weight_bytes("bf16") - 2 * 128256 * 4096
    assert roofline.floor_time(work) == pytest.approx((weights + 100_000 * 131072) / 2e12 * 1e9, rel=1e-3)


def test_beyond_the_tables_the_same_formula_holds() -> None:
    roofline = prepared("llama-3.1-8b", "h100-sxm", 1)
    inside = roofline.step_time(step([(8192, 0)], sampled=1))
    outside = roofline.step_time(step([(8193, 0)], sampled=1))
    assert inside < outside < 1.001 * inside
    assert roofline.step_time(step(decodes=300, context=3000)) > roofline.step_time(step(decodes=256, context=3000))


MODELS_AND_RANKS = [
    ("llama-3.1-8b", 1), ("llama-2-7b", 2), ("qwen3-32b", 2), ("llama-3.1-70b", 4), ("llama-3.1-70b", 8),
]  # fmt: skip
SETTINGS = st.tuples(
    st.sampled_from(MODELS_AND_RANKS),
    st.sampled_from(sorted(DEVICES)),
    st.sampled_from(["bf16", "fp8", "int4"]),
    st.sampled_from(["bf16", "fp8"]),
)
CHUNKS = st.lists(st.tuples(st.integers(1, 3000), st.integers(0, 20_000)), max_size=3)


@st.composite
def steps(draw: st.DrawFn) -> Step:
    chunks = draw(CHUNKS)
    decodes = draw(st.integers(0 if chunks else 1, 300))
    return step(chunks, decodes, decodes * draw(st.integers(1, 8000)), decodes + draw(st.integers(0, len(chunks))))


@given(SETTINGS, steps())
def test_no_step_beats_the_floor(setting: tuple[tuple[str, int], str, str, str], work: Step) -> None:
    (name, tp), device_name, weights, kv = setting
    roofline = prepared(name, device_name, tp, weights, kv)
    assert 0 < roofline.floor_time(work) <= roofline.step_time(work)


@given(SETTINGS, steps(), st.tuples(st.integers(1, 500), st.integers(0, 500)), st.integers(1, 400))
def test_more_work_never_takes_less(
    setting: tuple[tuple[str, int], str, str, str], work: Step, chunk: tuple[int, int], context: int
) -> None:
    (name, tp), device_name, weights, kv = setting
    roofline = prepared(name, device_name, tp, weights, kv)
    decodes, sampled = work.num_decodes, work.num_sampled
    more = [
        step([*work.chunks, chunk], decodes, work.decode_context, sampled),
        step(work.chunks, decodes + 1, work.decode_context + context, sampled + 1),
        step(work.chunks, decodes, work.decode_context, sampled + 1),
        step([(c, s + chunk[1]) for c, s in work.chunks], decodes, work.decode_context, sampled),
    ]
    if decodes:
        more.append(step(work.chunks, decodes, work.decode_context + context, sampled))
    for larger in more:
        assert roofline.step_time(larger) >= roofline.step_time(work)
        assert roofline.floor_time(larger) >= roofline.floor_time(work)


@pytest.mark.parametrize(
    ("pp", "tp", "reason"),
    [(2, 1, None), (81, 1, "too few"), (1, 16, None), (1, 12, "links"), (1, 3, "attention heads"), (1, 8, None)],
)
def test_what_cannot_be_priced_has_a_reason(pp: int, tp: int, reason: str | None) -> None:
    deployment = Deployment(model("llama-3.1-70b"), Platform(device("h100-sxm"), tp, pp), "bf16", "bf16", 2048, 256)
    answer = Roofline().supports(deployment)
    assert (answer is None) if reason is None else (reason in str(answer))


@pytest.mark.parametrize(
    ("name", "tp", "work", "measured_ms"),
    [
        ("llama-3.1-70b", 4, step([(512, 0)], sampled=1), 37.0),
        ("llama-3.1-70b", 4, step([(2048, 0)], sampled=1), 130.0),
        ("llama-3.1-70b", 4, step([(8192, 0)], sampled=1), 577.0),
        ("llama-3.1-70b", 4, step(decodes=1, context=2048), 15.0),
        ("llama-3.1-70b", 4, step(decodes=32, context=32 * 2048), 18.4),
        ("llama-3.1-70b", 4, step(decodes=128, context=128 * 2048), 26.1),
        ("llama-3.1-8b", 1, step([(512, 0)], sampled=1), 12.0),
        ("llama-3.1-8b", 1, step([(2048, 0)], sampled=1), 43.5),
        ("llama-3.1-8b", 1, step([(8192, 0)], sampled=1), 200.0),
        ("llama-3.1-8b", 1, step(decodes=1, context=2048), 6.2),
        ("llama-3.1-8b", 1, step(decodes=32, context=32 * 2048), 9.6),
        ("llama-3.1-8b", 1, step(decodes=128, context=128 * 2048), 18.1),
    ],
)
def test_near_measured_device_time_of_h100(name: str, tp: int, work: Step, measured_ms: float) -> None:
    assert prepared(name, "h100-sxm", tp).step_time(work) / 1e6 == pytest.approx(measured_ms, rel=0.1)
