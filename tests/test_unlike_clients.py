"""Clients of unlike sizes: whoever can ever be held by one that may serve it is served there, and only others fail."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kit import POLICIES, Run, SmallScenario, play, small_scenarios, table
from mist.availability.events import Down, Up
from mist.client import Client
from mist.coordinator import Coordinator
from mist.hand_over import Terms
from mist.records import FINISHED, REJECTED
from mist.request import DECODE, PREFILL, ClientView, Task
from mist.routing import RoutingPolicy
from mist.routing.heavy_light import HeavyLight
from mist.routing.least_outstanding import LeastOutstanding
from mist.routing.prefix_affinity import PrefixAffinity
from mist.routing.round_robin import RoundRobin
from mist.scenario.build import run
from mist.speculation import Speculation
from mist.tenant import Tenant
from mist.testing.cluster import KVLink
from scenarios import read
from test_forks import Thoughts
from test_outages import disturbed

BOTH, PROMPTS, DECODES = (PREFILL, DECODE), (PREFILL,), (DECODE,)
LINK = KVLink(10, 1e9, 500)
TERMS = (Terms(), Terms(at_arrival=True), Terms(at_arrival=True, layerwise=True))
ROUTERS = (RoundRobin, LeastOutstanding, PrefixAffinity)


@dataclass
class First:
    """The first of those that it is offered, which it remembers."""

    offered: list[tuple[str, int, list[int]]] = field(default_factory=list)

    def choose(self, task: Task, views: Sequence[ClientView], now: int) -> ClientView:
        self.offered.append((task.stage.kind, task.request.index, [view.index for view in views]))
        return views[0]


def statuses(result: Run) -> list[int]:
    rows = result.records.requests.as_columns()
    return [status for _, status in sorted(zip(rows["request"].tolist(), rows["status"].tolist(), strict=True))]


def clients_of(result: Run, kind: str) -> dict[int, int]:
    """By request, the client that its (last) task of this kind was on."""
    rows = result.records.tasks.as_columns()
    wanted = rows["kind"] == result.records.stage_kinds.index(kind)
    return dict(zip(rows["request"][wanted].tolist(), rows["client"][wanted].tolist(), strict=True))


# --- by hand ---


def test_a_long_prompt_goes_to_the_client_that_holds_it() -> None:
    """90 + 9 tokens fit into 7 blocks of 16, not into 6; 88 + 9 are 96 in the cache, as the last is never computed."""
    router = First()
    result = play(table([0, 1, 2], [90, 88, 4], [9] * 3), num_clients=3, num_blocks=[6, 7, 6], router=router)
    assert statuses(result) == [FINISHED] * 3
    assert clients_of(result, PREFILL) == {0: 1, 1: 0, 2: 0}
    assert router.offered == [(PREFILL, 1, [0, 1, 2]), (PREFILL, 2, [0, 1, 2])]  # one needs no choice


@pytest.mark.parametrize("big", [(0, 1), (2, 3)])
def test_long_prompts_go_to_all_clients_that_hold_them(big: tuple[int, int]) -> None:
    """Every second prompt is long. In turn all get as many; with parts, the long ones have that of the big clients."""
    workload = table([each * 10**6 for each in range(16)], [90, 4] * 8, [9] * 16)
    blocks = [20 if each in big else 4 for each in range(4)]
    parted = HeavyLight("input", max_light_input_tokens=50)
    for router, light in ((RoundRobin(), (2, 2, 2, 2)), (parted, (0, 0, 8, 0))):
        result = play(workload, num_clients=4, num_blocks=blocks, router=router)
        there = clients_of(result, PREFILL)
        assert [sum(there[each] == client for each in range(1, 16, 2)) for client in range(4)] == list(light)
        counts = [sum(there[each] == client for each in range(0, 16, 2)) for client in big]
        assert counts == ([8, 0] if router is parted else [4, 4])


def test_a_part_is_one_of_all_clients_whoever_holds_the_task() -> None:
    """The first half is for the heavy: of 2 and 3, which alone hold it, each is as good."""
    router = HeavyLight("input", max_light_input_tokens=50)
    result = play(table([0] * 4, [90] * 4, [9] * 4), num_clients=4, num_blocks=[4, 4, 20, 20], router=router)
    assert clients_of(result, PREFILL) == {0: 2, 1: 3, 2: 2, 3: 3}


def test_where_none_holds_it_it_fails_with_the_reason() -> None:
    result = play(table([0, 1], [200, 4], [9, 9]), num_clients=2, num_blocks=[6, 7], router=First())
    assert statuses(result) == [REJECTED, FINISHED]
    assert result.records.reasons == ["more tokens than the KV cache of gpu-0 holds (96)"]


@pytest.mark.parametrize("terms", TERMS)
def test_a_kv_cache_is_handed_over_to_a_client_that_holds_it_to_its_end(terms: Terms) -> None:
    """All decode clients hold the prompts of 64 tokens, and only two of them what the first generates."""
    router = First()
    result = play(table([0, 10**6], [64, 64], [40, 9]), num_clients=4, serves=[PROMPTS, DECODES, DECODES, DECODES],
                  num_blocks=[6, 5, 7, 8], router=router, nic=LINK, terms=terms)  # fmt: skip
    assert statuses(result) == [FINISHED] * 2
    assert clients_of(result, DECODE) == {0: 2, 1: 1}
    assert router.offered == [(DECODE, 0, [2, 3]), (DECODE, 1, [1, 2, 3])]


def test_a_prompt_is_computed_from_where_its_decode_finds_room() -> None:
    """gpu-0 hands over to gpu-2, which holds nothing long, and gpu-1 to gpu-3; what doesn't decode goes to it."""
    reach = {0: frozenset([2]), 1: frozenset([3])}
    result = play(table([0, 1, 2, 3], [64, 64, 64, 200], [40, 9, 1, 9]), num_clients=4,
                  serves=[PROMPTS, PROMPTS, DECODES, DECODES], num_blocks=[20, 20, 5, 7], router=First(), nic=LINK,
                  terms=Terms(reach=reach))  # fmt: skip
    assert statuses(result) == [FINISHED] * 3 + [REJECTED]
    assert {each: clients_of(result, PREFILL)[each] for each in range(3)} == {0: 1, 1: 0, 2: 0}
    assert result.records.reasons == ["more tokens than the KV cache of gpu-2 holds (80)"]


