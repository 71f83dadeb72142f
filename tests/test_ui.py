"""The local page: who may ask, what is opened and saved, answers while one types, runs from queue to report, the end.

Through the application's test client; the last part with a real `mist ui`, its processes and its signals.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from starlette.testclient import TestClient

from mist.cli import main
from mist.scenario import load
from mist.scenario.build import run as run_scenario
from mist.scenario.result import RESULT_FILES
from mist.ui.app import application
from mist.ui.guard import HEADER
from mist.ui.scenarios import Scenarios, example_names

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
    found: list[dict[str, Any]] = page.get("api/runs").json()
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


# who may ask


ADDRESSES = ("", "ui.js", "report.css", "api/scenarios", "api/scenario?name=tiny.yaml", "api/runs", "report?run=x")


@pytest.mark.parametrize("address", ADDRESSES)
def test_every_address_needs_the_token(page: TestClient, address: str) -> None:
    assert page.get(address).status_code != 403
    for token in ("", "/wrong", f"/{TOKEN[:-1]}", f"/{TOKEN}x", f"//x/{TOKEN}", "/%C3%A4"):
        answer = page.get(f"http://127.0.0.1:8000{token}/{address}")
        assert answer.status_code == 403
        assert TOKEN not in answer.text


@pytest.mark.parametrize("address", ["api/check", "api/save", "api/runs", "api/cancel"])
@pytest.mark.parametrize("token", ["", "wrong", TOKEN[:-1], "ä"])
def test_what_changes_something_needs_it_in_a_header(page: TestClient, address: str, token: str) -> None:
    headers = {HEADER: token.encode()}
    assert page.post(address, json={}, headers=headers).status_code == 403
    assert page.post(address, json={}).status_code != 403


def test_nothing_is_changed_by_getting(page: TestClient) -> None:
    for address in ("api/check", "api/save", "api/cancel"):
        assert page.get(address).status_code == 405


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", ""])
def test_other_host_names_are_refused(page: TestClient, host: str) -> None:
    assert page.get("api/runs", headers={"Host": host}).status_code == 400
    for known in ("127.0.0.1:1", "localhost:8000", "localhost"):
        assert page.get("api/runs", headers={"Host": known}).status_code == 200


def test_browsers_are_told_to_fetch_nothing_else(page: TestClient) -> None:
    answer = page.get("")
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert answer.headers["Referrer-Policy"] == "no-referrer"
    assert answer.headers["Cache-Control"] == "no-store"
    assert "access-control-allow-origin" not in answer.headers


def test_the_page_loads_only_what_ships(page: TestClient) -> None:
    for name in ("", "ui.js", "editor.js", "theme.js", "ui.css", "icon.svg", "report.css"):
        text = page.get(name).text
        assert "https:" not in text
        assert "http:" not in text.replace("http://www.w3.org/2000/svg", "")
        assert "innerHTML" not in text
    assert page.get("ui.js").headers["Content-Type"].startswith("text/javascript")


def test_a_link_without_its_slash_leads_to_the_page(page: TestClient) -> None:
    answer = page.get(f"http://127.0.0.1:8000/{TOKEN}")
    assert answer.url.path == f"/{TOKEN}/"
    assert answer.status_code == 200


# scenarios


def test_lists_scenarios_and_nothing_else(folder: Path, page: TestClient) -> None:
    (folder / "deep").mkdir()
    (folder / "deep" / "other.yml").write_text(SCENARIO)
    (folder / "device.yaml").write_text("name: not a scenario\n")
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "no.yaml").write_text(SCENARIO)
    (folder / "link.yaml").symlink_to(folder.parent / "secret.yaml")
    result = folder / "result"
    result.mkdir()
    for name in ("summary.json", "scenario.yaml"):
        (result / name).write_text(SCENARIO)
    found = page.get("api/scenarios").json()
    assert found["names"] == ["deep/other.yml", "tiny.yaml"]
    assert found["folder"] == str(folder.resolve())


def test_the_examples_that_ship_can_be_opened(page: TestClient) -> None:
    assert "demo.yaml" in page.get("api/scenarios").json()["examples"] == example_names()
    for name in example_names():
        text = page.get("api/scenario", params={"origin": "example", "name": name}).json()["text"]
        assert text == (ROOT / "examples" / name).read_text()


OUTSIDE = ("../secret.yaml", "/etc/passwd.yaml", "deep/../../secret.yaml", ".hidden.yaml", ".git/x.yaml", "a\0.yaml",
           "", "x/.y/z.yaml", "link.yaml", "through/secret.yaml")  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE)
def test_nothing_outside_the_folder_is_opened_or_written(folder: Path, page: TestClient, name: str) -> None:
    (folder / "link.yaml").symlink_to(folder.parent / "secret.yaml")
    (folder / "through").symlink_to(folder.parent)
    before = sorted(folder.parent.rglob("*"))
    assert page.get("api/scenario", params={"name": name}).status_code == 422
    assert page.get("api/scenario", params={"name": name, "origin": "example"}).status_code == 422
    for opened in ("", "x" * 64):
        answer = page.post("api/save", json={"name": name, "text": "gone", "opened": opened})
        assert answer.status_code == 422
        assert "problems" in answer.json()
    assert sorted(folder.parent.rglob("*")) == before
    assert (folder.parent / "secret.yaml").read_text() == SCENARIO


@pytest.mark.parametrize("name", ["tiny.txt", "tiny", "out/ui/earlier/scenario.yaml"])
def test_only_scenarios_are_written_and_never_among_results(folder: Path, page: TestClient, name: str) -> None:
    (folder / "out" / "ui" / "earlier").mkdir(parents=True)
    assert page.post("api/save", json={"name": name, "text": "x", "opened": ""}).status_code == 422
    assert not (folder / name).exists()


def test_saves_what_was_opened(folder: Path, page: TestClient) -> None:
    (folder / "tiny.yaml").chmod(0o640)
    opened = page.get("api/scenario", params={"name": "tiny.yaml"}).json()
    assert opened["text"] == SCENARIO
    saved = page.post("api/save", json={"name": "tiny.yaml", "text": "a: ä\n", "opened": opened["digest"]}).json()
    assert (folder / "tiny.yaml").read_text(encoding="utf-8") == "a: ä\n"
    assert (folder / "tiny.yaml").stat().st_mode & 0o777 == 0o640
    again = {"name": "tiny.yaml", "text": "b: 1\n", "opened": saved["digest"]}
    assert page.post("api/save", json=again).status_code == 200
    assert [path.name for path in folder.iterdir()] == ["tiny.yaml"]


def test_never_writes_over_what_has_changed_on_disk(folder: Path, page: TestClient) -> None:
    opened = page.get("api/scenario", params={"name": "tiny.yaml"}).json()["digest"]
    (folder / "tiny.yaml").write_text("somebody else's\n")
    answer = page.post("api/save", json={"name": "tiny.yaml", "text": "mine", "opened": opened})
    assert answer.status_code == 409
    assert answer.json() == {"conflict": "tiny.yaml has changed on disk"}
    new = page.post("api/save", json={"name": "tiny.yaml", "text": "mine", "opened": ""})
    assert (new.status_code, new.json()["conflict"]) == (409, "tiny.yaml is there already")
    assert (folder / "tiny.yaml").read_text() == "somebody else's\n"
    (folder / "tiny.yaml").unlink()
    assert page.post("api/save", json={"name": "tiny.yaml", "text": "mine", "opened": opened}).status_code == 409
    assert list(folder.iterdir()) == []


def test_makes_new_files_and_their_folders(folder: Path, page: TestClient) -> None:
    assert page.post("api/save", json={"name": "a/b/new.yaml", "text": SCENARIO, "opened": ""}).status_code == 200
    assert (folder / "a" / "b" / "new.yaml").read_text() == SCENARIO
    assert "a/b/new.yaml" in page.get("api/scenarios").json()["names"]


def test_keeps_line_ends_of_a_file(folder: Path, page: TestClient) -> None:
    (folder / "tiny.yaml").write_bytes(b"a: 1\r\nb: 2\r\n")
    digest = page.get("api/scenario", params={"name": "tiny.yaml"}).json()["digest"]
    saved = page.post("api/save", json={"name": "tiny.yaml", "text": "a: 1\nb: 3\n", "opened": digest}).json()
    assert (folder / "tiny.yaml").read_bytes() == b"a: 1\r\nb: 3\r\n"
    assert saved["digest"] == page.get("api/scenario", params={"name": "tiny.yaml"}).json()["digest"]


def test_a_disk_that_refuses_is_told(folder: Path, page: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = page.get("api/scenario", params={"name": "tiny.yaml"}).json()["digest"]

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mist.ui.scenarios.os.replace", full)
    answer = page.post("api/save", json={"name": "tiny.yaml", "text": "x", "opened": opened})
    assert answer.status_code == 422
    assert "No space left" in answer.json()["problems"][0]["message"]
    assert (folder / "tiny.yaml").read_text() == SCENARIO
    assert [path.name for path in folder.iterdir()] == ["tiny.yaml"]


# as one types


def checked(page: TestClient, text: str) -> dict[str, Any]:
    answer = page.post("api/check", json={"text": text, "name": "tiny.yaml", "origin": "folder"})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_says_of_a_text_what_check_says_of_a_file(folder: Path, page: TestClient) -> None:
    told = CliRunner().invoke(main, ["check", str(folder / "tiny.yaml")])
    assert told.exit_code == 0
    assert checked(page, SCENARIO) == {"problems": [], "lines": told.stdout.splitlines()}


def test_problems_have_their_line_and_column(page: TestClient) -> None:
    text = SCENARIO.replace("num_requests: 40", "num_requests: -4").replace("h100-sxm", "h100-smx")
    first, second = checked(page, text)["problems"]
    assert (first["line"], first["column"], first["here"]) == (5, 17, True)
    assert "num_requests" in first["message"]
    assert (second["line"], second["column"]) == (9, 17)
    assert "h100-sxm" in second["hint"]


@pytest.mark.parametrize(
    "text", ["", "a: [", "\t", "clients: {<<: *x}", "a: 1\n---\nb: 2", "a: &a [*a, *a]", "x" * 4_000_001]
)
def test_any_text_gets_an_answer(page: TestClient, text: str) -> None:
    answer = page.post("api/check", content=json.dumps({"text": text, "name": "tiny.yaml"}))
    assert answer.status_code == 200, answer.text
    assert answer.json()["problems"]


def test_files_beside_the_scenario_are_found(folder: Path, page: TestClient) -> None:
    (folder / "mine.yaml").write_text("name: mine\n")
    text = SCENARIO.replace("h100-sxm", "mine.yaml")
    problems = checked(page, text)["problems"]
    assert any("mine.yaml" in each["file"] and not each["here"] for each in problems)


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"text": 1}', b"\xff", rb'{"text": "\ud800"}', b"[" * 100_000])
def test_requests_that_make_no_sense(page: TestClient, body: bytes) -> None:
    assert page.post("api/check", content=body).status_code == 400


def test_a_request_has_a_size(page: TestClient) -> None:
    assert page.post("api/check", content=b"x" * 30_000_000).status_code == 413


# runs


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
    assert "seed is 3" in refused.text


@pytest.mark.parametrize("name", ["../mine", "..", ".", "", "nothing", "/", "a/../x", "<script>alert(1)</script>"])
def test_only_runs_have_reports(page: TestClient, name: str) -> None:
    for address in ("report", "compare"):
        answer = page.get(address, params={"run": [name, name]})
        assert answer.status_code == 422
        assert "<script>alert" not in answer.text
    assert page.get("api/differences", params={"run": [name, name]}).status_code == 422
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
    assert list((folder / "out" / "ui").iterdir()) == []


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


# a real one


def workers_of(pid: int) -> list[int]:
    """Processes below `pid` that run a job."""
    if not Path("/proc/self/stat").exists():
        pytest.skip("no /proc here: children can't be counted")
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((place / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == pid and b"mist.ui.worker" in (place / "cmdline").read_bytes():
                found.append(int(place.name))
        except (OSError, ValueError):  # it ended meanwhile
            continue
    return found


def is_alive(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_all_processes(
    served: tuple[subprocess.Popen[bytes], str], folder: Path, number: signal.Signals
) -> None:
    process, address = served
    assert address.startswith("http://127.0.0.1:")
    given = {"name": "tiny.yaml", "origin": "folder"}
    first = asked(address, "api/runs", {**given, "text": SCENARIO})["id"]
    asked(address, "api/runs", {**given, "text": LONG})
    until(lambda: any(run.get("total") == 2_000_000 for run in asked(address, "api/runs")), "a run that goes on")
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
    until(lambda: asked(address, "api/runs")[0].get("total"), "progress")
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
