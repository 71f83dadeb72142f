"""Devices, platforms and engine profiles: the catalogue's figures, users' own devices, collectives and KV capacity.

Guards units (GiB against GB), sources and error messages of these values. Never runs a simulation.
"""

from __future__ import annotations

from importlib import resources
from typing import Any

import pytest
import yaml

from mist.engine import EngineProfile
from mist.errors import ScenarioError
from mist.hardware import GENERIC_EFFICIENCY, Device, Platform
from mist.model import ModelSpec
from mist.units import GIB

OWN: dict[str, Any] = {
    "name": "own", "peak_tflops": {"bf16": 500}, "memory_bytes": "64 GiB", "memory_bytes_per_s": "2 TB/s",
    "link_bytes_per_s": "100 GB/s",
}  # fmt: skip


def catalogue(kind: str) -> dict[str, dict[str, Any]]:
    folder = resources.files("mist").joinpath("data", kind)
    return {
        path.name.removesuffix(".yaml"): yaml.safe_load(path.read_text(encoding="utf-8"))
        for path in folder.iterdir()
        if path.name.endswith(".yaml")
    }


DEVICES, ENGINES, MODELS = catalogue("devices"), catalogue("engines"), catalogue("models")


def device(name: str) -> Device:
    return Device.from_mapping(DEVICES[name])


def model(name: str) -> ModelSpec:
    return ModelSpec.from_hf_config(name, MODELS[name]["config"])


@pytest.mark.parametrize("name", sorted(DEVICES))
def test_every_catalogue_figure_has_a_source(name: str) -> None:
    entry, dev = DEVICES[name], device(name)
    assert dev.name == name
    for key in ("peak_tflops", "memory_bytes", "memory_bytes_per_s"):
        assert entry["sources"][key], key
    assert 0.1e12 < dev.memory_bytes_per_s < 20e12
    assert dev.memory_bytes > 12 * GIB
    assert all(0 < value <= 1 for value in dev.efficiency.values())


def test_aliases_are_unique_and_cover_the_short_names() -> None:
    names = [n for d in map(device, DEVICES) for n in (d.name, *d.aliases)]
    assert len(names) == len(set(names))
    assert {"h100", "a100", "h200", "l40s", "mi300x"} <= set(names)


def test_h100_is_80_gib_not_80_gb() -> None:
    h100 = device("h100-sxm")
    assert h100.memory_bytes == 80 * 2**30
    assert h100.peak("bf16") == 989e12
    assert h100.peak("fp16") == h100.peak("bf16")
    assert h100.peak("fp8") == 1979e12
    assert h100.link_bytes_per_s == 450e9


def test_l40s_bf16_is_not_its_fp8_rate() -> None:
    assert (device("l40s").peak("bf16"), device("l40s").peak("fp8")) == (362e12, 733e12)


def test_dtypes_without_units_run_in_bf16() -> None:
    a100 = device("a100-sxm-80gb")
    assert a100.compute_dtype("fp8") == "bf16"
    assert a100.compute_dtype("int8") == "int8"
    assert a100.compute_dtype("int4") == "bf16"
    assert a100.peak("fp8") == 312e12


def test_five_numbers_make_a_device() -> None:
    own = Device.from_mapping(OWN)
    assert own.memory_bytes == 64 * GIB
    assert own.memory_bytes_per_s == 2e12
    assert own.efficiency_of("gemm", "bf16") == GENERIC_EFFICIENCY["gemm"]
    assert own.efficiency_of("gemm", "fp8") == GENERIC_EFFICIENCY["gemm_fp8"]
    assert own.launch_ns("elementwise") > 0


def test_a_variant_overrides_its_class() -> None:
    own = Device.from_mapping(OWN | {"efficiency": {"gemm": 0.7, "gemm_int8": 0.6, "allreduce_4": 0.3}})
    assert own.efficiency_of("gemm", "bf16") == 0.7
    assert own.efficiency_of("gemm", "int8") == 0.6
    assert own.efficiency_of("gemm", "fp8") == 0.7, "a measured class is better than a generic variant"
    assert own.efficiency_of("allreduce", 4) == 0.3
    assert own.efficiency_of("allreduce", 8) == GENERIC_EFFICIENCY["allreduce"]


