"""How often `mist advise` names a bottleneck that was planted: five kinds at ten random magnitudes, and healthy runs.

A healthy deployment is drawn, and one thing about it made worse by a random factor; the first reason must be that
thing, and "none" where nothing was. Figures are of the roofline, seeds are fixed: `python benchmarks/advice.py [SEED]`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "src"))

from mist.advice import Advice, advise  # noqa: E402
from mist.scenario import Scenario  # noqa: E402

NUM_MAGNITUDES = 10
SEED = 2026
MODEL = "llama-3.1-8b"
Json = dict[str, Any]


def healthy(rng: np.random.Generator, shape: str) -> Json:
    """A deployment with room to spare, in one of three shapes: one pool, prefill and decode apart, or retrieval too."""
    engine = {"name": "planted", "engine": "", "step_overhead_ns": "0.5 ms", "max_num_batched_tokens": 4096,
              "max_num_seqs": 256}  # fmt: skip
    gpu = {"device": "h100-sxm", "model": MODEL, "engine": engine}
    found: Json = {
        "name": shape,
        "seed": int(rng.integers(2**31)),
        "workload": {
            "arrivals": {"poisson": {"rate_per_s": float(rng.uniform(1, 2.5))}},
            "num_requests": 250,
            "input_tokens": {"lognormal": {"mean": float(rng.uniform(1200, 2400)), "cv": 0.5, "max": 8000}},
            "output_tokens": {"lognormal": {"mean": float(rng.uniform(80, 200)), "cv": 0.5, "max": 1000}},
        },
        "clients": {"gpu": gpu},
        "perf": "roofline",
    }
    if shape == "apart":
        found["clients"] = {name: {**gpu, "serves": [name]} for name in ("prefill", "decode")}
        found["network"] = {"kv_transfer": {"bandwidth": "40 GB/s", "latency": "1 ms"}}
    if shape == "retrieval":
        found["pipeline"] = ["retrieve", "prefill", "decode"]
        search = {"num_vectors": 10_000_000, "dim": 768, "n_list": 4096, "n_probe": 16, "m": 64}
        index = {"device": "epyc-9554", "serves": ["retrieve"], "perf": {"ivf_pq": search}}
        found["clients"] = {"index": index, "gpu": gpu}
    return found


def _pools(scenario: Json) -> Iterator[Json]:
    yield from (pool for pool in scenario["clients"].values() if "model" in pool)


def queueing(scenario: Json, strength: float) -> None:
    """More load than prompts can be computed at: 0.8 to 2 times 50,000 tokens of prompts a second."""
    scenario["workload"]["output_tokens"] = 24
    mean = scenario["workload"]["input_tokens"]["lognormal"]["mean"]
    rate = (0.8 + 1.2 * strength) * 50_000 / mean
    scenario["workload"]["arrivals"] = {"poisson": {"rate_per_s": rate}}


def kv(scenario: Json, strength: float) -> None:
    """A KV cache of 9,000 to 24,000 tokens, at four times the load and answers of 400 tokens."""
    scenario["workload"]["arrivals"]["poisson"]["rate_per_s"] *= 4
    scenario["workload"]["output_tokens"] = 400
    for pool in _pools(scenario):
        pool["kv_cache"] = {"capacity_tokens": int(24_000 - 15_000 * strength)}


def link(scenario: Json, strength: float) -> None:
    """Links of 0.15 to 1.5 GB/s for the KV caches."""
    scenario["network"] = {"kv_transfer": {"bandwidth": f"{1.5 * 10**-strength:.3f} GB/s"}}


def retrieval(scenario: Json, strength: float) -> None:
    """Searches of ten times as many vectors, in 160 to 3,200 lists."""
    search = scenario["clients"]["index"]["perf"]["ivf_pq"]
    search["num_vectors"] *= 10
    search["n_probe"] = int(160 * 20**strength)


def host(scenario: Json, strength: float) -> None:
    """A host that takes 10 to 60 ms a step."""
    for pool in _pools(scenario):
        pool["engine"] = {**pool["engine"], "step_overhead_ns": f"{10 + 50 * strength:.1f} ms"}


#: the reason that is to come first, how it is planted, and in which shapes
PLANTED: dict[str, tuple[Callable[[Json, float], None], tuple[str, ...]]] = {
    "queueing": (queueing, ("one", "retrieval")),
    "kv": (kv, ("one", "retrieval")),
    "link": (link, ("apart",)),
    "retrieval": (retrieval, ("retrieval",)),
    "host": (host, ("one", "apart", "retrieval")),
}


def scenarios(kind: str, count: int = NUM_MAGNITUDES, seed: int = SEED) -> Iterator[tuple[float, Scenario]]:
    """`count` scenarios with one bottleneck planted, at a random strength of 0 to 1; kind "none": as they are."""
    plant, shapes = PLANTED.get(kind, (None, ("one", "apart", "retrieval")))
    for number in range(count):
        rng = np.random.default_rng([seed, [*PLANTED, "none"].index(kind), number])
        scenario, strength = healthy(rng, shapes[number % len(shapes)]), float(rng.uniform())
        if plant is not None:
            plant(scenario, strength)
        yield strength, Scenario.from_mapping(scenario)


def told(advice: Advice) -> str:
    """The reasons with their shares."""
    return ", ".join(f"{r.code} {r.share:.0%} of {r.figure.removesuffix('_s')}" for r in advice.latency)


def main() -> None:
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else SEED
    rows = []
    for kind in [*PLANTED, "none"]:
        right = 0
        for strength, scenario in scenarios(kind, seed=seed):
            advice = advise(scenario, what_ifs=1 if kind != "none" else 0)
            right += advice.bottleneck == kind
            helped = advice.latency[0].what_ifs[0].helps if advice.latency and advice.latency[0].what_ifs else None
            print(
                f"{kind:10} {scenario.name:10} {strength:.2f}  {advice.bottleneck:10} {told(advice)}; helps: {helped}"
            )
        rows.append((kind, right))
    print()
    for kind, right in rows:
        print(f"{kind:10} {right:2} of {NUM_MAGNITUDES}")
    planted = sum(right for kind, right in rows if kind != "none")
    print(f"{'planted':10} {planted} of {NUM_MAGNITUDES * len(PLANTED)}")


if __name__ == "__main__":
    main()
