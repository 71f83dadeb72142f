"""What tests of the local page share: a folder with a scenario, the page over it, and its runs and processes.

Through the application's test client. Test files take the fixtures as `folder, page = ui_page.folder, ui_page.page`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from mist.ui.app import application
from mist.ui.guard import HEADER
from mist.ui.scenarios import Scenarios
from processes import PROC, parents

ROOT = Path(__file__).parent.parent
TOKEN = "a-token-for-tests"
SCENARIO = """\
name: tiny
seed: 3
workload:
  arrivals: {poisson: {rate_per_s: 4}}
  num_requests: 40
  input_tokens: 300
  output_tokens: 20
clients:
  gpu: {device: h100-sxm, model: llama-3.1-8b, perf: roofline}
slo: {ttft_s: {p99: 1}, e2e_s: {p99: 0.000001}}
"""
#: minutes of work
LONG = SCENARIO.replace("num_requests: 40", "num_requests: 2000000")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "mine"
    place.mkdir()
    (place / "tiny.yaml").write_text(SCENARIO)
    (tmp_path / "secret.yaml").write_text(SCENARIO)
    return place


def page_of(folder: Path, **options: Any) -> TestClient:
    app = application(Scenarios(folder.resolve(), folder.resolve() / "out" / "ui"), TOKEN, **options)
    return TestClient(app, base_url=f"http://127.0.0.1:8000/{TOKEN}/", headers={HEADER: TOKEN})


@pytest.fixture
def page(folder: Path) -> Iterator[TestClient]:
    with page_of(folder) as client:
        yield client


def until(true: Callable[[], Any], what: str) -> Any:
    """Polls; the limit only keeps a hanging test from hanging for ever."""
    for _ in range(1200):
        if found := true():
            return found
        time.sleep(0.05)
    raise AssertionError(f"{what} never came")


def runs(page: TestClient) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = page.get("api/runs").json()["runs"]
    return found


def start(page: TestClient, text: str = SCENARIO, label: str = "") -> str:
    answer = page.post("api/runs", json={"text": text, "name": "tiny.yaml", "origin": "folder", "label": label})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def state(page: TestClient, run_id: str) -> dict[str, Any]:
    return next(run for run in runs(page) if run["id"] == run_id)


def finished(page: TestClient, run_id: str) -> dict[str, Any]:
    def ended() -> dict[str, Any] | None:
        run = state(page, run_id)
        return run if run["state"] not in ("queued", "running") else None

    run: dict[str, Any] = until(ended, "the end of a run")
    return run


def checked(page: TestClient, text: str) -> dict[str, Any]:
    answer = page.post("api/check", json={"text": text, "name": "tiny.yaml", "origin": "folder"})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def workers_of(pid: int) -> list[int]:
    """Processes below `pid` that run a job."""
    return [each for each, parent in parents().items() if parent == pid and _is_worker(each)]


def _is_worker(pid: int) -> bool:
    try:
        return b"mist.ui.worker" in (PROC / str(pid) / "cmdline").read_bytes()
    except OSError:  # it ended meanwhile
        return False
