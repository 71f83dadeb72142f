"""The JSON Schema of scenarios: it takes what is valid, refuses what is wrong, and describes every key."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from mist import registry
from mist.scenario import load
from mist.scenario.memory import Memory
from mist.scenario.schema import json_schema
from scenarios import LARGE, SMALL, TRACED, read

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.yaml"))


def schema_errors(schema: dict[str, Any], value: Any, root: dict[str, Any] | None = None) -> Iterator[str]:
    """What JSON Schema (the keywords that the scenario's schema uses) finds wrong with `value`."""
    root = schema if root is None else root
    unknown = set(schema) - KEYWORDS
    assert not unknown, unknown
    if "$ref" in schema:
        target: Any = root
        for part in schema["$ref"].removeprefix("#/").split("/"):
            target = target[part]
        yield from schema_errors(target, value, root)
    if "anyOf" in schema and all(any(schema_errors(s, value, root)) for s in schema["anyOf"]):
        yield f"{value!r} is none of {schema['anyOf']}"
    if "not" in schema and not any(schema_errors(schema["not"], value, root)):
        yield f"{value!r} is not to be {schema['not']}"
    if "enum" in schema and value not in schema["enum"]:
        yield f"{value!r} is not in {schema['enum']}"
    if "type" in schema and not isinstance(value, TYPES[schema["type"]]):
        yield f"{value!r} is no {schema['type']}"
    if isinstance(value, int | float):
        low, above = schema.get("minimum", -math.inf), schema.get("exclusiveMinimum", -math.inf)
        if value < low or value <= above or value > schema.get("maximum", math.inf):
            yield f"{value} is out of range"
    if isinstance(value, str) and "pattern" in schema and not re.search(schema["pattern"], value):
        yield f"{value!r} is not like {schema['pattern']}"
    if isinstance(value, list):
        if len(value) < schema.get("minItems", 0):
            yield "too few items"
        for item in value:
            yield from schema_errors(schema.get("items", {}), item, root)
    if isinstance(value, dict):
        yield from object_errors(schema, value, root)


def object_errors(schema: dict[str, Any], value: dict[str, Any], root: dict[str, Any]) -> Iterator[str]:
    yield from (f"{key!r} is missing" for key in schema.get("required", ()) if key not in value)
    rest = schema.get("additionalProperties", True)
    for key, inner in value.items():
        if key in schema.get("properties", {}):
            yield from schema_errors(schema["properties"][key], inner, root)
        elif rest is False:
            yield f"{key!r} is unknown"
        elif isinstance(rest, dict):
            yield from schema_errors(rest, inner, root)


TYPES: dict[str, Any] = {"object": dict, "array": list, "string": str, "number": int | float, "integer": int,
                         "boolean": bool, "null": type(None)}  # fmt: skip
KEYWORDS = {"$schema", "$defs", "$ref", "title", "description", "default", "anyOf", "not", "enum", "type", "minimum",
            "maximum", "exclusiveMinimum", "exclusiveMaximum", "minLength", "maxLength", "pattern", "items",
            "minItems", "maxItems", "prefixItems", "properties", "propertyNames", "minProperties", "required",
            "additionalProperties"}  # fmt: skip


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_examples_are_valid(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sections = yaml.safe_load(path.read_text())
    if trace := sections.get("workload", {}).get("trace"):
        monkeypatch.setenv("MIST_DATA", str(tmp_path))
        (tmp_path / trace).parent.mkdir(parents=True)
        (tmp_path / trace).touch()
    load(path)
    assert not list(schema_errors(json_schema(), sections))


@pytest.mark.parametrize("text", [SMALL, LARGE, TRACED], ids=["small", "large", "traced"])
def test_schema_takes_what_is_valid_and_its_resolved_form(folder: Path, text: str) -> None:
    schema = json_schema()
    assert list(schema_errors(schema, yaml.safe_load(text))) == []
    assert list(schema_errors(schema, read(folder, text).resolved())) == []


@pytest.mark.parametrize(
    "change",
    [
        {"sede": 1},
        {"seed": -1},
        {"seed": "x"},
        {"workload": {"arrivals": "poison"}},
        {"workload": {"arrivals": {"poisson": {"rate": 1}}}},
        {"clients": {"gpu": {"device": "h100-sxm"}}},
        {"clients": {"gpu": {"device": "h100-sxm", "model": "m", "batching": {"chunked": {"max_num_seqs": "x"}}}}},
        {"routing": {"prefill": "robin"}},
        {"slo": {"ttft": {"p99": 1}}},
    ],
)
def test_schema_refuses_what_is_wrong(change: dict[str, Any]) -> None:
    assert list(schema_errors(json_schema(), {**yaml.safe_load(SMALL), **change}))


def test_schema_describes_every_key_and_names_every_policy() -> None:
    schema = json_schema()
    text = json.dumps([schema, Memory.model_json_schema()])
    for kind in registry.HOMES.keys() - {"executor"}:  # of which no scenario has any
        for name in registry.names(kind):
            assert f'"{name}"' in text, name
    for section in ("Workload", "Pool", "KVSettings", "Slo"):
        for key, entry in schema["$defs"][section]["properties"].items():
            assert entry.get("description"), f"{section}.{key}"
