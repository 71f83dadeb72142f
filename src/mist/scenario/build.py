"""From a scenario to a run: draw the workload, build the clients, let the kernel run, and turn records into a `Result`.

Every run builds fresh policies, models and memories, so a scenario stays a value and two runs give equal bytes. Nothing
of the simulation itself happens here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from mist import __version__
from mist.coordinator import Coordinator
from mist.errors import InvariantError, ScenarioError
from mist.kernel import FOREVER, Kernel
from mist.ledger import Ledger
from mist.metrics import summarise
from mist.metrics.window import Window
from mist.metrics.words import counted
from mist.perf import ORIGINS, HostModel, PerfModel
from mist.records import Records
from mist.request import DECODE, PREFILL
from mist.scenario.bands import expected_error
from mist.scenario.fleet import Fleet, build_fleet, network_of
from mist.scenario.links import shared
from mist.scenario.memories import add_memories, memory_infos, nothing_to_find
from mist.scenario.remarks import remarks
from mist.scenario.result import Result
from mist.scenario.seeds import random_of, seed_of
from mist.scenario.value import Scenario
from mist.units import NS_PER_S, seconds_to_ns
from mist.workload import RequestTable
from mist.workload.sessions import begin_sessions, draw_sessions
from mist.workload.synthetic import draw_table
from mist.workload.trace import limit, rate_scale, read_trace

#: called with the requests that have left and the requests of the workload
Progress = Callable[[int, int], None]


def run(scenario: Scenario, *, check: bool = False, progress: Progress | None = None) -> Result:
    """Simulate `scenario` to its end; `check` recounts every conservation law on the way.

    Raises ScenarioError where the workload or the memory makes it impossible, InvariantError if MIST itself is wrong.
    """
    began = time.perf_counter()
    workload, pipeline = build_workload(scenario), scenario.pipeline.build()
    workload.hash_block_size = workload.hash_block_size or getattr(pipeline, "hash_block_size", 0)
    _check_sizes(scenario, getattr(pipeline, "needs_sizes", ()), workload)
    kernel, records = Kernel(), Records(stage_kinds=list(scenario.stages))
    window = _window_ns(scenario, workload)
    fleet = build_fleet(scenario, workload, kernel, records)
    network = network_of(scenario, fleet, kernel, records)
    add_memories(scenario, fleet, workload, network, records)
    coordinator = Coordinator(
        kernel=kernel,
        records=records,
        clients=fleet.clients,
        network=network,
        pipeline=pipeline,
        routers={stage: spec.build() for stage, spec in scenario.routing.items()},
        workload=workload,
        rng_of=partial(random_of, scenario.seed, "pipeline"),
    )
    ledger = Ledger(kernel, coordinator, fleet.clients, records) if check else None
    started = time.perf_counter()
    cut = _play(scenario, kernel, coordinator, ledger, progress)
    metrics = summarise(
        records,
        clients=fleet.infos,
        window=window,
        open_loop=_is_open_loop(scenario) and workload.after is None,
        slo={metric: targets for metric, targets in scenario.slo.model_dump().items() if targets},
        memories=memory_infos(fleet),
        provenance=_provenance(records, fleet.models),
        oracle_output_tokens=workload.output_tokens if DECODE in scenario.stages else None,
        quality=getattr(pipeline, "quality", None),
    )
    whole = Window.of(records)
    metrics |= shared(coordinator.network, whole.first_ns, whole.last_ns)
    metrics["notes"] += [*cut, *_rejections(records), *workload.notes, *_verified(scenario, fleet, records)]
    metrics["notes"] += [
        *nothing_to_find(scenario, workload),
        *fleet.remarks,
        *remarks(scenario, fleet.priced_by, saturated=metrics["saturated"]),
    ]
    metrics["expected_error"] = {
        name: expected_error(scenario, name, fleet.priced_by[name], saturated=metrics["saturated"])
        for name in scenario.pools
    }
    ended = time.perf_counter()
    return Result(
        name=scenario.name,
        scenario=scenario.resolved(),
        records=records,
        metrics=metrics,
        simulator={
            "version": __version__,
            "events": kernel.num_events + len(records.steps),
            "steps": len(records.steps),
        },
        timing={"startup_s": started - began, "run_s": ended - started, "wall_s": time.perf_counter() - began},
    )


def build_workload(scenario: Scenario) -> RequestTable:
    """The scenario's requests: its trace, or arrivals and lengths drawn from the seed tree."""
    workload = scenario.workload
    try:
        table = _read(scenario) if workload.trace is not None else _draw(scenario)
    except ValueError as error:
        raise ScenarioError(scenario.problem(("workload", "arrivals"), str(error))) from None
    for name, spec in workload.size_distributions.items():
        table.sizes[name] = spec.build().sample(len(table), random_of(scenario.seed, f"sizes.{name}"))
    if workload.cached_tokens is not None:
        table.cached_tokens = workload.cached_tokens.build().sample(len(table), random_of(scenario.seed, "cached"))
    if table.cached_tokens is not None:
        table.cached_tokens = np.minimum(table.cached_tokens, table.input_tokens - 1)
        elsewhere = [*scenario.store_users, *(name for name, pool in scenario.pools.items() if pool.kv_cache.tiers)]
        finds_nothing = [
            name
            for name, pool in scenario.pools.items()
            if PREFILL in pool.serves and not pool.kv_cache.enable_prefix_caching and name not in elsewhere
        ]
        note = "{}: prefix caching is off, so the workload's cached_tokens are computed here."
        table.notes += tuple(note.format(name) for name in finds_nothing)
    return rate_scale(table, workload.rate_scale) if workload.rate_scale != 1 else table


