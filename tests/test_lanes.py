"""What the schedulers of one replica share: stages as a flow shop, a common step of attention groups, and their laws.

Examples computed by hand, equalities with lone clients, and a recount of every step's end from the records.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from math import ceil, floor
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mist
from kit import POLICIES, LinearSteps, Run, SmallScenario, engine, play, rows, small_scenarios, table
from mist.batching.chunked import Chunked
from mist.client import Client
from mist.errors import InvariantError
from mist.kernel import FOREVER, Kernel
from mist.lanes import Lane, Stages, share_stages
from mist.request import Batch, ClientView, Step, Task, Wait
from mist.testing import record_bytes

few = settings(max_examples=60, deadline=None)
policies = st.sampled_from(POLICIES)

#: a step takes 10 ns per prompt token and nothing else
TEN_A_TOKEN = LinearSteps(base=0, per_prefill_token=10, per_decode=0, per_context=0, per_prefill=0)


class SharedSteps(LinearSteps):
    """And 6 ns for each of the tokens that a group has in the mean."""

    def step_time(self, step: Step) -> int:
        return super().step_time(step) + 6 * (step.shared_tokens or step.num_tokens)


def lanes(num_stages: int, first: int = 0) -> Callable[[Kernel, list[Client]], None]:
    """The clients from `first` on are one replica."""
    return lambda kernel, clients: share_stages(clients[first:], num_stages, kernel)


def one_by_one() -> Chunked:
    return Chunked(max_num_batched_tokens=1000, max_num_seqs=1)


def steps(run: Run) -> list[tuple[int, int, int]]:
    """(client, start, end) of each step, by its start."""
    columns = run.records.steps.as_columns()
    found = zip(*(columns[name].tolist() for name in ("client", "start_ns", "end_ns")), strict=True)
    return sorted(found, key=lambda step: (step[1], step[0]))


# --- stages ---


@given(st.integers(1, 64), st.integers(0, 1 << 60), st.integers(1, 1 << 40))
def test_a_step_alone_lasts_what_it_lasts(num_stages: int, now: int, duration: int) -> None:
    assert Stages(num_stages).leave(now, duration) == now + duration


def test_unequal_steps_are_a_flow_shop() -> None:
    """Two stages, steps of 100, 40 and 20 ns in one lane, of 20 and 60 ns in the other, computed by hand.

    stage 0: 0-50 | 50-60 |         100-120 | 120-150 | 150-160
    stage 1:        50-100 | 100-110 | 120-140 | 150-180 | 180-190
    """
    workload = table([0] * 5, [10, 2, 4, 6, 2], [0] * 5)
    run = play(workload, policy=one_by_one, perf=TEN_A_TOKEN, num_clients=2, prepare=lanes(2))
    assert steps(run) == [(0, 0, 100), (1, 0, 110), (0, 100, 140), (1, 110, 180), (0, 140, 190)]


@given(st.integers(1, 5), st.integers(1, 1000), st.integers(2, 30))
def test_busy_lanes_of_equal_steps_take_one_step_each_per_step_time(lanes_: int, step_ns: int, outputs: int) -> None:
    """P lanes end P steps per step time, exactly, and nowhere more."""
    perf = LinearSteps(step_ns, 0, 0, 0, 0)
    workload = table([0] * lanes_, [1] * lanes_, [outputs] * lanes_)
    run = play(workload, perf=perf, num_clients=lanes_, prepare=lanes(lanes_))
    ends = sorted(end for _, _, end in steps(run))
    assert len(ends) == lanes_ * outputs
    assert all(later - sooner == step_ns for sooner, later in zip(ends, ends[lanes_:], strict=False))
    assert ends[:lanes_] == [step_ns + lane * step_ns // lanes_ for lane in range(lanes_)]


@few
@given(small_scenarios(), policies, st.integers(2, 4))
def test_no_stage_holds_two_steps(scenario: SmallScenario, policy: Any, num_stages: int) -> None:
    """With constant steps of d, no d contains more than P ends, whatever arrives."""
    run = scenario.play(policy, perf=LinearSteps(1001, 0, 0, 0, 0), num_clients=num_stages, prepare=lanes(num_stages))
    ends = sorted(end for _, _, end in steps(run))
    assert all(later - sooner >= 1001 for sooner, later in zip(ends, ends[num_stages:], strict=False))


# --- the common step ---


def test_groups_keep_step() -> None:
    """Prompts for two groups in turn; the times are 50 and 30, 40, 10, and 20 ns, computed by hand.

    The third waits for the slower group's end; the fourth comes while its own group has nothing and the other is at
    work; the last finds everybody idle.
    """
    workload = table([0, 0, 20, 60, 200], [5, 3, 4, 1, 2], [0] * 5)
    run = play(workload, policy=one_by_one, perf=TEN_A_TOKEN, num_clients=2, prepare=lanes(1))
    assert steps(run) == [(0, 0, 50), (1, 0, 50), (0, 50, 90), (1, 90, 100), (0, 200, 220)]


def test_groups_share_what_all_of_them_have() -> None:
    """10 ns per own token and 6 per mean token of two groups, rounded up, computed by hand.

    5 and 2 tokens: 50 + 6·4 = 74. 4 alone: 40 + 6·2 = 52. 3 and 3: 30 + 6·3 = 48, as if each had its own experts.
    """
    perf = SharedSteps(base=0, per_prefill_token=10, per_decode=0, per_context=0, per_prefill=0)
    workload = table([0, 0, 100, 200, 200], [5, 2, 4, 3, 3], [0] * 5)
    run = play(workload, policy=one_by_one, perf=perf, num_clients=2, prepare=lanes(1))
    assert steps(run) == [(0, 0, 74), (1, 0, 74), (0, 100, 152), (0, 200, 248), (1, 200, 248)]


def test_common_steps_pass_the_stages() -> None:
    """Two lanes of two groups: 100 and 20 ns in the first lane, 60 and 40 ns in the second, which waits at stage 0."""
    workload = table([0] * 4, [10, 2, 6, 4], [0] * 4)
    run = play(workload, policy=one_by_one, perf=TEN_A_TOKEN, num_clients=4, prepare=lanes(2))
    assert steps(run) == [(0, 0, 100), (1, 0, 100), (2, 0, 130), (3, 0, 130)]


class Ticking(Chunked):
    """Batches what came within each 10 µs."""

    def next_batch(self, queue: Any, cohort: Any, budget: Any, now: int) -> Batch | Wait:
        if now % 10_000 and not cohort.count and len(queue):
            return Wait(now + 10_000 - now % 10_000)
        return super().next_batch(queue, cohort, budget, now)


def test_a_group_that_waits_until_a_time_lets_the_others_go_on() -> None:
    """Group 0 takes 10 ns steps from 10,000 on; group 1's request of 15,000 waits for the next 10 µs."""
    perf = LinearSteps(10, 0, 0, 0, 0)
    run = play(table([0, 15_000], [1, 1], [3000, 1]), policy=Ticking, perf=perf, num_clients=2, prepare=lanes(1))
    assert [step for step in steps(run) if step[0] == 1] == [(1, 20_000, 20_010)]
    assert [step for step in steps(run) if step[0] == 0] == [(0, 10 * i, 10 * i + 10) for i in range(3000)]
    assert run.kernel.num_events == 3  # two arrivals and one timer, not one for each of the common steps


