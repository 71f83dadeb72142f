"""Runs of the local page, from the queue to the report, the comparison or the end."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from starlette.testclient import TestClient

import ui_page
from mist.cli import main
from mist.scenario import load
from mist.scenario.build import run as run_scenario
from mist.scenario.result import RESULT_FILES
from processes import is_alive
from ui_page import LONG, SCENARIO, checked, finished, page_of, runs, start, state, until, workers_of

folder, page = ui_page.folder, ui_page.page


def test_a_run_from_the_queue_to_its_report(folder: Path, page: TestClient) -> None:
    assert runs(page) == []
    run_id = start(page, label="First try: TP 1")
    assert run_id.endswith("-first-try-tp-1")
    run = finished(page, run_id)
    assert (run["state"], run["name"]) == ("done", "tiny")
    assert run["requests"] == "40 requests"
    assert len(run["cells"]) == 9
    assert run["slo"]["met"] == 1
    assert run["slo"]["missed"][0].startswith("E2E P99 ")
    place = folder / "out" / "ui" / run_id
    assert sorted(path.name for path in place.iterdir()) == sorted(RESULT_FILES)
    expected = run_scenario(load(folder / "tiny.yaml")).summary()
    summary = json.loads((place / "summary.json").read_text())
    for each in (expected, summary):
        del each["simulator"]["timing"]
    assert summary == expected
    report = page.get("report", params={"run": run_id})
    assert report.status_code == 200
    assert "connect-src" not in report.headers["Content-Security-Policy"]
    assert "default-src 'none'" in report.headers["Content-Security-Policy"]
    assert CliRunner().invoke(main, ["report", str(place)]).exit_code == 0
    assert (place / "report.html").read_text() == report.text
    with page_of(folder) as later:
        assert runs(later) == [run]


def test_slowdowns_among_the_objectives(page: TestClient) -> None:
    run = finished(page, start(page, SCENARIO.replace("ttft_s: {p99: 1}", "ttft_slowdown: {p99: 1.0001}")))
    assert sorted(missed.partition(" P99")[0] for missed in run["slo"]["missed"]) == ["E2E", "TTFT slowdown"]
    assert page.get("report", params={"run": run["id"]}).status_code == 200


def test_results_of_mist_run_are_runs(folder: Path, page: TestClient) -> None:
    out = folder / "out" / "ui" / "by-hand"
    assert CliRunner().invoke(main, ["run", str(folder / "tiny.yaml"), "--out", str(out)]).exit_code == 0
    assert [run["id"] for run in runs(page)] == ["by-hand"]
    summary = folder / "out" / "ui" / "small"
    given = ["run", str(folder / "tiny.yaml"), "--out", str(summary), "--records", "summary"]
    assert CliRunner().invoke(main, given).exit_code == 0
    assert [run["has_tables"] for run in runs(page)] == [False, True]
    assert page.get("report", params={"run": "small"}).status_code == 422
    (summary / "summary.json").write_text("{}")
    assert "can't be read" in state(page, "small")["problems"][0]["message"]


def test_two_runs_are_compared_or_told_why_not(page: TestClient) -> None:
    one = finished(page, start(page))["id"]
    other = finished(page, start(page, SCENARIO.replace("llama-3.1-8b,", "llama-3.1-8b, count: 2,")))["id"]
    found = page.get("api/differences", params={"run": [one, other]}).json()
    assert ["clients.gpu.count", 1, 2] in found
    compared = page.get("compare", params={"run": [one, other]})
    assert compared.status_code == 200
    assert f"Against {one}" in compared.text
    assert page.get("compare", params={"run": [one]}).status_code == 422
    third = finished(page, start(page, SCENARIO.replace("seed: 3", "seed: 4")))["id"]
    refused = page.get("compare", params={"run": [one, third]})
    assert refused.status_code == 422
    assert re.search("<pre>.*\n +seed +A: 3 +B: 4</pre>", refused.text)


@pytest.mark.parametrize("name", ["../mine", "..", ".", "", "nothing", "/", "a/../x", "<script>alert(1)</script>"])
def test_only_runs_have_reports(page: TestClient, name: str) -> None:
    for address in ("report", "compare"):
        answer = page.get(address, params={"run": [name, name]})
        assert answer.status_code == 422
        assert "<script>alert" not in answer.text
    assert page.get("api/differences", params={"run": [name, name]}).status_code == 422
    assert page.get("asked", params={"run": name}).status_code == 422
    assert page.post("api/cancel", json={"id": name}).status_code == 422


def test_a_bad_scenario_is_not_queued(folder: Path, page: TestClient) -> None:
    given = {"text": SCENARIO.replace("gpu:", "gpu"), "name": "tiny.yaml", "origin": "folder"}
    answer = page.post("api/runs", json=given)
    assert answer.status_code == 422
    assert answer.json()["problems"][0]["line"] == 9
    assert runs(page) == []


def test_what_only_a_run_can_find_is_told(folder: Path, page: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "broken.csv").write_text("at_s,prompt,answer\n0,10,5\n1,ten,5\n")
    workload = "workload: {trace: broken.csv, columns: {arrival: at_s, input_tokens: prompt, output_tokens: answer}}\n"
    text = "name: tiny\n" + workload + SCENARIO[SCENARIO.index("clients:") :]
    monkeypatch.setattr("mist.ui.checking.MAX_TRACE_BYTES", 0)  # as one too long to be read while somebody types
    assert checked(page, text)["problems"] == []
    run = finished(page, start(page, text))
    assert run["state"] == "failed"
    assert run["problems"][0]["file"].endswith("broken.csv")
    assert run["problems"][0]["line"] == 3
    monkeypatch.undo()
    assert checked(page, text)["problems"][0]["line"] == 3


def test_results_that_can_not_be_written_are_refused_before_they_are_made(folder: Path, page: TestClient) -> None:
    (folder / "out").write_text("a file")
    answer = page.post("api/runs", json={"text": SCENARIO, "name": "tiny.yaml", "origin": "folder"})
    assert answer.status_code == 422
    assert str(folder / "out") in answer.json()["problems"][0]["message"]
    assert runs(page) == []


def test_a_process_that_dies_is_told(page: TestClient, tmp_path: Path, folder: Path) -> None:
    plugin = tmp_path / "dies.py"
    plugin.write_text(
        "import sys\nprint('{noise')\nif 'mist.ui.worker' in sys.orig_argv: sys.exit('it was too much')\n"
    )
    with page_of(folder, plugins=[str(plugin)]) as other:
        run = finished(other, start(other))
    assert run["state"] == "failed"
    assert "it was too much" in run["problems"][0]["message"]


def test_one_at_a_time_and_cancelling_ends_the_process(folder: Path, page: TestClient) -> None:
    first, second = start(page, LONG, "first"), start(page, LONG, "second")
    until(lambda: state(page, first)["total"] == 2_000_000, "progress")
    assert state(page, second)["state"] == "queued"
    (process,) = workers_of(os.getpid())
    assert page.post("api/cancel", json={"id": first}).status_code == 200
    assert not is_alive(process)
    assert state(page, first)["state"] == "cancelled"
    until(lambda: state(page, second)["state"] == "running", "the next one")
    assert page.post("api/cancel", json={"id": second}).status_code == 200
    assert workers_of(os.getpid()) == []
    assert list((folder / "out" / "ui").iterdir()) == []


def test_several_at_a_time(folder: Path) -> None:
    with page_of(folder, workers=2) as page:
        both = start(page, LONG), start(page, LONG)
        until(lambda: all(state(page, each)["state"] == "running" for each in both), "both")
        assert both[0] != both[1]
    assert workers_of(os.getpid()) == []
