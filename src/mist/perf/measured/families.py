"""What is measured: one declaration per family of operator tables, with its key columns, axes and units.

Conversion, cache, interpolation and the leave-one-out benchmark all read these; a new family is one more entry. It
never reads a file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Axis:
    """An interpolated column x. `rising`: time never falls along it.

    Times are linear in x or, with a `ramp`, in x·(x + ramp): linear for small x and quadratic for large.
    """

    column: str
    ramp: float | None = None
    rising: bool = False

    def scaled(self, x: FloatArray) -> FloatArray:
        """The coordinate in which times are linear."""
        return x if self.ramp is None else x * (x + self.ramp)


@dataclass(frozen=True, slots=True)
class Derived:
    """A column computed from `columns` of the table."""

    columns: tuple[str, ...]
    compute: Callable[..., npt.NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Family:
    """One kind of table: `<system>/<folder>/<framework>/<version>/<file>`.

    `keys` have to match exactly; `axes` are interpolated, outermost first and the smoothest last. `derived` columns are
    computed from the table's own; `defaults` stand in for columns that older tables lack. A time in the table's unit
    times `unit_ns` is nanoseconds. `library`: the folder in place of the framework's, where one table serves all.
    `weight`: the column by which rows count where times fall along a rising axis and are levelled; "" counts all alike.
    """

    name: str
    folder: str
    file: str
    keys: tuple[str, ...]
    axes: tuple[Axis, ...]
    derived: Mapping[str, Derived] = field(default_factory=dict)
    defaults: Mapping[str, int | str] = field(default_factory=dict)
    time: str = "latency"
    unit_ns: float = 1e6
    library: str = ""
    weight: str = ""

    @property
    def columns(self) -> tuple[str, ...]:
        """Keys, then axes."""
        return (*self.keys, *(axis.column for axis in self.axes))


_BATCH = Axis("batch_size", rising=True)
_LENGTH = Axis("isl", ramp=1000.0, rising=True)  # the work is quadratic; short prompts leave units idle
_HEADS = Axis("num_heads")
_TOTAL_CONTEXT = Axis("total_context", rising=True)
_ATTENTION_KEYS = ("head_dim", "window_size", "attn_dtype", "kv_cache_dtype", "num_key_value_heads")
_MLA_KEYS = ("architecture", "gemm_type", "kv_cache_dtype")


#: Σ context of a decode batch; `step` is the cached length, the new token comes on top.
_ATTENDED = Derived(("batch_size", "step"), lambda batch, step: batch * (step + 1))
#: The same of the latent-attention modules, whose `step` (2, 4, 8, ...) is the attended length itself.
_ATTENDED_LATENT = Derived(("batch_size", "step"), lambda batch, step: batch * step)
#: Width of one expert on one rank: kernels of 8,192 on two ranks are those of 4,096 on one.
_LOCAL_WIDTH = Derived(("inter_size", "moe_tp_size"), lambda width, ranks: width // ranks)


FAMILIES: tuple[Family, ...] = (
    Family("gemm", "gemm", "gemm_perf", ("gemm_dtype",), (Axis("m", rising=True), Axis("n"), Axis("k"))),
    Family(
        "context_attention", "attention", "context_attention_perf",
        _ATTENTION_KEYS, (_HEADS, _LENGTH, _BATCH),
        defaults={"window_size": 0},
    ),
    Family(
        "generation_attention", "attention", "generation_attention_perf",
        _ATTENTION_KEYS, (_HEADS, _BATCH, _TOTAL_CONTEXT),
        derived={"total_context": _ATTENDED}, defaults={"window_size": 0}, weight="batch_size",
    ),
    Family("encoder_attention", "encoder_attention", "encoder_attention_perf", ("head_dim",),
           (_HEADS, _LENGTH, _BATCH)),
    Family("custom_allreduce", "comm", "custom_allreduce_perf", ("num_gpus", "backend"),
           (Axis("message_size", rising=True),), defaults={"backend": "default"}),
    Family("nccl", "comm", "nccl_perf", ("op_name", "nccl_dtype", "num_gpus"), (Axis("message_size", rising=True),),
           library="nccl"),
    Family(
        "moe", "moe", "moe_perf",
        ("moe_dtype", "hidden_size", "topk", "num_experts", "moe_ep_size", "distribution"),
        (Axis("local_width"), Axis("num_tokens", rising=True)),
        derived={"local_width": _LOCAL_WIDTH},
    ),
    Family(
        "moe_a2a", "comm", "moe_a2a_perf",
        ("comm_backend", "phase", "ep_size", "node_num", "hidden_size", "topk", "num_experts", "sms"),
        (Axis("num_tokens", rising=True),), unit_ns=1e3,
    ),
    Family("mla_context", "mla", "mla_context_module_perf", _MLA_KEYS, (_HEADS, _LENGTH, _BATCH)),
    Family("mla_generation", "mla", "mla_generation_module_perf", _MLA_KEYS, (_HEADS, _BATCH, _TOTAL_CONTEXT),
           derived={"total_context": _ATTENDED_LATENT}, weight="batch_size"),
    Family("mla_context_kernel", "mla", "context_mla_perf", ("kv_cache_dtype",), (_HEADS, _LENGTH, _BATCH)),
    Family("mla_generation_kernel", "mla", "generation_mla_perf", ("kv_cache_dtype",),
           (_HEADS, _BATCH, _TOTAL_CONTEXT), derived={"total_context": _ATTENDED}, weight="batch_size"),
    Family("streaming", "quantize", "scale_matrix_perf", ("quant_dtype",),
           (Axis("m", rising=True), Axis("k", rising=True)), library="vllm"),
)  # fmt: skip

BY_NAME: dict[str, Family] = {family.name: family for family in FAMILIES}
