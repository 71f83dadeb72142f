"""A real `mist ui`: its processes, signals, and what other commands load of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import ui_page
from mist.cli import main
from mist.scenario.result import RESULT_FILES
from mist.ui.guard import HEADER
from processes import is_alive
from ui_page import LONG, ROOT, SCENARIO, until, workers_of

folder = ui_page.folder


@pytest.fixture
def served(folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    command = [sys.executable, "-c", "from mist.cli import main; main(prog_name='mist')", "ui", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    try:
        yield process, process.stdout.readline().decode().strip()
    finally:
        process.kill()
        process.wait()


def asked(address: str, path: str, body: Any = None) -> Any:
    headers = {HEADER: address.rstrip("/").rpartition("/")[2]}
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(address + path, data, headers)) as answer:
        return json.load(answer)


def listed(address: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = asked(address, "api/runs")["runs"]
    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_all_processes(
    served: tuple[subprocess.Popen[bytes], str], folder: Path, number: signal.Signals
) -> None:
    process, address = served
    assert address.startswith("http://127.0.0.1:")
    given = {"name": "tiny.yaml", "origin": "folder"}
    first = asked(address, "api/runs", {**given, "text": SCENARIO})["id"]
    asked(address, "api/runs", {**given, "text": LONG})
    until(lambda: any(run.get("total") == 2_000_000 for run in listed(address)), "a run that goes on")
    workers = workers_of(process.pid)
    assert len(workers) == 1
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, b"", b"Ctrl-C ends it.\n")
    assert not is_alive(workers[0])
    kept = folder / "out" / "ui"
    assert [path.name for path in kept.iterdir()] == [first]
    assert sorted(path.name for path in (kept / first).iterdir()) == sorted(RESULT_FILES)


def test_its_processes_end_even_if_it_is_killed(served: tuple[subprocess.Popen[bytes], str], folder: Path) -> None:
    process, address = served
    asked(address, "api/runs", {"name": "tiny.yaml", "origin": "folder", "text": LONG})
    until(lambda: listed(address)[0].get("total"), "progress")
    (worker,) = workers_of(process.pid)
    process.kill()
    until(lambda: not is_alive(worker), "the end of the worker")
    assert list((folder / "out" / "ui").iterdir()) == []


SWALLOWS = """\
import pathlib, time
pathlib.Path("loading").touch()
try:
    time.sleep(60)
except BaseException:
    raise ImportError
"""


@pytest.mark.parametrize("loading", [False, True])
def test_a_worker_ends_when_nobody_listens_any_more(tmp_path: Path, folder: Path, loading: bool) -> None:
    """While a library loads, too: native ones make other exceptions of what a signal raises meanwhile, or none."""
    (library := tmp_path / "library.py").write_text(SWALLOWS)
    plugins = [str(library)] if loading else []
    job = {"kind": "run", "text": LONG, "name": "a.yaml", "folder": str(folder), "out": str(folder / "out" / "a")}
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", "mist.ui.worker"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    assert process.stdin is not None
    try:
        process.stdin.write(json.dumps({**job, "plugins": plugins}).encode() + b"\n")
        process.stdin.flush()
        until(lambda: (tmp_path / "loading").exists() or not loading, "a library that loads")
        process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM
    assert not (folder / "out").exists()


def test_a_folder_or_a_port_that_can_not_be_used(
    served: tuple[subprocess.Popen[bytes], str], tmp_path: Path, folder: Path
) -> None:
    result = CliRunner().invoke(main, ["ui", str(tmp_path / "nothing")])
    assert (result.exit_code, "is no folder" in result.stderr) == (2, True)
    port = served[1].split(":")[2].partition("/")[0]
    result = CliRunner().invoke(main, ["ui", str(folder), "--port", port])
    assert (result.exit_code, f"port {port} can't be used" in result.stderr) == (2, True)


def test_other_commands_load_nothing_of_it(folder: Path) -> None:
    code = (
        "import sys; from mist.cli import main; main(['run', sys.argv[1]], standalone_mode=False);"
        "print(sorted(set(sys.modules) & {'starlette', 'uvicorn', 'anyio', 'asyncio', 'mist.ui'}), file=sys.stderr)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-c", code, str(folder / "tiny.yaml")]
    assert subprocess.run(command, env=environment, capture_output=True).stderr == b"[]\n"
