"""What the local page keeps of runs: names, the newest ones, failures; and how it is deleted, and nothing else is."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import shutil
import sys
import time
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from click.testing import CliRunner
from starlette.testclient import TestClient

import ui_page
from mist.cli import main
from mist.scenario import load
from mist.scenario.build import run as run_scenario
from mist.ui.results import Results
from ui_page import LONG, SCENARIO, finished, page_of, runs, start, state, until

folder, page = ui_page.folder, ui_page.page
PROBLEM = {"message": "it was too much", "file": "tiny.yaml", "line": 3, "column": 1, "here": True, "hint": "less"}


@pytest.fixture
def kept(folder: Path) -> Results:
    """An empty folder of results, below which failures stand for runs of either end."""
    (place := folder / "out" / "ui").mkdir(parents=True)
    return Results(place)


def keep(kept: Results, number: int, first: int = 0) -> list[str]:
    ids = [f"2026-03-01-{each:06d}-run" for each in range(first, first + number)]
    for each in ids:
        kept.keep_failure(each, "tiny.yaml", [PROBLEM], SCENARIO)
    return ids[::-1]


def delete(page: TestClient, run_id: str) -> httpx2.Response:
    return page.post("api/delete", json={"id": run_id})


def everything(place: Path) -> list[tuple[Path, bytes]]:
    return [(path, path.read_bytes() if path.is_file() else b"") for path in sorted(place.rglob("*"))]


# deleting


def test_a_result_is_deleted_whole_and_alone(folder: Path, page: TestClient) -> None:
    one, other = finished(page, start(page))["id"], finished(page, start(page, label="other"))["id"]
    assert CliRunner().invoke(main, ["report", str(folder / "out" / "ui" / one)]).exit_code == 0
    before = everything(folder / "out" / "ui" / other)
    assert delete(page, one).status_code == 200
    assert [run["id"] for run in runs(page)] == [other]
    assert [path.name for path in (folder / "out" / "ui").iterdir()] == [other]
    assert everything(folder / "out" / "ui" / other) == before
    assert delete(page, one).status_code == 422


def test_a_run_under_way_is_cancelled_before_it_is_deleted(folder: Path, page: TestClient) -> None:
    first, second = start(page, LONG, "first"), start(page, LONG, "second")
    until(lambda: state(page, first)["total"], "progress")
    for run_id, is_so in ((first, "running"), (second, "queued")):
        refused = delete(page, run_id)
        assert refused.status_code == 422
        assert refused.json()["problems"][0]["message"] == f"{run_id} is {is_so}"
        assert state(page, run_id)["state"] == is_so
    for run_id in (second, first):
        page.post("api/cancel", json={"id": run_id})
        assert delete(page, run_id).status_code == 200
    assert runs(page) == []


@pytest.mark.parametrize("name", ["", ".", "..", "../ui", "../../tiny.yaml", "{root}", "{root}/a", "a/../a", "a/",
                                  "a\0", "./a", ".hidden", "notes", "notes.txt", "A"])  # fmt: skip
def test_only_runs_are_deleted(folder: Path, page: TestClient, kept: Results, name: str) -> None:
    for each in ("a", ".hidden"):
        kept.keep_failure(each, "tiny.yaml", [PROBLEM], SCENARIO)
    (kept.root / "notes").mkdir()
    (kept.root / "notes.txt").write_text("mine")
    before = everything(folder.parent)
    refused = delete(page, name.format(root=kept.root))
    assert refused.status_code == 422
    assert "there is no run" in refused.json()["problems"][0]["message"]
    assert everything(folder.parent) == before


def test_a_link_is_deleted_and_not_what_it_leads_to(folder: Path, page: TestClient, kept: Results) -> None:
    elsewhere = Results(folder.parent / "elsewhere")
    elsewhere.root.mkdir()
    keep(elsewhere, 1)
    before = everything(elsewhere.root)
    (kept.root / "link").symlink_to(before[0][0], target_is_directory=True)
    assert delete(page, "link").status_code == 200
    assert list(kept.root.iterdir()) == []
    assert everything(elsewhere.root) == before


@pytest.mark.parametrize("name", ["notes.txt", "traces/a.csv", "steps.parquet/a.csv"])
def test_what_no_run_wrote_is_not_deleted(folder: Path, page: TestClient, kept: Results, name: str) -> None:
    (run_id,) = keep(kept, 1)
    (kept.root / run_id / name).parent.mkdir(exist_ok=True)
    (kept.root / run_id / name).write_text("mine")
    before = everything(folder)
    refused = delete(page, run_id)
    assert refused.status_code == 422
    assert f"holds {name.partition('/')[0]}, which no run wrote" in refused.json()["problems"][0]["message"]
    assert everything(folder) == before


def test_a_disk_that_refuses_leaves_a_run_whole(
    folder: Path, page: TestClient, kept: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run_id,) = keep(kept, 1)
    before = everything(folder)

    def busy(*_: Any) -> None:
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(Path, "rename", busy)
    refused = delete(page, run_id)
    assert refused.status_code == 422
    assert "resource busy" in refused.json()["problems"][0]["message"]
    assert everything(folder) == before


def test_a_timeline_of_the_run_is_deleted_with_it_whatever_its_name(folder: Path, page: TestClient) -> None:
    place = folder / "out" / "ui" / "by-hand"
    for options in (["--out", str(place)], ["--trace", str(place / "a.json")], ["--trace", str(place / "b.gz")]):
        assert CliRunner().invoke(main, ["run", str(folder / "tiny.yaml"), *options]).exit_code == 0
    assert {"a.json", "b.gz"} < {path.name for path in place.iterdir()}
    assert delete(page, "by-hand").status_code == 200
    assert list(place.parent.iterdir()) == []


TIMELINE = (
    b'{"displayTimeUnit": "ns",\n"otherData": {"scenario": "a \\" b", "simulator": "%s 1.0"},\n"traceEvents": []}'
)


@pytest.mark.parametrize("name", ["t.json", "t.json.gz"])
@pytest.mark.parametrize("content", [TIMELINE % b"other", b'{"traceEvents": []}', b"", b"\x1f\x8b", TIMELINE[:40]])
def test_a_timeline_of_something_else_is_not_deleted(
    page: TestClient, kept: Results, name: str, content: bytes
) -> None:
    (run_id,) = keep(kept, 1)
    (kept.root / run_id / name).write_bytes(gzip.compress(content) if name.endswith(".gz") and content else content)
    assert "which no run wrote" in delete(page, run_id).text
    (kept.root / run_id / name).write_bytes(content)
    assert "which no run wrote" in delete(page, run_id).text
    ours = TIMELINE % b"MIST"
    (kept.root / run_id / name).write_bytes(gzip.compress(ours) if name.endswith(".gz") else ours)
    assert delete(page, run_id).status_code == 200


def test_a_link_to_a_timeline_is_not_deleted(folder: Path, page: TestClient, kept: Results) -> None:
    (run_id,) = keep(kept, 1)
    (folder / "mine.json").write_bytes(TIMELINE % b"MIST")
    (kept.root / run_id / "link.json").symlink_to(folder / "mine.json")
    assert "holds link.json, which no run wrote" in delete(page, run_id).text


def test_what_one_run_has_begun_to_write_is_cleared_away_and_no_others(
    page: TestClient, kept: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[Path] = []

    async def killed(job: dict[str, Any], *_: Any) -> dict[str, Any]:
        out = Path(job["out"])
        for end in ("77", "1.77", "77.1", "2-3.77", "x.77"):
            (out.parent / f".{out.name}.{end}.partial").mkdir()
            begun.append(out.parent / f".{out.name}.{end}.partial")
        return {"problems": [PROBLEM]}

    monkeypatch.setattr("mist.ui.runs.answer", killed)
    finished(page, start(page, label="x-v1"))
    assert [path.exists() for path in begun] == [False, True, True, True, True]


def test_a_run_is_running_until_its_process_is_gone(
    folder: Path, page: TestClient, kept: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def lingering(job: dict[str, Any], *_: Any) -> dict[str, Any]:
        run_scenario(load(folder / "tiny.yaml")).write(job["out"])
        while not (folder / "go").exists():
            await asyncio.sleep(0.01)
        return {}

    monkeypatch.setattr("mist.ui.runs.answer", lingering)
    run_id = start(page)
    until(lambda: (kept.root / run_id).exists(), "the result")
    assert state(page, run_id)["state"] == "running"
    assert delete(page, run_id).json()["problems"][0]["message"] == f"{run_id} is running"
    (folder / "go").touch()
    assert finished(page, run_id)["requests"] == "40 requests"
    assert delete(page, run_id).status_code == 200


# what lies there and is no run's


ODD = {
    "cost": 5, "requests": [], "slo": {"targets": 3}, "throughput": "fast", "ttft_s": [1], "saturated": {"a": "\ud800"},
}  # fmt: skip


@pytest.mark.parametrize("key", [*ODD, "nested"])
def test_a_summary_that_makes_no_sense_costs_no_other_run_its_line(
    folder: Path, page: TestClient, kept: Results, key: str
) -> None:
    (other,) = keep(kept, 1)
    place = run_scenario(load(folder / "tiny.yaml")).write(kept.root / "odd")
    summary = json.loads((place / "summary.json").read_text())
    text = "[" * 200_000 if key == "nested" else json.dumps({**summary, key: ODD.get(key)})
    (place / "summary.json").write_text(text)
    found = {run["id"]: run for run in runs(page)}
    assert found.keys() == {other, "odd"}
    if key != "saturated":  # which is true or not, whatever it is
        assert "can't be read" in found["odd"]["problems"][0]["message"]


@pytest.mark.parametrize("problem", ['{"message": "a", "line": NaN}', '{"message": "\\ud800"}', '{"message": {}}'])
def test_a_failure_that_can_not_be_sent_costs_no_other_run_its_line(
    page: TestClient, kept: Results, problem: str
) -> None:
    ids = keep(kept, 2)
    (kept.root / ids[0] / "failure.json").write_text(f'{{"name": "a", "problems": [{problem}]}}')
    assert [run["id"] for run in runs(page)] == ids


@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "loop"])
def test_what_leads_out_of_a_folder_or_blocks_is_not_read(
    folder: Path, page: TestClient, kept: Results, kind: str
) -> None:
    (folder.parent / "secret.yaml").write_text("name: secret\n")
    for each in ("one", "other"):
        run_scenario(load(folder / "tiny.yaml")).write(kept.root / each)
    place = kept.root / "one" / "scenario.yaml"
    place.unlink()
    match kind:
        case "link":
            place.symlink_to(folder.parent / "secret.yaml")
        case "pipe":
            os.mkfifo(place)
        case "folder":
            place.mkdir()
        case "loop":
            place.symlink_to(place)
    found = {run["id"]: run for run in runs(page)}
    assert found["other"]["state"] == "done"
    assert "scenario.yaml of one is no file in its folder" in found["one"]["problems"][0]["message"]
    for path, given in (("asked", "one"), ("report", "one"), ("compare", ["one", "other"]),
                        ("api/differences", ["one", "other"])):  # fmt: skip
        refused = page.get(path, params={"run": given})
        assert refused.status_code == 422
        assert "no file in its folder" in refused.text
        assert "secret" not in refused.text


def test_links_within_a_folder_and_folders_that_are_links_are_read(folder: Path, page: TestClient) -> None:
    (place := folder / "out" / "ui").mkdir(parents=True)
    made = run_scenario(load(folder / "tiny.yaml")).write(folder / "elsewhere")
    (made / "scenario.yaml").rename(made / "mine.yaml")
    (made / "scenario.yaml").symlink_to("mine.yaml")
    (place / "one").symlink_to(made, target_is_directory=True)
    assert [run["state"] for run in runs(page)] == ["done"]
    assert page.get("asked", params={"run": "one"}).text == (made / "mine.yaml").read_text()


# the newest


def test_the_newest_are_listed_with_a_count(page: TestClient, kept: Results) -> None:
    ids = keep(kept, 60)
    found = page.get("api/runs").json()
    assert ([run["id"] for run in found["runs"]], found["count"]) == (ids[:50], 60)
    asked = page.get("api/runs", params={"limit": 3, "run": [ids[-1], ids[1], "nothing"]}).json()
    assert ([run["id"] for run in asked["runs"]], asked["count"]) == ([*ids[:3], ids[-1]], 60)
    assert len(page.get("api/runs", params={"limit": 100}).json()["runs"]) == 60
    size = len(page.get("api/runs").content)
    keep(kept, 200, first=60)
    assert len(page.get("api/runs").content) <= size + 1


def test_what_goes_on_is_always_listed(page: TestClient, kept: Results) -> None:
    first, second = start(page, LONG), start(page, LONG)
    until(lambda: page.get("api/runs", params={"limit": 2}).json()["runs"][1]["state"] == "running", "the first")
    assert [run["id"] for run in page.get("api/runs", params={"limit": 1}).json()["runs"]] == [second, first]
    assert [run["id"] for run in page.get("api/runs", params={"limit": 0}).json()["runs"]] == [first]


@pytest.mark.parametrize("limit", ["-1", "x", "", "1.5", "1" * 5000])
def test_a_limit_is_a_count(page: TestClient, limit: str) -> None:
    assert page.get("api/runs", params={"limit": limit}).status_code == 400


def test_results_of_any_name_are_listed_by_their_time(page: TestClient, kept: Results) -> None:
    for name, written in (("zero", "2026-03-01-000005"), ("apart", "2026-03-01-000007")):
        kept.keep_failure(name, "tiny.yaml", [PROBLEM], SCENARIO)
        at_s = time.mktime(time.strptime(written, "%Y-%m-%d-%H%M%S"))
        os.utime(kept.root / name / "failure.json", (at_s, at_s))
    dated = keep(kept, 10)
    assert [run["id"] for run in runs(page)] == [*dated[:3], "apart", *dated[3:5], "zero", *dated[5:]]


# failures


@pytest.fixture
def dying(folder: Path, tmp_path: Path) -> Iterator[TestClient]:
    """A page whose runs die."""
    plugin = tmp_path / "dies.py"
    plugin.write_text("import sys\nif 'mist.ui.worker' in sys.orig_argv: sys.exit('it was too much')\n")
    with page_of(folder, plugins=[str(plugin)]) as client:
        yield client


def test_a_failure_is_kept_with_what_was_asked(folder: Path, dying: TestClient) -> None:
    text = SCENARIO.replace("name: tiny", "name: größer # as typed")
    run = finished(dying, start(dying, text, label="too much"))
    assert (run["state"], run["name"]) == ("failed", "too much")
    with page_of(folder) as later:
        assert runs(later) == [run]
        assert "it was too much" in run["problems"][0]["message"]
        asked = later.get("asked", params={"run": run["id"]})
        assert (asked.text, asked.headers["Content-Type"]) == (text, "text/plain; charset=utf-8")
        place = folder / "out" / "ui" / run["id"]
        assert [path.name for path in place.parent.iterdir()] == [run["id"]]
        assert sorted(path.name for path in place.iterdir()) == ["failure.json", "scenario.yaml"]
        assert CliRunner().invoke(main, ["check", str(place / "scenario.yaml")]).exit_code == 0
        assert later.get("report", params={"run": run["id"]}).status_code == 422
        assert later.get("api/scenarios").json()["names"] == ["tiny.yaml"]
        assert delete(later, run["id"]).status_code == 200
        assert runs(later) == []
    assert runs(dying) == []


def test_a_failure_that_can_not_be_kept_is_told_until_the_end(
    folder: Path, dying: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "rename", full)
    run = finished(dying, start(dying))
    assert "it was too much" in run["problems"][0]["message"]
    assert list((folder / "out" / "ui").iterdir()) == []
    assert delete(dying, run["id"]).status_code == 200
    assert runs(dying) == []


@pytest.mark.parametrize("written", ["", "{", "[]", "{}", '{"name": "a", "problems": [1]}', '{"problems": []}'])
def test_a_failure_that_can_not_be_read_is_told(page: TestClient, kept: Results, written: str) -> None:
    (run_id,) = keep(kept, 1)
    (kept.root / run_id / "failure.json").write_text(written)
    (run,) = runs(page)
    assert run["state"] == "failed"
    assert "can't be read" in run["problems"][0]["message"]
    assert delete(page, run_id).status_code == 200


def test_a_run_whose_folder_is_gone_is_gone(folder: Path, dying: TestClient) -> None:
    run_id = finished(dying, start(dying))["id"]
    shutil.rmtree(folder / "out" / "ui" / run_id)
    assert runs(dying) == []


# names

LABELS = {
    "Größe 2": "größe-2", "Überlänge/Straße": "überlänge-straße", "推論 の 検証": "推論-の-検証", "тест.v2": "тест.v2",
    "हिन्दी": "हिन्दी", "e\u0301te\u0301": "été", "❤️ a": "a", "../../etc": "etc", "...": "run", "?#%&+ <b>": "b",
    "a\nb\\c": "a-b-c", "x" * 300: "x" * 40, "漢" * 300: "漢" * 40, "𐌰" * 300: "𐌰" * 30,
}  # fmt: skip


@pytest.mark.parametrize("label", LABELS)
def test_names_keep_the_letters_of_every_script(
    folder: Path, page: TestClient, label: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(*_: Any) -> dict[str, Any]:
        return {"problems": [PROBLEM]}

    monkeypatch.setattr("mist.ui.runs.answer", fails)
    run_id: str = finished(page, start(page, label=label))["id"]
    assert run_id[18:] == unicodedata.normalize("NFC", LABELS[label])
    assert len(run_id.encode()) <= 160
    assert [path.name for path in (folder / "out" / "ui").iterdir()] == [run_id]
    assert page.get("asked", params={"run": run_id}).text == SCENARIO
    assert delete(page, run_id).status_code == 200
    assert list((folder / "out" / "ui").iterdir()) == []


def test_a_name_of_any_script_has_a_report(page: TestClient) -> None:
    ids = [finished(page, start(page, label=label))["id"] for label in ("größe 1", "推論")]
    for run_id in ids:
        assert page.get("report", params={"run": run_id}).status_code == 200
    assert f"Against {ids[0]}" in page.get("compare", params={"run": ids}).text
    assert page.get("api/differences", params={"run": ids}).json() == []


def test_names_that_are_no_text_are_left_out(page: TestClient, kept: Results) -> None:
    keep(kept, 1)
    try:
        os.rename(os.fsencode(next(kept.root.iterdir())), os.fsencode(kept.root) + b"/caf\xe9")
    except OSError:
        pytest.skip("this disk refuses such names itself")
    assert runs(page) == []


def test_names_are_such_as_the_disk_can_have(page: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "latin-1")
    assert start(page, label="größe 推論")[18:] == "größe"
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    assert start(page, label="推論")[18:] == "run"