def test_one_launch_time_serves_all_classes() -> None:
    own = Device.from_mapping(OWN | {"kernel_launch_ns": 1000})
    assert own.launch_ns("gemm") == own.launch_ns("attention_decode", "fp8") == 1000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory_bytes": "64 gigs"}, "GiB"),
        ({"memory_bytes": True}, "memory_bytes"),
        ({"memory_bytes_per_s": 0}, "at least 1"),
        ({"memory_bytes_per_s": float("nan")}, "memory_bytes_per_s"),
        ({"peak_tflops": {"fp8": 100}}, "peak_tflops.bf16"),
        ({"peak_tflops": {"bf16": 100, "fp9": 1}}, "fp8"),
        ({"peak_tflops": 500}, "must be a mapping"),
        ({"efficiency": {"gemm": 1.2}}, "efficiency.gemm"),
        ({"efficiency": {"gemms": 0.5}}, "gemm"),
        ({"efficiency": {"gemm_memry": 0.5}}, "gemm_memory"),
        ({"memory_byte": 1}, "memory_bytes"),
        ({"name": ""}, "name"),
    ],
)
def test_a_wrong_device_says_what_would_do(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ScenarioError, match=message):
        Device.from_mapping(OWN | changes)


def test_all_problems_come_at_once() -> None:
    with pytest.raises(ScenarioError) as error:
        Device.from_mapping({"name": "bad", "efficiency": {"gemm": 2}, "colour": "red"})
    assert len(error.value.problems) == 5


def test_ring_all_reduce_follows_the_formula() -> None:
    own = Device.from_mapping(
        OWN | {"link_latency_ns": 1000, "efficiency": {"allreduce": 0.5}, "kernel_launch_ns": {"allreduce": 300}}
    )
    for n, message in ((2, 1e6), (4, 3e7), (8, 1e3)):
        expected = 300 + 2 * (n - 1) * 1000 + 2 * (n - 1) / n * message / (0.5 * 100e9) * 1e9
        assert Platform(own, n).all_reduce_ns(message) == pytest.approx(expected)
    assert Platform(own, 1).all_reduce_ns(1e9) == 0


def test_switched_all_reduce_takes_the_better_algorithm() -> None:
    own = Device.from_mapping(
        OWN | {"switched": True, "link_latency_ns": 1000, "efficiency": {"allreduce": 1.0}, "kernel_launch_ns": 0}
    )
    platform = Platform(own, 8)
    assert platform.all_reduce_ns(1000) == pytest.approx(1000 + 7 * 1000 / 100e9 * 1e9)
    assert platform.all_reduce_ns(1e9) == pytest.approx(2000 + 1.75e9 / 100e9 * 1e9)


def test_mxfp4_weights_meet_8_bit_activations_where_there_are_units_for_4_bits() -> None:
    assert Device.from_mapping(OWN).compute_dtype("mxfp4") == "bf16"
    blackwell = Device.from_mapping(OWN | {"peak_tflops": {"bf16": 500, "fp8": 1000, "fp4": 2000}})
    assert (blackwell.compute_dtype("mxfp4"), blackwell.compute_dtype("fp4")) == ("fp8", "fp4")


NODES = OWN | {
    "link_latency_ns": 1000, "efficiency": {"allreduce": 1.0}, "kernel_launch_ns": 0, "scale_up_domain": 4,
    "inter_node_bytes_per_s": "10 GB/s", "inter_node_latency_ns": "5 us",
}  # fmt: skip


def test_collectives_between_nodes_are_never_free() -> None:
    own = Device.from_mapping(NODES)
    message = 1e8
    inside, across = Platform(own, 4), Platform(own, 8)
    ring = 2 * (5_000 + 1 / 2 * (message / 4) / 10e9 * 1e9)
    assert across.all_reduce_ns(message) == pytest.approx(inside.all_reduce_ns(message) + ring)
    assert across.all_gather_ns(message, 8) == pytest.approx(inside.all_gather_ns(message, 4) + ring / 2)
    assert across.all_to_all_ns(message, 8) == pytest.approx(5_000 + 1 / 2 * message / 10e9 * 1e9)


def test_collectives_within_a_node_follow_the_formulas() -> None:
    own = Device.from_mapping(NODES)
    platform = Platform(own, 4)
    assert platform.all_gather_ns(1e8, 4) == pytest.approx(3 * 1000 + 3 / 4 * 1e8 / 100e9 * 1e9)
    assert platform.all_to_all_ns(1e8, 4) == pytest.approx(3 * 1000 + 3 / 4 * 1e8 / 100e9 * 1e9)
    assert platform.all_gather_ns(1e8, 1) == platform.all_to_all_ns(1e8, 1) == 0
    assert platform.message_ns(1e8, crosses_domains=False) == pytest.approx(1000 + 1e6)
    assert platform.message_ns(1e8, crosses_domains=True) == pytest.approx(5000 + 1e7)


