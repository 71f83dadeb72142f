"""The operator decomposition: experts, latent attention, windows, encoders, and what travels between devices.

Guards each family's FLOP, bytes and messages against formulas written out by hand. Never runs a simulation.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mist.hardware import Device, Platform
from mist.model import Experts, LatentAttention, LayerGroup, ModelSpec
from mist.perf import Deployment
from mist.perf.operators import NETWORK_KINDS, Operator, StepSums, forward_pass, windowed_area
from mist.perf.roofline import Roofline
from mist.request import Step
from test_hardware import OWN

EXPERTS = Experts(num_experts=16, top_k=2, ffn_size=64, shared_ffn_size=32)
MIXTURE = LayerGroup(3, 256, 8, 4, 32, 0, experts=EXPERTS)
LATENT = LatentAttention(q_lora_rank=96, kv_lora_rank=64, qk_nope_size=32, rope_size=16, v_size=24)
MLA = LayerGroup(2, 256, 8, 8, 48, 512, latent=LATENT)
LOCAL = LayerGroup(2, 256, 8, 4, 32, 512, window=100)
FULL = LayerGroup(2, 256, 8, 4, 32, 512)
LINEAR = LayerGroup(1, 256, 0, 0, 32, 0, num_linear=2)


def spec(*layers: LayerGroup, **fields: Any) -> ModelSpec:
    return ModelSpec("tiny", layers, 1000, False, 65536, **fields)


def deployment(model: ModelSpec, weights: str = "bf16", kv: str = "bf16", **parallel: int) -> Deployment:
    device = Device.from_mapping(OWN | {"scale_up_domain": 4})
    return Deployment(model, Platform(device, **parallel), weights, kv, 64, 8)


def by_name(d: Deployment, **options: float) -> dict[str, Operator]:
    operators = forward_pass(d, **options)
    names = [o.name for o in operators]
    assert len(names) == len(set(names)), names
    return {o.name: o for o in operators}


def sums(chunks: list[tuple[int, int]] | None = None, decodes: int = 0, context: int = 0) -> StepSums:
    chunks = chunks or []
    return StepSums.of(Step(decodes, context, chunks, sum(c for c, _ in chunks), decodes + len(chunks)))


def test_dense_flop_of_a_mixture_are_two_per_active_parameter() -> None:
    model = spec(MIXTURE)
    work = StepSums(tokens=10, sampled=10)
    operators = [o for o in forward_pass(deployment(model)) if o.kind in ("gemm", "grouped_gemm")]
    vectors = 3 * MIXTURE.num_vector_parameters() + 256 + 1000 * 256  # of the embedding no row is multiplied
    assert sum(o.flop_of(work) for o in operators) == 2 * 10 * (model.num_active_parameters - vectors)


def test_experts_are_read_by_the_share_that_tokens_touch() -> None:
    operators = by_name(deployment(spec(MIXTURE)))
    down = operators["experts_down"]
    assert down.weight_bytes == 2 * 16 * 256 * 64
    for tokens in (1, 5, 400):
        share = 1 - (1 - 2 / 16) ** tokens
        work = StepSums(tokens=tokens)
        assert down.compulsory_bytes_of(work) == pytest.approx(3 * down.weight_bytes * share)
    assert down.flop_of(StepSums(tokens=5)) == 3 * 2 * 5 * 2 * 256 * 64
    assert operators["router"].shape == (16, 256)
    assert operators["shared_down"].shape == (256, 32)


@pytest.mark.parametrize("ep", [1, 2, 4])
def test_experts_split_by_tensor_or_by_expert_do_the_same_work(ep: int) -> None:
    one = by_name(deployment(spec(MIXTURE)))["experts_gate_up"]
    split = by_name(deployment(spec(MIXTURE), tp=4, ep=ep))["experts_gate_up"]
    work = StepSums(tokens=7)
    assert split.flop_of(work) == one.flop_of(work) / 4
    assert split.compulsory_bytes_of(work) == pytest.approx(one.compulsory_bytes_of(work) / 4)
    assert split.shape == (2 * 64 * ep // 4, 256)


def test_experts_see_the_tokens_of_all_attention_groups() -> None:
    d = deployment(spec(MIXTURE), attn_dp=4, ep=4)
    gate = by_name(d)["experts_gate_up"]
    work = StepSums(tokens=100, shared_tokens=3)
    assert gate.flop_of(work) == 3 * 2 * (3 * 2) * 2 * 64 * 256, "k rows per token of one group: the four share them"
    assert gate.compulsory_bytes_of(work) == pytest.approx(3 * 2 * 4 * 128 * 256 * (1 - (14 / 16) ** 12))
    worst = by_name(d, expert_imbalance=1.5)["experts_gate_up"]
    assert worst.flop_of(work) == 1.5 * gate.flop_of(work)


def test_tokens_travel_to_experts_only_between_attention_groups() -> None:
    row = 256 * 2
    kinds = {name: o.kind for name, o in by_name(deployment(spec(MIXTURE), tp=4, ep=4)).items()}
    assert {n for n, kind in kinds.items() if kind in NETWORK_KINDS} == {"all_reduce", "logits_gather"}
    spread = by_name(deployment(spec(MIXTURE), attn_dp=4, ep=4))
    copies = 4 * (1 - (3 / 4) ** 2)  # of four ranks, those that two experts are expected on
    assert spread["dispatch"].shape == (copies * row, 4)
    assert (spread["dispatch"].repeats, spread["combine"].bytes["tokens"]) == (3, copies * row)
    assert "all_reduce" not in spread
    split = by_name(deployment(spec(MIXTURE), attn_dp=4))
    assert split["tokens_gather"].shape == split["tokens_scatter"].shape == (4 * row, 4)
    assert "dispatch" not in split


def test_dispatch_is_in_the_dtype_of_the_gemm() -> None:
    device = Device.from_mapping(OWN | {"peak_tflops": {"bf16": 500, "fp8": 1000}})
    d = Deployment(spec(MIXTURE), Platform(device, ep=4, attn_dp=4), "fp8", "bf16", 64, 8)
    operators = by_name(d)
    there, back = (operators[name].bytes["tokens"] for name in ("dispatch", "combine"))
    assert back == 2 * there == 1.75 * 256 * 2
    assert operators["experts_down"].dtype == "fp8"


def test_latent_attention_formulas() -> None:
    operators = by_name(deployment(spec(MLA), kv="fp8", tp=2))
    heads, cache = 4, 64 + 16
    decode = sums(decodes=3, context=300)
    assert operators["qkv_down"].shape == (96 + cache, 256), "copied on every rank"
    assert operators["q_up"].shape == (heads * 48, 96)
    assert operators["o_proj"].shape == (256, heads * 24)
    assert operators["attention_decode"].flop_of(decode) == 2 * 2 * heads * (cache + 64) * 300
    assert operators["attention_decode"].compulsory_bytes_of(decode) == 2 * 300 * cache
    absorbed = operators["q_absorb"].flop_of(decode) + operators["v_up"].flop_of(decode)
    assert absorbed == 2 * 2 * 3 * heads * 64 * (32 + 24)
    assert not operators["kv_up"].runs(decode)
    prefill = sums([(10, 30)])
    assert operators["kv_up"].flop_of(prefill) == 2 * 2 * 40 * heads * (32 + 24) * 64, "all of the context is expanded"
    assert operators["kv_up"].compulsory_bytes_of(prefill) == 2 * (2 * heads * 56 * 64 + 40 * cache)
    assert operators["attention_prefill"].flop_of(prefill) == 2 * 2 * heads * (48 + 24) * 10 * 35
    assert not operators["q_absorb"].runs(prefill)


def test_latent_weights_are_those_of_the_model() -> None:
    operators = by_name(deployment(spec(MLA)))
    names = ("qkv_down", "q_up", "kv_up", "o_proj", "gate_up", "down")
    weights = sum(operators[n].repeats * operators[n].weight_bytes for n in names)
    assert weights == 2 * 2 * MLA.num_matrix_parameters()


@given(st.integers(1, 300), st.integers(0, 300), st.integers(1, 400))
def test_windowed_area_is_the_integral(c: int, s: int, window: int) -> None:
    # trapezoids are exact: the integrand bends at whole numbers only
    exact = sum((min(x, window) + min(x + 1, window)) / 2 for x in range(s, s + c))
    assert windowed_area(c, s, window) == pytest.approx(exact)
    assert windowed_area(c, s, 1000) == c * (s + c / 2)


def test_windows_bound_what_a_token_attends_to() -> None:
    operators = by_name(deployment(spec(LOCAL, FULL)))
    assert {"attention_decode", "local_attention_decode"} <= operators.keys()
    local, full = operators["local_attention_decode"], operators["attention_decode"]
    assert local.compulsory_bytes_of(sums(decodes=2, context=150)) == full.compulsory_bytes_of(
        sums(decodes=2, context=150)
    )
    assert local.compulsory_bytes_of(sums(decodes=2, context=5000)) == 2 * 2 * 4 * 32 * 2 * 200
    assert full.compulsory_bytes_of(sums(decodes=2, context=5000)) == 2 * 2 * 4 * 32 * 2 * 5000
    long = sums([(50, 1000)])
    assert operators["local_attention_prefill"].flop_of(long) == 2 * 4 * 8 * 32 * 50 * 100
    assert operators["local_attention_prefill"].compulsory_bytes_of(long) == 2 * 2 * 4 * 32 * 2 * 150


def test_windowed_sums_without_chunks_are_an_upper_bound() -> None:
    known = sums([(300, 0)])
    unknown = StepSums(prefill_tokens=300, prefill_context=300, prefill_area=300**2 / 2)
    for window in (1, 50, 299, 300, 1000):
        assert unknown.windowed(window).prefill_area >= known.windowed(window).prefill_area
        assert unknown.windowed(window).prefill_context >= known.windowed(window).prefill_context
    assert known.windowed(0) is known


def test_equal_operators_of_different_layers_are_one() -> None:
    operators = by_name(deployment(spec(LOCAL, FULL, LOCAL, FULL)))
    assert operators["qkv"].repeats == 8
    assert operators["local_attention_decode"].repeats == 4


def test_encoders_attend_both_ways_and_cache_nothing() -> None:
    operators = by_name(deployment(spec(FULL, is_encoder=True, has_classifier=False)))
    work = sums([(40, 0), (10, 0)])
    assert operators["attention_encoder"].flop_of(work) == 2 * 4 * 8 * 32 * (40**2 + 10**2)
    assert operators["attention_encoder"].compulsory_bytes_of(work) == 0
    assert {"kv_write", "lm_head", "attention_decode"}.isdisjoint(operators)
    assert operators["pooler"].driver == "sampled"


def test_linear_replacements_are_matrices_without_attention() -> None:
    operators = by_name(deployment(spec(FULL, LINEAR)))
    assert operators["linear"].flop_of(sums(decodes=3, context=30)) == 2 * 2 * 3 * 256 * 256
    assert operators["qkv"].repeats == 2


def test_stages_send_a_message_each() -> None:
    operators = forward_pass(deployment(spec(FULL), tp=2, pp=4))
    messages = {o.shape: o.repeats for o in operators if o.kind == "message"}
    assert messages == {(512, 0): 2, (512, 1): 1}, "two stages fit into each domain of four devices"
    alone = by_name(deployment(spec(FULL), tp=2))
    assert by_name(deployment(spec(FULL), tp=2, pp=2))["gate_up"] == alone["gate_up"]


MODELS = {
    "mixture": (spec(FULL, MIXTURE), [{}, {"tp": 4}, {"tp": 4, "ep": 4}, {"attn_dp": 8, "ep": 8}, {"attn_dp": 2}]),
    "latent": (spec(MLA, MIXTURE), [{}, {"tp": 8}, {"tp": 2, "pp": 2}, {"tp": 2, "attn_dp": 2, "ep": 4}]),
    "local": (spec(LOCAL, FULL, LOCAL), [{}, {"tp": 2, "pp": 3}]),
    "chunked": (spec(LayerGroup(2, 256, 8, 4, 32, 512, window=64, chunked=True), FULL), [{}]),
    "pruned": (spec(FULL, LINEAR, LayerGroup(1, 256, 0, 0, 32, 128)), [{}, {"tp": 2}]),
    "encoder": (spec(FULL, is_encoder=True, has_classifier=False), [{}, {"tp": 2}]),
}
CASES = [(name, parallel) for name, (_, degrees) in MODELS.items() for parallel in degrees]
PREPARED: dict[str, Roofline] = {}
#: What attention groups share.
SHARED = {
    "tokens_gather", "tokens_scatter",
    "experts_gate_up", "experts_down", "experts_activation", "experts_sum",
}  # fmt: skip


def prepared(case: tuple[str, dict[str, int]], **changes: Any) -> Roofline:
    name, parallel = case
    key = f"{case}{changes}"
    if key not in PREPARED:
        d = deployment(MODELS[name][0], **parallel)
        d = Deployment(d.model, d.platform, d.weights_dtype, d.kv_dtype, 64, 8, **changes)
        PREPARED[key] = Roofline()
        assert PREPARED[key].supports(d) is None
        PREPARED[key].prepare(d)
    return PREPARED[key]


@st.composite
def steps(draw: st.DrawFn) -> Step:
    chunks = draw(st.lists(st.tuples(st.integers(1, 3000), st.integers(0, 20_000)), max_size=3))
    decodes = draw(st.integers(0 if chunks else 1, 30))
    context = decodes * draw(st.integers(1, 8000))
    sampled = decodes + draw(st.integers(0, len(chunks)))
    return Step(decodes, context, chunks, sum(c for c, _ in chunks), sampled, draw(st.just(0) | st.integers(1, 9000)))


@given(st.sampled_from(CASES), steps())
def test_explanations_sum_to_the_step(case: tuple[str, dict[str, int]], step: Step) -> None:
    roofline = prepared(case)
    operators = roofline.explain(step)
    assert sum(o.time_ns for o in operators) == pytest.approx(roofline.step_time(step), abs=1.01)
    assert all(o.time_ns > 0 for o in operators)
    assert all(o.floor_ns <= o.time_ns * (1 + 1e-9) for o in operators if o.bound_by != "network")


@given(st.sampled_from(CASES), steps())
def test_no_family_beats_the_floor(case: tuple[str, dict[str, int]], step: Step) -> None:
    assert 0 < prepared(case).floor_time(step) <= prepared(case).step_time(step)


@given(st.sampled_from(CASES), steps(), st.integers(1, 400))
def test_more_work_never_takes_less(case: tuple[str, dict[str, int]], step: Step, more: int) -> None:
    roofline, n, chunks = prepared(case), step.num_decodes, step.chunks
    context, sampled = step.decode_context + more, step.num_sampled + 1
    larger = [replace(step, num_decodes=n + 1, decode_context=context, num_sampled=sampled)]
    larger.append(replace(step, shared_tokens=(step.shared_tokens or step.num_tokens) + more))
    if n:
        larger.append(replace(step, decode_context=context))
    for i, (c, s) in enumerate(chunks):
        for chunk, added in (((c + more, s), more), ((c, s + more), 0)):
            longer = [*chunks[:i], chunk, *chunks[i + 1 :]]
            larger.append(replace(step, chunks=longer, num_prefill_tokens=step.num_prefill_tokens + added))
    for bigger in larger:
        assert roofline.step_time(bigger) >= roofline.step_time(step)
        assert roofline.floor_time(bigger) >= roofline.floor_time(step)


@given(st.sampled_from(CASES), steps())
def test_what_groups_share_takes_the_tokens_of_all(case: tuple[str, dict[str, int]], step: Step) -> None:
    """As many tokens everywhere change nothing; else each part is that of equal groups with its number of tokens."""
    roofline, own = prepared(case), replace(step, shared_tokens=0)
    assert roofline.step_time(replace(step, shared_tokens=step.num_tokens)) == roofline.step_time(own)
    tokens = step.shared_tokens or step.num_tokens
    shared = SHARED if "attn_dp" in case[1] else set()
    parts = [o for o in roofline.explain(own) if o.name not in shared]
    parts += [o for o in roofline.explain(Step(0, 0, [(tokens, 0)], tokens, 0)) if o.name in shared]
    assert roofline.step_time(step) == pytest.approx(sum(o.time_ns for o in parts), abs=1.01)


def test_stages_take_the_time_of_the_whole_and_their_messages() -> None:
    step = Step(4, 4000, [(20, 5)], 20, 5)
    one, four = prepared(("local", {})), Roofline()
    d = deployment(MODELS["local"][0], pp=6)
    four.prepare(d)
    messages = sum(o.time_ns for o in four.explain(step) if o.name == "stage_message")
    assert messages > 0
    assert four.step_time(step) == pytest.approx(one.step_time(step) + messages, abs=2)


def test_without_a_graph_the_host_launches_every_kernel() -> None:
    step = Step(1, 10, [], 0, 1)
    graph, eager = prepared(("mixture", {})), prepared(("mixture", {}), cuda_graph=False)
    kernels = sum(o.count for o in graph.explain(step))
    assert eager.step_time(step) == pytest.approx(max(graph.step_time(step), 5_000 * kernels), abs=1.01)
    assert eager.step_time(step) > graph.step_time(step)
    assert eager.explain(step)[-1].name == "waiting_for_host"
    busy = Step(0, 0, [(20_000, 0)] * 50, 1_000_000, 50)
    assert eager.step_time(busy) == graph.step_time(busy)
    assert eager.explain(busy)[-1].name != "waiting_for_host"


def test_an_operator_alone_costs_what_it_costs_in_a_step() -> None:
    roofline = prepared(("latent", {"tp": 8}))
    step = Step(0, 0, [(100, 50)], 100, 1)
    work = StepSums.of(step)
    operators = forward_pass(deployment(MODELS["latent"][0], tp=8))
    times = [roofline.operator_ns(o, work) for o in operators]
    assert sum(times) == pytest.approx(roofline.step_time(step), abs=1.01)
