"""Measured tables: conversion and its units, cleaning, cache, choice of versions, and interpolation on ragged grids.

Guards with small Parquet tables of known laws in the layout of the operator package; nothing here needs the package.
"""

from __future__ import annotations

import math
import multiprocessing
import random
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mist.perf.measured import (
    BY_NAME,
    EXTRAPOLATED,
    INTERPOLATED,
    MEASURED,
    OperatorTables,
    RaggedGrid,
    find_tables,
    package,
    tables,
)
from mist.perf.measured.grid import isotonic
from mist.perf.measured.package import TablesFolder, version_key

Row = Mapping[str, Any]

# laws of the made-up device, ms; all are linear in the coordinates of the tables' axes


def gemm_ms(m: float, n: float, k: float) -> float:
    return 3e-3 + 3e-11 * m * n * k + 3e-9 * n * k


def prefill_ms(batch: float, length: float, heads: float) -> float:
    return 1e-2 + 2e-9 * batch * heads * length * (length + 1000)


def decode_ms(batch: float, total: float, kv_heads: float) -> float:
    return 1e-2 + 4e-7 * kv_heads * total + 1e-4 * batch * kv_heads


def allreduce_ms(elements: float) -> float:
    return 5e-3 + 1e-7 * elements


def nccl_ms(elements: float) -> float:
    return 2e-2 + 0.2e-7 * elements


def streaming_ms(m: float, k: float) -> float:
    return 2e-3 + 6e-9 * m * k


def write(root: Path, folder: str, file: str, rows: list[Row]) -> Path:
    """A Parquet table in the package's layout below `root`; `folder` is system/family/framework/version."""
    path = root / folder / f"{file}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), path)
    return path


def gemm_rows(dtype: str = "bfloat16", ms: Any = gemm_ms) -> list[Row]:
    ms_, ns, ks = (1, 2, 4, 16, 64, 256, 1024), (256, 512, 1024, 2048, 32768), (256, 512, 1024, 2048)
    return [{"gemm_dtype": dtype, "m": m, "n": n, "k": k, "latency": ms(m, n, k)} for m in ms_ for n in ns for k in ks]


def attention_rows(context: bool, head_dim: int = 64) -> Iterator[Row]:
    for kv_heads in (1, 2, 4):
        for heads in (kv_heads, 2 * kv_heads, 4 * kv_heads):
            shape = {"num_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim, "window_size": 0,
                     "attn_dtype": "bfloat16", "kv_cache_dtype": "bfloat16"}  # fmt: skip
            for batch in (1, 2, 4, 8, 16, 32, 64):
                for i in range(1, 14):
                    tokens = 2**i
                    if batch * tokens > 2**16:
                        continue
                    if context:
                        sizes = {"isl": tokens, "step": 0, "latency": prefill_ms(batch, tokens, heads)}
                    else:
                        sizes = {"isl": 1, "step": tokens - 1, "latency": decode_ms(batch, batch * tokens, kv_heads)}
                    yield {**shape, "batch_size": batch, **sizes}


def write_system(root: Path, system: str = "made_up", version: str = "0.24.0", gemm: list[Row] | None = None) -> Path:
    """The tables of one device, enough for dense models with heads of 64; returns `root`."""
    write(root, f"{system}/gemm/vllm/{version}", "gemm_perf", gemm or gemm_rows())
    for context in (True, False):
        file = "context_attention_perf" if context else "generation_attention_perf"
        write(root, f"{system}/attention/vllm/{version}", file, list(attention_rows(context)))
    write(root, f"{system}/comm/vllm/{version}", "custom_allreduce_perf", [
        {"num_gpus": 2, "backend": f"vllm_{mode}", "message_size": 2**i, "latency": slow * allreduce_ms(2**i)}
        for i in range(7, 24) for mode, slow in (("graph", 1.0), ("eager", 3.0))
    ])  # fmt: skip
    write(root, f"{system}/comm/nccl/2.29.2", "nccl_perf", [
        {"op_name": name, "nccl_dtype": "half", "num_gpus": 2, "message_size": 2**i, "latency": share * nccl_ms(2**i)}
        for i in range(8, 24) for name, share in (("all_reduce", 1.0), ("all_gather", 0.5))
    ])  # fmt: skip
    write(root, f"{system}/quantize/vllm/{version}", "scale_matrix_perf", [
        {"quant_dtype": "fp8", "m": m, "k": k, "latency": streaming_ms(m, k)}
        for m in (1, 16, 256, 1024) for k in (32, 512, 4096)
    ])  # fmt: skip
    return root


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("MIST_CACHE", str(folder))
    return folder


