"""Model shapes: catalogue parameter counts, KV and weight bytes, and what a Hugging Face config may hold.

Guards the values that memory and time are computed from. Never runs a simulation.
"""

from __future__ import annotations

import json
import os
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml

from mist.model import LayerGroup, ModelSpec, dtype_bytes
from mist.model.quantization import UNKNOWN, checkpoint_dtype

LLAMA_70B: dict[str, Any] = {
    "model_type": "llama", "num_hidden_layers": 80, "hidden_size": 8192, "num_attention_heads": 64,
    "num_key_value_heads": 8, "intermediate_size": 28672, "vocab_size": 128256, "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}  # fmt: skip

CATALOGUE = {
    path.name.removesuffix(".yaml"): yaml.safe_load(path.read_text(encoding="utf-8"))
    for path in resources.files("mist").joinpath("data", "models").iterdir()
    if path.name.endswith(".yaml")
}


def llama_70b(**changes: Any) -> ModelSpec:
    return ModelSpec.from_hf_config("llama-3.1-70b", LLAMA_70B | changes)


@pytest.mark.parametrize("name", sorted(CATALOGUE))
def test_parameters_match_the_published_count(name: str) -> None:
    entry = CATALOGUE[name]
    model = ModelSpec.from_hf_config(entry["id"], entry["config"])
    assert model.num_parameters / 1e9 == pytest.approx(entry["published_parameters_billions"], rel=0.02)
    assert entry["published_parameters_source"]
    assert entry["config_source"]
    assert name in entry["aliases"]


def test_catalogue_names_are_unique() -> None:
    names = [n.lower() for e in CATALOGUE.values() for n in (e["id"], *e["aliases"])]
    assert len(names) == len(set(names))


def test_kv_bytes_of_llama_3_1_70b() -> None:
    model = llama_70b()
    assert model.kv_bytes_per_token("bf16") == 320 * 1024
    assert model.kv_bytes_per_token("fp8") == 160 * 1024


@pytest.mark.parametrize(("tp", "share"), [(1, 1), (2, 2), (4, 4), (8, 8), (16, 8), (64, 8)])
def test_kv_heads_are_replicated_beyond_one_per_rank(tp: int, share: int) -> None:
    assert llama_70b().kv_bytes_per_token_per_device("bf16", tp) == 320 * 1024 // share


def test_weights_shard_over_ranks() -> None:
    model = llama_70b()
    whole = model.weight_bytes("bf16")
    assert whole == 2 * model.num_parameters
    assert model.weight_bytes("bf16", tp=8) == pytest.approx(whole / 8, rel=1e-3)
    # beyond the KV heads their projections are copied, so that half of the ranks' weights is more than a half
    kv_copy = 80 * 2 * 128 * 8192 * 2
    assert model.weight_bytes("bf16", tp=16) - whole / 16 == pytest.approx(kv_copy / 2, rel=0.02)


def test_quantised_weights_keep_embedding_and_classifier_in_16_bits() -> None:
    model = llama_70b()
    wide = 2 * 128256 * 8192
    vectors = 80 * 2 * 8192 + 8192
    assert model.weight_bytes("fp8") == model.num_parameters + wide + vectors
    assert model.weight_bytes("int4") == pytest.approx((model.num_parameters - wide) / 2 + 2 * wide, rel=1e-3)


def test_tied_embedding_counts_once() -> None:
    saved = llama_70b().num_parameters - llama_70b(tie_word_embeddings=True).num_parameters
    assert saved == 128256 * 8192


def test_layer_groups_add_up() -> None:
    small = LayerGroup(2, 64, 4, 2, 16, 128)
    wide = LayerGroup(3, 64, 4, 4, 16, 256)
    both = ModelSpec("mixed", (small, wide), 100, False, 512)
    alone = [ModelSpec("one", (g,), 100, False, 512) for g in (small, wide)]
    assert both.num_layers == 5
    assert both.kv_bytes_per_token("bf16") == sum(m.kv_bytes_per_token("bf16") for m in alone) == 2 * 2 * 16 * (4 + 12)
    ends = 2 * 100 * 64 + 64
    assert both.num_parameters - ends == sum(m.num_parameters - ends for m in alone)


def test_traits_that_a_model_type_implies() -> None:
    assert not llama_70b().layers[0].qkv_bias
    qwen2 = llama_70b(model_type="qwen2").layers[0]
    assert qwen2.qkv_bias
    assert not qwen2.output_bias
    assert llama_70b(model_type="qwen3").layers[0].qk_norm
    assert not llama_70b(model_type="starcoder2").layers[0].gated_ffn
    assert llama_70b(attention_bias=True).layers[0].output_bias


def test_missing_optional_keys_mean_multi_head_attention() -> None:
    config = {k: v for k, v in LLAMA_70B.items() if k != "num_key_value_heads"}
    group = ModelSpec.from_hf_config("mha", config).layers[0]
    assert (group.num_kv_heads, group.head_size) == (64, 128)
    assert llama_70b(head_dim=None, num_key_value_heads=None).layers[0] == group


@pytest.mark.parametrize(
    "harmless",
    [
        {"sliding_window": None},
        {"sliding_window": 131072},
        {"sliding_window": 4096, "use_sliding_window": False},
        {"layer_types": ["full_attention"] * 80},
        {"quantization_config": None},
        {"num_experts": 0},
    ],
)
def test_keys_that_mean_dense_full_attention_are_tolerated(harmless: dict[str, Any]) -> None:
    assert llama_70b(**harmless) == llama_70b()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_local_experts", 8),
        ("num_experts_per_tok", -1),
        ("kv_lora_rank", 512),
        ("sliding_window", -4096),
        ("layer_types", ["sliding_attention", "full_attention"]),
        ("layer_types", ["linear_attention"] * 80),
        ("block_configs", [{}]),
        ("moe_layer_freq", [1]),
        ("hybrid_override_pattern", "M*"),
        ("index_topk", 2048),
        ("word_embed_proj_dim", 512),
        ("hidden_size", 0),
        ("hidden_size", 8192.5),
        ("hidden_size", None),
        ("num_key_value_heads", 7),
        ("num_attention_heads", "64"),
        ("num_hidden_layers", True),
    ],
)
def test_what_cannot_be_represented_names_its_key(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=key):
        llama_70b(**{key: value})


