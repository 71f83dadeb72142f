"""Which column of a trace file is what, and its values as a `RequestTable`: the reader that every format shares.

The second step of reading a trace: raw columns to integer nanoseconds and tokens, with every value that can't be one
told by its place. It never guesses a unit or drops a row.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mist.units import NS_PER_MS, NS_PER_S, NS_PER_US
from mist.workload import IntArray, RequestTable
from mist.workload.rows import MAX_PROBLEMS, Column, Rows, read_rows

TIME_UNITS = {"s": NS_PER_S, "ms": NS_PER_MS, "us": NS_PER_US, "ns": 1}
TIMESTAMP = "timestamp"
MAX_TOKENS = 2**40
HASH_BLOCK_SIZE = "hash_block_size"
#: what names of size columns begin with where nobody names them
SIZE_PREFIX = "sizes."

_MAX_NS = 2**62
#: below this many ns a product of two float64 is right to the nanosecond
_EXACT_FLOAT_NS = 2**50
_STAMP = re.compile(r"(19[7-9]\d|20\d\d|21\d\d)-\d\d-\d\d[ T]\d\d:\d\d:\d\d(\.\d{1,9})?", re.ASCII)
_ZONED = re.compile(
    rf"(?P<stamp>{_STAMP.pattern}) ?(Z|UTC|(?P<sign>[+-])(?P<hours>[01]\d|2[0-3])(:?(?P<minutes>[0-5]\d))?)?", re.ASCII
)
_STAMP_HINT = "write it as 2023-11-16 18:17:03.9799600, which is UTC, or 2023-11-16T20:17:03.98+02:00"

BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ColumnMap:
    """The columns of a trace file.

    `time_unit` is s, ms, us, ns or timestamp; any other text fits columns of time stamps alone. `hash_ids` holds lists
    of block ids (in CSV separated by spaces), one per `hash_block_size` tokens; 0 means that the column
    `hash_block_size` says how many. `cached_tokens` are tokens found in the prefix cache. `sizes` are columns of
    whole numbers for `RequestTable.sizes`, under their names without `SIZE_PREFIX`. Columns in `optional` may be
    absent; "" for `arrival` is a file without times.
    """

    arrival: str
    input_tokens: str
    output_tokens: str
    time_unit: str
    hash_ids: str = ""
    hash_block_size: int = 0
    optional: frozenset[str] = frozenset()
    cached_tokens: str = ""
    sizes: tuple[str, ...] = ()

    def read(self, path: Path) -> RequestTable:
        """The whole trace, sorted by arrival (stably), the first one at 0; ScenarioError tells all that is wrong."""
        return self.table(read_rows(path, self._names()))

    def table(self, rows: Rows) -> RequestTable:
        """The requests in `rows`, as `read` gives them."""
        self.require_columns(rows)
        arrival_ns = _arrivals(rows, self.arrival, self.time_unit)
        input_tokens = whole_tokens(rows, self.input_tokens, minimum=1)
        output_tokens = whole_tokens(rows, self.output_tokens, minimum=0)
        cached = whole_tokens(rows, self.cached_tokens, minimum=0) if self.cached_tokens in rows.columns else None
        sizes = {name.removeprefix(SIZE_PREFIX): whole_tokens(rows, name, minimum=0) for name in self.sizes}
        hash_ids, block_size = self._hash_ids(rows, input_tokens)
        rows.problems.raise_any()
        if not len(rows.lines):
            rows.problems.fail("no requests in it", hint="a trace has one request a line after the header")
        notes = []
        if self.arrival and self.arrival not in rows.columns:
            notes.append(f"the trace has no column {self.arrival!r}: all its requests arrive at once")
        order = np.argsort(arrival_ns, kind="stable")
        num_late = int(np.count_nonzero(np.diff(arrival_ns) < 0))
        if num_late:
            notes.append(f"{num_late} rows of the trace were earlier than the row before them: sorted by arrival")
        return RequestTable(
            arrival_ns=arrival_ns[order] - arrival_ns[order[0]],
            input_tokens=input_tokens[order],
            output_tokens=output_tokens[order],
            block_keys=None if hash_ids is None else chain_keys([hash_ids[i] for i in order]),
            hash_block_size=block_size,
            notes=tuple(notes),
            cached_tokens=None if cached is None else np.minimum(cached, input_tokens - 1)[order],
            sizes={name: values[order] for name, values in sizes.items()},
        )

    def _names(self) -> list[str]:
        names = [name for name in (self.arrival, self.input_tokens, self.output_tokens) if name]
        if self.hash_ids:
            names += [self.hash_ids] if self.hash_block_size else [self.hash_ids, HASH_BLOCK_SIZE]
        if self.cached_tokens:
            names.append(self.cached_tokens)
        return [*names, *self.sizes]

    def require_columns(self, rows: Rows) -> None:
        """ScenarioError unless each column is there or optional."""
        if not rows.names:  # not one row could be read
            rows.problems.raise_any()
        missing = [name for name in self._names() if name not in rows.columns and name not in self.optional]
        for name in missing:
            found = ", ".join(rows.names) or "none"
            hint = f"its columns are: {found[:300]}; say which is which with `columns`"
            if len(rows.names) == 1 and (mark := next((each for each in ";\t|" if each in found), "")):
                hint = f"its columns are separated by {mark!r}: save it with commas"
            if name == HASH_BLOCK_SIZE:
                hint = "set hash_block_size to the tokens per block"
            rows.problems.add(f"no column {name!r}", line=1, hint=hint)
        if missing:
            rows.problems.raise_any()

    def _hash_ids(self, rows: Rows, input_tokens: IntArray) -> tuple[list[list[Any]] | None, int]:
        if self.hash_ids not in rows.columns or not (self.hash_block_size or HASH_BLOCK_SIZE in rows.columns):
            return None, 0
        block_size = self.hash_block_size or _constant(rows, HASH_BLOCK_SIZE)
        lists = [_id_list(value) for value in rows.columns[self.hash_ids]]
        for row, (ids, num_tokens) in enumerate(zip(lists, input_tokens.tolist(), strict=True)):
            if ids is None:
                given = _short(rows.columns[self.hash_ids][row])
                rows.complain(row, self.hash_ids, f"{self.hash_ids} is {given}", "give a list of whole numbers")
            elif block_size and num_tokens and len(ids) > -(-num_tokens // block_size):
                message = f"{len(ids)} {self.hash_ids} for {num_tokens} tokens"
                rows.complain(row, self.hash_ids, message, f"give one id per {block_size} tokens of the prompt")
        return [ids or [] for ids in lists], block_size


def chain_keys(hash_ids: Sequence[Sequence[Any]]) -> list[tuple[int, ...]]:
    """Block ids chained through their parents: equal keys mean equal content and equal prefix.

    Keys count up from 0 in order of first appearance.
    """
    interned: dict[tuple[int, Any], int] = {}
    chained = []
    for ids in hash_ids:
        keys, parent = [], -1
        for block in ids:
            parent = interned.setdefault((parent, block), len(interned))
            keys.append(parent)
        chained.append(tuple(keys))
    return chained


def unit_problem(unit: str, column: str) -> str | None:
    """Why numbers in `unit` can't be read as times of `column`; None if they can."""
    units = (*TIME_UNITS, TIMESTAMP)
    if unit in units:
        return None
    given = f"the unit of {column!r}" if unit == column.rpartition("_")[2] else f"time_unit {unit!r}"
    return f"{given} is not known: set time_unit to one of {', '.join(units)}"


