"""A cluster from parts for tests: `play` runs a workload on clients with made-up step times, under the ledger.

It stands where the scenario loader stands in a real run, and makes random small scenarios. It asserts nothing itself.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any

import numpy as np

from mist.admission import AdmissionPolicy
from mist.batching import BatchingPolicy
from mist.batching.chunked import Chunked
from mist.client import Client
from mist.coordinator import Coordinator
from mist.engine import EngineProfile
from mist.fabric import PlainLinks
from mist.hand_over import Terms
from mist.kernel import FOREVER, Kernel
from mist.ledger import Ledger
from mist.lending import Lending
from mist.memory.hierarchy import Hierarchy
from mist.memory.kv_cache import KVCache
from mist.memory.tier import MemoryTier, Tier
from mist.network import HOST, Network, Paths
from mist.offload import Memory, Offload
from mist.perf import Deployment, OperatorTime, PerfModel
from mist.pipeline import PipelineFactory
from mist.pipeline.stages import StageList
from mist.records import Records
from mist.request import PREFILL, Step
from mist.residents import Residents
from mist.routing import RoutingPolicy
from mist.routing.round_robin import RoundRobin
from mist.sharing import Sharing, duration_ns
from mist.speculation import Speculation
from mist.streams import Streaming
from mist.swap import SwappingResidents, give_swap_space
from mist.tenant import Patience, Route, Tenant
from mist.topology import Link
from mist.views import Views
from mist.workload import IntArray, RequestTable


@dataclass
class LinearSteps:
    """A made-up performance model: base + a·prefill tokens + b·decodes + c·decode context + d·prefills, in ns."""

    base: int = 1000
    per_prefill_token: int = 10
    per_decode: int = 3
    per_context: int = 1
    per_prefill: int = 7

    def step_time(self, step: Step) -> int:
        return self.of(step.num_prefill_tokens, step.num_decodes, step.decode_context, len(step.chunks))

    def of(self, prefill_tokens: int, decodes: int, context: int, prefills: int) -> int:
        return (
            self.base
            + self.per_prefill_token * prefill_tokens
            + self.per_decode * decodes
            + self.per_context * context
            + self.per_prefill * prefills
        )

    def floor_time(self, step: Step) -> int:
        return 1

    def explain(self, step: Step) -> list[OperatorTime]:
        return [OperatorTime("step", 1, 0.0, 0.0, self.step_time(step), "launch", "roofline", self.floor_time(step))]

    def supports(self, deployment: Deployment) -> str | None:
        return None

    def prepare(self, deployment: Deployment) -> None: ...

    def provenance(self) -> dict[str, float]:
        return {"roofline": 1.0}


def engine(
    *, step_ns: int = 0, token_ns: int = 0, request_ns: int = 0, overlapped: bool = False, first_token: str = "prefill"
) -> EngineProfile:
    """An engine profile with these host overheads, in ns; `first_token`: the stage that streams it."""
    return EngineProfile(
        "test",
        step_overhead_ns=step_ns,
        token_overhead_ns=token_ns,
        request_overhead_ns=request_ns,
        overlapped=overlapped,
        first_token=first_token,
    )


def table(
    arrival_ns: Any,
    input_tokens: Any,
    output_tokens: Any,
    keys: list[tuple[int, ...]] | None = None,
    concurrency: int | None = None,
    cached_tokens: Any = None,
) -> RequestTable:
    """A workload from three sequences of ints, and perhaps a fourth of stated prefix hits."""
    arrivals, inputs, outputs = (np.asarray(c, dtype=np.int64) for c in (arrival_ns, input_tokens, output_tokens))
    cached = None if cached_tokens is None else np.asarray(cached_tokens, dtype=np.int64)
    return RequestTable(arrivals, inputs, outputs, block_keys=keys, concurrency=concurrency, cached_tokens=cached)


@dataclass(frozen=True)
class KVLink:
    """A link that carries `bytes_per_token` of KV cache at `bytes_per_s`, there `latency_ns` after they left."""

    bytes_per_token: int = 0
    bytes_per_s: float = inf
    latency_ns: int = 0

    @property
    def link(self) -> Link:
        return Link(self.bytes_per_s, self.latency_ns)

    def wire_ns(self, num_bytes: int) -> int:
        """How long `num_bytes` take alone, latency aside."""
        return duration_ns(num_bytes, self.bytes_per_s)


@dataclass
class Run:
    """A run that is over (at `end_ns`, where it was cut), with everything that took part."""

    records: Records
    clients: list[Client]
    coordinator: Coordinator
    kernel: Kernel
    end_ns: int


def play(
    workload: RequestTable,
    *,
    policy: Callable[[], BatchingPolicy] = Chunked,
    perf: PerfModel | None = None,
    num_clients: int = 1,
    num_blocks: int | Sequence[int] = 1 << 40,
    block_size: int = 16,
    caching: bool = False,
    unit_tokens: int = 0,
    watermark: int = 0,
    engine_profile: EngineProfile | None = None,
    router: RoutingPolicy | None = None,
    pipeline: PipelineFactory | None = None,
    max_model_len: int = 1 << 40,
    until_ns: int = FOREVER,
    ledger: bool = True,
    serves: Sequence[tuple[str, ...]] | None = None,
    nic: KVLink | None = None,
    host: KVLink | None = None,
    paths: Paths | None = None,
    prepare: Callable[[Kernel, list[Client]], None] | None = None,
    connect: Callable[[Network, list[Client]], None] | None = None,
    speculation: Speculation | None = None,
    merges_shared_reads: bool = False,
    admission: Sequence[AdmissionPolicy] = (),
    view_refresh_ns: int = 0,
    swap_blocks: int = 0,
    patience: Patience | None = None,
    disturb: Callable[[Coordinator], None] | None = None,
    terms: Terms | None = None,
    lending: Mapping[int, int] | None = None,
    num_layers: int = 4,
) -> Run:
    """Run `workload` to the end (or `until_ns`) on equal clients and check every law on the way.

    `num_blocks`: of each, or per client. `serves`: stage kinds per client. `nic`, `host`: each one's links, unless
    `paths` are given; with `host` stated hits are in the host's memory; `swap_blocks` of it are for preempted decodes.
    `terms`: of hand-overs, layer by layer of `num_layers`. `lending`: by client, from how many pending tokens on it is
    lent to prompts. `connect` may give clients memories; `prepare` is called before the first event, and so is
    `disturb`, which may post some of its own.
    Raises InvariantError where a law breaks.
    """
    pipeline = pipeline or StageList()
    records = Records(stage_kinds=list(dict.fromkeys(pipeline.kinds)))
    kernel = Kernel()
    clients = [
        Client(
            i,
            f"gpu-{i}",
            serves=serves[i] if serves else ("prefill", "decode"),
            batching=policy(),
            perf=perf or LinearSteps(),
            kv=KVCache(
                num_blocks if isinstance(num_blocks, int) else num_blocks[i],
                block_size,
                enable_prefix_caching=caching,
                hash_block_size=unit_tokens,
                watermark_blocks=watermark,
            ),
            engine=engine_profile or engine(),
            max_model_len=max_model_len,
            kernel=kernel,
            records=records,
            speculation=speculation,
            kv_bytes_per_token=(nic or host or KVLink()).bytes_per_token,
            merges_shared_reads=merges_shared_reads,
            residents=SwappingResidents if swap_blocks else Residents,
        )
        for i in range(num_clients)
    ]
    records.client_names = [c.name for c in clients]
    links = PlainLinks([(nic or KVLink()).link] * num_clients, [(host or KVLink()).link] * num_clients)
    network = Network(paths or links, Sharing(kernel), records)
    for client in clients if host is not None else ():
        client.offload = _on_host(client, network)
    for client in clients if swap_blocks else ():
        give_swap_space(client, network, swap_blocks)
    if connect is not None:
        connect(network, clients)
    router = router or RoundRobin()
    terms, lending = terms or Terms(), lending or {}
    routes = {
        kind: Route([c for c in clients if kind in c.serves and not (c.index in lending and kind == PREFILL)], router)
        for kind in pipeline.kinds
    }
    for client in clients if terms.layerwise else ():
        client.watcher = Streaming(num_layers)
    coordinator = Coordinator(
        kernel=kernel,
        records=records,
        clients=clients,
        network=network,
        tenants=[
            Tenant(
                workload,
                pipeline,
                routes,
                lambda i: np.random.default_rng((7, i)),
                admission=admission,
                patience=patience,
            )
        ],
        views=Views(view_refresh_ns),
        terms=terms,
        lending=Lending(lending, records) if lending else None,
    )
    watch = Ledger(kernel, coordinator, clients, records) if ledger else None
    if prepare is not None:
        prepare(kernel, clients)
    if disturb is not None:
        disturb(coordinator)
    coordinator.start()
    kernel.run(until_ns)
    end = kernel.now if until_ns == FOREVER else until_ns
    if coordinator.in_system or coordinator.num_cancelled or network.in_flight:
        coordinator.cut(end)
    if watch is not None:
        watch.close(end)
    return Run(records, clients, coordinator, kernel, end)


def _on_host(client: Client, network: Network) -> Offload | None:
    """Stated hits are fetched from the host's memory, which has them all."""
    if not client.residents.kv.prefix_caching:
        return None
    memory = Memory(HOST, Tier(MemoryTier("host memory", 1 << 62, inf, hit_rate=1.0)))
    hierarchy = Hierarchy([memory.tier], token_bytes=client.kv_bytes_per_token, rng_of=np.random.default_rng)
    return Offload(client, network, hierarchy, [memory], always=True)


