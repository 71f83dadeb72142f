"""Graph search in memory: HNSW, and flat graphs such as Vamana (DiskANN).

One of the performance models of vector search; it has a single phase, the walk, whose reads are at random places. It
computes no distance and no recall.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    hnsw_hops,
    num_visited,
    walk,
)
from mist.registry import register


@register("perf", "hnsw")
@dataclass(slots=True, kw_only=True)
class GraphSearch(Search):
    """HNSW (Malkov and Yashunin, arXiv 1603.09320): `ef_search` candidates are kept while a graph is walked.

    `degree`: most neighbours of a vector on the lowest level, 2 m of HNSW, R of Vamana. `num_hops`: vectors expanded on
    the way to the query's surroundings; by default what the upper levels of HNSW are worth; about 20 fit Vamana on 10 M
    vectors. `bytes_per_dim`: 4 for FP32, 1 where the vectors are quantised to 8 bits. `index_bytes`: where it is known,
    0 for the estimate.
    `visited_exponent`: visited vectors are degree / 2 (num_hops + ef_search^visited_exponent).
    Rates of one core: `stream_bytes_per_s` of memory, `random_read_ns` until a vector arrives, as far as it isn't
    hidden by prefetching the next. They differ between implementations by several times, so give measured ones.
    """

    num_vectors: int
    dim: int
    degree: int = 64
    ef_search: int = 64
    num_hops: float | None = None
    bytes_per_dim: float = FLOAT_BYTES
    k: int = 10
    index_bytes: int = 0
    visited_exponent: float = VISITED_EXPONENT
    stream_bytes_per_s: float = STREAM_BYTES_PER_S
    random_read_ns: float = RANDOM_READ_NS

    def __post_init__(self) -> None:
        at_least(1, num_vectors=self.num_vectors, dim=self.dim, ef_search=self.ef_search, k=self.k)
        at_least(4, degree=self.degree)
        at_least(0, num_hops=self.num_hops or 0, index_bytes=self.index_bytes, random_read_ns=self.random_read_ns)
        above_zero(bytes_per_dim=self.bytes_per_dim, visited_exponent=self.visited_exponent,
                   stream_bytes_per_s=self.stream_bytes_per_s)  # fmt: skip

    def index_size(self) -> float:
        """`index_bytes`, or 1.1 N (vector + 4 bytes for each of `degree` neighbours)."""
        return self.index_bytes or 1.1 * self.num_vectors * (self._vector_bytes + 4 * self.degree)

    def phases(self, host: HostDeployment) -> tuple[Phase, ...]:
        """The walk alone."""
        hops = hnsw_hops(self.num_vectors, self.degree // 2) if self.num_hops is None else self.num_hops
        visited = num_visited(self.num_vectors, self.ef_search, self.degree, hops, self.visited_exponent)
        return (
            walk(
                "walk", visited, self.dim, self._vector_bytes, self.num_vectors, host, self.stream_bytes_per_s,
                self.random_read_ns,
            ),
        )  # fmt: skip

    @property
    def _vector_bytes(self) -> float:
        return self.bytes_per_dim * self.dim
