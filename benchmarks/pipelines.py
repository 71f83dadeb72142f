"""The shipped pipelines at length: `python benchmarks/pipelines.py [NAME ...] [--requests N]`.

Runs each example of a pipeline with 10,000 requests (or `FEWER`), with the ledger and without, and adds up the
stage times of every finished request: they are its E2E, to the nanosecond, or this exits with 1. Times are told, never
judged.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np

from mist.metrics.stages import stage_times
from mist.records import FINISHED
from mist.scenario import load
from mist.scenario.result import Result

SCENARIOS = Path(__file__).resolve().parent / "scenarios"
EXAMPLES = SCENARIOS.parent.parent / "examples"
NAMES = (
    "question-answering",
    "guarded-qa",
    "news-search",
    "code-generation",
    "chat-support",
    "shared-host",
    "research-agent",
)
#: all pipelines as tenants of one scenario, with the requests that it says
TOGETHER = "all-pipelines"
#: how many times fewer requests: an agent's run has some 25 turns, its sub-agents' included
FEWER = {"research-agent": 20}


def wrong_sums(result: Result) -> int:
    """Finished requests whose stage times don't add up to their E2E."""
    records = result.records
    requests, tasks, transfers = (table.as_columns() for table in (records.requests, records.tasks, records.transfers))
    finished = {name: column[requests["status"] == FINISHED] for name, column in requests.items()}
    order = np.argsort(tasks["request"], kind="stable")
    tasks = {name: column[order] for name, column in tasks.items()}
    times = stage_times(finished, tasks, len(records.stage_kinds), transfers)
    whole = finished["end_ns"] - finished["arrival_ns"]
    return int(np.count_nonzero((times.sum(axis=(1, 2)) != whole) | (times.min(axis=(1, 2)) < 0)))


def measure(name: str, num_requests: int) -> int:
    """Run one example and print a line; the number of wrong sums."""
    num_requests = max(1, num_requests // FEWER.get(name, 1))
    if name == TOGETHER:
        scenario = load(SCENARIOS / f"{name}.yaml")
        num_requests = sum(tenant.workload.num_requests or 0 for tenant in scenario.tenants.values())
    else:
        scenario = load(EXAMPLES / f"{name}.yaml", [f"workload.num_requests={num_requests}"])
    began = time.process_time()
    result = scenario.run(check=True)
    checked_s = time.process_time() - began
    scenario.run()
    cpu_s = time.process_time() - began - checked_s
    run_s = result.summary()["simulator"]["timing"]["run_s"]
    finished, wrong = result.metrics["requests"]["finished"], wrong_sums(result)
    verdict = "all stage times sum to E2E" if not wrong else f"{wrong:,} OFF"
    print(
        f"{name:20} {finished:7,} finished  {run_s:6.2f} s with the ledger {num_requests / run_s:7,.0f} requests/s"
        f"  CPU {checked_s:5.2f} s, {cpu_s:5.2f} s without  {verdict}",
        flush=True,
    )
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    names = (*NAMES, TOGETHER)
    parser.add_argument("names", nargs="*", default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--requests", type=int, default=10_000, metavar="N")
    arguments = parser.parse_args()
    return int(sum(measure(name, arguments.requests) for name in arguments.names) > 0)


if __name__ == "__main__":
    sys.exit(main())
