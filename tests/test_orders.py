"""Orders of admission and preemption, by hand: who stands in front, who has to go, and what a scenario says of it.

Each order keeps the contract in `test_testing.py` too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kit import POLICIES, SmallScenario, decode, play, small_scenarios, table, task
from mist.batching import BatchingPolicy
from mist.batching.chunked import Chunked
from mist.batching.orders.earliest_deadline import EarliestDeadline
from mist.batching.orders.fcfs import FCFS
from mist.batching.orders.least_predicted_work import LeastPredictedWork
from mist.batching.orders.priority import Priority
from mist.batching.orders.shortest_prompt import ShortestPrompt
from mist.request import NO_DEADLINE, Batch, Request, Task
from mist.reservations import Reservations
from mist.residents import Residents
from mist.scenario import load
from mist.scenario.remarks import remarks
from mist.testing import record_bytes
from ordered import ORDERS, ByArrival, hinted, indices, play_small, residents

# --- what each order decides ---


def test_priority_is_the_number_then_the_arrival() -> None:
    tasks = [hinted(i, priority=p, arrival_ns=a) for i, (p, a) in enumerate([(1, 0), (0, 9), (0, 3), (-1, 99), (1, 0)])]
    assert indices(residents(Priority(), *tasks).waiting) == [3, 2, 1, 0, 4]


def test_the_shortest_prompt_stands_in_front() -> None:
    assert indices(residents(ShortestPrompt(), *(task(i, n) for i, n in enumerate([9, 3, 9, 4]))).waiting) == [
        1,
        3,
        0,
        2,
    ]


def test_least_predicted_work_adds_prompt_and_prediction() -> None:
    tasks = [hinted(i, n, predicted_output_tokens=p) for i, (n, p) in enumerate([(9, 5), (13, 0), (1, 14), (20, 1)])]
    assert indices(residents(LeastPredictedWork(), *tasks).waiting) == [1, 0, 2, 3]


def test_who_has_no_deadline_comes_last() -> None:
    tasks = [hinted(i, deadline_ns=d) for i, d in enumerate([NO_DEADLINE, 50, NO_DEADLINE, 20])]
    assert indices(residents(EarliestDeadline(), *tasks).waiting) == [3, 1, 0, 2]


def test_sizes_tell_priority_deadline_and_prediction() -> None:
    request = Request(0, 7, 5, 9, sizes={"priority": 3, "deadline_ms": 2, "predicted_output_tokens": 11, "other": 1})
    assert (request.priority, request.deadline_ns, request.predicted_output_tokens) == (3, 2_000_007, 11)
    assert Request(0, 7, 5, 9).deadline_ns == NO_DEADLINE


def test_without_predictions_each_request_is_a_mean_one() -> None:
    seen = []

    class Spy(ByArrival):
        def key(self, task: Task) -> tuple[int, ...]:
            seen.append(task.request.predicted_output_tokens)
            return ()

    play(table([0, 0, 0], [5, 5, 5], [1, 2, 9]), policy=lambda: Chunked(order=Spy()))
    assert seen == [4, 4, 4]


# --- admission and preemption by hand ---


def running(who: Residents, *tasks: Task) -> None:
    for one in tasks:
        who.enqueue(one)
        assert who.admit(one, one.target_tokens)
        who.computed(one, one.target_tokens)
        who.cohort.join(one, 50)
    who.chunks_done()


def with_priority(one: Task, priority: int) -> Task:
    one.request.priority = priority
    return one


def test_the_last_in_the_order_is_preempted_and_waits_at_its_place() -> None:
    who = residents(Priority(), blocks=6)
    low, high, middle = (with_priority(decode(i, 8, 60), p) for i, p in enumerate([9, 0, 5]))
    running(who, low, high, middle)
    who.enqueue(hinted(7, 4, priority=6))
    assert who.grow_decodes() == 1  # each needs a block, and there is none: the first admitted goes, and frees two
    assert indices(who.running.values()) == [1, 2]
    assert indices(who.waiting) == [7, 0]
    assert who.kv.free == 0


def test_who_has_grown_is_not_preempted_for_who_ranks_before() -> None:
    """The first admitted would grow first and take the last block; by rank it goes with exactly what it holds."""
    who = residents(Priority(), blocks=5)
    running(who, with_priority(decode(0, 8, 60), 9), with_priority(decode(1, 8, 60), 0))
    assert who.grow_decodes() == 1
    assert indices(who.running.values()) == [1]
    assert who.kv.free == 2
    assert who.held_blocks(who.running[2]) == 3


def test_a_prompt_preempts_decodes_that_have_grown_in_this_step() -> None:
    """They give back what they hold, and the next step knows that no decode has grown."""
    who = residents(Priority(), blocks=6)
    long, short = hinted(0, 24, priority=0), with_priority(decode(1, 7, 60), 9)
    running(who, short)
    who.enqueue(long)
    policy = Chunked(max_num_batched_tokens=13, max_num_seqs=9)
    batch = policy.next_batch(who, who.cohort, who, 0)
    assert batch == Batch([(long, 12)], decode=True)
    who.decode_step_done()
    who.chunks_done()
    who.computed(long, 12)
    who.begin()
    batch = policy.next_batch(who, who.cohort, who, 0)  # 3 blocks more for the prompt, 1 for the decode: it had to go
    assert batch == Batch([(long, 12)], decode=True)
    assert who.cohort.count == 0
    assert who.kv.free == 0
    who.chunks_done()
    assert who.computed(long, 12)
    who.cohort.join(long, 5)
    assert who.held_blocks(long) == 6


def test_a_decode_that_was_handed_over_goes_before_who_ranks_behind() -> None:
    who = residents(Priority(), blocks=6)
    running(who, with_priority(decode(0, 16, 60), 0))
    handed = with_priority(decode(1, 12, 60), 1)
    handed.admission, handed.computed_tokens = -1, 12
    who.enqueue(handed)
    for i, priority in enumerate([2, 1, 0], start=2):
        who.enqueue(hinted(i, 4, priority=priority))
    assert Reservations(who).take_over(9) is None  # no room, and one of priority 0 waits
    assert who.admit(who.waiting[0], 4)
    assert indices(who.waiting) == [3, 2]
    assert not who.admit(who.waiting[0], 4)  # there is room for it, but the other came first


# --- first come, first served ---


@settings(max_examples=60)
@given(small_scenarios(), st.sampled_from(POLICIES))
def test_first_come_by_keys_is_the_plain_queue(scenario: SmallScenario, policy: type[Any]) -> None:
    plain, ranked = (play_small(scenario, policy, order) for order in (FCFS(), ByArrival()))
    assert plain.clients[0].residents.ranks is None
    assert record_bytes(plain.records) == record_bytes(ranked.records)


@settings(max_examples=40)
@given(small_scenarios(), st.sampled_from(POLICIES), st.sampled_from(ORDERS))
def test_equals_are_served_as_they_come(
    scenario: SmallScenario, policy: Callable[..., BatchingPolicy], order: type[Any]
) -> None:
    """Requests alike in all that orders read: every order is first come, first served."""
    requests = tuple((arrival, 9, output, keys) for arrival, _, output, keys in scenario.requests)
    alike = SmallScenario(requests, scenario.max_num_seqs, scenario.max_num_batched_tokens, scenario.num_blocks + 9)
    limits = {"max_num_seqs": alike.max_num_seqs, "max_num_batched_tokens": alike.max_num_batched_tokens}
    plain, ranked = (
        play(alike.workload(), policy=partial(policy, **limits, order=o()), num_blocks=alike.num_blocks, block_size=4)
        for o in (FCFS, order)
    )
    assert record_bytes(plain.records) == record_bytes(ranked.records)


# --- scenarios ---


SCENARIO = {
    "workload": {"arrivals": {"poisson": {"rate_per_s": 20}}, "num_requests": 60, "input_tokens": 500,
                 "output_tokens": 30, "sizes": {"priority": {"uniform": {"low": 1, "high": 3}}}},
    "clients": {"gpu": {"device": "h100-sxm", "model": "llama-3.1-8b", "perf": "roofline",
                        "batching": {"chunked": {"order": "priority", "max_num_seqs": 2}}}},
}  # fmt: skip


def test_a_scenario_names_the_order_of_its_policies() -> None:
    scenario = load(SCENARIO)
    batching = scenario.resolved()["clients"]["gpu"]["batching"]
    assert batching["chunked"]["order"] == {"priority": {}}
    assert load(scenario.resolved()).resolved() == scenario.resolved()
    result = scenario.run(check=True)
    assert result.metrics["requests"]["finished"] == 60
    plain = load(SCENARIO, **{"clients.gpu.batching.chunked.order": "fcfs"}).run(check=True).records
    assert plain.requests.cells != result.records.requests.cells


def test_a_priority_that_no_order_reads_is_remarked_upon() -> None:
    assert not any("priority" in remark for remark in remarks(load(SCENARIO)))
    plain = load(SCENARIO, ["clients.gpu.batching=chunked"])
    assert any("change nothing: priority" in remark for remark in remarks(plain))


def test_first_come_first_served_is_the_default() -> None:
    scenario = load(SCENARIO, ["clients.gpu.batching=continuous"])
    assert scenario.resolved()["clients"]["gpu"]["batching"]["continuous"]["order"] == {"fcfs": {}}


@pytest.mark.parametrize(
    ("order", "words"),
    [
        ("priorty", "there is no order 'priorty'"),
        ("7", "must be an order by name"),
        ("{priority: {levels: 3}}", "there is no key 'levels' here"),
    ],
)
def test_a_wrong_order_is_told(order: str, words: str) -> None:
    with pytest.raises(Exception, match=words):
        load(SCENARIO, [f"clients.gpu.batching.chunked.order={order}"])
