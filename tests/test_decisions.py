"""What each batching policy and router decides on hand-made states, and what a client rejects."""

from __future__ import annotations

from typing import Any

import pytest

from kit import POLICIES, SmallScenario, decode, play, residents, table, task
from mist.batching.chunked import Chunked
from mist.batching.continuous import Continuous
from mist.batching.decode_only import DecodeOnly
from mist.batching.mixed import Mixed
from mist.batching.orders.priority import Priority
from mist.batching.prefill_only import PrefillOnly
from mist.batching.sglang import SGLang
from mist.batching.static import Static
from mist.batching.tensorrt_llm import TensorRTLLM
from mist.memory.kv_cache import KVCache
from mist.request import Batch, ClientView, Task, Wait
from mist.residents import Residents
from mist.routing.join_shortest_queue import JoinShortestQueue
from mist.routing.least_outstanding import LeastOutstanding
from mist.routing.round_robin import RoundRobin
from reference import Job, Reference

# --- batching policies ---


def running(who: Residents, *tasks: Task) -> None:
    """Admit these and let them join the cohort."""
    for one in tasks:
        who.enqueue(one)
        who.admit(one, one.target_tokens)
        who.computed(one, one.target_tokens)
        who.cohort.join(one, 50)
    who.chunks_done()


def next_batch(policy: Any, who: Residents, now: int = 0) -> Batch | Wait:
    return policy.next_batch(who, who.cohort, who, now)


def sizes(batch: Batch | Wait) -> tuple[list[tuple[int, int]], bool]:
    assert isinstance(batch, Batch)
    return [(one.request.index, n) for one, n in batch.chunks], batch.decode


@pytest.mark.parametrize("policy", [*POLICIES, PrefillOnly, DecodeOnly])
def test_nothing_to_do_is_a_wait(policy: Any) -> None:
    assert next_batch(policy(), residents(KVCache(9, 4))) == Wait(None)


def test_chunked_decodes_first_and_fills_the_rest_with_chunks() -> None:
    who = residents(KVCache(99, 4))
    running(who, decode(0, 5, 60), decode(1, 6, 60))
    who.enqueue(task(2, 7))
    who.enqueue(task(3, 20))
    who.enqueue(task(4, 3))
    policy = Chunked(max_num_batched_tokens=16, max_num_seqs=9)
    assert sizes(next_batch(policy, who)) == ([(2, 7), (3, 7)], True)
    assert [t.request.index for t in who.waiting] == [4]


def test_chunked_goes_on_with_prompts_before_admitting() -> None:
    who = residents(KVCache(99, 4), task(0, 20), task(1, 3))
    policy = Chunked(max_num_batched_tokens=12, max_num_seqs=9)
    first = next_batch(policy, who)
    assert sizes(first) == ([(0, 12)], True)
    who.chunks_done()
    assert isinstance(first, Batch)
    assert not who.computed(first.chunks[0][0], 12)
    assert sizes(next_batch(policy, who)) == ([(0, 8), (1, 3)], True)


def test_chunked_admits_nothing_on_a_step_that_preempted() -> None:
    who = residents(KVCache(4, 4))
    first, second = decode(0, 8, 60), decode(1, 8, 60)
    running(who, first, second)
    who.enqueue(task(2, 1))
    assert sizes(next_batch(Chunked(16, 9), who)) == ([], True)
    assert [t.request.index for t in who.waiting] == [1, 2]
    assert who.kv.free == 1  # two blocks and a new one are held by the first
    assert list(who.running.values()) == [first]


def test_chunked_stops_at_max_num_seqs() -> None:
    who = residents(KVCache(99, 4), *(task(i, 2) for i in range(5)))
    assert sizes(next_batch(Chunked(16, 3), who)) == ([(0, 2), (1, 2), (2, 2)], True)


