"""Hugging Face configs: from the keys of a `config.json` to the layers and sizes of a model.

Each family's unwritten traits (biases, norms, tied embeddings) are a row of a table; keys that describe what can't be
represented are refused by name. It never opens a file and never fills in a size that the config leaves open.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from mist.model.layers import Experts, LatentAttention, LayerGroup
from mist.model.quantization import checkpoint_dtype, quantizes_experts_only

Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Family:
    """What a `model_type` implies without a key in its config.

    `positions`: rows of learned positions beyond `max_position_embeddings`, None if there are none. `ffn_multiple`: the
    network's size in hidden sizes where no key gives it. `full_every`: every n-th layer attends to everything.
    `quantized_experts`: published with its experts alone in fewer than 16 bits.
    """

    gated: bool = True
    qkv_bias: bool = False
    output_bias: bool = False
    ffn_bias: bool = False
    qk_norm: bool = False
    tied: bool = False
    num_norms: int = 2
    norm_bias: bool = False
    parallel: bool = False
    rotary: bool = True
    positions: int | None = None
    embedding_norm: bool = False
    head_bias: bool = False
    encoder: bool = False
    max_context: int = 0
    ffn_multiple: int = 0
    full_every: int = 0
    quantized_experts: bool = False


_CLASSIC = {"gated": False, "norm_bias": True}
_BIASED = {"qkv_bias": True, "output_bias": True, "ffn_bias": True}
_ENCODER = _Family(
    **_CLASSIC, **_BIASED, encoder=True, rotary=False, tied=True, positions=0, embedding_norm=True
)  # fmt: skip
_FAMILIES: dict[str, _Family] = {
    "bert": _ENCODER,
    "bloom": _Family(**_CLASSIC, **_BIASED, tied=True, rotary=False, embedding_norm=True, max_context=2048,
                     ffn_multiple=4),
    "cohere": _Family(tied=True, num_norms=1, parallel=True),
    "falcon": _Family(**_CLASSIC, tied=True, num_norms=1, max_context=2048, ffn_multiple=4),
    "gemma": _Family(tied=True),
    "gemma2": _Family(tied=True, num_norms=4, full_every=2),
    "gemma3_text": _Family(tied=True, num_norms=4, qk_norm=True, full_every=6),
    "glm4_moe": _Family(qkv_bias=True),
    "gpt2": _Family(**_CLASSIC, **_BIASED, tied=True, rotary=False, positions=0, ffn_multiple=4),
    "gpt_neox": _Family(**_CLASSIC, **_BIASED),
    "gpt_oss": _Family(full_every=2, quantized_experts=True),
    "gptj": _Family(**_CLASSIC, ffn_bias=True, num_norms=1, parallel=True, head_bias=True, ffn_multiple=4),
    "llama4_text": _Family(full_every=4),
    "minimax_m2": _Family(qk_norm=True),
    "nemotron": _Family(**_CLASSIC),
    "opt": _Family(**_CLASSIC, **_BIASED, tied=True, rotary=False, positions=2),
    "phi": _Family(**_CLASSIC, **_BIASED, num_norms=1, parallel=True, head_bias=True),
    "qwen2": _Family(qkv_bias=True),
    "qwen2_moe": _Family(qkv_bias=True),
    "qwen3": _Family(qk_norm=True),
    "qwen3_moe": _Family(qk_norm=True),
    "roberta": _ENCODER,
    "starcoder2": _Family(**_CLASSIC, tied=True),
    "xlm-roberta": _ENCODER,
}  # fmt: skip

#: Older spellings of a key.
_SPELLINGS = {
    "hidden_size": ("n_embd", "n_embed", "d_model"),
    "num_hidden_layers": ("n_layer", "num_layers"),
    "num_attention_heads": ("n_head",),
    "num_key_value_heads": ("num_kv_heads", "n_head_kv", "multi_query_group_num"),
    "head_dim": ("kv_channels",),
    "vocab_size": ("padded_vocab_size",),
    "qkv_bias": ("add_qkv_bias",),
    "intermediate_size": ("n_inner", "ffn_dim", "ffn_hidden_size"),
    "max_position_embeddings": ("n_positions", "seq_length"),
    "num_experts_per_tok": ("experts_per_token",),
    "num_experts": ("num_local_experts", "n_routed_experts"),
}
_REQUIRED = ("hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads",
             "num_hidden_layers", "vocab_size")  # fmt: skip
_OPTIONAL_SIZES = (
    "num_key_value_heads", "head_dim", "num_experts", "num_experts_per_tok", "moe_intermediate_size",
    "intermediate_size_mlp", "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
    "sliding_window", "attention_chunk_size",
)  # fmt: skip

#: Keys whose presence with a true value describes an architecture that isn't a stack of attention and networks.
_UNSUPPORTED = {
    "moe_num_experts": "this kind of mixture of experts",
    "enable_moe_block": "a dense network beside experts",
    "sparse_attention_config": "sparse attention to selected blocks",
    "num_global_key_value_heads": "layers of two attention shapes",
    "index_topk": "sparse attention to tokens that an indexer selects",
    "compress_ratios": "attention to compressed tokens",
    "hybrid_override_pattern": "a hybrid of attention and state-space layers",
    "hybrid_layer_pattern": "layers of two attention shapes",
    "layers_block_type": "a hybrid of attention and other layers",
    "full_attention_interval": "a hybrid of attention and linear attention",
    "linear_attn_config": "a hybrid of attention and linear attention",
    "ssm_cfg": "state-space layers",
    "state_size": "state-space layers",
    "mamba_d_state": "state-space layers",
    "num_kv_shared_layers": "layers that share their KV cache",
    "is_encoder_decoder": "an encoder-decoder model",
    "cross_attention_layers": "cross-attention to another input",
    "zero_expert_num": "experts that do nothing",
}
#: Families without traits of their own: gated networks, norms without biases, rotary positions, as in Llama.
_PLAIN_FAMILIES = {
    "aquila", "baichuan", "chatglm", "deci", "deepseek", "deepseek_v2", "deepseek_v3", "glm", "granite", "internlm",
    "internlm2", "kimi_k2", "llama", "mistral", "mixtral", "nemotron-nas", "phi3", "yi",
}  # fmt: skip
_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}


def read_config(name: str, config: Config) -> dict[str, Any]:
    """The fields of a `ModelSpec` but its name; ValueError lists every key in the way, `name` first."""
    quantization = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
    config = _normalised(_text_part(config))
    problems = _unsupported(config) or _unknown_family(config) + _malformed(config) or _contradictions(config)
    if problems:
        raise ValueError(f"{name}: " + "; ".join(problems))
    family = _family(config)
    hidden, vocab = int(config["hidden_size"]), int(config["vocab_size"])
    layers = _layers(config, family)
    context = int(config["max_position_embeddings"])
    positions = 0 if family.positions is None else context + family.positions + int(config.get("type_vocab_size") or 0)
    extra = 2 * hidden * family.embedding_norm + vocab * family.head_bias
    if family.encoder:
        extra += hidden * hidden  # a pooler; its bias counts as the norm that other models have behind the last layer
    return {
        "layers": layers,
        "vocab_size": vocab,
        "tied_embeddings": bool(config.get("tie_word_embeddings", family.tied)),
        "max_context": context,
        "is_encoder": family.encoder,
        "has_classifier": not family.encoder and not _is_headless(config),
        "num_positions": positions,
        "num_extra": extra,
        "checkpoint_dtype": checkpoint_dtype(quantization),
        "quantizes_experts_only": family.quantized_experts
        or (any(g.experts for g in layers) and quantizes_experts_only(quantization)),
    }


def _text_part(config: Config) -> Config:
    """The language model within a multimodal config; what its text config lacks is taken from the whole."""
    text = config.get("text_config")
    if not isinstance(text, Mapping) or "hidden_size" in config:
        return config
    outer = {key: config[key] for key in ("tie_word_embeddings",) if key in config}
    return outer | dict(text)


def _normalised(config: Config) -> dict[str, Any]:
    """With today's keys for older spellings, and what a family leaves to convention written out."""
    found = dict(config)
    for key, spellings in _SPELLINGS.items():
        for spelling in spellings:
            if found.get(key) is None and found.get(spelling) is not None:
                found[key] = found[spelling]
    family = _family(found)
    hidden = found.get("hidden_size")
    if found.get("intermediate_size") is None and family.ffn_multiple and isinstance(hidden, int):
        found["intermediate_size"] = family.ffn_multiple * hidden
    if found.get("max_position_embeddings") is None and family.max_context:
        found["max_position_embeddings"] = family.max_context
    if found.get("model_type") == "falcon" and found.get("num_key_value_heads") is None and found.get("multi_query"):
        found["num_key_value_heads"] = 1
    if found.get("block_configs") or (found.get("moe_intermediate_size") and found.get("first_k_dense_replace") == 0):
        found["intermediate_size"] = found.get("intermediate_size") or found.get("moe_intermediate_size") or 1
    if found.get("num_key_value_heads_per_layer"):
        found["num_key_value_heads"] = None
    return found


