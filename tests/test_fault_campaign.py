"""A campaign of random faults under the ledger: whatever happens, every request ends once, and nothing is stuck.

Clients go down and come up, users give up, links slow down and pools scale, on clusters of every kind that the engine
tests have. Exact laws: events that touch nothing change nothing.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from math import inf
from typing import Any

import numpy as np
import pytest

from kit import sampled
from mist.availability.events import Down, Event, Events, LinkChange, Up
from mist.availability.outages import FAIL, RETRY, Outages, Replica
from mist.availability.scaling import Pool, Rule, Scaling
from mist.batching.chunked import Chunked
from mist.batching.continuous import Continuous
from mist.batching.orders.priority import Priority
from mist.batching.static import Static
from mist.client import Client
from mist.coordinator import Coordinator
from mist.fabric import Path
from mist.hand_over import Conversion, Terms
from mist.kernel import Kernel
from mist.lanes import share_stages
from mist.memory.hierarchy import Hierarchy
from mist.memory.tier import MemoryTier, Tier
from mist.network import Network
from mist.offload import Memory, Offload
from mist.pipeline import RequestRandom
from mist.records import CANCELLED, DONE, FINISHED, REJECTED, STATUSES, TIMED_OUT, UNFINISHED
from mist.request import DECODE, NO_DEADLINE, PREFILL, All, FirstOf, Pipeline, Request, Stage
from mist.routing.join_shortest_queue import JoinShortestQueue
from mist.routing.least_outstanding import LeastOutstanding
from mist.routing.prefix_affinity import PrefixAffinity
from mist.routing.round_robin import RoundRobin
from mist.sharing import Channel
from mist.speculation import Speculation
from mist.tenant import Patience
from mist.testing.cluster import KVLink, Run, SmallScenario, engine, play, random_scenario, record_bytes

HORIZON = 40_000


class Forking:
    """A prompt whose answers fork: all of several, the first of some, or races of whole pipelines."""

    kinds: tuple[str, ...] = (PREFILL, DECODE)
    is_fixed = False

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, request: Request, rng: RequestRandom) -> Pipeline:
        draw = random.Random(1000 * self.seed + request.index)
        lengths = [draw.randint(1, 20) for _ in range(draw.randint(1, 4))]
        shape = draw.choice(["all", "first", "race", "stray"])
        yield Stage(PREFILL, input_tokens=request.input_tokens)
        if shape == "all":
            yield All([Stage(DECODE, oracle_output_tokens=n) for n in lengths])
        elif shape == "first":
            yield FirstOf(1, [Stage(DECODE, oracle_output_tokens=n) for n in lengths])
        else:
            yield Stage(DECODE, oracle_output_tokens=lengths[0])
            yield FirstOf(1, [self._answer(n) for n in lengths], cancel_rest=shape == "race")
        if draw.random() < 0.5:
            yield Stage(PREFILL, input_tokens=draw.randint(1, 20), visible=False)

    def _answer(self, length: int) -> Pipeline:
        yield Stage(PREFILL, input_tokens=length + 3)
        yield Stage(DECODE, oracle_output_tokens=length)


def tiers(seed: int, unit: int) -> Callable[[Network, list[Client]], None]:
    """A memory on each host and one below for all, over slow links; content that takes time to decode."""
    rng = random.Random(seed)
    capacity, rate, always = rng.choice([400, 4000]), rng.choice([3e7, 1e8, 3e8]), rng.random() < 0.8
    num_layers, decode_rate = rng.choice([1, 4]), rng.choice([inf, 3e7])

    def connect(network: Network, clients: list[Client]) -> None:
        shared = Memory(-2, Tier(MemoryTier("shared", capacity * 10, rate, decode_bytes_per_s=decode_rate), unit))
        for client in clients:
            own = Memory(
                -3 - client.index, Tier(MemoryTier("own", capacity, 2 * rate, decode_bytes_per_s=decode_rate), unit)
            )
            path = Path((Channel(f"{client.name}.host", rate),), rng.choice([0, 400]))
            for memory in (own, shared):
                network.memory_paths[memory.index, client.index] = path
                network.memory_paths[client.index, memory.index] = path
                network.memory_paths[memory.index, shared.index] = path
            hierarchy = Hierarchy(
                [own.tier, shared.tier], token_bytes=10, unit_tokens=unit, rng_of=np.random.default_rng
            )
            client.offload = Offload(client, network, hierarchy, [own, shared], always=always, num_layers=num_layers)

    return connect


def common_prompts(seed: int) -> SmallScenario:
    """Prompts that begin alike, on caches that soon forget them."""
    rng = random.Random(seed)
    unit = rng.choice([4, 8])
    requests, now = [], 0
    for i in range(rng.randint(4, 16)):
        now += rng.choice([0, rng.randint(0, 500), rng.randint(0, 6000)])
        family, num_units, num_common = rng.randint(1, 3), rng.randint(1, 8), rng.randint(0, 6)
        keys = tuple(1000 * family + k if k < num_common else 100_000 * (i + 1) + k for k in range(num_units))
        requests.append((now, num_units * unit, rng.randint(0, 12), keys))
    limits = {"max_num_seqs": rng.randint(1, 4), "max_num_batched_tokens": rng.randint(8, 40)}
    return SmallScenario(tuple(requests), **limits, num_blocks=rng.randint(22, 40), unit_tokens=unit, caching=True)


class Campaign:
    """One random cluster with its workload and its faults; `kinds` counts what it has of everything."""

    def __init__(self, seed: int) -> None:
        rng = self.rng = random.Random(seed)
        self.seed = seed
        small = random_scenario(seed, roomy=rng.random() < 0.4)
        if rng.random() < 0.3:
            small = replace(small, concurrency=rng.randint(1, 4))
        self.small = small
        self.options: dict[str, Any] = {}
        shape = self.shape = rng.choice(["mixed", "mixed", "apart", "forks", "forks_apart", "lanes", "tiers", "drafts"])
        self.num_clients = rng.randint(1, 4)
        policy: Any = rng.choice([Chunked, Continuous, Static])
        if "apart" in shape:
            serves = [(PREFILL,)] * rng.randint(1, 2) + [(DECODE,)] * rng.randint(1, 3)
            self.num_clients, policy = len(serves), rng.choice([Chunked, Continuous])
            self.options |= {
                "serves": serves,
                "nic": KVLink(rng.randint(1, 30), rng.choice([1e9, 3e7]), rng.choice([0, 300])),
            }
            self.options["engine_profile"] = engine(first_token=rng.choice([PREFILL, DECODE]))
        if "forks" in shape:
            self.options["pipeline"] = Forking(seed)
            self.options["merges_shared_reads"] = rng.random() < 0.5
        if shape == "lanes":
            self.num_clients = 4
            self.options["prepare"] = _in_lanes
        if shape == "tiers":
            self.small = common_prompts(seed)
            self.options["connect"] = tiers(seed, self.small.unit_tokens)
        if shape == "drafts":
            self.options["speculation"] = Speculation(3, 0.6, lambda i, s: np.random.default_rng((seed, i, s)))
            self.options["num_blocks"] = 1000
            policy = Chunked
        if policy is Chunked and rng.random() < 0.3:
            self.policy: Any = lambda **limits: Chunked(**limits, order=Priority())
        else:
            self.policy = policy
        if "apart" in shape:
            self.options |= self._terms(random.Random(seed + 1_000_000))
        router: Any = rng.choice([RoundRobin, LeastOutstanding, JoinShortestQueue, PrefixAffinity])
        self.router = router
        if rng.random() < 0.3:
            self.options["engine_profile"] = engine(step_ns=20, request_ns=rng.choice([0, 150]), first_token=PREFILL)

    def _terms(self, rng: random.Random) -> dict[str, Any]:
        """How KV caches are handed over: chosen early or late, layer by layer, converted, by lent clients."""
        serves = self.options["serves"]
        prefills, decodes = ([i for i, kinds in enumerate(serves) if kind in kinds] for kind in (PREFILL, DECODE))
        layerwise = rng.random() < 0.3
        lending = {}
        if rng.random() < 0.3:
            serves[-1] = (PREFILL, DECODE)
            lending = {len(serves) - 1: rng.choice([0, 20, 100])}
        conversion = Conversion(rng.choice([3.0, 80.0]), is_before=not layerwise and rng.random() < 0.5)
        pairs = [(i, j) for i in prefills for j in decodes if rng.random() < 0.5] if rng.random() < 0.4 else []
        reach = {i: frozenset(rng.sample(decodes, rng.randint(1, len(decodes)))) for i in prefills}
        terms = Terms(
            layerwise or rng.random() < 0.5, layerwise or rng.random() < 0.6, layerwise,
            reach if rng.random() < 0.3 else {}, dict.fromkeys(pairs, conversion),
        )  # fmt: skip
        return {
            "terms": terms,
            "lending": lending,
            "num_layers": rng.choice([1, 4]),
            "swap_blocks": rng.choice([0, 0, 8]),
        }

    def play(self, disturb: Callable[[Coordinator], None] | None, patience: Patience | None = None) -> Run:
        limits: dict[str, Any] = {}
        if self.shape == "drafts":
            limits["policy"] = lambda: Chunked(max_num_seqs=4, max_num_batched_tokens=64)
            workload = self.small.workload()
            return play(workload, block_size=self.small.block_size, num_clients=self.num_clients,
                        router=self.router(), disturb=disturb, patience=patience, **limits, **self.options)  # fmt: skip
        return self.small.play(
            self.policy, num_clients=self.num_clients, router=self.router(), disturb=disturb, patience=patience,
            **self.options,
        )  # fmt: skip

    def events(self, coordinator: Coordinator) -> list[Event]:
        rng = self.rng
        names = ["replica"] if self.shape == "lanes" else [client.name for client in coordinator.clients]
        found: list[Event] = []
        for _ in range(rng.randint(0, 8)):
            at, name = rng.randint(0, HORIZON), rng.choice(names)
            on_loss = rng.choice([RETRY, RETRY, FAIL])
            if rng.random() < 0.3:
                found.append(Down(at, name, on_loss, at + rng.choice([1, 100, rng.randint(1, 20_000)])))
                continue
            found.append(Down(at, name, on_loss))
            if rng.random() < 0.85:
                found.append(Up(at + rng.choice([0, 1, 100, rng.randint(1, 20_000)]), name))
        if "nic" in self.options:
            for _ in range(rng.randint(0, 3)):
                sender = rng.randrange(len(coordinator.clients))
                (channel,) = coordinator.network.path(sender, sender).channels
                at = rng.randint(0, HORIZON)
                found.append(LinkChange(at, channel, rng.choice([0.0, 0.01, 0.5])))
                found.append(LinkChange(at + rng.randint(0, 10_000), channel, rng.choice([0.3, 1.0])))
                found.append(LinkChange(2 * HORIZON, channel, 1.0))
        return found

    def disturb(self, coordinator: Coordinator) -> None:
        made = self.events_of(coordinator)
        made.post(self.events(coordinator))
        rng = self.rng
        replicas = list(made.outages.replicas.values())
        total = len(self.small.requests)
        by_kind: dict[tuple[str, ...], list[Replica]] = {}
        for replica in replicas:
            by_kind.setdefault(replica.clients[0].serves, []).append(replica)
        for tenant in coordinator.tenants:
            tenant.deadline_after_ns = rng.choice([NO_DEADLINE, 500, 20_000])
        pools = []
        for members in by_kind.values():
            if rng.random() < 0.5:
                continue
            most = len(members)
            first = rng.randint(1, most)
            schedule = [(rng.randint(0, HORIZON), rng.randint(1, most)) for _ in range(rng.randint(0, 4))]
            measure = rng.choice(["queue", "wait_s", "deadline_share"])
            rule = Rule(measure, rng.choice([0.0, 1e-6, 2.0]), 1e-7, rng.randint(200, 3000))
            pools.append(Pool(members, first, 1, rng.choice([0, 500]), schedule, rule if rng.random() < 0.5 else None))
        Scaling(made.outages, pools, lambda: coordinator.num_left == total).start()

    def events_of(self, coordinator: Coordinator) -> Events:
        clients = coordinator.clients
        groups = {"replica": list(clients)} if self.shape == "lanes" else {c.name: [c] for c in clients}
        replicas = {name: Replica(name, members) for name, members in groups.items()}
        return Events(
            coordinator.kernel, Outages(coordinator, coordinator.records, replicas), coordinator.network.sharing
        )

    def patience(self) -> Patience | None:
        rng, num = self.rng, len(self.small.requests)
        if rng.random() < 0.4:
            return None
        after = [rng.choice([NO_DEADLINE, rng.randint(1, 3000), rng.randint(1, 20_000)]) for _ in range(num)]
        return Patience(after, [rng.choice([CANCELLED, TIMED_OUT]) for _ in range(num)])


def _in_lanes(kernel: Kernel, clients: list[Client]) -> None:
    """Two pipeline stages of two attention groups: one replica."""
    share_stages(clients, 2, kernel)


def check(result: Run, num_requests: int) -> Counter[str]:
    """Each request left once, those that finished have all their tasks done, and nothing is left anywhere."""
    requests, tasks = result.records.requests.as_columns(), result.records.tasks.as_columns()
    assert sorted(requests["request"].tolist()) == list(range(num_requests))
    places = list(zip(tasks["request"].tolist(), tasks["stage_index"].tolist(), strict=True))
    done = Counter(place for place, how in zip(places, tasks["how"].tolist(), strict=True) if how == DONE)
    assert not done or max(done.values()) == 1, "a task was served twice"
    assert not result.coordinator.in_system
    handing = result.coordinator.handing
    assert [*handing.orders, *handing.early, *handing.awaiting, *handing.converting] == []
    for client in result.clients:
        assert (client.reservations.blocks, client.reservations.num_promised) == ({}, 0), client.name
        left = [client.view.num_outstanding, client.front_end.incoming_tokens, client.residents.pending_tokens]
        assert [*left, client.residents.kv.used, client.residents.cohort.sum_context] == [0] * 5, client.name
        assert client.offload is None or not (client.offload.fetching or client.offload._num_to_take)
    assert not result.coordinator.num_tasks or UNFINISHED in requests["status"]
    return Counter(STATUSES[status] for status in requests["status"].tolist())


def play_one(seed: int) -> Counter[str]:
    campaign = Campaign(seed)
    result = campaign.play(campaign.disturb, campaign.patience())
    return check(result, len(campaign.small.requests))


@pytest.mark.parametrize("first", sampled(range(0, 240, 8), 15))
def test_a_campaign(first: int) -> None:
    for seed in range(first, first + 8):
        play_one(seed)


@pytest.mark.long
@pytest.mark.parametrize("first", range(1000, 4000, 50))
def test_a_long_campaign(first: int) -> None:
    for seed in range(first, first + 50):
        play_one(seed)


@pytest.mark.parametrize("first", sampled(range(20_000, 20_120, 8), 8))
def test_watched_or_not_step_by_step_or_in_spans_it_is_the_same(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ledger switches spans of decode steps off: with spans wherever they may be, the records are the same rows."""
    monkeypatch.setattr(Client, "_took", property(lambda self: 0, lambda self, took: None), raising=False)
    for seed in range(first, first + 8):
        runs = []
        for ledger in (True, False):
            campaign = Campaign(seed)
            campaign.options["ledger"] = ledger
            runs.append(campaign.play(campaign.disturb, campaign.patience()).records)
        watched, alone = (
            [sorted(map(tuple, zip(*table.as_columns().values(), strict=True))) for table in
             (each.requests, each.tasks, each.steps, each.transfers)] for each in runs
        )  # fmt: skip
        assert watched == alone, seed


