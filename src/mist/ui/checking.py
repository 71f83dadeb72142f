"""A scenario's text as `mist check` sees it: its problems at their lines and columns, or what it comes to.

Between the editor and `mist.scenario`; the same path as a file takes. It runs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mist.errors import Problem, ScenarioError
from mist.scenario.account import account
from mist.scenario.nodes import parse
from mist.scenario.source import MAX_BYTES, Source
from mist.scenario.value import Scenario


def read(text: str, name: str, folder: Path) -> Scenario:
    """The scenario in `text`, which is to be the file `name` in `folder`; ScenarioError with all of its problems."""
    if len(text.encode()) > MAX_BYTES:
        raise ScenarioError(Problem(f"the file is larger than {MAX_BYTES:,} bytes", name))
    return Scenario.from_source(Source(parse(text, name), folder, Path(name).stem))


#: traces of more bytes than that aren't read while somebody types
MAX_TRACE_BYTES = 4 << 20


def check(text: str, name: str, folder: Path) -> dict[str, Any]:
    """`problems` with their places (`here`: in this text), or, where there are none, the `lines` of `mist check`."""
    try:
        scenario = read(text, name, folder)
        return {"problems": [], "lines": [*account(scenario, reads_traces=_are_short(scenario))]}
    except ScenarioError as error:
        return {"problems": told(error.problems, name), "lines": []}


def _are_short(scenario: Scenario) -> bool:
    traces = [scenario.trace_path(name) for name, each in scenario.tenants.items() if each.workload.trace is not None]
    return all(trace.stat().st_size <= MAX_TRACE_BYTES for trace in traces if trace.is_file())


def told(problems: Iterable[Problem], name: str = "") -> list[dict[str, Any]]:
    """Problems for the page."""
    return [{**asdict(problem), "here": problem.file == name} for problem in problems]
