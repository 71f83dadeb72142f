"""The traces of Vidur: CSV with a time in seconds, prefill tokens and decode tokens.

One trace format, read into a `RequestTable` before the run. It knows nothing of a request's content, so it never
yields prefix keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mist.registry import register
from mist.workload import RequestTable
from mist.workload.column_map import ColumnMap
from mist.workload.rows import csv_names

_COLUMNS = ColumnMap(
    arrival="arrived_at",
    input_tokens="num_prefill_tokens",
    output_tokens="num_decode_tokens",
    time_unit="s",
    optional=frozenset({"arrived_at"}),
)


@register("trace", "vidur")
@dataclass(frozen=True, slots=True)
class Vidur:
    """`arrived_at`, `num_prefill_tokens`, `num_decode_tokens`; files of lengths alone have no `arrived_at`.

    Source: microsoft/vidur (Agrawal et al., "Vidur", MLSys 2024), its processed traces.
    """

    def matches(self, path: Path, first_line: bytes) -> bool:
        """Whether the header has the two columns of tokens."""
        return {"num_prefill_tokens", "num_decode_tokens"} <= csv_names(first_line)

    def read(self, path: Path) -> RequestTable:
        """The whole trace; ScenarioError tells every record that can't be used."""
        return _COLUMNS.read(path)
