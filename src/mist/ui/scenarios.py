"""The scenarios that the page shows and saves: YAML files of one folder, and the examples that ship.

Between the file system and the page's requests. It never writes outside its folder, nor over a file that has changed
since it was opened, nor among results.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import mist
from mist.errors import Problem, ScenarioError
from mist.scenario.source import MAX_BYTES, read_text

#: folders below the given one that are looked into, and scenarios that are listed
MAX_DEPTH, MAX_LISTED = 3, 300
#: what tells a scenario from other YAML
_CLIENTS = re.compile(rb"""^["']?clients["']?\s*:""", re.MULTILINE)
_HALF = re.compile("[\ud800-\udfff]")
_SUFFIXES = (".yaml", ".yml")


class ConflictError(Exception):
    """The file isn't what it was when it was opened; saving would lose what somebody else wrote."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A file's text and the digest of its bytes."""

    text: str
    digest: str


@dataclass(frozen=True, slots=True)
class Scenarios:
    """Scenarios of `folder`; what is below `runs` are results."""

    folder: Path
    runs: Path

    def names(self) -> list[str]:
        """Paths of the scenarios, relative to the folder."""
        found = [path.relative_to(self.folder).as_posix() for path in _scenarios(self.folder, self.runs)]
        return sorted(name for name in found[:MAX_LISTED] if is_text(name))

    def path(self, name: str, *, is_example: bool = False) -> Path:
        """Where a scenario is, or would be; ScenarioError for places that are none of the page's."""
        folder = _examples() if is_example else self.folder
        path = (folder / name).resolve() if "\0" not in name else folder
        hidden = any(part.startswith(".") for part in Path(name).parts)
        if not name or Path(name).is_absolute() or not path.is_relative_to(folder) or hidden:
            raise ScenarioError(Problem(f"{name!r:.200} is not below the folder of this page", hint=f"it is {folder}"))
        if path.suffix not in _SUFFIXES:
            raise ScenarioError(Problem(f"{name} is not the name of a scenario", hint=f"try {Path(name).stem}.yaml"))
        if path.is_relative_to(self.runs):
            raise ScenarioError(Problem(f"{name} is among the results", hint="save it elsewhere"))
        return path

    def open(self, name: str, *, is_example: bool = False) -> Opened:
        """The scenario's text; ScenarioError where it can't be read."""
        path = self.path(name, is_example=is_example)
        digest = _digest(path)  # of what was there before the text: a change in between is a conflict later
        return Opened(read_text(path), digest)

    def save(self, name: str, text: str, opened: str) -> str:
        """Write the scenario; return its new digest.

        `opened`: the digest of what the text was made from, "" where there was no file. Raises ConflictError where
        there is something else by now.
        """
        path = self.path(name)
        there = _digest(path)
        if there != opened:
            raise ConflictError(f"{name} has changed on disk" if opened and there else f"{name} is there already")
        raw = text.encode()
        if len(raw) > MAX_BYTES:
            raise ScenarioError(Problem(f"{name} would be larger than {MAX_BYTES:,} bytes"))
        if there and b"\r\n" in path.read_bytes():
            raw = raw.replace(b"\n", b"\r\n")  # a text area has line feeds only
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(raw, path, is_new=not there)
        return hashlib.sha256(raw).hexdigest()


def is_text(name: str) -> bool:
    """Whether a name on disk can be sent: halves of characters stand for bytes that are none."""
    return not _HALF.search(name)


def example_names() -> list[str]:
    """Names of the scenarios that ship."""
    folder = _examples()
    return sorted(path.name for path in folder.glob("*.yaml")) if folder.is_dir() else []


def _examples() -> Path:
    """In an installed package beside the modules; in a checkout at its top."""
    package = Path(mist.__file__).resolve().parent
    inside = package / "examples"
    return inside if inside.is_dir() else package.parents[1] / "examples"


def _scenarios(folder: Path, runs: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(folder):
        here = Path(place)
        if "summary.json" in files:  # the folder of a result
            folders.clear()
            continue
        deep = len(here.relative_to(folder).parts) >= MAX_DEPTH
        folders[:] = [] if deep else sorted(n for n in folders if not n.startswith(".") and here / n != runs)
        for path in (here / name for name in files if name.endswith(_SUFFIXES) and not name.startswith(".")):
            if path.resolve().is_relative_to(folder) and _is_scenario(path):
                yield path


def _is_scenario(path: Path) -> bool:
    try:
        with path.open("rb") as stream:
            return _CLIENTS.search(stream.read(MAX_BYTES)) is not None
    except OSError:
        return False


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except (FileNotFoundError, IsADirectoryError):
        return ""


def _write(raw: bytes, path: Path, *, is_new: bool) -> None:
    """Put the whole file in its place at once; a new one never over another."""
    handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(raw)
        try:
            path.touch(exist_ok=not is_new)  # nobody else makes it from here on
        except FileExistsError:
            raise ConflictError(f"{path.name} is there already") from None
        shutil.copymode(path, partial)
        os.replace(partial, path)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(partial)
