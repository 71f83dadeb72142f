"""Damaged traces: whatever is done to a valid file, it reads validly or fails as a `ScenarioError` with place and fix.

Small valid files of every format, changed in named ways and by seeded random bytes. Never anything but these two ends.
"""

from __future__ import annotations

import gzip
import io
import random
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mist.errors import ScenarioError
from mist.workload import RequestTable, TraceFormat
from mist.workload.azure import Azure
from mist.workload.columns import Columns, write_trace
from mist.workload.mooncake import Mooncake
from mist.workload.trace import read_trace
from mist.workload.vidur import Vidur

NUM_ROWS = 12


def _files() -> dict[str, tuple[TraceFormat, bytes]]:
    rows = range(NUM_ROWS)
    azure = "".join(f"2023-11-16 18:15:{i:02}.5000{i:03},{100 + i},{i}\n" for i in rows)
    vidur = "".join(f"{i}.25,{100 + i},{i}\n" for i in rows)
    mooncake = "".join(
        f'{{"timestamp": {i * 10}, "input_length": 1{i:02}4, "output_length": {i}, "hash_ids": [0, {i}]}}\n'
        for i in rows
    )
    arrow = io.BytesIO()
    pq.write_table(
        pa.table({"arrival_ns": list(rows), "input_tokens": [9] * NUM_ROWS, "output_tokens": list(rows)}), arrow
    )
    csv = f"TIMESTAMP,ContextTokens,GeneratedTokens\n{azure}".encode()
    return {
        "azure": (Azure(), csv),
        "azure-gz": (Azure(), gzip.compress(csv, mtime=0)),
        "mooncake": (Mooncake(), mooncake.encode()),
        "vidur": (Vidur(), f"arrived_at,num_prefill_tokens,num_decode_tokens\n{vidur}".encode()),
        "csv": (
            Columns(),
            b"arrival_ns,input_tokens,output_tokens,hash_ids,hash_block_size\n" + b"7,20,0,1 2,16\n" * 9,
        ),
        "jsonl": (
            Columns(),
            b'{"arrival_ns": 7, "input_tokens": 20, "output_tokens": 3, "hash_ids": [4], "hash_block_size": 16}\n' * 9,
        ),
        "parquet": (Columns(), arrow.getvalue()),
    }


FILES = _files()


def _replace_number(number: int, text: bytes) -> Callable[[bytes], bytes]:
    """Replaces the `number`-th whole number of the file, counted from the end."""

    def change(data: bytes) -> bytes:
        places = list(re.finditer(rb"\d+", data))
        match = places[-number]
        return data[: match.start()] + text + data[match.end() :]

    return change


MUTATIONS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "blank": lambda data: b"\n \n",
    "first line only": lambda data: data.split(b"\n")[0] + b"\n",
    "first line cut": lambda data: data[:7],
    "cut in a row": lambda data: data[: len(data) // 2],
    "last byte cut": lambda data: data[:-2],
    "no header": lambda data: data.partition(b"\n")[2],
    "rows reversed": lambda data: b"\n".join([data.split(b"\n")[0], *data.split(b"\n")[:0:-1]]),
    "twice": lambda data: data + data,
    "UTF-16": lambda data: data.decode("latin-1").encode("utf-16"),
    "not UTF-8": lambda data: data[:60] + b"\xff\xfe" + data[60:],
    "NUL": lambda data: data[:60] + b"\0" + data[60:],
    "quote": lambda data: data[:60] + b'"' + data[60:],
    "comma": lambda data: data.replace(b",", b",,", 1),
    "semicolons": lambda data: data.replace(b",", b";"),
    "tabs": lambda data: data.replace(b",", b"\t"),
    "quoted header": lambda data: b'"' + data,
    "junk before": lambda data: bytes(range(256)) + data,
    "junk after": lambda data: data + bytes(range(256)),
    "zipped and cut": lambda data: gzip.compress(data, mtime=0)[:-12],
    "zipped and torn": lambda data: gzip.compress(data, mtime=0)[:30] + b"torn" + gzip.compress(data, mtime=0)[34:],
    "only the magic": lambda data: b"\x1f\x8b",
    "Parquet in name": lambda data: b"PAR1" + data,
    "brackets": lambda data: b"[" + data + b"]",
    "nested": lambda data: b'{"timestamp": ' * 20_000 + data,
    "wide": lambda data: data.replace(b"\n", b"," + b"x" * 200_000 + b"\n", 2),
    **{
        f"number {number} from the end is {text.decode() or 'gone'}": _replace_number(number, text)
        for number in (1, 2, 3, 8)
        for text in (
            b"NaN", b"-1", b"1.5", b"1e999", b"9" * 30, b"", b"null", b"true", b'"x"', b"[]", b"{}", b"Infinity",
            b"1_0", "٣".encode(), b"0x1f", b"--", b" ",
        )
    },
}  # fmt: skip


