"""How long the measured tables take to convert and to load back, and what a client's build costs.

    python benchmarks/conversion.py [--all] [--json]

Converts every family of one system (with `--all`, of every system and framework of the package) into an empty cache
folder of its own, which is removed afterwards; then builds a client of each of `CLIENTS` from it. Needs the tables of
aiconfigurator-core, and changes nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from mist.perf.kernels import Kernels
from mist.perf.measured import FAMILIES, OperatorTables, find_tables
from mist.perf.measured.package import TablesFolder
from mist.perf.measured.tables import CACHE_VARIABLE
from mist.perf.roofline import Roofline
from mist.request import Step
from mist.scenario.explain import explain_step

FRAMEWORKS = ("vllm", "sglang", "trtllm")
CLIENTS = (("llama-3.1-70b", "h100-sxm", 4), ("gpt-oss-120b", "h100-sxm", 4), ("deepseek-v3", "h200-sxm", 8))
_BUILDS = 5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--system", default="h100_sxm")
    parser.add_argument("--all", action="store_true", help="every system and framework")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    folder = find_tables()
    if isinstance(folder, str):
        print(folder, file=sys.stderr)
        return 2
    systems = folder.systems() if options.all else [options.system]
    frameworks = FRAMEWORKS if options.all else FRAMEWORKS[:1]
    with tempfile.TemporaryDirectory() as cache:
        os.environ[CACHE_VARIABLE] = cache
        rows, cold_s = _load_all(folder, systems, frameworks)
        _, warm_s = _load_all(folder, systems, frameworks)
        cache_bytes = sum(p.stat().st_size for p in Path(cache).rglob("*.npz"))
        clients = [_client(model, device, tp) for model, device, tp in CLIENTS]
    figures: dict[str, Any] = {
        "num_systems": len(systems), "rows": rows, "cold_s": round(cold_s, 2), "warm_s": round(warm_s, 3),
        "cache_bytes": cache_bytes, "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_UNIT,
        "clients": clients,
    }  # fmt: skip
    if options.json:
        print(json.dumps(figures))
    else:
        print(f"{', '.join(systems)}; {', '.join(frameworks)}: {rows:,} rows\n"
              f"cold conversion {cold_s:.1f} s, warm load {warm_s:.2f} s, cache {cache_bytes / 1e6:.0f} MB, "
              f"peak memory {figures['peak_bytes'] / 1e6:.0f} MB")  # fmt: skip
        for c in clients:
            print(f"{c['model']:14s} {c['device']:9s} TP{c['tp']}: build {1e3 * c['build_s']:.0f} ms")
    return 0


#: `ru_maxrss` counts KiB, on macOS bytes.
_MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024


def _client(model: str, device: str, tp: int) -> dict[str, Any]:
    """Build time of a client with its tables cached, the shortest of a few."""
    deployment = explain_step(model, device, Step(1, 2048, [], 0, 1), tp=tp, perf="roofline").deployment
    build_s = []
    for _ in range(_BUILDS):
        kernels = Kernels(fallback=Roofline())
        start = time.perf_counter()
        kernels.prepare(deployment)
        build_s.append(time.perf_counter() - start)
    return {"model": model, "device": device, "tp": tp, "build_s": min(build_s)}


def _load_all(folder: TablesFolder, systems: list[str], frameworks: tuple[str, ...]) -> tuple[int, float]:
    start, rows = time.perf_counter(), 0
    for system in systems:
        for framework in frameworks:
            tables = OperatorTables(folder, system, framework)
            for family in FAMILIES:
                table = tables.table(family.name)
                rows += len(table.ns) if table else 0
    return rows, time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