def opened(root: Path, **choice: str) -> OperatorTables:
    """As a process does that has read nothing yet."""
    tables._read_once.cache_clear()
    return OperatorTables(TablesFolder(root, "1.0"), **{"system": "made_up", **choice})


# --- conversion ---


def test_times_come_out_in_ns_at_the_measured_points(tmp_path: Path, cache: Path) -> None:
    table = opened(write_system(tmp_path / "t")).table("gemm")
    assert table is not None
    grid = table.grid(gemm_dtype="bfloat16")
    assert grid is not None
    found = grid.at((16.0, 512.0), np.array([1024.0]))
    assert found.ns[0] == pytest.approx(1e6 * gemm_ms(16, 512, 1024))
    assert found.origin[0] == MEASURED
    assert table.grid(gemm_dtype="fp8") is None


def test_expert_all_to_all_is_in_microseconds(tmp_path: Path, cache: Path) -> None:
    family = BY_NAME["moe_a2a"]
    keys = {"comm_backend": "deepep_ht", "phase": "combine", "ep_size": 8, "node_num": 1, "hidden_size": 4096,
            "topk": 8, "num_experts": 256, "sms": 20}  # fmt: skip
    path = write(tmp_path, "x/comm/vllm/1", family.file, [{**keys, "num_tokens": 16, "latency": 42.0}])
    assert tables.load(family, path, cache).ns.tolist() == [42_000.0]


def test_a_step_of_cached_tokens_attends_to_one_more(tmp_path: Path, cache: Path) -> None:
    table = opened(write_system(tmp_path / "t")).table("generation_attention")
    assert table is not None
    assert table.columns["total_context"].min() == 2, "step 1 with one sequence"
    assert set(np.unique(table.columns["total_context"] % 2)) == {0}


def test_repeated_runs_count_by_their_median_and_broken_rows_not_at_all(tmp_path: Path, cache: Path) -> None:
    family = BY_NAME["custom_allreduce"]
    times = {128: (3.0, 1.0, 2.0), 256: (5.0, float("nan"), 4.0), 512: (0.0, -1.0), 1024: (9.0,)}
    rows = [{"num_gpus": 2, "message_size": size, "latency": t} for size, runs in times.items() for t in runs]
    table = tables.load(family, write(tmp_path, "x/comm/vllm/1", family.file, rows), cache)
    assert table.columns["message_size"].tolist() == [128, 256, 1024]
    assert table.ns.tolist() == [2e6, 4.5e6, 9e6]
    assert table.categories == {"backend": ["default"]}, "a column that older tables lack has its default"


def test_a_table_without_a_column_says_which(tmp_path: Path, cache: Path) -> None:
    family = BY_NAME["gemm"]
    path = write(tmp_path, "x/gemm/vllm/1", family.file, [{"gemm_dtype": "bfloat16", "m": 1, "latency": 1.0}])
    with pytest.raises(ValueError, match=r"lacks the columns k, n"):
        tables.load(family, path, cache)


def test_falling_times_are_levelled_and_the_shift_is_kept(tmp_path: Path, cache: Path) -> None:
    family = BY_NAME["gemm"]
    times = {1: 4.0, 2: 1.0, 4: 2.0, 8: 8.0}
    rows = [{"gemm_dtype": "fp8", "m": m, "n": 64, "k": 64, "latency": t} for m, t in times.items()]
    table = tables.load(family, write(tmp_path, "x/gemm/vllm/1", family.file, rows), cache)
    assert table.ns == pytest.approx([2e6, 2e6, 2e6, 8e6]), "geometric mean of the run that falls"
    assert table.shift[1] > 0.5


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), st.floats(1.0, 1e6)), min_size=1, max_size=40,
             unique_by=lambda row: row[:2]),
    st.booleans(),
)  # fmt: skip
def test_cleaned_times_rise_along_every_axis(rows: list[tuple[int, int, float]], weighted: bool) -> None:
    x, y, ns = (np.array(column) for column in zip(*sorted(rows), strict=True))
    weights = 1.0 + x if weighted else np.ones(len(ns))
    clean = isotonic([x, y], ns, [0, 1], weights)
    for own, other in ((x, y), (y, x)):
        for value in np.unique(other):
            line = clean[other == value][np.argsort(own[other == value])]
            assert (np.diff(np.log(line)) >= -1e-9).all()
    assert ns.min() * (1 - 1e-9) <= clean.min() <= clean.max() <= ns.max() * (1 + 1e-9)
    assert isotonic([x, y], clean, [0, 1], weights) == pytest.approx(clean), "clean stays clean"


