"""The clients of a run, built from a scenario's pools: their performance models, memories, links and lanes.

Between the validated scenario and the loop that plays it. It decides nothing that the scenario doesn't say, and runs
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from math import inf

from mist.batching import BatchingPolicy
from mist.batching.continuous import Continuous
from mist.client import Client
from mist.errors import ScenarioError
from mist.fabric import Fabric, PlainLinks
from mist.hardware import Device
from mist.host import Host
from mist.kernel import Kernel
from mist.lanes import share_stages
from mist.memory.kv_cache import KVCache
from mist.metrics import ClientInfo
from mist.network import Network
from mist.offload import Memory
from mist.perf import Demand, Deployment, HostModel, PerfModel
from mist.perf.drafted import Drafted
from mist.perf.lookup import Lookup
from mist.records import Records
from mist.request import Step
from mist.residents import Residents
from mist.scenario.clients import Pool
from mist.scenario.hosts import ANY_TOKENS, DEFAULT_BATCH, NO_ENGINE, HostPool
from mist.scenario.network import numbered
from mist.scenario.pricing import host_beside, price
from mist.scenario.seeds import random_of
from mist.scenario.stores import StorePool
from mist.scenario.value import Scenario
from mist.sharing import Channel, Sharing
from mist.speculation import Speculation
from mist.swap import SwappingResidents, give_swap_space
from mist.topology import Link, Place
from mist.units import NS_PER_S

#: blocks of a client that keeps no KV cache: more than any run takes
_UNLIMITED = 2**60


@dataclass(slots=True)
class Fleet:
    """The clients of a run, with what summaries need to know of each, its performance model, and remarks on these.

    `priced_by`: the name of the performance model of each pool; `memories`: what is outside the devices, by the
    scenario's names.
    """

    clients: list[Client] = field(default_factory=list)
    infos: list[ClientInfo] = field(default_factory=list)
    models: list[PerfModel | HostModel] = field(default_factory=list)
    priced_by: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    memories: list[tuple[str, Memory]] = field(default_factory=list)


def build_fleet(scenario: Scenario, hash_block_size: int, kernel: Kernel, records: Records) -> Fleet:
    """A client for every attention group of every lane of every replica of every pool.

    `hash_block_size`: tokens per prefix key of the workloads, 0 where they have none.
    """
    fleet = Fleet()
    for name, pool in scenario.clients.items():
        if isinstance(pool, StorePool):
            _add_stores(fleet, name, pool, kernel, records)
        elif isinstance(pool, HostPool):
            _add_hosts(fleet, name, pool, kernel, records)
        else:
            _add_replicas(fleet, scenario, name, pool, hash_block_size, kernel, records)
    return fleet


def _add_replicas(
    fleet: Fleet, scenario: Scenario, pool_name: str, pool: Pool, hash_block_size: int, kernel: Kernel, records: Records
) -> None:
    perf, fleet.priced_by[pool_name], refusals = perf_model(scenario, pool_name, pool)
    fleet.remarks += refusals
    token_bytes = pool.model.kv_bytes_per_token(pool.kv_dtype)
    num_blocks = (pool.kv_cache.num_blocks or pool.kv_capacity().num_blocks) // pool.pp
    for name in _client_names(pool_name, pool):
        client = Client(
            len(fleet.clients),
            name,
            serves=tuple(pool.serves),
            batching=pool.batching.build(),
            perf=perf,
            kv=_kv_cache(scenario, pool_name, pool, num_blocks, hash_block_size),
            engine=host_beside(pool.engine, perf, pool.model.num_layers),
            max_model_len=pool.max_model_len,
            kernel=kernel,
            records=records,
            speculation=_speculation(scenario, pool),
            kv_bytes_per_token=token_bytes,
            merges_shared_reads=pool.kv_cache.merge_shared_reads,
            residents=SwappingResidents if pool.swap_blocks() else Residents,
        )
        limit_seqs = client.batching.max_num_seqs
        shown_blocks = 0 if pool.model.is_encoder else num_blocks
        info = ClientInfo(name, pool_name, shown_blocks, pool.kv_cache.block_size, limit_seqs)
        if pool.device.num_cores:
            client.demand_of = _HostWork(perf, pool.device, pool.model.weight_bytes(pool.weights_dtype), token_bytes)
        _add(fleet, client, info, records)
    if pool.lanes > 1:
        first = len(fleet.clients) - pool.count * pool.lanes
        for start in range(first, len(fleet.clients), pool.lanes):
            share_stages(fleet.clients[start : start + pool.lanes], pool.pp, kernel)


def _add_hosts(fleet: Fleet, pool_name: str, pool: HostPool, kernel: Kernel, records: Records) -> None:
    perf, fleet.priced_by[pool_name] = pool.prepared(), pool.perf.name
    for name in _client_names(pool_name, pool):
        batching = pool.batching.build()
        _add_without_engine(fleet, pool_name, name, pool.serves, batching, perf, kernel, records)


def _add_stores(fleet: Fleet, pool_name: str, pool: StorePool, kernel: Kernel, records: Records) -> None:
    fleet.priced_by[pool_name] = "lookup"
    for name in numbered(pool_name, pool.count):
        batching = Continuous(max_num_seqs=DEFAULT_BATCH, max_num_batched_tokens=ANY_TOKENS)
        _add_without_engine(fleet, pool_name, name, pool.serves, batching, Lookup(pool.lookup_ns), kernel, records)


def _add_without_engine(
    fleet: Fleet,
    pool_name: str,
    name: str,
    serves: Sequence[str],
    batching: BatchingPolicy,
    perf: HostModel,
    kernel: Kernel,
    records: Records,
) -> None:
    client = Client(
        len(fleet.clients),
        name,
        serves=tuple(serves),
        batching=batching,
        perf=perf,
        kv=KVCache(_UNLIMITED, 1),
        engine=NO_ENGINE,
        max_model_len=_UNLIMITED,
        kernel=kernel,
        records=records,
    )
    _add(fleet, client, ClientInfo(client.name, pool_name, 0, 0, client.batching.max_num_seqs), records)


def _add(fleet: Fleet, client: Client, info: ClientInfo, records: Records) -> None:
    records.client_names.append(client.name)
    fleet.clients.append(client)
    fleet.models.append(client.perf)
    fleet.infos.append(info)


def _client_names(pool_name: str, pool: Pool | HostPool) -> list[str]:
    """gpu; gpu-0, gpu-1 for replicas; gpu-0.0, gpu-0.1 for the lanes, or workers, of each."""
    replicas = [f"{pool_name}-{i}" for i in range(pool.count)] if pool.count > 1 else [pool_name]
    return [f"{name}.{lane}" for name in replicas for lane in range(pool.lanes)] if pool.lanes > 1 else replicas


def _kv_cache(scenario: Scenario, name: str, pool: Pool, num_blocks: int, hash_block_size: int) -> KVCache:
    settings = pool.kv_cache
    if hash_block_size % settings.block_size:
        message = (
            f"the trace hashes {hash_block_size} tokens at a time, not a multiple of block_size {settings.block_size}"
        )
        raise ScenarioError(scenario.problem(("clients", name, "kv_cache", "block_size"), message, "such as 16"))
    return KVCache(
        num_blocks,
        settings.block_size,
        enable_prefix_caching=settings.enable_prefix_caching,
        hash_block_size=hash_block_size,
        watermark_blocks=int(settings.watermark * num_blocks),
    )


@dataclass(frozen=True, slots=True)
class _HostWork:
    """What the steps of a model on a CPU ask of it: all cores, and the weights and KV caches that they read, once.

    Experts that nobody goes to aren't read: never more than DRAM carries in that time.
    """

    perf: PerfModel
    device: Device
    weight_bytes: int
    kv_bytes_per_token: int

    def __call__(self, step: Step) -> Demand:
        took = self.perf.step_time(step)
        num_bytes = self.weight_bytes + step.decode_context * self.kv_bytes_per_token
        carried = took * self.device.memory_bytes_per_s / NS_PER_S
        return Demand(took * self.device.num_cores, int(min(num_bytes, carried)))


def network_of(scenario: Scenario, fleet: Fleet, kernel: Kernel, records: Records) -> Network:
    """What the clients send over; those on one host share its cores and memory from now on."""
    sharing, fabric = Sharing(kernel), fabric_of(scenario)
    if fabric is None:
        _share_cores(scenario, fleet, sharing)
        return Network(_plain_links(scenario, fleet), sharing, records)
    for client, place in zip(fleet.clients, fabric.places, strict=True):
        if place.on_host:
            client.shares = Host(fabric.cores(client.index), fabric.dram(client.index), sharing)
    return Network(fabric, sharing, records)


def fabric_of(scenario: Scenario) -> Fabric | None:
    """The channels between its clients, by their numbers, where they are placed on nodes."""
    if scenario.placement is None:
        return None
    places: list[Place] = []
    for name, pool in scenario.clients.items():
        lanes = 1 if isinstance(pool, StorePool) else pool.lanes
        places += [place for place in scenario.placement.places[name] for _ in range(lanes)]
    return Fabric(scenario.placement.topology, places)


def give_swap_spaces(scenario: Scenario, fleet: Fleet, network: Network) -> None:
    """Host memory for preempted decodes, to the clients of the pools that swap."""
    for client, info in zip(fleet.clients, fleet.infos, strict=True):
        pool = scenario.clients[info.pool]
        if isinstance(pool, Pool) and (num_blocks := pool.swap_blocks()):
            give_swap_space(client, network, num_blocks)


def _share_cores(scenario: Scenario, fleet: Fleet, sharing: Sharing) -> None:
    """Let the workers of a client without a node share its cores and its memory channels."""
    for name, pool in scenario.hosts.items():
        workers = [client for client, info in zip(fleet.clients, fleet.infos, strict=True) if info.pool == name]
        for first in range(0, len(workers), pool.workers):
            if pool.workers > 1:
                host = Host(
                    Channel(f"{workers[first].name}: cores", pool.cores * NS_PER_S),
                    Channel(f"{workers[first].name}: DRAM", pool.device.memory_bytes_per_s),
                    sharing,
                )
                for client in workers[first : first + pool.workers]:
                    client.shares = host


def _plain_links(scenario: Scenario, fleet: Fleet) -> PlainLinks:
    """A link for the KV caches that each client sends, by `network.kv_transfer`, and one to its host's memory."""
    given = scenario.network.kv_transfer
    link = Link(inf) if given is None else Link(given.bytes_per_s, given.latency_ns)
    host_links = []
    for info in fleet.infos:
        pool = scenario.clients[info.pool]
        host_links.append(_host_link(pool) if isinstance(pool, Pool) else Link(inf))
    return PlainLinks([link] * len(fleet.infos), host_links)


