"""Traces: each format read exactly, every bad value told by its place, and written traces read back the same.

Uses small files made here; the public traces themselves are read in test_workload_catalogue.py.
"""

from __future__ import annotations

import gzip
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mist.errors import ScenarioError
from mist.workload import RequestTable, TraceFormat
from mist.workload.azure import Azure
from mist.workload.column_map import chain_keys
from mist.workload.columns import Columns, write_trace
from mist.workload.mooncake import Mooncake
from mist.workload.rows import MAX_PROBLEMS
from mist.workload.trace import detect, find_trace, limit, rate_scale, read_trace
from mist.workload.vidur import Vidur

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,0
2023-11-16 18:15:51.2224671,879,55
"""
MOONCAKE = """{"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [7, 8, 9]}
{"timestamp": 1500, "input_length": 1024, "output_length": 6, "hash_ids": [7, 8]}
{"timestamp": 1500, "input_length": 1024, "output_length": 6, "hash_ids": [1, 8]}
"""


class Put(Protocol):
    """Writes a file into the test's folder."""

    def __call__(self, content: str | bytes, name: str = "trace") -> Path: ...


@pytest.fixture
def put(tmp_path: Path) -> Put:
    def write(content: str | bytes, name: str = "trace") -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def columns_of(table: RequestTable) -> tuple[list[int], list[int], list[int]]:
    return table.arrival_ns.tolist(), table.input_tokens.tolist(), table.output_tokens.tolist()


def problems_of(path: Path, trace_format: TraceFormat | None = None) -> list[str]:
    with pytest.raises(ScenarioError) as error:
        read_trace(path, trace_format)
    return [str(problem).replace(str(path), "FILE") for problem in error.value.problems]


def test_azure_stamps_are_read_to_the_tenth_of_a_microsecond(put: Put) -> None:
    path = put(AZURE)
    assert isinstance(detect(path), Azure)
    table = read_trace(path)
    assert columns_of(table) == ([0, 4_314_579_000, 4_541_877_100], [374, 396, 879], [44, 0, 55])
    assert (table.block_keys, table.concurrency, table.notes) == (None, None, ())


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("\n", "\r\n"),
        lambda text: "\ufeff" + text,
        lambda text: text.rstrip("\n"),
        lambda text: text + "\n\n",
        lambda text: text.replace(",374,", ',"374",'),
        lambda text: text.replace("TIMESTAMP,", '"TIMESTAMP",'),
        lambda text: text.replace("0,374", "0+00:00,374"),
        lambda text: text.replace("0,374", "0Z,374"),
        lambda text: text.replace("16 18", "16T18"),
        lambda text: text.replace(",374,", ", 374,"),
        lambda text: text.replace(",374,", ",374.0,"),
    ],
)
def test_azure_in_other_dresses(put: Put, change: Callable[[str], str]) -> None:
    assert columns_of(read_trace(put(change(AZURE)))) == columns_of(read_trace(put(AZURE, "plain")))


def test_gzip_is_told_by_content_not_by_name(put: Put) -> None:
    for text in (AZURE, MOONCAKE):
        plain, zipped = put(text, "a.csv.gz"), put(gzip.compress(text.encode()), "b.csv")
        assert columns_of(read_trace(plain)) == columns_of(read_trace(zipped))


def test_mooncake_ids_are_chained_through_their_parents(put: Put) -> None:
    path = put(MOONCAKE)
    assert isinstance(detect(path), Mooncake)
    table = read_trace(path)
    assert columns_of(table) == ([0, 1_500_000_000, 1_500_000_000], [1100, 1024, 1024], [5, 6, 6])
    assert table.block_keys == [(0, 1, 2), (0, 1), (3, 4)]
    assert table.hash_block_size == 512


def test_mooncake_without_ids_and_with_another_block_size(put: Put) -> None:
    path = put('{"timestamp": 3, "input_length": 16, "output_length": 0}\n')
    assert read_trace(path).block_keys is None
    path = put('{"timestamp": 3, "input_length": 17, "output_length": 0, "hash_ids": [5, 5]}\n')
    assert read_trace(path, Mooncake(hash_block_size=16)).block_keys == [(0, 1)]
    with pytest.raises(ValueError, match="512 in Mooncake"):
        Mooncake(hash_block_size=0)


def test_vidur_with_and_without_arrivals(put: Put) -> None:
    path = put("arrived_at,num_prefill_tokens,num_decode_tokens\n0.5,10,2\n5.8926549999999995,11,3\n")
    assert isinstance(detect(path), Vidur)
    assert columns_of(read_trace(path)) == ([0, 5_392_655_000], [10, 11], [2, 3])
    table = read_trace(put("num_prefill_tokens,num_decode_tokens,pd_ratio\n10,2,5\n11,3,3.7\n"))
    assert columns_of(table) == ([0, 0], [10, 11], [2, 3])
    assert "arrive at once" in table.notes[0]