def test_the_campaign_has_everything() -> None:
    """Every way to leave, and no request that waits for ever."""
    ends: Counter[str] = Counter()
    for seed in range(5000, 5080):
        ends += play_one(seed)
    assert {"finished", "rejected", "cancelled", "timed_out"} <= set(ends)
    assert "unfinished" not in ends
    assert ends["finished"] > sum(ends.values()) / 3


# --- exact laws ---


def with_events(campaign: Campaign, *events: Event) -> Run:
    return campaign.play(lambda coordinator: campaign.events_of(coordinator).post(events))


def name_of_last(campaign: Campaign) -> str:
    return "replica" if campaign.shape == "lanes" else f"gpu-{campaign.num_clients - 1}"


@pytest.mark.parametrize("seed", sampled(range(60), 30))
def test_events_after_the_end_change_nothing(seed: int) -> None:
    name = name_of_last(Campaign(seed))
    late = with_events(Campaign(seed), Down(10**12, name), Up(10**12 + 5, name))
    assert record_bytes(late.records) == record_bytes(Campaign(seed).play(None).records)


@pytest.mark.parametrize("seed", sampled(range(60), 30))
def test_a_client_that_is_down_for_no_time_with_nothing_on_it_changes_nothing(seed: int) -> None:
    """Before the first request, and, where no prefix could be lost, in every gap between requests."""
    plain = Campaign(seed).play(None)
    requests = plain.records.requests.as_columns()
    instants = [0]
    if not Campaign(seed).small.caching and Campaign(seed).small.concurrency is None:
        busy = plain.records.tasks.as_columns()["end_ns"].max()
        arrivals, ends = sorted(requests["arrival_ns"].tolist()), requests["end_ns"]
        gaps = [at - 1 for at in arrivals if at > 1 and not np.any((requests["arrival_ns"] < at) & (ends >= at - 1))]
        instants += [*gaps, int(busy) + 1]
    name = name_of_last(Campaign(seed))
    events = [event for at in instants for event in (Down(at, name), Up(at, name))]
    assert record_bytes(with_events(Campaign(seed), *events).records) == record_bytes(plain.records)


