"""Times of single operators from the measured tables: which table an operator reads, and at which of its points.

Between the tables and `deployed`, which adds floors and the fallback. It returns None for an operator that isn't
measured, and never falls back on anything itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mist.model import dtype_bytes
from mist.perf import Deployment
from mist.perf.measured.families import Axis
from mist.perf.measured.grid import EXTRAPOLATED, INTERPOLATED, Estimate, FloatArray, RaggedGrid
from mist.perf.measured.tables import OperatorTables, Table
from mist.perf.operators import Operator, windowed_area

#: Tables of collectives count elements of this size.
ELEMENT_BYTES = 2.0
#: Bytes that the streaming kernel moves for each element: it reads 16 bits and writes 8.
STREAMED_BYTES = 3.0

TABLE_DTYPE = {"bf16": "bfloat16", "fp16": "bfloat16", "fp8": "fp8", "fp4": "nvfp4"}
#: GEMMs know int8 too ("SmoothQuant": weights and inputs), and weights narrower than what they are multiplied in.
_GEMM_DTYPE = {**TABLE_DTYPE, "int8": "sq"}
_WEIGHT_ONLY = {"int8": "int8_wo", "int4": "int4_wo"}


@dataclass(frozen=True, slots=True)
class MeasuredAttention:
    """One layer of attention of equal sequences, by a table's `outer` nodes and its inner axis.

    Prefill: prompt lengths, then sequences. Decode: sequences, then Σ context; `inner` are the measured values.
    `scale`: a table of fewer KV heads stands in, with as many more sequences: a kernel sees sequences times KV heads.
    `window`: prompts are read from a table without one, at the length whose work is the same.
    """

    grid: RaggedGrid
    axis: Axis
    heads: float
    outer: FloatArray
    inner: FloatArray
    outer_scale: float = 1.0
    inner_scale: float = 1.0
    window: int = 0

    def at(self, outer: float, inner: FloatArray) -> Estimate:
        """Time, ns, at one outer value and each of `inner`."""
        outer *= self.outer_scale
        stands_in = self.inner_scale != 1
        if self.window and outer > self.window:
            outer, stands_in = (2 * windowed_area(int(outer), 0, self.window)) ** 0.5, True
        x = self.axis.scaled(np.array([outer]))[0]
        found = self.grid.at((self.heads, float(x)), inner * self.inner_scale)
        return Estimate(found.ns, np.full(len(inner), EXTRAPOLATED, np.int8)) if stands_in else found


def per_row(tables: OperatorTables, o: Operator, rows: FloatArray, deployment: Deployment) -> Estimate | None:
    """Time of one launch of a per-row operator for each number of `rows`, ns; None where it isn't measured."""
    if o.kind == "gemm":
        return _gemm(tables, o, rows, deployment)
    if o.kind == "elementwise":
        return _streaming(tables, o, rows)
    if o.kind in ("allreduce", "allgather") and o.shape[1] <= deployment.platform.device.scale_up_domain:
        return _collective(tables, o, rows, graph=deployment.cuda_graph)
    if o.kind == "alltoall":
        return _all_to_all(tables, o, rows, deployment)
    return None


def attention(tables: OperatorTables, o: Operator, deployment: Deployment) -> MeasuredAttention | None:
    """The measured times of an attention operator; None where its head size or KV dtype isn't measured."""
    heads, kv_heads, head_size = o.shape
    if o.kind == "attention_encoder":
        return equal_sequences(tables.table("encoder_attention"), heads, head_dim=head_size)
    prefill = o.kind == "attention_prefill"
    table = tables.table("context_attention" if prefill else "generation_attention")
    kv_dtype = TABLE_DTYPE.get(deployment.kv_dtype)
    if table is None or kv_dtype is None:
        return None
    keys: dict[str, int | str] = {
        "head_dim": head_size, "window_size": o.window, "attn_dtype": "bfloat16", "kv_cache_dtype": kv_dtype
    }  # fmt: skip
    for window in dict.fromkeys((o.window, 0)):
        keys["window_size"] = window
        measured = [v for v in table.key_values("num_key_value_heads", **keys) if v <= kv_heads]
        if measured:
            keys["num_key_value_heads"] = measured[-1]
            stand_in = o.window if prefill and window != o.window else 0
            scale = kv_heads / measured[-1]
            return equal_sequences(table, heads / scale, 1.0 if prefill else scale, scale, stand_in, **keys)
    return None


