"""Any CSV, JSON-lines or Parquet file of requests, by a map of its columns; also the format that MIST writes.

One trace format, read into a `RequestTable` before the run, and the writer whose files it reads back to the
nanosecond. It never guesses which column is what: without a map the names are those of the writer.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from dataclasses import dataclass
from pathlib import Path

from mist.errors import Problem, ScenarioError
from mist.registry import register
from mist.workload import RequestTable
from mist.workload.column_map import HASH_BLOCK_SIZE, SIZE_PREFIX, ColumnMap, unit_problem
from mist.workload.rows import csv_names, first_line, json_names

_HASH_IDS = "hash_ids"
_CACHED = "cached_tokens"


@register("trace", "columns")
@dataclass(frozen=True, slots=True)
class Columns:
    """A file's columns by name; `arrival: null` where it has no times, for a workload with `arrivals` of its own.

    `time_unit` is s, ms, us, ns or timestamp (UTC, or with an offset); left out, it is the ending of the arrival
    column's name, or the column's type in a Parquet file.
    `hash_ids` is the column of the prompt's block ids (lists; in CSV separated by spaces), one id per
    `hash_block_size` tokens. Left out, they are read from the columns `hash_ids` and `hash_block_size` if there.
    `cached_tokens` is the column of the prompt's tokens in the prefix cache; left out, that of this name if there.
    `sizes` are the columns of what else is known of each request, whole numbers, for its pipeline; left out, those of a
    CSV or JSON-lines file whose names begin with `sizes.`, which is no part of a size's name.
    """

    arrival: str | None = "arrival_ns"
    input_tokens: str = "input_tokens"
    output_tokens: str = "output_tokens"
    hash_ids: str | None = None
    hash_block_size: int = 0
    time_unit: str | None = None
    cached_tokens: str | None = None
    sizes: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.arrival and self.time_unit and (reason := unit_problem(self._unit(), self.arrival)):
            raise ValueError(reason)
        if self.hash_block_size < 0:
            raise ValueError(f"hash_block_size is {self.hash_block_size}: give the tokens per block, at least 1")

    def matches(self, path: Path, first_line: bytes) -> bool:
        """Whether the header or first object has the default columns; a Parquet file may always have them."""
        return not first_line or bool(
            {"arrival_ns", "input_tokens", "output_tokens"} <= csv_names(first_line) | json_names(first_line)
        )

    def read(self, path: Path) -> RequestTable:
        """The whole trace; ScenarioError tells every record that can't be used."""
        return ColumnMap(
            arrival=self.arrival or "",
            input_tokens=self.input_tokens,
            output_tokens=self.output_tokens,
            time_unit=self._unit(),
            hash_ids=self.hash_ids or _HASH_IDS,
            hash_block_size=self.hash_block_size,
            cached_tokens=self.cached_tokens or _CACHED,
            sizes=_size_columns(path) if self.sizes is None else self.sizes,
            optional=self._optional(),
        ).read(path)

    def problem_with(self, trace: str) -> str | None:
        """Why the file named `trace` can't be read like this, as far as its name tells; None if it may be."""
        if self.arrival and trace.endswith((".csv", ".jsonl", ".csv.gz", ".jsonl.gz")):
            return unit_problem(self._unit(), self.arrival)
        return None

    def _optional(self) -> frozenset[str]:
        """Columns that nobody asked for, read where they are."""
        hashes = () if self.hash_ids else (_HASH_IDS, HASH_BLOCK_SIZE)
        return frozenset(hashes if self.cached_tokens else (*hashes, _CACHED))

    def _unit(self) -> str:
        return self.time_unit or (self.arrival or "").rpartition("_")[2]


def _size_columns(path: Path) -> tuple[str, ...]:
    line = first_line(path)
    return tuple(sorted(name for name in csv_names(line) | json_names(line) if name.startswith(SIZE_PREFIX)))


def write_trace(table: RequestTable, path: Path) -> None:
    """Write `table` to `path` (.csv or .jsonl, with .gz zipped) so that `Columns` reads the same requests back.

    Prefix keys become `hash_ids`, sizes columns `sizes.NAME`. ScenarioError for another ending, and for a closed loop
    or its sessions, whose arrivals are not known before they run.
    """
    if table.concurrency is not None or table.after is not None:
        raise ScenarioError(Problem("a closed loop has no arrival times", str(path), hint="export a run of it"))
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    writers = {"csv": _csv_text, "jsonl": _jsonl_text}
    if kind not in writers:
        raise ScenarioError(Problem(f"can't write a trace as {path.suffix!r}", str(path), hint="end it .csv or .jsonl"))
    data = writers[kind](table).encode()
    # no time of writing in the file: the same trace gives the same bytes
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def _csv_text(table: RequestTable) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = ["arrival_ns", "input_tokens", "output_tokens"]
    columns = [table.arrival_ns.tolist(), table.input_tokens.tolist(), table.output_tokens.tolist()]
    if table.block_keys is not None:
        names += [_HASH_IDS, HASH_BLOCK_SIZE]
        columns += [[" ".join(map(str, keys)) for keys in table.block_keys], [table.hash_block_size] * len(table)]
    if table.cached_tokens is not None:
        names.append(_CACHED)
        columns.append(table.cached_tokens.tolist())
    for name, values in table.sizes.items():
        names.append(SIZE_PREFIX + name)
        columns.append(values.tolist())
    writer.writerow(names)
    writer.writerows(zip(*columns, strict=True))
    return text.getvalue()


def _jsonl_text(table: RequestTable) -> str:
    rows = [
        {"arrival_ns": arrival, "input_tokens": inputs, "output_tokens": outputs}
        for arrival, inputs, outputs in zip(
            table.arrival_ns.tolist(), table.input_tokens.tolist(), table.output_tokens.tolist(), strict=True
        )
    ]
    if table.block_keys is not None:
        for row, keys in zip(rows, table.block_keys, strict=True):
            row |= {_HASH_IDS: list(keys), HASH_BLOCK_SIZE: table.hash_block_size}
    if table.cached_tokens is not None:
        for row, cached in zip(rows, table.cached_tokens.tolist(), strict=True):
            row[_CACHED] = cached
    for name, values in table.sizes.items():
        for row, value in zip(rows, values.tolist(), strict=True):
            row[SIZE_PREFIX + name] = value
    return "".join(json.dumps(row) + "\n" for row in rows)