@pytest.mark.parametrize("seed", sampled(range(120), 40))
def test_a_client_that_is_down_from_the_start_might_not_be_there(seed: int) -> None:
    campaign, fewer = Campaign(seed), Campaign(seed)
    serves = campaign.options.get("serves")
    if campaign.shape == "lanes" or campaign.num_clients < 2 or (serves and serves.count((DECODE,)) < 2):
        pytest.skip("nobody would serve, or one replica is all that there is")
    fewer.num_clients -= 1
    down = with_events(campaign, Down(0, name_of_last(campaign)))
    assert record_bytes(down.records) == record_bytes(fewer.play(None).records)


@pytest.mark.parametrize("seed", sampled(range(60), 30))
def test_patience_that_outlasts_every_request_changes_nothing(seed: int) -> None:
    campaign = Campaign(seed)
    patient = Patience([10**12] * len(campaign.small.requests), [TIMED_OUT] * len(campaign.small.requests))
    assert record_bytes(campaign.play(None, patient).records) == record_bytes(Campaign(seed).play(None).records)


@pytest.mark.parametrize("seed", sampled(range(60), 30))
def test_what_is_retried_comes_out_whole(seed: int) -> None:
    """Downs with a way back, nobody who gives up: all that would have finished does, with as many tokens."""
    plain = Campaign(seed).play(None)
    rng = random.Random(seed)
    names = ["replica"] if Campaign(seed).shape == "lanes" else [client.name for client in plain.clients]
    events: list[Event] = []
    for _ in range(6):
        at, name = rng.randint(0, HORIZON), rng.choice(names)
        events += [Down(at, name), Up(at + rng.randint(0, 5000), name)]
    faulty = with_events(Campaign(seed), *events)
    check(faulty, len(Campaign(seed).small.requests))
    before, after = (run.records.requests.as_columns() for run in (plain, faulty))
    order, other = np.argsort(before["request"]), np.argsort(after["request"])
    assert before["status"][order].tolist() == after["status"][other].tolist()
    if Campaign(seed).shape not in ("forks", "forks_apart"):  # who is first there depends on times
        assert before["output_tokens"][order].tolist() == after["output_tokens"][other].tolist()
    assert np.all(after["end_ns"] >= after["arrival_ns"])
    assert set(after["status"].tolist()) <= {FINISHED, REJECTED}


def test_room_is_kept_for_a_branch_whose_request_would_not_fit_whole() -> None:
    """Its decodes are shorter than the request's output: without room of its own its KV cache would wait for the room
    of prompts that wait for its blocks."""
    statuses = Campaign(102201).play(None).records.requests.as_columns()["status"]
    assert set(statuses.tolist()) <= {FINISHED, REJECTED}


def test_who_waits_where_nobody_runs_gets_the_room_of_prompts_that_wait_for_them() -> None:
    """A decode client went down, and a decode that was swapped out and prompts with room there wait for each other."""
    play_one(2250)