@pytest.mark.parametrize("terms", TERMS)
def test_decodes_that_go_on_with_one_context_go_where_all_of_them_fit(terms: Terms) -> None:
    """They are sent together: the first thought alone would fit on gpu-1, and so would what is known at arrival."""
    result = play(table([0], [30], [1]), num_clients=3, serves=[PROMPTS, DECODES, DECODES], num_blocks=[8, 8, 9],
                  router=First(), nic=LINK, pipeline=Thoughts((3, 110, 5)), terms=terms)  # fmt: skip
    assert statuses(result) == [FINISHED]
    assert clients_of(result, DECODE) == {0: 2}


def test_drafts_need_room_too() -> None:
    """The step of the last token has three drafts: 96 tokens in the cache and those."""
    speculation = Speculation(3, 0.5, lambda *key: np.random.default_rng(key))
    result = play(table([0], [88], [9]), num_clients=2, num_blocks=[6, 7], router=First(), speculation=speculation)
    assert clients_of(result, PREFILL) == {0: 1}


# --- clients that are down ---


def test_who_is_held_by_a_client_that_is_down_waits_for_it() -> None:
    events = disturbed(Down(0, "gpu-1"), Up(50_000, "gpu-1"))
    result = play(table([10, 20], [90, 4], [9, 9]), num_clients=2, num_blocks=[6, 7], router=First(), disturb=events)
    assert statuses(result) == [FINISHED] * 2
    rows = result.records.requests.as_columns()
    first = dict(zip(rows["request"].tolist(), rows["first_token_ns"].tolist(), strict=True))
    assert first[0] > 50_000 > first[1]