def test_continuous_computes_whole_prompts_or_decodes() -> None:
    who = residents(KVCache(99, 4))
    running(who, decode(0, 5, 60))
    for i, tokens in enumerate([6, 6, 9], start=1):
        who.enqueue(task(i, tokens))
    policy = Continuous(max_num_batched_tokens=14, max_num_seqs=9)
    assert sizes(next_batch(policy, who)) == ([(1, 6), (2, 6)], False)
    who = residents(KVCache(99, 4), task(0, 50), task(1, 1))
    assert sizes(next_batch(policy, who)) == ([(0, 50)], False)  # too long for the budget, so alone
    who = residents(KVCache(2, 4))
    running(who, decode(0, 5, 60))
    who.enqueue(task(1, 3))
    assert sizes(next_batch(policy, who)) == ([], True)  # no block for it


def test_a_threshold_lets_others_through_beside_a_long_prompt() -> None:
    who = residents(KVCache(99, 4), task(0, 40), task(1, 5), task(2, 9))
    policy = Chunked(max_num_batched_tokens=12, max_num_seqs=9, long_prefill_token_threshold=5)
    first = next_batch(policy, who)
    assert sizes(first) == ([(0, 5), (1, 5), (2, 2)], True)
    assert isinstance(first, Batch)
    for one, num_tokens in first.chunks:
        who.computed(one, num_tokens)
    who.chunks_done()
    assert sizes(next_batch(policy, who)) == ([(0, 5), (2, 5)], True)


def test_who_makes_room_gives_its_chunk_back() -> None:
    """Three prompts half computed in 10 blocks: the second's chunk makes the least urgent go, which has its own."""
    who = Residents(KVCache(10, 4), lambda task: None, order=Priority())
    for index, priority in enumerate((9, 1, 2)):
        one = task(index, 32)
        one.request.priority = priority
        who.enqueue(one)
        assert who.admit(one, 12) == 12
        who.computed(one, 12)
    who.chunks_done()
    policy = Chunked(max_num_batched_tokens=12, max_num_seqs=9, long_prefill_token_threshold=4)
    assert sizes(next_batch(policy, who)) == ([(1, 4), (2, 4)], True)
    assert [one.request.index for one in who.waiting] == [0]
    assert who.kv.free == 2


def test_mixed_computes_whole_prompts_beside_decodes_or_before_them() -> None:
    who = residents(KVCache(99, 4))
    running(who, decode(0, 5, 60), decode(1, 6, 60))
    for i, tokens in enumerate([6, 5, 3, 15, 40], start=2):
        who.enqueue(task(i, tokens))
    policy = Mixed(max_num_batched_tokens=16, max_num_seqs=9)
    assert sizes(next_batch(policy, who)) == ([(2, 6), (3, 5), (4, 3)], True)  # 14 tokens and two decodes
    who.decode_step_done()
    assert sizes(next_batch(policy, who)) == ([(5, 15)], False)  # no room beside two decodes, so before them
    assert sizes(next_batch(policy, who)) == ([(6, 40)], False)  # longer than any step, so alone
    assert sizes(next_batch(policy, who)) == ([], True)


def test_mixed_makes_room_for_decodes_before_it_admits() -> None:
    who = residents(KVCache(4, 4))
    running(who, decode(0, 8, 60), decode(1, 4, 60))
    who.enqueue(task(2, 3))
    assert sizes(next_batch(Mixed(16, 9), who)) == ([], True)  # the last block but one preempts the second decode
    assert [t.request.index for t in who.waiting] == [1, 2]


def test_prefill_only_never_decodes_and_decode_only_computes_again_what_was_preempted() -> None:
    who = residents(KVCache(99, 4), task(0, 6), task(1, 6), task(2, 9))
    assert sizes(next_batch(PrefillOnly(14, 9), who)) == ([(0, 6), (1, 6)], False)
    assert sizes(next_batch(PrefillOnly(14, 9), who)) == ([(2, 9)], False)
    assert next_batch(PrefillOnly(14, 9), who) == Wait(None)
    who = residents(KVCache(4, 4))
    running(who, decode(0, 8, 60), decode(1, 8, 60))
    policy = DecodeOnly(16, 9)
    assert sizes(next_batch(policy, who)) == ([], True)
    assert [t.request.index for t in who.waiting] == [1]
    who.begin()
    who.drop(who.running[next(iter(who.running))])
    assert sizes(next_batch(policy, who)) == ([(1, 9)], False)  # its context and the token sampled last


