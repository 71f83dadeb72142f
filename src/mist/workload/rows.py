"""The rows of a trace file, whatever its container: CSV, JSON lines or Parquet, gzipped or not.

The first step of reading a trace: bytes to named columns of raw values, each with its place in the file. It never
knows what a column means, and it never stops at the first bad row.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy.typing as npt

from mist.errors import Problem, ScenarioError

Column = Sequence[Any] | npt.NDArray[Any]

MAX_PROBLEMS = 20

_GZIP = b"\x1f\x8b"
_PARQUET = b"PAR1"
_DAMAGED = "fetch or export the file anew: it is damaged or cut short"


@dataclass(slots=True)
class Problems:
    """The problems of one file: the first `MAX_PROBLEMS` by place are told, the rest are counted."""

    file: str
    found: list[Problem] = field(default_factory=list)
    num_more: int = 0

    def add(self, message: str, *, line: int = 0, column: int = 0, hint: str = "") -> None:
        """Note one problem at a 1-based place, 0 where there is none."""
        self.found.append(Problem(message, self.file, line, column, hint))
        if len(self.found) >= 10 * MAX_PROBLEMS:
            self._prune()

    def raise_any(self) -> None:
        """Raise a ScenarioError if there is any problem."""
        self._prune()
        if self.found and self.num_more:
            raise ScenarioError([*self.found, Problem(f"and {self.num_more} more problems like these", self.file)])
        if self.found:
            raise ScenarioError(self.found)

    def fail(self, message: str, *, line: int = 0, column: int = 0, hint: str = "") -> NoReturn:
        """Raise a ScenarioError at once: nothing more can be read."""
        raise ScenarioError(Problem(message, self.file, line, column, hint))

    def _prune(self) -> None:
        self.found.sort(key=lambda problem: (problem.line, problem.column))
        self.num_more += len(self.found[MAX_PROBLEMS:])
        del self.found[MAX_PROBLEMS:]


@dataclass(slots=True)
class Rows:
    """A file's rows as columns of raw values: str in CSV, JSON values (None: missing) or NumPy arrays in Parquet.

    `names` are all columns that the file has, `columns` those that were asked for and found. `lines` are the 1-based
    lines of the rows (in Parquet, which has no lines, the row numbers). `fields` are all columns of a CSV.
    """

    problems: Problems
    names: Sequence[str]
    columns: Mapping[str, Column]
    lines: Sequence[int]
    fields: Sequence[Sequence[str]] | None = None

    def complain(self, row: int, name: str, message: str, hint: str) -> None:
        """Note a problem with the value of column `name` in row `row` (0-based)."""
        column = 0
        if self.fields is not None:
            column = 1 + sum(len(texts[row]) + 1 for texts in self.fields[: self.names.index(name)])
        self.problems.add(message, line=self.lines[row], column=column, hint=hint)


def read_rows(path: Path, wanted: Collection[str]) -> Rows:
    """The `wanted` columns of a CSV, JSON-lines or Parquet file, told apart by content.

    Raises ScenarioError where the file can't be read at all; rows that can't be used are in `Rows.problems`.
    """
    problems = Problems(str(path))
    data = _read_bytes(path, problems)
    if data[:4] == _PARQUET:
        return _parquet_rows(data, wanted, problems)
    text = _decode(data, problems)
    if not text.strip():
        problems.fail("the file is empty", hint="a trace has one request a line")
    if text.lstrip()[0] in "{[":
        return _json_rows(text, wanted, problems)
    return _csv_rows(text, wanted, problems)


def first_line(path: Path) -> bytes:
    """The first line of a file, unzipped; b"" for Parquet. Raises ScenarioError where it can't be read."""
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
            file.seek(0)
            if magic[:2] == _GZIP:
                with gzip.open(file) as unzipped:
                    line = unzipped.readline(1 << 20)
            else:
                line = file.readline(1 << 20)
    except (OSError, EOFError, zlib.error) as error:
        Problems(str(path)).fail(f"can't be read: {error}", hint=_DAMAGED)
    return b"" if line[:4] == _PARQUET else line


def csv_names(line: bytes) -> frozenset[str]:
    """The column names in a CSV header, empty where it can't be one."""
    try:
        return frozenset(_header(line.decode("utf-8-sig")))
    except (UnicodeDecodeError, csv.Error):
        return frozenset()