# --- every step, recounted ---


def recount(run: Run, num_stages: int, num_groups: int, perf: LinearSteps) -> None:
    """Every step ends when its start and the sizes of its common step say, with Fractions, stage by stage."""
    names = ("start_ns", "client", "num_prefill_tokens", "num_decodes", "decode_context", "num_prefills", "end_ns")
    columns = run.records.steps.as_columns()
    found = sorted(zip(*(columns[name].tolist() for name in names), strict=True))
    common: dict[tuple[int, int], tuple[int, set[int]]] = {}
    tokens: dict[tuple[int, int], int] = {}
    for start, client, *sizes, end in found:
        which = (start, client // num_groups)
        longest, ends = common.get(which, (0, set()))
        common[which] = (max(longest, perf.of(*sizes)), ends | {end})
        tokens[which] = tokens.get(which, 0) + sizes[0] + sizes[1]
    if isinstance(perf, SharedSteps):
        common = {
            which: (own + 6 * ceil(Fraction(tokens[which], num_groups)), ends) for which, (own, ends) in common.items()
        }
    left = [Fraction(0)] * num_stages
    for (start, _), (duration, ends) in common.items():
        at = Fraction(start)
        for stage in range(num_stages):
            at = left[stage] = max(at, left[stage]) + Fraction(duration, num_stages)
        assert ends == {floor(at)}
    for lane in range(num_stages):
        spans = [(start, *ends) for (start, which), (_, ends) in common.items() if which == lane]
        assert all(start >= end for (_, end), (start, _) in pairwise(spans))
        starts_late = {start for (_, end), (start, _) in pairwise(spans) if start > end}
        tasks = run.records.tasks.as_columns()
        mine = tasks["client"] // num_groups == lane
        assert starts_late <= set(tasks["queued_ns"][mine].tolist())  # nobody waits where nothing is in flight


@settings(max_examples=300, deadline=None)
@given(
    small_scenarios(gap_ns=500), policies, st.integers(1, 3), st.integers(1, 3), st.sampled_from([0, 2, 5]),
    st.sampled_from([FOREVER, 5000]), st.sampled_from([LinearSteps(), SharedSteps()]),
)  # fmt: skip
def test_every_step_is_recounted(
    scenario: SmallScenario, policy: Any, num_stages: int, num_groups: int, concurrency: int, until: int,
    perf: LinearSteps,
) -> None:  # fmt: skip
    if concurrency:
        scenario = replace(scenario, concurrency=concurrency)
    run = scenario.play(
        policy, perf=perf, num_clients=num_stages * num_groups, prepare=lanes(num_stages), until_ns=until
    )
    recount(run, num_stages, num_groups, perf)


# --- equalities with lone clients ---


@few
@given(small_scenarios(), policies, st.integers(1, 3), st.sampled_from([0, 3]))
def test_a_lane_to_itself_changes_nothing(
    scenario: SmallScenario, policy: Any, num_clients: int, concurrency: int
) -> None:
    if concurrency:
        scenario = replace(scenario, concurrency=concurrency)

    def alone(kernel: Kernel, clients: list[Client]) -> None:
        for client in clients:
            share_stages([client], 1, kernel)

    profile = engine(step_ns=100, token_ns=3, request_ns=70)
    lone, laned = (
        scenario.play(policy, num_clients=num_clients, engine_profile=profile, prepare=prepare)
        for prepare in (None, alone)
    )
    assert rows(lone.records) == rows(laned.records)


@dataclass
class ToTheFirst:
    def choose(self, task: Task, views: Any, now: int) -> ClientView:
        return views[0]  # type: ignore[no-any-return]


@few
@given(small_scenarios(), policies, st.integers(1, 3), st.integers(1, 3))
def test_lanes_and_groups_without_work_take_no_time(
    scenario: SmallScenario, policy: Any, num_stages: int, num_groups: int
) -> None:
    alone = scenario.play(policy)
    run = scenario.play(policy, num_clients=num_stages * num_groups, router=ToTheFirst(), prepare=lanes(num_stages))
    assert rows(run.records) == rows(alone.records)


@few
@given(small_scenarios(), policies, st.integers(2, 3), st.sampled_from([LinearSteps(), SharedSteps()]))
def test_groups_of_equal_work_are_as_fast_as_one(
    scenario: SmallScenario, policy: Any, num_groups: int, perf: LinearSteps
) -> None:
    """Each request comes once for every group: each is what a lone client is."""
    twins = replace(scenario, requests=tuple(r for r in scenario.requests for _ in range(num_groups)))
    run = twins.play(policy, num_clients=num_groups, perf=perf, prepare=lanes(1))
    alone = scenario.play(policy, perf=perf)
    expected = [row[1:] for row in rows(alone.records)["steps"]]
    for group in range(num_groups):
        assert [row[1:] for row in rows(run.records)["steps"] if row[0] == group] == expected


@few
@given(small_scenarios(gap_ns=500), policies, st.sampled_from([0, 4]))
def test_running_ahead_beside_lanes_changes_nothing(scenario: SmallScenario, policy: Any, concurrency: int) -> None:
    """Two clients of their own beside a replica of two lanes of two groups."""
    if concurrency:
        scenario = replace(scenario, concurrency=concurrency)

    def once() -> Run:
        return scenario.play(policy, num_clients=6, prepare=lanes(2, first=2))

    ahead = once()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Kernel, "horizon", lambda kernel: kernel.now)
        assert rows(once().records) == rows(ahead.records)
    assert record_bytes(once().records) == record_bytes(ahead.records)


