"""What a device draws while it works: the power of each step from how far it is bound by compute and by memory.

The work of a step follows from the operators of its pass and the sums in the step table. It never knows times of day,
and never says less than idle or more than the TDP (or the cap below it).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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

#: of the sums that an attention window cuts, what it goes by
_OF_WINDOWS = {"decode_context": "decodes", "prefill_area": "prefill_tokens"}
#: by sum and window
Coefficients = dict[tuple[str, int], float]


def busy_share(compute: FloatColumn | float, memory: FloatColumn | float) -> FloatColumn:
    """Power over TDP of a device that reaches the shares `compute` and `memory` of its peaks.

    Near 1 where compute binds it, as in prompts, lower where memory does, as in decodes.
    """
    compute, memory = np.asarray(compute, np.float64), np.asarray(memory, np.float64)
    both = compute + memory
    bound = np.divide(compute, both, out=np.zeros_like(both), where=both > 0)
    share = ACTIVE + COMPUTE * (bound * bound * bound) * np.minimum(1.0, both / WAITING) + MEMORY * memory
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
    device = deployment.platform.device
    operators = [operator for operator in forward_pass(deployment) if operator.kind not in NETWORK_KINDS]
    flop_s: Coefficients = {}
    num_bytes: Coefficients = {}
    for operator in operators:
        _add(flop_s, operator, operator.flop, 1 / device.peak(operator.dtype))
        _add(num_bytes, operator, operator.bytes, 1.0)
    read = _linear(num_bytes, sums) + _weights(operators, sums)
    return _linear(flop_s, sums) / took_s, read / device.memory_bytes_per_s / took_s


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


def _add(total: Coefficients, operator: Operator, coefficients: Mapping[str, float], factor: float) -> None:
    """All launches' FLOP or bytes for each unit of the sums, which are zero where the operator doesn't run."""
    for name, each in coefficients.items():
        window = operator.window if name in _OF_WINDOWS else 0
        total[name, window] = total.get((name, window), 0.0) + operator.repeats * each * factor


def _linear(coefficients: Coefficients, sums: Mapping[str, FloatColumn]) -> FloatColumn:
    total: FloatColumn = np.zeros(len(sums["tokens"]))
    for (name, window), each in coefficients.items():
        column = np.minimum(sums[name], window * sums[_OF_WINDOWS[name]]) if window else sums[name]
        total += each * column
    return total


def _weights(operators: Sequence[Operator], sums: Mapping[str, FloatColumn]) -> FloatColumn:
    """Bytes of weights that each step reads: of mixtures those of the experts touched in expectation."""
    total: FloatColumn = np.zeros(len(sums["tokens"]))
    dense: dict[str, float] = {}
    for operator in operators:
        whole, driver = operator.repeats * operator.weight_bytes, operator.driver
        if operator.experts is None:
            dense[driver] = dense.get(driver, 0.0) + whole
        else:
            total += whole * operator.experts.touched_share(operator.groups * sums[driver])
    for driver, num_bytes in dense.items():
        total += num_bytes * (sums[driver] > 0)
    return total
