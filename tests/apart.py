"""Prefill and decode on clients of their own, for the tests of hand-overs under any terms: how to play them, and read.

Small clusters of made-up step times over one link. It asserts nothing.
"""

from __future__ import annotations

from typing import Any

from kit import LinearSteps, Run, play
from mist.hand_over import Terms
from mist.scenario.result import Result
from mist.testing.cluster import KVLink

P, D = ("prefill",), ("decode",)
EARLY, LATE = Terms(at_arrival=True), Terms(at_arrival=True, reserves_early=False)
LAYERWISE = Terms(at_arrival=True, layerwise=True)
#: 10 bytes a token at one byte per ns
LINK = KVLink(10, 1e9, 500)
#: a prompt of n tokens takes 100 n ns, a step of decodes 1000
STEPS = LinearSteps(base=0, per_prefill_token=100, per_decode=1000, per_context=0, per_prefill=0)


def pair(workload: Any, **options: Any) -> Run:
    return play(workload, **{"num_clients": 2, "serves": [P, D], "nic": LINK, **options})


def column(run: Run | Result, name: str, key: str) -> list[int]:
    return list(getattr(run.records, name).as_columns()[key].tolist())


def by_request(run: Run, kind: int, key: str) -> dict[int, int]:
    tasks = run.records.tasks.as_columns()
    mine = tasks["kind"] == kind
    return dict(zip(tasks["request"][mine].tolist(), tasks[key][mine].tolist(), strict=True))
