"""The catalogue of models: parameter counts, provenance, names, and agreement with the configs that models ship.

Guards the data that every capacity and step time is computed from; the public configs themselves are read where
MIST_DATA or an installed operator package has them. Never runs a simulation.
"""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from mist.model import DTYPE_BYTES, ModelSpec
from mist.scenario import catalogue

ENTRIES = {entry.name: entry for entry in catalogue.entries("models")}
DATA: dict[str, dict[str, Any]] = {name: entry.source.data() for name, entry in ENTRIES.items()}
DOCS = (Path(__file__).parent.parent / "docs" / "models.md").read_text(encoding="utf-8")

#: What people call the models that published measurements name.
COMMON_NAMES = [
    "llama-7b", "llama-2-7b", "llama-2-13b", "llama-2-70b", "llama-3-8b", "llama-3-70b", "llama-3.1-8b",
    "llama-3.1-70b", "llama-3.1-405b", "llama-3.3-70b", "llama-4-scout", "codellama-34b", "mistral-7b",
    "mistral-nemo", "mistral-large", "mixtral-8x7b", "mixtral-8x22b", "qwen1.5-7b", "qwen2-7b", "qwen2-72b",
    "qwen2.5-7b", "qwen3-4b", "qwen3-8b", "qwen3-14b", "qwen3-32b", "qwen3-30b-a3b", "qwen3-235b-a22b",
    "gpt-oss-20b", "gpt-oss-120b", "deepseek-v3", "deepseek-r1", "minimax-m2.5", "kimi-k2", "kimi-k2.5",
    "glm-4.5", "glm-4.5-air", "glm-4-9b", "phi-4", "yi-34b", "decilm-7b", "aquila-7b", "nemotron-super-49b",
    "gpt-j", "opt-6.7b", "falcon-180b", "bloom-7b1", "bloom-176b", "e5-base-v2", "e5-large-v2", "e5-mistral-7b",
    "bge-large-en-v1.5", "bge-m3", "bge-reranker-large", "qwen3-reranker-0.6b",
]  # fmt: skip

#: Bytes of keys and values of a token in 16 bits, from layers x 2 x KV heads x head size x 2 B or the latent vector.
KV_BYTES = {
    "llama-3.1-70b": 80 * 2 * 8 * 128 * 2,
    "deepseek-v3": 61 * (512 + 64) * 2,
    "gpt-oss-120b": 36 * 2 * 8 * 64 * 2,
    "falcon-180b": 80 * 2 * 8 * 64 * 2,
    "nemotron-super-49b": 49 * 2 * 8 * 128 * 2,
    "decilm-7b": 67 * 2 * 128 * 2,
    "e5-base-v2": 0,
}


def spec(name: str) -> ModelSpec:
    value, _ = catalogue.read("models", name, Path())
    assert isinstance(value, ModelSpec)
    return value


def shape(model: ModelSpec) -> dict[str, Any]:
    """A model without what two checkpoints of one shape may differ in: name, quantisation, the context they allow."""
    ignored = {"name", "checkpoint_dtype", "quantizes_experts_only", "max_context"}
    return {key: value for key, value in dataclasses.asdict(model).items() if key not in ignored}


def data_files(pattern: str) -> list[Path]:
    roots = [Path(p) for p in os.environ.get("MIST_DATA", "").split(os.pathsep) if p]
    return sorted(path for root in roots for path in root.glob(pattern))


def data_file(name: str) -> Path:
    found = data_files(name)
    if not found:
        pytest.skip(f"{name} is in no folder of MIST_DATA")
    return found[0]


def operator_package() -> Path:
    found = importlib.util.find_spec("aiconfigurator_core")
    if found is None or found.origin is None:
        pytest.skip("aiconfigurator-core isn't installed")
    return Path(found.origin).parent