def equal_sequences(
    table: Table | None, heads: float, outer_scale: float = 1.0, inner_scale: float = 1.0, window: int = 0,
    **keys: int | str,
) -> MeasuredAttention | None:  # fmt: skip
    """The points of an attention table (its axes: heads, outer, inner) that match `keys`; None if there are none."""
    grid = table.grid(**keys) if table else None
    if table is None or grid is None:
        return None
    outer, inner = table.family.axes[1:]
    return MeasuredAttention(
        grid, outer, heads,
        np.array(table.key_values(outer.column, **keys)) / outer_scale,
        np.array(table.key_values(inner.column, **keys)) / inner_scale,
        outer_scale, inner_scale, window,
    )  # fmt: skip


def _gemm(tables: OperatorTables, o: Operator, rows: FloatArray, deployment: Deployment) -> Estimate | None:
    table, (n, k) = tables.table("gemm"), o.shape
    if o.weight_bytes < n * k * dtype_bytes(o.dtype):
        dtype = _WEIGHT_ONLY.get(deployment.model.matrix_dtypes(deployment.weights_dtype)[0])
    else:
        dtype = _GEMM_DTYPE.get(o.dtype)
    grid = table.grid(gemm_dtype=dtype) if table and dtype else None
    return _along_rows(grid, (float(n),), float(k), rows) if grid else None


def _streaming(tables: OperatorTables, o: Operator, rows: FloatArray) -> Estimate | None:
    """Norms, activations and the like by their bytes per row: the time of the one measured kernel that only streams."""
    table = tables.table("streaming")
    grid = table.grid(quant_dtype="fp8") if table else None
    if grid is None:
        return None
    found = _along_rows(grid, (), o.bytes[o.driver] / STREAMED_BYTES, rows)
    return Estimate(found.ns, np.maximum(found.origin, np.int8(INTERPOLATED)))


def _along_rows(grid: RaggedGrid, outer: tuple[float, ...], inner: float, rows: FloatArray) -> Estimate:
    """A grid whose first axis is rows, read at each of its rows and then interpolated along them."""
    at = np.array([inner])
    found = [grid.at((m, *outer), at) for m in grid.values]
    worst = max(int(f.origin[0]) for f in found)
    line = RaggedGrid(grid.values[None, :], np.array([f.ns[0] for f in found])).at((), rows)
    return Estimate(line.ns, np.maximum(line.origin, np.int8(worst)))


def _collective(tables: OperatorTables, o: Operator, rows: FloatArray, *, graph: bool) -> Estimate | None:
    """NCCL's time, and for an all-reduce the engine's own kernel's where that is faster, as engines choose by size."""
    ranks = o.shape[1]
    elements = o.bytes[o.driver] * rows / ELEMENT_BYTES
    grids = []
    custom, nccl = tables.table("custom_allreduce"), tables.table("nccl")
    if custom is not None and o.kind == "allreduce":
        backends = custom.categories["backend"]
        wanted = [b for b in backends if b.endswith("graph" if graph else "eager")] or backends
        grids += [custom.grid(num_gpus=ranks, backend=backend) for backend in wanted]
    if nccl is not None:
        name = "all_reduce" if o.kind == "allreduce" else "all_gather"
        grids.append(nccl.grid(op_name=name, nccl_dtype="half", num_gpus=ranks))
    return _fastest(grids, elements)


def _all_to_all(tables: OperatorTables, o: Operator, rows: FloatArray, deployment: Deployment) -> Estimate | None:
    """The faster of DeepEP's kernels, of any number of SMs; for one rank per attention group, one group per rank."""
    table, platform = tables.table("moe_a2a"), deployment.platform
    layers = [g for g in deployment.model.layers if g.experts]
    if table is None or platform.tp > 1 or platform.ep != o.shape[1] or not layers:
        return None
    experts = layers[0].experts
    assert experts is not None
    keys: dict[str, int | str] = {
        "phase": o.name, "ep_size": platform.ep, "node_num": -(-platform.ep // platform.device.scale_up_domain),
        "hidden_size": layers[0].hidden_size, "topk": experts.top_k, "num_experts": experts.num_experts,
    }  # fmt: skip
    backends = table.categories["comm_backend"]
    grids = [
        table.grid(**keys, comm_backend=backend, sms=sms)
        for backend in backends for sms in table.key_values("sms", **keys, comm_backend=backend)
    ]  # fmt: skip
    return _fastest(grids, rows)


def _fastest(grids: list[RaggedGrid | None], x: FloatArray) -> Estimate | None:
    """The smallest time at each of `x`; a line that ends before it counts only where all of them do."""
    found = [grid.at((), x) for grid in grids if grid is not None]
    if not found:
        return None
    best = found[0]
    for other in found[1:]:
        better = np.where(
            (other.origin == EXTRAPOLATED) == (best.origin == EXTRAPOLATED),
            other.ns < best.ns,
            other.origin < EXTRAPOLATED,
        )
        best = Estimate(np.where(better, other.ns, best.ns), np.where(better, other.origin, best.origin))
    return best
