"""How near a scenario's load is to what its clients can serve: `python benchmarks/load.py [NAME ...]`.

Behind the rates of `benchmarks/scenarios`: what finishes per second under the scenario's own arrivals, over what
finishes under three times as many for as long. Both are counted in the later half of the arrivals, when queues have
filled and nothing drains yet. It measures simulated time only, and never a trace: that comes at its own rate.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

import mist
from mist.records import FINISHED
from mist.scenario import load

SCENARIOS = Path(__file__).parent / "scenarios"
OVERLOAD = 3


def finished_per_s(path: Path, overload: int) -> tuple[float, bool]:
    """Requests finished per second in the later half of the arrivals, `overload` times as fast and as many.

    And whether the run was judged saturated.
    """
    workload = next(iter(load(path).tenants.values())).workload
    sessions, process = workload.sessions, workload.arrival_process
    key, count = (
        ("sessions.num_sessions", sessions.num_sessions) if sessions else ("num_requests", workload.num_requests)
    )
    if process is None or count is None or "rate_per_s" not in process.params:
        raise SystemExit(f"{path.stem}: its arrivals have no rate")
    result = mist.run(path, **{f"workload.{key}": count * overload, "workload.rate_scale": float(overload)})
    requests = result.records.requests.as_columns()
    ends_s = requests["end_ns"][requests["status"] == FINISHED] / 1e9
    until_s = count / process.params["rate_per_s"]
    finished = np.count_nonzero((ends_s > until_s / 2) & (ends_s <= until_s))
    return float(finished / (until_s / 2)), result.metrics["saturated"]


def main(names: list[str]) -> None:
    for path in [SCENARIOS / f"{name}.yaml" for name in names] or sorted(SCENARIOS.glob("*.yaml")):
        (own, is_saturated), (most, is_overloaded) = finished_per_s(path, 1), finished_per_s(path, OVERLOAD)
        remark = "" if is_overloaded else f", {OVERLOAD} times the load not judged saturated"
        remark += ", saturated as it is" if is_saturated else ""
        print(f"{path.stem:24} {own:7.1f} of {most:7.1f} requests/s: {own / most:4.0%}{remark}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
