"""The traces of Mooncake: JSON lines with a time in ms, lengths, and ids of the prompt's blocks of 512 tokens.

One trace format, read into a `RequestTable` before the run. It never takes two blocks for the same unless all blocks
before them are the same too.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mist.registry import register
from mist.workload import RequestTable
from mist.workload.column_map import ColumnMap
from mist.workload.rows import json_object


@register("trace", "mooncake")
@dataclass(frozen=True, slots=True)
class Mooncake:
    """Objects of `timestamp` (ms), `input_length`, `output_length` and `hash_ids`, one a line.

    Source: kvcache-ai/Mooncake (Qin et al., "Mooncake", FAST 2025): 512 tokens a block.
    """

    hash_block_size: int = 512

    def __post_init__(self) -> None:
        if self.hash_block_size < 1:
            raise ValueError(f"hash_block_size is {self.hash_block_size}: give the tokens per block, 512 in Mooncake")

    def matches(self, path: Path, first_line: bytes) -> bool:
        """Whether the first object has the trace's keys, and no ids of other things than blocks."""
        found = json_object(first_line)
        is_keyed_by_block = not isinstance(found.get("hash_ids"), dict)
        return {"timestamp", "input_length", "output_length"} <= set(found) and is_keyed_by_block

    def read(self, path: Path) -> RequestTable:
        """The whole trace, without prefix keys if it has no `hash_ids`; ScenarioError tells every bad record."""
        return ColumnMap(
            arrival="timestamp",
            input_tokens="input_length",
            output_tokens="output_length",
            time_unit="ms",
            hash_ids="hash_ids",
            hash_block_size=self.hash_block_size,
            optional=frozenset({"hash_ids"}),
        ).read(path)