def test_rows_out_of_order_are_sorted_stably_and_said(put: Put) -> None:
    table = read_trace(put("arrival_ns,input_tokens,output_tokens\n50,1,1\n20,2,2\n50,3,3\n20,4,4\n"))
    assert columns_of(table) == ([0, 0, 30, 30], [2, 4, 1, 3], [2, 4, 1, 3])
    assert table.notes == ("2 rows of the trace were earlier than the row before them: sorted by arrival",)


@pytest.mark.parametrize(
    ("unit", "texts", "expected"),
    [
        ("s", ["1699999999.1234567", "1699999999.1234568"], [0, 100]),
        ("s", ["0", "0.000000001"], [0, 1]),
        ("ms", ["1700000000000.5", "1700000000001"], [0, 500_000]),
        ("us", ["1e3", "2e3"], [0, 1_000_000]),
        ("ns", ["1700000000000000001", "1700000000000000003"], [0, 2]),
        ("timestamp", ["2024-02-28 23:59:59.999999999", "2024-02-29 00:00:00"], [0, 1]),
        ("timestamp", ["2024-03-31T00:59:59.5Z", "2024-03-31T03:00:00.5+02:00"], [0, 1_000_000_000]),  # clocks move
        ("timestamp", ["2024-02-28 23:59:59 UTC", "2024-02-28 18:30:00-0530"], [0, 1_000_000_000]),
        ("timestamp", ["1970-01-01 00:30:00+01", "1970-01-01 00:00:00"], [0, 1_800 * 10**9]),
    ],
)
def test_times_are_exact_to_the_nanosecond(put: Put, unit: str, texts: list[str], expected: list[int]) -> None:
    form = Columns("t", "i", "o", time_unit=unit)
    rows = "".join(f"{text},1,1\n" for text in texts)
    assert read_trace(put("t,i,o\n" + rows), form).arrival_ns.tolist() == expected
    objects = "".join(f'{{"t": {t if unit != "timestamp" else json.dumps(t)}, "i": 1, "o": 1}}\n' for t in texts)
    exact_in_json = unit in ("ns", "us", "timestamp")  # JSON readers turn 1699999999.1234567 into a float64
    assert read_trace(put(objects), form).arrival_ns.tolist() == (
        expected if exact_in_json else pytest.approx(expected, abs=300)
    )


def test_time_unit_is_the_ending_of_the_arrival_column() -> None:
    assert Columns(arrival="start_ms") == Columns(arrival="start_ms", time_unit=None)
    for trace in ("t.csv", "t.jsonl.gz"):
        told = Columns(arrival="start").problem_with(trace)
        assert told is not None
        assert "set time_unit to one of s, ms, us, ns, timestamp" in told
    assert Columns(arrival="start").problem_with("t.parquet") is None
    assert Columns(arrival="start_ms").problem_with("t.csv") is None
    with pytest.raises(ValueError, match="'minutes' is not known"):
        Columns(arrival="start", time_unit="minutes")
    with pytest.raises(ValueError, match="at least 1"):
        Columns(hash_block_size=-1)


def parquet(**columns: object) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table(columns), out)
    return out.getvalue()


def test_parquet_of_every_type(put: Put) -> None:
    stamps = np.array(["2024-01-01T00:00:00.5", "2024-01-01T00:00:02"], dtype="datetime64[us]")
    data = parquet(when=stamps, i=pa.array([5, 6], pa.uint16()), o=[7.0, 8.0], ids=[[1, 2], [1]], x=["a", "b"])
    form = Columns("when", "i", "o", hash_ids="ids", hash_block_size=4, time_unit="timestamp")
    for content in (data, gzip.compress(data)):
        table = read_trace(put(content), form)
        assert columns_of(table) == ([0, 1_500_000_000], [5, 6], [7, 8])
        assert table.block_keys == [(0, 1), (0,)]
    data = parquet(arrival_ns=[2**60 + 1, 2**60 + 4], input_tokens=[1, 2], output_tokens=[0, 1])
    path = put(data)
    assert isinstance(detect(path), Columns)
    assert columns_of(read_trace(path)) == ([0, 3], [1, 2], [0, 1])