# --- cache ---


def test_a_converted_table_is_read_back_without_parquet(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_system(tmp_path / "t")
    first = opened(root).table("gemm")
    monkeypatch.setattr(tables, "convert", None)
    again = opened(root).table("gemm")
    assert first is not None
    assert again is not None
    assert again.ns.tolist() == first.ns.tolist()
    assert again.categories == first.categories


def test_a_new_table_isnt_answered_from_the_cache(tmp_path: Path, cache: Path) -> None:
    root = write_system(tmp_path / "t")
    opened(root).table("gemm")
    write_system(root, gemm=gemm_rows(ms=lambda m, n, k: 7.0))
    table = opened(root).table("gemm")
    assert table is not None
    assert set(table.ns.tolist()) == {7e6}


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", b"no archive"])
def test_a_damaged_cache_is_written_anew(tmp_path: Path, cache: Path, content: bytes) -> None:
    root = write_system(tmp_path / "t")
    opened(root).table("gemm")
    (file,) = cache.rglob("gemm-*.npz")
    whole = file.read_bytes()
    file.write_bytes(content)
    assert opened(root).table("gemm") is not None
    assert len(file.read_bytes()) == len(whole)


def test_no_damage_to_a_cached_file_changes_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family, size, rng = BY_NAME["gemm"], 4000, random.Random(1)
    arrays = {name: np.arange(size) for name in family.columns} | {"ns": np.arange(1.0, size), "shift": np.zeros(2)}
    monkeypatch.setattr(tables, "convert", lambda *_: dict(arrays))
    (source := tmp_path / "gemm.parquet").touch()
    tables.load(family, source, tmp_path)
    (file,) = tmp_path.glob("gemm-*.npz")
    whole = file.read_bytes()
    header = whole.index(b"\x93NUMPY", whole.index(b"ns.npy"))  # where a flipped bit is another dtype or shape
    flips = [(at, bit) for at in range(header, header + 72) for bit in range(8)]
    flips += [(rng.randrange(len(whole)), rng.randrange(9)) for _ in range(200)]
    for at, bit in flips:
        damaged = bytearray(whole)
        damaged[at] ^= 1 << bit & 255
        if bit == 8:
            del damaged[at:]
        file.write_bytes(damaged)
        table = tables.load(family, source, tmp_path)
        assert np.array_equal(table.ns, arrays["ns"])
        assert all(np.array_equal(table.columns[name], arrays[name]) for name in family.columns)


def test_a_cached_table_is_mapped_and_read_once_per_process(tmp_path: Path, cache: Path) -> None:
    root = write_system(tmp_path / "t")
    opened(root).table("gemm")
    first = opened(root).table("gemm")
    assert first is not None
    assert all(isinstance(column, np.memmap) for column in [first.ns, *first.columns.values()])
    assert OperatorTables(TablesFolder(root, "1.0"), system="made_up").table("gemm") is first


def test_a_cache_that_cant_be_written_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MIST_CACHE", str(tmp_path / "file"))
    assert opened(write_system(tmp_path / "t")).table("gemm") is not None


def test_the_cache_follows_the_users_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MIST_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tables.cache_folder("0.12.0").relative_to(tmp_path).parts[:2] == ("mist", "kernels")
    assert "0.12.0" in tables.cache_folder("0.12.0").name


def _converted(root: str) -> bytes:
    table = opened(Path(root)).table("generation_attention")
    assert table is not None
    return table.ns.tobytes()


def test_many_processes_may_convert_first(tmp_path: Path, cache: Path) -> None:
    root = write_system(tmp_path / "t")
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        found = pool.map(_converted, [str(root)] * 6, chunksize=1)
    assert len(set(found)) == 1
    assert len(list(cache.rglob("*.npz"))) == 1
    assert not list(cache.rglob("*.part"))


# --- where tables come from ---


def test_versions_sort_as_versions() -> None:
    rising = ["0.1.dev19262", "0.5.6.post2", "0.5.9", "0.5.10", "1.0.0", "1.3.0rc9", "1.3.0rc20", "1.3.0"]
    assert sorted(set(rising), key=version_key) == rising


def test_the_newest_complete_version_is_the_default_and_families_fall_back(tmp_path: Path, cache: Path) -> None:
    root = tmp_path / "t"
    for version in ("0.9.0", "0.24.0"):
        write_system(root, version=version)
    write(root, "made_up/gemm/vllm/0.30.0", "gemm_perf", gemm_rows())
    folder = TablesFolder(root, "1.0")
    assert opened(root).version == "0.24.0", "0.30.0 has no attention"
    moe = BY_NAME["moe"]
    for version in ("0.8.0", "0.20.0", "0.26.0"):
        write(root, f"made_up/moe/vllm/{version}", moe.file, [])
    names = [folder.file("made_up", moe, "vllm", v) for v in ("0.24.0", "0.20.0", "0.5.0", "")]
    assert [p.parent.name for p in names if p] == ["0.20.0", "0.20.0", "0.8.0", "0.26.0"]
    assert folder.file("made_up", moe, "sglang", "") is None


def test_a_release_stands_for_all_that_its_numbers_begin(tmp_path: Path) -> None:
    folder, moe = TablesFolder(tmp_path, "1.0"), BY_NAME["moe"]
    for version in ("0.9.2", "0.19.0", "0.19.3", "0.24.0", "1.3.0rc10", "1.3.0rc20", "1.3.0"):
        write(tmp_path, f"made_up/moe/vllm/{version}", moe.file, [])
    wanted = {
        "0.8": "0.9.2", "0.10": "0.9.2", "0.19": "0.19.3", "0.19.0": "0.19.0", "0.19.1": "0.19.0", "0.23": "0.19.3",
        "1.2": "0.24.0", "1.3.0rc10": "1.3.0rc10", "1.3.0rc9": "0.24.0", "1.3": "1.3.0", "2": "1.3.0",
    }  # fmt: skip
    found = {version: folder.file("made_up", moe, "vllm", version) for version in wanted}
    assert {version: path.parent.name for version, path in found.items() if path} == wanted


def test_problem_names_what_is_missing(tmp_path: Path) -> None:
    root = write_system(tmp_path / "t")
    assert opened(root).problem() is None
    for tables_ in (opened(root, system="other"), opened(root, framework="sglang")):
        problem = tables_.problem()
        assert problem is not None
        assert "gemm" in problem
        assert "made_up" in problem


def test_without_the_package_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MIST_KERNEL_TABLES", raising=False)
    monkeypatch.setattr(package, "PACKAGE", "no_such_package_of_tables")
    reason = find_tables()
    assert isinstance(reason, str)
    assert ".[kernels]" in reason


def test_a_folder_overrides_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_system(tmp_path / "t")
    monkeypatch.setenv("MIST_KERNEL_TABLES", str(root))
    assert find_tables() == find_tables(str(root)) == TablesFolder(root, "given")
    assert "no folder" in str(find_tables(str(tmp_path / "nowhere")))


def test_the_package_is_found_but_never_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site"
    data = site / package.PACKAGE / "systems" / "data"
    data.mkdir(parents=True)
    (site / package.PACKAGE / "__init__.py").write_text("raise ImportError('this code must not run')")
    info = site / f"{package.PACKAGE}-9.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package.DISTRIBUTION}\nVersion: 9.9\n")
    monkeypatch.delenv("MIST_KERNEL_TABLES", raising=False)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.delitem(sys.modules, package.PACKAGE, raising=False)
    assert find_tables() == TablesFolder(data, "9.9")
    assert package.PACKAGE not in sys.modules


