"""Whether a file may be written: not over what is there without leave, and never over what the run itself reads.

Before anything runs, for every command that writes one. It writes nothing itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mist.errors import Problem, ScenarioError


def check_not_read(outputs: Iterable[Path], inputs: Iterable[Path]) -> None:
    """ScenarioError where one of `outputs` is the same file as one of `inputs`, whatever their paths look like."""
    if lost := {path.resolve() for path in outputs} & {path.resolve() for path in inputs}:
        raise ScenarioError(
            Problem(f"{min(lost)} would be written over, and this run reads it", hint="write elsewhere")
        )


def check_file(path: Path, *, overwrite: bool, inputs: Iterable[Path] = ()) -> None:
    """ScenarioError where `path` is an input or there already, or where nothing can be written there."""
    check_not_read([path], inputs)
    if path.exists() and not (overwrite and path.is_file()):
        raise ScenarioError(Problem(f"{path} is there already", hint="name another file, or give --overwrite"))
    if not path.parent.is_dir():
        raise ScenarioError(Problem(f"there is no folder {path.parent}", hint="make it first"))