def _check_sizes(scenario: Scenario, needed: Sequence[str], workload: RequestTable) -> None:
    """ScenarioError where the pipeline asks for sizes that the workload doesn't tell."""
    for name in needed:
        if name not in workload.sizes:
            told = f"known: {', '.join(workload.sizes)}" if workload.sizes else "give it under workload.sizes"
            message = f"the workload tells no size {name!r}"
            raise ScenarioError(scenario.problem(("pipeline", scenario.pipeline.name), message, told))


def _draw(scenario: Scenario) -> RequestTable:
    workload, process = scenario.workload, scenario.workload.arrival_process
    assert process is not None
    inputs, outputs = (workload.length_distribution(key).build() for key in ("input_tokens", "output_tokens"))
    if (sessions := workload.sessions) is not None:
        table = draw_sessions(
            sessions.num_sessions,
            process.build(),
            turns=sessions.turns.build(),
            input_tokens=inputs,
            output_tokens=outputs,
            think_ms=sessions.think_ms.build(),
            system_tokens=sessions.system_tokens,
            hash_block_size=sessions.hash_block_size,
            rng_of=lambda purpose: random_of(scenario.seed, f"sessions.{purpose}"),
        )
        return limit(table, workload.limit) if workload.limit is not None else table
    assert workload.num_requests is not None
    seed = seed_of(scenario.seed, "workload")
    table = draw_table(workload.num_requests, process.build(), inputs, outputs, seed)
    return limit(table, workload.limit) if workload.limit is not None else table


def _read(scenario: Scenario) -> RequestTable:
    workload, process = scenario.workload, scenario.workload.arrival_process
    trace_format = workload.trace_format
    table = read_trace(scenario.trace_path(), trace_format.build() if trace_format else None)
    if workload.limit is not None:
        table = limit(table, workload.limit)
    if process is not None:
        arrivals = process.build()
        if table.sessions is not None:
            return begin_sessions(table, arrivals, random_of(scenario.seed, "arrivals"))
        table.arrival_ns = arrivals.arrival_ns(len(table), random_of(scenario.seed, "arrivals"))
        table.concurrency = getattr(arrivals, "concurrency", None)
    return table


def _verified(scenario: Scenario, fleet: Fleet, records: Records) -> list[str]:
    """How many tokens came out of the steps of each pool that speculates."""
    tasks = records.tasks.as_columns()
    decoded = tasks["join_step"] >= 0
    notes = []
    for name, settings in ((name, pool.speculation) for name, pool in scenario.pools.items() if pool.speculation):
        assert settings is not None
        here = decoded & np.isin(tasks["client"], [i for i, info in enumerate(fleet.infos) if info.pool == name])
        steps = int((tasks["last_step"] - tasks["join_step"])[here].sum())
        if steps:
            mean = int((tasks["generated_tokens"] - 1)[here].sum()) / steps
            k, share = settings.num_draft_tokens, settings.accepted_share
            notes.append(
                f"{name}: {mean:.3g} tokens per sequence and decode step, of {k} drafted {share:.3g} accepted."
            )
    return notes


