"""What a valid scenario comes to, in lines: who serves what on which devices, how much fits, and what is assumed.

Between a scenario and whoever wants to look before running it: `mist check` and the local page. It simulates nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

from mist.scenario.clients import Pool
from mist.scenario.disturbances import check_links
from mist.scenario.remarks import remarks
from mist.scenario.tables import traces
from mist.scenario.value import Scenario


def account(scenario: Scenario, *, reads_traces: bool = True) -> Iterator[str]:
    """The lines of `mist check`; ScenarioError where an event changes a link that there isn't, or of a trace."""
    check_links(scenario)
    read = traces(scenario) if reads_traces else []
    yield f"{scenario.name}: fine"
    for line in read:
        yield f"  {line}"
    for name, tenant in scenario.tenants.items():
        stages = " -> ".join(tenant.stages)
        where = f", on {', '.join(tenant.clients)}" if tenant.clients else ""
        told = f"tenant {name}, priority {tenant.priority}: {stages}{where}" if name else f"pipeline {stages}"
        yield f"  {told}, seed {scenario.seed}" if not name else f"  {told}"
    for name, host in scenario.hosts.items():
        yield f"  {name}: {host}"
    for name, store in scenario.stores.items():
        yield f"  {name}: {store}"
    for name, memory in scenario.memories.items():
        yield f"  memory {name}: {memory.describe(name)}"
    for name, pool in scenario.pools.items():
        yield from _pool(name, pool)
    if scenario.placement is not None:
        for index, line in enumerate(scenario.placement.lines()):
            yield f"  {'' if index else 'network: '}{line}"
    for remark in remarks(scenario):
        yield f"  {remark}"


def _pool(name: str, pool: Pool) -> Iterator[str]:
    devices = f"{pool.count} x {pool.platform.num_devices} {pool.device.name}"
    yield f"  {name}: {devices}, {pool.model.name} in {pool.weights_dtype}, {pool.engine.name}"
    batching = ", ".join(f"{key} {value}" for key, value in pool.batching.params.items())
    yield f"    batching {pool.batching.name}: {batching}"
    if pool.model.is_encoder:
        yield "    no KV cache: an encoder keeps nothing"
        return
    blocks = pool.kv_cache.num_blocks
    given = f"{blocks:,} blocks of {pool.kv_cache.block_size} as given" if blocks else pool.kv_capacity()
    yield f"    KV in {pool.kv_dtype}: {given}"
    if pool.kv_cache.tiers:
        by_layer = ", layer by layer" if pool.kv_cache.layerwise else ""
        yield f"    tiers {', '.join(pool.kv_cache.tiers)}; fetch: {pool.kv_cache.fetch}{by_layer}"
