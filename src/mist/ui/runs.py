"""The runs of the page: a queue of simulations, each in a process of its own, and those that are kept in a folder.

Between the page's requests and `children`. It remembers only what isn't on the disk: runs under way, those that were
cancelled, and failures that couldn't be written. It never changes a result.
"""

from __future__ import annotations

import asyncio
import errno
import os
import sys
import time
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mist.errors import Problem, ScenarioError
from mist.ui.children import answer
from mist.ui.results import DONE, FAILED, SCENARIO, TIMES, Results

#: of a label, in the name of a folder; a name of 255 bytes has room for a date and ".partial" beside these
MAX_LETTERS, MAX_NAME_BYTES = 40, 120
#: differences between two scenarios that are told
MAX_DIFFERENCES = 60

QUEUED, RUNNING, CANCELLED = "queued", "running", "cancelled"


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
        self.root, self.plugins, self.results = root, list(plugins), Results(root)
        self._asked: dict[str, Run] = {}
        self._slots, self._pages = asyncio.Semaphore(workers), asyncio.Semaphore(workers)

    def listed(self, limit: int, also: Collection[str] = ()) -> tuple[list[dict[str, Any]], int]:
        """The newest `limit` runs, the newest first, and any that goes on or is among `also`; how many there are."""
        # before the folders: one that ends meanwhile is in both rather than in neither
        asked = {run_id: _as_json(run) for run_id, run in self._asked.copy().items()}
        kept = self.results.ids()
        ids = sorted({*kept, *asked}, key=lambda run_id: (kept.get(run_id, run_id), run_id), reverse=True)
        # whose folder may be there already: it runs until its process is gone
        going = {run_id for run_id, run in asked.items() if run["state"] == RUNNING}
        shown = ids[:limit] + [run_id for run_id in ids[limit:] if run_id in going or run_id in also]
        found = (asked[each] if each in going or each not in kept else self.results.line(each) for each in shown)
        return [line for line in found if line is not None], len(ids)

    def start(self, text: str, name: str, folder: Path, label: str = "") -> str:
        """Queue a simulation of `text`, which is the file `name` of `folder`; return the run's id.

        OSError where results couldn't be written, rather than after the run.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        if not os.access(self.root, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self.root))
        label = label[:MAX_LETTERS]
        run = Run(self._new_id(label or Path(name).stem), label or name)
        job = {"kind": "run", "text": text, "name": name, "folder": str(folder), "out": str(self.root / run.id)}
        self._asked[run.id] = run
        run.task = asyncio.create_task(self._simulate(run, job))
        return run.id

    async def cancel(self, run_id: str) -> None:
        """End a run that is queued or going on; its process is gone afterwards. One that has ended stays as it is."""
        run = self._asked.get(run_id)
        if run is None or run.task is None:
            self.results.folder(run_id)
            return
        run.task.cancel()
        await asyncio.wait([run.task])
        if run.task.cancelled():
            run.state = CANCELLED

    def delete(self, run_id: str) -> None:
        """Forget a run and delete what is kept of it; ScenarioError for one under way, or that isn't there."""
        run = self._asked.get(run_id)
        if run is not None and run.state in (QUEUED, RUNNING):
            raise ScenarioError(Problem(f"{run_id} is {run.state}", hint="cancel it first"))
        if run is None or run_id in self.results.ids():
            self.results.delete(run_id)
        self._asked.pop(run_id, None)

    async def close(self) -> None:
        """End all runs."""
        tasks = [run.task for run in self._asked.values() if run.task is not None and not run.task.done()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def report(self, run_id: str) -> str:
        """The report of a result, as HTML; ScenarioError where it can't be made."""
        return await self._page({"kind": "report", "folder": str(self.results.readable(run_id))})

    async def comparison(self, run_ids: Sequence[str]) -> str:
        """The page of the first of some results against the others; ScenarioError where they can't be compared."""
        if len(run_ids) < 2:
            raise ScenarioError(Problem("one run can't be compared", hint="choose two"))
        names = [self.results.readable(run_id).name for run_id in run_ids]
        return await self._page({"kind": "compare", "folder": str(self.root), "runs": names})

    def scenario(self, run_id: str) -> str:
        """The text of a run's scenario: resolved, or as it was given where the run failed."""
        return (self.results.readable(run_id) / SCENARIO).read_text(encoding="utf-8", errors="replace")

    def differences(self, one: str, other: str) -> list[tuple[str, Any, Any]]:
        """(path, value in one, value in the other) where the resolved scenarios of two results differ."""
        a, b = (dict(_flat(yaml.safe_load((self.results.readable(i) / SCENARIO).read_bytes()))) for i in (one, other))
        paths = [path for path in {**a, **b} if path != "name" and a.get(path) != b.get(path)]
        return [(path, a.get(path), b.get(path)) for path in paths[:MAX_DIFFERENCES]]

    def _new_id(self, label: str) -> str:
        """A name that sorts by time and can be typed."""
        first = f"{time.strftime(TIMES)}-{_spelled(label)}"
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
        except OSError as error:
            outcome = {"problems": [{"message": f"no process could be started: {error}"}]}
        finally:  # a process that had to be killed can't clear away what it began to write
            self.results.clear_away(run.id)
        run.problems = outcome.get("problems", [])
        run.state = FAILED if run.problems else DONE
        with suppress(OSError):  # then only this page knows of it
            if run.problems:
                self.results.keep_failure(run.id, run.name, run.problems, job["text"])
            del self._asked[run.id]

    async def _page(self, job: dict[str, Any]) -> str:
        async with self._pages:
            outcome = await answer({**job, "plugins": self.plugins})
        if problems := outcome.get("problems"):
            raise ScenarioError([Problem(each["message"], hint=each.get("hint", "")) for each in problems])
        return str(outcome["page"])


def _as_json(run: Run) -> dict[str, Any]:
    return {"id": run.id, "name": run.name, "state": run.state, "done": run.done, "total": run.total,
            "problems": run.problems}  # fmt: skip


def _spelled(label: str) -> str:
    """What of a label a folder's name has: letters and figures of any script with the marks on them, dots, hyphens."""
    kept = ""
    for each in unicodedata.normalize("NFC", label.lower()):
        is_mark = kept[-1:] not in ("", "-", ".") and unicodedata.category(each).startswith("M")
        kept += each if each.isalnum() or each == "." or is_mark else "-" if kept[-1:] != "-" else ""
    coding = sys.getfilesystemencoding()
    raw = kept.strip("-.")[:MAX_LETTERS].encode(coding, "ignore")[:MAX_NAME_BYTES]
    return raw.decode(coding, "ignore").strip("-.") or "run"


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, value
