"""IVF-PQ: an inverted file of product-quantised vectors, as FAISS searches it on a CPU.

One of the performance models of vector search; its phases are the coarse search, the look-up tables, the scan of the
probed lists and, if asked for, exact distances to the best. It computes no distance and no recall.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from mist.perf import HostDeployment
from mist.perf.retrieval.phases import (
    FLOAT_BYTES,
    RANDOM_READ_NS,
    STREAM_BYTES_PER_S,
    VISITED_EXPONENT,
    Phase,
    Search,
    above_zero,
    at_least,
    compute_ns,
    exhaustive,
    hnsw_hops,
    num_visited,
    walk,
)
from mist.registry import register


@register("perf", "ivf_pq")
@dataclass(slots=True, kw_only=True)
class IvfPq(Search):
    """IVF-PQ (Jégou, Douze and Schmid, TPAMI 2011): n_probe of n_list lists are scanned, m look-ups per code in them.

    `m` sub-quantisers of `bits` bits, which share the dimensions out evenly: `m` divides them. 4 bits are FAISS's fast
    scan (look-ups in registers), with its own rate. `coarse` finds the lists: `flat` compares with every centroid,
    `hnsw` walks a graph of them (`hnsw_m`, `ef_search`), of which it visits
    hnsw_m (log(n_list) / log(hnsw_m) + ef_search^visited_exponent).
    `opq_dim`: the dimension to which OPQ rotates a query first, 0 without. `k` results; `rerank_exact` best candidates
    are compared exactly, for which the FP32 vectors are kept in memory. `by_residual`: codes are of the difference to
    the centroid, so that each probed list needs look-up tables of its own. `id_bytes` of each vector are read with it.
    `index_bytes`: where it is known, 0 for the estimate. `parallel_over`: cores share out the queries of a batch
    (FAISS's default) or the probes of every query.
    `imbalance_factor`: codes scanned over n_probe N / n_list. Queries fall more often into long lists: it is 1 + the
    squared coefficient of variation of their lengths (FAISS's measure of the same name). `scan_spread`: standard
    deviation of the codes that a query scans over their mean.
    Rates of one core, each fitted by studies/vector_search.py: `lookup_ns` per look-up with 8 bits and
    `fast_scan_lookup_ns` with 4, `list_ns` for every list on top, `stream_bytes_per_s` and `random_read_ns` of memory.
    """

    num_vectors: int
    dim: int
    n_list: int
    n_probe: int
    m: int
    bits: Literal[4, 8] = 8
    coarse: Literal["flat", "hnsw"] = "flat"
    hnsw_m: int = 32
    ef_search: int = 64
    opq_dim: int = 0
    k: int = 10
    rerank_exact: int = 0
    by_residual: bool = True
    id_bytes: int = 8
    index_bytes: int = 0
    parallel_over: Literal["queries", "probes"] = "queries"
    imbalance_factor: float = 1.24
    scan_spread: float = 0.53
    lookup_ns: float = 0.3
    fast_scan_lookup_ns: float = 0.41
    list_ns: float = 0.0
    visited_exponent: float = VISITED_EXPONENT
    stream_bytes_per_s: float = STREAM_BYTES_PER_S
    random_read_ns: float = RANDOM_READ_NS

    def __post_init__(self) -> None:
        at_least(1, num_vectors=self.num_vectors, dim=self.dim, n_list=self.n_list, n_probe=self.n_probe, m=self.m,
                 ef_search=self.ef_search, k=self.k, imbalance_factor=self.imbalance_factor)  # fmt: skip
        at_least(2, hnsw_m=self.hnsw_m)
        at_least(0, opq_dim=self.opq_dim, rerank_exact=self.rerank_exact, id_bytes=self.id_bytes,
                 index_bytes=self.index_bytes, list_ns=self.list_ns, random_read_ns=self.random_read_ns)  # fmt: skip
        above_zero(lookup_ns=self.lookup_ns, fast_scan_lookup_ns=self.fast_scan_lookup_ns,
                   stream_bytes_per_s=self.stream_bytes_per_s, visited_exponent=self.visited_exponent)  # fmt: skip
        if self.n_probe > self.n_list:
            raise ValueError(f"n_probe is at most n_list, {self.n_list}, not {self.n_probe}")
        if self._dim % self.m:
            of = "opq_dim" if self.opq_dim else "dim"
            would_do = " or ".join(map(str, _divisors_beside(self.m, self._dim)))
            raise ValueError(f"m is {self.m}, which doesn't divide {of}, {self._dim}: take {would_do}")
        if not 0 <= self.scan_spread <= 1:
            raise ValueError(f"scan_spread is a fraction of the mean, 0 to 1, not {self.scan_spread:g}")

    @property
    def code_bytes(self) -> float:
        """Bytes of one vector's code."""
        return self.m * self.bits / 8

    @property
    def scanned_codes(self) -> float:
        """Codes that a query scans: n_probe N / n_list times the imbalance, at most all."""
        return min(self.num_vectors, self.n_probe * self.num_vectors / self.n_list * self.imbalance_factor)

    def index_size(self) -> float:
        """`index_bytes`, or 1.1 (4 D n_list + N (code + 24) + 1,024 D); and 4 D N where candidates are re-ranked.

        24 bytes stand for the id and what lists that have grown leave unused.
        """
        dim = self._dim
        codes = self.num_vectors * (self.code_bytes + 24)
        index = self.index_bytes or 1.1 * (FLOAT_BYTES * dim * self.n_list + codes + 1024 * dim)
        return index + (FLOAT_BYTES * self.dim * self.num_vectors if self.rerank_exact else 0)

    def phases(self, host: HostDeployment) -> tuple[Phase, ...]:
        """Rotate, find the lists, build look-up tables, scan, re-rank; those that there are."""
        found = [self._coarse(host), self._tables(host), self._scan()]
        if self.opq_dim:
            rotation = 2.0 * self.dim * self.opq_dim
            matrix = FLOAT_BYTES * self.dim * self.opq_dim
            found.insert(0, Phase("rotate", compute_ns(rotation, host), rotation, batch_bytes=matrix))
        if self.rerank_exact:
            found.append(self._walk("rerank", self.rerank_exact, self.dim, self.num_vectors, host))
        return tuple(found)

    @property
    def _dim(self) -> int:
        """The dimension in which centroids and codes are."""
        return self.opq_dim or self.dim

    @property
    def _pieces(self) -> int:
        return self.n_probe if self.parallel_over == "probes" else 1

    def _coarse(self, host: HostDeployment) -> Phase:
        if self.coarse == "flat":
            return exhaustive("coarse", self.n_list, self._dim, host, self.stream_bytes_per_s)
        hops = hnsw_hops(self.n_list, self.hnsw_m)
        visited = num_visited(self.n_list, self.ef_search, 2 * self.hnsw_m, hops, self.visited_exponent)
        return self._walk("coarse", visited, self._dim, self.n_list, host)

    def _tables(self, host: HostDeployment) -> Phase:
        """2 D FLOP for each of the 2^bits entries of a sub-quantiser together, for each probe or once."""
        flop = 2.0 * 2**self.bits * self._dim * (self.n_probe if self.by_residual else 1)
        return Phase(
            "tables", compute_ns(flop, host), flop, batch_bytes=2**self.bits * FLOAT_BYTES * self._dim,
            pieces=self._pieces if self.by_residual else 1,
        )  # fmt: skip

    def _scan(self) -> Phase:
        lookup_ns = self.lookup_ns if self.bits == 8 else self.fast_scan_lookup_ns
        vector_bytes = self.code_bytes + self.id_bytes
        return Phase(
            "scan", self.scanned_codes * self.m * lookup_ns + self.n_probe * self.list_ns,
            bytes=self.scanned_codes * vector_bytes, resident_bytes=self.num_vectors * vector_bytes,
            pieces=self._pieces, spread=self.scan_spread,
        )  # fmt: skip

    def _walk(self, name: str, visited: float, dim: int, num_vectors: int, host: HostDeployment) -> Phase:
        return walk(
            name, visited, dim, FLOAT_BYTES * dim, num_vectors, host, self.stream_bytes_per_s, self.random_read_ns
        )


def _divisors_beside(number: int, whole: int) -> list[int]:
    """The largest divisor of `whole` below `number`, and the smallest above it where there is one."""
    small = [i for i in range(1, math.isqrt(whole) + 1) if not whole % i]
    divisors = sorted({*small, *(whole // i for i in small)})
    return [*[d for d in divisors if d < number][-1:], *[d for d in divisors if d > number][:1]]