def _is_open_loop(scenario: Scenario) -> bool:
    """Whether arrivals have times of their own, which the system's answers don't change."""
    process = scenario.workload.arrival_process
    return process is None or process.name not in ("closed_loop", "all_at_once")


def _play(
    scenario: Scenario, kernel: Kernel, coordinator: Coordinator, ledger: Ledger | None, progress: Progress | None
) -> list[str]:
    """Let the kernel run; what to say of where the clock cut the run, if it did."""
    total = len(coordinator.workload)
    until = FOREVER if scenario.max_time_s is None else seconds_to_ns(scenario.max_time_s)
    if progress is not None:
        coordinator.on_progress = lambda num_left: progress(num_left, total)
    coordinator.start()
    kernel.run(until)
    # a step in flight reaches past the clock's end; without any, clients wait for what never comes
    is_idle = not coordinator.delays.waiting and all(client.idle for client in coordinator.clients)
    is_stuck = until == FOREVER and is_idle
    if coordinator.in_system and is_stuck:
        stuck = sorted(coordinator.in_system)[:5]
        raise InvariantError(
            f"nothing happens any more after {kernel.now} ns, and {len(coordinator.in_system)} requests are in the "
            f"system, the first of them {stuck} (seed {scenario.seed}): a batching policy waits for ever; "
            "--check says which"
        )
    told = _cut_note(scenario, coordinator)
    if coordinator.in_system or coordinator.num_cancelled or coordinator.network.in_flight:
        coordinator.cut(until)
    if ledger is not None:
        ledger.close(until if told else kernel.now)
    return told


def _cut_note(scenario: Scenario, coordinator: Coordinator) -> list[str]:
    """Where the clock cut the run: how many requests were in the system, and how many hadn't arrived."""
    inside, total = len(coordinator.in_system), len(coordinator.workload)
    missing = total - coordinator.num_arrived
    if not inside and not missing:
        return []
    if scenario.max_time_s is not None:
        where = f"max_time_s cut the run at {scenario.max_time_s:,.10g} s"
    else:
        where = f"The clock ends after 2**62 ns ({FOREVER / NS_PER_S / 31_557_600:.0f} years), which cut the run"
    return [f"{where}: of {counted(total, 'request')}, {inside:,} had not finished and {missing:,} had not arrived."]


def _window_ns(scenario: Scenario, workload: RequestTable) -> tuple[int | None, int | None]:
    """The measured window on the run's clock; it is written from the first arrival on."""
    first, last = int(workload.arrival_ns[0]), int(workload.arrival_ns[-1])
    start_s, end_s = scenario.window_s or (scenario.warmup_s, None)
    if not start_s and end_s is None:
        return None, None
    start = first + seconds_to_ns(start_s)
    if workload.concurrency is None and workload.after is None and start > last:
        key = "window_s" if scenario.window_s else "warmup_s"
        message = (
            f"no request arrives after the first {start_s:g} s: the last one comes at {(last - first) / NS_PER_S:g} s"
        )
        raise ScenarioError(scenario.problem((key,), message, "measure from an earlier time"))
    return start, None if end_s is None else first + seconds_to_ns(end_s)


def _rejections(records: Records) -> list[str]:
    """How many requests were rejected for each reason, most first."""
    reasons = records.requests.as_columns()["reason"]
    counts = np.bincount(reasons[reasons >= 0], minlength=len(records.reasons))
    return [f"{counts[i]:,} rejected: {records.reasons[i]}." for i in np.argsort(-counts, kind="stable")]


def _provenance(records: Records, models: Sequence[PerfModel | HostModel]) -> dict[str, float]:
    """Share of all clients' busy time by where the figure for it comes from."""
    steps = records.steps.as_columns()
    busy = np.bincount(steps["client"], steps["end_ns"] - steps["start_ns"], minlength=len(models))
    total = float(busy.sum())
    times = dict.fromkeys(ORIGINS, 0.0)
    for model, time_ns in zip(models, busy.tolist(), strict=True):
        for origin, share in model.provenance().items():
            times[origin] += share * time_ns
    # sums of shares are off by some 1e-16, which would print as digits
    return {origin: round(time_ns / total, 12) if total else 0.0 for origin, time_ns in times.items()}
