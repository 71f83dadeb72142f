"""How the time of a run grows: `python benchmarks/growth.py`: with requests, clients and load.

One thing at a time is changed in a plain scenario (Llama-3.1-8B on H100, prompts of 1,024 and answers of 128 tokens),
at a fixed load per client. Each figure is the best of three runs in this process; what matters is how it changes within
a column, not the figures of this machine.
"""

from __future__ import annotations

from typing import Any

import mist

RUNS = 3
#: requests/s per client, about half of what it can serve
RATE = 8.0


def scenario(num_requests: int = 3000, num_clients: int = 1, rate: float = RATE, **more: Any) -> dict[str, Any]:
    """The plain scenario, with `rate` requests/s for each client."""
    workload = {
        "arrivals": {"poisson": {"rate_per_s": rate * num_clients}}, "num_requests": num_requests,
        "input_tokens": 1024, "output_tokens": 128,
    }  # fmt: skip
    gpu = {"device": "h100-sxm", "count": num_clients, "model": "llama-3.1-8b", "engine": "vllm-0.10"}
    return {"seed": 1, "workload": workload, "clients": {"gpu": gpu}, "perf": "roofline"} | more


GROWTH: dict[str, dict[str, dict[str, Any]]] = {
    "requests": {f"{n:,}": scenario(n) for n in (1_000, 10_000, 100_000)},
    "clients": {str(n): scenario(num_clients=n) for n in (1, 4, 16, 64, 256)},
    "load (requests/s)": {f"{rate:g}": scenario(rate=rate) for rate in (1, 4, 16, 64)},
}


def measure(given: dict[str, Any]) -> tuple[float, float, float]:
    """µs per request and per step, and steps per request."""
    best, steps, requests = float("inf"), 0, 1
    for _ in range(RUNS):
        simulator = (summary := mist.run(given).summary())["simulator"]
        best, steps = min(best, simulator["timing"]["run_s"]), simulator["steps"]
        requests = summary["requests"]["arrived"]
    return best / requests * 1e6, best / steps * 1e6, steps / requests


def main() -> None:
    for thing, variants in GROWTH.items():
        print(f"{thing:20} {'us/request':>10} {'us/step':>8} {'steps/request':>14}")
        for name, given in variants.items():
            per_request, per_step, steps = measure(given)
            print(f"{name:>20} {per_request:10.1f} {per_step:8.2f} {steps:14.1f}", flush=True)


if __name__ == "__main__":
    main()
