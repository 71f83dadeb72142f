"""What a run gives back: `Result`, with its summary, its tables as columns, a printed form and files.

It stands at the end of `run(scenario)`: the records and the summary made from them come in, nothing is computed anew
but unit conversions. It never runs anything, and what it writes is the same bytes for the same seed, wall times apart.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console, RenderableType

from mist.errors import Problem, ScenarioError
from mist.metrics.availability import state_changes
from mist.metrics.latency import e2e_ns, tpot_ns, ttft_ns
from mist.metrics.stages import PARTS, stage_times
from mist.records import CLIENT_STATES, FINISHED, SEGMENT_ENDS, STATUSES, TRANSFER_KINDS, IntColumn, Records
from mist.scenario.prices import cost_anew
from mist.scenario.result_table import render
from mist.scenario.value import to_yaml
from mist.units import NS_PER_S

Columns = dict[str, npt.NDArray[Any]]

#: what `Result.write` makes
RESULT_FILES = (
    "summary.json", "requests.parquet", "tasks.parquet", "steps.parquet", "transfers.parquet", "changes.parquet",
    "loans.parquet", "scenario.yaml",
)  # fmt: skip

#: those that a run which kept no tables makes
SUMMARY_FILES = ("summary.json", "scenario.yaml")

#: width of the printed form where there is no terminal to fill
PLAIN_WIDTH = 100


@dataclass(eq=False)
class Result:
    """One run's outcome.

    `scenario` is the resolved scenario as plain YAML values, `metrics` the document of `mist.metrics.summarise`,
    `simulator` its version and counts (`version`, `events`, `steps`), `timing` the wall times (`startup_s`, `run_s`,
    `wall_s`), the only values that differ between two runs of one seed.
    """

    name: str
    scenario: dict[str, Any]
    records: Records
    metrics: dict[str, Any]
    simulator: dict[str, Any] = field(default_factory=dict)
    timing: dict[str, float] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """The summary document: JSON values, SI units, fractions 0-1, None for what has no value."""
        return {**self.metrics, "simulator": {**self.simulator, "timing": dict(self.timing)}}

    def to_json(self) -> str:
        """The summary as one JSON document, ended by a newline."""
        return json.dumps(self.summary(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @cached_property
    def requests(self) -> Columns:
        """One row per request, by number: times in seconds on the run's clock, NaN where they don't apply."""
        return request_columns(self._tables())

    @cached_property
    def steps(self) -> Columns:
        """One row per step of a client, by start; what ran together, on how many KV blocks, with how many waiting."""
        return step_columns(self._tables())

    @cached_property
    def tasks(self) -> Columns:
        """One row per segment of a task (queueing to end or preemption), by request and in order."""
        return task_columns(self._tables())

    @cached_property
    def transfers(self) -> Columns:
        """One row per KV cache that moved: when, and from which client (None: host memory) to which."""
        return transfer_columns(self._tables())

    def _tables(self) -> Records:
        if not self.records.are_whole:
            told = "this run kept its summary, and no tables"
            raise ScenarioError(Problem(told, hint="run it with full records: records='full', or without --records"))
        return self.records

    @cached_property
    def changes(self) -> Columns:
        """One row per instant at which a replica went down, came up, started or drained, by time, with the reason."""
        return change_columns(self._tables())

    @cached_property
    def loans(self) -> Columns:
        """One row per time that a client was lent to prompts, by start; NaN where it had not returned at the end."""
        return loan_columns(self._tables())

    def cost(self, prices: Any = None) -> dict[str, Any]:
        """The bill of this run: the summary's, or by other `prices`, as a scenario would have them, without a new run.

        Such as `result.cost("lambda")`, `result.cost({"h100-sxm": 2.1})` or `result.cost({"purchase": "spot"})`; what
        the scenario's clients pay of their own stays. ScenarioError as in a scenario.
        """
        if prices is None:
            return dict(self.metrics["cost"])
        return cost_anew(self.scenario, self.metrics["usage"], prices)

    def __str__(self) -> str:
        console = Console(width=PLAIN_WIDTH, file=io.StringIO(), color_system=None, legacy_windows=False)
        with console.capture() as capture:
            console.print(self)
        return "\n".join(line.rstrip() for line in capture.get().splitlines())

    def __repr__(self) -> str:
        finished = self.metrics.get("requests", {}).get("finished")
        return f"<Result of {self.name!r}: {finished} requests finished>"

    def __rich__(self) -> RenderableType:
        return render(self.name, self.summary())

    def write(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write summary.json, scenario.yaml and the tables to `folder` (`RESULT_FILES`); return it.

        Without tables (`SUMMARY_FILES`) where the run kept none. The files are made in a new folder beside it, which
        takes its place in the end: whatever goes wrong, earlier results stay whole. Other files of an overwritten
        folder are kept. Raises ScenarioError where `folder` can't be used (`check_output_folder`).
        """
        target = Path(folder).resolve()
        check_output_folder(target, overwrite=overwrite)
        target.parent.mkdir(parents=True, exist_ok=True)
        made = target.with_name(f".{target.name}.{os.getpid()}.partial")
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir()
        try:
            self._write_files(made)
            _take_place(made, target)
        finally:
            shutil.rmtree(made, ignore_errors=True)
        return target

    def _write_files(self, folder: Path) -> None:
        (folder / "summary.json").write_text(self.to_json(), encoding="utf-8")
        (folder / "scenario.yaml").write_text(to_yaml(self.scenario), encoding="utf-8")
        if not self.records.are_whole:
            return
        for name in ("requests", "tasks", "steps", "transfers", "changes", "loans"):
            _write_parquet(getattr(self, name), folder / f"{name}.parquet")


