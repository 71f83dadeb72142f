"""What a finished run tells of each client: its pool, its pace, and the tables of the run, ready to be asked.

From a `Result` and the scenario that it came of. It decides nothing, and runs nothing.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from mist.advice.pace import HOST_SERVE, Limits, Pace, pace_of
from mist.batching import BatchingPolicy
from mist.engine import EngineProfile
from mist.metrics.distribution import FloatColumn
from mist.metrics.window import BoolColumn, Columns
from mist.records import DONE, FINISHED, KV_TRANSFER, PREEMPTED, IntColumn, Records
from mist.scenario import Scenario
from mist.scenario.clients import Pool
from mist.scenario.hosts import NO_ENGINE, HostPool
from mist.scenario.pricing import host_beside, price
from mist.scenario.result import Result


@dataclass
class Evidence:
    """A run and what its records say of its clients. Columns are those of `mist.records`, tasks by request."""

    scenario: Scenario
    result: Result

    @property
    def summary(self) -> dict[str, Any]:
        return self.result.metrics

    @property
    def records(self) -> Records:
        return self.result.records

    @cached_property
    def tasks(self) -> Columns:
        rows = self.records.tasks.as_columns()
        order = np.argsort(rows["request"], kind="stable")
        return {name: column[order] for name, column in rows.items()}

    @cached_property
    def transfers(self) -> Columns:
        return self.records.transfers.as_columns()

    @cached_property
    def _ways(self) -> dict[tuple[int, int], list[tuple[int, int, int, int]]]:
        rows = self.transfers
        there = np.flatnonzero(rows["end_ns"] >= 0)
        there = there[np.argsort(rows["end_ns"][there], kind="stable")]
        found: dict[tuple[int, int], list[tuple[int, int, int, int]]] = {}
        names = ("request", "receiver", "sender", "queued_ns", "start_ns", "end_ns")
        for request, receiver, *way in zip(*(rows[name][there].tolist() for name in names), strict=True):
            found.setdefault((receiver, request), []).append(tuple(way))
        return found

    def sent_to(self, client: int, request: int) -> list[tuple[int, int, int, int]]:
        """What reached a client for a request, as it came: the sender, and queueing, start and end in ns."""
        return self._ways.get((client, request), [])

    def sender(self, index: int) -> str:
        """The pool of a sender, or the memory that it is."""
        return self.pool_of[index] if index >= 0 else self.records.memory_names[-1 - index]

    @cached_property
    def requests(self) -> Columns:
        """The measured requests that finished."""
        rows = self.records.requests.as_columns()
        start_ns, end_ns = (round(self.summary["window"][key] * 1e9) for key in ("start_s", "end_s"))
        kept = (rows["status"] == FINISHED) & (rows["arrival_ns"] >= start_ns) & (rows["arrival_ns"] <= end_ns)
        return {name: column[kept] for name, column in rows.items()}

    @cached_property
    def pool_of(self) -> list[str]:
        """The pool of each client."""
        counts = {name: len(figures["replicas"]) for name, figures in self.summary["clients"].items()}
        return [pool for pool, count in counts.items() for _ in range(count)]

    @cached_property
    def limits(self) -> dict[str, Limits]:
        """What bounds the steps of each pool's clients."""
        longest = int(self.records.requests.as_columns()["input_tokens"].max(initial=0))
        return {name: self._limits(name, longest) for name in self.scenario.clients}

    @cached_property
    def paces(self) -> list[Pace]:
        """Of each client."""
        return [pace_of(*self._steps_of(c), self.limits[pool]) for c, pool in enumerate(self.pool_of)]

    @cached_property
    def ready_ns(self) -> IntColumn:
        """When each task had passed the front end of its client: its queueing, where that takes no time."""
        tasks, ready = self.tasks, self.tasks["queued_ns"].copy()
        requests = self.records.requests.as_columns()
        prompt = np.zeros(int(requests["request"].max(initial=-1)) + 1, np.int64)
        prompt[requests["request"]] = requests["input_tokens"]
        comes = (tasks["started_ns"] != tasks["queued_ns"]) & ~self.is_resumed
        for client, pool in enumerate(self.pool_of):
            engine = self.limits[pool].engine
            if not engine.has_front_end:
                continue
            rows = np.flatnonzero(comes & (tasks["client"] == client))
            rows = rows[np.argsort(tasks["queued_ns"][rows], kind="stable")]
            read = engine.request_overhead_ns + engine.prompt_token_overhead_ns * prompt[tasks["request"][rows]]
            begin = _one_by_one(tasks["queued_ns"][rows], engine.request_serial_ns)
            ready[rows] = begin + np.maximum(read, engine.request_serial_ns)
        return ready

    @cached_property
    def is_resumed(self) -> BoolColumn:
        """Which tasks' rows go on with one that was preempted."""
        tasks = self.tasks
        same = (tasks["request"][1:] == tasks["request"][:-1]) & (tasks["how"][:-1] == PREEMPTED)
        return np.append(np.zeros(min(1, len(tasks["how"])), bool), same)

    def steps_of(self, pool: str) -> Columns:
        """The steps of all clients of a pool."""
        rows = self.records.steps.as_columns()
        mine = np.isin(rows["client"], [c for c, name in enumerate(self.pool_of) if name == pool])
        return {name: column[mine] for name, column in rows.items()}

    def parts_of(self, pool: str) -> FloatColumn:
        """ns of all parts of the pace of a pool's clients over the run, float64[NUM_PARTS]."""
        whole: FloatColumn = np.sum(
            [pace.sums[-1] for pace, name in zip(self.paces, self.pool_of, strict=True) if name == pool], axis=0
        )
        return whole

    def busy_ns(self, pool: str) -> int:
        steps = self.steps_of(pool)
        return int((steps["end_ns"] - steps["start_ns"]).sum())

    def host_share(self, pool: str) -> float:
        """Of the time of a pool's steps, the share in which its devices waited for the host."""
        busy = self.busy_ns(pool)
        return float(self.parts_of(pool)[HOST_SERVE]) / busy if busy else 0.0

    def _limits(self, name: str, longest: int) -> Limits:
        pool = self.scenario.clients[name]
        if not isinstance(pool, Pool):
            batching: BatchingPolicy | None = pool.batching.build() if isinstance(pool, HostPool) else None
            return Limits(NO_ENGINE, 0, batching.max_num_seqs if batching else 0)
        figures = self.summary["clients"][name]
        num_blocks = figures["kv_tokens_capacity"] // pool.kv_cache.block_size // len(figures["replicas"])
        limits = pool.batching.build()
        return Limits(
            _engine(pool), limits.max_num_batched_tokens, limits.max_num_seqs, num_blocks, pool.kv_cache.block_size,
            min(longest, pool.max_model_len), pool.tokens_per_decode, pool.kv_cache.watermark,
        )  # fmt: skip

    def _steps_of(self, client: int) -> tuple[Columns, IntColumn, FloatColumn, FloatColumn]:
        rows = self.records.steps.as_columns()
        mine = np.flatnonzero(rows["client"] == client)
        mine = mine[np.argsort(rows["start_ns"][mine], kind="stable")]
        steps = {name: column[mine] for name, column in rows.items()}
        sending, after = (self._sending_blocks(client, steps[edge]) for edge in ("start_ns", "end_ns"))
        return steps, self._sampled(client, steps["end_ns"]), sending, after

    def _sampled(self, client: int, ends: IntColumn) -> IntColumn:
        """How many prompts of a client end with each of its steps."""
        here = {name: column[self.tasks["client"] == client] for name, column in self.tasks.items()}
        joined = here["joined_ns"][here["joined_ns"] >= 0]
        only_read = here["end_ns"][(here["joined_ns"] < 0) & (here["how"] == DONE)]
        counts = Counter(np.concatenate([joined, only_read]).tolist())
        return np.array([counts.get(end, 0) for end in ends.tolist()], np.int64)

    def _sending_blocks(self, client: int, times: IntColumn) -> FloatColumn:
        """KV blocks that prompts hold here while their KV caches are on the link, at each instant."""
        pool = self.scenario.clients[self.pool_of[client]]
        if not isinstance(pool, Pool) or not self.limits[self.pool_of[client]].kv_blocks:
            return np.zeros(len(times))
        rows = self.transfers
        sent = (rows["sender"] == client) & (rows["kind"] == KV_TRANSFER) & (rows["start_ns"] >= 0)
        begun, end, num_bytes = (rows[name][sent] for name in ("start_ns", "end_ns", "bytes"))
        end = np.where(end >= 0, end, 1 << 62)
        under_way = _sum_until(begun, num_bytes, times) - _sum_until(end, num_bytes, times)
        return under_way / (pool.model.kv_bytes_per_token(pool.kv_dtype) * pool.kv_cache.block_size)


def _sum_until(times: IntColumn, amounts: IntColumn, at: IntColumn) -> FloatColumn:
    """What came to pass at or before each instant, added up."""
    order = np.argsort(times, kind="stable")
    sums = np.append(0.0, np.cumsum(amounts[order], dtype=float))
    found: FloatColumn = sums[np.searchsorted(times[order], at, side="right")]
    return found


def _one_by_one(comes: IntColumn, takes_ns: int) -> IntColumn:
    """When each of those that come in this order begins to be served, alone, for `takes_ns`."""
    place = np.arange(len(comes)) * takes_ns
    begin: IntColumn = np.maximum.accumulate(comes - place) + place if len(comes) else comes
    return begin


def _engine(pool: Pool) -> EngineProfile:
    """The engine as it runs this pool's model: without host time per step where a learned model's steps have it."""
    learned = any(spec.name == "steps" for spec in pool.perf)
    model = price(pool.perf, pool.deployment()).model if learned else None
    return host_beside(pool.engine, model, pool.model.num_layers)  # type: ignore[arg-type]
