"""Fits the rates of vector search (mist.perf.retrieval) and checks each fit on what it hasn't seen.

    MIST_DATA=FOLDER python studies/vector_search.py

Reads `validation/nonllm_points.csv` below FOLDER (FAISS on two sets of 1 B vectors, graphs on text2image-10M) and the
published IVF-PQ times below. It prints tables and writes nothing: the shipped rates are those of both sets, rounded.

- FAISS: one index (OPQ64_128,IVF1048576_HNSW32,PQ64x4fsr), 32 threads, the whole query set. Its lists have equal mean
  lengths throughout, so that the time per list and per code can't be told apart: all of it is charged to look-ups.
- Published: milliseconds per query at batches of 1, 4, 16 and 64 on 16 cores of a CPU that isn't stated, N = 1e9, 32,768
  lists, 32 probes. Whether the coarse search is flat isn't stated either; D = 512 and 1,024 fit one that is.
- Graphs: 8 threads, several implementations. Each system's read is fitted to every second of its points.
"""

from __future__ import annotations

import csv
import os
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from mist.hardware import Device
from mist.perf import HostDeployment
from mist.perf.retrieval.graph import GraphSearch
from mist.perf.retrieval.ivf_pq import IvfPq
from mist.perf.retrieval.phases import Search
from mist.scenario import catalogue

Row = dict[str, str]
Build = Callable[..., Search]

#: queries of a run: a batch large enough to fill all threads evenly
WHOLE_SET = 10_000
SETS = {"bigann-1B": 128, "deep-1B": 96}
TEXT2IMAGE_DIM = 200
#: of those graphs, the bytes per dimension that the index sizes suggest; pyanns and zilliz search 8-bit codes
BYTES_PER_DIM = {"diskann": 4.0, "cufe": 4.0, "epsearch": 4.0, "pyanns": 1.0, "zilliz": 1.0}
VAMANA_HOPS = 20.0

#: (D, M): milliseconds per query at each of `BATCHES`
PUBLISHED = {
    (128, 16): (9.53, 2.85, 0.90, 0.70),
    (96, 16): (9.51, 2.90, 0.88, 0.70),
    (512, 32): (22.6, 7.18, 2.38, 1.95),
    (1024, 64): (55.6, 17.1, 5.42, 4.36),
}
BATCHES = (1, 4, 16, 64)
PUBLISHED_HOST = ("epyc-9554", 16)

FAST_SCAN_RATES = {"fast_scan_lookup_ns": 0.4, "random_read_ns": 150.0, "visited_exponent": 0.9}
LOOKUP_RATES = {"lookup_ns": 0.5, "stream_bytes_per_s": 9e9, "scan_spread": 0.3}


def main() -> None:
    """Print all tables."""
    rows = read_points()
    faiss(rows)
    published()
    graphs(rows)


def faiss(rows: Sequence[Row]) -> None:
    """Fit on one set of 1 B vectors, check on the other, both ways; then the shipped rates on both."""
    runs = {name: [r for r in rows if r["system"] == "faiss-t1" and r["dataset"] == name] for name in SETS}
    for name, mine in runs.items():
        print(f"{name}: {len(mine)} rows, imbalance_factor {imbalance_factor(mine):.3f}, {repeats(mine)}")
    for fitted, held_out in (("bigann-1B", "deep-1B"), ("deep-1B", "bigann-1B")):
        rates = fit_faiss(runs[fitted])
        print(f"\nfitted on {fitted}: {written(rates)}")
        print(f"  itself {summary(errors_of(runs[fitted], rates))}; {held_out}, held out:")
        by_n_probe(runs[held_out], rates)
    both = [r for mine in runs.values() for r in mine]
    print(f"\nfitted on both: {written(fit_faiss(both))}")
    for name, mine in runs.items():
        print(f"  shipped rates on {name}: {summary(errors_of(mine, {}))}")
        for size in sorted({r["index_bytes"] for r in mine}):
            session = [r for r in mine if r["index_bytes"] == size]
            print(f"    session with index_bytes {size}: {len(session):3} rows  {summary(errors_of(session, {}))}")


