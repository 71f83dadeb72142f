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
from mist.cost import BusyTime
from mist.errors import InvariantError, Problem, ScenarioError
from mist.kernel import FOREVER, Kernel
from mist.ledger import Ledger
from mist.lending import Lending
from mist.metrics import Tally, TenantInfo, summary_of
from mist.metrics.distribution import FloatColumn
from mist.metrics.lending import summarise_lending
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
from mist.scenario.usage import bill, holdings_of
from mist.scenario.value import Scenario
from mist.tenant import Tenant
from mist.units import NS_PER_S, seconds_to_ns
from mist.views import Views
from mist.workload import IntArray, RequestTable

#: called with the requests that have left and the requests of the workload
Progress = Callable[[int, int], None]

#: what a run may keep of what it writes down
RECORDS = ("full", "summary")


def run(
    scenario: Scenario,
    *,
    check: bool = False,
    progress: Progress | None = None,
    only: str | None = None,
    tables: Mapping[str, RequestTable] | None = None,
    records: str = "full",
) -> Result:
    """Simulate `scenario` to its end; `check` recounts every conservation law on the way.

    `only`: the name of a tenant that has the clients for itself; its requests are those that it has among the others.
    `records`: "full", or "summary" to forget rows of tasks and steps once they are counted, for long runs.
    `tables`: the requests of each tenant, in place of those that the scenario reads or draws.
    Raises ScenarioError where the workload or the memory makes it impossible, InvariantError if MIST itself is wrong.
    """
    began = time.perf_counter()
    _check_kept(records, check)
    tables = build_tables(scenario) if tables is None else dict(tables)
    kernel, written = Kernel(), Records(stage_kinds=list(scenario.stages), are_whole=records == "full")
    hash_block_size = max(table.hash_block_size for table in tables.values())
    fleet = build_fleet(scenario, hash_block_size, kernel, written)
    network = network_of(scenario, fleet, kernel, written)
    give_swap_spaces(scenario, fleet, network)
    add_memories(scenario, fleet, hash_block_size, network, written)
    tenants = build_tenants(scenario, tables, fleet, written)
    playing = tenants if only is None else {only: tenants[only]}
    infos = tenant_infos(scenario, playing, _alone(scenario, tenants))
    window = _window_ns(scenario, list(tables.values()))
    tables = {name: tables[name] for name in playing}
    coordinator = Coordinator(
        kernel=kernel, records=written, clients=fleet.clients, network=network, tenants=list(tenants.values()),
        views=Views(seconds_to_ns(scenario.view_refresh_s)), terms=terms_of(scenario, fleet.clients, fleet.infos),
        lending=_lending(scenario, fleet, written),
    )  # fmt: skip
    add_disturbances(scenario, fleet, coordinator, sum(len(tenant.workload) for tenant in playing.values()))
    everybody = infos.get(SOLE) or TenantInfo(open_loop=all(info.open_loop for info in infos.values()))
    loads = [tables[name].arrival_ns for name, info in infos.items() if info.open_loop]
    tally = Tally(
        written,
        clients=fleet.infos,
        first_ns=min(int(table.arrival_ns[0]) for table in tables.values()),
        last_arrival_ns=max((int(each[-1]) for each in loads), default=None),
        window=window,
        whole=everybody,
        tenants=[info for info in infos.values() if info.name != SOLE],
    )
    busy = BusyTime(written, fleet.infos, holdings_of(scenario), tally.so_far)
    tally.watchers.append(busy.add)
    ledger = Ledger(kernel, coordinator, fleet.clients, written) if check else None
    started = time.perf_counter()
    coordinator.on_progress = _counting(
        tally, coordinator, loads, progress, sum(len(tenant.workload) for tenant in playing.values())
    )
    cut = _play(scenario, kernel, coordinator, list(playing.values()), ledger)
    tally.finish()
    whole = tally.window
    metrics = summary_of(tally, memories=memory_infos(fleet), provenance=_provenance(tally, fleet.models))
    lending = coordinator.lending or Lending({}, written)
    metrics["lending"] = summarise_lending(written, len(lending.thresholds), lending.num_taken, whole)
    metrics |= shared(coordinator.network, whole.first_ns, whole.last_ns)
    metrics["notes"] += [
        *cut,
        *happened(scenario, tally),
        *_rejections(written),
        *table_notes(tables),
        *_verified(scenario, fleet, tally),
    ]
    metrics["notes"] += [
        *nothing_to_find(scenario, tables),
        *fleet.remarks,
        *remarks(scenario, fleet.priced_by, saturated=metrics["saturated"]),
    ]
    metrics |= bill(scenario, busy, metrics, whole)
    metrics["expected_error"] = {
        name: expected_error(scenario, name, fleet.priced_by[name], saturated=metrics["saturated"])
        for name in scenario.pools
    }
    ended = time.perf_counter()
    return Result(
        name=scenario.name,
        scenario=scenario.resolved(),
        records=written,
        metrics=metrics,
        simulator={
            "version": __version__,
            "events": kernel.num_events + tally.num_steps,
            "steps": tally.num_steps,
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


def _check_kept(records: str, check: bool) -> None:
    """ScenarioError unless `records` is one of `RECORDS`, and all of them are there to check the laws of."""
    if records not in RECORDS:
        raise ScenarioError(Problem(f"there are no records {records!r}", hint=f"known: {', '.join(RECORDS)}"))
    if check and records != "full":
        raise ScenarioError(Problem("a summary keeps no tables to check the laws of", hint="check with full records"))


def _lending(scenario: Scenario, fleet: Fleet, records: Records) -> Lending | None:
    lending = {name: pool.lending.threshold_tokens for name, pool in scenario.pools.items() if pool.lending}
    thresholds = {i: lending[info.pool] for i, info in enumerate(fleet.infos) if info.pool in lending}
    return Lending(thresholds, records) if thresholds else None


def _verified(scenario: Scenario, fleet: Fleet, tally: Tally) -> list[str]:
    """How many tokens came out of the steps of each pool that speculates."""
    notes = []
    for name, settings in ((name, pool.speculation) for name, pool in scenario.pools.items() if pool.speculation):
        assert settings is not None
        here = [i for i, info in enumerate(fleet.infos) if info.pool == name]
        steps = int(tally.decoded_steps[here].sum())
        if steps:
            mean = int(tally.decoded_tokens[here].sum()) / steps
            k, share = settings.num_draft_tokens, settings.accepted_share
            notes.append(
                f"{name}: {mean:.3g} tokens per sequence and decode step, of {k} drafted {share:.3g} accepted."
            )
    return notes


def _counting(
    tally: Tally, coordinator: Coordinator, loads: Sequence[IntArray], progress: Progress | None, total: int
) -> Callable[[int], None]:
    """What to do as requests leave: count them, block by block, and tell `progress`.

    `loads`: the arrivals, in order, of what saturation is judged by.
    """

    def left(num_left: int) -> None:
        if tally.is_due:
            now = coordinator.kernel.now
            # who is cancelled is there until the step in flight is over
            settled = min([now, *(client.now for client in coordinator.clients if not client.idle)])
            if any(now <= arrivals[-1] for arrivals in loads):
                # the run may be cut before another one arrives, and then this is the end of the load
                last = max((int(each[np.searchsorted(each, now) - 1]) for each in loads if each[0] < now), default=0)
                settled = min(settled, last + 1)
            tally.add(settled, min([now, *(each.arrival_ns for each in coordinator.in_system.values())]))
        if progress is not None:
            progress(num_left, total)

    return left


def _play(
    scenario: Scenario,
    kernel: Kernel,
    coordinator: Coordinator,
    tenants: Sequence[Tenant],
    ledger: Ledger | None,
) -> list[str]:
    """Let the requests of `tenants` come; what to say of where the clock cut the run, if it did."""
    total = sum(len(tenant.workload) for tenant in tenants)
    until = FOREVER if scenario.max_time_s is None else seconds_to_ns(scenario.max_time_s)
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


def _provenance(tally: Tally, models: Sequence[PerfModel | HostModel]) -> dict[str, float]:
    """Share of all clients' busy time by where the figure for it comes from."""
    total = float(tally.busy_ns.sum())
    times = dict.fromkeys(ORIGINS, 0.0)
    for model, time_ns in zip(models, tally.busy_ns.tolist(), strict=True):
        for origin, share in model.provenance().items():
            times[origin] += share * time_ns
    # sums of shares are off by some 1e-16, which would print as digits
    return {origin: round(time_ns / total, 12) if total else 0.0 for origin, time_ns in times.items()}
