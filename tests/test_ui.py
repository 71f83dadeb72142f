"""The local page: who may ask, what is opened and saved, answers while one types."""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from starlette.testclient import TestClient

import ui_page
from mist.cli import main
from mist.ui.guard import HEADER
from mist.ui.scenarios import example_names
from ui_page import ROOT, SCENARIO, TOKEN, checked

folder, page = ui_page.folder, ui_page.page

# who may ask


ADDRESSES = ("", "ui.js", "report.css", "api/scenarios", "api/scenario?name=tiny.yaml", "api/runs", "report?run=x",
             "asked?run=x")  # fmt: skip


@pytest.mark.parametrize("address", ADDRESSES)
def test_every_address_needs_the_token(page: TestClient, address: str) -> None:
    assert page.get(address).status_code != 403
    for token in ("", "/wrong", f"/{TOKEN[:-1]}", f"/{TOKEN}x", f"//x/{TOKEN}", "/%C3%A4"):
        answer = page.get(f"http://127.0.0.1:8000{token}/{address}")
        assert answer.status_code == 403
        assert TOKEN not in answer.text


@pytest.mark.parametrize("address", ["api/check", "api/save", "api/runs", "api/cancel", "api/delete"])
@pytest.mark.parametrize("token", ["", "wrong", TOKEN[:-1], "ä"])
def test_what_changes_something_needs_it_in_a_header(page: TestClient, address: str, token: str) -> None:
    headers = {HEADER: token.encode()}
    assert page.post(address, json={}, headers=headers).status_code == 403
    assert page.post(address, json={}).status_code != 403


def test_nothing_is_changed_by_getting(page: TestClient) -> None:
    for address in ("api/check", "api/save", "api/cancel", "api/delete"):
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


def test_the_script_finds_what_it_looks_for(page: TestClient) -> None:
    document, script = page.get("").text, page.get("ui.js").text
    assert set(re.findall(r'\bat\("([\w-]+)"\)', script)) <= set(re.findall(r'\bid="([\w-]+)"', document))
    for address in set(re.findall(r'\bask\(["`]([\w/]+)', script)):
        assert page.get(address).status_code != 404


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
    with suppress(OSError):  # of a disk that refuses such names itself
        Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.yaml")).write_text(SCENARIO)
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
