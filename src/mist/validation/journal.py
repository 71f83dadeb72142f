"""The journal of an evaluation: a line of a file for each point that is done, so that a run that was killed goes on.

Beside the evaluation, which asks for what is known and adds what is new. A line counts only where the point, the
request list, the simulator and its catalogues are what they were; a line that was cut is run again. It never runs
anything.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import IO, Any

from mist.errors import Problem, ScenarioError
from mist.perf.measured import find_tables
from mist.validation.points import Point, request_list

#: what follows from validations, and changes nothing in them
_RESULTS = ("bands.yaml",)


def key_of(point: Point, folder: Path, *settings: Any) -> str:
    """What a point's outcome depends on, as a short text; `settings` are of the evaluation."""
    rows = [[(m.id, m.metric, m.value, m.trust) for m in which] for which in (point.measured, point.beside)]
    listed = _request_list(folder, point["workload_file"])
    parts = [_simulator(), dict(point.columns), rows, point.skipped, listed, *settings]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:24]


def read(path: Path) -> dict[str, Mapping[str, Any]]:
    """The lines of a journal by key; ScenarioError where `path` holds something else."""
    if not path.exists():
        return {}
    found: dict[str, Mapping[str, Any]] = {}
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for line in lines[:-1]:  # behind the last newline is nothing, or a line that was cut
        try:
            row = json.loads(line)
            found[row["key"]] = row
        except (ValueError, KeyError, TypeError):
            hint = "name another file; one that a validation wrote is continued"
            raise ScenarioError(Problem("is no journal of a validation", str(path), 1, 1, hint)) from None
    return found


@contextmanager
def appending(path: Path) -> Iterator[IO[str]]:
    """The journal, open for more lines; one that was cut is taken off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        whole = path.read_bytes().rfind(b"\n") + 1
        file.truncate(whole)
        yield file


def add(file: IO[str], key: str, row: Mapping[str, Any]) -> None:
    """Write a line, at once."""
    file.write(json.dumps({"key": key, **row}) + "\n")
    file.flush()


def _request_list(folder: Path, name: str) -> str:
    path = request_list(folder, name)
    return hashlib.sha256((folder / path).read_bytes()).hexdigest() if path is not None else ""


@functools.cache
def _simulator() -> str:
    """The program, its catalogues and the operator tables in use, as a short text."""
    found = hashlib.sha256(str(find_tables()).encode())
    for file in _files(files("mist")):
        found.update(file.name.encode() + file.read_bytes())
    return found.hexdigest()


def _files(folder: Traversable) -> Iterator[Traversable]:
    for entry in sorted(folder.iterdir(), key=lambda e: e.name):
        if entry.is_dir():
            yield from _files(entry)
        elif entry.name.endswith((".py", ".yaml")) and entry.name not in _RESULTS:
            yield entry
