"""How fast MIST is, by scenario: `python benchmarks/run.py [NAME ...] [--all] [--json]`, or `make bench`.

Each scenario of `benchmarks/scenarios` runs once in a process of its own, those of minutes only by name or with
`--all`; one whose trace (MIST_DATA) or operator tables aren't here is skipped. Counts (requests, steps, events) are
exact and must be those of `counts.yaml`, else this exits with 1; `--update` writes them there. Times are of this
machine and this moment, printed and never judged.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

SCENARIOS = Path(__file__).parent / "scenarios"
COUNTS = Path(__file__).parent / "counts.yaml"
#: take minutes: run when named, or with --all
SLOW = ("agentic", "poisson-1m")
COUNTED = ("requests", "steps", "events")

#: what a problem says of a trace or of operator tables that this machine doesn't have
MISSING = ("is not there", "are not installed")

Counts = dict[str, dict[str, int]]


def measure(path: Path) -> dict[str, Any]:
    """Run one scenario here; its counts, times, and the peak memory and CPU time of this process."""
    import mist

    try:
        summary = mist.run(path).summary()
    except mist.ScenarioError as error:
        if not all(any(words in problem.message for words in MISSING) for problem in error.problems):
            raise
        return {"scenario": path.stem, "skipped": "; ".join(f"{p.message} ({p.hint})" for p in error.problems)}
    simulator, requests = summary["simulator"], summary["requests"]["arrived"]
    run_s, used = simulator["timing"]["run_s"], resource.getrusage(resource.RUSAGE_SELF)
    in_a_mb = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return {
        "scenario": path.stem,
        "requests": requests,
        "steps": simulator["steps"],
        "events": simulator["events"],
        "steps_per_request": simulator["steps"] / requests,
        "run_s": run_s,
        "requests_per_s": requests / run_s,
        "steps_per_s": simulator["steps"] / run_s,
        "cpu_s": used.ru_utime + used.ru_stime,
        "peak_mib": used.ru_maxrss / in_a_mb,
    }


def differences(row: dict[str, Any], counts: Counts) -> list[str]:
    """How a row's counts differ from the committed ones, in words."""
    known = counts.get(row["scenario"])
    if known is None:
        return ["no counts are known of it"]
    return [f"{row[key]:,} {key} instead of {known[key]:,}" for key in COUNTED if row[key] != known[key]]


def line(row: dict[str, Any]) -> str:
    if "skipped" in row:
        return f"{row['scenario']:24} skipped: {row['skipped']}"
    counts = f"{row['requests']:9,} requests {row['steps']:11,} steps ({row['steps_per_request']:6.1f} each)"
    rates = f"{row['requests_per_s']:8,.0f} requests/s {row['steps_per_s']:9,.0f} steps/s"
    process = f"CPU {row['cpu_s']:7.2f} s {row['peak_mib']:6.0f} MiB"
    return f"{row['scenario']:24} {counts} {row['events']:11,} events {row['run_s']:8.2f} s {rates} {process}"


def run(names: Sequence[str], as_json: bool) -> list[dict[str, Any]]:
    """A row for each scenario; what is under way is told on stderr, and each row on stdout unless `as_json`."""
    rows = []
    for number, name in enumerate(names, start=1):
        print(f"{number}/{len(names)} {name} ...", file=sys.stderr, flush=True)
        command = [sys.executable, __file__, "--one", str(SCENARIOS / f"{name}.yaml")]
        rows.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))
        if not as_json:
            print(line(rows[-1]), flush=True)
    return rows


def update(rows: Sequence[dict[str, Any]], counts: Counts) -> None:
    counts |= {row["scenario"]: {key: row[key] for key in COUNTED} for row in rows}
    head = "# Exact counts of benchmarks/scenarios; written by `python benchmarks/run.py --update [NAME ...]`.\n"
    lines = (f"{name}: {{{', '.join(f'{k}: {v}' for k, v in counts[name].items())}}}\n" for name in sorted(counts))
    COUNTS.write_text(head + "".join(lines), encoding="utf-8")


def main(arguments: Sequence[str]) -> int:
    known = sorted(path.stem for path in SCENARIOS.glob("*.yaml"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}")
    parser.add_argument("--all", action="store_true", help=f"the slow ones too: {', '.join(SLOW)}")
    parser.add_argument("--json", action="store_true", help="print a JSON list of rows")
    parser.add_argument("--update", action="store_true", help=f"write the counts to {COUNTS.name}")
    parser.add_argument("--one", type=Path, metavar="FILE", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.one:
        print(json.dumps(measure(given.one)))
        return 0
    if unknown := set(given.names) - set(known):
        parser.error(f"no scenario {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    rows = run(given.names or [name for name in known if given.all or name not in SLOW], given.json)
    if given.json:
        print(json.dumps(rows, indent=2))
    counts: Counts = yaml.safe_load(COUNTS.read_text(encoding="utf-8")) if COUNTS.exists() else {}
    ran = [row for row in rows if "skipped" not in row]
    if given.update:
        update(ran, counts)
        return 0
    wrong = [f"{row['scenario']}: {', '.join(found)}" for row in ran if (found := differences(row, counts))]
    for each in wrong:
        print(each, file=sys.stderr)
    if wrong:
        print("If that is meant: python benchmarks/run.py --update NAME ...", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
