"""The speed-up of several processes: `python benchmarks/parallel.py [--jobs N] [--requests N] [--workers N ...]`.

Runs the same jobs, of several deployments with measured tables, one after another and on 1, 2, ... processes, and
prints the speed-up. Outcomes must be equal byte by byte, or this exits with 1; times are told, never judged.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

from mist.search.evaluate import Executor, Job
from mist.search.executors.processes import Processes
from mist.search.executors.serial import Serial

SCENARIO = Path(__file__).resolve().parent / "scenarios" / "poisson-10k.yaml"


def jobs_of(number: int, num_requests: int) -> list[Job]:
    """So many jobs of four deployments."""
    return [
        Job(f"{i}", SCENARIO, {"seed": i, "workload.num_requests": num_requests, "clients.gpu.count": 1 + i % 4})
        for i in range(number)
    ]


def measure(executor: Executor, jobs: list[Job]) -> tuple[float, float, float, str]:
    """Seconds by the clock, of CPU for the jobs and of this process, and the outcomes as JSON; warm before."""
    with executor:
        list(executor.run(jobs))
        began, own = time.perf_counter(), time.process_time()
        outcomes = sorted(executor.run(jobs), key=lambda outcome: int(outcome.key))
        took, own = time.perf_counter() - began, time.process_time() - own
    cpu = sum(outcome.cpu_s for outcome in outcomes)
    return took, cpu, own, json.dumps([(outcome.key, outcome.summary, outcome.error) for outcome in outcomes])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=48)
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    given = parser.parse_args()
    jobs = jobs_of(given.jobs, given.requests)
    alone, cpu, _, expected = measure(Serial(), jobs)
    print(f"load of the machine before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    print(f"serial: {alone:.2f} s, {cpu:.2f} s of CPU, {len(jobs) / alone:.1f} runs/s")
    is_same = True
    for num_workers in given.workers:
        took, cpu, own, found = measure(Processes(num_workers), jobs)
        is_same &= found == expected
        print(
            f"{num_workers} process{'es' * (num_workers > 1)}: {took:.2f} s, {cpu:.2f} s of CPU, "
            f"{len(jobs) / took:.1f} runs/s, {alone / took:.2f} times as fast; this process took {own:.2f} s"
        )
    print("outcomes are the same" if is_same else "OUTCOMES DIFFER")
    return 0 if is_same else 1


if __name__ == "__main__":
    sys.exit(main())
