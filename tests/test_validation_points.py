"""Measured points: what a file may be, what is a skip, saturation by what was measured, samples, and the split."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import pytest

from measured import HEAD, lines, point_file
from mist.errors import ScenarioError
from mist.validation.points import Measured, Point, Skip, parse_stages, read_points, sampled
from mist.validation.split import is_checking, is_checking_name


def test_rows_of_one_point_come_together_and_others_stay_apart(tmp_path: Path) -> None:
    rows = lines("a,1,s,ttft_mean_ms,30", "b,2,s,ttft_mean_ms,40", "a,3,s,tpot_mean_ms,9", "a,4,other,tpot_mean_ms,8")
    file = read_points(point_file(tmp_path, rows))
    assert [(p["source"], p.name, [m.id for m in p.measured]) for p in file.points] == [
        ("s", "a", ["1", "3"]),
        ("s", "b", ["2"]),
        ("other", "a", ["4"]),
    ]
    assert file.num_rows == 4


@pytest.mark.parametrize("value", ["", "fast", "nan", "inf", "-3", "0", "1,5"])
def test_a_value_that_is_no_measurement_is_a_skip(tmp_path: Path, value: str) -> None:
    written = f'"{value}"' if "," in value else value
    (point,) = read_points(point_file(tmp_path, lines(f"a,1,s,ttft_mean_ms,{written}"))).points
    assert not point.measured
    assert [i for i, _ in point.skipped] == ["1"]


def test_rows_without_names_are_points_of_their_own(tmp_path: Path) -> None:
    file = read_points(point_file(tmp_path, lines(",,s,ttft_mean_ms,30", ",,s,ttft_mean_ms,30")))
    assert [p.name for p in file.points] == ["row-1", "row-2"]


def test_what_the_file_calls_not_runnable_is_kept_with_its_reason(tmp_path: Path) -> None:
    rows = [f"{HEAD},runnable,why_not"] + [f"{row},{more}" for row, more in zip(
        lines("a,1,s,ttft_mean_ms,3", "a,2,s,ttft_mean_ms,3", "a,3,s,ttft_mean_ms,3")[1:],
        ["true,", "false,no length given", "FALSE,"], strict=True)]  # fmt: skip
    file = read_points(point_file(tmp_path, rows))
    assert file.not_runnable == [("2", "no length given"), ("3", "not runnable, as the file says")]
    assert file.num_rows == 3


def test_only_the_named_sources_and_trusts(tmp_path: Path) -> None:
    plain = lines("a,1,s,ttft_mean_ms,3", "b,2,t,ttft_mean_ms,3", "c,3,t,ttft_mean_ms,3")[1:]
    rows = [f"{HEAD},trust", *(f"{row},{trust}" for row, trust in zip(plain, "ACB", strict=True))]
    path = point_file(tmp_path, rows)
    assert [p.name for p in read_points(path, sources=["t"]).points] == ["b", "c"]
    assert [p.name for p in read_points(path, trusts=["A", "B"]).points] == ["a", "c"]
    with pytest.raises(ScenarioError, match="there is no source 'tt'"):
        read_points(path, sources=["tt"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "columns are missing"),
        (b"point,id,source\na,1,s\n", "columns are missing: metric"),
        (b"\xff\xfe\x00", "is no text file"),
        (b"\x1f\x8bnot gzip", "is no text file"),
    ],
)
def test_a_file_that_is_no_table_of_points_is_told(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "points.csv"
    path.write_bytes(content)
    with pytest.raises(ScenarioError, match=message):
        read_points(path)


def test_a_torn_archive_is_told_and_a_whole_one_read(tmp_path: Path) -> None:
    text = "\n".join(lines("a,1,s,ttft_mean_ms,30")).encode()
    path = tmp_path / "points.csv.gz"
    path.write_bytes(gzip.compress(text))
    assert len(read_points(path).points) == 1
    for content in (gzip.compress(text)[:-12], b"\x1f\x8b" + bytes(30), b"plain"):
        path.write_bytes(content)
        with pytest.raises(ScenarioError):
            read_points(path)


def test_short_and_long_rows_and_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    whole = lines("a,1,s,ttft_mean_ms,30")
    short, long = "b,2,s,ttft_mean_ms,30", f"{whole[1].replace('a,1', 'c,3', 1)},too,many"
    path = point_file(tmp_path, ["﻿" + whole[0], whole[1], short, long])
    assert [p.name for p in read_points(path).points] == ["a", "b", "c"]


# saturation by what was measured


def measured(*rows: str, **columns: str) -> Point:
    point = Point("p", columns)
    point.measured = [Measured(str(i), *_pair(row)) for i, row in enumerate(rows)]
    return point


def _pair(row: str) -> tuple[str, float]:
    name, value = row.split("=")
    return name, float(value)


@pytest.mark.parametrize(
    ("rows", "columns", "saturated"),
    [
        (["output_tokens_per_s=949"], {"rate_per_s": "10", "osl": "100"}, True),
        (["output_tokens_per_s=951"], {"rate_per_s": "10", "osl": "100"}, False),
        (["makespan_s=21.1"], {"rate_per_s": "10", "osl": "100", "num_requests": "200"}, True),
        (["makespan_s=21"], {"rate_per_s": "10", "osl": "100", "num_requests": "200"}, False),
        (["output_tokens_per_s=1420"], {"stages": "10:60s;20:60s", "osl": "100"}, True),
        (["output_tokens_per_s=1430"], {"stages": "10:60s;20:60s", "osl": "100"}, False),
        (["ttft_mean_ms=5001"], {"rate_per_s": "10", "osl": "100"}, True),
        (["ttft_mean_ms=4999"], {"rate_per_s": "10", "osl": "100"}, False),
        (["tpot_mean_ms=4999"], {"rate_per_s": "10", "osl": "100"}, False),
    ],
)
def test_open_loops_are_saturated_by_what_was_measured(
    rows: list[str], columns: dict[str, str], saturated: bool
) -> None:
    assert measured(*rows, **columns).open_loop_saturated() is saturated


@pytest.mark.parametrize("text", ["8", "8:x", "a:600s", "8:600s;;20:1s"])
def test_stages_that_say_something_else_are_a_skip(text: str) -> None:
    with pytest.raises(Skip, match="stages are"):
        parse_stages(text)
    assert parse_stages("8:600s;20:30s") == [(8, 600), (20, 30)]


# samples and the split


def test_a_sample_is_even_and_the_file_keeps_its_rows(tmp_path: Path) -> None:
    rows = lines(*(f"p{i},{i},s,ttft_mean_ms,3" for i in range(10)), *(f"q{i},q{i},t,e2e_mean_ms,3" for i in range(2)))
    file = sampled(read_points(point_file(tmp_path, rows)), 3)
    assert [p.name for p in file.points] == ["p1", "p5", "p8", "q0", "q1"]
    assert (file.num_rows, file.num_sampled) == (12, 5)


def test_two_of_five_points_check_and_the_name_alone_decides() -> None:
    names = [f"p{i:x}" for i in range(5000)]
    share = sum(map(is_checking_name, names)) / len(names)
    assert abs(share - 0.4) < 0.03
    assert all(is_checking(Point(n, {"source": n})) == (zlib.crc32(n.encode()) % 5 < 2) for n in names[:100])
    # a rule that changed would let constants be judged by what they were fitted to
    assert [n for n in ("p57b0599b24", "a", "b", "c", "d", "e") if is_checking_name(n)] == ["b", "c", "d"]
