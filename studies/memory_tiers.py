"""Fits memory tiers to measured sequential reads: one latency and one bandwidth for DDR4, and for an NVMe drive.

    python studies/memory_tiers.py [TRACE ...]

Prints the figures that src/mist/data/memories has, and every measured read beside L + S/B; of each trace with hashes
the share of units that one shared tier finds, by capacity and eviction policy. It writes no file.

Least squares of relative errors over the sizes from `FITTED_FROM` on. The smaller ones are shown only: below a few MiB
caches answer (DDR4: about 0.5 TB/s up to 1 MiB; NVMe: 30 GB/s, several times a drive's data sheet) and no latency,
which can't be negative, follows them. Nor do the large ones tell an NVMe drive's: it stays at that of a flash read.
The machine that was measured isn't stated.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.optimize import lsq_linear

from mist.memory.eviction import Eviction
from mist.memory.eviction.lfu import LFU
from mist.memory.eviction.lru import LRU
from mist.memory.eviction.ttl import TTL
from mist.memory.tier import MemoryTier, Tier
from mist.units import GB, MIB, NS_PER_US
from mist.workload import RequestTable
from mist.workload.trace import read_trace

SIZES = np.array([0.25, 1, 4, 16, 64, 128, 512, 1024]) * MIB
#: us for each size
MEASURED_US = {
    "ddr4": np.array([0.576, 2.115, 24.816, 74.629, 284.52, 538.31, 2147.2, 4494.1]),
    "nvme": np.array([9.31, 35.23, 221.59, 1665.82, 7979.34, 15487.91, 69420, 123180]),
}
FITTED_FROM = {"ddr4": 16 * MIB, "nvme": 64 * MIB}
#: ns; a read of flash takes 50 to 100 us (unverified)
LEAST_LATENCY_NS = {"ddr4": 0, "nvme": 80_000}
#: units that a tier holds
CAPACITIES = (1_000, 3_000, 10_000, 30_000, 1_000_000)
POLICIES: dict[str, Callable[[], Eviction]] = {"lru": LRU, "lfu": LFU, "ttl 600 s": partial(TTL, 600)}

Floats = npt.NDArray[np.float64]


def fit(sizes: Floats, times_ns: Floats, least_ns: float = 0) -> tuple[float, float]:
    """Latency (ns, at least `least_ns`) and bandwidth (bytes per s) with the least sum of squared relative errors."""
    matrix = np.column_stack([1 / times_ns, sizes / times_ns])
    latency_ns, ns_per_byte = lsq_linear(matrix, np.ones(len(sizes)), bounds=([least_ns, 0], np.inf), tol=1e-14).x
    return float(latency_ns), 1e9 / float(ns_per_byte)


def fitted(name: str) -> tuple[int, float]:
    """The catalogue's latency (ns) and bandwidth (bytes per s) of a memory, to 100 ns and 0.1 GB/s."""
    inside = FITTED_FROM[name] <= SIZES
    latency_ns, bytes_per_s = fit(SIZES[inside], MEASURED_US[name][inside] * NS_PER_US, LEAST_LATENCY_NS[name])
    return round(latency_ns / 100) * 100, round(bytes_per_s / GB, 1) * GB


def errors(name: str, latency_ns: float, bytes_per_s: float) -> Floats:
    """(L + S/B) / measured - 1 for every size."""
    return np.asarray((latency_ns + SIZES * 1e9 / bytes_per_s) / (MEASURED_US[name] * NS_PER_US) - 1)


def hit_rate(table: RequestTable, num_units: int, eviction: Callable[[], Eviction]) -> float:
    """Share of the units of all prompts that a tier finds; each prompt is written when its request arrives."""
    tier = Tier(MemoryTier("tier", num_units * table.hash_block_size, 1.0, eviction=eviction), table.hash_block_size)
    for keys, now in zip(table.block_keys or (), table.arrival_ns.tolist(), strict=True):
        tier.lookup(keys, 0, now)
        tier.insert(keys, len(keys), 1, now)
    return tier.hits / (tier.hits + tier.misses)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("traces", nargs="*", type=Path, metavar="TRACE")
    show_fits()
    for path in parser.parse_args().traces:
        table = read_trace(path)
        print(f"{path.name}: units of {table.hash_block_size} tokens found, by units that fit")
        print(" " * 10 + "".join(f"{units:>11,}" for units in CAPACITIES))
        for name, policy in POLICIES.items():
            print(f"{name:10}" + "".join(f"{hit_rate(table, units, policy):11.4f}" for units in CAPACITIES))


def show_fits() -> None:
    for name in MEASURED_US:
        latency_ns, bytes_per_s = fitted(name)
        print(f"{name}: {latency_ns / NS_PER_US:g} us, {bytes_per_s / GB:g} GB/s")
        print("    MiB   measured us       L + S/B     error")
        for size, measured, error in zip(SIZES, MEASURED_US[name], errors(name, latency_ns, bytes_per_s), strict=True):
            estimate = measured * (1 + error)
            shown = "" if size >= FITTED_FROM[name] else "  not fitted"
            print(f"{size / MIB:7g} {measured:13,.2f} {estimate:13,.2f} {error:+9.1%}{shown}")


if __name__ == "__main__":
    main()
