"""Memory tiers in a run: what is fetched, when it is there, what is written, and the laws that all of it keeps.

On clients with made-up step times; the ledger watches every run.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kit import POLICIES, LinearSteps, Run, SmallScenario, engine, play, rows, sampled, small_scenarios, table
from mist.batching.chunked import Chunked
from mist.client import Client
from mist.fabric import Path
from mist.kernel import FOREVER
from mist.memory.eviction.lfu import LFU
from mist.memory.eviction.lru import LRU
from mist.memory.hierarchy import Hierarchy, expected_ns, exposed_ns
from mist.memory.tier import MemoryTier, Tier
from mist.network import Network
from mist.offload import Memory, Offload, prefill_ns
from mist.records import KV_WRITE, PREFIX_FETCH
from mist.sharing import Channel
from mist.testing import random_scenario, record_bytes

UNIT = 16
TOKEN_BYTES = 10
FAR_APART = 10**8
#: prefills of any length in one step, at 10 ns a token
WHOLE = LinearSteps(per_context=0)

Connect = Callable[[Network, list[Client]], None]


def memory(name: str = "host", num_units: int = 1 << 40, **more: Any) -> MemoryTier:
    """Room for so many units of 16 tokens, read at a byte per ns."""
    return MemoryTier(name, num_units * UNIT * TOKEN_BYTES, **{"bytes_per_s": 1e9, **more})


def behind(*specs: MemoryTier, unit: int = UNIT, always: bool = True, layers: int = 1) -> Connect:
    """All clients share one instance of each of `specs`."""

    def connect(network: Network, clients: list[Client]) -> None:
        memories = [Memory(-2 - i, Tier(spec, unit)) for i, spec in enumerate(specs)]
        ways = [
            (Channel(f"{s.name}.read", s.bytes_per_s), Channel(f"{s.name}.write", s.write_bytes_per_s or s.bytes_per_s))
            for s in specs
        ]
        for one, (read, write) in zip(memories, ways, strict=True):
            latency = one.tier.spec.access_ns
            for client in clients:
                network.memory_paths[one.index, client.index] = Path((read,), latency)
                network.memory_paths[client.index, one.index] = Path((write,), latency)
        for (above, (read, _)), (below, (_, write)) in pairwise(zip(memories, ways, strict=True)):
            network.memory_paths[above.index, below.index] = Path((read, write))
        for client in clients:
            tiers = Hierarchy(
                [one.tier for one in memories],
                token_bytes=TOKEN_BYTES,
                unit_tokens=unit,
                rng_of=lambda i: np.random.default_rng((3, i)),
            )
            client.offload = Offload(client, network, tiers, memories, always=always, num_layers=layers)

    return connect


def column(run: Run, table_name: str, name: str) -> list[int]:
    return list(getattr(run.records, table_name).as_columns()[name].tolist())


def sent(run: Run, kind: int) -> list[tuple[int, ...]]:
    """(request, bytes, start, end) of the transfers of a kind."""
    t = run.records.transfers.as_columns()
    names = ("request", "bytes", "start_ns", "end_ns")
    return list(zip(*(t[name][t["kind"] == kind].tolist() for name in names), strict=True))


def stated(prompts: list[int], hits: list[int], connect: Connect, **more: Any) -> Run:
    """Requests far apart that generate one token, with hits as the workload states them."""
    at = [FAR_APART * i for i in range(len(prompts))]
    workload = table(at, prompts, [1] * len(prompts), cached_tokens=hits)
    options: dict[str, Any] = {"perf": WHOLE, "caching": True, "policy": lambda: Chunked(1 << 20, 4), **more}
    return play(workload, connect=connect, **options)


def by_keys(*prompts: tuple[int, ...], connect: Connect | None, **more: Any) -> Run:
    """Prompts of whole units and one token, far apart."""
    tokens = [len(keys) * UNIT + 1 for keys in prompts]
    workload = table([FAR_APART * i for i in range(len(prompts))], tokens, [1] * len(tokens), list(prompts))
    options: dict[str, Any] = {"perf": WHOLE, "unit_tokens": UNIT, "policy": lambda: Chunked(1 << 20, 4), **more}
    return play(workload, connect=connect, **options)


# --- limits in which a tier changes nothing, or is the device's own cache ---


@settings(max_examples=60)
@given(small_scenarios(caching=True, shared=False), st.booleans(), st.sampled_from(POLICIES))
def test_content_that_never_repeats_changes_nothing(scenario: SmallScenario, always: bool, policy: Any) -> None:
    connect = behind(memory(), unit=scenario.unit_tokens, always=always)
    plain, tiered = scenario.play(policy), scenario.play(policy, connect=connect)
    if any(column(plain, "requests", "num_preemptions")):
        return  # a preempted request's own content comes back
    alike = ("requests", "tasks", "steps")
    assert [rows(plain.records)[name] for name in alike] == [rows(tiered.records)[name] for name in alike]
    assert not sent(tiered, PREFIX_FETCH)


@pytest.mark.parametrize("seed", range(20))
def test_a_hit_rate_of_zero_changes_nothing(seed: int) -> None:
    scenario = random_scenario(seed)
    workload = scenario.workload()
    options: dict[str, Any] = {"num_blocks": scenario.num_blocks, "block_size": scenario.block_size, "caching": True}
    plain = play(workload, **options)
    workload.cached_tokens = workload.input_tokens // 2
    assert rows(plain.records) == rows(play(workload, connect=behind(memory(hit_rate=0.0)), **options).records)


@settings(max_examples=60)
@given(small_scenarios(roomy=True, caching=True))
def test_a_tier_that_takes_no_time_is_the_cache_of_the_device(scenario: SmallScenario) -> None:
    requests = tuple((FAR_APART * i, *each[1:]) for i, each in enumerate(scenario.requests))
    apart = SmallScenario(**{name: getattr(scenario, name) for name in ("max_num_seqs", "max_num_batched_tokens",
                          "num_blocks", "block_size", "unit_tokens", "caching")}, requests=requests)  # fmt: skip
    connect = behind(memory(bytes_per_s=float("inf")), unit=scenario.unit_tokens)
    device = apart.play(num_blocks=100_000)
    tier = apart.play(caching=False, connect=connect, num_blocks=100_000)
    assert rows(device.records)["requests"] == rows(tier.records)["requests"]
    assert rows(device.records)["steps"] == rows(tier.records)["steps"]


# --- times ---


def test_a_fetch_takes_latency_and_bytes_before_the_rest_is_computed() -> None:
    run = stated([100], [60], behind(memory(latency_ns=500, hit_rate=1.0)))
    assert sent(run, PREFIX_FETCH) == [(0, 600, 0, 1100)]
    assert column(run, "steps", "start_ns") == [1100]
    assert column(run, "steps", "num_prefill_tokens") == [40]
    assert column(run, "requests", "cached_tokens") == [60]
    assert not sent(run, KV_WRITE)


@pytest.mark.parametrize("k", [2, 3, 7])
def test_k_readers_of_one_tier_each_see_a_kth(k: int) -> None:
    workload = table([0] * k, [100] * k, [1] * k, cached_tokens=[60] * k)
    run = play(workload, num_clients=k, caching=True, connect=behind(memory(latency_ns=500, hit_rate=1.0)))
    assert [end for *_, end in sent(run, PREFIX_FETCH)] == [600 * k + 500] * k


def test_in_the_uncontended_limit_fetches_take_the_expected_time() -> None:
    """T(S) = sum_i [prod_{j<i} (1-h_j)] h_i (L_i + S/B_i) + prod_j (1-h_j) T_recompute, request by request and mean."""
    tokens, num_requests = 640, 400
    near, far = (
        memory("near", latency_ns=70, hit_rate=0.5),
        memory("far", latency_ns=900, bytes_per_s=5e8, hit_rate=0.4),
    )
    run = stated([1000] * num_requests, [tokens] * num_requests, behind(near, far))
    times = [end - FAR_APART * i for i, end in enumerate(column(run, "requests", "end_ns"))]
    spent = [time - WHOLE.of(1000 - tokens, 0, 0, 1) for time in times]
    fetch = [spec.fetch_ns(tokens * TOKEN_BYTES) for spec in (near, far)]
    recompute = WHOLE.per_prefill_token * tokens
    assert set(spent) == {*fetch, recompute}
    hits = [Fraction(spent.count(time)) for time in fetch]
    rates = [hits[0] / num_requests, hits[1] / (num_requests - hits[0])]
    assert Fraction(sum(spent), num_requests) == expected_ns(rates, [Fraction(t) for t in fetch], Fraction(recompute))
    assert float(rates[0]) == pytest.approx(0.5, abs=0.1)
    assert float(rates[1]) == pytest.approx(0.4, abs=0.14)


def test_a_miss_is_a_real_prefill() -> None:
    hit, miss = (stated([100], [60], behind(memory(hit_rate=rate, latency_ns=5))) for rate in (1.0, 0.0))
    assert column(miss, "steps", "num_prefill_tokens") == [100]
    assert column(miss, "requests", "end_ns") == [WHOLE.of(100, 0, 0, 1)]
    assert column(hit, "requests", "end_ns") == [605 + WHOLE.of(40, 0, 0, 1)]


@pytest.mark.parametrize(("bytes_per_s", "fetched"), [(1.1e9, True), (0.9e9, False)])
def test_the_sooner_of_fetching_and_computing(bytes_per_s: float, fetched: bool) -> None:
    """Computing takes 10 ns a token, and fetching 10 bytes of it."""
    connect = behind(memory(bytes_per_s=bytes_per_s, hit_rate=1.0), always=False)
    run = stated([100_000], [60_000], connect)
    assert bool(sent(run, PREFIX_FETCH)) == fetched
    assert column(run, "requests", "cached_tokens") == [60_000 * fetched]


def test_who_reads_already_makes_computing_sooner() -> None:
    workload = table([0, 1], [1000, 1000], [1, 1], cached_tokens=[600, 600])
    connect = behind(memory(bytes_per_s=1.5e9, hit_rate=1.0), always=False)
    run = play(workload, num_clients=2, caching=True, perf=WHOLE, connect=connect)
    assert [request for request, *_ in sent(run, PREFIX_FETCH)] == [0]


def test_prompts_of_many_chunks_are_estimated_from_the_first_and_the_last() -> None:
    estimates = []

    class Contexts(LinearSteps):
        def step_time(self, step: Any) -> int:
            return int(super().step_time(step) + sum(new * context for new, context in step.chunks))

    def prepare(kernel: Any, clients: list[Client]) -> None:
        estimates.append(prefill_ns(clients[0], 100, 100 + 5 * 64 + 10))

    run = play(table([0], [430], [1]), perf=Contexts(), policy=lambda: Chunked(64, 4), prepare=prepare)
    one = [Contexts().of(64, 0, 0, 1) + 64 * (100 + 64 * i) for i in range(5)]
    assert estimates == [sum(one) + Contexts().of(10, 0, 0, 1) + 10 * 420]
    assert column(run, "requests", "cached_tokens") == [0]


def test_compression_divides_the_bytes_and_decoding_comes_after() -> None:
    plain, packed = (
        stated([100], [60], behind(memory(hit_rate=1.0, compression=c, decode_bytes_per_s=d)))
        for c, d in ((1.0, float("inf")), (2.0, 6e9))
    )
    assert sent(plain, PREFIX_FETCH) == [(0, 600, 0, 600)]
    assert sent(packed, PREFIX_FETCH) == [(0, 300, 0, 300)]
    assert column(packed, "steps", "start_ns") == [400]


@pytest.mark.parametrize("layers", [1, 3, 4, 7, 32])
def test_layers_overlap(layers: int) -> None:
    """The prefill begins when what can't be hidden behind it is there; all bytes are sent."""
    run = stated([1000], [640], behind(memory(latency_ns=100, hit_rate=1.0), layers=layers))
    compute = WHOLE.of(360, 0, 0, 1)
    exposed = exposed_ns(6400, compute, layers, 100) - 100
    assert column(run, "steps", "start_ns") == [100 - -exposed // TOKEN_BYTES * TOKEN_BYTES], "in whole tokens"
    fetched = sent(run, PREFIX_FETCH)
    assert sum(num_bytes for _, num_bytes, *_ in fetched) == 6400
    assert len(fetched) == (1 if layers == 1 else 2)
    assert not any(num_bytes % TOKEN_BYTES for _, num_bytes, *_ in fetched)


# --- content ---


def test_an_lru_tier_of_three_units_by_hand() -> None:
    """After each prompt it holds: 1 2; 1 2 3; 1 3 5 (2 went); 1 5 2 (3 went); 1 2 3 (5 went)."""
    run = by_keys((1, 2), (3,), (1, 5), (1, 2), (3,), (1, 2), connect=behind(memory(num_units=3)))
    assert column(run, "requests", "cached_tokens") == [0, 0, 16, 16, 0, 32]
    assert [(request, num_bytes // (UNIT * TOKEN_BYTES)) for request, num_bytes, *_ in sent(run, KV_WRITE)] == [
        (0, 2), (1, 1), (2, 1), (3, 1), (4, 1)
    ]  # fmt: skip


def test_each_tier_gives_what_those_before_it_lack() -> None:
    """The near tier has room for two units, and keeps the head; both are read at once."""
    connect = behind(memory("near", 2), memory("far", latency_ns=7))
    run = by_keys((1, 2, 3, 4), (1, 2, 3, 4), connect=connect)
    assert [num_bytes for _, num_bytes, *_ in sent(run, PREFIX_FETCH)] == [320, 320]
    assert column(run, "steps", "start_ns") == [0, FAR_APART + 327]
    assert column(run, "requests", "cached_tokens") == [0, 64]


def test_only_what_the_device_lacks_is_fetched() -> None:
    """The device keeps one unit of the first prompt while the second is there."""
    run = by_keys((1, 2), (1, 2), (7, 8), (1, 2), connect=behind(memory()), caching=True, num_blocks=4)
    assert [(request, size) for request, size, *_ in sent(run, PREFIX_FETCH)] == [(3, 160)]
    assert column(run, "requests", "cached_tokens") == [0, 32, 0, 32]


def test_what_the_device_evicts_goes_to_a_tier_that_is_written_back() -> None:
    """Three blocks: each prompt takes the place of the last, tail first; the near tier has one unit.

    A tail that has to make room for its head while it is on its way is lost; the head goes on when the next one comes.
    """
    connect = behind(memory("near", 1, write="back"), memory("far", write="back"))
    run = by_keys((1, 2), (3, 4), (5, 6), (1, 2), connect=connect, caching=True, num_blocks=3)
    assert column(run, "requests", "cached_tokens") == [0, 0, 0, 16]
    rows_ = run.records.transfers.as_columns()
    written = rows_["kind"] == KV_WRITE
    ways = list(zip(rows_["sender"][written].tolist(), rows_["receiver"][written].tolist(), strict=True))
    assert ways.count((0, -2)) >= 2
    assert (-2, -3) in ways


@pytest.mark.parametrize(
    ("write", "prompts", "found"),
    [("through", ((1, 2),) * 3, [0, 0, 32]), ("back", ((1, 2), (3, 4), (1, 2)), [0, 0, 0])],
)
def test_what_is_written_is_found_once_it_is_there(write: str, prompts: Any, found: list[int]) -> None:
    """A write takes a fifth more than the gap between prompts: the second finds nothing, and isn't written again."""
    took = FAR_APART * 6 // 5
    spec = memory(write_bytes_per_s=2 * UNIT * TOKEN_BYTES * 1e9 / took, write=write)
    run = by_keys(*prompts, connect=behind(spec), caching=write == "back", num_blocks=3)
    assert column(run, "requests", "cached_tokens") == found
    writers = [request for request, *_ in sent(run, KV_WRITE)]
    assert writers == ([0] if write == "through" else [1, 2])


def test_writes_go_on_behind_the_last_request() -> None:
    run = by_keys((1, 2), connect=behind(memory(bytes_per_s=1e3)))
    ((request, num_bytes, start, end),) = sent(run, KV_WRITE)
    assert (request, num_bytes) == (0, 320)
    assert start == column(run, "requests", "end_ns")[0]
    assert end == run.kernel.now == start + 320 * 10**6


def test_what_was_fetched_behind_content_that_the_device_lost_is_fetched_with_that() -> None:
    """While the second unit is fetched, another prompt takes all blocks: the first is gone, so both are fetched."""
    at = [0, FAR_APART, 2 * FAR_APART, 3 * FAR_APART, 3 * FAR_APART + 10]
    workload = table(at, [33, 17, 15, 33, 49], [1, 1, 1, 1, 2], [(1, 2), (7,), (), (1, 2), (8, 9, 10)])
    options: dict[str, Any] = {"perf": WHOLE, "caching": True, "unit_tokens": UNIT, "num_blocks": 4}
    run = play(workload, connect=behind(memory(bytes_per_s=1e6)), **options)
    begun = 3 * FAR_APART
    assert sent(run, PREFIX_FETCH) == [
        (3, 160, begun, begun + 160_000),
        (3, 320, begun + 160_000, begun + 480_000),
    ]
    assert column(run, "requests", "request")[-1] == 3
    assert column(run, "requests", "cached_tokens") == [0, 0, 0, 0, 32]


# --- room for what is fetched ---


@pytest.mark.parametrize("layers", [1, 4])
@pytest.mark.parametrize("policy", POLICIES)
def test_what_is_fetched_ahead_fits_into_the_device(policy: Any, layers: int) -> None:
    """Forty prompts at once; of the fetches that have begun, those not admitted hold no more than the device does."""
    connect = behind(memory(hit_rate=1.0), layers=layers)
    workload = table([0] * 40, [100] * 40, [5] * 40, cached_tokens=[80] * 40)
    limits = {"max_num_seqs": 4, "max_num_batched_tokens": 400}
    run = play(workload, policy=lambda: policy(**limits), num_blocks=23, caching=True, connect=connect)
    tasks = run.records.tasks.as_columns()
    admitted = dict(zip(tasks["request"][::-1].tolist(), tasks["started_ns"][::-1].tolist(), strict=True))
    begun: dict[int, int] = {}
    for request, _, start, _ in sent(run, PREFIX_FETCH):
        begun[request] = min(start, begun.get(request, start))
    assert len(begun) == 40
    assert sorted(begun, key=lambda request: (begun[request], request)) == list(range(40)), "first come, first served"
    for start in begun.values():
        assert sum(begun[request] <= start < admitted[request] for request in begun) * 5 <= 23


def test_who_came_later_does_not_take_the_room_that_a_fetch_waits_for() -> None:
    num_small = 30
    at = [0, 1, *range(100, 100 + num_small)]
    prompts, outputs = [100, 140, *[40] * num_small], [40, 2, *[30] * num_small]
    workload = table(at, prompts, outputs, cached_tokens=[0, 120, *[0] * num_small])
    run = play(workload, num_blocks=10, caching=True, connect=behind(memory(hit_rate=1.0)))
    tasks = run.records.tasks.as_columns()
    ((_, _, begun, _),) = sent(run, PREFIX_FETCH)
    assert begun > 100 + num_small
    assert not np.any((tasks["request"] > 1) & (tasks["started_ns"] < begun))


def crowd(seed: int) -> Run:
    """Prompts of which half are in a tier, on a device with room for few of them."""
    rng = np.random.default_rng(seed)
    prompts = rng.integers(20, 140, 30)
    cached = np.where(rng.random(30) < 0.5, prompts * 9 // 10, 0)
    workload = table(np.sort(rng.integers(0, 20_000, 30)).tolist(), prompts.tolist(), rng.integers(1, 40, 30).tolist(),
                     cached_tokens=cached.tolist())  # fmt: skip
    policy = POLICIES[seed % 3]
    connect = behind(memory(hit_rate=0.9), always=bool(seed % 2))
    limits = {"max_num_seqs": 8, "max_num_batched_tokens": 200}
    return play(workload, policy=lambda: policy(**limits), num_blocks=12, caching=True, connect=connect)


@pytest.mark.parametrize("part", sampled(range(3), 1))
def test_who_waits_behind_a_fetch_leaves_a_policy_nothing_to_decide(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    only_decodes, num_waited = Client._only_decodes, 0

    def counting(client: Client) -> bool:
        nonlocal num_waited
        found = only_decodes(client)
        num_waited += found and len(client.residents.waiting) > 0
        return found

    for seed in range(30 * part, 30 * (part + 1)):
        monkeypatch.setattr(Client, "_only_decodes", counting)
        sometimes = crowd(seed)
        monkeypatch.setattr(Client, "_only_decodes", lambda client: False)
        assert record_bytes(sometimes.records) == record_bytes(crowd(seed).records), f"crowd({seed})"
    assert num_waited > 300


# --- everything at once ---


def anything(seed: int) -> Run:
    rng = np.random.default_rng(seed)
    scenario = random_scenario(seed)
    unit = scenario.unit_tokens or 4
    writes = ["through", "back"][int(rng.integers(2))] if scenario.unit_tokens else "through"
    rated = bool(rng.integers(4) == 0)
    more: dict[str, Any] = {"hit_rate": 0.6} if rated else {"write": writes}
    specs = [
        MemoryTier(
            name,
            TOKEN_BYTES * unit * int(rng.integers(1, 30)),
            10.0 ** rng.integers(7, 11),
            latency_ns=int(rng.integers(0, 500)),
            eviction=(LRU, LFU)[int(rng.integers(2))],
            compression=(1.0, 2.5)[int(rng.integers(2))],
            decode_bytes_per_s=1e9,
            **more,
        )
        for name in ("near", "far")[: int(rng.integers(1, 3))]
    ]
    workload = scenario.workload()
    if rated:
        workload.cached_tokens = np.asarray([rng.integers(0, n + 1) for n in workload.input_tokens.tolist()])
    connect = behind(*specs, unit=scenario.unit_tokens, always=bool(rng.integers(2)), layers=(1, 8)[seed % 2])
    limits = {"max_num_seqs": scenario.max_num_seqs, "max_num_batched_tokens": scenario.max_num_batched_tokens}
    return play(
        workload,
        policy=lambda: POLICIES[seed % len(POLICIES)](**limits),
        num_clients=2,
        num_blocks=max(1, scenario.num_blocks // 3),
        block_size=scenario.block_size,
        unit_tokens=scenario.unit_tokens,
        caching=scenario.caching,
        engine_profile=engine(request_ns=seed % 5 * 100),
        connect=connect,
        until_ns=int(rng.integers(1, 20_000)) if seed % 4 == 0 else FOREVER,
    )


@pytest.mark.parametrize("part", sampled(range(3), 1))
def test_random_scenarios_with_everything_on_obey_the_laws(part: int) -> None:
    fetched = written = preempted = 0
    for seed in range(200 * part, 200 * (part + 1)):
        run = anything(seed)
        fetched += len(sent(run, PREFIX_FETCH))
        written += len(sent(run, KV_WRITE))
        preempted += sum(column(run, "requests", "num_preemptions"))
    assert fetched > 25
    assert written > 50
    assert preempted > 3