def check_output_folder(folder: str | Path, *, overwrite: bool = False) -> None:
    """ScenarioError unless results can be written to `folder`: new, or empty, or `overwrite` (but not where one is)."""
    path = Path(folder).resolve()
    if not path.exists():
        return
    if not path.is_dir():
        raise ScenarioError(Problem(f"{folder} is a file, and results go into a folder"))
    if path == Path.cwd() or path in Path.cwd().parents:
        raise ScenarioError(Problem(f"{folder} is the folder we are in", hint="name one below it, like out/first"))
    if any(path.iterdir()) and not overwrite:
        hint = "name another folder, or give --overwrite to replace the results in it"
        raise ScenarioError(Problem(f"{folder} isn't empty", hint=hint))


def request_columns(records: Records) -> Columns:
    """The request table in seconds, with the latencies of those that finished and where their time went."""
    rows = records.requests.as_columns()
    order = np.argsort(rows["request"], kind="stable")
    rows = {name: column[order] for name, column in rows.items()}
    return {
        "request": rows["request"],
        **_tenants(records, rows["request"]),
        "arrival_s": _seconds(rows["arrival_ns"]),
        "first_token_s": _seconds(rows["first_token_ns"]),
        "end_s": _seconds(rows["end_ns"]),
        "status": _names(STATUSES, rows["status"]),
        "reason": _names(records.reasons, rows["reason"]),
        **{name: rows[name] for name in ("input_tokens", "output_tokens", "cached_tokens", "num_preemptions")},
        "ttft_s": _seconds(ttft_ns(rows)),
        "tpot_s": _seconds(tpot_ns(rows)),
        "e2e_s": _seconds(e2e_ns(rows)),
        **_time_spent(rows, records),
    }


def step_columns(records: Records) -> Columns:
    """The step table in seconds, by start and then client."""
    rows = records.steps.as_columns()
    order = np.lexsort((rows["client"], rows["start_ns"]))
    rows = {name: column[order] for name, column in rows.items()}
    counts = ("num_prefills", "num_prefill_tokens", "num_decodes", "decode_context", "kv_blocks", "num_waiting")
    return {
        "client": _names(records.client_names, rows["client"]),
        "start_s": _seconds(rows["start_ns"]),
        "end_s": _seconds(rows["end_ns"]),
        "duration_s": _seconds(rows["end_ns"] - rows["start_ns"]),
        **{name: rows[name] for name in counts},
    }