def published() -> None:
    """The published times with the rates of all four shapes, of three without each, and as shipped; as ratios."""
    print("\npublished times: simulated / published at batches of 1, 4, 16, 64")
    show_published("fitted on all", fit_published(list(PUBLISHED)), list(PUBLISHED))
    for shape in PUBLISHED:
        show_published("held out", fit_published([s for s in PUBLISHED if s != shape]), [shape])
    show_published("shipped", {}, list(PUBLISHED))


def graphs(rows: Sequence[Row]) -> None:
    """Each graph system's read, fitted to every second point and checked on the rest; then diskann's on all others."""
    print("\ntext2image-10M graphs: random_read_ns fitted to every second point, QPS error of the rest")
    systems = {name: [r for r in rows if r["system"] == name] for name in BYTES_PER_DIM}
    fits = {}
    for name, mine in systems.items():
        mine.sort(key=lambda r: (r["search_l"].zfill(4), r["ef_search"].zfill(4)))
        fits[name] = fit_graph(mine[::2])
        print(f"  {name:10} {written(fits[name])}: {summary(graph_errors(mine[1::2], fits[name]))}")
    for source in ("diskann", "pyanns"):
        print(f"  rates of {source} on the others of its kind:")
        for name, mine in systems.items():
            if name != source and BYTES_PER_DIM[name] == BYTES_PER_DIM[source]:
                print(f"    {name:10} {summary(graph_errors(mine, fits[source]))}")


# FAISS


def fit_faiss(runs: Sequence[Row]) -> dict[str, float]:
    """The three rates of fast scan after an HNSW coarse search that fit `runs` best, in log(QPS)."""
    return fit(FAST_SCAN_RATES, lambda rates: [np.log(1 + e) for e in errors_of(runs, rates)])


def errors_of(runs: Iterable[Row], rates: dict[str, float]) -> list[float]:
    """Simulated / measured QPS - 1 of each run."""
    host = host_of("azure-f32s-v2", 32)
    return [rate_of(faiss_model(r, rates), host) / float(r["value"]) - 1 for r in runs]


def faiss_model(row: Row, rates: dict[str, float]) -> IvfPq:
    """The index of a row, from the columns that say what it is: 64 sub-quantisers of 4 bits after OPQ to 128."""
    return IvfPq(
        num_vectors=int(row["num_vectors"]), dim=SETS[row["dataset"]], n_list=int(row["n_list"]),
        n_probe=int(row["nprobe"]), m=2 * int(row["pq_bytes"]), bits=4, coarse="hnsw", hnsw_m=int(row["hnsw_m"]),
        ef_search=int(row["ef_search"]), opq_dim=128, k=int(row["k"]), index_bytes=int(row["index_bytes"]), **rates,
    )  # fmt: skip


def imbalance_factor(runs: Iterable[Row]) -> float:
    """Median of codes scanned over n_probe N / n_list."""
    return statistics.median(
        float(r["distance_computations"]) / (int(r["nprobe"]) * int(r["num_vectors"]) / int(r["n_list"])) for r in runs
    )


def repeats(runs: Iterable[Row]) -> str:
    """How far repeated measurements of one setting are apart: what no model can be better than."""
    by_setting = defaultdict(list)
    for r in runs:
        by_setting[r["nprobe"], r["ef_search"]].append(float(r["value"]))
    ratios = [max(v) / min(v) for v in by_setting.values() if len(v) > 1]
    return f"{len(ratios)} settings repeated, fastest / slowest: median {statistics.median(ratios):.2f}, most {max(ratios):.2f}"


def by_n_probe(runs: Sequence[Row], rates: dict[str, float]) -> None:
    """A line of errors per number of probes, and one of all."""
    for n_probe in sorted({int(r["nprobe"]) for r in runs}):
        errors = errors_of([r for r in runs if int(r["nprobe"]) == n_probe], rates)
        print(f"    n_probe {n_probe:4}  {len(errors):3} rows  {summary(errors)}")
    print(f"    all           {len(runs):3} rows  {summary(errors_of(runs, rates))}")


# published times


def fit_published(shapes: Sequence[tuple[int, int]]) -> dict[str, float]:
    """The three rates of a scan with 8 bits after a flat coarse search that fit the times of `shapes` best, in log."""
    return fit(LOOKUP_RATES, lambda rates: [np.log(ratio) for s in shapes for ratio in published_ratios(s, rates)])


