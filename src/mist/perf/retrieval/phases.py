"""What searches share: a search is a few phases, each with its work per query and per batch; batches are tabulated.

Below the models of vector search, which say what their phases are; a step's time is then one list read. It knows
nothing of what is found, and nothing of the other clients of a host: those see `demand`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cache
from statistics import NormalDist

from mist.perf import Demand, HostDeployment, OperatorTime
from mist.request import Step
from mist.units import GIB, NS_PER_S

FLOAT_BYTES = 4

#: Batches that are tabulated at least; larger ones are computed by the same formulas.
MIN_TABULATED_QUERIES = 64

#: Queries of a core from which on their distances are a matrix product, which reads vectors once for all of them; fewer
#: are computed one by one, each reading all vectors (FAISS's distance_compute_blas_threshold).
GEMM_QUERIES = 20

#: What a core reads of memory alone, in order, and a random read of which the latency is hidden in part: both fitted by
#: studies/vector_search.py, the first to a published set of IVF-PQ times, the second to FAISS on azure-f32s-v2.
STREAM_BYTES_PER_S = 4.6e9
RANDOM_READ_NS = 100.0
#: Vectors that a graph search visits grow as this power of ef_search, as ever fewer neighbours are new: likewise.
VISITED_EXPONENT = 0.95


@dataclass(frozen=True, slots=True)
class Phase:
    """One part of a search. Work is per query; `core_ns` is its time on one core that has all data at hand.

    `bytes` come from DRAM for each query, `batch_bytes` once for a batch. `pieces`: parts of a query that cores can
    take separately. `stream_ns`: what a core takes at least for a piece, to read what all queries share, and for all of
    its pieces together from `GEMM_QUERIES` on. `resident_bytes`: all that queries may read, so that no batch needs
    more. `spread`: standard deviation of a query's work over its mean. `is_read`: whether `core_ns` is spent waiting
    for memory.
    """

    name: str
    core_ns: float
    flop: float = 0.0
    bytes: float = 0.0
    batch_bytes: float = 0.0
    stream_ns: float = 0.0
    resident_bytes: float = math.inf
    pieces: int = 1
    spread: float = 0.0
    is_read: bool = False

    def num_cores(self, num_queries: int, host: HostDeployment) -> int:
        """Cores that a batch keeps busy."""
        return min(host.num_cores, num_queries * self.pieces)

    def busy_ns(self, num_queries: int, host: HostDeployment) -> float:
        """Time of the slowest core.

        The one with the most pieces, q of them, takes what they take at the mean and, as cores wait for the last one,
        E[max of c standard normals] standard deviations of the mean of q pieces more.
        """
        most = self._most_pieces(num_queries, host)
        late = expected_maximum(self.num_cores(num_queries, host)) * self.spread * math.sqrt(self.pieces / most)
        return max(self.streaming_ns(num_queries, host), most / self.pieces * self.core_ns * (1 + late))

    def streaming_ns(self, num_queries: int, host: HostDeployment) -> float:
        """Time in which the core with the most pieces reads what all queries share."""
        most = self._most_pieces(num_queries, host)
        return self.stream_ns * (most if most < GEMM_QUERIES else 1)

    def _most_pieces(self, num_queries: int, host: HostDeployment) -> int:
        return math.ceil(num_queries * self.pieces / self.num_cores(num_queries, host))

    def core_work_ns(self, num_queries: int, host: HostDeployment) -> float:
        """Time that all cores together are busy."""
        pieces, is_product = num_queries * self.pieces, self._most_pieces(num_queries, host) >= GEMM_QUERIES
        num_streams = self.num_cores(num_queries, host) if is_product else pieces
        return max(num_streams * self.stream_ns, num_queries * self.core_ns)

    def dram_bytes(self, num_queries: int) -> float:
        """DRAM traffic of a batch; no list or node is in a cache because another query has read it."""
        return num_queries * self.bytes + self.batch_bytes

    def floor_ns(self, num_queries: int, host: HostDeployment) -> float:
        """max(FLOP / peak, bytes that some query needs / bandwidth)."""
        least = min(num_queries * self.bytes, self.resident_bytes) + self.batch_bytes
        compute = num_queries * self.flop / core_flop_per_s(host) / host.num_cores
        return max(compute, least / host.device.memory_bytes_per_s) * NS_PER_S

    def time(self, num_queries: int, host: HostDeployment) -> OperatorTime:
        """A batch's time in this phase: that of its cores or of the memory channels, whichever is longer."""
        busy, traffic = self.busy_ns(num_queries, host), self.dram_bytes(num_queries)
        memory, floor = traffic / host.device.memory_bytes_per_s * NS_PER_S, self.floor_ns(num_queries, host)
        waits = self.is_read or memory > busy or 0 < self.streaming_ns(num_queries, host) == busy
        return OperatorTime(
            self.name, num_queries, num_queries * self.flop, traffic, max(busy, memory, floor),
            "memory" if waits else "compute", "roofline", floor,
        )  # fmt: skip