def rows(path: Path) -> Iterator[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        yield from csv.DictReader(file)


@pytest.mark.parametrize("name", sorted(ENTRIES))
def test_parameters_match_the_published_count(name: str) -> None:
    assert spec(name).num_parameters / 1e9 == pytest.approx(DATA[name]["published_parameters_billions"], rel=0.02)


@pytest.mark.parametrize("name", sorted(ENTRIES))
def test_an_entry_says_where_it_comes_from(name: str) -> None:
    data = DATA[name]
    sources = {"published_parameters_source", "config_source"}
    assert set(data) - {"note", "checkpoints"} == {"id", "aliases", "published_parameters_billions", "config"} | sources
    assert all(len(data[key]) > 5 for key in sources)
    assert "/" in name


def test_a_file_is_named_as_a_scenario_calls_its_model() -> None:
    files = [path.name for path in resources.files("mist").joinpath("data", "models").iterdir()]
    stems = {name.removesuffix(".yaml") for name in files if name.endswith(".yaml")}
    assert len(stems) == len(ENTRIES)
    assert stems <= {alias for entry in ENTRIES.values() for alias in entry.aliases}


def test_aliases_are_unique_in_any_case() -> None:
    names = Counter(n.lower() for entry in ENTRIES.values() for n in (entry.name, *entry.aliases))
    assert [name for name, count in names.items() if count > 1] == []


@pytest.mark.parametrize("name", COMMON_NAMES)
def test_common_names_resolve_in_any_case(name: str) -> None:
    assert spec(name) == spec(name.upper())


def test_every_family_of_attention_and_network_is_there() -> None:
    models = [spec(name) for name in ENTRIES]
    groups = [group for model in models for group in model.layers]
    assert any(group.experts for group in groups)
    assert any(group.latent for group in groups)
    assert any(group.window for group in groups)
    assert any(not group.num_heads for group in groups)
    assert any(model.is_encoder for model in models)
    assert max(len(model.layers) for model in models) > 10


@pytest.mark.parametrize(("name", "expected"), KV_BYTES.items())
def test_kv_bytes_of_a_token(name: str, expected: int) -> None:
    assert spec(name).kv_bytes_per_token("bf16") == expected


def test_each_file_is_parsed_once(parsed_files: Counter[str]) -> None:
    for name in (*COMMON_NAMES, *ENTRIES):
        spec(name)
    assert len(catalogue.names("models")) == len(parsed_files)
    assert set(parsed_files.values()) == {1}


def test_what_is_left_out_is_not_in_the_catalogue() -> None:
    left_out = left_out_ids()
    assert left_out
    names = {n.lower() for entry in ENTRIES.values() for n in (entry.name, *entry.aliases)}
    assert not {name.lower() for name in left_out} & names


#: what a checkpoint's name says of its weights, the first that is in it
MARKS = {"mxfp4": "mxfp4", "nvfp4": "fp4", "fp4": "fp4", "fp8": "fp8", "int8": "int8", "w8a8": "int8", "8bit": "int8",
         "awq": "int4", "gptq": "int4", "int4": "int4", "w4a16": "int4", "4bit": "int4"}  # fmt: skip


def test_quantised_checkpoints_have_their_dtype() -> None:
    num_quantised = 0
    for entry in ENTRIES.values():
        own = spec(entry.name).checkpoint_dtype
        for alias in entry.aliases:
            expected = next((dtype for mark, dtype in MARKS.items() if mark in alias.lower()), None)
            if expected is not None:
                num_quantised += 1
                assert spec(alias).checkpoint_dtype == expected, alias
            elif alias not in entry.checkpoints:
                assert spec(alias).checkpoint_dtype == own
        assert set(entry.checkpoints.values()) <= DTYPE_BYTES.keys()
    assert num_quantised > 150


def test_models_published_in_few_bits_have_them() -> None:
    published = {"deepseek-v3": "fp8", "kimi-k2": "fp8", "kimi-k2.5": "int4", "minimax-m2": "fp8",
                 "gpt-oss-120b": "mxfp4", "llama-3.1-8b": "bf16"}  # fmt: skip
    assert {name: spec(name).checkpoint_dtype for name in published} == published
    assert spec("kimi-k2.5").quantizes_experts_only


def left_out_ids() -> set[str]:
    """The hub ids in the table of `docs/models.md` that says what is left out and why."""
    section = DOCS.split("## Left out", 1)[1].split("\n## ", 1)[0]
    return set(re.findall(r"`([\w.-]+/[\w.-]+)`", section))


def test_models_and_checkpoints_of_the_measured_points_resolve() -> None:
    pairs = {(row["model"], row["checkpoint"]) for row in rows(data_file("validation/points.csv"))}
    assert len(pairs) > 10
    for model, checkpoint in pairs:
        assert not checkpoint or shape(spec(checkpoint)) == shape(spec(model)), checkpoint


def test_embedding_and_reranking_models_of_the_measured_stages_resolve() -> None:
    names = {row["model"] for row in rows(data_file("validation/nonllm_points.csv"))} - {""}
    assert names
    for name in names:
        spec(name)


def test_shapes_match_those_that_come_from_no_file() -> None:
    for row in rows(data_file("models/unverified_shapes.csv")):
        model = spec(row["model"])
        group = model.layers[0]
        got = (model.num_layers, model.hidden_size, group.num_heads, group.head_size, group.ffn_size, model.vocab_size)
        columns = ("layers", "hidden", "heads", "head_dim", "ffn", "vocab")
        assert got == tuple(int(row[key]) for key in columns), row["model"]
        if row["kv_heads"] != "varies" and not model.is_encoder:
            assert group.num_kv_heads == int(row["kv_heads"])
        assert model.num_parameters / 1e9 == pytest.approx(float(row["published_params_b"]), rel=0.02)


def test_public_configs_are_what_the_catalogue_holds() -> None:
    configs = [(p.stem, json.loads(p.read_text())) for p in data_files("models/*.json")]
    configs = [(name, config) for name, config in configs if "architectures" in config]
    if not configs:
        pytest.skip("models/*.json is in no folder of MIST_DATA")
    aliases = sorted(n.lower() for entry in ENTRIES.values() for n in (entry.name, *entry.aliases))
    for name, config in configs:
        named = [alias for alias in aliases if alias.endswith("/" + name)]
        assert named, name
        assert shape(ModelSpec.from_hf_config(name, config)) == shape(spec(named[0])), name


def test_configs_of_the_operator_package_are_what_the_catalogue_holds() -> None:
    names = {n.lower(): n for entry in ENTRIES.values() for n in (entry.name, *entry.aliases)}
    num_compared = 0
    for path in sorted((operator_package() / "model_configs").glob("*_config.json")):
        name = path.name.removesuffix("_config.json").replace("--", "/")
        if name.lower() in names:
            config = json.loads(path.read_text(encoding="utf-8"))
            assert shape(ModelSpec.from_hf_config(name, config)) == shape(spec(name)), name
            num_compared += 1
    assert num_compared > 20


def test_models_of_the_operator_packages_measurements_resolve_or_are_left_out() -> None:
    sample = operator_package() / "systems" / "silicon_sample.csv"
    for name in {row["model_path"] for row in rows(sample)} - left_out_ids():
        spec(name)
