"""From a scenario to a run: draw the workload, build the clients, let the kernel run, and turn records into a `Result`.

Every run builds fresh policies, models and memories, so a scenario stays a value and two runs give equal bytes. Nothing
of the simulation itself happens here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from mist import __version__
from mist.coordinator import Coordinator
from mist.errors import InvariantError, ScenarioError
from mist.kernel import FOREVER, Kernel
from mist.ledger import Ledger
from mist.lending import Lending
from mist.metrics import TenantInfo, summarise
from mist.metrics.distribution import FloatColumn
from mist.metrics.window import Window
from mist.metrics.words import counted
from mist.perf import ORIGINS, HostModel, PerfModel
from mist.records import Records
from mist.scenario.bands import expected_error
from mist.scenario.disturbances import add_disturbances, happened
from mist.scenario.fleet import Fleet, build_fleet, give_swap_spaces, network_of
from mist.scenario.hand_over import terms_of
from mist.scenario.links import shared
from mist.scenario.memories import add_memories, memory_infos, nothing_to_find
from mist.scenario.remarks import remarks
from mist.scenario.result import Result
from mist.scenario.tables import build_tables
from mist.scenario.tenancy import SOLE
from mist.scenario.tenants import build_tenants, table_notes, tenant_infos
from mist.scenario.unloaded import asking, one_at_a_time, remembered, undisturbed
from mist.scenario.usage import bill
from mist.scenario.value import Scenario
from mist.tenant import Tenant
from mist.units import NS_PER_S, seconds_to_ns
from mist.views import Views
from mist.workload import RequestTable

#: called with the requests that have left and the requests of the workload
Progress = Callable[[int, int], None]


def run(
    scenario: Scenario,
    *,
    check: bool = False,
    progress: Progress | None = None,
    only: str | None = None,
    tables: Mapping[str, RequestTable] | None = None,
) -> Result:
    """Simulate `scenario` to its end; `check` recounts every conservation law on the way.

    `only`: the name of a tenant that has the clients for itself; its requests are those that it has among the others.
    `tables`: the requests of each tenant, in place of those that the scenario reads or draws.
    Raises ScenarioError where the workload or the memory makes it impossible, InvariantError if MIST itself is wrong.
    """
    began = time.perf_counter()
    tables = build_tables(scenario) if tables is None else dict(tables)
    kernel, records = Kernel(), Records(stage_kinds=list(scenario.stages))
    hash_block_size = max(table.hash_block_size for table in tables.values())
    fleet = build_fleet(scenario, hash_block_size, kernel, records)
    network = network_of(scenario, fleet, kernel, records)
    give_swap_spaces(scenario, fleet, network, records)
    add_memories(scenario, fleet, hash_block_size, network, records)
    tenants = build_tenants(scenario, tables, fleet, records)
    playing = tenants if only is None else {only: tenants[only]}
    infos = tenant_infos(scenario, playing, _alone(scenario, tenants))
    window = _window_ns(scenario, list(tables.values()))
    tables = {name: tables[name] for name in playing}
    coordinator = Coordinator(
        kernel=kernel, records=records, clients=fleet.clients, network=network, tenants=list(tenants.values()),
        views=Views(seconds_to_ns(scenario.view_refresh_s)), terms=terms_of(scenario, fleet.clients, fleet.infos),
        lending=_lending(scenario, fleet, records),
    )  # fmt: skip
    add_disturbances(scenario, fleet, coordinator, sum(len(tenant.workload) for tenant in playing.values()))
    ledger = Ledger(kernel, coordinator, fleet.clients, records) if check else None
    started = time.perf_counter()
    cut = _play(scenario, kernel, coordinator, list(playing.values()), ledger, progress)
    everybody = infos.get(SOLE) or TenantInfo(open_loop=all(info.open_loop for info in infos.values()))
    metrics = summarise(
        records,
        clients=fleet.infos,
        window=window,
        open_loop=everybody.open_loop,
        slo=everybody.slo,
        memories=memory_infos(fleet),
        provenance=_provenance(records, fleet.models),
        oracle_output_tokens=everybody.oracle_output_tokens,
        quality=everybody.quality,
        alone=everybody.alone,
        tenants=[info for info in infos.values() if info.name != SOLE],
    )
    whole = Window.of(records)
    metrics |= shared(coordinator.network, whole.first_ns, whole.last_ns)
    metrics["notes"] += [
        *cut,
        *happened(scenario, records),
        *_rejections(records),
        *table_notes(tables),
        *_verified(scenario, fleet, records),
    ]
    metrics["notes"] += [
        *nothing_to_find(scenario, tables),
        *fleet.remarks,
        *remarks(scenario, fleet.priced_by, saturated=metrics["saturated"]),
    ]
    metrics |= bill(scenario, fleet, records, metrics, window)
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


def _alone(scenario: Scenario, tenants: Mapping[str, Tenant]) -> dict[str, Mapping[str, FloatColumn]]:
    """What every request takes by itself, of the tenants whose SLOs are slowdowns: a run of each for them."""
    names = asking(scenario)
    if not names:
        return {}
    twin, tables = undisturbed(scenario), {name: one_at_a_time(each.workload) for name, each in tenants.items()}

    def play(name: str) -> Records:
        return run(twin, only=name, tables=tables).records

    return {name: remembered(twin, tables[name], tenants[name].first_request, partial(play, name)) for name in names}


def _lending(scenario: Scenario, fleet: Fleet, records: Records) -> Lending | None:
    lending = {name: pool.lending.threshold_tokens for name, pool in scenario.pools.items() if pool.lending}
    thresholds = {i: lending[info.pool] for i, info in enumerate(fleet.infos) if info.pool in lending}
    return Lending(thresholds, records) if thresholds else None


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


def _play(
    scenario: Scenario,
    kernel: Kernel,
    coordinator: Coordinator,
    tenants: Sequence[Tenant],
    ledger: Ledger | None,
    progress: Progress | None,
) -> list[str]:
    """Let the requests of `tenants` come; what to say of where the clock cut the run, if it did."""
    total = sum(len(tenant.workload) for tenant in tenants)
    until = FOREVER if scenario.max_time_s is None else seconds_to_ns(scenario.max_time_s)
    if progress is not None:
        coordinator.on_progress = lambda num_left: progress(num_left, total)
    coordinator.start(tenants)
    kernel.run(until)
    # a step in flight reaches past the clock's end; without any, clients wait for what never comes
    is_idle = all(client.idle for client in coordinator.clients)
    # a transfer may wait for ever too, where a link is cut for good
    awaited = coordinator.delays.waiting or coordinator.parked or coordinator.network.in_flight
    is_stuck = until == FOREVER and is_idle and not awaited
    if coordinator.in_system and is_stuck:
        stuck = sorted(coordinator.in_system)[:5]
        raise InvariantError(
            f"nothing happens any more after {kernel.now} ns, and {len(coordinator.in_system)} requests are in the "
            f"system, the first of them {stuck} (seed {scenario.seed}): a batching policy waits for ever; "
            "--check says which"
        )
    told = _cut_note(scenario, coordinator, total)
    end = kernel.now if not told or (until == FOREVER and not kernel.num_pending) else until
    if coordinator.in_system or coordinator.num_cancelled or coordinator.network.in_flight:
        coordinator.cut(end)
    if ledger is not None:
        ledger.close(end)
    return told


def _cut_note(scenario: Scenario, coordinator: Coordinator, total: int) -> list[str]:
    """Where the clock cut the run: how many requests were in the system, and how many hadn't arrived."""
    inside = len(coordinator.in_system)
    missing = total - coordinator.num_arrived
    if not inside and not missing:
        return []
    if scenario.max_time_s is None and coordinator.network.in_flight:
        where = "The run ended with transfers over links that are cut for good"
    elif scenario.max_time_s is None and coordinator.parked:
        where = "The run ended with requests for which no client came up any more"
    elif scenario.max_time_s is not None:
        where = f"max_time_s cut the run at {scenario.max_time_s:,.10g} s"
    else:
        where = f"The clock ends after 2**62 ns ({FOREVER / NS_PER_S / 31_557_600:.0f} years), which cut the run"
    return [f"{where}: of {counted(total, 'request')}, {inside:,} had not finished and {missing:,} had not arrived."]


def _window_ns(scenario: Scenario, tables: Sequence[RequestTable]) -> tuple[int | None, int | None]:
    """The measured window on the run's clock; it is written from the first arrival on."""
    first = min(int(table.arrival_ns[0]) for table in tables)
    last = max(int(table.arrival_ns[-1]) for table in tables)
    start_s, end_s = scenario.window_s or (scenario.warmup_s, None)
    if not start_s and end_s is None:
        return None, None
    start = first + seconds_to_ns(start_s)
    if start > last and all(table.concurrency is None and table.after is None for table in tables):
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