def test_who_is_held_by_a_client_that_is_gone_for_good_fails_with_the_reason() -> None:
    for at in (0, 500):
        result = play(table([10, 20], [90, 4], [9, 9]), num_clients=2, num_blocks=[6, 7], router=First(),
                      disturb=disturbed(Down(at, "gpu-1")))  # fmt: skip
        assert statuses(result) == [REJECTED, FINISHED]
        assert result.records.reasons == ["gpu-1 went down for good"]


def test_a_kv_cache_for_a_client_that_is_down_is_computed_again_there() -> None:
    events = disturbed(Down(0, "gpu-2"), Up(50_000, "gpu-2"))
    result = play(table([10], [64], [40]), num_clients=3, serves=[PROMPTS, DECODES, DECODES], num_blocks=[6, 5, 7],
                  router=First(), nic=LINK, disturb=events)  # fmt: skip
    assert statuses(result) == [FINISHED]
    assert clients_of(result, DECODE) == {0: 2}


def test_who_waits_is_placed_once_the_client_that_holds_it_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not whenever others come and go; and of clients that are alike one is asked whether it holds a task."""
    asked: list[int] = []
    parked: list[int] = []
    holds, park = Tenant._holds, Coordinator._park

    def counted(tenant: Tenant, client: Client, task: Task) -> bool:
        asked.append(client.index)
        return holds(tenant, client, task)

    def noted(coordinator: Coordinator, task: Task, now: int) -> None:
        parked.append(task.request.index)
        park(coordinator, task, now)

    monkeypatch.setattr(Tenant, "_holds", counted)
    monkeypatch.setattr(Coordinator, "_park", noted)
    others = [event for at in range(100, 1000, 100) for event in (Down(at, "gpu-0"), Up(at + 50, "gpu-0"))]
    events = disturbed(Down(0, "gpu-1"), *others, Up(50_000, "gpu-1"))
    result = play(table([10, 20, 30], [90, 4, 90], [9] * 3), num_clients=6, num_blocks=[6, 7, 6, 6, 6, 6],
                  router=First(), disturb=events)  # fmt: skip
    assert statuses(result) == [FINISHED] * 3
    assert parked == [0, 2]
    assert len(asked) == 2 * (2 + 2 + 2)  # when they came, were parked, and came again


# --- random clusters ---


@dataclass(frozen=True)
class Cluster:
    serves: tuple[tuple[str, ...], ...]
    num_blocks: tuple[int, ...]
    reach: dict[int, frozenset[int]]

    def holds(self, client: int, tokens: int, scenario: SmallScenario) -> bool:
        return -(-tokens // scenario.block_size) + scenario.watermark <= self.num_blocks[client]

    def serves_it(self, prompt: int, output: int, scenario: SmallScenario) -> bool:
        """Whether a client computes `prompt` and decodes on, or hands over to one of its reach that does."""
        whole, everybody = prompt + max(0, output - 1), range(len(self.serves))
        decoders = {i for i in everybody if DECODE in self.serves[i] and self.holds(i, whole, scenario)}
        for i in (i for i in everybody if PREFILL in self.serves[i]):
            if i in decoders:
                return True
            sends = DECODE not in self.serves[i] and self.holds(i, prompt, scenario)
            if sends and (output < 2 or decoders & self.reach.get(i, decoders)):
                return True
        return False


@st.composite
def clusters(draw: st.DrawFn) -> Cluster:
    some = st.lists(st.sampled_from([BOTH, PROMPTS, DECODES]), max_size=2)
    serves = [*draw(some), *draw(st.sampled_from([[BOTH], [PROMPTS, DECODES], [PROMPTS, DECODES] * 2]))]
    blocks = draw(st.lists(st.integers(1, 30), min_size=len(serves), max_size=len(serves)))
    decoders = [i for i, kinds in enumerate(serves) if DECODE in kinds]
    senders = [i for i, kinds in enumerate(serves) if DECODE not in kinds]
    receivers = st.sets(st.sampled_from(decoders), min_size=1, max_size=2).map(frozenset)
    reach = {i: draw(receivers) for i in senders} if draw(st.booleans()) else {}
    return Cluster(tuple(serves), tuple(blocks), reach)


@settings(max_examples=200)
@given(small_scenarios(), clusters(), st.sampled_from(POLICIES), st.sampled_from(ROUTERS), st.booleans())
def test_only_those_fail_that_no_client_holds(
    scenario: SmallScenario, cluster: Cluster, policy: Any, router: type[RoutingPolicy], at_arrival: bool
) -> None:
    result = scenario.play(policy, router=router(), num_clients=len(cluster.serves), serves=cluster.serves,
                           num_blocks=cluster.num_blocks, nic=LINK, terms=Terms(at_arrival, reach=cluster.reach),
                           )  # fmt: skip
    expected = [cluster.serves_it(prompt, output, scenario) for _, prompt, output, _ in scenario.requests]
    assert statuses(result) == [FINISHED if each else REJECTED for each in expected]


# --- who has nothing of it ---


def test_equal_clients_are_not_looked_at_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tenant, "able", None)
    serves = [PROMPTS, PROMPTS, DECODES, DECODES]
    terms = Terms(reach={0: frozenset([2]), 1: frozenset([3])})
    result = play(table([0, 1, 2], [90, 8, 200], [9] * 3), num_clients=4, num_blocks=7, serves=serves, terms=terms)
    assert statuses(result) == [FINISHED, FINISHED, REJECTED]
    pools = [100, 100, 7, 7]  # that differ, each of equal clients
    assert statuses(play(table([0], [90], [9]), num_clients=4, num_blocks=pools, serves=serves)) == [FINISHED]


# --- scenarios ---

UNLIKE = """\
workload:
  arrivals: {poisson: {rate_per_s: 20}}
  num_requests: 40
  input_tokens: {uniform: {low: 100, high: 6000}}
  output_tokens: 30
