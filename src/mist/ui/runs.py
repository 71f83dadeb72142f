"""The runs of the page: a queue of simulations, each in a process of its own, and the results that are in a folder.

Between the page's requests and `children`. A result is a folder as `mist run --out` makes it and appears whole; the
folders are the only memory, so that a page started later finds them. It never changes a result.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from mist.errors import Problem, ScenarioError
from mist.ui.children import answer
from mist.ui.figures import headline

#: letters of a name that a folder can have
_OTHER = re.compile(r"[^a-z0-9.]+")
#: differences between two scenarios that are told
MAX_DIFFERENCES = 60

QUEUED, RUNNING, DONE, FAILED, CANCELLED = "queued", "running", "done", "failed", "cancelled"


@dataclass(slots=True)
class Run:
    """One that was asked for from this page; `done` and `total` count requests, 0 of 0 until the first ones left."""

    id: str
    name: str
    state: str = QUEUED
    done: int = 0
    total: int = 0
    problems: list[dict[str, Any]] = field(default_factory=list)
    task: asyncio.Task[None] | None = None


class Runs:
    """Runs below `root`, of which `workers` go on at a time; plug-ins are files that every process loads."""

    def __init__(self, root: Path, workers: int = 1, plugins: Sequence[str] = ()) -> None:
        self.root, self.plugins = root, list(plugins)
        self._asked: dict[str, Run] = {}
        self._slots, self._pages = asyncio.Semaphore(workers), asyncio.Semaphore(workers)

    def listed(self) -> list[dict[str, Any]]:
        """Every run, the newest first: those that are under way, ended without a result, or are in the folder."""
        found = {run.id: _as_json(run) for run in self._asked.values() if run.state != DONE}
        found |= {path.name: _stored(path) for path in self._folders()}
        return [found[name] for name in sorted(found, reverse=True)]

    def start(self, text: str, name: str, folder: Path, label: str = "") -> str:
        """Queue a simulation of `text`, which is the file `name` of `folder`; return the run's id.

        OSError where results couldn't be written, rather than after the run.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        if not os.access(self.root, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self.root))
        run = Run(self._new_id(label or Path(name).stem), label or name)
        job = {"kind": "run", "text": text, "name": name, "folder": str(folder), "out": str(self.root / run.id)}
        self._asked[run.id] = run
        run.task = asyncio.create_task(self._simulate(run, job))
        return run.id

    async def cancel(self, run_id: str) -> None:
        """End a run that is queued or going on; its process is gone afterwards. One that has ended stays as it is."""
        run = self._asked.get(run_id)
        if run is None or run.task is None:
            raise ScenarioError(Problem(f"there is no run {run_id!r:.100} to cancel"))
        run.task.cancel()
        await asyncio.wait([run.task])
        if run.task.cancelled():
            run.state = CANCELLED

    async def close(self) -> None:
        """End all runs."""
        tasks = [run.task for run in self._asked.values() if run.task is not None and not run.task.done()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def report(self, run_id: str) -> str:
        """The report of a result, as HTML; ScenarioError where it can't be made."""
        return await self._page({"kind": "report", "folder": str(self.folder(run_id))})

    async def comparison(self, run_ids: Sequence[str]) -> str:
        """The page of the first of some results against the others; ScenarioError where they can't be compared."""
        if len(run_ids) < 2:
            raise ScenarioError(Problem("one run can't be compared", hint="choose two"))
        names = [self.folder(run_id).name for run_id in run_ids]
        return await self._page({"kind": "compare", "folder": str(self.root), "runs": names})

    def differences(self, one: str, other: str) -> list[tuple[str, Any, Any]]:
        """(path, value in one, value in the other) where the resolved scenarios of two results differ."""
        a, b = (dict(_flat(yaml.safe_load((self.folder(i) / "scenario.yaml").read_bytes()))) for i in (one, other))
        paths = [path for path in {**a, **b} if path != "name" and a.get(path) != b.get(path)]
        return [(path, a.get(path), b.get(path)) for path in paths[:MAX_DIFFERENCES]]

    def folder(self, run_id: str) -> Path:
        """The folder of a result; ScenarioError unless it is one directly below the root."""
        found = next((path for path in self._folders() if path.name == run_id), None)
        if found is None:
            raise ScenarioError(Problem(f"there is no run {run_id!r:.100}", hint=f"results are in {self.root}"))
        return found

    def _folders(self) -> Iterator[Path]:
        if self.root.is_dir():
            yield from (
                path.parent for path in self.root.glob("*/summary.json") if not path.parent.name.startswith(".")
            )

    def _new_id(self, label: str) -> str:
        """A name that sorts by time and can be typed."""
        name = _OTHER.sub("-", label.lower()).strip("-.")[:40] or "run"
        first = f"{time.strftime('%Y-%m-%d-%H%M%S')}-{name}"
        found, number = first, 2
        while found in self._asked or (self.root / found).exists():
            found, number = f"{first}-{number}", number + 1
        return found

    async def _simulate(self, run: Run, job: dict[str, Any]) -> None:
        def progress(done: int, total: int) -> None:
            run.done, run.total = done, total

        try:
            async with self._slots:
                run.state = RUNNING
                outcome = await answer({**job, "plugins": self.plugins}, progress)
            run.problems = outcome.get("problems", [])
            run.state = FAILED if run.problems else DONE
        except OSError as error:
            run.problems, run.state = [{"message": f"no process could be started: {error}"}], FAILED
        finally:
            if run.state != DONE:  # a process that had to be killed can't clear away what it began to write
                for half in self.root.glob(f".{run.id}.*.partial"):
                    shutil.rmtree(half, ignore_errors=True)

    async def _page(self, job: dict[str, Any]) -> str:
        async with self._pages:
            outcome = await answer({**job, "plugins": self.plugins})
        if problems := outcome.get("problems"):
            raise ScenarioError([Problem(each["message"], hint=each.get("hint", "")) for each in problems])
        return str(outcome["page"])


def _as_json(run: Run) -> dict[str, Any]:
    return {"id": run.id, "name": run.name, "state": run.state, "done": run.done, "total": run.total,
            "problems": run.problems}  # fmt: skip


def _stored(folder: Path) -> dict[str, Any]:
    try:
        return _read(folder, (folder / "summary.json").stat().st_mtime_ns)
    except OSError as error:
        return _unread(folder, error)


@lru_cache(maxsize=2000)
def _read(folder: Path, written_ns: int) -> dict[str, Any]:
    """A result's line; `written_ns` makes one that was written anew be read anew."""
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        name = re.search(r"^name: (.*)", (folder / "scenario.yaml").read_text(encoding="utf-8"), re.MULTILINE)
        has_tables = (folder / "requests.parquet").is_file()
        told = str(yaml.safe_load(name[1])) if name else folder.name
        return {"id": folder.name, "name": told, "state": DONE, "has_tables": has_tables, **headline(summary)}
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        return _unread(folder, error)


def _unread(folder: Path, error: Exception) -> dict[str, Any]:
    problem = {"message": f"the result can't be read: {error}", "hint": "another version may have written it"}
    return {"id": folder.name, "name": folder.name, "state": FAILED, "problems": [problem]}


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, value
