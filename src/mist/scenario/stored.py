"""A result read back from the folder that `Result.write` made, with its records as they were.

Beside `result`, for whatever looks at a run later: reports, timelines, comparisons. Times were written in seconds and
come back as the same whole nanoseconds. It never runs anything.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mist.errors import Problem, ScenarioError
from mist.metrics.availability import DRAINED, replica_of
from mist.records import CLIENT_STATES, OFF, SEGMENT_ENDS, STATUSES, TRANSFER_KINDS, IntColumn, Records, Table
from mist.scenario.result import RESULT_FILES, Result
from mist.units import NS_PER_S

#: results of earlier versions have none
_LOANS = "loans.parquet"

#: a column of numbers, or of codes (-1: none) with the names that they stand for
_Column = tuple[IntColumn, list[str]]


def read_result(folder: str | Path) -> Result:
    """The result in `folder`; ScenarioError where files are missing or aren't those of a result."""
    place = Path(folder)
    needed = [name for name in RESULT_FILES if name != _LOANS]
    if missing := [name for name in needed if not (place / name).is_file()]:
        hint = "give the folder of `mist run SCENARIO --out FOLDER`"
        raise ScenarioError(Problem(f"{place} holds no result: there is no {missing[0]} in it", hint=hint))
    try:
        metrics = json.loads((place / "summary.json").read_text(encoding="utf-8"))
        records = _records(place, metrics)
        simulator = metrics.pop("simulator")
        timing = simulator.pop("timing")
        # as it was, where the reader of scenarios makes 12 of 12.0
        scenario = yaml.safe_load((place / "scenario.yaml").read_text(encoding="utf-8"))
        name = str(scenario["name"])
    except (KeyError, TypeError, ValueError, OSError, yaml.YAMLError) as error:  # Arrow's errors are among them
        raise ScenarioError(Problem(f"{place} holds no result that can be read: {error}")) from None
    return Result(name, scenario, records, metrics, simulator, timing)


def _records(folder: Path, summary: dict[str, Any]) -> Records:
    requests, tasks, steps, transfers = (
        _read(folder / f"{name}.parquet") for name in ("requests", "tasks", "steps", "transfers")
    )
    loans = _read(folder / _LOANS) if (folder / _LOANS).is_file() else {}
    clients = _client_names(
        summary, [*tasks["client"][1], *steps["client"][1], *transfers["sender"][1], *transfers["receiver"][1]]
    )
    ends = [name for way in ("sender", "receiver") for name in transfers[way][1]]
    records = Records(
        client_names=clients,
        memory_names=list(dict.fromkeys(["host memory", *(name for name in ends if name not in clients)])),
        stage_kinds=list(summary["stages"]),
        reasons=requests["reason"][1],
        tenants=_tenants(summary, requests),
    )
    places = {name: number for number, name in enumerate(clients)}
    places |= {name: -1 - number for number, name in enumerate(records.memory_names)}
    known: dict[str, dict[str, int]] = {
        "status": _numbered(STATUSES), "how": _numbered(SEGMENT_ENDS), "stage": _numbered(records.stage_kinds),
        "reason": _numbered(records.reasons), "kind": _numbered(TRANSFER_KINDS),
        "client": places, "sender": places, "receiver": places,
    }  # fmt: skip
    for table, columns in (
        (records.requests, requests), (records.tasks, tasks), (records.steps, steps), (records.transfers, transfers)
    ):  # fmt: skip
        _fill(table, columns, known)
    if loans:
        _fill(records.loans, loans, known)
    _fill_changes(records, _read(folder / "changes.parquet"))
    return records


def _fill_changes(records: Records, columns: dict[str, _Column]) -> None:
    """A row for each client that a replica is, or that is a lane of it; those that follow from others are left out."""
    (_, replicas), (times, _), (_, states), (_, records.causes) = (
        columns[name] for name in ("client", "time_s", "state", "reason")
    )
    lanes: dict[str, list[int]] = {}
    for client, name in enumerate(records.client_names):
        lanes.setdefault(replica_of(name), []).append(client)
    codes = (columns[name][0].tolist() for name in ("client", "state", "reason"))
    for time_ns, replica, state, cause in zip(times.tolist(), *codes, strict=True):
        number = CLIENT_STATES.index(states[state])
        if (number, records.causes[cause]) != (OFF, DRAINED):
            for client in lanes[replicas[replica]]:
                records.changes.append((client, number, time_ns, cause))


def _fill(table: Table, columns: dict[str, _Column], known: dict[str, dict[str, int]]) -> None:
    """Write the rows of a file to the table that it was made of."""
    found = []
    for name in table.columns:
        written = name.removesuffix("_ns") + "_s" if name.endswith("_ns") else name
        if written not in columns and name == "kind":
            written = "stage"
        values, names = columns[written]
        codes = np.array([*(known[written][each] for each in names), -1], np.int64) if written in known else None
        found.append(values if codes is None else codes[values])
    table.write(np.ascontiguousarray(np.column_stack(found)).tobytes())


def _read(path: Path) -> dict[str, _Column]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    found: dict[str, _Column] = {}
    table = pq.read_table(path).unify_dictionaries()
    for name in table.column_names:
        column: Any = table[name].combine_chunks()
        if pa.types.is_dictionary(column.type):
            codes = column.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
            found[name] = (codes, column.dictionary.to_pylist())
        elif pa.types.is_floating(column.type):
            seconds = column.fill_null(float("nan")).to_numpy(zero_copy_only=False)
            found[name] = (np.where(np.isnan(seconds), -1, np.rint(seconds * NS_PER_S)).astype(np.int64), [])
        else:
            found[name] = (column.to_numpy(zero_copy_only=False), [])
    return found


def _numbered(names: Sequence[str]) -> dict[str, int]:
    return {name: number for number, name in enumerate(names)}


def _client_names(summary: dict[str, Any], found: Sequence[str]) -> list[str]:
    """The clients in their order: replicas by pool, and the lanes of those that have some."""
    replicas = [replica["name"] for pool in summary["clients"].values() for replica in pool["replicas"]]
    order = _numbered(replicas)
    lanes = {name for name in found if name.rpartition(".")[0] in order and name not in order}
    whole = [name for name in replicas if not any(lane.rpartition(".")[0] == name for lane in lanes)]

    def place(name: str) -> tuple[int, int]:
        replica, _, lane = name.rpartition(".")
        return (order[replica], int(lane)) if name in lanes else (order[name], 0)

    return sorted([*whole, *lanes], key=place)


def _tenants(summary: dict[str, Any], requests: dict[str, _Column]) -> list[tuple[str, int]]:
    """Each tenant with the number of its first request."""
    if "tenant" not in requests:
        return []
    codes, names = requests["tenant"]
    first = {name: int(requests["request"][0][codes == code].min()) for code, name in enumerate(names)}
    return [(name, first[name]) for name in summary["tenants"] if name in first]