def test_time_stamps_in_parquet_need_no_unit(put: Put) -> None:
    stamps = np.array(["2024-01-01T00:00:00.5", "2024-01-01T00:00:02"], dtype="datetime64[us]")
    assert columns_of(read_trace(put(parquet(when=stamps, i=[5, 6], o=[7, 8])), Columns("when", "i", "o")))[0] == [
        0,
        1_500_000_000,
    ]
    (told,) = problems_of(put(parquet(when=[1, 2], i=[5, 6], o=[7, 8])), Columns("when", "i", "o"))
    assert "the unit of 'when' is not known: set time_unit to one of s, ms" in told


def test_parquet_with_bad_values_tells_their_rows(put: Put) -> None:
    data = parquet(arrival_ns=[1, None, 3], input_tokens=[1, 2, None], output_tokens=["1", "x", "3"])
    assert [problem.split("\n")[0] for problem in problems_of(put(data))] == [
        "FILE:2: arrival_ns is nan",
        "FILE:2: output_tokens is 'x'",
        "FILE:3: input_tokens is nan",
    ]
    stamps = pa.array([0, None, 2**62], pa.timestamp("us"))
    data = parquet(t_s=stamps, input_tokens=[1, 1, 1], output_tokens=[1, 1, 1])
    assert [problem.split(":")[1] for problem in problems_of(put(data), Columns("t_s"))] == ["2", "3"]


def test_hash_ids_without_a_block_size_are_left_alone_unless_asked_for(put: Put) -> None:
    path = put("arrival_ns,input_tokens,output_tokens,hash_ids\n0,9,1,1 2\n5,9,1,[1]\n")
    assert read_trace(path).block_keys is None
    assert read_trace(path, Columns(hash_block_size=8)).block_keys == [(0, 1), (0,)]
    assert "set hash_block_size" in problems_of(path, Columns(hash_ids="hash_ids"))[0]


def test_all_problems_at_once_with_line_and_column(put: Put) -> None:
    text = AZURE + (
        "2023-02-30 00:00:00,1,1\n"
        "yesterday,0,1\n"
        "2023-11-16 18:15:52,-5,nan\n"
        "2023-11-16 18:15:53,1.5,\n"
        "2023-11-16 18:15:54,7\n"
        "2023-11-16 18:15:55,2e12,x\n"
    )
    found = problems_of(put(text))
    assert [problem.split("\n")[0] for problem in found] == [
        "FILE:5:1: TIMESTAMP is '2023-02-30 00:00:00'",
        "FILE:6:1: TIMESTAMP is 'yesterday'",
        "FILE:6:11: ContextTokens is '0'",
        "FILE:7:21: ContextTokens is '-5'",
        "FILE:7:24: GeneratedTokens is 'nan'",
        "FILE:8:21: ContextTokens is '1.5'",
        "FILE:8:25: GeneratedTokens is missing",
        "FILE:9: 2 fields where the header has 3",
        "FILE:10:21: ContextTokens is '2e12'",
        "FILE:10:26: GeneratedTokens is 'x'",
    ]
    assert all(len(problem.split("\n    ")) == 2 for problem in found)


def test_many_problems_are_capped_and_counted(put: Put) -> None:
    rows = "0,1,1\n" + "0,0,x\n" * 1000 + "0,1\n" * 500
    found = problems_of(put("arrival_ns,input_tokens,output_tokens\n" + rows))
    assert len(found) == MAX_PROBLEMS + 1
    assert found[0].startswith("FILE:3:3: input_tokens is '0'")
    assert found[-1] == f"FILE: and {2500 - MAX_PROBLEMS} more problems like these"