# --- the ledger ---


def forget_who_came(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Lane.wake
    monkeypatch.setattr(Lane, "wake", lambda lane, client: None if lane.stepping else original(lane, client))


def forget_the_boundary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lane, "wake", lambda lane, client: setattr(client, "woken", True))


def let_each_go_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lane, "wake", lambda lane, client: lane.kernel.wake(client))


def hurry_through_the_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stages, "leave", lambda stages, now, duration: now + duration - 1)


@pytest.mark.parametrize(
    ("sabotage", "says"),
    [
        (forget_who_came, r"gpu-1 was not woken for 1 waiting tasks"),
        (forget_the_boundary, r"gpu-0 was not woken for 1 waiting tasks"),
        (let_each_go_alone, r"gpu-0: the groups of its lane don't keep step"),
        (hurry_through_the_stages, r"gpu-0: a step ends 1 ns before its device has computed it"),
    ],
)
def test_a_planted_bug_is_caught(
    sabotage: Callable[[pytest.MonkeyPatch], None], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sabotage(monkeypatch)
    workload = table([0, 20, 60], [5, 3, 4], [4, 2, 3])
    with pytest.raises(InvariantError, match=says):
        play(workload, num_clients=2, prepare=lanes(1))


# --- from a scenario ---


def test_a_mixture_with_stages_and_groups() -> None:
    """Two replicas of two lanes of two groups: groups share their lane's steps, and replicas share nothing."""
    gpu = {"device": "h200-sxm", "model": "qwen3-30b-a3b", "count": 2, "tp": 1, "pp": 2, "attn_dp": 2, "ep": 2}
    lengths = {"input_tokens": {"lognormal": {"mean": 2000, "cv": 1}}, "output_tokens": 20}
    workload = {"arrivals": {"poisson": {"rate_per_s": 50}}, "num_requests": 200, **lengths}
    result = mist.run({"workload": workload, "clients": {"gpu": gpu}, "perf": "roofline"}, check=True)
    assert result.records.client_names == [f"gpu-{replica}.{group}" for replica in (0, 1) for group in range(4)]
    columns = result.records.steps.as_columns()
    spans = set(zip(columns["client"].tolist(), columns["start_ns"].tolist(), columns["end_ns"].tolist(), strict=True))
    for pair in ((0, 1), (2, 3), (4, 5), (6, 7)):
        first, second = ({(start, end) for client, start, end in spans if client == one} for one in pair)
        assert len(first & second) > 0.2 * min(len(first), len(second))
    assert not {span[1:] for span in spans if span[0] < 4} & {span[1:] for span in spans if span[0] >= 4}
