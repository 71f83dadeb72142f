"""What is kept of runs: folders directly below one, each a result, or why a run failed and what it was asked.

Between `runs` and the disk. A result is a folder as `mist run --out` makes it; both kinds appear whole and leave whole,
so that a page started later finds them. It never deletes what no run wrote, nor anything elsewhere.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from mist.errors import Problem, ScenarioError
from mist.report.timeline import is_timeline
from mist.scenario.result import RESULT_FILES
from mist.search.outcome import PAGE
from mist.ui.figures import headline
from mist.ui.scenarios import is_text

DONE, FAILED = "done", "failed"
SUMMARY, FAILURE, SCENARIO = "summary.json", "failure.json", "scenario.yaml"
#: what is read of a run, and all that MIST puts into its folder by itself
_READ = (*RESULT_FILES, FAILURE)
_OURS = {*_READ, PAGE}
#: how ids begin, and runs are sorted
TIMES = "%Y-%m-%d-%H%M%S"
_DATED = re.compile(r"\d{4}-\d\d-\d\d-\d{6}-")
#: lines that are remembered, a kilobyte or so each
_REMEMBERED = 10_000


@dataclass(frozen=True, slots=True)
class Results:
    """Runs that are kept below `root`; a run's id is the name of its folder."""

    root: Path

    def ids(self) -> dict[str, str]:
        """id -> when it was asked for, or else written: texts that sort by time."""
        try:
            with os.scandir(self.root) as entries:
                shown = [each for each in entries if not each.name.startswith(".") and is_text(each.name)]
        except (FileNotFoundError, NotADirectoryError):
            return {}
        kept = {each.name: document for each in shown if (document := _document(each.path))}
        return {name: name if _DATED.match(name) else _written(document) for name, document in kept.items()}

    def line(self, run_id: str) -> dict[str, Any] | None:
        """What the page shows of a run; None if it is gone."""
        folder = self.root / run_id
        document = _document(str(folder))
        try:
            return _read(folder, os.path.basename(document), os.stat(document).st_mtime_ns) if document else None
        except OSError as error:
            return _unread(folder, error) if folder.exists() else None

    def folder(self, run_id: str) -> Path:
        """The folder of a run; ScenarioError unless it is one directly below the root."""
        if run_id not in self.ids():
            raise ScenarioError(Problem(f"there is no run {run_id!r:.100}", hint=f"results are in {self.root}"))
        return self.root / run_id

    def readable(self, run_id: str) -> Path:
        """The folder of a run, of which nothing that is read is a link to elsewhere or keeps its reader waiting."""
        folder = self.folder(run_id)
        for name in _READ:
            if os.path.lexists(folder / name):
                _own(folder, name)
        return folder

    def clear_away(self, run_id: str) -> None:
        """Delete what a run's process, now gone, had begun to write (`Result.write`), and no other's."""
        begun = re.compile(rf"\.{re.escape(run_id)}\.\d+\.partial")
        for half in self.root.glob(".*.partial"):
            if begun.fullmatch(half.name):
                shutil.rmtree(half, ignore_errors=True)

    def keep_failure(self, run_id: str, name: str, problems: Sequence[Mapping[str, Any]], text: str) -> None:
        """Keep why a run of the scenario `text` failed; OSError where it can't be written."""
        failure = {"schema_version": 1, "name": name, "problems": problems}
        with tempfile.TemporaryDirectory(prefix=f".{run_id}.", suffix=".partial", dir=self.root) as place:
            made = Path(place) / "run"
            made.mkdir()
            (made / SCENARIO).write_text(text, encoding="utf-8", newline="")
            (made / FAILURE).write_text(json.dumps(failure, indent=2) + "\n", encoding="utf-8")
            made.rename(self.root / run_id)

    def delete(self, run_id: str) -> None:
        """Delete a run's folder, which is gone at once; a link to one goes, and what it leads to stays.

        ScenarioError where other files are in it; OSError where the disk refuses.
        """
        folder = self.folder(run_id)
        others = sorted(each.name for each in folder.iterdir() if not _is_ours(each))
        if others:
            told = f"{run_id} holds {others[0]}, which no run wrote"
            raise ScenarioError(Problem(told, hint=f"move it away, or delete {folder} yourself"))
        with tempfile.TemporaryDirectory(prefix=f".{run_id}.", suffix=".partial", dir=self.root) as place:
            folder.rename(Path(place) / "run")


def _own(folder: Path, name: str) -> Path:
    """The path of a file in a run's folder; ScenarioError where it leads elsewhere, or is no file."""
    actual = os.path.realpath(folder / name)
    if os.path.dirname(actual) != os.path.realpath(folder) or not os.path.isfile(actual):
        told = f"{name} of {folder.name} is no file in its folder"
        raise ScenarioError(Problem(told, hint="links to elsewhere, pipes and the like aren't read"))
    return folder / name


def _is_ours(path: Path) -> bool:
    """Whether MIST wrote it: files by their names, and timelines, which are called as a user likes."""
    if path.name in _OURS:
        return not path.is_dir()
    return path.is_file() and not path.is_symlink() and is_timeline(path)


def _document(folder: str) -> str:
    """The path of the file that tells of the run, "" where there is none."""
    paths = (os.path.join(folder, name) for name in (SUMMARY, FAILURE))
    return next((path for path in paths if os.path.isfile(path)), "")


def _written(document: str) -> str:
    try:
        return time.strftime(TIMES, time.localtime(os.path.getmtime(document)))
    except OSError:  # it is gone by now
        return ""


@lru_cache(maxsize=_REMEMBERED)
def _read(folder: Path, document: str, written_ns: int) -> dict[str, Any]:
    """A run's line; `written_ns` makes one that was written anew be read anew."""
    try:
        found = json.loads(_own(folder, document).read_text(encoding="utf-8"))
        line = _failure(folder, found) if document == FAILURE else _result(folder, found)
        json.dumps(line, ensure_ascii=False, allow_nan=False).encode()  # what can't be sent can't be read
        return line
    except Exception as error:  # any document may lie there, and one that makes no sense costs no other its line
        return _unread(folder, error)


def _failure(folder: Path, found: Mapping[str, Any]) -> dict[str, Any]:
    problems = [{**each, "message": str(each["message"])} for each in found["problems"]]
    return {"id": folder.name, "name": str(found["name"]), "state": FAILED, "problems": problems,
            "has_scenario": (folder / SCENARIO).is_file()}  # fmt: skip


def _result(folder: Path, found: Mapping[str, Any]) -> dict[str, Any]:
    name = re.search(r"^name: (.*)", _own(folder, SCENARIO).read_text(encoding="utf-8"), re.MULTILINE)
    has_tables = (folder / "requests.parquet").is_file()
    told = str(yaml.safe_load(name[1])) if name else folder.name
    return {"id": folder.name, "name": told, "state": DONE, "has_tables": has_tables, **headline(found)}


def _unread(folder: Path, error: Exception) -> dict[str, Any]:
    problem = {"message": f"the result can't be read: {error}", "hint": "another version may have written it"}
    return {"id": folder.name, "name": folder.name, "state": FAILED, "problems": [problem]}
