"""Measured points: a file with one row per measured value becomes operating points with what was measured at each.

The first part of a validation. A row that can't be used is a skip with its reason, never an error: only a file that
isn't a table of points at all is one. It knows no engine and no scenario.
"""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from mist.errors import Problem, ScenarioError, nearest

#: columns without which a file isn't one of points
REQUIRED = ("point", "id", "source", "metric", "value", "engine", "model", "device", "load")

#: columns in which rows of one point may differ: what was measured, and what is said about it
ABOUT_A_ROW = frozenset(("id", "metric", "value", "citation", "note", "trust", "date", "runnable", "why_not"))
#: how far a measurement is trusted
TRUSTS = ("A", "B", "C")

#: fraction of the offered output rate below which an open loop is saturated, and the TTFT above which one without rate
SATURATED_SHARE = 0.95
SATURATED_TTFT_MS = 5000.0


#: beyond this a stage's rate per second, or its seconds, is no setting
MOST = 1e9


class Skip(Exception):
    """Why a point or a row isn't compared; counted, never raised to the user."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One measured value: `metric` carries its unit, `trust` is how far it can be."""

    id: str
    metric: str
    value: float
    trust: str = "B"


@dataclass(slots=True)
class Point:
    """One operating point: its configuration `columns` (text as in the file) and the values measured there.

    `measured` is compared; `beside` are values of a trust that wasn't asked for, by which saturation is judged too.
    """

    name: str
    columns: Mapping[str, str]
    measured: list[Measured] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    beside: list[Measured] = field(default_factory=list)

    def __getitem__(self, column: str) -> str:
        return self.columns.get(column) or ""

    def number(self, column: str, default: float | None = None) -> float | None:
        """The column as a number, `default` where it is empty; Skip where it is no number."""
        text = self[column]
        if not text:
            return default
        try:
            value = float(text)
        except ValueError:
            raise Skip(f"{column} is {text!r}, not a number") from None
        if not 0 <= value < float("inf"):
            raise Skip(f"{column} is {text}")
        return value

    def count(self, column: str, default: int = 0) -> int:
        """The column as a whole number, `default` where it is empty; Skip where it is none."""
        value = self.number(column, default)
        assert value is not None
        if value != int(value):
            raise Skip(f"{column} is {value:g}, not a whole number")
        return int(value)

    def positive(self, column: str) -> int:
        """`count`, of which 0 means that the column is empty; Skip where it says 0."""
        value = self.count(column)
        if self[column] and not value:
            raise Skip(f"{column} is 0")
        return value

    def mean(self, metric: str) -> float | None:
        """The mean of all values of `metric`, which are repeats; None where there is none."""
        values = [m.value for m in (*self.measured, *self.beside) if m.metric == metric]
        return sum(values) / len(values) if values else None

    def open_loop_saturated(self, num_devices: int = 1, trace_rate_per_s: float | None = None) -> bool:
        """Whether an open loop or a trace was, by what was measured: see `docs/validation.md`.

        `trace_rate_per_s` is that of a request list's own arrivals, where no rate is stated.
        """
        rate = self.number("rate_per_s") or _mean_rate(self["stages"]) or trace_rate_per_s
        osl = self.number("osl")
        output = self._output_rate(num_devices)
        if output is not None and rate and osl:
            return output < SATURATED_SHARE * rate * osl
        ttft_ms = self.mean("ttft_mean_ms")
        return ttft_ms is not None and ttft_ms > SATURATED_TTFT_MS

    def _output_rate(self, num_devices: int) -> float | None:
        """Output tokens per second as measured, by whichever throughput tells; None where none does."""
        isl, osl = self.number("isl"), self.number("osl") or 0.0
        if (output := self.mean("output_tokens_per_s")) is not None:
            return output
        if (output := self.mean("output_tokens_per_s_per_device")) is not None:
            return output * num_devices
        if (requests := self.mean("requests_per_s")) is not None:
            return requests * osl
        if (tokens := self.mean("total_tokens_per_s")) is not None and isl is not None and osl:
            return tokens * osl / (isl + osl)
        if (span_s := self.mean("makespan_s")) is not None and (number := self.count("num_requests")):
            return number * osl / span_s
        return None


@dataclass(slots=True)
class PointFile:
    """A whole file: its points in order, rows in all, and those that the file itself calls not runnable, with why.

    Of a sample `num_sampled` are the rows of its points; the others are still those of the file.
    """

    path: Path
    points: list[Point]
    num_rows: int
    not_runnable: list[tuple[str, str]]
    num_sampled: int | None = None


def read_points(path: Path, *, sources: Iterable[str] = (), trusts: Iterable[str] = ()) -> PointFile:
    """The points of a CSV file (gzipped or not), only the rows of the named sources and trusts where any are named.

    A row without `point` is a point of its own, one without `id` is called by its line. A row that describes its point
    otherwise than the first one does is a skip. ScenarioError where the file can't be read, isn't a table of points, or
    holds none of the named sources.
    """
    rows, columns = _rows(path)
    missing = [name for name in REQUIRED if name not in columns]
    if missing:
        hints = [f"{name} ({nearest(name, columns)})" for name in missing]
        raise ScenarioError(
            Problem(f"columns are missing: {', '.join(hints)}", str(path), 1, 1, "the first line names the columns")
        )
    wanted, trusted = set(sources), set(trusts)
    if unknown := wanted - {row["source"] for row in rows}:
        known = sorted({row["source"] for row in rows})
        hint = nearest(min(unknown), known)
        raise ScenarioError(Problem(f"there is no source {min(unknown)!r}", str(path), 0, 0, hint))
    found = PointFile(path, [], 0, [])
    by_name: dict[tuple[str, str], Point] = {}
    for number, row in enumerate(rows, 1):
        if wanted and row["source"] not in wanted:
            continue
        chosen = not trusted or trust_of(row) in trusted
        found.num_rows += chosen
        row["id"] = row["id"] or f"row-{number}"
        row["point"] = row["point"] or row["id"]
        if (row.get("runnable") or "true").lower() not in ("true", "1", "yes"):
            if chosen:
                found.not_runnable.append((row["id"], row.get("why_not") or "not runnable, as the file says"))
            continue
        point = by_name.setdefault((row["source"], row["point"]), Point(row["point"], row))
        _add(point, row, chosen=chosen)
    found.points = [point for point in by_name.values() if point.measured or point.skipped]
    return found


