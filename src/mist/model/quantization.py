"""What a checkpoint's `quantization_config` says: the dtype of its matrices, and whether only experts are quantised.

Read with a Hugging Face config. It never guesses: a scheme that it doesn't know is `UNKNOWN`, and whoever runs the
checkpoint has to say its dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

#: quantisers of a fixed dtype
_METHODS = {"fp8": "fp8", "fbgemm_fp8": "fp8", "mxfp4": "mxfp4", "quark": "mxfp4"}
_ALGORITHMS = {"FP8": "fp8", "NVFP4": "fp4", "W4A16_AWQ": "int4"}
#: keys of bitsandbytes
_LOADED = {"load_in_8bit": "int8", "load_in_4bit": "int4", "_load_in_8bit": "int8", "_load_in_4bit": "int4"}
#: the dtype of a checkpoint whose quantisation can't be read
UNKNOWN = "unknown"

_IGNORED = ("modules_to_not_convert", "ignore", "ignored_layers", "exclude_modules")


def checkpoint_dtype(quantization: Any) -> str:
    """The dtype of the matrices that are quantised; bf16 without any quantisation, `UNKNOWN` with one not known."""
    if quantization is None:
        return "bf16"
    if not isinstance(quantization, Mapping):
        return UNKNOWN
    method = str(quantization.get("quant_method", "")).lower()
    if method in _METHODS:
        return _METHODS[method]
    if algorithm := _ALGORITHMS.get(str(quantization.get("quant_algo", "")).upper()):
        return algorithm
    for key, dtype in _LOADED.items():
        if quantization.get(key):
            return dtype
    bits, is_float = quantization.get("bits"), False
    for weights in _weights(quantization):
        bits, is_float = weights.get("num_bits"), weights.get("type") == "float"
    if bits == 8:
        return "fp8" if is_float else "int8"
    if bits == 4:
        return "fp4" if is_float else "int4"
    return UNKNOWN


def quantizes_experts_only(quantization: Any) -> bool:
    """Whether the attention of the language model is left out of the quantisation."""
    if not isinstance(quantization, Mapping):
        return False
    ignored = [str(module) for key in _IGNORED for module in quantization.get(key) or ()]
    return any("self_attn" in module and "vision" not in module for module in ignored)


def _weights(quantization: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    groups = quantization.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        if isinstance(group, Mapping) and isinstance(group.get("weights"), Mapping):
            yield group["weights"]
