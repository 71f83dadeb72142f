"""Model families beyond dense decoders: experts, latent attention, windows, pruned blocks, classics, encoders, shards.

Guards what a Hugging Face config of each means, against published parameter counts. Never runs a simulation.
"""

from __future__ import annotations

from typing import Any

import pytest

from mist.model import Experts, LayerGroup, ModelSpec

DEEPSEEK: dict[str, Any] = {
    "model_type": "deepseek_v3", "num_hidden_layers": 61, "hidden_size": 7168, "num_attention_heads": 128,
    "num_key_value_heads": 128, "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_routed_experts": 256,
    "n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 3, "moe_layer_freq": 1,
    "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "vocab_size": 129280, "max_position_embeddings": 163840, "tie_word_embeddings": False,
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3"},
}  # fmt: skip
GPT_OSS: dict[str, Any] = {
    "model_type": "gpt_oss", "num_hidden_layers": 36, "hidden_size": 2880, "num_attention_heads": 64,
    "num_key_value_heads": 8, "head_dim": 64, "intermediate_size": 2880, "num_local_experts": 128,
    "experts_per_token": 4, "sliding_window": 128, "attention_bias": True, "vocab_size": 201088,
    "layer_types": ["sliding_attention", "full_attention"] * 18, "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]},
}  # fmt: skip
LLAMA_4: dict[str, Any] = {
    "model_type": "llama4", "vision_config": {"hidden_size": 1408},
    "text_config": {
        "model_type": "llama4_text", "num_hidden_layers": 48, "hidden_size": 5120, "num_attention_heads": 40,
        "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 8192, "intermediate_size_mlp": 16384,
        "num_local_experts": 128, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2, "no_rope_layers": [],
        "attention_chunk_size": 8192, "vocab_size": 202048, "max_position_embeddings": 1048576,
    },
}  # fmt: skip
ENCODER: dict[str, Any] = {
    "model_type": "bert", "num_hidden_layers": 24, "hidden_size": 1024, "num_attention_heads": 16,
    "intermediate_size": 4096, "vocab_size": 30522, "max_position_embeddings": 512, "type_vocab_size": 2,
}  # fmt: skip
SMALL: dict[str, Any] = {
    "model_type": "llama", "num_hidden_layers": 8, "hidden_size": 256, "num_attention_heads": 8,
    "num_key_value_heads": 4, "intermediate_size": 512, "vocab_size": 1000, "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}  # fmt: skip


def spec(config: dict[str, Any], **changes: Any) -> ModelSpec:
    return ModelSpec.from_hf_config("model", config | changes)


FALCON = {"model_type": "falcon", "num_attention_heads": 232, "num_kv_heads": 8, "new_decoder_architecture": True,
          "parallel_attn": True, "multi_query": True, "bias": False, "alibi": False, "hidden_size": 14848,
          "num_hidden_layers": 80, "vocab_size": 65024}  # fmt: skip
GPT_J = {"model_type": "gptj", "n_embd": 4096, "n_layer": 28, "n_head": 16, "n_inner": None, "n_positions": 2048,
         "vocab_size": 50400, "tie_word_embeddings": False}  # fmt: skip
BLOOM = {"model_type": "bloom", "n_embed": 14336, "n_layer": 70, "num_attention_heads": 112, "vocab_size": 250880}
OPT = {"model_type": "opt", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "ffn_dim": 16384,
       "max_position_embeddings": 2048, "vocab_size": 50272, "word_embed_proj_dim": 4096}  # fmt: skip
XLM_R = ENCODER | {"model_type": "xlm-roberta", "vocab_size": 250002, "max_position_embeddings": 514,
                   "type_vocab_size": 1, "architectures": ["XLMRobertaForSequenceClassification"]}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "billions"),
    [
        # model cards: DeepSeek-V3, gpt-oss-120b, Llama-4-Maverick, Falcon-180B, GPT-J, BLOOM, OPT, BERT, BGE re-ranker
        (DEEPSEEK, 671.0), (GPT_OSS, 116.8), (LLAMA_4, 400.7), (FALCON, 179.5), (GPT_J, 6.05), (BLOOM, 176.2),
        (OPT, 6.66), (ENCODER, 0.335), (XLM_R, 0.560),
    ],
)  # fmt: skip
def test_parameters_of_every_family(config: dict[str, Any], billions: float) -> None:
    assert spec(config).num_parameters / 1e9 == pytest.approx(billions, rel=0.01)


def test_active_parameters_leave_idle_experts_out() -> None:
    assert spec(DEEPSEEK).num_active_parameters / 1e9 == pytest.approx(37.5, rel=0.01)
    assert spec(GPT_OSS).num_active_parameters / 1e9 == pytest.approx(5.75, rel=0.01)
    assert spec(SMALL).num_active_parameters == spec(SMALL).num_parameters


