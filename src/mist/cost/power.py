"""What a device draws while it works: the power of each step from how far it is bound by compute and by memory.

The work of a step follows from the operators of its pass and the sums in the step table. It never knows times of day,
and never says less than idle or more than the TDP (or the cap below it).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from mist.hardware import Device
from mist.metrics.window import Columns
from mist.perf import Deployment
from mist.perf.operators import NETWORK_KINDS, Operator, forward_pass
from mist.units import NS_PER_S

FloatColumn = npt.NDArray[np.float64]

#: Power of a busy device over its TDP, of the shares c of its peak FLOP/s and m of its peak bandwidth:
#: ACTIVE + COMPUTE x (c / (c + m))^3 + MEMORY x m, at most 1. ACTIVE and COMPUTE are fitted to Llama-2-70B on A100
#: (Splitwise, arXiv 2311.18677, its profiles), MEMORY is that of decode attention on B200 (aiconfigurator-core 0.12.0);
#: benchmarks/energy.py has both and the errors. Unverified for other devices.
ACTIVE, COMPUTE, MEMORY = 0.38, 1.01, 0.24
#: Below this c + m, which nothing measured is, the device waits for its host, and COMPUTE counts in proportion.
WAITING = 0.25


def busy_share(compute: FloatColumn | float, memory: FloatColumn | float) -> FloatColumn:
    """Power over TDP of a device that reaches the shares `compute` and `memory` of its peaks.

    Near 1 where compute binds it, as in prompts, lower where memory does, as in decodes.
    """
    compute, memory = np.asarray(compute, np.float64), np.asarray(memory, np.float64)
    both = compute + memory
    bound = np.divide(compute, both, out=np.zeros_like(both), where=both > 0) ** 3
    share = ACTIVE + COMPUTE * bound * np.minimum(1.0, both / WAITING) + MEMORY * memory
    return np.minimum(1.0, share)


def busy_watts(device: Device, share: FloatColumn, power_cap_w: float | None = None) -> FloatColumn:
    """Watts of a busy device by its share of TDP, between idle and its TDP or cap; ValueError where none is known."""
    if device.tdp_w is None or device.idle_watts is None:
        raise ValueError(f"no TDP is known of {device.name}")
    most = min(device.tdp_w, power_cap_w or device.tdp_w)
    return np.clip(share * device.tdp_w, min(device.idle_watts, most), most)


def peak_shares(deployment: Deployment, steps: Columns) -> tuple[FloatColumn, FloatColumn]:
    """Shares of the peak FLOP/s and of the peak bandwidth that each step reaches, float64[steps].

    Chunks count as if nothing came before them in their prompts, which records don't tell: of long prompts in many
    chunks some attention is left out.
    """
    sums = _sums(deployment, steps)
    took_s = np.maximum(steps["end_ns"] - steps["start_ns"], 1) / NS_PER_S
    device, flop_s, num_bytes = deployment.platform.device, np.zeros(len(took_s)), np.zeros(len(took_s))
    for operator in forward_pass(deployment):
        if operator.kind in NETWORK_KINDS:
            continue
        runs = sums[operator.driver] > 0
        flop_s += runs * _linear(operator, operator.flop, sums) / device.peak(operator.dtype)
        num_bytes += runs * (operator.repeats * _weights(operator, sums) + _linear(operator, operator.bytes, sums))
    return flop_s / took_s, num_bytes / device.memory_bytes_per_s / took_s


def _sums(deployment: Deployment, steps: Columns) -> dict[str, FloatColumn]:
    """The sums of `perf.operators.StepSums` for every step, in floating point."""
    prefill, decodes, chunks, context = (
        steps[name].astype(np.float64)
        for name in ("num_prefill_tokens", "num_decodes", "num_prefills", "decode_context")
    )
    tokens = prefill + decodes * deployment.tokens_per_decode
    return {
        "tokens": tokens,
        "shared_tokens": tokens * deployment.platform.attn_dp,
        "sampled": chunks + decodes * deployment.tokens_per_decode,
        "decodes": decodes,
        "decode_context": context,
        "prefill_tokens": prefill,
        "prefill_context": prefill,
        "prefill_area": prefill**2 / (2 * np.maximum(chunks, 1)),
    }


def _linear(operator: Operator, coefficients: Mapping[str, float], sums: dict[str, FloatColumn]) -> FloatColumn:
    """All launches' FLOP or bytes that are linear in the sums, contexts cut at the operator's window."""
    total: FloatColumn = np.zeros(len(sums["tokens"]))
    window = operator.window
    for name, each in coefficients.items():
        column = sums[name]
        if window and name == "decode_context":
            column = np.minimum(column, window * sums["decodes"])
        elif window and name == "prefill_area":
            column = np.minimum(column, window * sums["prefill_tokens"])
        total = total + each * column
    return operator.repeats * total


def _weights(operator: Operator, sums: dict[str, FloatColumn]) -> FloatColumn | float:
    if operator.experts is None:
        return operator.weight_bytes
    return operator.weight_bytes * operator.experts.touched_share(operator.groups * sums[operator.driver])