# --- interpolation ---


def grid_of(values: Mapping[tuple[float, ...], float]) -> RaggedGrid:
    points = sorted(values)
    return RaggedGrid(np.array(points, dtype=np.float64).T, np.array([values[p] for p in points]))


def at(grid: RaggedGrid, *x: float) -> tuple[float, int]:
    found = grid.at(x[:-1], np.array([x[-1]]))
    return float(found.ns[0]), int(found.origin[0])


PLANE = grid_of({(x, y): 10 + 2 * x + 3 * y + x * y for x in (1, 4, 8) for y in (2, 4, 16)})


@given(st.floats(1, 8), st.floats(2, 16))
def test_products_of_linear_laws_come_out_exactly(x: float, y: float) -> None:
    ns, origin = at(PLANE, x, y)
    assert ns == pytest.approx(10 + 2 * x + 3 * y + x * y)
    assert origin == (MEASURED if (x in (1, 4, 8) and y in (2, 4, 16)) else INTERPOLATED)


def test_past_the_last_point_the_rate_of_the_last_doubling_holds() -> None:
    line = grid_of({(1,): 10.0, (2,): 10.0, (4,): 12.0, (7,): 17.9, (8,): 18.0})
    assert at(line, 16.0) == (pytest.approx(18 + 8 * (18 - 12) / 4), EXTRAPOLATED)
    assert at(line, 0.5) == (10.0, EXTRAPOLATED), "a launch costs what it costs"
    assert at(PLANE, 16.0, 4.0) == (pytest.approx(10 + 32 + 12 + 64), EXTRAPOLATED)
    assert at(PLANE, 0.5, 4.0) == (at(PLANE, 1.0, 4.0)[0], EXTRAPOLATED)
    assert at(grid_of({(4,): 10.0}), 8.0) == (20.0, EXTRAPOLATED), "a lone point scales with the work"


