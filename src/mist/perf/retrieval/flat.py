"""Exhaustive search: every query is compared with every vector.

One of the performance models of vector search, exact and for collections that are small or searched in large batches.
It computes no distance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mist.perf import HostDeployment
from mist.perf.retrieval.phases import (
    FLOAT_BYTES,
    STREAM_BYTES_PER_S,
    Phase,
    Search,
    above_zero,
    at_least,
    exhaustive,
)
from mist.registry import register


@register("perf", "flat_search")
@dataclass(slots=True, kw_only=True)
class FlatSearch(Search):
    """2 D N FLOP per query; the FP32 vectors are read once for a batch.

    `parallel_over`: cores share out the queries of a batch, each reading all vectors (FAISS), or the vectors.
    `stream_bytes_per_s`: what one core reads of memory alone. `index_bytes`: where it is known, 0 for 4 D N.
    """

    num_vectors: int
    dim: int
    k: int = 10
    index_bytes: int = 0
    parallel_over: Literal["queries", "vectors"] = "queries"
    stream_bytes_per_s: float = STREAM_BYTES_PER_S

    def __post_init__(self) -> None:
        at_least(1, num_vectors=self.num_vectors, dim=self.dim, k=self.k)
        at_least(0, index_bytes=self.index_bytes)
        above_zero(stream_bytes_per_s=self.stream_bytes_per_s)

    def index_size(self) -> float:
        """`index_bytes`, or the vectors."""
        return self.index_bytes or FLOAT_BYTES * self.dim * self.num_vectors

    def phases(self, host: HostDeployment) -> tuple[Phase, ...]:
        """The comparison alone."""
        is_split = self.parallel_over == "vectors"
        return (exhaustive("compare", self.num_vectors, self.dim, host, self.stream_bytes_per_s, is_split=is_split),)
