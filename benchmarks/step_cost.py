"""What pricing one step costs inside the loop, by kind of step, for measured operators and for the roofline.

    python benchmarks/step_cost.py [--json]

Prepares each of `CLIENTS` and asks `step_time` for the same step again and again: the minimum over many short runs, in
µs, which other work on the machine hardly moves, and its ratio to the roofline's. It simulates nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import timeit
from functools import partial
from typing import Any

from mist.perf import PerfModel
from mist.perf.kernels import Kernels
from mist.perf.measured import find_tables
from mist.perf.roofline import Roofline
from mist.request import Step
from mist.scenario.explain import explain_step

CLIENTS = (("llama-3.1-70b", "h100-sxm", 4), ("gpt-oss-120b", "h100-sxm", 4), ("deepseek-v3", "h200-sxm", 8))
STEPS = {
    "decode": Step(64, 64 * 2048, [], 0, 64),
    "prefill": Step(0, 0, [(2048, 0)], 2048, 1),
    "4 prefills": Step(0, 0, [(512, 0)] * 4, 2048, 4),
    "chunk": Step(0, 0, [(2048, 4096)], 2048, 0),
    "mixed": Step(64, 64 * 2048, [(448, 0)], 448, 65),
    "mixed chunk": Step(64, 64 * 2048, [(448, 1024)], 448, 65),
}
_CALLS, _RUNS = 500, 200


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    reason = find_tables()
    if isinstance(reason, str):
        print(reason, file=sys.stderr)
        return 2
    rows = [row for model, device, tp in CLIENTS for row in costs(model, device, tp)]
    if options.json:
        print(json.dumps(rows))
        return 0
    for r in rows:
        print(f"{r['model']:14s} {r['device']:9s} TP{r['tp']} {r['step']:12s} {r['kernels_us']:5.2f} us, "
              f"roofline {r['roofline_us']:5.2f} us, ratio {r['ratio']:4.2f}")  # fmt: skip
    return 0


def costs(model: str, device: str, tp: int) -> list[dict[str, Any]]:
    """The cost of each of `STEPS` on one client."""
    deployment = explain_step(model, device, STEPS["decode"], tp=tp, perf="roofline").deployment
    kernels, roofline = Kernels(fallback=Roofline()), Roofline()
    for perf in (kernels, roofline):
        perf.prepare(deployment)
    found = []
    for name, step in STEPS.items():
        ours, theirs = _call_us(kernels, step), _call_us(roofline, step)
        found.append({"model": model, "device": device, "tp": tp, "step": name, "kernels_us": ours,
                      "roofline_us": theirs, "ratio": ours / theirs})  # fmt: skip
    return found


def _call_us(perf: PerfModel, step: Step) -> float:
    return min(timeit.repeat(partial(perf.step_time, step), number=_CALLS, repeat=_RUNS)) / _CALLS * 1e6


if __name__ == "__main__":
    sys.exit(main())