def test_latent_attention_caches_576_elements_on_every_rank() -> None:
    model = spec(DEEPSEEK)
    assert model.kv_bytes_per_token("bf16") == 61 * 576 * 2
    assert model.kv_bytes_per_token_per_device("fp8", tp=16) == 61 * 576
    assert [g.num_layers for g in model.layers] == [3, 58]
    dense, mixture = model.layers
    assert dense.experts is None
    assert mixture.ffn_size == 0
    assert mixture.experts == Experts(256, 8, 2048, shared_ffn_size=2048)


def test_weights_of_experts_alone_are_quantised_where_the_checkpoint_is_so() -> None:
    model = spec(GPT_OSS)
    assert (model.checkpoint_dtype, model.quantizes_experts_only) == ("mxfp4", True)
    assert model.matrix_dtypes("mxfp4") == ("bf16", "mxfp4")
    assert model.weight_bytes("mxfp4") / 2**30 == pytest.approx(60.8, rel=0.01), "the checkpoint's size"
    assert spec(DEEPSEEK).checkpoint_dtype == "fp8"
    assert spec(DEEPSEEK).matrix_dtypes("fp8") == ("fp8", "fp8")


@pytest.mark.parametrize(
    ("quantization", "dtype", "experts_only"),
    [
        (None, "bf16", False),
        ({"quant_method": "awq", "bits": 4}, "int4", False),
        ({"quant_method": "gptq", "bits": 8}, "int8", False),
        ({"quant_algo": "NVFP4", "ignore": ["lm_head"]}, "fp4", False),
        ({"quant_method": "compressed-tensors", "ignore": ["vision.self_attn"],
          "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float"}}}}, "fp8", False),
        ({"quant_method": "compressed-tensors", "ignore": ["lm_head", "re:.*self_attn.*"],
          "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int"}}}}, "int4", True),
        ({"quant_method": "something new"}, "unknown", False),
    ],
)  # fmt: skip
def test_quantisation_of_checkpoints(quantization: Any, dtype: str, experts_only: bool) -> None:
    model = spec(DEEPSEEK, quantization_config=quantization)
    assert (model.checkpoint_dtype, model.quantizes_experts_only) == (dtype, experts_only)


def test_experts_touched_follow_the_expectation() -> None:
    experts = Experts(256, 8, 2048)
    assert experts.touched_share(1.0) == pytest.approx(8 / 256)
    assert experts.touched_share(2.0) == pytest.approx(1 - (1 - 8 / 256) ** 2)
    assert experts.touched_share(1e6) == pytest.approx(1)


def test_windows_alternate() -> None:
    model = spec(GPT_OSS)
    assert [g.window for g in model.layers[:4]] == [128, 0, 128, 0]
    assert [(g.num_layers, g.window) for g in model.merged_layers()] == [(18, 128), (18, 0)]
    assert spec(SMALL, sliding_window=1024).layers[0].window == 1024
    assert spec(SMALL, sliding_window=1024, use_sliding_window=False).layers[0].window == 0
    late = spec(SMALL, sliding_window=1024, use_sliding_window=True, max_window_layers=6)
    assert [(g.num_layers, g.window) for g in late.layers] == [(6, 0), (2, 1024)]


def test_llama_4_chunks_its_attention_and_interleaves_experts() -> None:
    model = spec(LLAMA_4)
    each = [g.repeated(1) for g in model.layers for _ in range(g.num_layers)]
    assert [g.chunked for g in each[:8]] == [True, True, True, False] * 2
    assert {g.attended_window for g in each if g.chunked} == {4096}, "half a chunk on average"
    assert [g.experts is None for g in each[:4]] == [True, False, True, False]
    assert each[0].ffn_size == 16384
    assert each[1].experts == Experts(128, 1, 8192, shared_ffn_size=8192)


def test_pruned_blocks_lose_attention_or_become_matrices() -> None:
    blocks = [
        {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 2.0}},
        {"attention": {"no_op": True}, "ffn": {"ffn_mult": 1.0}},
        {"attention": {"replace_with_linear": True}, "ffn": {"no_op": True}},
        {"attention": {"n_heads_in_group": 8}, "ffn": {"replace_with_linear": True}},
    ]
    config = SMALL | {"num_hidden_layers": 4, "block_configs": blocks, "intermediate_size": None,
                      "num_key_value_heads": None}  # fmt: skip
    model = spec(config)
    assert [(g.num_heads, g.num_kv_heads, g.ffn_size, g.num_linear) for g in model.layers] == [
        (8, 4, 512, 0), (0, 0, 256, 0), (0, 0, 0, 1), (8, 1, 0, 1),
    ]  # fmt: skip
    assert model.kv_bytes_per_token("bf16") == 2 * 2 * 32 * (4 + 1)
    assert [g.num_all_reduces for g in model.layers] == [2, 1, 1, 2]


def test_heads_may_differ_by_layer() -> None:
    model = spec(SMALL, num_key_value_heads_per_layer=[1, 1, 2, 4, 4, 4, 4, 8])
    assert [(g.num_layers, g.num_kv_heads) for g in model.layers] == [(2, 1), (1, 2), (4, 4), (1, 8)]
    assert model.kv_bytes_per_token("bf16") == 2 * 2 * 32 * (1 + 1 + 2 + 4 * 4 + 8)


