"""The traces of Azure's LLM services: CSV with a time stamp, context tokens and generated tokens.

One trace format, read into a `RequestTable` before the run. It knows nothing of a request's content, so it never
yields prefix keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mist.registry import register
from mist.workload import RequestTable
from mist.workload.column_map import TIMESTAMP, ColumnMap
from mist.workload.rows import csv_names

_COLUMNS = ColumnMap(
    arrival="TIMESTAMP", input_tokens="ContextTokens", output_tokens="GeneratedTokens", time_unit=TIMESTAMP
)


@register("trace", "azure")
@dataclass(frozen=True, slots=True)
class Azure:
    """`TIMESTAMP`, `ContextTokens`, `GeneratedTokens`; stamps in UTC with up to nine decimals.

    Source: Azure/AzurePublicDataset, traces of 2023 (Patel et al., "Splitwise", ISCA 2024) and of 2024.
    """

    def matches(self, path: Path, first_line: bytes) -> bool:
        """Whether the header has the three columns."""
        return {"TIMESTAMP", "ContextTokens", "GeneratedTokens"} <= csv_names(first_line)

    def read(self, path: Path) -> RequestTable:
        """The whole trace; ScenarioError tells every record that can't be used."""
        return _COLUMNS.read(path)
