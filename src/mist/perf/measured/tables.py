"""Measured tables as arrays: converted from Parquet once, kept in the user's cache folder, read back in milliseconds.

Below the `kernels` performance model. A cached file is written whole under another name and then renamed, so any
number of processes may do it first; it never locks, and works without a cache where the folder can't be written.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import sys
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mist.perf.measured.families import BY_NAME, Family
from mist.perf.measured.grid import FloatArray, RaggedGrid, isotonic
from mist.perf.measured.mapped import read_arrays
from mist.perf.measured.package import TablesFolder, version_key

CACHE_VARIABLE = "MIST_CACHE"
#: Raised whenever converted files change their meaning.
FORMAT = 5

Arrays = dict[str, npt.NDArray[Any]]


@dataclass(slots=True)
class Table:
    """One converted table: key and axis columns and times in ns, sorted by keys, then axes.

    Text keys are stored as codes; `categories` holds their texts. `shift` is how far cleaning moved times: the median
    and 95th percentile of |clean / measured - 1|.
    """

    family: Family
    columns: Arrays
    ns: FloatArray
    categories: dict[str, list[str]]
    shift: tuple[float, float] = (0.0, 0.0)
    _grids: dict[tuple[Any, ...], RaggedGrid | None] = field(default_factory=dict)

    def grid(self, **keys: int | str) -> RaggedGrid | None:
        """The points whose keys are all equal to `keys`, which name every key of the family; None if there are none."""
        named = tuple(keys[name] for name in self.family.keys)
        if named not in self._grids:
            self._grids[named] = self._select(named)
        return self._grids[named]

    def key_values(self, name: str, **keys: int | str) -> list[int]:
        """The values of a numeric column among the points that match `keys`, ascending."""
        chosen = self._where(keys)
        return [int(v) for v in np.unique(self.columns[name][chosen])]

    def _where(self, keys: Mapping[str, int | str]) -> npt.NDArray[np.bool_]:
        chosen = np.ones(len(self.ns), bool)
        for name, value in keys.items():
            if isinstance(value, str):
                known = self.categories.get(name, [])
                value = known.index(value) if value in known else -1
            chosen &= self.columns[name] == value
        return chosen

    def _select(self, named: tuple[int | str, ...]) -> RaggedGrid | None:
        chosen = self._where(dict(zip(self.family.keys, named, strict=True)))
        if not chosen.any():
            return None
        axes = self.family.axes
        points = [axis.scaled(self.columns[axis.column][chosen].astype(np.float64)) for axis in axes]
        return RaggedGrid.filled(np.stack(points), self.ns[chosen])


@dataclass(slots=True)
class OperatorTables:
    """The tables of one system and framework; `version` "" is the newest with GEMM and attention tables."""

    folder: TablesFolder
    system: str
    framework: str = "vllm"
    version: str = ""
    _loaded: dict[str, Table | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.version:
            core = [self.folder.versions(self.system, BY_NAME[name], self.framework) for name in _CORE]
            common = set(core[0]).intersection(*core[1:])
            self.version = max(common, key=version_key, default="")

    def problem(self) -> str | None:
        """Why nothing can be priced from here: no such system, or no GEMM or attention table; None if it can."""
        for name in _CORE:
            if not self.folder.versions(self.system, BY_NAME[name], self.framework):
                known = ", ".join(self.folder.systems())
                return f"no {name} table of {self.framework} on {self.system} (systems with tables: {known})"
        return None

    def table(self, name: str) -> Table | None:
        """The table of a family, converted and cached if it wasn't; None where it wasn't measured."""
        if name not in self._loaded:
            family = BY_NAME[name]
            path = self.folder.file(self.system, family, self.framework, self.version)
            self._loaded[name] = _shared(path, name, cache_folder(self.folder.version)) if path else None
        return self._loaded[name]

    def identity(self) -> tuple[object, ...]:
        """What everything that is read from here depends on: the files that there are, and their times of change."""
        paths = [self.folder.file(self.system, family, self.framework, self.version) for family in BY_NAME.values()]
        return tuple((str(path), *_version_of(path)) for path in paths if path)


_CORE = ("gemm", "context_attention", "generation_attention")


def _version_of(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _shared(path: Path, family: str, cache: Path) -> Table:
    """The table of a file, which all that are prepared in this process have in common."""
    return _read_once(path, family, cache, _version_of(path))


@functools.lru_cache(maxsize=128)
def _read_once(path: Path, family: str, cache: Path, version: tuple[int, int]) -> Table:
    return load(BY_NAME[family], path, cache)


def cache_folder(package_version: str) -> Path:
    """Where converted tables of a package version go: below MIST_CACHE, XDG_CACHE_HOME or the platform's cache."""
    home = os.environ.get(CACHE_VARIABLE)
    if not home:
        default = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
        home = str(Path(os.environ.get("XDG_CACHE_HOME") or default) / "mist")
    return Path(home).expanduser() / "kernels" / f"{package_version}-format-{FORMAT}"


