"""Vector search: the work by hand, laws of batches and cores, memory, and tables that users measured.

The performance models alone are driven here, with steps made by hand. Never runs a simulation, and compares with no
measurement.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mist import registry
from mist.hardware import Device
from mist.perf import BOUNDS, ORIGINS, HostDeployment, HostModel
from mist.perf.retrieval import phases
from mist.perf.retrieval.flat import FlatSearch
from mist.perf.retrieval.graph import GraphSearch
from mist.perf.retrieval.ivf_pq import IvfPq
from mist.perf.retrieval.phases import GEMM_QUERIES, Search
from mist.perf.retrieval.table import SearchTable
from mist.request import Step
from mist.scenario import catalogue
from mist.scenario.named import SpecOf
from mist.testing import small_deployment


def device(name: str = "epyc-9554") -> Device:
    found, _ = catalogue.read("devices", name, Path())
    assert isinstance(found, Device)
    return found


def host(num_cores: int = 16, name: str = "epyc-9554", max_num_seqs: int = 8) -> HostDeployment:
    return HostDeployment(device(name), num_cores, max_num_seqs)


def ivf(**changes: Any) -> IvfPq:
    return IvfPq(**{"num_vectors": 10**9, "dim": 128, "n_list": 32_768, "n_probe": 32, "m": 16, **changes})


def graph(**changes: Any) -> GraphSearch:
    return GraphSearch(**{"num_vectors": 10**7, "dim": 200, **changes})


def flat(**changes: Any) -> FlatSearch:
    return FlatSearch(**{"num_vectors": 10**6, "dim": 768, **changes})


def table(**changes: Any) -> SearchTable:
    points = ({"recall": 0.8, "queries_per_s": 4000.0, "setting": "fast"}, {"recall": 0.9, "queries_per_s": 1000.0})
    return SearchTable(**{"points": points, "num_threads": 8, "index_bytes": 10**9, "recall": 0.9, **changes})


MODELS: list[Search] = [
    ivf(), ivf(bits=4, coarse="hnsw", n_list=1 << 20, m=64, opq_dim=128), ivf(parallel_over="probes"),
    ivf(num_vectors=10**7, rerank_exact=100), ivf(by_residual=False, scan_spread=1.0), graph(), graph(bytes_per_dim=1),
    flat(), flat(parallel_over="vectors"), table(), table(dram_bytes_per_query=10**9),
]  # fmt: skip
every_model = pytest.mark.parametrize("model", MODELS, ids=lambda m: type(m).__name__)


def prepared(model: Search, on: HostDeployment | None = None) -> Search:
    model.prepare(on or host())
    return model


def batch(*queries: int) -> Step:
    return Step(chunks=[(1, 0)] * sum(queries), num_prefill_tokens=sum(queries), kinds=["retrieve"] * sum(queries))


def times(model: Search, sizes: range, num_cores: int = 16) -> list[int]:
    prepared(model, host(num_cores))
    return [model.step_time(batch(n)) for n in sizes]


# the work of a search, by hand


def phase_of(model: Search, name: str, on: HostDeployment | None = None) -> phases.Phase:
    return next(p for p in model.phases(on or host()) if p.name == name)


def test_flat_coarse_search_reads_all_centroids_once_for_a_batch() -> None:
    coarse = phase_of(ivf(), "coarse")
    assert coarse.flop == 2 * 128 * 32_768 == 8_388_608
    assert coarse.bytes == 4 * 128
    assert coarse.batch_bytes == 4 * 128 * 32_768 == 16_777_216


def test_scan_looks_up_m_entries_of_every_code() -> None:
    even = ivf(imbalance_factor=1.0, lookup_ns=0.5, list_ns=100.0)
    assert even.scanned_codes == 32 * 10**9 / 32_768 == 976_562.5
    scan = phase_of(even, "scan")
    assert scan.core_ns == pytest.approx(976_562.5 * 16 * 0.5 + 32 * 100)
    assert scan.bytes == 976_562.5 * (16 + 8)
    assert phase_of(ivf(imbalance_factor=1.25, lookup_ns=0.5), "scan").core_ns == pytest.approx(1.25 * 7_812_500)


def test_scan_never_takes_more_than_all_codes() -> None:
    assert ivf(n_probe=32_768, imbalance_factor=2.0).scanned_codes == 10**9


def test_four_bits_halve_the_codes_and_have_a_rate_of_their_own() -> None:
    fast = ivf(bits=4, imbalance_factor=1.0, fast_scan_lookup_ns=0.1)
    assert fast.code_bytes == 8
    assert phase_of(fast, "scan").core_ns == pytest.approx(976_562.5 * 16 * 0.1)


def test_tables_are_built_for_every_probe_of_residuals() -> None:
    tables = phase_of(ivf(), "tables")
    assert tables.flop == 2 * 256 * 128 * 32 == 2_097_152
    assert tables.batch_bytes == 256 * 4 * 128
    assert phase_of(ivf(by_residual=False), "tables").flop == 65_536
    assert phase_of(ivf(bits=4), "tables").flop == 2 * 16 * 128 * 32


def test_exact_distances_to_the_best_and_a_rotation() -> None:
    rerank = phase_of(ivf(rerank_exact=100), "rerank")
    assert (rerank.flop, rerank.bytes) == (2 * 128 * 100, 4 * 128 * 100)
    assert phase_of(ivf(dim=96, opq_dim=128), "rotate").flop == 2 * 96 * 128
    assert phase_of(ivf(dim=96, opq_dim=128), "coarse").flop == 2 * 128 * 32_768


def test_graph_coarse_search_reads_visited_centroids_at_random() -> None:
    coarse = phase_of(ivf(coarse="hnsw", n_list=1 << 20, hnsw_m=32, ef_search=64, visited_exponent=1.0), "coarse")
    visited = 32 * (4 + 64)  # log_32(2^20) = 4 levels
    assert coarse.flop == pytest.approx(2 * 128 * visited)
    assert coarse.bytes == pytest.approx(4 * 128 * visited)
    assert phase_of(ivf(coarse="hnsw", n_list=64, ef_search=512), "coarse").flop == 2 * 128 * 64


def test_graph_search_waits_for_every_vector() -> None:
    walk = phase_of(graph(degree=64, ef_search=100, num_hops=20, visited_exponent=1.0, random_read_ns=100.0,
                          stream_bytes_per_s=8e9), "walk")  # fmt: skip
    visited = 32 * 120
    assert walk.bytes == visited * 800
    assert walk.core_ns == pytest.approx(visited * (100 + 100))


def test_exhaustive_search_is_two_flop_per_dimension_and_vector() -> None:
    compare = phase_of(flat(), "compare")
    assert compare.flop == 2 * 768 * 10**6
    assert compare.batch_bytes == 4 * 768 * 10**6
    # 87.5 GFLOP/s of a core: a 64th of 7 TFLOP/s, of which GEMMs reach 0.8
    assert compare.core_ns == pytest.approx(2 * 768 * 10**6 / 87.5)


def test_a_lone_query_takes_what_its_core_takes() -> None:
    one = prepared(ivf(imbalance_factor=1.0, lookup_ns=0.5, stream_bytes_per_s=8e9, by_residual=False))
    coarse, tables, scan = 16_777_216 / 8, 2 * 256 * 128 / 87.5, 976_562.5 * 16 * 0.5
    assert one.step_time(batch(1)) == math.ceil(coarse + tables + scan)


# memory


def test_index_size() -> None:
    expected = 1.1 * (4 * 128 * 32_768 + 10**9 * (16 + 24) + 1024 * 128)
    assert ivf().memory_bytes() == math.ceil(expected) == 44_018_599_117
    assert ivf(bits=4).memory_bytes() == math.ceil(expected - 1.1 * 8e9)
    assert ivf(rerank_exact=10).memory_bytes() == math.ceil(expected + 4 * 128 * 1e9)
    assert ivf(index_bytes=45_171_478_528).memory_bytes() == 45_171_478_528
    assert graph(degree=64).memory_bytes() == math.ceil(1.1 * 10**7 * (800 + 256))
    assert flat().memory_bytes() == 4 * 768 * 10**6
    assert table().memory_bytes() == 10**9


def test_an_index_that_does_not_fit_is_refused_with_both_figures() -> None:
    assert ivf(index_bytes=64 * 2**30).supports(host(32, "azure-f32s-v2")) is None
    reason = ivf(index_bytes=100 * 2**30).supports(host(32, "azure-f32s-v2"))
    assert reason == "the index takes 100.0 GiB and azure-f32s-v2 has 64.0 GiB of memory"
    assert "1 to 0 cores of h100-sxm" in str(ivf().supports(host(1, "h100-sxm")))
    assert "1 to 64 cores" in str(ivf().supports(host(65)))
    assert "not the steps of a model" in str(ivf().supports(small_deployment()))  # type: ignore[arg-type]


# laws that hold for every model


@every_model
def test_contract(model: Search) -> None:
    contract: HostModel = prepared(model)
    assert contract.kinds is None
    assert contract.supports(host()) is None
    assert sum(contract.provenance().values()) == pytest.approx(1.0)
    assert contract.provenance().keys() <= set(ORIGINS)
    assert contract.step_time(Step()) == contract.floor_time(Step()) == 0
    assert contract.explain(Step()) == []


@every_model
@pytest.mark.parametrize("num_cores", [1, 16, 64])
def test_parts_sum_to_the_time_and_demand_fits_into_it(model: Search, num_cores: int) -> None:
    on = host(num_cores)
    prepared(model, on)
    for n in (1, 2, 15, 17, 64, 65, 400, 2_000):
        step = batch(n)
        time, parts, demand = model.step_time(step), model.explain(step), model.demand(step)
        assert 0 <= time - sum(p.time_ns for p in parts) < 1
        assert {p.bound_by for p in parts} <= set(BOUNDS)
        assert all(p.time_ns >= p.floor_ns for p in parts)
        assert model.floor_time(step) <= time
        assert demand.core_ns <= num_cores * time
        assert demand.dram_bytes / on.device.memory_bytes_per_s * 1e9 <= time


@every_model
@pytest.mark.parametrize("num_cores", [1, 2, 3, 16, 64])
def test_a_query_is_never_slower_in_a_batch(model: Search, num_cores: int) -> None:
    alone, *others = times(model, range(1, 200), num_cores)
    assert all(time <= n * (alone + 1) for n, time in enumerate(others, start=2))


@every_model
def test_larger_batches_take_longer_below_matrix_products(model: Search) -> None:
    found = times(model, range(1, 19), 1)
    assert found == sorted(found)
    if "coarse" not in {p.name for p in model.phases(host())} and not isinstance(model, FlatSearch):
        found = times(model, range(1, 200))
        assert found == sorted(found)


@every_model
def test_tables_and_formulas_agree(model: Search) -> None:
    prepared(model, host(max_num_seqs=300))
    tabulated = [(model.step_time(batch(n)), model.floor_time(batch(n)), model.demand(batch(n))) for n in (1, 70, 300)]
    prepared(model, host(max_num_seqs=1))
    assert tabulated == [
        (model.step_time(batch(n)), model.floor_time(batch(n)), model.demand(batch(n))) for n in (1, 70, 300)
    ]


@every_model
def test_only_the_number_of_queries_counts(model: Search) -> None:
    prepared(model)
    assert model.step_time(batch(5)) == model.step_time(batch(1, 1, 3)) == model.step_time(batch(*[1] * 5))


def test_a_step_calls_no_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepared(ivf(), host(max_num_seqs=200))
    monkeypatch.setattr(Search, "_time", None)
    monkeypatch.setattr(Search, "_demand", None)
    assert model.step_time(batch(200)) > 0
    assert model.demand(batch(200)).dram_bytes > 0


@given(st.integers(1, 2_000), st.integers(1, 100), st.integers(1, 64))
def test_more_probes_vectors_or_candidates_take_longer(n_probe: int, n: int, num_cores: int) -> None:
    def time(model: Search) -> float:
        return sum(p.time(n, host(num_cores)).time_ns for p in model.phases(host(num_cores)))

    assert time(ivf(n_probe=n_probe)) < time(ivf(n_probe=n_probe + 1))
    assert time(ivf(n_probe=n_probe)) < time(ivf(n_probe=n_probe, num_vectors=10**9 + 10**6))
    assert time(ivf(n_list=1 << 20, coarse="hnsw", ef_search=n_probe)) < time(
        ivf(n_list=1 << 20, coarse="hnsw", ef_search=n_probe + 1)
    )
    assert time(graph(ef_search=n_probe)) < time(graph(ef_search=n_probe + 1))
    assert time(graph(num_vectors=10**7)) < time(graph(num_vectors=10**8))
    assert time(flat(num_vectors=10**6)) < time(flat(num_vectors=2 * 10**6))


# batches on cores


def test_queries_of_a_batch_go_to_cores_of_their_own() -> None:
    model = ivf(scan_spread=0.0)
    found = times(model, range(1, 34), 16)
    assert found[0] == found[15]
    assert found[16] == found[31] == pytest.approx(2 * found[0], rel=1e-6)


def test_probes_shared_out_make_a_lone_query_faster() -> None:
    split, whole = ivf(parallel_over="probes", scan_spread=0.0), ivf(scan_spread=0.0)
    assert phase_of(split, "scan").busy_ns(1, host()) == pytest.approx(phase_of(whole, "scan").busy_ns(1, host()) / 16)
    assert phase_of(split, "scan").busy_ns(16, host()) == pytest.approx(phase_of(whole, "scan").busy_ns(16, host()))


def test_vectors_shared_out_make_a_lone_query_faster() -> None:
    split, whole = times(flat(parallel_over="vectors"), range(1, 2)), times(flat(), range(1, 2))
    assert split[0] == pytest.approx(whole[0] / 16, rel=1e-6)


def test_many_queries_of_a_core_are_a_matrix_product() -> None:
    found = times(flat(), range(GEMM_QUERIES - 1, GEMM_QUERIES + 1), 1)
    assert found[1] < found[0] / 5


def test_the_last_core_is_waited_for() -> None:
    assert phases.expected_maximum(1) == 0
    assert phases.expected_maximum(2) == pytest.approx(1 / math.sqrt(math.pi), rel=0.05)
    assert phases.expected_maximum(16) == pytest.approx(1.766, rel=0.01)  # tables of normal order statistics
    scan, even = phase_of(ivf(scan_spread=0.3), "scan"), phase_of(ivf(scan_spread=0.0), "scan")
    late = scan.busy_ns(16, host()) / even.busy_ns(16, host())
    assert late == pytest.approx(1 + 0.3 * phases.expected_maximum(16))
    assert scan.busy_ns(64, host()) / even.busy_ns(64, host()) == pytest.approx(1 + (late - 1) / 2)
    assert scan.core_work_ns(16, host()) == even.core_work_ns(16, host())


def test_memory_bandwidth_bounds_many_cores() -> None:
    fast = ivf(lookup_ns=1e-6, scan_spread=0.0)
    scan = phase_of(fast, "scan").time(64, host(64))
    assert scan.bound_by == "memory"
    assert scan.time_ns == pytest.approx(64 * fast.scanned_codes * 24 / 460.8)


def test_the_floor_counts_no_list_twice() -> None:
    scan = phase_of(ivf(), "scan")
    assert scan.floor_ns(10**6, host()) == pytest.approx(10**9 * 24 / 460.8)
    assert scan.floor_ns(1, host()) == pytest.approx(scan.bytes / 460.8)


# measured tables


def test_a_table_answers_what_was_measured() -> None:
    assert table().queries_per_s() == 1000
    assert table(recall=None, setting="fast").queries_per_s() == 4000
    assert table(recall=0.85).queries_per_s() == pytest.approx(2000)  # the geometric mean half-way
    assert prepared(table()).provenance() == {"measured": 1.0}
    assert prepared(table(recall=0.85)).provenance() == {"interpolated": 1.0}
    assert prepared(table(recall=0.85)).explain(batch(1))[0].origin == "interpolated"


def test_a_table_scales_to_batches_and_cores() -> None:
    model = prepared(table(), host(8))
    one = 8_000_000  # eight threads, 1,000 queries per second
    assert [model.step_time(batch(n)) for n in (1, 8, 9, 1000)] == [one, one, 2 * one, 125 * one]
    assert prepared(table(), host(16)).step_time(batch(16)) == one


def test_a_point_that_is_beaten_does_not_count() -> None:
    worse = {"recall": 0.84, "queries_per_s": 500.0, "setting": "bad"}
    assert table(points=(*table().points, worse), recall=0.85).queries_per_s() == pytest.approx(2000)
    assert table(points=(*table().points, worse), recall=None, setting="bad").queries_per_s() == 500


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recall": 0.95}, "recall 0.95 isn't within that of the points, 0.8 to 0.9"),
        ({"recall": None, "setting": "fats"}, "did you mean 'fast'"),
        ({"setting": "fast"}, "give one of them"),
        ({"recall": None}, "give one of them"),
        ({"points": ({"recall": 0.9},)}, "queries_per_s must be a number above 0, not None"),
        ({"points": ({"recal": 0.9, "queries_per_s": 1.0},)}, "recal is not known"),
        ({"points": ({"recall": 90.0, "queries_per_s": 1.0},)}, "a recall is a number from 0 to 1, not 90.0"),
        ({"points": ()}, "points, none"),
        ({"num_threads": 0}, "num_threads must be at least 1, not 0"),
    ],
)
def test_tables_that_say_nothing_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        table(**changes)


# what users write


@pytest.mark.parametrize(
    ("build", "changes", "message"),
    [
        (ivf, {"n_probe": 40_000}, "n_probe is at most n_list, 32768, not 40000"),
        (ivf, {"num_vectors": 0}, "num_vectors must be at least 1, not 0"),
        (ivf, {"imbalance_factor": 0.9}, "imbalance_factor must be at least 1, not 0.9"),
        (ivf, {"scan_spread": 1.5}, "scan_spread is a fraction"),
        (ivf, {"lookup_ns": 0.0}, "lookup_ns must be above 0, not 0"),
        (ivf, {"dim": 768, "m": 50}, "m is 50, which doesn't divide dim, 768: take 48 or 64"),
        (ivf, {"dim": 96, "m": 97}, "m is 97, which doesn't divide dim, 96: take 96$"),
        (ivf, {"dim": 96, "opq_dim": 128, "m": 24}, "m is 24, which doesn't divide opq_dim, 128: take 16 or 32"),
        (ivf, {"hnsw_m": 1}, "hnsw_m must be at least 2, not 1"),
        (graph, {"degree": 1}, "degree must be at least 4, not 1"),
        (graph, {"num_hops": -1.0}, "num_hops must be at least 0, not -1"),
        (graph, {"bytes_per_dim": 0.0}, "bytes_per_dim must be above 0, not 0"),
        (flat, {"dim": 0}, "dim must be at least 1, not 0"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(build: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**changes)


@pytest.mark.parametrize("name", ["ivf_pq", "hnsw", "flat_search", "search_table"])
def test_registered(name: str) -> None:
    assert issubclass(registry.lookup("perf", name), Search)


@every_model
def test_a_scenario_can_name_it_and_is_printed_whole(model: Search) -> None:
    name = next(n for n in registry.names("perf") if registry.lookup("perf", n) is type(model))
    params = {f: getattr(model, f) for f in type(model).__dataclass_fields__ if not f.startswith("_")}
    written = {key: list(value) if isinstance(value, tuple) else value for key, value in params.items()}
    spec = SpecOf("perf").read({name: written})
    assert spec.build() == model
    assert SpecOf("perf").read(spec.plain()).params == spec.params
