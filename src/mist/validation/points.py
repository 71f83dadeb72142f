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

#: fraction of the offered output rate below which an open loop is saturated, and the TTFT above which one without rate
SATURATED_SHARE = 0.95
SATURATED_TTFT_MS = 5000.0


class Skip(Exception):
    """Why a point or a row isn't compared; counted, never raised to the user."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One measured value: `metric` carries its unit."""

    id: str
    metric: str
    value: float


@dataclass(slots=True)
class Point:
    """One operating point: its configuration `columns` (text as in the file) and the values measured there.

    `saturated` is None until it is judged (a closed loop's by the KV capacity, which the setting knows).
    """

    name: str
    columns: Mapping[str, str]
    measured: list[Measured] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

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

    @property
    def trust(self) -> str:
        return self["trust"] or "B"

    def values(self, metric: str) -> list[float]:
        return [m.value for m in self.measured if m.metric == metric]

    def open_loop_saturated(self) -> bool:
        """Whether an open loop or a trace was, by what was measured: see `docs/validation.md`."""
        rate, osl = self.number("rate_per_s") or _mean_rate(self["stages"]), self.number("osl")
        outputs = self.values("output_tokens_per_s")
        if not outputs and (spans := self.values("makespan_s")) and self["num_requests"] and osl:
            outputs = [self.count("num_requests") * osl / spans[0]]
        if outputs and rate and osl:
            return sum(outputs) / len(outputs) < SATURATED_SHARE * rate * osl
        ttft = self.values("ttft_mean_ms")
        return bool(ttft) and sum(ttft) / len(ttft) > SATURATED_TTFT_MS


@dataclass(slots=True)
class PointFile:
    """A whole file: its points in order, rows in all, and those that the file itself calls not runnable, with why."""

    path: Path
    points: list[Point]
    num_rows: int
    not_runnable: list[tuple[str, str]]


def read_points(path: Path, *, sources: Iterable[str] = (), trusts: Iterable[str] = (), device: str = "") -> PointFile:
    """The points of a CSV file (.gz too), only those of the named sources and trusts where any are named.

    A row without `point` is a point of its own, one without `id` is called by its line. ScenarioError where the file
    can't be read, isn't a table of points, or holds none of the named sources.
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
        if (wanted and row["source"] not in wanted) or (trusted and (row.get("trust") or "B") not in trusted):
            continue
        found.num_rows += 1
        row["id"] = row["id"] or f"row-{number}"
        row["point"] = row["point"] or row["id"]
        if (row.get("runnable") or "true").lower() != "true":
            found.not_runnable.append((row["id"], row.get("why_not") or "not runnable, as the file says"))
            continue
        name = row["source"], row["point"]
        point = by_name.get(name)
        if point is None:
            point = by_name[name] = Point(row["point"], row)
            found.points.append(point)
        try:
            value = float(row["value"])
        except ValueError:
            point.skipped.append((row["id"], f"value is {row['value']!r}, not a number"))
            continue
        if not 0 < value < float("inf"):
            point.skipped.append((row["id"], f"value is {row['value']}"))
            continue
        point.measured.append(Measured(row["id"], row["metric"], value))
    return found


def sampled(file: PointFile, per_source: int) -> PointFile:
    """`per_source` points of each source, evenly spaced in the file; rows are then counted of these points alone."""
    by_source: dict[str, list[Point]] = {}
    for point in file.points:
        by_source.setdefault(point["source"], []).append(point)
    chosen = {id(point) for points in by_source.values() for point in _evenly(points, per_source)}
    points = [point for point in file.points if id(point) in chosen]
    num_rows = sum(len(point.measured) + len(point.skipped) for point in points)
    return replace(file, points=points, num_rows=num_rows, not_runnable=[])


def _evenly(points: list[Point], number: int) -> list[Point]:
    """The middles of `number` equal parts, or all of fewer."""
    if number >= len(points):
        return points
    return [points[(2 * i + 1) * len(points) // (2 * number)] for i in range(number)]


def _rows(path: Path) -> tuple[list[dict[str, str]], list[str]]:
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except OSError as error:
        hint = "name a CSV file of measured points"
        raise ScenarioError(Problem(f"{path}: {error.strerror or error}", hint=hint)) from None
    except (UnicodeDecodeError, EOFError, zlib.error) as error:
        raise ScenarioError(Problem(f"is no text file: {error}", str(path), 1, 1, "points are UTF-8 CSV")) from None
    reader = csv.DictReader(io.StringIO(text), restval="")
    try:
        rows = [{key: (value or "").strip() for key, value in row.items() if key is not None} for row in reader]
    except csv.Error as error:
        raise ScenarioError(Problem(f"is no CSV: {error}", str(path), reader.line_num, 1)) from None
    return rows, list(reader.fieldnames or [])


def parse_stages(text: str) -> list[tuple[float, float]]:
    """(rate per s, seconds) of `8:600s;20:600s`; Skip where it says something else."""
    found = []
    for stage in text.split(";"):
        rate, _, duration = stage.partition(":")
        try:
            found.append((float(rate), float(duration.rstrip("s"))))
        except ValueError:
            raise Skip(f"stages are {text!r}, not as 8:600s;20:600s") from None
    return found


def _mean_rate(stages: str) -> float | None:
    if not stages:
        return None
    parsed = parse_stages(stages)
    total = sum(seconds for _, seconds in parsed)
    return sum(rate * seconds for rate, seconds in parsed) / total if total else None