def test_a_delay_factor_holds_prompts_back_while_something_runs() -> None:
    policy = Continuous(max_num_batched_tokens=16, max_num_seqs=9, delay_factor=0.5)
    who = residents(KVCache(99, 4), task(0, 6))
    assert sizes(next_batch(policy, who, 1000)) == ([(0, 6)], False)  # nothing runs: no delay
    who = residents(KVCache(99, 4))
    running(who, decode(1, 5, 60))
    late = task(2, 6)
    late.queued_ns = 1900
    who.enqueue(late)
    assert sizes(next_batch(policy, who, 2000)) == ([], True)  # the last took 1000 ns, and it has waited 100
    assert sizes(next_batch(policy, who, 2400)) == ([], True)  # half of it, and not longer
    assert sizes(next_batch(policy, who, 2401)) == ([(2, 6)], False)


@pytest.mark.parametrize("policy", [Continuous, Static])
def test_a_window_closes_when_a_batch_is_full_or_its_oldest_is_due(policy: Any) -> None:
    made = policy(max_num_batched_tokens=16, max_num_seqs=3, max_queue_delay_ms=0.01)
    who = residents(KVCache(99, 4), task(0, 4), task(1, 4))
    who.waiting[1].queued_ns = -500
    assert next_batch(made, who, 100) == Wait(9_500)
    assert sizes(next_batch(made, who, 9_500)) == ([(0, 4), (1, 4)], False)
    for each in ([4, 4, 4], [4, 12]):  # three tasks, or 16 tokens
        who = residents(KVCache(99, 4), *(task(i, n) for i, n in enumerate(each)))
        assert sizes(next_batch(made, who, 100)) == (list(enumerate(each)), False)


def test_tensorrt_llm_computes_decodes_and_then_whole_contexts() -> None:
    who = residents(KVCache(99, 4))
    running(who, decode(0, 5, 60), decode(1, 6, 60))
    for i, tokens in enumerate([6, 9, 2], start=2):
        who.enqueue(task(i, tokens))
    assert sizes(next_batch(TensorRTLLM(16, 9), who)) == ([(2, 6)], True)  # the next doesn't fit, nor is it passed by
    who.decode_step_done()
    who.computed(who.prefilling[0], 6)
    chunked = TensorRTLLM(16, 9, enable_chunked_context=True)
    assert sizes(next_batch(chunked, who)) == ([(3, 9), (4, 2)], True)
    who = residents(KVCache(99, 4), task(0, 40), task(1, 2))
    assert sizes(next_batch(TensorRTLLM(16, 9), who)) == ([(0, 40)], False)


def test_tensorrt_llm_has_a_capacity_policy() -> None:
    workload = table([0, 0], [8, 8], [20, 20])
    peaks = {}
    for name in ("guaranteed_no_evict", "max_utilization", "static_batch"):
        run = play(
            workload,
            policy=lambda: TensorRTLLM(64, 8, capacity_scheduler_policy=name),  # noqa: B023
            num_blocks=10,
            block_size=4,
        )
        rows = run.records.requests.as_columns()
        peaks[name] = int(run.records.steps.as_columns()["num_decodes"].max()), int(rows["num_preemptions"].sum())
    # 7 blocks each to the last token, 10 in all
    assert peaks == {"guaranteed_no_evict": (1, 0), "max_utilization": (2, 1), "static_batch": (1, 0)}
    who = residents(KVCache(99, 4))
    running(who, decode(0, 5, 60))
    who.enqueue(task(1, 3))
    assert sizes(next_batch(TensorRTLLM(16, 9, capacity_scheduler_policy="static_batch"), who)) == ([], True)