def test_devices_of_a_platform() -> None:
    own = Device.from_mapping(NODES)
    platform = Platform(own, tp=2, pp=4, ep=2, attn_dp=2)
    assert (platform.num_stage_devices, platform.num_devices) == (4, 16)
    assert all(platform.crosses_domains(boundary) for boundary in range(3))
    assert [Platform(own, tp=2, pp=4).crosses_domains(boundary) for boundary in range(3)] == [False, True, False]
    assert Platform(own, tp=8).problem() is None
    assert "whole groups" in str(Platform(own, tp=6).problem())
    assert "attn_dp" in str(Platform(own, tp=1, attn_dp=6).problem())


@pytest.mark.parametrize(
    ("name", "ranks", "message", "measured_us"),
    [
        # aiconfigurator-core 0.12.0: vLLM 0.24.0 (A100: 0.14.0), CUDA graph, 16-bit elements x 2 bytes
        ("h100-sxm", 2, 16384, 4.5),
        ("h100-sxm", 2, 16777216, 81.4),
        ("h100-sxm", 4, 67108864, 329.9),
        ("h100-sxm", 8, 67108864, 344.0),
        ("h200-sxm", 8, 67108864, 323.3),
        ("a100-sxm-80gb", 4, 67108864, 540.0),
        ("l40s", 8, 256, 25.0),
        ("l40s", 2, 67108864, 3541.6),
    ],
)
def test_all_reduce_is_near_measured_times(name: str, ranks: int, message: float, measured_us: float) -> None:
    assert Platform(device(name), ranks).all_reduce_ns(message) / 1e3 == pytest.approx(measured_us, rel=0.15)


def test_only_a_prefill_or_a_decode_streams_the_first_token() -> None:
    assert EngineProfile.from_mapping({"name": "mine"}).first_token == "prefill"
    assert EngineProfile.from_mapping(ENGINES["vllm-0.10"]).first_token == "decode"
    with pytest.raises(ScenarioError, match="prefill or decode"):
        EngineProfile.from_mapping({"name": "mine", "first_token": "router"})


def test_a_release_of_tables_is_text() -> None:
    assert EngineProfile.from_mapping({"name": "mine", "tables_version": "0.10"}).tables_version == "0.10"
    with pytest.raises(ScenarioError, match="in quotes"):
        EngineProfile.from_mapping({"name": "mine", "tables_version": 0.10})


@pytest.mark.parametrize("name", sorted(ENGINES))
def test_engine_catalogue_loads_with_sources(name: str) -> None:
    engine = EngineProfile.from_mapping(ENGINES[name])
    assert engine.name == name
    assert engine.sources


def test_vllm_defaults_depend_on_the_device() -> None:
    engine = EngineProfile.from_mapping(ENGINES["vllm-0.10"])
    llama = model("llama-3.1-8b")
    assert engine.limits_for(device("h100-sxm"), llama) == (1024, 8192)
    assert engine.limits_for(device("mi300x"), llama) == (1024, 8192)
    assert engine.limits_for(device("a100-sxm-80gb"), llama) == (256, 2048)
    assert engine.limits_for(device("l40s"), llama) == (256, 2048)
    old = EngineProfile.from_mapping(ENGINES["vllm-0.5"])
    assert old.limits_for(device("h100-sxm"), model("llama-2-7b")) == (256, 4096)


def test_kv_capacity_is_that_of_a_real_engine() -> None:
    """vLLM reports 26,602 blocks for CodeLlama-34B, TP2 on H100 80 GB (BLIS step records)."""
    engine = EngineProfile.from_mapping(ENGINES["vllm-0.10"])
    capacity = engine.kv_blocks(model("codellama-34b"), Platform(device("h100-sxm"), 2), "bf16", "bf16", 8192, 1024)
    assert capacity.num_blocks == pytest.approx(26602, rel=0.002)
    assert capacity.num_tokens == 16 * capacity.num_blocks
    assert "blocks of 16" in str(capacity)


