"""The catalogue of workloads: every table is usable and named with its source, and gives back its trace's quantiles.

The tables alone are checked everywhere; against the public traces where MIST_DATA names a folder that has them.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml

import mist
from mist.errors import ScenarioError
from mist.scenario.value import load as scenario
from mist.workload.synthetic import Quantiles
from mist.workload.trace import detect, find_trace, read_trace
from scenarios import sole_table

CATALOGUE = Path(mist.__file__).parent / "data" / "workloads"
STUDIES = Path(__file__).parents[1] / "studies"
NAMES = sorted(path.stem for path in CATALOGUE.glob("*.yaml"))
MARGINALS = ("input_tokens", "output_tokens")


def load(name: str) -> dict[str, Any]:
    entry = yaml.safe_load((CATALOGUE / f"{name}.yaml").read_text())
    assert isinstance(entry, dict)
    return entry


def marginals(entry: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Inputs, outputs and sizes by name."""
    sizes: dict[str, dict[str, Any]] = entry.get("sizes", {})
    return {name: entry[name] for name in MARGINALS} | sizes


def sample(entry: dict[str, Any], marginal: str) -> np.ndarray[Any, np.dtype[np.int64]]:
    points = Quantiles([tuple(point) for point in marginals(entry)[marginal]["quantiles"]])
    return points.sample(200_000, np.random.default_rng(5))


def trace(name: str) -> Path:
    try:
        return find_trace(name, Path(), os.environ)
    except ScenarioError:
        pytest.skip(f"set MIST_DATA to a folder that holds the public trace {name}")


@pytest.fixture(scope="module")
def study() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(STUDIES))
        return importlib.import_module("quantile_tables")


def test_the_catalogue_is_that_of_the_study(study: ModuleType) -> None:
    assert sorted(entry.name for entry in study.ENTRIES) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_entries_name_their_source_and_are_usable(name: str) -> None:
    entry = load(name)
    assert entry["name"] == name
    assert entry["num_requests"] > 1000
    assert all(isinstance(entry[key], str) and entry[key] for key in ("description", "source", "licence"))
    for marginal, table in marginals(entry).items():
        assert sample(entry, marginal).mean() == pytest.approx(table["mean"], rel=0.025)


@pytest.mark.parametrize(
    ("name", "marginal", "p", "tokens"),
    [  # published beside the trace: Splitwise, ISCA 2024
        ("azure-conversation", "input_tokens", 0.5, 1020),
        ("azure-conversation", "output_tokens", 0.5, 129),
        ("azure-code", "input_tokens", 0.5, 1469),
        ("azure-code", "output_tokens", 0.5, 13),
    ],
)
def test_medians_are_the_known_ones(name: str, marginal: str, p: float, tokens: int) -> None:
    assert dict(map(tuple, load(name)[marginal]["quantiles"]))[p] == tokens


@pytest.mark.parametrize("name", NAMES)
def test_tables_are_those_of_their_trace(name: str, study: ModuleType) -> None:
    source = next(entry for entry in study.ENTRIES if entry.name == name)
    trace(source.file)
    table = study.read(source)
    assert (CATALOGUE / f"{name}.yaml").read_text() == study.render(source, table)
    for marginal in marginals(load(name)):
        drawn, real = sample(load(name), marginal), table.sizes.get(marginal, getattr(table, marginal, None))
        assert real is not None
        assert drawn.mean() == pytest.approx(real.mean(), rel=0.025)
        for p in (0.5, 0.9, 0.99):
            assert np.quantile(drawn, p) == pytest.approx(np.quantile(real, p), rel=0.04, abs=1)


@pytest.mark.parametrize(
    ("file", "form", "num_requests", "input_mean", "output_mean"),
    [
        ("azure_llm_2023/AzureLLMInferenceTrace_conv.csv.gz", "Azure", 19_366, 1154.7, 211.1),
        ("azure_llm_2023/AzureLLMInferenceTrace_code.csv.gz", "Azure", 8_819, 2047.8, 27.9),
        ("mooncake_fast25/conversation_trace.jsonl.gz", "Mooncake", 12_031, 12_035, 343),
        ("mooncake_fast25/synthetic_trace.jsonl.gz", "Mooncake", 3_993, 15_325, 149),
        ("vidur/data__processed_traces__splitwise_conv.csv.gz", "Vidur", 19_366, 1154.7, 211.1),
    ],
)
def test_public_traces_are_read_whole(
    file: str, form: str, num_requests: int, input_mean: float, output_mean: float
) -> None:
    path = trace(file)
    assert type(detect(path)).__name__ == form
    table = read_trace(path)
    assert len(table) == num_requests
    assert table.input_tokens.mean() == pytest.approx(input_mean, abs=0.5)
    assert table.output_tokens.mean() == pytest.approx(output_mean, abs=0.5)
    assert (table.block_keys is None) == (form != "Mooncake")


def test_sizes_of_a_catalogue_are_drawn_for_the_pipeline() -> None:
    sections = {
        "workload": {"arrivals": "all_at_once", "num_requests": 4000, "lengths": "servegen-reasoning"},
        "clients": {"gpu": {"device": "h100-sxm", "model": "llama-3.1-8b"}},
        "pipeline": "reasoning",
    }
    table = sole_table(scenario(sections))
    assert set(table.sizes) == {"reasoning_tokens"}
    assert np.median(table.sizes["reasoning_tokens"]) == pytest.approx(478, rel=0.1)
    sections["workload"] |= {"sizes": {"reasoning_tokens": 7, "query_tokens": 5}}  # type: ignore[operator]
    own = sole_table(scenario(sections))
    assert {name: set(values.tolist()) for name, values in own.sizes.items()} == {
        "reasoning_tokens": {7}, "query_tokens": {5},
    }  # fmt: skip
    assert np.array_equal(own.input_tokens, table.input_tokens)


def test_two_tellings_of_one_trace_agree() -> None:
    azure = read_trace(trace("azure_llm_2023/AzureLLMInferenceTrace_conv.csv.gz"))
    vidur = read_trace(trace("vidur/data__processed_traces__splitwise_conv.csv.gz"))
    assert np.array_equal(azure.input_tokens, vidur.input_tokens)
    assert np.abs(azure.arrival_ns - vidur.arrival_ns).max() <= 1000  # that file is rounded to microseconds
