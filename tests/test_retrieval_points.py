"""Vector search against measurements: the rates of a study, fitted and checked on points that the fit hasn't seen.

Published times per query are in the study; the rows of other measurements are read where MIST_DATA names their folder.
Never runs a simulation.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
from pathlib import Path
from types import ModuleType

import pytest

POINTS = [Path(p) / "validation" / "nonllm_points.csv" for p in os.environ.get("MIST_DATA", "").split(os.pathsep) if p]
needs_data = pytest.mark.skipif(
    not any(p.is_file() for p in POINTS), reason="validation/nonllm_points.csv is in no folder of MIST_DATA"
)


def study() -> ModuleType:
    path = Path(__file__).parents[1] / "studies" / "vector_search.py"
    spec = importlib.util.spec_from_file_location("vector_search_study", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_published_times_per_query_within_a_factor_of_a_half() -> None:
    """IVF-PQ at batches of 1, 4, 16 and 64: with the shipped rates, and each shape with the others' rates."""
    checked = study()
    for shape in checked.PUBLISHED:
        held_out = checked.fit_published([s for s in checked.PUBLISHED if s != shape])
        shipped: dict[str, float] = {}
        for rates in (shipped, held_out):
            assert all(1 / 1.5 < ratio < 1.5 for ratio in checked.published_ratios(shape, rates))


@needs_data
def test_rates_of_one_set_of_a_billion_vectors_price_the_other() -> None:
    checked = study()
    rows = [r for r in checked.read_points() if r["system"] == "faiss-t1"]
    one, other = ([r for r in rows if r["dataset"] == name] for name in checked.SETS)
    assert (len(one), len(other)) == (96, 75)
    for fitted, held_out in ((one, other), (other, one)):
        rates = checked.fit_faiss(fitted)
        assert statistics.median(map(abs, checked.errors_of(fitted, rates))) < 0.08
        assert statistics.median(map(abs, checked.errors_of(held_out, rates))) <= 0.20
    for mine in (one, other):
        assert statistics.median(map(abs, checked.errors_of(mine, {}))) <= 0.15
        assert checked.imbalance_factor(mine) == pytest.approx(1.24, abs=0.03)


@needs_data
def test_a_read_fitted_to_half_of_a_graphs_points_prices_the_rest() -> None:
    checked = study()
    for name in ("diskann", "cufe", "pyanns", "zilliz"):
        mine = [r for r in checked.read_points() if r["system"] == name]
        rates = checked.fit_graph(mine[::2])
        assert statistics.median(map(abs, checked.graph_errors(mine[1::2], rates))) < 0.06