def _host_link(pool: Pool) -> Link:
    """The links of all devices together: each fetches its share, and shares with copies add up to more."""
    device, share = pool.device, pool.model.kv_bytes_per_token_per_device(pool.kv_dtype, pool.tp, pool.pp)
    whole = pool.model.kv_bytes_per_token(pool.kv_dtype)
    return Link(device.host_link_bytes_per_s * (whole / share if share else 1), device.host_link_latency_ns)


def perf_model(scenario: Scenario, name: str, pool: Pool) -> tuple[PerfModel, str, list[str]]:
    """The first of the pool's performance models that supports it, prepared, its name, and a remark on those before."""

    def priced(deployment: Deployment, what: str) -> tuple[PerfModel, str, list[str]]:
        found = price(pool.perf, deployment)
        if found.model is None:
            message = "; ".join(found.refusals)
            raise ScenarioError(scenario.problem(("clients", name, "perf"), message, "such as perf: roofline"))
        refusals = [f"{name}: {what} times by {found.name}, {refusal}." for refusal in found.refusals]
        return found.model, found.name, refusals

    target, perf, refusals = priced(pool.deployment(), "step")
    settings = pool.speculation
    if settings is None:
        return target, perf, refusals
    if settings.draft_cost is not None or pool.draft is None:
        return Drafted(target, settings.num_draft_tokens, draft_cost=settings.draft_cost or 0.0), perf, refusals
    draft, _, more = priced(pool.draft, "draft")
    return Drafted(target, settings.num_draft_tokens, draft), perf, [*refusals, *more]


def _speculation(scenario: Scenario, pool: Pool) -> Speculation | None:
    settings = pool.speculation
    if settings is None:
        return None
    return Speculation(
        settings.num_draft_tokens, settings.accepted_share, partial(random_of, scenario.seed, "speculation")
    )