def test_extrapolated_times_never_fall() -> None:
    line = grid_of({(1,): 10.0, (8,): 9.0})
    assert at(line, 64.0) == (9.0, EXTRAPOLATED)


def test_a_line_that_ends_early_gives_way_to_the_next() -> None:
    law = {(x, y): 1.0 * x * y for x in (1, 2, 4, 8) for y in (1, 2, 4, 8)}
    for hole in ((2, 8), (4, 8)):
        del law[hole]
    ragged = grid_of(law)
    assert at(ragged, 3.0, 6.0) == (pytest.approx(18.0), INTERPOLATED), "between x = 1 and 8, which reach y = 6"
    assert at(ragged, 2.0, 8.0) == (pytest.approx(16.0), INTERPOLATED), "a hole on a grid line"
    assert at(ragged, 3.0, 3.0) == (pytest.approx(9.0), INTERPOLATED)
    assert at(ragged, 3.0, 16.0)[1] == EXTRAPOLATED


def filled(values: Mapping[tuple[float, ...], float]) -> RaggedGrid:
    grid = grid_of(values)
    return RaggedGrid.filled(grid.points, grid.ns)


CUBE = [(x, y, z) for x in (1, 2, 4) for y in (1, 3, 4) for z in (1, 2, 8)]


@given(st.sets(st.sampled_from(CUBE), max_size=6))
def test_holes_in_a_product_of_linear_laws_are_filled_exactly(holes: set[tuple[int, int, int]]) -> None:
    law = {p: 5.0 + p[0] + 2 * p[1] + 3 * p[2] + p[0] * p[1] * p[2] for p in CUBE}
    grid = filled({p: ns for p, ns in law.items() if p not in holes})
    for p, ns in law.items():
        found, origin = at(grid, *p)
        assert origin == EXTRAPOLATED or found == pytest.approx(ns)
        assert (origin == MEASURED) == (p not in holes), "what is filled in was never measured"


@pytest.mark.parametrize(
    ("along", "expected"),
    [((10.0, 20.0, 30.0), 25.0), ((10.0, 30.0, 20.0), 20.0), ((99.0, 20.0, 22.0), 22.0), ((99.0, 20.0, 10.0), 15.0)],
)
def test_a_hole_takes_the_median_of_its_lines_the_last_counted_twice(
    along: tuple[float, float, float], expected: float
) -> None:
    values: dict[tuple[float, ...], float] = {p: 1.0 for p in CUBE if p != (2, 3, 2)}
    for axis, ns in enumerate(along):
        for end in (CUBE[0][axis], CUBE[-1][axis]):
            x, y, z = (end if i == axis else c for i, c in enumerate((2, 3, 2)))
            values[x, y, z] = ns
    assert at(filled(values), 2, 3, 2) == (pytest.approx(expected), INTERPOLATED)


def test_a_hole_at_the_edge_is_left_to_its_neighbours() -> None:
    values = {p: float(math.prod(p)) for p in CUBE if p not in ((4, 4, 8), (4, 4, 2))}
    assert len(filled(values).ns) == len(values)