@dataclass(slots=True)
class Search:
    """The host-side part of every search: a model of a search adds its parameters, `phases` and `index_size`.

    Serves any stage kind. Each sequence of a task is a query, however long its text; those of a step are one batch.
    """

    _host: HostDeployment = field(init=False, repr=False, compare=False)
    _phases: tuple[Phase, ...] = field(init=False, repr=False, compare=False)
    _times: list[int] = field(init=False, repr=False, compare=False)
    _floors: list[int] = field(init=False, repr=False, compare=False)
    _demands: list[Demand] = field(init=False, repr=False, compare=False)

    def phases(self, host: HostDeployment) -> tuple[Phase, ...]:
        """The phases of a search in order."""
        raise NotImplementedError

    def index_size(self) -> float:
        """Bytes of the index in memory."""
        raise NotImplementedError

    @property
    def kinds(self) -> tuple[str, ...] | None:
        """Any: users name the stages that search."""
        return None

    def memory_bytes(self) -> int:
        """The index, and vectors that are kept beside it."""
        return math.ceil(self.index_size())

    def supports(self, deployment: HostDeployment) -> str | None:
        """None, or why not: steps of a model, a device without cores, or an index larger than its memory."""
        if not isinstance(deployment, HostDeployment):
            return "it prices searches on a host, not the steps of a model"
        device = deployment.device
        if not 1 <= deployment.num_cores <= device.num_cores:
            return f"a search needs 1 to {device.num_cores} cores of {device.name}, not {deployment.num_cores}"
        if self.memory_bytes() > device.memory_bytes:
            index, memory = self.memory_bytes() / GIB, device.memory_bytes / GIB
            return f"the index takes {index:,.1f} GiB and {device.name} has {memory:,.1f} GiB of memory"
        return None

    def prepare(self, deployment: HostDeployment) -> None:
        """Tabulate batches of up to `max_num_seqs` queries."""
        self._host, self._phases = deployment, self.phases(deployment)
        batches = range(max(deployment.max_num_seqs, MIN_TABULATED_QUERIES) + 1)
        self._times = [self._time(n) for n in batches]
        self._floors = [self._floor(n) for n in batches]
        self._demands = [self._demand(n) for n in batches]

    def step_time(self, step: Step) -> int:
        """Time of `step`'s batch where nothing else uses the host, ns, rounded up."""
        n = len(step.chunks)
        return self._times[n] if n < len(self._times) else self._time(n)

    def floor_time(self, step: Step) -> int:
        """max(FLOP / peak, bytes that some query needs / bandwidth) of each phase, summed, ns, rounded down."""
        n = len(step.chunks)
        return self._floors[n] if n < len(self._floors) else self._floor(n)

    def demand(self, step: Step) -> Demand:
        """The busy time of `step`'s cores, how many of them, and the DRAM traffic of all phases."""
        n = len(step.chunks)
        return self._demands[n] if n < len(self._demands) else self._demand(n)

    def explain(self, step: Step) -> list[OperatorTime]:
        """The phases of `step`; `count` is the number of queries."""
        n = len(step.chunks)
        return [phase.time(n, self._host) for phase in self._phases] if n else []

    def provenance(self) -> dict[str, float]:
        """All of the time comes from rates and data-sheet peaks."""
        return {"roofline": 1.0}

    def _time(self, n: int) -> int:
        return math.ceil(sum(p.time(n, self._host).time_ns for p in self._phases)) if n else 0

    def _floor(self, n: int) -> int:
        return int(sum(p.floor_ns(n, self._host) for p in self._phases)) if n else 0

    def _demand(self, n: int) -> Demand:
        if not n:
            return Demand()
        return Demand(
            core_ns=int(sum(p.core_work_ns(n, self._host) for p in self._phases)),
            dram_bytes=int(sum(p.dram_bytes(n) for p in self._phases)),
        )