def _arrivals(rows: Rows, name: str, unit: str) -> IntArray:
    """Nanoseconds of the column; 0 where the file has none."""
    if name not in rows.columns:
        return np.zeros(len(rows.lines), dtype=np.int64)
    values = rows.columns[name]
    if isinstance(values, np.ndarray) and values.dtype.kind == "M":
        seconds = values.astype("datetime64[s]").astype(np.int64)
        bad = np.isnat(values) | (seconds < 0) | (seconds >= _MAX_NS // NS_PER_S)
        within = np.where(bad, np.datetime64(0, "s"), values)
        times, hint = within.astype("datetime64[ns]").astype(np.int64), "give every row a time from 1970 to 2116"
    elif reason := unit_problem(unit, name):
        rows.problems.fail(reason, line=1, hint="columns: {..., time_unit: s}")
    elif unit == TIMESTAMP:
        (times, bad), hint = _stamps(values), _STAMP_HINT
    else:
        times, bad = _times(values, TIME_UNITS[unit])
        hint = f"give a time >= 0 in {unit}, or set time_unit ({', '.join(TIME_UNITS)} or {TIMESTAMP})"
    _complain(rows, name, bad, hint)
    return times


def whole_tokens(rows: Rows, name: str, minimum: int) -> IntArray:
    """int64 of a column; values that aren't whole numbers from `minimum` are problems of `rows`, and 0."""
    numbers = _numbers(rows.columns[name])
    with np.errstate(invalid="ignore"):
        bad = ~((numbers >= minimum) & (numbers < MAX_TOKENS) & (np.floor(numbers) == numbers))
    _complain(rows, name, bad, f"give a whole number of tokens from {minimum} to {MAX_TOKENS - 1}")
    return np.where(bad, 0, numbers).astype(np.int64)


def _complain(rows: Rows, name: str, bad: BoolArray, hint: str) -> None:
    places, also = np.flatnonzero(bad).tolist(), ""
    if len(places) == len(bad) > MAX_PROBLEMS:  # a wrong column or unit: told once, so that it hides nothing else
        places, also = places[:1], f", and not one of {len(bad):,} rows is right"
    for row in places[:MAX_PROBLEMS]:
        value = rows.columns[name][row]
        given = "missing" if value is None or value == "" else _short(value)
        rows.complain(row, name, f"{name} is {given}{also}", hint)
    rows.problems.num_more += len(places[MAX_PROBLEMS:])


def _constant(rows: Rows, name: str) -> int:
    """The one value that a column of whole numbers has in every row; 0 (and a problem) where there are several."""
    sizes = np.unique(whole_tokens(rows, name, minimum=1))
    if len(sizes) > 1:
        hint = "one trace has one block size"
        rows.problems.add(f"{name} differs: {', '.join(map(str, sizes[:5]))}", line=1, hint=hint)
        return 0
    return int(sizes.sum())


def _numbers(values: Column) -> FloatArray:
    """float64 of every value, NaN where it is not a number."""
    if isinstance(values, np.ndarray) and values.dtype.kind in "iuf":
        return values.astype(np.float64)
    if set(map(type, values)) in ({str}, {int}, {float}, {int, float}):
        try:
            return np.array(values, dtype=np.float64)
        except (ValueError, OverflowError):
            pass
    return np.array([_number(value) for value in values], dtype=np.float64)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return float("nan")
    try:
        return float(value)
    except (ValueError, OverflowError):
        return float("nan")


def _times(values: Column, ns_per_unit: int) -> tuple[IntArray, BoolArray]:
    """Numbers of a unit as ns, right to the nanosecond, and which of them are none."""
    numbers = _numbers(values)
    with np.errstate(invalid="ignore", over="ignore"):
        ns = numbers * ns_per_unit
        bad = ~((ns >= 0) & (ns < _MAX_NS))
    if not np.any(ns[~bad] >= _EXACT_FLOAT_NS):
        return np.rint(np.where(bad, 0, ns)).astype(np.int64), bad
    exact = [0 if wrong else _exact_ns(value, ns_per_unit) for value, wrong in zip(values, bad.tolist(), strict=True)]
    return np.array(exact, dtype=np.int64), bad


def _exact_ns(value: Any, ns_per_unit: int) -> int:
    try:
        return round(Decimal(str(value)) * ns_per_unit)
    except InvalidOperation:  # digits that float() reads but Decimal does not
        return round(float(value) * ns_per_unit)


def _stamps(values: Column) -> tuple[IntArray, BoolArray]:
    """Time stamps as ns since 1970, and which of them are none."""
    if set(map(type, values)) == {str} and all(map(_STAMP.fullmatch, values)):
        texts: Column = values
        ahead_ns: IntArray = np.zeros(1, dtype=np.int64)
    else:
        parts = [_parts_of_stamp(value) for value in values]
        texts = [text for text, _ in parts]
        ahead_ns = np.array([ahead for _, ahead in parts], dtype=np.int64)
    bad = np.fromiter(map("".__eq__, texts), dtype=np.bool_, count=len(texts))
    try:
        times = _parse_stamps(texts)
    except ValueError:  # a 30th of February: find each of them
        times = np.zeros(len(texts), dtype=np.int64)
        for row, text in enumerate(texts):
            try:
                times[row] = _parse_stamps([text])[0]
            except ValueError:
                bad[row] = True
    return times - ahead_ns, bad


def _parts_of_stamp(value: Any) -> tuple[str, int]:
    """A stamp without its mark of UTC or its offset, "" where the value is none; and ns that it is ahead of UTC."""
    found = _ZONED.fullmatch(value.strip()) if isinstance(value, str) else None
    if found is None:
        return "", 0
    minutes = 60 * int(found["hours"] or 0) + int(found["minutes"] or 0)
    return found["stamp"], (-1 if found["sign"] == "-" else 1) * minutes * 60 * NS_PER_S


def _parse_stamps(texts: Column) -> IntArray:
    return np.array(texts, dtype="datetime64[ns]").astype(np.int64)


def _id_list(value: Any) -> list[Any] | None:
    """The block ids of one request; None where the value is no list of whole numbers."""
    if isinstance(value, str):
        ids: list[Any] = value.strip("[]").replace(",", " ").split()
        return ids if all(map(str.isdecimal, ids)) else None
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if not isinstance(value, list):
        return None
    return value if all(kind is int for kind in set(map(type, value))) else None


def _short(value: Any) -> str:
    text = repr(value.item() if isinstance(value, np.generic) else value)
    return text if len(text) <= 60 else text[:57] + "..."
