"""Simulates the measured embedding points and says what their speeds follow from.

    MIST_DATA=FOLDER python studies/embedding_points.py

The points (`validation/nonllm_points.csv`, stage `embedding`): five serving systems embed 10 requests of 256 sentences,
1.15 M tokens in all, with bge-large-en-v1.5 on one L4. Each is run here as a scenario: a pipeline of one prefill, an
encoder client with that system's engine profile, 2,560 sequences of the mean length, all at once. How many requests
were under way at a time and how lengths varied isn't published; with steps this full the first makes no difference.

What is a check and what isn't. The L4's kernel efficiencies come from no embedding point: they are those measured on an
L40S, the same architecture, times the clock that its power cap leaves; the third table shows that with or without that
clock the fastest would be within 9 %, so the point doesn't tell the two apart. `tei` and `infinity` on torch have nothing
fitted, so their errors are errors of a prediction. The other three profiles hold a factor that was fitted to the one
point that there is: their errors say only that the fit was done. The second table leaves those factors out.
"""

from __future__ import annotations

import csv
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mist.request import Step
from mist.scenario import Scenario, catalogue, load
from mist.scenario.build import run
from mist.scenario.pricing import price

NUM_SEQUENCES = 10 * 256
#: of the model, at which sequences are cut
MAX_CONTEXT = 512
ENGINES = {
    "TEI candle flashbert 0.6": "tei-0.6",
    "infinity torch compile fa2 0.0.25": "infinity-0.0.25",
    "tensorrt via infinity": "infinity-0.0.25-tensorrt",
    "infinity onnx-gpu fp16": "infinity-0.0.25-onnx",
    "sentence-transformers fp16": "sentence-transformers-2",
}
#: the clock under 72 W of a third of an L40S, and what an L40S reaches without a cap of its own
CLOCK, L40S = 0.79, {"gemm": 0.61, "attention_prefill": 0.53}
DEVICES: dict[str, dict[str, float]] = {
    "generic efficiencies": {},
    "an L40S's, at full clock": L40S,
    "an L40S's, at the clock under 72 W (as shipped)": {k: round(v * CLOCK, 2) for k, v in L40S.items()},
    "the same, elementwise 0.8 as an L40S streams": {
        **{k: round(v * CLOCK, 2) for k, v in L40S.items()}, "elementwise": 0.8,
    },
}  # fmt: skip
#: passes over the scores of attention that isn't fused: scores written, scaled, masked and normalised (two each), read
SCORE_PASSES = 8


@dataclass(frozen=True)
class Point:
    """A measured point: its system, tokens in all, tokens per second."""

    id: str
    system: str
    num_tokens: int
    tokens_per_s: float

    @property
    def tokens_per_sequence(self) -> int:
        return round(self.num_tokens / NUM_SEQUENCES)


def main() -> None:
    """Print each point, then what it would be without its fit, then what the fits stand for."""
    points = measured()
    if not points:
        sys.exit("MIST_DATA has no validation/nonllm_points.csv")
    print(f"{'point':9}{'system':35}{'tokens/s':>10}{'simulated':>11}{'error':>8}  time factors")
    for point in points:
        engine = catalogue.mapping("engines", ENGINES[point.system])
        print_point(point, engine, str(dict(engine.get("time_factors", {})) or "none: a prediction"))
    print("\nwithout what was fitted: the same kernels for all")
    for point in points:
        print_point(point, unfitted(point), "")
    print("\nthe fastest, by efficiencies of the L4")
    for words, efficiency in DEVICES.items():
        device = {**catalogue.mapping("devices", "l4"), "efficiency": efficiency}
        tokens_per_s = simulated(points[0], unfitted(points[0]), device)
        print(f"  {words:50}{tokens_per_s:>10,.0f} {100 * (tokens_per_s / points[0].tokens_per_s - 1):+6.1f} %")
    explain(points)


def measured() -> list[Point]:
    """The points of the first folder of MIST_DATA that has them."""
    for root in os.environ.get("MIST_DATA", "").split(os.pathsep):
        path = Path(root) / "validation" / "nonllm_points.csv"
        if root and path.is_file():
            with path.open(encoding="utf-8", newline="") as file:
                rows = [row for row in csv.DictReader(file) if row["stage"] == "embedding"]
            return [Point(r["id"], r["system"], int(r["num_tokens"]), float(r["value"])) for r in rows]
    return []


