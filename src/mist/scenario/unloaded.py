"""The unloaded run: a tenant's requests one at a time on the same clients, which slowdowns are relative to.

Beside `build`, which plays it where an SLO asks for slowdowns. The deployment is the scenario's, without what happens
to it and without users who give up; nothing of the requests changes but when they come.
"""

from __future__ import annotations

import copy
import hashlib
import json
import pickle
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from mist.metrics.distribution import FloatColumn
from mist.metrics.latency import e2e_ns, tpot_ns, ttft_ns
from mist.metrics.slo import SLOWDOWNS
from mist.perf.measured import find_tables
from mist.records import Records
from mist.scenario.clients import Pool
from mist.scenario.schema import Slo
from mist.scenario.value import Scenario
from mist.workload import RequestTable

#: of requests in ns, by metric
Times = Mapping[str, FloatColumn]

#: references that a process keeps, the one used last at the end
_MAX_REMEMBERED = 8
_remembered: dict[bytes, Times] = {}


def asking(scenario: Scenario) -> list[str]:
    """The tenants with targets of slowdown."""
    return [name for name, tenant in scenario.tenants.items() if any(getattr(tenant.slo, key) for key in SLOWDOWNS)]


def undisturbed(scenario: Scenario) -> Scenario:
    """The same clients, all replicas of them all the time, for requests that are all admitted and waited for."""
    twin = copy.copy(scenario)
    tenants = {
        name: replace(
            tenant,
            slo=Slo(),
            admission=(),
            workload=tenant.workload.model_copy(update={"timeout_s": None, "cancellation": None}),
        )
        for name, tenant in scenario.tenants.items()
    }
    clients = {
        name: each.model_copy(update={"scaling": None}) if isinstance(each, Pool) else each
        for name, each in scenario.clients.items()
    }
    changed = {"tenants": tenants, "clients": clients, "events": ()}
    for key, value in (changed | {"warmup_s": 0.0, "window_s": None, "max_time_s": None}).items():
        object.__setattr__(twin, key, value)
    return twin


def one_at_a_time(table: RequestTable) -> RequestTable:
    """The same requests in their order, each when the one before it has ended."""
    return replace(table, arrival_ns=np.zeros_like(table.arrival_ns), concurrency=1, after=None, think_ns=None)


def remembered(twin: Scenario, table: RequestTable, first_request: int, play: Callable[[], Records]) -> Times:
    """`times_alone` of what `play` gives, from memory where this process has played the same requests alone before.

    Runs of one scenario at several rates have the same reference, and it takes longer than they do.
    """
    resolved = {key: value for key, value in twin.resolved().items() if key not in ("name", "workload")}
    for tenant in resolved.get("tenants", {}).values():
        del tenant["workload"]
    lengths = (table.input_tokens, table.output_tokens, table.cached_tokens, table.sizes, table.sessions)
    asked = (lengths, table.block_keys, table.hash_block_size, first_request, str(find_tables()))
    key = hashlib.sha256(pickle.dumps(asked) + json.dumps(resolved, default=str).encode()).digest()
    if (known := _remembered.pop(key, None)) is None:
        known = times_alone(play(), first_request, len(table))
    _remembered[key] = known
    if len(_remembered) > _MAX_REMEMBERED:
        del _remembered[next(iter(_remembered))]
    return known


def times_alone(records: Records, first_request: int, num_requests: int) -> Times:
    """TTFT, TPOT and E2E of so many requests in ns, by number from `first_request` on; -1 for those without."""
    requests = records.requests.as_columns()
    found = {}
    for metric, times in (("ttft_s", ttft_ns(requests)), ("tpot_s", tpot_ns(requests)), ("e2e_s", e2e_ns(requests))):
        found[metric] = np.full(num_requests, -1.0)
        found[metric][requests["request"] - first_request] = times
    return found
