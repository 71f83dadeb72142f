"""What a summary needs of task and step rows, added up block by block while a run goes on.

Between the records and the figures: as requests leave, their rows are counted, and where the records aren't whole,
forgotten. One block or many, the sums are the same to the last bit. It never reads what a request may yet add to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from mist.kernel import FOREVER
from mist.metrics.availability import LastEnds
from mist.metrics.clients import Activity, ClientInfo
from mist.metrics.portion import Portion
from mist.metrics.queues import Queues
from mist.metrics.tenants import TenantInfo, rows_of
from mist.metrics.tokens import DecodeSteps
from mist.metrics.window import BoolColumn, Bounds, Columns, Window
from mist.records import LOST, IntColumn, Records

#: rows of tasks and steps that are counted at once
BLOCK_ROWS = 1 << 19


class Tally:
    """The running sums of a run.

    `first_ns`: its first arrival. `clients`, `window`, `whole` and `tenants` are as for `mist.metrics.summarise`.
    `last_arrival_ns`: the last one of those that saturation is judged by, if it is known before the end.
    """

    def __init__(
        self,
        records: Records,
        *,
        clients: Sequence[ClientInfo],
        first_ns: int,
        last_arrival_ns: int | None = None,
        window: Bounds = (None, None),
        whole: TenantInfo | None = None,
        tenants: Sequence[TenantInfo] = (),
    ) -> None:
        self.records, self.clients, self.bounds = records, clients, window
        num = len(clients)
        kinds = dict(enumerate(records.stage_kinds))
        self.whole = Portion(whole or TenantInfo(), kinds, num)
        self.tenants = [
            Portion(each, {number: kind for number, kind in kinds.items() if kind in each.stages}, num)
            for each in tenants
        ]
        #: whose requests saturation is judged by; none: everybody's
        self.pressing = [each for each in tenants if each.open_loop] if not self.whole.asked.open_loop else []
        self.is_judged = bool(self.whole.asked.open_loop or self.pressing)
        self.activity, self.queues, self.last_ends = Activity.none(num), Queues(clients), LastEnds(first_ns)
        #: by client over the whole run: ns at work, decode steps of sequences, and tokens that came out of them
        self.busy_ns, self.decoded_steps, self.decoded_tokens = (np.zeros(num, np.int64) for _ in range(3))
        self.num_steps = self.num_lost_tasks = self.num_lost_requests = 0
        self._first_ns = self._last_ns = first_ns
        self._last_arrival_ns = FOREVER if last_arrival_ns is None else last_arrival_ns
        #: whatever happens later than now is in the same windows
        self.so_far = Window.between(first_ns, FOREVER, window)
        #: read and not yet counted; of steps, those that requests yet to be counted may have been in
        self._requests: Columns = {}
        self._tasks: Columns = {}
        self._steps: Columns = {}
        #: where the tables of requests, steps and tasks are read from next
        self._marks = [(0, 0)] * 3
        self._num_old_steps = 0
        #: told of steps, the number of those told before, and tasks, as they are counted
        self.watchers: list[Callable[[Columns, int, Columns], None]] = []
        self._num_dropped = np.zeros(num, np.int64)
        self._first_transfer = self._num_read = 0

    @property
    def window(self) -> Window:
        """What is measured, of the run as far as it is counted."""
        if not len(self.records.requests):
            return Window.between(0, 0, self.bounds)
        return Window.between(self._first_ns, self._last_ns, self.bounds)

    @property
    def is_due(self) -> bool:
        """Whether enough has been written for a block."""
        return len(self.records.tasks) + len(self.records.steps) - self._num_read >= BLOCK_ROWS

    def add(self, settled_ns: int, needed_ns: int) -> None:
        """Count the requests that left before `settled_ns`: of them nothing more is written.

        Requests that are still to leave arrived at `needed_ns` or later.
        """
        self._read()
        late = np.flatnonzero(self._requests["end_ns"] >= settled_ns)
        num = int(late[0]) if len(late) else len(self._requests["end_ns"])
        requests, self._requests = (_rows(self._requests, part) for part in (slice(num), slice(num, None)))
        settled = np.isin(self._tasks["request"], requests["request"])
        tasks, self._tasks = (_rows(self._tasks, part) for part in (settled, ~settled))
        self._count(requests, tasks)
        self._drop(min(needed_ns, int(self._requests["arrival_ns"].min(initial=needed_ns))))

    def finish(self) -> None:
        """The run is over: count the rest."""
        self._read()
        requests = self.records.requests.as_columns()
        arrivals = (rows_of(self.pressing, requests) if self.pressing else requests)["arrival_ns"]
        self._last_arrival_ns = int(arrivals.max(initial=self._first_ns))
        self._count(self._requests, self._tasks)
        self._requests, self._tasks, self._steps = {}, {}, {}
        self.last_ends.last_ns = self.window.last_ns

    def _read(self) -> None:
        """What was written since, and the sums over all steps of it."""
        records = self.records
        tables = (records.requests, records.steps, records.tasks)
        requests, steps, tasks = (table.since(mark) for table, mark in zip(tables, self._marks, strict=True))
        if not records.are_whole:
            records.steps.forget()
            records.tasks.forget()
        self._marks = [table.mark() for table in tables]
        self._num_read = len(records.tasks) + len(records.steps)
        self._requests, self._tasks = _together(self._requests, requests), _together(self._tasks, tasks)
        self._num_old_steps = len(self._steps.get("client", ()))
        self._steps = _together(self._steps, steps)
        self.num_steps += len(steps["client"])
        np.add.at(self.busy_ns, steps["client"], steps["end_ns"] - steps["start_ns"])
        self.activity.add_steps(steps, self.so_far)
        times = (requests["arrival_ns"], requests["end_ns"], tasks["end_ns"], steps["end_ns"])
        self._last_ns = max(self._last_ns, *(int(each.max(initial=self._last_ns)) for each in times))

    def _count(self, requests: Columns, tasks: Columns) -> None:
        """Requests with all their tasks, in whatever order."""
        tasks = _rows(tasks, np.argsort(tasks["request"], kind="stable"))
        transfers = _rows(self.records.transfers.as_columns(), slice(self._first_transfer, None))
        steps = DecodeSteps.of(self._steps, len(self.clients))
        self._count_sums(tasks)
        tasks = {**tasks, **{name: self._in_block(tasks, name) for name in ("join_step", "last_step")}}
        self.whole.add(requests, tasks, transfers, steps, self.so_far)
        for watcher in self.watchers:
            watcher(self._steps, self._num_old_steps, tasks)
        for portion in self.tenants:
            rows = portion.asked.rows
            portion.add(rows(requests), rows(tasks), rows(transfers), steps, self.so_far)

    def _count_sums(self, tasks: Columns) -> None:
        self.activity.add_tasks(tasks, self.so_far)
        self.last_ends.add(tasks, self.records.changes.as_columns())
        if self.is_judged:
            self.queues.add(rows_of(self.pressing, tasks) if self.pressing else tasks, self._last_arrival_ns)
        decoded = _rows(tasks, tasks["join_step"] >= 0)
        np.add.at(self.decoded_steps, decoded["client"], decoded["last_step"] - decoded["join_step"])
        np.add.at(self.decoded_tokens, decoded["client"], decoded["generated_tokens"] - 1)
        lost = tasks["request"][tasks["how"] == LOST]
        self.num_lost_tasks += len(lost)
        self.num_lost_requests += len(np.unique(lost))

    def _in_block(self, tasks: Columns, name: str) -> IntColumn:
        """A number of decode steps of each task's client, less those that are dropped; -1 stays."""
        dropped = self._num_dropped[tasks["client"]] if len(self.clients) else 0
        return np.where(tasks[name] >= 0, tasks[name] - dropped, -1)

    def _drop(self, needed_ns: int) -> None:
        """Nobody will ask for steps and transfers that ended before."""
        over = self._steps["end_ns"] <= needed_ns
        decodes = self._steps["num_decodes"] > 0
        self._num_dropped += np.bincount(self._steps["client"][over & decodes], minlength=len(self.clients))
        self._steps = _rows(self._steps, _rest(over))
        recent = self.records.transfers.as_columns()["end_ns"][self._first_transfer :] >= needed_ns
        self._first_transfer += int(recent.argmax()) if recent.any() else len(recent)


def _rows(table: Columns, rows: IntColumn | BoolColumn | slice) -> dict[str, IntColumn]:
    return {name: column[rows] for name, column in table.items()}


def _rest(over: BoolColumn) -> BoolColumn | slice:
    """All rows but these; most often they are the first ones."""
    num_over = int(np.count_nonzero(over))
    return slice(num_over, None) if over[:num_over].all() else ~over


def _together(earlier: Columns, later: Columns) -> Columns:
    """The rows of both, copied where there are some of both."""
    if not len(earlier.get("request", earlier.get("client", ()))):
        return later
    return {name: np.concatenate((earlier.get(name, later[name][:0]), column)) for name, column in later.items()}