def test_a_column_without_a_right_value_is_told_once_and_hides_nothing(put: Put) -> None:
    rows = [f"04/05/2026 08:{i // 60:02}:{i % 60:02},5,1" for i in range(1500)]
    rows[1202] = rows[1202].replace(",5,", ",n/a,")
    found = problems_of(put("\n".join(["when,i,o", *rows])), Columns("when", "i", "o", time_unit="timestamp"))
    assert [problem.split("\n")[0] for problem in found] == [
        "FILE:2:1: when is '04/05/2026 08:00:00', and not one of 1,500 rows is right",
        "FILE:1204:21: i is 'n/a'",
    ]
    assert "2023-11-16T20:17:03.98+02:00" in found[0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"timestamp": 0, "input_length": true, "output_length": 1}', "FILE:1: input_length is True"),
        ('{"timestamp": 0, "input_length": 5}', "FILE:1: no column 'output_length'"),
        ('{"timestamp": -1, "input_length": 5, "output_length": 1}', "FILE:1: timestamp is -1"),
        ('{"timestamp": 1e300, "input_length": 5, "output_length": 1}', "FILE:1: timestamp is 1e+300"),
        ('{"timestamp": NaN, "input_length": 5, "output_length": 1}', "FILE:1: timestamp is nan"),
        ('{"timestamp": 0, "input_length": [5], "output_length": 1}', "FILE:1: input_length is [5]"),
        ('{"timestamp": 0, "input_length": 5, "output_length": 1', "FILE:1:55: bad JSON"),
        ('{"timestamp": 0, "input_length": ' + "9" * 5000 + ', "output_length": 1}', "FILE:1: bad JSON: Exceeds"),
        ('{"a": ' + "[" * 100_000, "FILE:1: bad JSON"),
        ("[1, 2]", "FILE:1: a list, not an object"),
        (
            '{"timestamp": 0, "input_length": 512, "output_length": 1, "hash_ids": [1, 2]}',
            "FILE:1: 2 hash_ids for 512 tokens",
        ),
        (
            '{"timestamp": 0, "input_length": 512, "output_length": 1, "hash_ids": ["a"]}',
            "FILE:1: hash_ids is ['a']",
        ),
        ('{"timestamp": 0, "input_length": 512, "output_length": 1, "hash_ids": {}}', "FILE:1: hash_ids is {}"),
    ],
)
def test_bad_json_lines(put: Put, line: str, message: str) -> None:
    assert problems_of(put(line + "\n"), Mooncake())[0].startswith(message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "FILE: the file is empty"),
        (b" \n\n", "FILE: the file is empty"),
        (AZURE.encode("utf-16"), "FILE:1:1: not UTF-8 text"),
        (AZURE.encode().replace(b"396", b"39\xff"), "FILE:3:31: not UTF-8 text"),
        (AZURE.encode().replace(b"396", b"39\0"), "FILE:3: binary data"),
        (AZURE.split("\n")[0].encode(), "FILE: no requests in it"),
        (gzip.compress(AZURE.encode())[:-9], "FILE: can't be read"),
        (gzip.compress(AZURE.encode()) + b"junk", "FILE: can't be read"),
        (b"\x1f\x8bjunk", "FILE: can't be read"),
        (b"PAR1 but no more", "FILE: bad Parquet"),
        (AZURE.replace(",374,", ',"374,').encode(), "FILE: bad CSV"),
        (AZURE.replace("Generated", "Context").encode(), "FILE:1: column 'ContextTokens' is there 2 times"),
        (AZURE.replace("Generated", "Output").encode(), "FILE:1: no column 'GeneratedTokens'"),
    ],
)
def test_files_that_are_no_traces(put: Put, content: bytes, message: str) -> None:
    assert problems_of(put(content), Azure())[0].startswith(message)


def test_columns_that_are_not_separated_by_commas_are_told(put: Put) -> None:
    found = problems_of(put("when_s;prompt;answer\n1;2;3\n"), Columns("when_s", "prompt", "answer"))
    assert found[0] == "FILE:1: no column 'when_s'\n    its columns are separated by ';': save it with commas"


def test_unknown_formats_and_folders(put: Put, tmp_path: Path) -> None:
    message = problems_of(put("when,prompt,answer\n1,2,3\n"))[0]
    assert "FILE:1: no trace format knows this first line: 'when,prompt,answer'" in message
    assert all(name in message for name in ("azure", "columns", "mooncake", "vidur"))
    assert "columns: {arrival: NAME, input_tokens: NAME, output_tokens: NAME}" in message
    with pytest.raises(ScenarioError, match="can't be read"):
        read_trace(tmp_path)
    with pytest.raises(ScenarioError, match="can't be read"):
        read_trace(tmp_path, Azure())


def test_traces_are_found_beside_the_scenario_then_in_mist_data(tmp_path: Path) -> None:
    beside, one, two = (tmp_path / name for name in ("beside", "one", "two"))
    (two / "traces").mkdir(parents=True)
    beside.mkdir()
    environ = {"MIST_DATA": f"{one}:{two}"}
    with pytest.raises(ScenarioError) as error:
        find_trace("t.csv", beside, environ)
    assert all(str(folder / "t.csv") in str(error.value) for folder in (beside, one, two, two / "traces"))
    assert "Azure/AzurePublicDataset" in str(error.value)
    for folder in (two / "traces", two, beside):
        (folder / "t.csv").touch()
        assert find_trace("t.csv", beside, environ) == folder / "t.csv"
    assert find_trace(two / "t.csv", beside, {}) == two / "t.csv"
    with pytest.raises(ScenarioError, match=r"is a folder\n.*it holds t\.csv"):
        find_trace("traces", two, {})