clients:
  small: {device: h100-sxm, model: llama-3.1-8b, count: 2}
  big: {device: h100-sxm, model: llama-3.1-8b}
"""

APART = (
    UNLIKE.replace("8b", "8b, serves: [decode]")
    + "  prompts: {device: h100-sxm, model: llama-3.1-8b, serves: [prefill]}\n"
)


@pytest.mark.parametrize(
    "router", ["round_robin", "power_of_two", "heavy_light", "runtime_estimate", "session_affinity"]
)
@pytest.mark.parametrize("limit", ["kv_cache.num_blocks=200", "max_model_len=3000"])
def test_scenarios_of_unlike_pools_serve_all_that_one_of_them_holds(tmp_path: Path, router: str, limit: str) -> None:
    limits = (f"routing={router}", f"clients.small.{limit}", "view_refresh_s=0.1")
    for text in (UNLIKE, APART):
        rows = run(read(tmp_path, text, *limits), check=True).records.requests.as_columns()
        assert set(rows["status"].tolist()) == {FINISHED}
    rows = run(read(tmp_path, UNLIKE, *limits, "clients.big.max_model_len=5000")).records.requests.as_columns()
    longest = rows["input_tokens"] + 30 > 5000
    assert longest.any()
    assert ((rows["status"] == REJECTED) == longest).all()


def scaled_by(queue: dict[str, float], every_s: float, **scaling: object) -> tuple[str, ...]:
    given = {"rule": {"queue": queue, "every_s": every_s}, **scaling}
    return tuple(f"clients.small.{name}={json.dumps(value)}" for name, value in {"scaling": given, "count": 4}.items())


def test_a_pool_does_not_grow_for_tasks_that_it_never_holds(tmp_path: Path) -> None:
    """Until 8 s all that wait have more tokens than `small` holds."""
    sets = ("clients.small.kv_cache.num_blocks=50", *scaled_by({"above": 2, "below": 0.1}, 0.5))
    down = 'events=[{"at_s": 0, "client_down": "big", "for_s": 8}]'
    prompts = "workload.input_tokens={uniform: {low: 900, high: 6000}}"
    result = run(read(tmp_path, UNLIKE, *sets, prompts, down), check=True)
    assert set(result.records.requests.as_columns()["status"].tolist()) == {FINISHED}
    assert result.metrics["availability"]["pools"]["small"]["num_scaled_up"] == 0