def task_columns(records: Records) -> Columns:
    """The table of task segments in seconds, by request and in order."""
    rows = records.tasks.as_columns()
    order = np.argsort(rows["request"], kind="stable")
    rows = {name: column[order] for name, column in rows.items()}
    return {
        "request": rows["request"],
        "stage_index": rows["stage_index"],
        "stage": _names(records.stage_kinds, rows["kind"]),
        "client": _names(records.client_names, rows["client"]),
        **{f"{event}_s": _seconds(rows[f"{event}_ns"]) for event in ("queued", "started", "joined", "end")},
        "how": _names(SEGMENT_ENDS, rows["how"]),
        **{name: rows[name] for name in ("computed_tokens", "cached_tokens")},
        **{name: rows[name] for name in ("join_step", "last_step", "generated_tokens")},
    }


def transfer_columns(records: Records) -> Columns:
    """The table of transfers in seconds, as they were queued."""
    rows = records.transfers.as_columns()
    order = np.lexsort((rows["request"], rows["queued_ns"]))
    rows = {name: column[order] for name, column in rows.items()}
    ends = [*records.client_names, *reversed(records.memory_names)]
    return {
        "request": rows["request"],
        "kind": _names(TRANSFER_KINDS, rows["kind"]),
        **{name: np.array(ends, dtype=object)[rows[name]] for name in ("sender", "receiver")},
        "bytes": rows["bytes"],
        **{f"{event}_s": _seconds(rows[f"{event}_ns"]) for event in ("queued", "start", "end")},
    }


def change_columns(records: Records) -> Columns:
    """The states of replicas, from when on and why; they are up at first."""
    changes = state_changes(records)
    return {
        "client": np.array([each.replica for each in changes], dtype=object),
        "time_s": np.array([each.time_ns for each in changes], dtype=np.int64) / NS_PER_S,
        "state": _names(CLIENT_STATES, np.array([each.state for each in changes], dtype=np.int64)),
        "reason": np.array([each.reason for each in changes], dtype=object),
    }


def loan_columns(records: Records) -> Columns:
    """From when to when clients were lent, in seconds."""
    rows = records.loans.as_columns()
    order = np.lexsort((rows["client"], rows["start_ns"]))
    return {
        "client": _names(records.client_names, rows["client"][order]),
        **{f"{event}_s": _seconds(rows[f"{event}_ns"][order]) for event in ("start", "end")},
    }


def _time_spent(requests: Mapping[str, IntColumn], records: Records) -> Columns:
    """Seconds that each finished request waited, was served and was handed over, all stages together."""
    finished = requests["status"] == FINISHED
    tasks = records.tasks.as_columns()
    order = np.argsort(tasks["request"], kind="stable")
    times = stage_times(
        {name: column[finished] for name, column in requests.items()},
        {name: column[order] for name, column in tasks.items()},
        len(records.stage_kinds),
        records.transfers.as_columns(),
    ).sum(axis=1)
    spent = np.full((len(finished), len(PARTS)), np.nan)
    spent[finished] = times / NS_PER_S
    return {part: spent[:, i] for i, part in enumerate(PARTS)}


def _tenants(records: Records, requests: IntColumn) -> Columns:
    """The tenant of each request, where there are several."""
    if not records.tenants:
        return {}
    names, first = zip(*records.tenants, strict=True)
    return {"tenant": _names(names, np.searchsorted(first, requests, side="right") - 1)}


def _seconds(times_ns: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    return np.where(times_ns >= 0, times_ns / NS_PER_S, np.nan)


def _names(names: Sequence[str], codes: IntColumn) -> npt.NDArray[Any]:
    """Category names by code, as shared strings; None for -1."""
    return np.array([*names, None], dtype=object)[codes]


def _write_parquet(columns: Columns, path: Path) -> None:
    """Categories as dictionaries, and null where a time doesn't apply."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrays = {
        name: pa.array(column, pa.string()).dictionary_encode()
        if column.dtype == object
        else pa.array(np.ascontiguousarray(column), from_pandas=True)
        for name, column in columns.items()
    }
    pq.write_table(pa.table(arrays), path, compression="zstd")


def _take_place(made: Path, target: Path) -> None:
    """Put the finished folder `made` where `target` is; what `target` held besides results moves along."""
    if not target.exists():
        made.rename(target)
        return
    earlier = target.with_name(f".{target.name}.{os.getpid()}.earlier")
    target.rename(earlier)
    made.rename(target)
    for entry in sorted(earlier.iterdir()):
        if entry.name not in RESULT_FILES and not (target / entry.name).exists():
            entry.rename(target / entry.name)
    shutil.rmtree(earlier)