def _family(config: Config) -> _Family:
    return _FAMILIES.get(str(config.get("model_type", "")), _Family())


def _is_headless(config: Config) -> bool:
    """Whether the checkpoint stops at its last hidden state, as text-embedding models do."""
    architectures = config.get("architectures") or [""]
    return str(architectures[0]).endswith("Model")


def _layers(config: Config, family: _Family) -> tuple[LayerGroup, ...]:
    layers = [_layer(config, family, i) for i in range(int(config["num_hidden_layers"]))]
    return tuple(kind.repeated(len(list(run))) for kind, run in groupby(layers))


def _layer(config: Config, family: _Family, i: int) -> LayerGroup:
    heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
    block = config["block_configs"][i] if config.get("block_configs") else {}
    attention, ffn = block.get("attention") or {}, block.get("ffn") or {}
    no_attention = bool(attention.get("no_op") or attention.get("replace_with_linear"))
    window, chunked = (0, False) if no_attention else _window(config, family, i)
    parallel = bool(config.get("parallel_attn", config.get("use_parallel_residual", family.parallel)))
    qkv_bias, output_bias = _attention_biases(config, family)
    experts = _experts(config, i)
    no_ffn = bool(experts or ffn.get("no_op") or ffn.get("replace_with_linear"))
    latent = _latent(config)
    return LayerGroup(
        num_layers=1,
        hidden_size=hidden,
        num_heads=0 if no_attention else heads,
        num_kv_heads=0 if no_attention else _kv_heads(config, attention, i),
        head_size=latent.qk_size if latent else int(config.get("head_dim") or hidden // heads),
        ffn_size=0 if no_ffn else _ffn_size(config, ffn),
        gated_ffn=family.gated,
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        ffn_bias=bool(config.get("mlp_bias", config.get("use_bias", config.get("bias", family.ffn_bias)))),
        qk_norm=family.qk_norm or (bool(config.get("use_qk_norm")) and config.get("model_type") != "llama4_text"),
        latent=latent,
        experts=experts,
        window=window,
        chunked=chunked,
        num_linear=bool(attention.get("replace_with_linear")) + bool(ffn.get("replace_with_linear")),
        num_norms=_num_norms(config, family, parallel) - bool(attention.get("no_op")) - bool(ffn.get("no_op")),
        norm_bias=family.norm_bias,
        parallel=parallel,
        rotary=family.rotary and not config.get("alibi"),
    )


def _num_norms(config: Config, family: _Family, parallel: bool) -> int:
    """Falcon norms twice where attention and network are in sequence or are fed from norms of their own."""
    if config.get("model_type") == "falcon" and (config.get("new_decoder_architecture") or not parallel):
        return int(config.get("num_ln_in_parallel_attn") or 2)
    return family.num_norms


def _attention_biases(config: Config, family: _Family) -> tuple[bool, bool]:
    """(QKV, output) biases: Qwen-2 and GLM-4 bias QKV alone, whatever `attention_bias` says of both."""
    if "qkv_bias" in config:
        return bool(config["qkv_bias"]), False
    only_qkv = family.qkv_bias and not family.output_bias
    general = config.get("attention_bias", config.get("use_bias", config.get("bias", config.get("enable_bias"))))
    if general is None:
        return family.qkv_bias, family.output_bias
    return bool(general), bool(general) and not only_qkv


def _kv_heads(config: Config, attention: Config, i: int) -> int:
    heads = int(config["num_attention_heads"])
    if config.get("num_key_value_heads_per_layer"):
        return int(config["num_key_value_heads_per_layer"][i])
    if attention.get("num_key_value_heads") or attention.get("n_heads_in_group"):
        return int(attention.get("num_key_value_heads") or heads // int(attention["n_heads_in_group"]))
    return int(config.get("num_key_value_heads") or heads)


def _ffn_size(config: Config, ffn: Config) -> int:
    """A block's own size, or its multiple of two thirds of the hidden size, rounded up to 256 (Nemotron-NAS)."""
    if ffn.get("intermediate_size"):
        return int(ffn["intermediate_size"])
    if ffn.get("ffn_mult"):
        return 256 * math.ceil(int(2 * ffn["ffn_mult"] * config["hidden_size"] / 3) / 256)
    own = config.get("intermediate_size_mlp") or config.get("dense_intermediate_size")
    return int(own or config["intermediate_size"])


def _latent(config: Config) -> LatentAttention | None:
    if not config.get("kv_lora_rank"):
        return None
    return LatentAttention(
        q_lora_rank=int(config.get("q_lora_rank") or 0),
        kv_lora_rank=int(config["kv_lora_rank"]),
        qk_nope_size=int(config["qk_nope_head_dim"]),
        rope_size=int(config["qk_rope_head_dim"]),
        v_size=int(config["v_head_dim"]),
    )


def _experts(config: Config, i: int) -> Experts | None:
    """The mixture of layer `i`, None where it is dense."""
    num_experts = int(config.get("num_experts") or 0)
    if not num_experts or not _is_mixture(config, i):
        return None
    size = int(config.get("moe_intermediate_size") or config["intermediate_size"])
    shared = int(config.get("n_shared_experts") or 0) * size
    shared = int(config.get("shared_expert_intermediate_size") or config.get("shared_intermediate_size") or shared)
    if config.get("model_type") == "llama4_text":
        shared = size
    bias = config.get("model_type") == "gpt_oss"
    return Experts(num_experts, int(config["num_experts_per_tok"]), size, shared, bias)


def _is_mixture(config: Config, i: int) -> bool:
    """Leading dense layers (DeepSeek), one mixture every few layers (Qwen, Llama 4), or a list of either kind."""
    if config.get("moe_layers") is not None:
        return i in config["moe_layers"]
    if i < int(config.get("first_k_dense_replace") or 0) or i in (config.get("mlp_only_layers") or ()):
        return False
    if config.get("interleave_moe_layer_step"):
        return (i + 1) % int(config["interleave_moe_layer_step"]) == 0
    if config.get("moe_layer_freq"):
        every = config["moe_layer_freq"]
        return bool(every[i]) if isinstance(every, list) else i % int(every) == 0
    return (i + 1) % int(config.get("decoder_sparse_step") or 1) == 0


def _window(config: Config, family: _Family, i: int) -> tuple[int, bool]:
    """(window, chunked) of layer `i`; a window as long as the context is none."""
    context, kind = int(config["max_position_embeddings"]), _layer_type(config, family, i)
    chunked = kind == "chunked_attention"
    window = 0
    if chunked:
        window = int(config.get("attention_chunk_size") or 0)
    elif kind == "sliding_attention" and config.get("use_sliding_window", True):
        window = int(config.get("sliding_window") or 0)
    return (window, chunked) if 0 < window < context else (0, False)


def _layer_type(config: Config, family: _Family, i: int) -> str:
    if config.get("layer_types"):
        return str(config["layer_types"][i])
    if config.get("attention_chunk_size"):
        rotated = config.get("no_rope_layers") or ()
        is_local = bool(rotated[i]) if i < len(rotated) else (i + 1) % (family.full_every or 4) != 0
        return "chunked_attention" if is_local else "full_attention"
    every = int(config.get("sliding_window_pattern") or family.full_every)
    if every:
        return "full_attention" if (i + 1) % every == 0 else "sliding_attention"
    first = int(config.get("max_window_layers") or 0) if "use_sliding_window" in config else 0
    return "sliding_attention" if i >= first else "full_attention"


def _unsupported(config: Config) -> list[str]:
    problems = [f"{key}: {what} is not supported" for key, what in _UNSUPPORTED.items() if config.get(key)]
    kinds = set(map(str, config.get("layer_types") or ())) - _LAYER_TYPES
    if kinds:
        problems.append(f"layer_types: {', '.join(sorted(kinds))} layers are not supported")
    width = config.get("word_embed_proj_dim")
    if width and width != config.get("hidden_size"):
        problems.append("word_embed_proj_dim: an embedding narrower than the layers is not supported")
    return problems


def _unknown_family(config: Config) -> list[str]:
    kind, known = config.get("model_type"), _FAMILIES.keys() | _PLAIN_FAMILIES
    if kind is None or str(kind) in known:
        return []
    return [f"model_type: {kind!r} is not supported (known: {', '.join(sorted(known))})"]


#: sizes beyond which a config is a mistake
_MOST_LAYERS, _LARGEST_SIZE = 4096, 2**30


def _malformed(config: Config) -> list[str]:
    missing = [f"{key} is missing" for key in _REQUIRED if key not in config]
    given = {key: config[key] for key in (*_REQUIRED, *_OPTIONAL_SIZES) if config.get(key) is not None}
    wrong = [
        f"{_spelled(config, key)} must be a whole number of at least 1, not {value!r}"
        for key, value in given.items()
        if not isinstance(value, int) or isinstance(value, bool) or value < (0 if key in _MAY_BE_ZERO else 1)
    ]
    wrong += [
        f"{_spelled(config, key)} of {value:.0e} is no model's"
        for key, value in given.items()
        if isinstance(value, int) and value > (_MOST_LAYERS if key == "num_hidden_layers" else _LARGEST_SIZE)
    ]
    wrong += [f"{key} is null" for key in _REQUIRED if key in config and config[key] is None]
    if config.get("kv_lora_rank"):
        needed = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        missing += [f"{key} is missing beside kv_lora_rank" for key in needed if not config.get(key)]
    if config.get("num_experts") and not config.get("num_experts_per_tok"):
        missing.append(f"num_experts_per_tok is missing beside {_spelled(config, 'num_experts')}")
    return missing + wrong


def _spelled(config: Config, key: str) -> str:
    """The key as the config has it."""
    return next((older for older in _SPELLINGS.get(key, ()) if config.get(older) is not None), key)


_MAY_BE_ZERO = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "sliding_window", "kv_lora_rank",
                "q_lora_rank", "attention_chunk_size")  # fmt: skip


def _contradictions(config: Config) -> list[str]:
    """Sizes that don't go together; called once all of them are whole numbers."""
    problems = []
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    kv_heads = config.get("num_key_value_heads") or heads
    if heads % kv_heads:
        problems.append(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    if not config.get("head_dim") and not config.get("kv_lora_rank") and config["hidden_size"] % heads:
        problems.append(f"hidden_size {config['hidden_size']} is not a multiple of num_attention_heads {heads}")
    for key in ("layer_types", "block_configs", "num_key_value_heads_per_layer", "moe_layer_freq"):
        if isinstance(config.get(key), list) and config[key] and len(config[key]) != layers:
            problems.append(f"{key} has {len(config[key])} entries for num_hidden_layers {layers}")
    experts = config.get("num_experts") or 0
    if experts and config["num_experts_per_tok"] > experts:
        problems.append(f"num_experts_per_tok {config['num_experts_per_tok']} exceeds the {experts} experts")
    return problems