def test_sglang_computes_chunks_before_it_decodes() -> None:
    who = residents(KVCache(99, 4))
    running(who, decode(0, 5, 60))
    who.enqueue(task(1, 20))
    policy = SGLang(max_num_batched_tokens=12, max_num_seqs=9)
    first = next_batch(policy, who)
    assert sizes(first) == ([(1, 12)], False)
    assert isinstance(first, Batch)
    assert not who.computed(first.chunks[0][0], 12)
    who.chunks_done()
    who.enqueue(task(2, 7))
    assert sizes(next_batch(policy, who)) == ([(1, 8), (2, 4)], False)
    who = residents(KVCache(99, 4))
    running(who, decode(0, 5, 60))
    who.enqueue(task(1, 20))
    assert sizes(next_batch(SGLang(12, 9, enable_mixed_chunk=True), who)) == ([(1, 11)], True)


@pytest.mark.parametrize(("conservativeness", "admitted"), [(1.0, []), (0.1, [(1, 8)]), (0.0, [(1, 8)])])
def test_sglang_sets_aside_a_share_of_what_is_predicted(conservativeness: float, admitted: list[Any]) -> None:
    """40 tokens less 8 in use; the prompt of 8 needs 20 with its answer; 100 are predicted for what runs.

    At a ratio of 0.7 that is 70, and at 0.07 it is 7: 25 are left.
    """
    who = residents(KVCache(10, 4))
    first, second = decode(0, 8, 100), task(1, 8)
    first.request.predicted_output_tokens, second.request.predicted_output_tokens = 100, 12
    running(who, first)
    who.enqueue(second)
    policy = SGLang(64, 9, schedule_conservativeness=conservativeness)
    assert sizes(next_batch(policy, who)) == (admitted, not admitted)


def test_sglangs_ratio_decays_and_rises_when_blocks_run_out() -> None:
    who = residents(KVCache(6, 4))
    tasks = [decode(0, 8, 60), decode(1, 8, 60)]
    for one in tasks:
        one.request.predicted_output_tokens = 50
    running(who, *tasks)
    policy = SGLang(64, 9)
    for _ in range(4):
        next_batch(policy, who)
        who.decode_step_done()
    assert policy.new_token_ratio == pytest.approx(0.7 - 4 * 0.7 * 0.86 / 600)
    next_batch(policy, who)  # each needs a block more: the second goes
    assert len(who.running) == 1
    assert policy.new_token_ratio == pytest.approx((4 + 20) / 50)
    who.drop(tasks[0])
    next_batch(policy, who)
    assert policy.new_token_ratio == 0.7


def test_static_admits_only_when_nothing_runs() -> None:
    who = residents(KVCache(99, 4))
    running(who, decode(0, 5, 60))
    who.enqueue(task(1, 3))
    policy = Static(max_num_batched_tokens=14, max_num_seqs=2)
    assert sizes(next_batch(policy, who)) == ([], True)
    who = residents(KVCache(99, 4), task(0, 3), task(1, 4), task(2, 5))
    assert sizes(next_batch(policy, who)) == ([(0, 3), (1, 4)], False)


@pytest.mark.parametrize("policy", [*POLICIES, PrefillOnly, DecodeOnly])
@pytest.mark.parametrize("limits", [{"max_num_seqs": 0}, {"max_num_batched_tokens": 0}])
def test_policies_refuse_limits_of_nothing(policy: Any, limits: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="max_num"):
        policy(**limits)


def test_chunked_refuses_to_starve_decodes() -> None:
    with pytest.raises(ValueError, match="decodes would starve"):
        Chunked(max_num_batched_tokens=8, max_num_seqs=9)


# --- routers ---


def views(**values: tuple[int, ...]) -> list[ClientView]:
    made = [ClientView(i, f"gpu-{i}") for i in range(len(next(iter(values.values()))))]
    for name, column in values.items():
        for view, value in zip(made, column, strict=True):
            setattr(view, name, value)
    return made


def chosen(router: Any, seen: list[ClientView], times: int = 1) -> list[int]:
    return [router.choose(task(), seen, 0).index for _ in range(times)]