def published_ratios(shape: tuple[int, int], rates: dict[str, float]) -> list[float]:
    """Simulated over published time of a batch, for each of `BATCHES`."""
    dim, m = shape
    model = IvfPq(num_vectors=10**9, dim=dim, n_list=32_768, n_probe=32, m=m, **rates)  # type: ignore[arg-type]
    host = host_of(*PUBLISHED_HOST)
    return [batch_ns(model, n, host) / n / 1e6 / ms for n, ms in zip(BATCHES, PUBLISHED[shape], strict=True)]


def show_published(title: str, rates: dict[str, float], shapes: Iterable[tuple[int, int]]) -> None:
    """The ratios of `shapes` with these rates."""
    print(f"  {title}: {written(rates)}")
    for dim, m in shapes:
        ratios = published_ratios((dim, m), rates)
        print(f"    D {dim:4} M {m:2}  " + "  ".join(f"{r:.2f}" for r in ratios))


# graphs


def fit_graph(runs: Sequence[Row]) -> dict[str, float]:
    """The time of a random read that fits a system's runs best, in log(QPS)."""
    return fit({"random_read_ns": 100.0}, lambda rates: [np.log(1 + e) for e in graph_errors(runs, rates)])


def graph_errors(runs: Iterable[Row], rates: dict[str, float]) -> list[float]:
    """Simulated / measured QPS - 1 of each run."""
    host = host_of("azure-d8lds-v5", 8)
    return [rate_of(graph_model(r, rates), host) / float(r["value"]) - 1 for r in runs]


def graph_model(row: Row, rates: dict[str, float]) -> GraphSearch:
    """The graph of a row; `search_l` is what DiskANN calls the candidates that it keeps."""
    return GraphSearch(
        num_vectors=int(row["num_vectors"]), dim=TEXT2IMAGE_DIM, degree=int(row["graph_degree"]),
        ef_search=int(row["search_l"] or row["ef_search"]), num_hops=VAMANA_HOPS,
        bytes_per_dim=BYTES_PER_DIM[row["system"]], index_bytes=int(row["index_bytes"]), **rates,
    )  # fmt: skip


# shared


def read_points() -> list[Row]:
    """The rows of vector search."""
    for folder in os.environ.get("MIST_DATA", "").split(os.pathsep):
        path = Path(folder) / "validation" / "nonllm_points.csv"
        if folder and path.is_file():
            with path.open(encoding="utf-8", newline="") as file:
                return [row for row in csv.DictReader(file) if row["stage"] == "vector_search"]
    sys.exit("validation/nonllm_points.csv is in no folder of MIST_DATA")


def host_of(name: str, num_cores: int) -> HostDeployment:
    """Cores of a catalogued device."""
    device, _ = catalogue.read("devices", name, Path())
    assert isinstance(device, Device)
    return HostDeployment(device, num_cores, WHOLE_SET)


def batch_ns(model: Search, num_queries: int, host: HostDeployment) -> float:
    """Time of a batch, without the tables that a simulation would build."""
    return sum(phase.time(num_queries, host).time_ns for phase in model.phases(host))


def rate_of(model: Search, host: HostDeployment) -> float:
    """Queries per second of the whole set."""
    return WHOLE_SET / batch_ns(model, WHOLE_SET, host) * 1e9


def fit(start: dict[str, float], residuals: Callable[[dict[str, float]], list[Any]]) -> dict[str, float]:
    """The positive rates (a spread: at most 1) that minimise the squares of `residuals`."""
    most = [0.0 if name == "scan_spread" else np.inf for name in start]

    def of(logs: Any) -> dict[str, float]:
        return dict(zip(start, np.exp(logs).tolist(), strict=True))

    found = least_squares(lambda logs: residuals(of(logs)), np.log(list(start.values())), bounds=(-np.inf, most))
    return of(found.x)


def summary(errors: Sequence[float]) -> str:
    """Median and P90 of absolute errors, and the median error."""
    size = np.abs(errors)
    return (
        f"median {100 * np.median(size):5.1f} %  P90 {100 * np.quantile(size, 0.9):5.1f} %  "
        f"bias {100 * np.median(errors):+6.1f} %"
    )


def written(rates: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in rates.items()) or "defaults"


if __name__ == "__main__":
    main()