def test_rate_scale_and_limit(put: Put) -> None:
    table = read_trace(put(MOONCAKE))
    assert rate_scale(table, 2).arrival_ns.tolist() == [0, 750_000_000, 750_000_000]
    assert rate_scale(table, 0.5).arrival_ns.tolist() == [0, 3_000_000_000, 3_000_000_000]
    assert rate_scale(rate_scale(table, 4), 0.25).arrival_ns.tolist() == table.arrival_ns.tolist()
    assert len(limit(table, 2)) == 2
    assert limit(table, 2).block_keys == [(0, 1, 2), (0, 1)]
    assert len(limit(table, 99)) == 3
    for bad in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ScenarioError, match="number > 0"):
            rate_scale(table, bad)
    with pytest.raises(ScenarioError, match=r"more than a century\n.*larger"):
        rate_scale(table, 1e-30)
    with pytest.raises(ScenarioError, match="at least 1"):
        limit(table, 0)


@st.composite
def tables(draw: st.DrawFn) -> RequestTable:
    n = draw(st.integers(1, 8))
    gaps = draw(st.lists(st.integers(0, 2**58), min_size=n, max_size=n))
    inputs = draw(st.lists(st.integers(1, 2**40 - 1) | st.integers(1, 64), min_size=n, max_size=n))
    outputs = draw(st.lists(st.integers(0, 2**40 - 1), min_size=n, max_size=n))
    arrivals = np.cumsum(np.array([0, *gaps[1:]], dtype=np.int64))
    table = RequestTable(arrivals, np.array(inputs, dtype=np.int64), np.array(outputs, dtype=np.int64))
    if draw(st.booleans()):
        table.hash_block_size = draw(st.sampled_from([1, 16, 512]))
        counts = [draw(st.integers(0, min(6, -(-size // table.hash_block_size)))) for size in inputs]
        ids = [draw(st.lists(st.integers(0, 3), min_size=k, max_size=k)) for k in counts]
        table.block_keys = chain_keys(ids)
    return table


@given(tables(), st.sampled_from(["t.csv", "t.jsonl", "t.csv.gz", "t.jsonl.gz"]))
def test_a_written_trace_reads_back_the_same(table: RequestTable, name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        write_trace(table, path)
        written = path.read_bytes()
        back = read_trace(path)
        write_trace(back, path)
        assert path.read_bytes() == written
    assert columns_of(back) == columns_of(table)
    assert back.block_keys == table.block_keys
    assert back.hash_block_size == table.hash_block_size
    assert back.notes == ()


@given(st.lists(st.lists(st.integers(0, 2), max_size=5), max_size=8))
def test_chained_keys_are_equal_exactly_where_the_prefixes_are(ids: list[list[int]]) -> None:
    keys = chain_keys(ids)
    prefix_of: dict[int, tuple[int, ...]] = {}
    for row, chain in zip(ids, keys, strict=True):
        for i, key in enumerate(chain):
            assert prefix_of.setdefault(key, tuple(row[: i + 1])) == tuple(row[: i + 1])
    assert len(set(prefix_of.values())) == len(prefix_of)
    assert sorted(prefix_of) == list(range(len(prefix_of)))


def test_what_cannot_be_written_is_said(tmp_path: Path, put: Put) -> None:
    table = read_trace(put(AZURE))
    with pytest.raises(ScenarioError, match=r"end it \.csv or \.jsonl"):
        write_trace(table, tmp_path / "t.parquet")
    table.concurrency = 4
    with pytest.raises(ScenarioError, match="closed loop"):
        write_trace(table, tmp_path / "t.csv")


def test_a_hundred_thousand_rows_are_read(put: Put) -> None:
    rows = "".join(
        f"2023-11-16 18:{i // 60 % 60:02}:{i % 60:02}.{i % 10**7:07},{i % 900 + 1},{i % 50}\n" for i in range(10**5)
    )
    path = put("TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows)
    assert len(read_trace(path)) == 10**5


def test_a_trace_of_a_result_that_has_moved_is_told_as_that(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match=r"old.csv' is not there\n.*has it moved\? .*--set workload.trace=PATH$"):
        find_trace(tmp_path / "gone" / "old.csv", tmp_path, {"MIST_DATA": str(tmp_path)})


def test_a_trace_that_is_not_there_is_told_with_the_file_of_nearly_its_name(tmp_path: Path) -> None:
    (tmp_path / "gateway.csv").write_text("t_s,i,o\n0,1,1\n")
    for name, hint in (("gatway.csv", "did you mean 'gateway.csv'?"), ("conversations.csv", "public traces:")):
        with pytest.raises(ScenarioError) as error:
            find_trace(name, tmp_path, {})
        assert error.value.problems[0].hint.startswith(hint)
