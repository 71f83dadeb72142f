"""How fast MIST is, by scenario: `python benchmarks/run.py [NAME ...] [--json]`, or `make bench`.

Each scenario of `benchmarks/scenarios` runs once in a process of its own. Counts (requests, events, steps) are exact
and repeat; times are of this machine and this moment. A scenario whose trace is not there is skipped, and says so.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

SCENARIOS = Path(__file__).parent / "scenarios"


def measure(path: Path) -> dict[str, Any]:
    """Run one scenario here; its counts, times and peak memory."""
    import mist

    try:
        summary = mist.run(path).summary()
    except mist.ScenarioError as error:
        return {"scenario": path.stem, "skipped": str(error).splitlines()[0]}
    simulator, requests = summary["simulator"], summary["requests"]["arrived"]
    run_s = simulator["timing"]["run_s"]
    return {
        "scenario": path.stem,
        "requests": requests,
        "steps": simulator["steps"],
        "events": simulator["events"],
        "steps_per_request": simulator["steps"] / requests,
        "run_s": run_s,
        "requests_per_s": requests / run_s,
        "us_per_step": run_s / simulator["steps"] * 1e6,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--one"]:
        print(json.dumps(measure(Path(arguments[1]))))
        return
    as_json = "--json" in arguments
    wanted = [name for name in arguments if not name.startswith("-")]
    paths = [path for path in sorted(SCENARIOS.glob("*.yaml")) if not wanted or path.stem in wanted]
    rows = []
    for path in paths:
        command = [sys.executable, __file__, "--one", str(path)]
        rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        if not as_json:
            print(line(rows[-1]), flush=True)
    if as_json:
        print(json.dumps(rows, indent=2))


def line(row: dict[str, Any]) -> str:
    if "skipped" in row:
        return f"{row['scenario']:24} skipped: {row['skipped']}"
    return (
        f"{row['scenario']:24} {row['requests']:9,} requests {row['steps']:11,} steps {row['events']:11,} events"
        f" {row['run_s']:7.2f} s {row['requests_per_s']:9,.0f} requests/s {row['us_per_step']:6.2f} us/step"
        f" {row['peak_mb']:6.0f} MB"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