# --- small scenarios ---


@dataclass(frozen=True)
class SmallScenario:
    """A handful of requests, as (arrival ns, prompt, output, block keys), for clients with tiny pools and budgets."""

    requests: tuple[tuple[int, int, int, tuple[int, ...]], ...]
    max_num_seqs: int = 4
    max_num_batched_tokens: int = 16
    num_blocks: int = 1000
    block_size: int = 4
    unit_tokens: int = 0
    caching: bool = False
    watermark: int = 0
    concurrency: int | None = None

    def workload(self) -> RequestTable:
        arrivals, prompts, outputs, keys = (list(column) for column in zip(*self.requests, strict=True))
        return table(arrivals, prompts, outputs, keys, self.concurrency)

    def play(
        self, policy: Callable[..., BatchingPolicy] = Chunked, workload: RequestTable | None = None, **arguments: Any
    ) -> Run:
        """Run it (or `workload`) with `policy(max_num_seqs=..., max_num_batched_tokens=...)` per client; see `play`."""
        limits = {"max_num_seqs": self.max_num_seqs, "max_num_batched_tokens": self.max_num_batched_tokens}
        for name in ("num_blocks", "block_size", "unit_tokens", "caching", "watermark"):
            arguments.setdefault(name, getattr(self, name))
        return play(workload or self.workload(), policy=lambda: policy(**limits), **arguments)

    def with_longer_output(self, index: int, by: int) -> SmallScenario:
        """The same but for request `index`, which generates `by` tokens more."""
        requests = list(self.requests)
        arrival, prompt, output, keys = requests[index]
        requests[index] = (arrival, prompt, output + by, keys)
        return replace(self, requests=tuple(requests))