def load(family: Family, path: Path, cache: Path) -> Table:
    """The table in `path`, from the cache if it is there, else converted and cached."""
    stat = path.stat()
    identity = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{family.name}"
    cached = cache / f"{family.name}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.npz"
    table = _cached(family, cached)
    if table is None:
        arrays = convert(family, path)
        _store(arrays, cached)
        table = _table(family, arrays)
    return table


def _cached(family: Family, path: Path) -> Table | None:
    """The table in a cached file; None if there is no such file, or its checksums say that it is damaged."""
    try:
        return _table(family, read_arrays(path))
    except Exception:  # a damaged archive breaks in many ways, and all that it holds can be converted again
        return None


def convert(family: Family, path: Path, *, clean: bool = True) -> Arrays:
    """A Parquet table as arrays: one row for each shape, times in ns, monotone along the rising axes if `clean`.

    Repeated rows are repeated runs (they differ by 1 to 3 % in the median): their median counts.
    """
    raw = _read(family, path)
    arrays: Arrays = {}
    for name in family.columns:
        column = raw[name]
        if column.dtype == object:
            texts, column = np.unique(column.astype(str), return_inverse=True)
            arrays[f"{name}/texts"] = texts
        arrays[name] = column.astype(np.int64)
    ns = raw[family.time].astype(np.float64) * family.unit_ns
    usable = np.isfinite(ns) & (ns > 0)
    order = np.lexsort([arrays[name][usable] for name in reversed(family.columns)])
    columns = {name: arrays[name][usable][order] for name in family.columns}
    columns, measured = _merge_runs(columns, ns[usable][order])
    rising = [family.columns.index(axis.column) for axis in family.axes if axis.rising]
    weights = columns[family.weight].astype(np.float64) if family.weight else np.ones(len(measured))
    clean = clean and len(measured) > 0
    times = isotonic(list(columns.values()), measured, rising, weights) if clean else measured
    shift = np.abs(times / measured - 1)
    arrays.update(columns)
    arrays["ns"] = times
    arrays["shift"] = np.percentile(shift, [50, 95]) if len(shift) else np.zeros(2)
    return arrays


def _read(family: Family, path: Path) -> Arrays:
    import pyarrow.parquet as parquet

    file = parquet.ParquetFile(path)
    wanted = {*family.columns, family.time}.union(*(d.columns for d in family.derived.values())) - set(family.derived)
    names = [name for name in file.schema_arrow.names if name in wanted]
    missing = wanted - set(names) - set(family.defaults)
    if missing:
        raise ValueError(f"{path} lacks the columns {', '.join(sorted(missing))}")
    table = file.read(columns=names)
    raw = {name: table[name].to_numpy() for name in names}
    for name, value in family.defaults.items():
        if name not in raw:
            raw[name] = np.full(table.num_rows, value, object if isinstance(value, str) else np.int64)
    return {**raw, **{name: d.compute(*(raw[c] for c in d.columns)) for name, d in family.derived.items()}}


def _merge_runs(columns: Arrays, ns: FloatArray) -> tuple[Arrays, FloatArray]:
    """One row for each distinct row of the sorted `columns`, with the median of its times."""
    if not len(ns):
        return columns, ns
    new = np.ones(len(ns), bool)
    new[1:] = np.any([column[1:] != column[:-1] for column in columns.values()], axis=0)
    firsts = np.flatnonzero(new)
    if len(firsts) == len(ns):
        return columns, ns
    medians = ns[firsts]
    sizes = np.diff(np.append(firsts, len(ns)))
    for i in np.flatnonzero(sizes > 1).tolist():
        medians[i] = np.median(ns[firsts[i] : firsts[i] + sizes[i]])
    return {name: column[firsts] for name, column in columns.items()}, medians


def _store(arrays: Arrays, path: Path) -> None:
    """Write `path` whole or not at all; a cache that can't be written is done without."""
    temporary = path.with_name(f"{path.stem}.{uuid.uuid4().hex}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _table(family: Family, arrays: Arrays) -> Table:
    texts = {name: [str(t) for t in arrays[f"{name}/texts"]] for name in family.columns if f"{name}/texts" in arrays}
    median, p95 = arrays["shift"].tolist()
    return Table(family, {name: arrays[name] for name in family.columns}, arrays["ns"], texts, (median, p95))