def test_all_missing_keys_are_named_at_once() -> None:
    with pytest.raises(ValueError, match="hidden_size is missing") as error:
        ModelSpec.from_hf_config("empty", {"model_type": "llama"})
    assert "vocab_size is missing" in str(error.value)
    assert "num_hidden_layers is missing" in str(error.value)


def test_tensor_parallel_split_must_be_even() -> None:
    model = llama_70b()
    assert all(model.tp_problem(tp) is None for tp in (1, 2, 4, 8, 16))
    assert "attention heads" in str(model.tp_problem(3))
    odd = ModelSpec("odd", (LayerGroup(1, 60, 12, 3, 5, 48),), 10, False, 10)
    assert "KV heads" in str(odd.tp_problem(2))


def test_unknown_dtype_lists_the_known() -> None:
    with pytest.raises(ValueError, match="fp8"):
        dtype_bytes("f8")


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("llama-2-7b-hf.json", "llama-2-7b"),
        ("llama-2-70b-hf.json", "llama-2-70b"),
        ("llama-3.1-8b-instruct.json", "llama-3.1-8b"),
        ("llama-3.1-70b-instruct.json", "llama-3.1-70b"),
        ("codellama-34b-instruct-hf.json", "codellama-34b"),
        ("yi-34b.json", "yi-34b"),
        ("qwen2.5-7b-instruct.json", "qwen2.5-7b"),
        ("qwen3-14b.json", "qwen3-14b"),
    ],
)
def test_catalogue_equals_the_published_config(file: str, name: str) -> None:
    folders = [Path(p) / "models" / file for p in os.environ.get("MIST_DATA", "").split(os.pathsep) if p]
    found = [path for path in folders if path.is_file()]
    if not found:
        pytest.skip(f"models/{file} is in no folder of MIST_DATA")
    published = ModelSpec.from_hf_config(name, json.loads(found[0].read_text(encoding="utf-8")))
    assert published == ModelSpec.from_hf_config(name, CATALOGUE[name]["config"])


@pytest.mark.parametrize(
    ("file", "billions"),
    [
        ("mixtral-8x7b-v0.1.json", 46.7),
        ("llama-4-scout-17b-16e-instruct-fp8-dynamic.json", 107.8),
        ("mistral-nemo-instruct-2407.json", 12.2),
        ("qwen3-30b-a3b.json", 30.5),
    ],
)
def test_published_configs_of_other_architectures_are_read(file: str, billions: float) -> None:
    folders = [Path(p) / "models" / file for p in os.environ.get("MIST_DATA", "").split(os.pathsep) if p]
    found = [path for path in folders if path.is_file()]
    if not found:
        pytest.skip(f"models/{file} is in no folder of MIST_DATA")
    read = ModelSpec.from_hf_config(file, json.loads(found[0].read_text(encoding="utf-8")))
    assert read.num_parameters / 1e9 == pytest.approx(billions, rel=0.005)


@pytest.mark.parametrize("kind", ["mamba", "rwkv", "t5", "Llama", "bert_like"])
def test_an_unknown_model_type_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=rf"model_type: '{kind}' is not supported \(known: .*llama"):
        llama_70b(model_type=kind)


def test_an_encoder_is_read_as_one() -> None:
    assert llama_70b(model_type="bert").is_encoder


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "vocab_size", "max_position_embeddings"])
def test_absurd_sizes_are_refused_at_once(key: str) -> None:
    config = {
        "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 128, "vocab_size": 100, "max_position_embeddings": 100,
    }  # fmt: skip
    ModelSpec.from_hf_config("small", config)
    with pytest.raises(ValueError, match=rf"{key} of 1e\+30 is no model's"):
        ModelSpec.from_hf_config("huge", {**config, key: 10**30})


@pytest.mark.parametrize(
    "scheme",
    [{"quant_method": "hqq", "bits": 3}, "fp8", [1], {"quant_method": "gptq", "bits": 3}, {"config_groups": 7}],
)
def test_a_quantisation_that_is_not_known_is_not_guessed(scheme: object) -> None:
    assert checkpoint_dtype(scheme) == UNKNOWN
    assert checkpoint_dtype(None) == "bf16"
