"""A run as a comparison sees it: its requests one by one, what was asked of it, and the figures of the whole.

Made where a scenario is run, or from the folder that an earlier run wrote. It compares nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mist.errors import Problem, ScenarioError
from mist.records import FINISHED, STATUSES
from mist.scenario.build import run
from mist.scenario.source import read_file
from mist.scenario.value import Scenario
from mist.search.evaluate import Summary

Column = npt.NDArray[Any]

#: latencies of a request that are compared
METRICS = ("ttft_s", "tpot_s", "e2e_s")
_COLUMNS = ("request", "arrival_s", "input_tokens", "status", *METRICS)
_FILES = ("scenario.yaml", "summary.json", "requests.parquet")


@dataclass(frozen=True, eq=False)
class Run:
    """`label`: its file or folder; `scenario`: as it was resolved; `requests`: columns of requests.parquet."""

    label: str
    scenario: Mapping[str, Any]
    summary: Summary
    requests: Mapping[str, Column]

    def counted(self) -> npt.NDArray[np.bool_]:
        """Which requests arrived in the measured window and finished."""
        arrival, window = self.requests["arrival_s"], self.summary["window"]
        inside = (arrival >= window["start_s"]) & (arrival <= window["end_s"])
        return np.asarray(inside & (self.requests["status"] == STATUSES[FINISHED]))


def measured(scenario: Scenario) -> dict[str, Any]:
    """The `measure` of a job: what `Run` needs besides a label."""
    result = run(scenario)
    columns = {name: result.requests[name] for name in _COLUMNS}
    return {"scenario": result.scenario, "summary": result.summary(), "requests": columns}


def read_run(folder: Path) -> Run:
    """What `mist run --out FOLDER` wrote; ScenarioError where that isn't what lies there."""
    if missing := [name for name in _FILES if not (folder / name).is_file()]:
        hint = "name a folder that `mist run --out` wrote, or a scenario's file"
        raise ScenarioError(Problem(f"{folder} holds no {missing[0]}", hint=hint))
    import pyarrow.parquet as parquet

    scenario = read_file(folder / "scenario.yaml").data()
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        table = parquet.read_table(folder / "requests.parquet", columns=list(_COLUMNS))
        requests = {name: _column(table[name]) for name in _COLUMNS}
    except (OSError, ValueError, KeyError) as error:
        raise ScenarioError(Problem(f"the run in {folder} can't be read: {error}", hint="run it again")) from None
    return Run(str(folder), scenario, summary, requests)


def _column(column: Any) -> Column:
    """Texts as objects, numbers with NaN where there is none."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        return np.array(column.to_pylist(), object)
    return np.asarray(column.to_numpy())
