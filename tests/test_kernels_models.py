"""Experts, latent attention, windows, encoders and collectives between nodes: what each reads from made-up tables.

Guards that nothing is counted twice, that what isn't measured falls back, and the contract for every kind of model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mist.hardware import Platform
from mist.model import Experts, LatentAttention, LayerGroup, ModelSpec
from mist.perf import Deployment, OperatorTime, PerfModel
from mist.perf.kernels import Kernels
from mist.perf.measured import find_tables
from mist.perf.roofline import Roofline
from mist.request import Step
from mist.testing import PerfModelContract, small_deployment
from test_hardware import device, model
from test_kernels_tables import Row, attention_rows, prefill_ms, write, write_system

EXPERTS = ("experts_gate_up", "experts_activation", "experts_down", "experts_sum")


def moe_ms(tokens: float, width: float) -> float:
    return 0.5 + 1e-4 * tokens + 1e-4 * width


def module_prefill_ms(batch: float, length: float, heads: float) -> float:
    return 1.0 + 1e-6 * heads * batch * length * (length + 1000)


def module_decode_ms(batch: float, length: float, heads: float) -> float:
    return 1.0 + 0.02 * batch + 1e-6 * heads * batch * length


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_system(tmp_path_factory.mktemp("models"))
    write(folder, "made_up/moe/vllm/0.24.0", "moe_perf", [
        {"moe_dtype": "bfloat16", "hidden_size": 512, "inter_size": 1024, "topk": 2, "num_experts": 8,
         "moe_tp_size": tp, "moe_ep_size": ep, "distribution": distribution, "num_tokens": 2**i,
         "latency": slow * moe_ms(2**i, 1024 // tp)}
        for tp in (1, 2) for ep in (1, 2) for i in range(14)
        for distribution, slow in (("balanced", 2), ("power_law_1.2", 1))
    ])  # fmt: skip
    write(folder, "made_up/comm/vllm/0.24.0", "moe_a2a_perf", [
        {"comm_backend": backend, "phase": phase, "ep_size": 2, "node_num": 1, "hidden_size": 512, "topk": 2,
         "num_experts": 8, "sms": 20, "num_tokens": 2**i, "latency": 300.0 + slow * 2**i}
        for backend, slow, last in (("ll", 1.0, 8), ("ht", 2.0, 14)) for phase in ("dispatch", "combine")
        for i in range(last)
    ])  # fmt: skip
    write(folder, "made_up/encoder_attention/vllm/0.24.0", "encoder_attention_perf", [
        {"head_dim": 64, "num_heads": heads, "batch_size": batch, "isl": 2**i,
         "latency": 2 * prefill_ms(batch, 2**i, heads)}
        for heads in (4, 8) for batch in (1, 8, 64) for i in range(12)
    ])  # fmt: skip
    for name, length, law in (("context", "isl", module_prefill_ms), ("generation", "step", module_decode_ms)):
        write(folder, "made_up/mla/vllm/0.24.0", f"mla_{name}_module_perf", [
            {"architecture": "DeepseekV3ForCausalLM", "gemm_type": "bfloat16", "kv_cache_dtype": "bfloat16",
             "num_heads": heads, "batch_size": batch, length: 2**i,
             "latency": law(batch, 2**i, heads)}
            for heads in (8, 16) for batch in (1, 8, 64) for i in range(12)
        ])  # fmt: skip
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIST_CACHE", str(tmp_path / "cache"))


GROUP = LayerGroup(num_layers=2, hidden_size=512, num_heads=8, num_kv_heads=4, head_size=64, ffn_size=1024)
MIXTURE = replace(GROUP, ffn_size=0, experts=Experts(num_experts=8, top_k=2, ffn_size=1024))


def of(*groups: LayerGroup, platform: dict[str, Any] | None = None, **spec: Any) -> Deployment:
    small = small_deployment()
    built = ModelSpec("made up", groups, 32_000, False, 1 << 16, **spec)
    return replace(small, model=built, platform=replace(small.platform, **(platform or {})))


def prepared(root: Path, deployment: Deployment) -> Kernels:
    kernels = Kernels(system="made_up", tables=str(root), fallback=Roofline())
    assert kernels.supports(deployment) is None
    kernels.prepare(deployment)
    return kernels


def step(chunks: Sequence[tuple[int, int]] = (), decodes: int = 0, context: int = 0) -> Step:
    return Step(decodes, context, list(chunks), sum(c for c, _ in chunks), decodes + len(chunks))


def explained(root: Path, deployment: Deployment, work: Step) -> dict[str, OperatorTime]:
    return {o.name: o for o in prepared(root, deployment).explain(work)}


def total_ms(operators: dict[str, OperatorTime], names: Sequence[str]) -> float:
    return sum(operators[name].time_ns for name in names) / 1e6


@pytest.mark.parametrize(("platform", "width"), [({}, 1024), ({"tp": 2}, 512), ({"tp": 2, "ep": 2}, 1024)])
def test_experts_are_one_measured_kernel_on_the_wanted_distribution(
    root: Path, platform: dict[str, int], width: int
) -> None:
    found = explained(root, of(MIXTURE, platform=platform), step([(256, 0)]))
    assert total_ms(found, EXPERTS) == pytest.approx(2 * moe_ms(256, width), rel=1e-3)
    assert {found[name].origin for name in EXPERTS} == {"measured"}


def test_experts_of_another_shape_are_the_fallbacks(root: Path) -> None:
    group = replace(MIXTURE, experts=Experts(num_experts=16, top_k=2, ffn_size=1024))
    found = explained(root, of(group), step([(256, 0)]))
    assert found["experts_gate_up"].origin == "roofline"
    assert found["qkv"].origin == "measured"


def test_few_tokens_dont_pay_for_all_experts(root: Path, tmp_path: Path) -> None:
    """A table that is too fast is raised to the weights of the experts that are touched, not to all of them."""
    fast = write_system(tmp_path / "fast")
    write(fast, "made_up/moe/vllm/0.24.0", "moe_perf", [
        {"moe_dtype": "bfloat16", "hidden_size": 512, "inter_size": 1024, "topk": 2, "num_experts": 8, "moe_tp_size": 1,
         "moe_ep_size": 1, "distribution": "balanced", "num_tokens": n, "latency": 1e-9} for n in (1, 4096)
    ])  # fmt: skip
    found = explained(fast, of(MIXTURE), step(decodes=1, context=64))
    weights = 2 * 8 * 3 * 512 * 1024 * 2 / small_deployment().platform.device.memory_bytes_per_s * 1e3
    assert total_ms(found, EXPERTS) == pytest.approx(weights * 2 / 8, rel=1e-3)
    assert found["experts_down"].origin == "clamped"


def test_tokens_that_travel_take_the_faster_all_to_all(root: Path) -> None:
    deployment = of(MIXTURE, platform={"attn_dp": 2, "ep": 2})
    for tokens, us in ((64, 300 + 64), (1024, 300 + 2 * 1024)):
        found = explained(root, deployment, step([(tokens, 0)]))
        assert found["dispatch"].time_ns == pytest.approx(2e3 * us)
        assert found["dispatch"].origin == "measured"
        assert found["experts_down"].origin == "roofline", "the kernels were measured with the tokens of all ranks"


def test_latent_attention_is_what_its_projections_leave_of_a_module(root: Path) -> None:
    latent = LatentAttention(1536, 512, 128, 64, 128)
    group = replace(GROUP, hidden_size=7168, num_heads=16, num_kv_heads=16, head_size=192, latent=latent)
    module = ["qkv_down", "q_up", "rotary", "kv_write", "o_proj"]
    prefill = explained(root, of(group), step([(512, 0)]))
    names = [*module, "kv_up", "attention_prefill"]
    assert total_ms(prefill, names) == pytest.approx(2 * module_prefill_ms(1, 512, 16), rel=0.01)
    decode = explained(root, of(group), step(decodes=8, context=8192))
    names = [*module, "q_absorb", "v_up", "attention_decode"]
    assert total_ms(decode, names) == pytest.approx(2 * module_decode_ms(8, 1024, 16), rel=0.01)


def test_a_window_bounds_what_contexts_cost(root: Path) -> None:
    local = prepared(root, of(replace(GROUP, window=1024)))
    everywhere = prepared(root, of(GROUP))
    short, long = step(decodes=8, context=8 * 1024), step(decodes=8, context=8 * 30_000)
    assert local.step_time(long) == local.step_time(short) == everywhere.step_time(short)
    assert local.step_time(step([(64, 30_000)])) < everywhere.step_time(step([(64, 30_000)]))
    assert local.step_time(step([(512, 0)])) == everywhere.step_time(step([(512, 0)]))


def test_measured_windows_come_before_clipped_contexts(tmp_path: Path) -> None:
    folder = write_system(tmp_path / "t")
    for context in (True, False):
        name = "context_attention_perf" if context else "generation_attention_perf"
        rows: list[Row] = [{**row, "window_size": window, "latency": row["latency"] * (3 if window else 1)}
                           for window in (0, 1024) for row in attention_rows(context)]  # fmt: skip
        write(folder, "made_up/attention/vllm/0.24.0", name, rows)
    for work in (step(decodes=8, context=4096), step([(512, 0)])):
        local, whole = (explained(folder, of(replace(GROUP, window=w)), work) for w in (1024, 0))
        name = "attention_decode" if work.num_decodes else "attention_prefill"
        assert local[f"local_{name}"].time_ns == pytest.approx(3 * whole[name].time_ns, rel=1e-3)


def test_encoders_read_their_own_table(root: Path) -> None:
    found = explained(root, of(GROUP, is_encoder=True, has_classifier=False), step([(512, 0)]))
    assert found["attention_encoder"].time_ns == pytest.approx(2e6 * 2 * prefill_ms(1, 512, 8), rel=1e-3)
    assert found["attention_encoder"].origin == "interpolated"


def test_collectives_between_domains_are_the_fallbacks(root: Path) -> None:
    deployment = of(GROUP, platform={"tp": 2})
    apart = replace(deployment.platform.device, scale_up_domain=1)
    found = explained(root, replace(deployment, platform=replace(deployment.platform, device=apart)), step([(64, 0)]))
    assert found["all_reduce"].origin == found["logits_gather"].origin == "roofline"
    assert explained(root, deployment, step([(64, 0)]))["all_reduce"].origin != "roofline"


def test_an_eager_step_waits_for_the_host(root: Path) -> None:
    kernels = Kernels(system="made_up", tables=str(root), fallback=Roofline(), eager_launch_ns=50_000.0)
    kernels.prepare(replace(small_deployment(), cuda_graph=False))
    work = step(decodes=1, context=64)
    found = kernels.explain(work)
    launches = sum(o.count for o in found if o.name != "waiting_for_host")
    assert kernels.step_time(work) == pytest.approx(50_000 * launches, abs=1.01)
    assert found[-1].name == "waiting_for_host"


class TestContract(PerfModelContract):
    """Every kind of model on made-up tables."""

    num_steps = 60

    @pytest.fixture(autouse=True)
    def _tables(self, root: Path) -> None:
        self.root = root

    def model(self) -> PerfModel:
        return Kernels(system="made_up", tables=str(self.root), fallback=Roofline())

    def deployments(self) -> Sequence[Deployment]:
        latent = LatentAttention(1536, 512, 128, 64, 128)
        return [
            of(MIXTURE, GROUP, platform={"tp": 2, "ep": 2}),
            of(MIXTURE, platform={"attn_dp": 2, "ep": 2}),
            of(replace(GROUP, hidden_size=7168, num_heads=16, num_kv_heads=16, head_size=192, latent=latent)),
            of(GROUP, replace(GROUP, window=128), platform={"pp": 2}),
            replace(of(GROUP, is_encoder=True, has_classifier=False), cuda_graph=False),
        ]


INSTALLED = find_tables()


@pytest.mark.skipif(isinstance(INSTALLED, str), reason=str(INSTALLED))
@pytest.mark.parametrize(
    ("name", "on", "platform", "weights"),
    [
        ("gpt-oss-120b", "h100-sxm", {"tp": 4}, "mxfp4"),
        ("qwen3-30b-a3b", "h100-sxm", {}, "bf16"),
        ("mixtral-8x7b", "h100-sxm", {"tp": 2}, "bf16"),
        ("deepseek-v3", "h200-sxm", {"tp": 8}, "fp8"),
        ("llama-4-scout", "h100-sxm", {"tp": 4}, "bf16"),
        ("bge-large-en-v1.5", "h100-sxm", {}, "bf16"),
    ],
)
def test_real_models_stay_within_a_factor_of_two_of_the_roofline(
    name: str, on: str, platform: dict[str, int], weights: str
) -> None:
    deployment = Deployment(model(name), Platform(device(on), **platform), weights, "bf16", 8192, 256)
    kernels, roofline = Kernels(fallback=Roofline()), Roofline()
    for prepared in (kernels, roofline):
        assert prepared.supports(deployment) is None
        prepared.prepare(deployment)
    works = [step([(512, 0)]), step([(512, 0)] * 16)]
    if not deployment.model.is_encoder:
        works += [step([(8192, 0)]), step(decodes=1, context=2048), step(decodes=128, context=128 * 2048)]
    for work in works:
        assert 0.5 < kernels.step_time(work) / roofline.step_time(work) < 2
    shares = kernels.provenance()
    assert shares["measured"] + shares["interpolated"] > 0.9
