"""The power model against measured power: Splitwise's Llama-2-70B on eight A100, and decode attention on a B200.

`MIST_DATA=... python benchmarks/energy.py` prints measured and modelled shares of TDP, their errors and the fit behind
the constants of `mist.cost.power`; the B200 needs aiconfigurator-core's tables (the extra `kernels`, or
MIST_KERNEL_TABLES). It changes nothing, and fits to nothing but these profiles, which are for fitting.
"""

from __future__ import annotations

import csv
import os
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from mist.cost.power import ACTIVE, COMPUTE, MEMORY, busy_share, peak_shares
from mist.hardware import Platform
from mist.perf import Deployment
from mist.scenario import catalogue

TABLE = "profiles/splitwise_sim/perf_model_llama2-70b_tp8.csv"
B200 = "b200_sxm/attention/vllm/0.22.0/generation_attention_perf.parquet"
#: its mean is below that of an idle device beside every other: the sampling went on after the run
LEFT_OUT = (8192, 1, "decode")

Point = tuple[int, int, str, float, float, float]  # prompt, batch, phase, measured, compute, memory


def splitwise(path: Path) -> list[Point]:
    """Medians over repetitions: the peak power of a run, which is its prompt's, and the mean, mostly of its decodes."""
    rows = defaultdict(list)
    with path.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["hardware"] == "a100-80gb" and float(row["average_power"]) > 0:
                rows[int(row["prompt_size"]), int(row["batch_size"]), int(row["token_size"])].append(row)
    points: list[Point] = []
    for (prompt, batch, tokens), runs in sorted(rows.items()):
        median = {key: statistics.median(float(run[key]) for run in runs) for key in
                  ("peak_power", "average_power", "prompt_time", "token_time")}  # fmt: skip
        context = batch * (prompt + tokens // 2)
        points.append((prompt, batch, "prompt", median["peak_power"],
                       *shares(batch, prompt * batch, 0, 0, median["prompt_time"])))  # fmt: skip
        points.append((prompt, batch, "decode", median["average_power"],
                       *shares(0, 0, batch, context, median["token_time"])))  # fmt: skip
    return points


def shares(prompts: int, tokens: int, decodes: int, context: int, took_ms: float) -> tuple[float, float]:
    """Shares of peak that a measured step reached."""
    device = catalogue.read("devices", "a100-sxm-80gb", Path())[0]
    model = catalogue.read("models", "llama-2-70b", Path())[0]
    step = {"num_prefills": prompts, "num_prefill_tokens": tokens, "num_decodes": decodes, "decode_context": context,
            "start_ns": 0, "end_ns": round(took_ms * 1e6)}  # fmt: skip
    columns = {name: np.array([value], np.int64) for name, value in step.items()}
    compute, memory = peak_shares(Deployment(model, Platform(device, tp=8), "bf16", "bf16", 16384, 64), columns)
    return float(compute[0]), float(memory[0])


def fitted(points: list[Point]) -> tuple[float, float]:
    """ACTIVE and COMPUTE by least squares, given MEMORY."""
    measured, compute, read = (np.array(column) for column in zip(*(p[3:] for p in points), strict=True))

    def errors(x: np.ndarray) -> np.ndarray:
        return modelled(x[0], x[1], compute, read) - measured

    active, slope = least_squares(errors, [0.4, 1.0]).x
    return float(active), float(slope)


def modelled(active: float, slope: float, compute: Any, memory: Any) -> Any:
    """`mist.cost.power.busy_share` with other constants; all points are above WAITING where compute counts."""
    return np.minimum(1.0, active + slope * (compute / (compute + memory)) ** 3 + MEMORY * memory)


def b200_memory(folder: Path) -> tuple[float, float, int]:
    """Median share of TDP, and of peak bandwidth, of decode attention that reads at over 0.8 of it."""
    import pyarrow.parquet as pq

    t = {name: np.array(column) for name, column in pq.read_table(folder / B200).to_pydict().items()}
    size = np.where(t["kv_cache_dtype"] == "fp8", 1, 2)
    kv_bytes = t["batch_size"] * (t["isl"] + t["step"]) * 2 * t["num_key_value_heads"] * t["head_dim"] * size
    reached = kv_bytes / (t["latency"] * 1e-3) / 8e12
    bound = (t["window_size"] == 0) & (t["power"] > 0) & (reached > 0.8) & (reached <= 1)
    return (
        float(np.median(t["power"][bound] / t["power_limit"][bound])),
        float(np.median(reached[bound])),
        int(bound.sum()),
    )


def main() -> int:
    path = Path(os.environ.get("MIST_DATA", "")) / TABLE
    if not path.is_file():
        print(f"MIST_DATA is not set, or has no {TABLE}", file=sys.stderr)
        return 2
    points = splitwise(path)
    kept = [point for point in points if point[:3] != LEFT_OUT]
    print("Llama-2-70B on 8 x A100, share of TDP per device (Splitwise)\n")
    print("prompt batch phase   of FLOP/s  of GB/s  measured  modelled   error")
    errors = []
    for point in points:
        prompt, batch, phase, measured, compute, memory = point
        share = float(busy_share(compute, memory))
        note = "" if point in kept else "  left out"
        errors += [] if note else [(phase, share / measured - 1)]
        print(f"{prompt:6} {batch:5} {phase}  {compute:9.3f} {memory:8.3f} {measured:9.3f} {share:9.3f} "
              f"{share / measured - 1:+7.1%}{note}")  # fmt: skip
    for phase in ("prompt", "decode"):
        mine = [abs(error) for name, error in errors if name == phase]
        print(f"{phase}: mean absolute error {statistics.mean(mine):.1%}, worst {max(mine):.1%}, n = {len(mine)}")
    active, slope = fitted(kept)
    print(
        f"\nfit: ACTIVE {active:.3f}, COMPUTE {slope:.3f} given MEMORY {MEMORY}; in use {ACTIVE}, {COMPUTE}, {MEMORY}"
    )
    left = []
    for at, (_, _, _, measured, compute, memory) in enumerate(kept):
        a, c = fitted(kept[:at] + kept[at + 1 :])
        left.append(abs(float(modelled(a, c, compute, memory)) / measured - 1))
    print(f"leave one out: mean absolute error {statistics.mean(left):.1%}, worst {max(left):.1%}")
    tables = os.environ.get("MIST_KERNEL_TABLES")
    if tables and (Path(tables) / B200).is_file():
        power, reached, count = b200_memory(Path(tables))
        share = float(busy_share(0.0, reached))
        print(f"\nB200, decode attention at {reached:.2f} of its bandwidth (median of {count}): {power:.2f} of TDP,")
        print(f"hence MEMORY {(power - ACTIVE) / reached:.2f}; modelled {share:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
