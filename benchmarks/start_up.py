"""How long `mist` takes when there is next to nothing to do: `python benchmarks/start_up.py [NAME ...] [--json]`.

Whole processes, the best of five, as after an installation: modules are compiled and measured tables converted by one
run before, which doesn't count. What is imported and how long it takes says
`python -X importtime -c "from mist.cli import main; main()" run benchmarks/scenarios/start-up.yaml`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SCENARIO = str(Path(__file__).parent / "scenarios" / "start-up.yaml")
MIST = (sys.executable, "-c", "from mist.cli import main; main(prog_name='mist')")
#: name -> arguments of mist, and the seconds that it should stay below
CASES: dict[str, tuple[tuple[str, ...], float]] = {
    "help": (("--help",), 0.25),
    "roofline": (("run", SCENARIO), 0.8),
    "kernels": (("run", SCENARIO, "--set", "perf=kernels"), 1.2),
}
RUNS = 5


def once(arguments: Sequence[str], environment: Mapping[str, str]) -> tuple[float, float]:
    """Wall and CPU seconds of one process; CalledProcessError where it fails."""
    began = time.perf_counter()
    process = subprocess.Popen([*MIST, *arguments], env=environment, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    wall_s = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)
    return wall_s, used.ru_utime + used.ru_stime


def measure(name: str, num_runs: int = RUNS) -> dict[str, Any]:
    """The least wall and CPU seconds of a case."""
    arguments, bar_s = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        environment["PYTHONPYCACHEPREFIX"] = folder
        times = [once(arguments, environment) for _ in range(num_runs + 1)][1:]
    wall_s, cpu_s = (min(column) for column in zip(*times, strict=True))
    return {"case": name, "wall_s": wall_s, "cpu_s": cpu_s, "bar_s": bar_s}


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *CASES], metavar="NAME", help=f"of {', '.join(CASES)}")
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    given = parser.parse_args(arguments)
    rows = []
    for name in given.names or CASES:
        rows.append(measure(name))
        if not given.json:
            print("start-up {case:12} {wall_s:6.3f} s (bar {bar_s:.2f} s)  CPU {cpu_s:6.3f} s".format(**rows[-1]))
    if given.json:
        print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main(sys.argv[1:])
