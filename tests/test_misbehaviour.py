"""Plug-ins that break their contract, and outputs that would destroy inputs: told by name, never a hang or a loss."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from kit import play, table
from mist import registry
from mist.batching.chunked import Chunked
from mist.cli import main
from mist.errors import InvariantError
from mist.request import Batch, ClientView, Request, Stage, Task, Wait


def policy(decide: Any) -> Any:
    class Odd(Chunked):
        def next_batch(self, queue: Any, cohort: Any, budget: Any, now: int) -> Any:
            return decide(queue, now)

    return Odd


def stranger() -> Task:
    return Task(Request(9, 0, 5, 1), Stage("prefill", 5), 0, 5, 0)


@pytest.mark.parametrize(
    ("decide", "says"),
    [
        (lambda queue, now: None, "Odd of gpu-0 returned None"),
        (lambda queue, now: Wait(now), "Odd of gpu-0 waits until 0 ns, and it is 0 ns already"),
        (lambda queue, now: Wait(now - 1), "waits until"),
        (lambda queue, now: Batch([], decode=True), "Odd of gpu-0 returned an empty batch"),
        (lambda queue, now: Batch([(stranger(), 5)], decode=False), "request 9 into a batch at 0 ns, which is not"),
    ],
)
def test_a_batching_policy_that_breaks_its_contract_is_named(decide: Any, says: str) -> None:
    with pytest.raises(InvariantError, match=says):
        play(table([0], [5], [1]), policy=policy(decide), ledger=False)


@pytest.mark.parametrize("choice", [None, 0, ClientView(1, "gpu-1")])
def test_a_router_that_breaks_its_contract_is_named(choice: Any) -> None:
    class Odd:
        def choose(self, task: Task, views: Any, now: int) -> Any:
            return choice

    with pytest.raises(InvariantError, match=r"Odd chose .* for request 0"):
        play(
            table([0], [5], [1]),
            num_clients=3,
            router=Odd(),
            serves=[("prefill", "decode"), ("other",), ("prefill", "decode")],
        )


SCENARIO = """\
workload: {trace: mine.csv, format: {columns: {arrival: arrival_s, time_unit: s}}}
clients: {gpu: {device: card.yaml, model: llama-3.1-8b}}
perf: roofline
"""
CARD = "{name: card, peak_tflops: {bf16: 900}, memory_bytes: 80 GiB, memory_bytes_per_s: 3 TB/s}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ("--trace", "scenario.yaml"),
        ("--trace", "mine.csv"),
        ("--trace", "card.yaml"),
        ("--out", "."),
        ("--out", "../here"),
    ],
)
def test_what_a_run_reads_is_never_written_over(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    files = {"scenario.yaml": SCENARIO, "mine.csv": "arrival_s,input_tokens,output_tokens\n0,5,2\n", "card.yaml": CARD}
    for name, text in files.items():
        (folder / name).write_text(text)
    result = CliRunner().invoke(main, ["run", "scenario.yaml", "--overwrite", *arguments])
    assert result.exit_code == 2, result.output
    assert {path.name: path.read_text() for path in folder.iterdir()} == files


def test_the_folder_of_the_scenario_is_no_place_for_results(tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("arrival_s,input_tokens,output_tokens\n0,5,2\n")
    (tmp_path / "card.yaml").write_text(CARD)
    scenario = tmp_path / "scenario.yaml"
    scenario.write_text(SCENARIO)
    result = CliRunner().invoke(main, ["run", str(scenario), "--out", str(tmp_path), "--overwrite"])
    assert result.exit_code == 2
    assert "this run reads it" in result.stderr
    assert scenario.read_text() == SCENARIO


class _Broken:
    name, value = "odd", "odd_plugin:register"

    def load(self) -> None:
        raise ImportError("no module named odd_plugin")


def test_an_installed_plugin_that_fails_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [_Broken()])
    monkeypatch.setattr(registry, "_imported", set())
    result = CliRunner().invoke(main, ["list", "policies"])
    assert result.exit_code == 2
    assert "the installed plug-in odd (odd_plugin:register) failed: ImportError: no module named" in result.stderr


def test_installed_plugins_serve_python_too(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    plugin = SimpleNamespace(name="mine", value="mine", load=lambda: loaded.append("mine"))
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [plugin])
    monkeypatch.setattr(registry, "_imported", set())
    registry.names("routing")
    registry.names("batching")
    assert loaded == ["mine"]