def trust_of(row: Mapping[str, str]) -> str:
    """How far a row is trusted; B where it doesn't say."""
    return row.get("trust") or "B"


def _add(point: Point, row: Mapping[str, str], *, chosen: bool) -> None:
    """The row's value to those of its point, or why it isn't one."""
    try:
        measured = _measured(point, row)
    except Skip as skip:
        if chosen:
            point.skipped.append((row["id"], str(skip)))
    else:
        (point.measured if chosen else point.beside).append(measured)


def _measured(point: Point, row: Mapping[str, str]) -> Measured:
    others = sorted(key for key in row if key not in ABOUT_A_ROW and row[key] != point[key])
    if others:
        raise Skip(f"{', '.join(others)}: not as in the point's first row")
    if trust_of(row) not in TRUSTS:
        raise Skip(f"trust is {row['trust']!r}, not A, B or C")
    try:
        value = float(row["value"])
    except ValueError:
        raise Skip(f"value is {row['value']!r}, not a number") from None
    if not 0 < value < float("inf"):
        raise Skip(f"value is {row['value']}")
    return Measured(row["id"], row["metric"], value, trust_of(row))


def sampled(file: PointFile, per_source: int) -> PointFile:
    """`per_source` points of each source, evenly spaced in the file; `num_sampled` are the rows of these."""
    by_source: dict[str, list[Point]] = {}
    for point in file.points:
        by_source.setdefault(point["source"], []).append(point)
    chosen = {id(point) for points in by_source.values() for point in _evenly(points, per_source)}
    points = [point for point in file.points if id(point) in chosen]
    num_sampled = sum(len(point.measured) + len(point.skipped) for point in points)
    return replace(file, points=points, num_sampled=num_sampled)


def _evenly(points: list[Point], number: int) -> list[Point]:
    """The middles of `number` equal parts, or all of fewer."""
    if number >= len(points):
        return points
    return [points[(2 * i + 1) * len(points) // (2 * number)] for i in range(number)]


def _rows(path: Path) -> tuple[list[dict[str, str]], list[str]]:
    try:
        text = read_text(path)
    except OSError as error:
        hint = "name a CSV file of measured points"
        raise ScenarioError(Problem(f"{path}: {error.strerror or error}", hint=hint)) from None
    except ValueError as error:
        raise ScenarioError(Problem(f"is no text file: {error}", str(path), 1, 1, "points are UTF-8 CSV")) from None
    reader = csv.DictReader(io.StringIO(text), restval="")
    try:
        reader.fieldnames = columns = [name.strip() for name in reader.fieldnames or ()]
        if repeated := [name for i, name in enumerate(columns) if name and name in columns[:i]]:
            raise ScenarioError(
                Problem(f"the column {repeated[0]!r} is there twice", str(path), 1, 1, "keep one of them")
            )
        rows = [{key: (value or "").strip() for key, value in row.items() if key is not None} for row in reader]
    except csv.Error as error:
        raise ScenarioError(Problem(f"is no CSV: {error}", str(path), reader.line_num, 1)) from None
    return rows, columns


def read_text(path: Path) -> str:
    """A text file, gzipped or not whatever its name; OSError where it can't be read, ValueError where it is no text."""
    data = path.read_bytes()
    try:
        return (gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data).decode("utf-8-sig")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(str(error)) from None


def request_list(folder: Path, name: str) -> Path | None:
    """Where the request list `name` lies, from `folder` on: under workloads/ or as it stands; None where it doesn't."""
    found = (path for path in (Path("workloads") / name, Path(name)) if name and (folder / path).is_file())
    return next(found, None)


def request_lists(file: PointFile) -> list[Path]:
    """The request lists that the file's points name, where they are there."""
    folder = file.path.parent
    names = sorted({point["workload_file"] for point in file.points})
    return [folder / path for name in names if (path := request_list(folder, name)) is not None]


def parse_stages(text: str) -> list[tuple[float, float]]:
    """(rate per s, seconds) of `8:600s;20:600s`; Skip where it says something else."""
    found = []
    for stage in text.strip().removesuffix(";").split(";"):
        rate, _, duration = stage.partition(":")
        try:
            found.append((float(rate), float(duration.strip().removesuffix("s"))))
        except ValueError:
            raise Skip(f"stages are {text!r}, not as 8:600s;20:600s") from None
    if not all(0 <= rate < MOST and 0 < seconds < MOST for rate, seconds in found) or not any(r for r, _ in found):
        raise Skip(f"stages are {text!r}, not as 8:600s;20:600s")
    return found


def _mean_rate(stages: str) -> float | None:
    if not stages:
        return None
    parsed = parse_stages(stages)
    return sum(rate * seconds for rate, seconds in parsed) / sum(seconds for _, seconds in parsed)
