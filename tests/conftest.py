"""Settings that every test shares: hypothesis draws the same examples on every run."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from mist.scenario import catalogue, nodes

settings.register_profile("repeatable", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("repeatable")


@pytest.fixture
def parsed_files(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How often each catalogue file is parsed from here on; nothing is remembered from before, or afterwards."""
    parsed: Counter[str] = Counter()
    parse = nodes.parse

    def counting(text: str, place: str) -> Any:
        parsed[place] += 1
        return parse(text, place)

    monkeypatch.setattr(catalogue, "parse", counting)
    caches = (catalogue._read, catalogue._catalogue, catalogue._index)
    for cache in caches:
        cache.cache_clear()
    yield parsed
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "trace.csv").write_text("at_s,prompt,answer\n0,10,5\n1.5,20,6\n3,30,7\n")
    config = {"model_type": "llama", "num_hidden_layers": 8, "hidden_size": 512, "num_attention_heads": 8,
              "num_key_value_heads": 4, "intermediate_size": 1024, "vocab_size": 32000,
              "max_position_embeddings": 4096}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "mamba.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    (tmp_path / "cut.json").write_text(json.dumps(config, indent=0)[:40])
    return tmp_path
