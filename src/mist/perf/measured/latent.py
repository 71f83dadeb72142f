"""Latent attention from the measured tables: of single kernels, or what whole modules take beyond their projections.

Beside `pricing`, below `deployed`. It never prices a projection itself: `others` tells what the list says of these.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mist.model import LatentAttention
from mist.perf import Deployment
from mist.perf.measured.grid import INTERPOLATED, Estimate, FloatArray
from mist.perf.measured.pricing import TABLE_DTYPE, MeasuredAttention, equal_sequences
from mist.perf.measured.tables import OperatorTables
from mist.perf.operators import Operator

#: Operators of the measured modules besides attention, by name: prefills and decodes.
PREFILL_MODULE = ("qkv_down", "q_up", "rotary", "kv_write", "kv_up", "o_proj")
DECODE_MODULE = ("qkv_down", "q_up", "rotary", "kv_write", "q_absorb", "v_up", "o_proj")

#: What was measured: DeepSeek-V3 (arXiv 2412.19437, section 4.2), its width and any number of its heads.
_MEASURED, _HIDDEN = LatentAttention(1536, 512, 128, 64, 128), 7168

_MODULE_DTYPE = {"bf16": "bfloat16", "fp16": "bfloat16", "fp8": "fp8_block"}


@dataclass(frozen=True, slots=True)
class ModuleAttention:
    """What attention leaves of a measured module: its time less `others`, by tokens, for one layer."""

    module: MeasuredAttention
    others: Callable[[FloatArray], FloatArray]
    is_prefill: bool

    @property
    def outer(self) -> FloatArray:
        return self.module.outer

    @property
    def inner(self) -> FloatArray:
        return self.module.inner

    def at(self, outer: float, inner: FloatArray) -> Estimate:
        """Time, ns, at one outer value and each of `inner`; 0 where the others alone take more than the module."""
        found = self.module.at(outer, inner)
        tokens = outer * inner if self.is_prefill else np.full(len(inner), outer)
        ns = np.maximum(found.ns - self.others(tokens), 0.0)
        return Estimate(ns, np.maximum(found.origin, np.int8(INTERPOLATED)))


def latent_attention(
    tables: OperatorTables, o: Operator, deployment: Deployment, others: Callable[[FloatArray], FloatArray]
) -> MeasuredAttention | ModuleAttention | None:
    """Attention of one layer, from the tables of kernels, else of modules; None where its shape wasn't measured."""
    group = next(g for g in deployment.model.layers if g.latent)
    kv_dtype = TABLE_DTYPE.get(deployment.kv_dtype)
    gemm_type = _MODULE_DTYPE.get(deployment.model.matrix_dtypes(deployment.weights_dtype)[0])
    if kv_dtype is None or group.latent is None or (group.latent.cache_size, o.window) != (_MEASURED.cache_size, 0):
        return None
    phase, heads = ("context" if o.kind == "attention_prefill" else "generation"), float(o.shape[0])
    kernel = equal_sequences(tables.table(f"mla_{phase}_kernel"), heads, kv_cache_dtype=kv_dtype)
    if kernel is not None or gemm_type is None or (group.latent, group.hidden_size) != (_MEASURED, _HIDDEN):
        return kernel
    module = equal_sequences(
        tables.table(f"mla_{phase}"), heads,
        architecture="DeepseekV3ForCausalLM", gemm_type=gemm_type, kv_cache_dtype=kv_dtype,
    )  # fmt: skip
    return ModuleAttention(module, others, phase == "context") if module else None
