"""Model shapes: layer groups, heads and vocabulary, and from them parameters, weight bytes and KV bytes per token.

The bottom of the pipeline: performance models, KV capacity and hand-over sizes are all computed from a `ModelSpec`.
It never opens a file (the scenario loader passes mappings) and never guesses: a config that it can't represent raises.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: Bytes of one element. `q8_0` stores blocks of 32 with a 16-bit scale, `mxfp4` blocks of 32 with an 8-bit scale.
DTYPE_BYTES: dict[str, float] = {
    "fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "int8": 1.0, "q8_0": 34 / 32, "fp4": 0.5, "int4": 0.5,
    "mxfp4": 17 / 32,
}  # fmt: skip

#: Bytes of one activation; norms, embeddings and the classifier keep this precision in quantised checkpoints too.
ACTIVATION_BYTES = 2.0


def dtype_bytes(dtype: str) -> float:
    """Bytes of one element of `dtype`; ValueError lists the dtypes that are known."""
    try:
        return DTYPE_BYTES[dtype]
    except KeyError:
        raise ValueError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPE_BYTES)}") from None


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """`num_layers` equal decoder layers: grouped-query attention and a dense feed-forward network.

    `gated_ffn`: three matrices (gate, up, down) rather than two. `qk_norm`: a norm of `head_size` on queries and keys.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    ffn_size: int
    gated_ffn: bool = True
    qkv_bias: bool = False
    output_bias: bool = False
    ffn_bias: bool = False
    qk_norm: bool = False

    @property
    def num_up_matrices(self) -> int:
        """Matrices that read the FFN's input: gate and up, or up alone."""
        return 2 if self.gated_ffn else 1

    def kv_heads_per_device(self, tp: int) -> int:
        """KV heads that one of `tp` ranks holds; beyond one head per rank they are replicated."""
        return max(1, self.num_kv_heads // tp)

    def qkv_size(self, tp: int = 1) -> int:
        """Output width of the fused QKV projection on one of `tp` ranks."""
        return (self.num_heads // tp + 2 * self.kv_heads_per_device(tp)) * self.head_size

    def num_matrix_parameters(self, tp: int = 1) -> int:
        """Elements of one layer's matrices on one of `tp` ranks."""
        attention = self.hidden_size * (self.qkv_size(tp) + self.num_heads * self.head_size // tp)
        ffn = (self.num_up_matrices + 1) * self.hidden_size * self.ffn_size // tp
        return attention + ffn

    def num_vector_parameters(self) -> int:
        """Elements of one layer's norms and biases; negligible, so counted as held by every rank."""
        norms = 2 * self.hidden_size + (2 * self.head_size if self.qk_norm else 0)
        biases = self.qkv_size() * self.qkv_bias + self.hidden_size * self.output_bias
        biases += (self.num_up_matrices * self.ffn_size + self.hidden_size) * self.ffn_bias
        return norms + biases


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder-only transformer as groups of layers, from bottom to top, between an embedding and a classifier."""

    name: str
    layers: tuple[LayerGroup, ...]
    vocab_size: int
    tied_embeddings: bool
    max_context: int

    @property
    def num_layers(self) -> int:
        return sum(group.num_layers for group in self.layers)

    @property
    def hidden_size(self) -> int:
        return self.layers[0].hidden_size

    @property
    def num_parameters(self) -> int:
        """All trained elements; a tied embedding counts once."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        per_layer = (g.num_layers * (g.num_matrix_parameters() + g.num_vector_parameters()) for g in self.layers)
        return embeddings + sum(per_layer) + self.hidden_size

    def weight_bytes(self, dtype: str, tp: int = 1) -> int:
        """Bytes of the weights that one of `tp` ranks holds.

        `dtype` is that of the layers' matrices; norms, embedding and classifier have at least 16 bits. KV projections
        are replicated once `tp` exceeds the KV heads. ValueError for an unknown dtype.
        """
        matrix = dtype_bytes(dtype)
        wide = max(matrix, ACTIVATION_BYTES)
        total = wide * self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2) / tp
        for g in self.layers:
            total += g.num_layers * (matrix * g.num_matrix_parameters(tp) + wide * g.num_vector_parameters())
        return round(total + wide * self.hidden_size)

    def kv_bytes_per_token(self, kv_dtype: str) -> int:
        """Bytes of keys and values of one token over all layers: 2 · layers · KV heads · head size · element."""
        elements = sum(2 * g.num_layers * g.num_kv_heads * g.head_size for g in self.layers)
        return round(elements * dtype_bytes(kv_dtype))

    def kv_bytes_per_token_per_device(self, kv_dtype: str, tp: int = 1) -> int:
        """What one of `tp` ranks stores per token: the whole divided by min(tp, KV heads), replicated beyond."""
        elements = sum(2 * g.num_layers * g.kv_heads_per_device(tp) * g.head_size for g in self.layers)
        return round(elements * dtype_bytes(kv_dtype))

    def tp_problem(self, tp: int) -> str | None:
        """Why the model can't be split over `tp` ranks, or None if it can."""
        for g in self.layers:
            if g.num_heads % tp:
                return f"{self.name} has {g.num_heads} attention heads, which don't divide over tp = {tp}"
            if max(tp, g.num_kv_heads) % min(tp, g.num_kv_heads):
                return f"{self.name} has {g.num_kv_heads} KV heads, which don't divide over tp = {tp}"
            if g.ffn_size % tp:
                return f"{self.name} has an FFN size of {g.ffn_size}, which doesn't divide over tp = {tp}"
        return None

    @classmethod
    def from_hf_config(cls, name: str, config: Mapping[str, Any]) -> ModelSpec:
        """The shape in a Hugging Face `config.json` of a dense model with multi-head or grouped-query attention.

        ValueError names every key that is missing, malformed or describes something that a `ModelSpec` can't
        represent (experts, latent attention, windows shorter than the context, layers that differ, ...).
        """
        problems = _unsupported(config) or _malformed(config)
        if problems:
            raise ValueError(f"{name}: " + "; ".join(problems))
        model_type = str(config.get("model_type", ""))
        heads = int(config["num_attention_heads"])
        attention_bias = bool(config.get("attention_bias", model_type in _QKV_BIAS or config.get("use_bias", False)))
        group = LayerGroup(
            num_layers=int(config["num_hidden_layers"]),
            hidden_size=int(config["hidden_size"]),
            num_heads=heads,
            num_kv_heads=int(config.get("num_key_value_heads") or heads),
            head_size=int(config.get("head_dim") or config["hidden_size"] // heads),
            ffn_size=int(config["intermediate_size"]),
            gated_ffn=model_type not in _UNGATED,
            qkv_bias=attention_bias,
            output_bias=attention_bias and model_type not in _QKV_BIAS,
            ffn_bias=bool(config.get("mlp_bias", config.get("use_bias", False))),
            qk_norm=model_type in _QK_NORM,
        )
        return cls(
            name=name,
            layers=(group,),
            vocab_size=int(config["vocab_size"]),
            tied_embeddings=bool(config.get("tie_word_embeddings", model_type in _TIED)),
            max_context=int(config["max_position_embeddings"]),
        )


_REQUIRED = ("hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads",
             "num_hidden_layers", "vocab_size")  # fmt: skip
_OPTIONAL_SIZES = ("num_key_value_heads", "head_dim")

#: What a `model_type` implies without a key in its config.
_QKV_BIAS = {"qwen2"}
_QK_NORM = {"qwen3"}
_UNGATED = {"starcoder2", "nemotron"}
_TIED = {"gemma"}

#: Keys whose presence with a true value describes an architecture that isn't a stack of equal dense layers.
_UNSUPPORTED = {
    "num_local_experts": "mixture of experts",
    "num_experts": "mixture of experts",
    "n_routed_experts": "mixture of experts",
    "moe_intermediate_size": "mixture of experts",
    "moe_num_experts": "mixture of experts",
    "enable_moe_block": "mixture of experts",
    "kv_lora_rank": "multi-head latent attention",
    "block_configs": "layers that differ in shape",
    "num_key_value_heads_per_layer": "layers that differ in shape",
    "hybrid_override_pattern": "a hybrid of attention and state-space layers",
    "layers_block_type": "a hybrid of attention and other layers",
    "full_attention_interval": "a hybrid of attention and linear attention",
    "ssm_cfg": "state-space layers",
    "state_size": "state-space layers",
    "mamba_d_state": "state-space layers",
    "attention_chunk_size": "chunked local attention",
    "num_kv_shared_layers": "layers that share their KV cache",
    "text_config": "a multimodal model (pass its text_config as the config)",
    "is_encoder_decoder": "an encoder-decoder model",
    "parallel_attn": "attention and feed-forward in parallel",
    "use_parallel_residual": "attention and feed-forward in parallel",
    "multi_query": "the older multi_query form (give num_key_value_heads)",
}


def _unsupported(config: Mapping[str, Any]) -> list[str]:
    problems = [f"{key}: {what} is not supported" for key, what in _UNSUPPORTED.items() if config.get(key)]
    kinds = set(config.get("layer_types") or ()) - {"full_attention"}
    if kinds:
        problems.append(f"layer_types: {', '.join(sorted(map(str, kinds)))} layers are not supported")
    window = config.get("sliding_window")
    if (
        isinstance(window, int)
        and config.get("use_sliding_window", True)
        and not config.get("layer_types")
        and window < config.get("max_position_embeddings", 0)
    ):
        problems.append(
            f"sliding_window: a window of {window} tokens, shorter than max_position_embeddings, is not supported"
            " (set it to null and max_position_embeddings to the window to stay exact)"
        )
    return problems


def _malformed(config: Mapping[str, Any]) -> list[str]:
    missing = [f"{key} is missing" for key in _REQUIRED if key not in config]
    given = {key: config[key] for key in (*_REQUIRED, *_OPTIONAL_SIZES) if config.get(key) is not None}
    wrong = [
        f"{key} must be a whole number of at least 1, not {value!r}"
        for key, value in given.items()
        if not isinstance(value, int) or isinstance(value, bool) or value < 1
    ]
    wrong += [f"{key} is null" for key in _REQUIRED if key in config and config[key] is None]
    if missing or wrong:
        return missing + wrong
    heads, kv_heads = given["num_attention_heads"], given.get("num_key_value_heads", given["num_attention_heads"])
    if heads % kv_heads:
        wrong.append(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    if "head_dim" not in given and given["hidden_size"] % heads:
        wrong.append(f"hidden_size {given['hidden_size']} is not a multiple of num_attention_heads {heads}")
    return wrong