def test_classic_decoders_have_their_traits() -> None:
    falcon, gptj, bloom, opt = (spec(c).layers[0] for c in (FALCON, GPT_J, BLOOM, OPT))
    assert (falcon.parallel, falcon.num_all_reduces, falcon.num_kv_heads, falcon.num_norms) == (True, 1, 8, 2)
    assert (gptj.parallel, gptj.qkv_bias, gptj.ffn_bias, gptj.num_norms) == (True, False, True, 1)
    assert (bloom.rotary, bloom.qkv_bias, bloom.gated_ffn, bloom.num_all_reduces) == (False, True, False, 2)
    assert (opt.rotary, opt.ffn_bias, spec(OPT).num_positions) == (False, True, 2050)
    one_head = spec(FALCON, new_decoder_architecture=False, num_kv_heads=None)
    assert (one_head.layers[0].num_kv_heads, one_head.layers[0].num_norms) == (1, 1)


def test_encoders_cache_nothing_and_have_no_classifier() -> None:
    model = spec(ENCODER)
    assert model.is_encoder
    assert not model.has_classifier
    assert model.kv_bytes_per_token("bf16") == 0
    assert model.weight_bytes("bf16") == 2 * model.num_parameters
    headless = spec(SMALL, architectures=["MistralModel"])
    assert not headless.is_encoder
    assert spec(SMALL).num_parameters - headless.num_parameters == 1000 * 256


def test_every_family_weighs_what_it_counts() -> None:
    for config in (DEEPSEEK, GPT_OSS, LLAMA_4, FALCON, GPT_J, BLOOM, OPT, SMALL):
        assert spec(config).weight_bytes("bf16") == 2 * spec(config).num_parameters


def test_stages_hold_all_layers_once() -> None:
    model = spec(DEEPSEEK)
    for pp in (1, 2, 3, 4, 8, 61):
        sizes = [sum(g.num_layers for g in stage) for stage in model.stages(pp)]
        assert len(sizes) == pp
        assert sum(sizes) == 61
        assert max(sizes) - min(sizes) <= 1
    assert [sum(g.num_layers for g in stage) for stage in model.stages(4)] == [15, 15, 16, 15]
    with pytest.raises(ValueError, match="pp = 62"):
        model.stages(62)


def test_shards_add_up_to_the_model() -> None:
    model = spec(DEEPSEEK)
    whole = model.weight_bytes("fp8")
    assert sum(model.stage_weight_bytes("fp8", 1, pp=4)) == whole
    # experts are spread over all ranks of a stage, the rest is copied in each attention group
    experts = 58 * 256 * 3 * 7168 * 2048
    for ep in (1, 8):
        assert model.weight_bytes("fp8", 1, ep=ep, attn_dp=8) == whole - experts + experts // 8
    assert model.weight_bytes("fp8", 8, ep=8) == model.weight_bytes("fp8", 8)
    # with tied embeddings the last stage needs a copy
    tied = spec(SMALL, tie_word_embeddings=True)
    assert sum(tied.stage_weight_bytes("bf16", 1, pp=2)) == tied.weight_bytes("bf16") + 2 * 1000 * 256
    assert model.kv_bytes_per_token_per_device("bf16", 8, 4) == 16 * 576 * 2


@pytest.mark.parametrize(
    ("config", "degrees", "reason"),
    [
        (DEEPSEEK, (8, 1, 8, 1), None),
        (DEEPSEEK, (1, 2, 32, 32), None),
        (DEEPSEEK, (1, 62, 1, 1), "too few"),
        (DEEPSEEK, (4, 1, 3, 1), "doesn't divide"),
        (DEEPSEEK, (3, 1, 1, 1), "attention heads"),
        (DEEPSEEK, (1, 1, 512, 512), "256 experts"),
        (SMALL, (1, 1, 1, 2), "no experts"),
        (SMALL, (1, 1, 2, 1), "no experts"),
        (GPT_OSS, (1, 1, 1, 7), "experts of size"),
    ],
)
def test_degrees_of_parallelism_must_divide_the_model(
    config: dict[str, Any], degrees: tuple[int, int, int, int], reason: str | None
) -> None:
    answer = spec(config).parallel_problem(*degrees)
    assert (answer is None) if reason is None else (reason in str(answer))


def test_text_part_of_a_multimodal_model() -> None:
    assert spec(LLAMA_4).num_layers == 48
    with pytest.raises(ValueError, match="hidden_size is missing"):
        ModelSpec.from_hf_config("model", {"model_type": "llama4", "vision_config": {"hidden_size": 1408}})


def test_linear_replacements_count_a_square_matrix() -> None:
    group = LayerGroup(1, 64, 0, 0, 16, 0, num_linear=2)
    assert group.num_matrix_parameters() == 2 * 64 * 64
    assert group.num_matrix_parameters(2) == 64 * 64
