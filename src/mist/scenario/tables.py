"""The requests of every tenant as tables: read from its trace, or drawn from the scenario's seed tree.

Between the scenario and the run. Requests of different tenants never have a prefix in common, and all tables have their
keys for equally many tokens. Nothing is drawn here that depends on another tenant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import lcm
from pathlib import Path

import numpy as np

from mist.errors import ScenarioError
from mist.request import PREFILL
from mist.scenario.named import Spec
from mist.scenario.seeds import random_of, seed_of
from mist.scenario.tenancy import Tenancy
from mist.scenario.value import Scenario
from mist.units import NS_PER_S
from mist.workload import RequestTable
from mist.workload.sessions import begin_sessions, draw_sessions
from mist.workload.synthetic import draw_table
from mist.workload.trace import limit, rate_scale, read_trace

#: traces that a process keeps, the one used last at the end
_MAX_TRACES = 3
_traces: dict[tuple[object, ...], RequestTable] = {}


def build_tables(scenario: Scenario) -> dict[str, RequestTable]:
    """The requests of each tenant; ScenarioError where a workload makes it impossible."""
    tables = {name: _table(scenario, tenant) for name, tenant in scenario.tenants.items()}
    for tenant, table in zip(scenario.tenants.values(), tables.values(), strict=True):
        _check_sizes(scenario, tenant, table)
    return _apart(tables) if len(tables) > 1 else tables


def traces(scenario: Scenario) -> list[str]:
    """What was read from each tenant's trace, a line each; ScenarioError of all that can't be read."""
    read = {t.workload.trace: _table(scenario, t) for t in scenario.tenants.values() if t.workload.trace is not None}
    return [f"{trace}: {_told(table)}" for trace, table in read.items()]


def _told(table: RequestTable) -> str:
    span_s = int(table.arrival_ns.max() - table.arrival_ns.min()) / NS_PER_S
    tokens = f"{table.input_tokens.mean():,.0f} tokens in and {table.output_tokens.mean():,.0f} out in the mean"
    return f"{len(table):,} requests over {span_s:,.6g} s, {tokens}"


def _table(scenario: Scenario, tenant: Tenancy) -> RequestTable:
    """A tenant's requests: its trace, or arrivals and lengths drawn from the seed tree."""
    workload, seed, pipeline = tenant.workload, scenario.seed, tenant.pipeline.build()
    try:
        table = _read(scenario, tenant) if workload.trace is not None else _draw(scenario, tenant)
    except ValueError as error:
        raise ScenarioError(scenario.problem((*tenant.place, "workload", "arrivals"), str(error))) from None
    table.hash_block_size = table.hash_block_size or getattr(pipeline, "hash_block_size", 0)
    for name, spec in workload.size_distributions.items():
        table.sizes[name] = spec.build().sample(len(table), random_of(seed, tenant.purpose(f"sizes.{name}")))
    if workload.cached_tokens is not None:
        rng = random_of(seed, tenant.purpose("cached"))
        table.cached_tokens = workload.cached_tokens.build().sample(len(table), rng)
    if table.cached_tokens is not None:
        table.cached_tokens = np.minimum(table.cached_tokens, table.input_tokens - 1)
        table.notes += tuple(
            f"{name}: prefix caching is off, so the workload's cached_tokens are computed here."
            for name in _finding_nothing(scenario, tenant)
        )
    return rate_scale(table, workload.rate_scale) if workload.rate_scale != 1 else table


def _finding_nothing(scenario: Scenario, tenant: Tenancy) -> list[str]:
    """Pools that compute a tenant's prompts and have nowhere to find any of them."""
    elsewhere = {name for store in scenario.stores for name in scenario.users_of(store)}
    here = scenario.clients_of(tenant.name, PREFILL)
    return [
        name
        for name, pool in scenario.pools.items()
        if name in here and not (pool.kv_cache.enable_prefix_caching or pool.kv_cache.tiers) and name not in elsewhere
    ]


def _check_sizes(scenario: Scenario, tenant: Tenancy, table: RequestTable) -> None:
    """ScenarioError where the pipeline asks for sizes that the workload doesn't tell."""
    needed: Sequence[str] = getattr(tenant.pipeline.build(), "needs_sizes", ())
    for name in needed:
        if name not in table.sizes:
            told = f"known: {', '.join(table.sizes)}" if table.sizes else "give it under workload.sizes"
            message = f"the workload tells no size {name!r}"
            place = (*tenant.place, "pipeline", tenant.pipeline.name)
            raise ScenarioError(scenario.problem(place, message, told))


def _draw(scenario: Scenario, tenant: Tenancy) -> RequestTable:
    workload, process = tenant.workload, tenant.workload.arrival_process
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
            rng_of=lambda purpose: random_of(scenario.seed, tenant.purpose(f"sessions.{purpose}")),
        )
        return limit(table, workload.limit) if workload.limit is not None else table
    assert workload.num_requests is not None
    seed = seed_of(scenario.seed, tenant.purpose("workload"))
    table = draw_table(workload.num_requests, process.build(), inputs, outputs, seed)
    return limit(table, workload.limit) if workload.limit is not None else table


def _read(scenario: Scenario, tenant: Tenancy) -> RequestTable:
    workload, process = tenant.workload, tenant.workload.arrival_process
    table = _trace(scenario.trace_path(tenant.name), workload.trace_format)
    if workload.limit is not None:
        table = limit(table, workload.limit)
    if process is not None:
        arrivals, rng = process.build(), random_of(scenario.seed, tenant.purpose("arrivals"))
        if table.sessions is not None:
            return begin_sessions(table, arrivals, rng)
        table.arrival_ns = arrivals.arrival_ns(len(table), rng)
        table.concurrency = getattr(arrivals, "concurrency", None)
    return table


def _trace(path: Path, trace_format: Spec | None) -> RequestTable:
    """A trace, which all runs of this process have in common; what is set in the table is of this run alone."""
    stat = path.stat()
    key = (path.resolve(), stat.st_size, stat.st_mtime_ns, repr(trace_format))
    if (table := _traces.pop(key, None)) is None:
        table = read_trace(path, trace_format.build() if trace_format else None)
    _traces[key] = table
    if len(_traces) > _MAX_TRACES:
        del _traces[next(iter(_traces))]
    return replace(table, sizes=dict(table.sizes))


def _apart(tables: dict[str, RequestTable]) -> dict[str, RequestTable]:
    """The same requests with keys that differ between tenants, all for the least common number of tokens.

    A key stands for all that is in front of it, so that of several units the last one's stands for them together.
    """
    sizes = {name: table.hash_block_size for name, table in tables.items() if table.hash_block_size}
    common = lcm(*sizes.values())
    first, found = 0, {}
    for name, table in tables.items():
        keys = table.block_keys
        if keys is not None:
            every = common // table.hash_block_size
            shift = first - min((min(each) for each in keys if each), default=0)
            first = max((max(each) for each in keys if each), default=0) + shift + 1
            keys = [tuple(key + shift for key in each[every - 1 :: every]) for each in keys]
            if every > 1:
                note = f"Prefixes are told apart by {common} tokens, as other tenants' are, not by {sizes[name]}."
                table.notes += (note,)
        found[name] = replace(table, block_keys=keys, hash_block_size=common if name in sizes else 0)
    return found