def test_round_robin_takes_turns_whatever_the_load() -> None:
    router = RoundRobin()
    assert chosen(router, views(num_outstanding=(9, 0, 5)), 7) == [0, 1, 2, 0, 1, 2, 0]
    assert chosen(RoundRobin(), views(num_outstanding=(9, 0))) == [0]


def test_least_outstanding_counts_tasks() -> None:
    assert chosen(LeastOutstanding(), views(num_outstanding=(3, 1, 2), pending_prefill_tokens=(0, 99, 0))) == [1]
    assert chosen(LeastOutstanding(), views(num_outstanding=(3, 2, 2))) == [1]


def test_shortest_queue_counts_prompt_tokens_then_tasks() -> None:
    router = JoinShortestQueue()
    assert chosen(router, views(num_outstanding=(1, 9, 5), pending_prefill_tokens=(50, 40, 60))) == [1]
    assert chosen(router, views(num_outstanding=(4, 2, 2), pending_prefill_tokens=(7, 7, 7))) == [1]


def test_routers_see_their_clients_as_they_are() -> None:
    seen: list[tuple[int, ...]] = []

    class Watching:
        def choose(self, task: Task, views: Any, now: int) -> ClientView:
            v = views[0]
            seen.append(
                (
                    v.num_outstanding,
                    v.num_waiting,
                    v.num_running,
                    v.pending_prefill_tokens,
                    v.decode_context,
                    v.kv_blocks_used,
                )
            )
            return v

    # steps of 1 µs: two prompts of 4 in one of 8 tokens, the third waits for a slot until the first two have ended
    play(
        table([0, 0, 500, 1500, 2500], [4, 4, 6, 1, 1], [3, 3, 0, 0, 0]),
        policy=lambda: Chunked(8, 2),
        num_clients=2,
        router=Watching(),
        block_size=4,
        perf=SmallLatency(),
    )
    assert seen == [
        (0, 0, 0, 0, 0, 0),
        (1, 1, 0, 4, 0, 0),
        (2, 0, 2, 8, 0, 2),
        (3, 1, 2, 6, 8, 4),
        (4, 2, 2, 7, 10, 4),
    ]


class SmallLatency:
    """Every step takes a microsecond."""

    def step_time(self, step: Any) -> int:
        return 1000

    def floor_time(self, step: Any) -> int:
        return 0


# --- what never fits ---


@pytest.mark.parametrize(
    ("prompt", "output", "says"),
    [
        (41, 0, "more tokens than the KV cache of gpu-0 holds (40)"),
        (30, 12, "more tokens than the KV cache of gpu-0 holds (40)"),
        (61, 0, "more tokens than max_model_len 60 of gpu-0"),
        (40, 1, ""),
        (30, 11, ""),
    ],
)
def test_what_never_fits_is_rejected_with_the_reason(prompt: int, output: int, says: str) -> None:
    run = play(table([0, 0], [prompt, 1], [output, 1]), num_blocks=10, block_size=4, max_model_len=60)
    rows = run.records.requests.as_columns()
    status = dict(zip(rows["request"].tolist(), rows["status"].tolist(), strict=True))
    assert status == {0: 1 if says else 0, 1: 0}
    assert run.records.reasons == ([says] if says else [])


# --- the oracle of the differential tests itself ---


def test_the_naive_scheduler_by_hand() -> None:
    """Two requests on one slot, by pencil: prompt 2 + 2 tokens, then prompt 1."""
    reference = Reference("chunked", 4, 1, 10, 2, lambda tokens, decodes, context, prefills: 10)
    reference.run([Job(0, 0, 2, 2), Job(1, 1, 1, 0)])
    assert [row[:2] for row in reference.steps] == [(0, 10), (10, 20), (20, 30)]
    assert reference.done == {0: (10, 20, 2, 0), 1: (-1, 30, 0, 0)}


def test_small_scenarios_say_what_they_are() -> None:
    longer = SmallScenario(((0, 1, 2, ()),)).with_longer_output(0, 5)
    assert longer.requests == ((0, 1, 7, ()),)