def core_flop_per_s(host: HostDeployment) -> float:
    """Data-sheet FLOP/s of one core in FP32."""
    return host.device.peak("fp32") / host.device.num_cores


def compute_ns(flop: float, host: HostDeployment) -> float:
    """Time of `flop` on one core, at the fraction of peak that GEMMs reach on the device."""
    return flop / (core_flop_per_s(host) * host.device.efficiency_of("gemm", "fp32")) * NS_PER_S


def exhaustive(
    name: str, rows: int, dim: int, host: HostDeployment, stream_bytes_per_s: float, *, is_split: bool = False
) -> Phase:
    """The distances of a query to `rows` vectors of FP32: 2 D rows FLOP, all vectors fetched once for a batch.

    Cores take queries whole, each reading all vectors; or, where `is_split`, each takes an equal part of the vectors.
    What one core has fetched serves others that read it at about the same time.
    """
    flop, size = 2.0 * dim * rows, float(FLOAT_BYTES) * dim * rows
    pieces = host.num_cores if is_split else 1
    return Phase(
        name, compute_ns(flop, host), flop, FLOAT_BYTES * dim, size, size / pieces / stream_bytes_per_s * NS_PER_S,
        pieces=pieces,
    )  # fmt: skip


def walk(
    name: str, num_visited: float, dim: int, vector_bytes: float, num_vectors: int, host: HostDeployment,
    stream_bytes_per_s: float, random_read_ns: float,
) -> Phase:  # fmt: skip
    """The distances of a query to `num_visited` vectors, each read at a random place: 2 D FLOP and its bytes each."""
    flop, read = 2.0 * dim * num_visited, vector_bytes * num_visited
    waiting = num_visited * random_read_ns + read / stream_bytes_per_s * NS_PER_S
    return Phase(
        name, max(waiting, compute_ns(flop, host)), flop, read, resident_bytes=vector_bytes * num_vectors, is_read=True
    )


def num_visited(num_vectors: int, ef_search: int, degree: int, num_hops: float, exponent: float) -> float:
    """Vectors to which a graph search computes distances: degree / 2 x (hops + ef_search^exponent), at most all.

    It descends to the query's surroundings in `num_hops` vectors of `degree` neighbours and expands there as many as it
    keeps candidates. Half of the neighbours are new (unverified: pruned lists aren't full, and some were seen before),
    and the more candidates the fewer. Only visited vectors x time of a read can be fitted to throughputs.
    """
    return min(float(num_vectors), degree / 2 * (num_hops + math.pow(ef_search, exponent)))


def hnsw_hops(num_vectors: int, hnsw_m: int) -> float:
    """Vectors that the upper levels of HNSW are worth: log_m(N) levels, one vector of m new neighbours on each.

    Levels: Malkov and Yashunin, arXiv 1603.09320, section 4.1 (the normalisation 1 / ln m).
    """
    return math.log(max(num_vectors, 2)) / math.log(hnsw_m)


@cache
def expected_maximum(num: int) -> float:
    """E[max of `num` standard normals], by Blom's approximation (1958): Φ⁻¹((n - 3/8) / (n + 1/4)); 0 for one."""
    return NormalDist().inv_cdf((num - 0.375) / (num + 0.25))


def at_least(minimum: float, **values: float) -> None:
    """ValueError that names the first of `values` that is below `minimum`."""
    for name, value in values.items():
        if value < minimum:
            raise ValueError(f"{name} must be at least {minimum:g}, not {value:g}")


def above_zero(**values: float) -> None:
    """ValueError that names the first of `values` that isn't above 0."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} must be above 0, not {value:g}")
