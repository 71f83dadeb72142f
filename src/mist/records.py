"""What a run writes down: append-only tables of requests, task segments, steps and transfers.

They are the only output of a run; every metric is an expression over them. A row is a fixed number of 64-bit
integers (times in ns, -1 for "never"), kept in one flat array, so a row costs one call and 8 bytes a cell.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from struct import Struct

import numpy as np
import numpy.typing as npt

IntColumn = npt.NDArray[np.int64]

#: `status` of a request's row, in this order
STATUSES = ("finished", "rejected", "cancelled", "timed_out", "unfinished", "refused")
FINISHED, REJECTED, CANCELLED, TIMED_OUT, UNFINISHED, REFUSED = range(6)

#: what a transfer moves, in this order: a KV cache to where it is decoded, a prefix from a memory, what a stage hands
#: on, a KV cache to a memory that keeps it, that of a preempted decode to host memory or back
TRANSFER_KINDS = ("kv_transfer", "prefix_fetch", "hand_off", "kv_write", "kv_swap")
KV_TRANSFER, PREFIX_FETCH, HAND_OFF, KV_WRITE, KV_SWAP = range(5)

#: how a task segment ended, in this order
SEGMENT_ENDS = ("done", "preempted", "cut", "cancelled", "lost")
DONE, PREEMPTED, CUT, DROPPED, LOST = range(5)

#: what a client is from an instant on, in this order: it serves; it is down; it takes nothing new and goes when it is
#: empty; it gets ready to serve; its pool has no such replica now
CLIENT_STATES = ("up", "down", "draining", "starting", "off")
UP, DOWN, DRAINING, STARTING, OFF = range(5)

#: `client` of a segment that no client serves
NO_CLIENT = -1


class Table:
    """A table of int64 columns.

    A row is written by `write(pack(...))`, one value per column, in order: half of what a method takes to do it.
    """

    __slots__ = ("_rows", "columns", "pack", "write")

    def __init__(self, columns: Sequence[str]) -> None:
        self.columns = tuple(columns)
        self._rows = array("q")
        self.pack = Struct(f"{len(columns)}q").pack
        self.write = self._rows.frombytes

    def append(self, row: Sequence[int]) -> None:
        """One value per column, in order."""
        self.write(self.pack(*row))

    def __len__(self) -> int:
        return len(self._rows) // len(self.columns)

    @property
    def cells(self) -> array[int]:
        """All rows, one behind the other."""
        return self._rows

    def as_columns(self) -> dict[str, IntColumn]:
        """Every column as a strided view of the table, without copying; no row can be written while one is held."""
        return self._named(np.frombuffer(self._rows, dtype=np.int64))

    def mark(self) -> tuple[int, int]:
        """Where the table ends now, for `since`."""
        return len(self._rows), 0

    def since(self, mark: tuple[int, int]) -> dict[str, IntColumn]:
        """Every column of the rows written since then, a copy."""
        return self._named(_rest(self._rows, mark[0]))

    def forget(self) -> None:
        """Let all rows go."""
        del self._rows[:]

    def _named(self, cells: IntColumn) -> dict[str, IntColumn]:
        rows = cells.reshape(-1, len(self.columns))
        return {name: rows[:, i] for i, name in enumerate(self.columns)}


def _rest(cells: array[int], first: int) -> IntColumn:
    """A copy of what is in `cells` from `first` on."""
    return np.array(np.frombuffer(cells, dtype=np.int64)[first:])


#: columns of the table of steps; in the row of a span, `end_ns` is -1 - its number of steps
_STEPS = (
    "client", "start_ns", "end_ns", "num_prefills", "num_prefill_tokens", "num_decodes",
    "decode_context", "kv_blocks", "num_waiting",
)  # fmt: skip


class StepTable(Table):
    """The table of steps. Decodes alone that follow each other, a span, take one row and two numbers for each step."""

    __slots__ = ("_blocks", "_ends", "_num_spans")

    def __init__(self) -> None:
        super().__init__(_STEPS)
        #: of each step of a span, in order
        self._ends = array("q")
        self._blocks = array("q")
        self._num_spans = 0

    def append_span(
        self,
        client: int,
        num_decodes: int,
        decode_context: int,
        num_waiting: int,
        start_ns: int,
        ends_ns: list[int],
        kv_blocks: list[int],
    ) -> None:
        """Steps of decodes alone, from `start_ns` on: `decode_context` in the first, and `num_decodes` more in each."""
        self.write(self.pack(client, start_ns, -1 - len(ends_ns), 0, 0, num_decodes, decode_context, 0, num_waiting))
        self._ends.fromlist(ends_ns)
        self._blocks.fromlist(kv_blocks)
        self._num_spans += 1

    def __len__(self) -> int:
        return super().__len__() - self._num_spans + len(self._ends)

    @property
    def cells(self) -> array[int]:
        """All rows, one behind the other, those of spans step by step."""
        found = array("q")
        found.frombytes(np.column_stack(list(self.as_columns().values())).tobytes())
        return found

    def as_columns(self) -> dict[str, IntColumn]:
        """Every column, with the steps of spans one by one."""
        ends, blocks = (np.frombuffer(cells, dtype=np.int64) for cells in (self._ends, self._blocks))
        return _unfold(super().as_columns(), ends, blocks)

    def mark(self) -> tuple[int, int]:
        return len(self._rows), len(self._ends)

    def since(self, mark: tuple[int, int]) -> dict[str, IntColumn]:
        ends, blocks = (_rest(cells, mark[1]) for cells in (self._ends, self._blocks))
        return _unfold(super().since(mark), ends, blocks)

    def forget(self) -> None:
        super().forget()
        del self._ends[:], self._blocks[:]
        self._num_spans = 0


def _unfold(rows: dict[str, IntColumn], ends_ns: IntColumn, kv_blocks: IntColumn) -> dict[str, IntColumn]:
    """The columns of steps from those with spans in them and what these have of each step."""
    if not len(ends_ns):
        return rows
    is_span = rows["end_ns"] < 0
    sizes = np.where(is_span, -1 - rows["end_ns"], 1)
    columns = {name: np.repeat(column, sizes) for name, column in rows.items()}
    in_span = np.repeat(is_span, sizes)
    place = (np.arange(len(in_span)) - np.repeat(np.cumsum(sizes) - sizes, sizes))[in_span]
    columns["start_ns"][in_span] = np.where(place > 0, np.roll(ends_ns, 1), columns["start_ns"][in_span])
    columns["end_ns"][in_span] = ends_ns
    columns["decode_context"][in_span] += place * columns["num_decodes"][in_span]
    columns["kv_blocks"][in_span] = kv_blocks
    return columns


def _table(*columns: str) -> Table:
    return field(default_factory=lambda: Table(columns))


@dataclass(slots=True)
class Records:
    """All tables of one run, and the names that their index columns refer to.

    requests: one row per request, written when it leaves the system (or at the end, `unfinished`). `input_tokens` are
      those of the prompt that its last visible prefill computed, passages included.
    tasks: one row per segment of a task: from its queueing to its end or preemption; of a delay too, whose `client` is
      `NO_CLIENT`. It has emitted a token at
      `joined_ns` (-1: it sampled none when its context was computed), then one at the end of each decode step
      `join_step` + 1 .. `last_step` (-1: it never joined) of its client, counting that client's steps with
      num_decodes > 0 from 1; more than one where it speculates: `generated_tokens` are all those of the segment, evenly
      spread over its decode steps. Where another client decodes on, the first token is the prefill's or, by the engine,
      that of the join there.
    steps: one row per step of a client. `kv_blocks` are the blocks referenced while it ran. A step that was lost with
      its client ends there and has nothing in it.
    transfers: one row for all of a kind (`TRANSFER_KINDS`) that moved at once, such as a KV cache, written when it is
      there (or at the end: `end_ns`, and `start_ns` if it had not begun, are -1). `sender` and `receiver` are clients,
      or memories as -1 - their index in `memory_names`: -1 is the host memory of the client at the other end.
    changes: one row per client and instant from which it is in another state (`CLIENT_STATES`), with the index of the
      reason in `causes`; they are up at first. One that drains is off when it is empty, without a row.
    loans: one row per time that a client was lent to prompts, written when it returned (or at the end: `end_ns` is -1).

    Unless `are_whole`, rows of tasks and steps are forgotten once they are counted.
    """

    client_names: list[str] = field(default_factory=list)
    memory_names: list[str] = field(default_factory=lambda: ["host memory"])
    stage_kinds: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    causes: list[str] = field(default_factory=list)
    #: the tenants that have names, in order, each with the number of its first request
    tenants: list[tuple[str, int]] = field(default_factory=list)
    requests: Table = _table(
        "request", "arrival_ns", "first_token_ns", "end_ns", "status", "reason",
        "input_tokens", "output_tokens", "cached_tokens", "num_preemptions",
    )  # fmt: skip
    tasks: Table = _table(
        "request", "stage_index", "kind", "client", "queued_ns", "started_ns", "joined_ns", "end_ns",
        "how", "computed_tokens", "cached_tokens", "join_step", "last_step", "generated_tokens",
    )  # fmt: skip
    steps: StepTable = field(default_factory=StepTable)
    transfers: Table = _table("request", "kind", "sender", "receiver", "bytes", "queued_ns", "start_ns", "end_ns")
    changes: Table = _table("client", "state", "time_ns", "cause")
    loans: Table = _table("client", "start_ns", "end_ns")
    are_whole: bool = True