def unfitted(point: Point) -> dict[str, Any]:
    """The profile of the point's system without its time factors."""
    return {k: v for k, v in catalogue.mapping("engines", ENGINES[point.system]).items() if k != "time_factors"}


def print_point(point: Point, engine: Mapping[str, Any], words: str) -> None:
    tokens_per_s = simulated(point, engine)
    error = 100 * (tokens_per_s / point.tokens_per_s - 1)
    print(f"{point.id:9}{point.system:35}{point.tokens_per_s:>10,.0f}{tokens_per_s:>11,.0f}{error:>+7.1f}%  {words}")


def simulated(point: Point, engine: Mapping[str, Any], device: Any = "l4") -> float:
    """Tokens per second from the first arrival to the last end of a run, its ledger on."""
    result = run(scenario_of(point, engine, device), check=True)
    return NUM_SEQUENCES * point.tokens_per_sequence / float(max(result.steps["end_s"]))


def scenario_of(point: Point, engine: Mapping[str, Any], device: Any = "l4") -> Scenario:
    """The point as a scenario."""
    client = {"device": device, "model": "BAAI/bge-large-en-v1.5", "serves": ["prefill"], "engine": dict(engine)}
    workload = {"concurrency": NUM_SEQUENCES, "num_requests": NUM_SEQUENCES, "input_tokens": point.tokens_per_sequence,
                "output_tokens": 1}  # fmt: skip
    file = {"workload": workload, "pipeline": ["prefill"], "clients": {"encoder": client}, "perf": ["roofline"]}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "point.yaml"
        path.write_text(yaml.safe_dump(file))
        return load(path)


def explain(points: list[Point]) -> None:
    """Where the time of a full step goes, and what the slowest does beside it."""
    fastest, slowest = points[0], points[-1]
    c, batch = slowest.tokens_per_sequence, 32
    pool = scenario_of(fastest, unfitted(fastest)).clients["encoder"]
    model = price(list(pool.perf), pool.deployment()).model
    step = Step(chunks=[(c, 0)] * batch, num_prefill_tokens=c * batch, num_sampled=batch)
    operators = model.explain(step)
    print(f"\na step of {batch} sequences of {c} tokens: {model.step_time(step) / 1e6:.0f} ms")
    for o in operators:
        tflops, gbps = o.flop / o.time_ns / 1e3, o.bytes / o.time_ns
        print(f"  {o.name:20}{o.time_ns / 1e6:>8.1f} ms {tflops:>6.0f} TFLOP/s {gbps:>5.0f} GB/s  {o.bound_by}")
    useful = sum(o.flop for o in operators) / (c * batch)
    reached = useful * fastest.tokens_per_s / pool.device.peak("bf16")
    print(f"the fastest reaches {reached:.0%} of the data sheet's FLOP/s in all, end to end")
    spec, device = pool.model, pool.device
    heads = sum(g.num_layers * g.num_heads for g in spec.layers)
    scores = SCORE_PASSES * 2 * heads * batch * c * c
    written_ns = scores * 1e9 / (device.memory_bytes_per_s * device.efficiency_of("elementwise"))
    fused_ns = next(o.time_ns for o in operators if o.name == "attention_encoder")
    steps = NUM_SEQUENCES / batch
    eager_s = steps * (model.step_time(step) - fused_ns + written_ns) / 1e9
    padded = MAX_CONTEXT / c
    took = slowest.num_tokens / slowest.tokens_per_s
    print(
        f"scores written out take {written_ns / fused_ns:.1f} x fused attention: {eager_s:.1f} s of the slowest's "
        f"{took:.1f}; padding adds {100 * (padded - 1):.0f} % at most (sequences end at {MAX_CONTEXT} tokens): "
        f"{eager_s * padded:.1f} s. The rest, {took - eager_s * padded:.1f} s, isn't explained"
    )


if __name__ == "__main__":
    main()
