"""Halving against exhaustive search on the example spaces: best and front that each finds, and the time it takes.

    python benchmarks/search.py [SPACE ...] [--seeds N] [--workers N] [--against NAME] [--stores DIR]

Exhaustive search runs every deployment on the whole workload with every seed, its load bisected: of 580 deployments
that is some 2,700 runs a seed, so take --seeds 1 for both, or an evening. `--against bounded` finds the same with
fewer runs, and `--against ""` runs halving alone. Prints a table; its ratio of times is of the
processor time of all runs, which a busy machine changes less than wall times, and which --stores remembers: a benchmark
that was cut goes on.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from mist.cli.output import progress_of, table
from mist.search.executors import executor_named
from mist.search.objectives import maximised
from mist.search.run import search

SPACES = Path(__file__).parent.parent / "examples" / "search"
NAMES = ("rag-summarisation", "math-reasoning", "code-generation")


def measured(path: Path, strategy: str, seeds: int, workers: int, stores: Path | None) -> dict[str, Any]:
    """The document of a search, with its wall time of this machine."""
    store = stores and stores / f"{path.stem}-{strategy}.db"
    with executor_named("processes", num_workers=workers) as executor, progress_of(f"{path.stem} runs") as progress:
        return search(path, executor, strategy=strategy, num_seeds=seeds, store=store, progress=progress).document


def row(path: Path, strategy: str, document: dict[str, Any], against: dict[str, Any] | None) -> dict[str, Any]:
    name = next(iter(document["objectives"]))
    best = document["best"][f"best {name}"]
    value = best["objectives"][name]["mean"] if best else None
    theirs = against and against["best"][f"best {name}"]["objectives"][name]["mean"]
    return {
        "space": path.stem,
        "strategy": strategy,
        "legal": document["configurations"]["legal"],
        "deployments": document["configurations"]["deployments"],
        "runs": sum(each["runs"] for each in document["runs"]),
        "CPU s": round(document["timing"]["cpu_s"], 1),
        "wall s": round(document["timing"]["wall_s"], 1),
        "times as fast": round(against["timing"]["cpu_s"] / document["timing"]["cpu_s"], 2) if against else None,
        "best": f"{value:.5g}" if value else "-",
        "of the best": f"{value / theirs:.4f}" if theirs and value else None,
        "front": len(document["front"]),
        "front off": off(document, against) if against else None,
        "gain": f"{document['gain']['factor']['mean']:.3f}" if document["gain"] else None,
    }


def off(document: dict[str, Any], against: dict[str, Any]) -> str:
    """How many points of the other's front beat all of ours by over 2 % in something, and by how much at most."""
    behind = [
        min(
            max(
                (1 if maximised(name) else -1) * (1 - ours["objectives"][name]["mean"] / found["mean"])
                for name, found in theirs["objectives"].items()
            )
            for ours in document["front"]
        )
        for theirs in against["front"]
    ]
    return f"{sum(share > 0.02 for share in behind)} ({max(behind):.1%})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spaces", nargs="*", type=Path, default=[SPACES / f"{name}.yaml" for name in NAMES])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--against", choices=["exhaustive", "bounded", ""], default="exhaustive")
    parser.add_argument("--stores", type=Path)
    given = parser.parse_args()
    if given.stores:
        given.stores.mkdir(parents=True, exist_ok=True)
    rows, began = [], time.monotonic()
    for path in given.spaces:
        whole = measured(path, given.against, given.seeds, given.workers, given.stores) if given.against else None
        halved = measured(path, "halving", given.seeds, given.workers, given.stores)
        rows += [row(path, given.against, whole, None)] if whole else []
        rows.append(row(path, "halving", halved, whole))
    print(table(rows))
    print(f"{time.monotonic() - began:,.0f} s in all", file=sys.stderr)


if __name__ == "__main__":
    main()
