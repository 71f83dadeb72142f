"""Workloads: where requests come from. A trace or a synthetic source fills a `RequestTable`; the coordinator plays it.

Arrival processes and length distributions are drawn from the scenario's seed tree before the run, so that request i
has the same sizes under every policy (common random numbers).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Protocol

import numpy as np
import numpy.typing as npt

from mist.registry import Named

IntArray = npt.NDArray[np.int64]


@dataclass(slots=True)
class RequestTable:
    """The requests of a workload as columns; row i is request i, arrivals never decrease.

    `arrival_ns`: int64[n], from the workload's first instant; under `concurrency` (closed loop) it holds for the first
    `concurrency` rows, and each later request starts when one ends. `input_tokens` >= 1, `output_tokens` >= 0:
    int64[n]. `block_keys`: per request the prompt's prefix hashes, each chained through its parent (equal key = equal
    content *and* equal prefix), one per `hash_block_size` tokens, the last perhaps partial; None where the workload
    tells nothing of content. `cached_tokens`: int64[n], tokens at the front of each prompt that are found in the prefix
    cache without any keys, all but one of it at most; None where none are.
    `sizes`: int64[n] by name, what else is known of each request, for its pipeline (`query_tokens`, `passage_tokens`).
    `sessions`: int64[n], the number of the session that each request is a turn of, -1 for none. Closed-loop sessions:
    request i arrives `think_ns[i]` after the end of request `after[i]` < i, and where `after[i]` is -1 at its
    `arrival_ns`, which for the others is only when they came in the source (both int64[n], or None).
    `notes` are what the reader of a result should know of the workload, as sentences.
    """

    arrival_ns: IntArray
    input_tokens: IntArray
    output_tokens: IntArray
    block_keys: Sequence[tuple[int, ...]] | None = None
    hash_block_size: int = 0
    concurrency: int | None = None
    notes: tuple[str, ...] = ()
    cached_tokens: IntArray | None = None
    sizes: dict[str, IntArray] = field(default_factory=dict)
    sessions: IntArray | None = None
    after: IntArray | None = None
    think_ns: IntArray | None = None

    def __len__(self) -> int:
        return len(self.input_tokens)


class ArrivalProcess(Protocol):
    """When requests arrive; registered under the kind `arrivals`."""

    def arrival_ns(self, num_requests: int, rng: np.random.Generator) -> IntArray:
        """Non-decreasing arrival times, int64[num_requests], in ns from the start of the run."""
        ...


class LengthDistribution(Protocol):
    """How many tokens a prompt or an output has; registered under the kind `lengths`."""

    def sample(self, num_requests: int, rng: np.random.Generator) -> IntArray:
        """Token counts >= 1, int64[num_requests]."""
        ...


#: a number of tokens, or a distribution of them
Lengths = Annotated[int | LengthDistribution, Named("lengths", bare="fixed")]


class TraceFormat(Protocol):
    """A public trace format; registered under the kind `trace`."""

    def matches(self, path: Path, first_line: bytes) -> bool:
        """Whether a file of this name and first line (b"" for Parquet) is in this format."""
        ...

    def read(self, path: Path) -> RequestTable:
        """The whole trace; ScenarioError with file:line where a record can't be used."""
        ...
