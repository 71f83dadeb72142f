"""Element sizes of weights, activations and KV caches.

Every count of bytes in the package starts here. It never says what a device computes in: that is the device's.
"""

from __future__ import annotations

#: Bytes of one element. `q8_0`, `q5_0` and `q4_0` store blocks of 32 with a 16-bit scale, `q6_k` blocks of 256 with 16
#: scales of 8 bits and one of 16, `mxfp4` blocks of 32 with an 8-bit scale.
DTYPE_BYTES: dict[str, float] = {
    "fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "int8": 1.0, "q8_0": 34 / 32, "q6_k": 210 / 256,
    "q5_0": 22 / 32, "q4_0": 18 / 32, "fp4": 0.5, "int4": 0.5, "mxfp4": 17 / 32,
}  # fmt: skip

#: Bytes of one activation; norms, embeddings and the classifier keep this precision in quantised checkpoints too.
ACTIVATION_BYTES = 2.0


def dtype_bytes(dtype: str) -> float:
    """Bytes of one element of `dtype`; ValueError lists the dtypes that are known."""
    try:
        return DTYPE_BYTES[dtype]
    except KeyError:
        raise ValueError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPE_BYTES)}") from None