def json_object(line: bytes) -> dict[str, Any]:
    """The JSON object on a line, empty where there is none."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def json_names(line: bytes) -> frozenset[str]:
    """The keys of the JSON object on a line, empty where there is none."""
    return frozenset(json_object(line))


def _read_bytes(path: Path, problems: Problems) -> bytes:
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if data[:2] == _GZIP else data
    except (OSError, EOFError, zlib.error) as error:
        problems.fail(f"can't be read: {error}", hint=_DAMAGED)


def _decode(data: bytes, problems: Problems) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        column = error.start - data.rfind(b"\n", 0, error.start)
        problems.fail("not UTF-8 text", line=line, column=column, hint="save the file as UTF-8 (or give Parquet)")
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        problems.fail("binary data, not text", line=line, hint="give CSV, JSON lines or Parquet, gzipped or not")
    return text.replace("\r\n", "\n") if "\r" in text else text


def _header(line: str) -> list[str]:
    return [name.strip() for name in next(csv.reader([line.rstrip("\r\n")]), [])]


def _csv_rows(text: str, wanted: Collection[str], problems: Problems) -> Rows:
    try:
        names = _header(text.partition("\n")[0])
        columns, lines = (_quoted if '"' in text else _plain)(text, len(names), problems)
    except csv.Error as error:
        problems.fail(f"bad CSV: {error}", hint="close every quoted field, or give JSON lines")
    for name in wanted:
        if names.count(name) > 1:
            problems.add(f"column {name!r} is there {names.count(name)} times", line=1, hint="name each column once")
    found = {name: columns[names.index(name)] for name in wanted if name in names}
    return Rows(problems, names, found, lines, columns)


def _plain(text: str, num_columns: int, problems: Problems) -> tuple[list[Sequence[str]], list[int]]:
    """The columns and lines of a CSV without quotes, several times as fast and with fields of any length."""
    texts = text.rstrip("\n").split("\n")[1:]
    lines = list(range(2, len(texts) + 2))
    num_fields = [line.count(",") + 1 if line else 0 for line in texts]
    kept = _whole_rows(num_fields, lines, num_columns, problems)
    if len(kept) < len(texts):
        texts, lines = [texts[i] for i in kept], [lines[i] for i in kept]
    # one flat list: a list per row would be a million objects for the garbage collector to visit
    fields = ",".join(texts).split(",") if texts else []
    return [fields[i::num_columns] for i in range(num_columns)], lines


def _quoted(text: str, num_columns: int, problems: Problems) -> tuple[list[Sequence[str]], list[int]]:
    reader = csv.reader(io.StringIO(text), strict=True)
    next(reader)
    rows, lines = [], []
    for row in reader:
        rows.append(row)
        lines.append(reader.line_num)
    kept = _whole_rows(list(map(len, rows)), lines, num_columns, problems)
    columns: list[Sequence[str]] = [[rows[i][column] for i in kept] for column in range(num_columns)]
    return columns, [lines[i] for i in kept]


def _whole_rows(num_fields: Sequence[int], lines: Sequence[int], num_columns: int, problems: Problems) -> Sequence[int]:
    """The rows that have all their fields; blank lines are left out in silence, others are problems."""
    if set(num_fields) == {num_columns}:
        return range(len(num_fields))
    for given, line in zip(num_fields, lines, strict=True):
        if given not in (0, num_columns):
            hint = "give every row one value per column, and quote those that have commas in them"
            problems.add(f"{given} fields where the header has {num_columns}", line=line, hint=hint)
    return [i for i, given in enumerate(num_fields) if given == num_columns]


def _json_rows(text: str, wanted: Collection[str], problems: Problems) -> Rows:
    lines: list[int] = []
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line or line.isspace():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            hint = "write one JSON object a line, each whole on its line"
            problems.add(f"bad JSON: {error.msg}", line=number, column=error.colno, hint=hint)
            continue
        except (ValueError, RecursionError) as error:
            problems.add(f"bad JSON: {error}", line=number, hint="give numbers of at most 19 digits, lists of numbers")
            continue
        if isinstance(value, dict):
            rows.append(value)
            lines.append(number)
        else:
            problems.add(f"a {type(value).__name__}, not an object", line=number, hint="write one JSON object a line")
    names = list(rows[0]) if rows else []
    found = {name: [row.get(name) for row in rows] for name in wanted if any(name in row for row in rows)}
    return Rows(problems, names, found, lines)


def _parquet_rows(data: bytes, wanted: Collection[str], problems: Problems) -> Rows:
    # lazily: a third of a second that only Parquet traces need
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data))
        names = list(file.schema_arrow.names)
        table = file.read(columns=[name for name in wanted if name in names])
        columns = {name: table.column(name).to_numpy() for name in table.column_names}
    except Exception as error:  # a damaged file makes Arrow raise nearly anything
        problems.fail(f"bad Parquet: {type(error).__name__}: {error}".split("\n")[0], hint=_DAMAGED)
    return Rows(problems, names, columns, range(1, table.num_rows + 1))