def random_scenario(seed: int, *, roomy: bool = False) -> SmallScenario:
    """Lengths 0, 1, block ± 1 and others; ties and bursts; shared prefixes; preemptions, unless `roomy`."""
    rng = random.Random(seed)
    block = rng.choice([1, 2, 4, 8])
    unit = block * rng.choice([1, 2]) if rng.random() < 0.5 else 0
    edges = [1, max(1, block - 1), block, block + 1]
    requests: list[tuple[int, int, int, tuple[int, ...]]] = []
    now = 0
    for i in range(rng.randint(1, 12)):
        now += rng.choice([0, rng.randint(0, 400), 1000 * rng.randint(1, 4), rng.randint(0, 5000)])
        prompt = rng.choice([*edges, rng.randint(1, 40)])
        output = rng.choice([0, 1, 2, block + 1, rng.randint(1, 40)])
        prefix, own = 100 * rng.randint(0, 1), 1000 * (i + 1)
        keys = tuple((prefix if k < 2 else own) + k for k in range(-(-prompt // unit))) if unit else ()
        requests.append((now, prompt, output, keys))
    seqs = rng.randint(1, 6)
    blocks = 1000 if roomy else rng.randint(max(1, 40 // block), 200 // block)
    tokens = seqs + rng.randint(0, 30)
    return SmallScenario(tuple(requests), seqs, tokens, blocks, block, unit, bool(unit), rng.choice([0, 0, 1]))


def with_hints(workload: RequestTable, seed: int) -> RequestTable:
    """`workload` with random priorities, deadlines and predictions, all with ties."""
    rng, n = random.Random(seed), len(workload)

    def column(*values: int) -> IntArray:
        return np.array([rng.choice(values) for _ in range(n)], np.int64)

    workload.sizes |= {
        "priority": column(0, 0, 1, 5),
        "deadline_ms": column(0, 1, 2, 1000),
        "predicted_output_tokens": column(1, 10, 100),
    }
    return workload


def record_bytes(records: Records) -> tuple[bytes, ...]:
    """All tables of a run, to compare two runs with."""
    return tuple(t.cells.tobytes() for t in (records.requests, records.tasks, records.steps, records.transfers))
