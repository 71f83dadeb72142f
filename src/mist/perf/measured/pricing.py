"""Times of single operators from the measured tables: which table an operator reads, and at which of its points.

Between the tables and the `kernels` model, which sums operators and answers steps. It returns None for an operator that
isn't measured, and never falls back on anything itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mist.model import dtype_bytes
from mist.perf import Deployment
from mist.perf.measured.families import Axis
from mist.perf.measured.grid import EXTRAPOLATED, Estimate, FloatArray, RaggedGrid
from mist.perf.measured.tables import OperatorTables
from mist.perf.operators import Operator

#: All-reduce tables count elements of this size.
ELEMENT_BYTES = 2.0
#: Bytes that the streaming kernel moves for each element: it reads 16 bits and writes 8.
STREAMED_BYTES = 3.0

_TABLE_DTYPE = {"bf16": "bfloat16", "fp16": "bfloat16", "fp8": "fp8", "fp4": "nvfp4"}


@dataclass(frozen=True, slots=True)
class MeasuredAttention:
    """One layer of attention of equal sequences, by a table's `outer` nodes and its inner axis.

    Prefill: prompt lengths, then sequences. Decode: sequences, then Σ context; `inner` are the measured values.
    `scale`: a table of fewer KV heads stands in, with as many more sequences: a kernel sees sequences times KV heads.
    """

    grid: RaggedGrid
    axis: Axis
    heads: float
    outer_scale: float
    inner_scale: float
    outer: FloatArray
    inner: FloatArray

    def at(self, outer: float, inner: FloatArray) -> Estimate:
        """Time, ns, at one outer value and each of `inner`."""
        x = self.axis.scaled(np.array([outer * self.outer_scale]))[0]
        found = self.grid.at((self.heads, float(x)), inner * self.inner_scale)
        if self.inner_scale == 1:
            return found
        return Estimate(found.ns, np.full(len(inner), EXTRAPOLATED, np.int8))


def per_row(
    tables: OperatorTables, o: Operator, rows: FloatArray, deployment: Deployment, graph: bool
) -> Estimate | None:
    """Time of one launch of a per-row operator for each number of `rows`, ns; None where it isn't measured."""
    if o.kind == "gemm":
        return _gemm(tables, o, rows)
    if o.kind == "allreduce":
        return _all_reduce(tables, o, rows, deployment.platform.tp, graph)
    if o.kind == "elementwise":
        return _streaming(tables, o, rows)
    return None


def attention(tables: OperatorTables, o: Operator, deployment: Deployment) -> MeasuredAttention | None:
    """The measured times of an attention operator; None where its head size or KV dtype isn't measured."""
    prefill = o.kind == "attention_prefill"
    table = tables.table("context_attention" if prefill else "generation_attention")
    kv_dtype = _TABLE_DTYPE.get(deployment.kv_dtype)
    if table is None or kv_dtype is None:
        return None
    heads, kv_heads, head_size = o.shape
    keys: dict[str, int | str] = {
        "head_dim": head_size, "window_size": 0, "attn_dtype": "bfloat16", "kv_cache_dtype": kv_dtype
    }  # fmt: skip
    measured = [v for v in table.key_values("num_key_value_heads", **keys) if v <= kv_heads]
    if not measured:
        return None
    keys["num_key_value_heads"] = measured[-1]
    grid = table.grid(**keys)
    assert grid is not None
    scale = kv_heads / measured[-1]
    outer_scale = 1.0 if prefill else scale
    outer, inner = table.family.axes[1:]
    return MeasuredAttention(
        grid, outer, heads / scale, outer_scale, scale,
        np.array(table.key_values(outer.column, **keys)) / outer_scale,
        np.array(table.key_values(inner.column, **keys)) / scale,
    )  # fmt: skip


def _gemm(tables: OperatorTables, o: Operator, rows: FloatArray) -> Estimate | None:
    """Weights narrower than the compute dtype (weight-only quantisation) are other kernels, which aren't measured."""
    table, dtype = tables.table("gemm"), _TABLE_DTYPE.get(o.dtype)
    n, k = o.shape
    if table is None or dtype is None or o.weight_bytes < n * k * dtype_bytes(o.dtype):
        return None
    grid = table.grid(gemm_dtype=dtype)
    return _along_rows(grid, (float(n),), float(k), rows) if grid else None


def _streaming(tables: OperatorTables, o: Operator, rows: FloatArray) -> Estimate | None:
    """Norms, activations and the like by their bytes per row: the time of the one measured kernel that only streams."""
    table = tables.table("streaming")
    grid = table.grid(quant_dtype="fp8") if table else None
    return _along_rows(grid, (), o.bytes[o.driver] / STREAMED_BYTES, rows) if grid else None


def _along_rows(grid: RaggedGrid, outer: tuple[float, ...], inner: float, rows: FloatArray) -> Estimate:
    """A grid whose first axis is rows, read at each of its rows and then interpolated along them."""
    at = np.array([inner])
    found = [grid.at((m, *outer), at) for m in grid.values]
    worst = max(int(f.origin[0]) for f in found)
    line = RaggedGrid(grid.values[None, :], np.array([f.ns[0] for f in found])).at((), rows)
    return Estimate(line.ns, np.maximum(line.origin, np.int8(worst)))


def _all_reduce(tables: OperatorTables, o: Operator, rows: FloatArray, ranks: int, graph: bool) -> Estimate | None:
    """The faster of the engine's own all-reduce and NCCL's, as engines choose by size."""
    elements = o.bytes[o.driver] * rows / ELEMENT_BYTES
    grids = []
    custom, nccl = tables.table("custom_allreduce"), tables.table("nccl")
    if custom is not None:
        backends = custom.categories["backend"]
        wanted = [b for b in backends if b.endswith("graph" if graph else "eager")] or backends
        grids += [custom.grid(num_gpus=ranks, backend=backend) for backend in wanted]
    if nccl is not None:
        grids.append(nccl.grid(op_name="all_reduce", nccl_dtype="half", num_gpus=ranks))
    best: Estimate | None = None
    for grid in grids:
        if grid is not None:
            found = grid.at((), elements)
            best = found if best is None else Estimate.minimum(best, found)
    return best
