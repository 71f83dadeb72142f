"""Lending: who is lent when, to whom, and until when; a decode pool that takes prompts in a burst, and returns.

Guards `lending`; on clusters of made-up step times.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from apart import LINK, STEPS, D, P, column
from kit import Run, play, rows, table
from mist.batching.chunked import Chunked
from mist.client import Client
from mist.kernel import Kernel
from mist.records import FINISHED
from mist.request import ClientView, Task
from mist.routing.least_outstanding import LeastOutstanding

LOAN = {2: 100}


def burst(lending: Mapping[int, int], num: int = 12, gap_ns: int = 0) -> Run:
    """One prefill client, one that decodes, and one that decodes and is lent."""
    workload = table([gap_ns * i for i in range(num)], [80] * num, [6] * num)
    return play(workload, num_clients=3, serves=[P, D, D], nic=LINK, lending=lending, perf=STEPS,
                policy=lambda: Chunked(80, 8), router=LeastOutstanding())  # fmt: skip


def test_a_lending_pool_converts_drains_and_returns() -> None:
    run = burst(LOAN)
    ((lent, since, until),) = zip(*(column(run, "loans", k) for k in ("client", "start_ns", "end_ns")), strict=True)
    tasks = run.records.tasks.as_columns()
    prompts = (tasks["kind"] == 0) & (tasks["client"] == 2)
    assert (lent, since) == (2, 0)
    assert 0 < prompts.sum() < 12
    assert until == tasks["end_ns"][prompts].max() < max(column(run, "requests", "end_ns"))
    assert (tasks["queued_ns"][prompts] <= until).all()
    assert max(column(run, "requests", "end_ns")) < max(column(burst({}), "requests", "end_ns"))
    decoded_there = (tasks["kind"] == 1) & np.isin(tasks["request"], tasks["request"][prompts])
    assert set(tasks["client"][decoded_there].tolist()) == {2}
    assert run.coordinator.lending is not None
    assert not run.coordinator.lending._since_ns
    assert column(run, "requests", "status") == [FINISHED] * 12


def test_nobody_is_lent_below_the_threshold() -> None:
    quiet = burst(LOAN, gap_ns=9_000)
    assert not len(quiet.records.loans)
    assert rows(quiet.records) == rows(burst({}, gap_ns=9_000).records)


def test_a_second_burst_lends_again() -> None:
    at = [0] * 10 + [10**6] * 10
    run = play(table(at, [80] * 20, [6] * 20), num_clients=3, serves=[P, D, D], nic=LINK, lending=LOAN, perf=STEPS,
               policy=lambda: Chunked(80, 8))  # fmt: skip
    starts, ends = column(run, "loans", "start_ns"), column(run, "loans", "end_ns")
    assert starts == [0, 10**6]
    assert ends[0] < 10**6 < ends[1]


def test_nobody_is_lent_who_can_never_serve_the_prompt() -> None:
    """The lender has room for 96 tokens, the other decode client for any: long prompts wait where they were sent."""

    def shrink(_: Kernel, clients: list[Client]) -> None:
        clients[2].max_model_len = 96

    workload = table([0] * 12, [80, 120] * 6, [6] * 12)
    run = play(workload, num_clients=3, serves=[P, D, D], nic=LINK, lending=LOAN, perf=STEPS, prepare=shrink,
               policy=lambda: Chunked(80, 8), router=ToTheRoomy())  # fmt: skip
    assert column(run, "requests", "status") == [FINISHED] * 12
    tasks = run.records.tasks.as_columns()
    lent = tasks["request"][(tasks["kind"] == 0) & (tasks["client"] == 2)]
    assert len(lent)
    assert not (lent % 2).any()


class ToTheRoomy:
    """The first client of a kind."""

    def choose(self, task: Task, views: Sequence[ClientView], now: int) -> ClientView:
        return views[0]