def test_kv_terms_add_up_to_the_budget() -> None:
    engine = EngineProfile.from_mapping(ENGINES["ideal"])
    c = engine.kv_blocks(model("llama-3.1-8b"), Platform(device("h100-sxm")), "bf16", "fp8", 2048, 256, block_size=32)
    terms = c.kv_bytes + c.weight_bytes + c.activation_bytes + c.overhead_bytes
    assert terms == int(0.9 * 80 * GIB)
    assert c.block_bytes == 32 * 64 * 1024
    assert c.num_blocks == c.kv_bytes // c.block_bytes


def test_a_model_that_does_not_fit_says_by_how_much() -> None:
    engine = EngineProfile.from_mapping(ENGINES["vllm-0.10"])
    capacity = engine.kv_blocks(model("llama-3.1-70b"), Platform(device("h100-sxm")), "bf16", "bf16", 2048, 256)
    assert capacity.num_blocks == 0
    assert capacity.missing_bytes > 131 * GIB - 72 * GIB
    assert "GiB are missing" in str(capacity)


def test_capacity_is_that_of_the_fullest_stage() -> None:
    engine = EngineProfile.from_mapping(ENGINES["vllm-0.10"])
    llama, h100 = model("llama-3.1-70b"), device("h100-sxm")
    one = engine.kv_blocks(llama, Platform(h100, 8), "bf16", "bf16", 8192, 256)
    two = engine.kv_blocks(llama, Platform(h100, 4, pp=2), "bf16", "bf16", 8192, 256)
    assert two.block_bytes == one.block_bytes == 16 * 40960
    assert two.weight_bytes == pytest.approx(one.weight_bytes, rel=0.02)
    ends = llama.stage_weight_bytes("bf16", 4, pp=2)
    assert two.weight_bytes == max(ends)


def test_attention_groups_copy_attention_and_spread_experts() -> None:
    engine = EngineProfile.from_mapping(ENGINES["vllm-0.10"])
    deepseek, h200 = model("deepseek-v3"), device("h200-sxm")
    tensor = engine.kv_blocks(deepseek, Platform(h200, 8), "fp8", "fp8", 4096, 256)
    groups = engine.kv_blocks(deepseek, Platform(h200, 1, ep=8, attn_dp=8), "fp8", "fp8", 4096, 256)
    assert groups.weight_bytes > tensor.weight_bytes
    assert groups.block_bytes == tensor.block_bytes == 16 * 61 * 576
    assert tensor.num_blocks > groups.num_blocks > 0, "each group has a cache of its own"


def test_an_encoder_has_room_for_tokens_in_flight() -> None:
    engine = EngineProfile.from_mapping(ENGINES["vllm-0.10"])
    capacity = engine.kv_blocks(model("bge-large-en-v1.5"), Platform(device("l40s")), "fp16", "fp16", 4096, 64)
    assert capacity.block_bytes == 16 * 1024 * 2
    assert capacity.num_tokens > 4096


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step_overhead_ns": "4 parsecs"}, "ns, us"),
        ({"overlapped": "yes"}, "true or false"),
        ({"gpu_memory_utilization": 1.5}, "at most 1"),
        ({"block_size": 0}, "block_size"),
        ({"step_overhead": 1}, "step_overhead_ns"),
    ],
)
def test_a_wrong_engine_says_what_would_do(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ScenarioError, match=message):
        EngineProfile.from_mapping({"name": "own"} | changes)


def test_engine_times_take_units() -> None:
    engine = EngineProfile.from_mapping({"name": "own", "step_overhead_ns": "1.5 ms", "token_overhead_ns": 20})
    assert (engine.step_overhead_ns, engine.token_overhead_ns) == (1_500_000, 20)


def test_a_bad_peak_is_one_problem() -> None:
    card = {"name": "x", "memory_bytes": "64 GiB", "memory_bytes_per_s": "2 TB/s"}
    for peak in ({"bf16": 1e12}, 3):
        with pytest.raises(ScenarioError) as caught:
            Device.from_mapping({**card, "peak_tflops": peak})
        assert len(caught.value.problems) == 1


@pytest.mark.parametrize("size", [10**400, "1e400 GB", 9 * "9" + 400 * "0" + " GB"])
def test_sizes_beyond_arithmetic_are_refused(size: object) -> None:
    card = {"name": "x", "peak_tflops": {"bf16": 1}, "memory_bytes": size, "memory_bytes_per_s": "2 TB/s"}
    with pytest.raises(ScenarioError, match="finite"):
        Device.from_mapping(card)
