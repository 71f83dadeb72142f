"""By what a search knows a run again: whatever its figures depend on, and nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from mist import registry
from mist.scenario import catalogue, load
from mist.search.keys import contents_of, run_key

SCENARIO: dict[str, Any] = {
    "workload": {"arrivals": {"poisson": {"rate_per_s": 1}}, "num_requests": 10, "lengths": "azure-conversation"},
    "clients": {"gpu": {"device": "h100-sxm", "model": "llama-3.1-8b", "engine": "vllm-0.10"}},
}


@pytest.fixture
def changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Changes a file of the catalogue, in a copy."""
    copy = tmp_path / "mist"
    shutil.copytree(Path(catalogue.__file__).parent.parent / "data", copy / "data")
    cached = [catalogue._files, catalogue._read, catalogue._catalogue, catalogue._index, catalogue.digest]

    def forget() -> None:
        for each in cached:
            each.cache_clear()
        catalogue._built.clear()

    def change(file: str, old: str, new: str) -> None:
        path = copy / "data" / file
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new), encoding="utf-8")
        monkeypatch.setattr(catalogue, "files", lambda _: copy)
        forget()

    yield change
    monkeypatch.undo()
    forget()


def key_of(**overrides: Any) -> str:
    return run_key(load(SCENARIO).resolved(), overrides)


@pytest.mark.parametrize(
    ("file", "old", "new", "is_named"),
    [
        ("devices/h100-sxm.yaml", "memory_bytes: 80 GiB", "memory_bytes: 79 GiB", True),
        ("devices/l40s.yaml", "memory_bytes: 46068 MiB", "memory_bytes: 46000 MiB", False),
        ("prices/reference.yaml", "on_demand: 2.95", "on_demand: 2.96", True),
    ],
)
def test_entries_that_a_scenario_names_are_in_its_key(
    changed: Any, file: str, old: str, new: str, is_named: bool
) -> None:
    before = key_of()
    changed(file, old, new)
    assert (key_of() != before) is is_named


def test_names_of_a_resolved_scenario_are_found() -> None:
    found = contents_of(load(SCENARIO).resolved())
    assert set(found) >= {"h100-sxm", "meta-llama/Llama-3.1-8B", "vllm-0.10", "azure-conversation", "reference"}


def test_files_are_known_by_what_they_hold(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    for text in ("one", "two"):
        trace.write_text(text)
        found = contents_of({"workload": {"trace": str(trace)}})
        assert set(found) == {str(trace)}
        copy = tmp_path / f"{text}.csv"
        copy.write_text(text)
        assert contents_of({"a": [str(copy)]})[str(copy)] == found[str(trace)]
    assert contents_of({"workload": {"trace": str(tmp_path)}}) == {}


def test_overrides_and_plug_ins_are_in_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert key_of() == key_of()
    keys = {key_of(), key_of(seed=1), key_of(seed=2)}
    plugin = tmp_path / "plugin.py"
    monkeypatch.setattr(registry, "plugin_files", lambda: (str(plugin),))
    for text in ("a = 1", "a = 2"):
        plugin.write_text(text)
        keys.add(key_of())
    assert len(keys) == 5
