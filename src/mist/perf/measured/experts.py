"""Routed experts from the measured tables, in which one fused kernel does what several operators of the list do.

Beside `pricing`, below `deployed`. It says what the fused kernel takes, and nothing of how that is split over the list.
"""

from __future__ import annotations

from collections.abc import Sequence

from mist.perf import Deployment
from mist.perf.measured.grid import Estimate, FloatArray, RaggedGrid
from mist.perf.measured.tables import OperatorTables, Table
from mist.perf.operators import Operator

#: Operators that the measured kernel does in one, by name.
FUSED = ("experts_gate_up", "experts_activation", "experts_down", "experts_sum")

#: dtype of routed experts -> that of the tables, best first. Published fp8 checkpoints of such models have scales for
#: blocks of weights; the kernels for whole tensors take longer than those of bf16.
_TABLE_DTYPES = {
    "bf16": ("bfloat16",), "fp16": ("bfloat16",), "fp8": ("fp8_block", "fp8"), "int4": ("int4_wo",),
    "fp4": ("nvfp4",), "mxfp4": ("w4a8_mxfp4_mxfp8", "w4a16_mxfp4"),
}  # fmt: skip


def fused_experts(
    tables: OperatorTables, operators: Sequence[Operator], deployment: Deployment, distribution: str
) -> RaggedGrid | None:
    """[local width, tokens that reach the layer]: time of one layer's experts, ns; None where they weren't measured.

    None too where there are experts of several shapes, and where tokens travel to their experts in an all-to-all: the
    kernels were measured with the tokens of all ranks on each, most of which they only skip.
    """
    table, platform = tables.table("moe"), deployment.platform
    gemms = [o for o in operators if o.name == FUSED[0]]
    if table is None or len(gemms) != 1 or (platform.ep > 1 and platform.attn_dp > 1):
        return None
    experts, (_, hidden) = gemms[0].experts, gemms[0].shape
    assert experts is not None
    keys: dict[str, int | str] = {
        "hidden_size": hidden, "topk": experts.top_k, "num_experts": experts.num_experts, "moe_ep_size": platform.ep
    }  # fmt: skip
    for dtype in _TABLE_DTYPES.get(deployment.model.matrix_dtypes(deployment.weights_dtype)[1], ()):
        for routing in _distributions(table, distribution):
            grid = table.grid(**keys, moe_dtype=dtype, distribution=routing)
            if grid is not None:
                return grid
    return None


def fused_ns(grid: RaggedGrid, width: int, tokens: FloatArray) -> Estimate:
    """One layer's experts of a `width` on this rank, ns, for each number of `tokens` of all attention groups."""
    return grid.at((float(width),), tokens)


def local_width(deployment: Deployment) -> int:
    """Intermediate size of one expert on one rank."""
    platform = deployment.platform
    sizes = [g.experts.ffn_size for g in deployment.model.layers if g.experts]
    return sizes[0] * platform.ep // platform.num_stage_devices


def _distributions(table: Table, wanted: str) -> list[str]:
    """The `wanted` one, then others of its kind, then all."""
    known = table.categories["distribution"]
    return sorted(known, key=lambda name: (name != wanted, name.split("_")[0] != wanted.split("_")[0], name))