def check(path: Path, trace_format: TraceFormat | None) -> bool:
    """Whether the trace read; what comes back either way must be fit to use."""
    try:
        table = read_trace(path, trace_format)
    except ScenarioError as error:
        problems = [problem for problem in error.problems if "more problems like these" not in problem.message]
        assert problems
        assert all(problem.file == str(path) for problem in problems)
        assert all(problem.hint for problem in problems)
        assert all(len(str(problem)) < 2000 for problem in problems)
        return False
    valid(table)
    return True


def valid(table: RequestTable) -> None:
    assert len(table) == len(table.arrival_ns) == len(table.output_tokens) > 0
    assert table.arrival_ns[0] == 0
    assert np.all(np.diff(table.arrival_ns) >= 0)
    assert table.input_tokens.min() >= 1
    assert table.output_tokens.min() >= 0
    for column in (table.arrival_ns, table.input_tokens, table.output_tokens):
        assert column.dtype == np.int64
    if table.block_keys is not None:
        assert table.hash_block_size >= 1
        assert len(table.block_keys) == len(table)
        fits = -(-table.input_tokens // table.hash_block_size)
        assert all(len(keys) <= most for keys, most in zip(table.block_keys, fits.tolist(), strict=True))


@pytest.mark.parametrize("name", FILES)
def test_the_files_are_valid_before_they_are_damaged(name: str, tmp_path: Path) -> None:
    trace_format, data = FILES[name]
    path = tmp_path / "trace"
    path.write_bytes(data)
    assert check(path, trace_format)
    assert check(path, None)
    assert len(read_trace(path)) == (9 if name in ("csv", "jsonl") else NUM_ROWS)


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("name", ["azure", "mooncake", "vidur", "csv", "jsonl"])
def test_named_damage(name: str, mutation: str, tmp_path: Path) -> None:
    trace_format, data = FILES[name]
    path = tmp_path / "trace"
    path.write_bytes(MUTATIONS[mutation](data))
    told = check(path, trace_format)
    detected = check(path, None)
    assert told or not detected or mutation == "no header"


@pytest.mark.parametrize("name", FILES)
def test_random_damage(name: str, tmp_path: Path) -> None:
    trace_format, data = FILES[name]
    path = tmp_path / "trace"
    draw = random.Random(f"damage to {name}")
    num_bad = 0
    for _ in range(60):
        damaged = bytearray(data)
        for _ in range(draw.choice((1, 3, 20))):
            place = draw.randrange(len(damaged))
            match draw.randrange(3):
                case 0:
                    damaged[place] = draw.randrange(256)
                case 1:
                    del damaged[place : place + draw.randrange(1, 9)]
                case _:
                    damaged[place:place] = draw.randbytes(draw.randrange(1, 9))
        path.write_bytes(damaged)
        num_bad += not check(path, trace_format)
        check(path, None)
    assert num_bad > 20  # the damage was real


def test_a_read_damaged_file_can_be_written_again(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_bytes(MUTATIONS["rows reversed"](FILES["azure"][1]))
    table = read_trace(path)
    assert table.notes
    write_trace(table, tmp_path / "again.csv")
    assert np.array_equal(read_trace(tmp_path / "again.csv").arrival_ns, table.arrival_ns)
