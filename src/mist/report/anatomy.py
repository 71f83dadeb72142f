"""What the steps of a run were made of: time bound by compute, memory or the network, launches, and the engine's host.

It takes a few steps of each pool and kind off the records, has the performance model of the scenario explain them, and
weighs them by the time that such steps took. It runs nothing, and what it can't explain it says.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from mist.engine import EngineProfile
from mist.errors import ScenarioError
from mist.metrics.window import Columns
from mist.metrics.words import counted
from mist.perf import BOUNDS, HostModel, OperatorTime, PerfModel
from mist.records import IntColumn
from mist.request import Step
from mist.scenario import Scenario, load
from mist.scenario.clients import Pool
from mist.scenario.fleet import perf_model
from mist.scenario.hosts import NO_ENGINE
from mist.scenario.pricing import host_beside
from mist.scenario.result import Result
from mist.scenario.stores import StorePool

#: kinds of steps, by what is in them
STEP_KINDS = ("decodes", "prefills", "both")
#: what the time of a step is bound by: `BOUNDS`, the engine's host, and what the records don't tell
PARTS = (*BOUNDS, "host", "rest")
#: steps of a kind are looked at where these shares of their time lie in shorter ones
_PLACES = (1 / 6, 1 / 2, 5 / 6)


@dataclass(frozen=True, slots=True)
class Explained:
    """One recorded step: its own words, its time in ns as recorded, and by part (`PARTS`), which add up to it."""

    name: str
    time_ns: int
    parts: tuple[float, ...]
    operators: tuple[OperatorTime, ...]


@dataclass(frozen=True, slots=True)
class StepKind:
    """Steps of one kind of a pool: how many, their time in all, and some of them from short to long."""

    name: str
    num_steps: int
    time_ns: int
    steps: tuple[Explained, ...]

    @property
    def shares(self) -> tuple[float, ...]:
        """Share of the time by part, by the steps that were looked at."""
        shares = [np.array(step.parts) / step.time_ns for step in self.steps]
        return tuple(float(share) for share in np.mean(shares, axis=0))


@dataclass(frozen=True, slots=True)
class Anatomy:
    """A pool's steps by kind, and the name of the model that prices them; `problem`: why nothing could explain them."""

    pool: str
    perf: str
    kinds: tuple[StepKind, ...] = ()
    problem: str = ""


@dataclass(slots=True)
class _Priced:
    """Who explains the steps of a pool."""

    perf: str
    model: PerfModel | HostModel
    engine: EngineProfile = field(default_factory=lambda: NO_ENGINE)
    kinds: tuple[str, ...] = ()
    tokens_per_decode: int = 1


def anatomies(result: Result, clients: dict[str, list[int]]) -> list[Anatomy]:
    """Of each pool that ran steps, what they were made of. `clients`: the numbers of those of each pool.

    The models are built anew from the scenario; where its files or tables are gone, `problem` says so.
    """
    steps = result.records.steps.as_columns()
    try:
        scenario = load(result.scenario)
    except ScenarioError as error:
        return [Anatomy(pool, "", problem=str(error.problems[0])) for pool in clients]
    found = []
    for pool, members in clients.items():
        mine = np.isin(steps["client"], members) & (steps["num_prefills"] + steps["num_decodes"] > 0)
        if not mine.any() or isinstance(scenario.clients[pool], StorePool):  # a look-up has no parts
            continue
        try:
            priced = _priced(scenario, pool)
        except ScenarioError as error:
            found.append(Anatomy(pool, "", problem=str(error.problems[0])))
            continue
        rows = {name: column[mine] for name, column in steps.items()}
        found.append(Anatomy(pool, priced.perf, tuple(_kinds(priced, rows))))
    return found


def _priced(scenario: Scenario, name: str) -> _Priced:
    pool = scenario.clients[name]
    assert not isinstance(pool, StorePool)
    if not isinstance(pool, Pool):
        return _Priced(pool.perf.name, pool.prepared(), kinds=tuple(pool.serves))
    model, perf, _ = perf_model(scenario, name, pool)
    engine = host_beside(pool.engine, model, pool.model.num_layers)
    return _Priced(perf, model, engine, tokens_per_decode=pool.tokens_per_decode)


def _kinds(priced: _Priced, rows: Columns) -> Iterator[StepKind]:
    kind = np.where(rows["num_prefills"] == 0, 0, np.where(rows["num_decodes"] == 0, 1, 2))
    time = rows["end_ns"] - rows["start_ns"]
    for number, name in enumerate(STEP_KINDS):
        places = np.flatnonzero((kind == number) & (time > 0))
        if len(places):
            chosen = places[_spread(time[places])]
            steps = [_explained(priced, {key: int(column[i]) for key, column in rows.items()}) for i in chosen.tolist()]
            yield StepKind(name, len(places), int(time[places].sum()), tuple(steps))


def _spread(time_ns: IntColumn) -> IntColumn:
    """Places of steps from short to long, so many as `_PLACES` or fewer, each for as much of the time."""
    order = np.argsort(time_ns, kind="stable")
    passed = np.cumsum(time_ns[order])
    chosen: IntColumn = order[np.searchsorted(passed, passed[-1] * np.array(_PLACES))]
    return chosen


def _explained(priced: _Priced, row: dict[str, int]) -> Explained:
    step = _step(priced, row)
    operators = tuple(priced.model.explain(step))
    time_ns = row["end_ns"] - row["start_ns"]
    device = {bound: sum(o.time_ns for o in operators if o.bound_by == bound) for bound in BOUNDS}
    total = sum(device.values())
    engine = priced.engine
    host = engine.step_overhead_ns + engine.token_overhead_ns * step.num_sampled
    host += engine.prefill_overhead_ns if step.chunks else 0
    # what an overlapped engine hides of its host isn't in the step's time
    host_ns = float(min(max(time_ns - total, 0.0), host))
    shown = min(1.0, time_ns / total) if total else 0.0
    parts = (*(ns * shown for ns in device.values()), host_ns, max(0.0, time_ns - total - host_ns))
    return Explained(_name(step), time_ns, parts, operators)


def _step(priced: _Priced, row: dict[str, int]) -> Step:
    """The step of a row; records have the sums of its chunks, taken to be alike and the first of their prompts."""
    step = Step(num_decodes=row["num_decodes"], decode_context=row["decode_context"],
                tokens_per_decode=priced.tokens_per_decode)  # fmt: skip
    num, tokens = row["num_prefills"], row["num_prefill_tokens"]
    step.chunks = [(tokens // num + (i < tokens % num), 0) for i in range(num)]
    step.num_prefill_tokens = tokens
    step.num_sampled = num + row["num_decodes"] * priced.tokens_per_decode
    step.kinds = [priced.kinds[i % len(priced.kinds)] for i in range(num)] if priced.kinds else []
    return step


def _name(step: Step) -> str:
    parts = []
    if step.chunks:
        texts = f"{len(step.chunks)} × " if len(step.chunks) > 1 else ""
        parts.append(f"{texts}{step.num_prefill_tokens // len(step.chunks):,} tokens")
    if step.num_decodes:
        parts.append(f"{counted(step.num_decodes, 'decode')} over {step.decode_context // step.num_decodes:,} tokens")
    return " + ".join(parts)
