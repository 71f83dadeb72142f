"""Decodes that go on with one context: blocks held once, a copied tail each, and back to plain decoding for one."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest

from kit import POLICIES, decode, residents, sampled, task
from mist.batching.chunked import Chunked
from mist.memory.kv_cache import KVCache
from mist.pipeline import RequestRandom
from mist.request import DECODE, PREFILL, All, FirstOf, Pipeline, Request, Stage, StageResult
from mist.residents import Residents
from mist.testing.cluster import KVLink, LinearSteps, Run, play, table

STEPS = LinearSteps(base=100, per_prefill_token=10, per_decode=0, per_context=0, per_prefill=0)


@dataclass
class Thoughts:
    """One prefill, then thoughts of these `lengths` from its context; the first `k` of them count, 0 for all."""

    lengths: tuple[int, ...]
    k: int = 0
    score: int = 0
    cancel_rest: bool = True
    kinds: tuple[str, ...] = field(default=(PREFILL, DECODE, "score"), init=False)
    is_fixed: bool = field(default=False, init=False)
    results: list[StageResult] = field(default_factory=list)

    def __call__(self, request: Request, rng: RequestRandom) -> Pipeline:
        yield Stage(PREFILL, input_tokens=request.input_tokens)
        thoughts = [self._thought(request, length) for length in self.lengths]
        self.results.append((yield (FirstOf(self.k, thoughts, self.cancel_rest) if self.k else All(thoughts))))

    def _thought(self, request: Request, length: int) -> Pipeline:
        thought = yield Stage(DECODE, oracle_output_tokens=length)
        yield Stage("score", input_tokens=self.score and request.input_tokens + length, visible=False)
        return thought


@dataclass
class Each:
    """To each request the pipeline at its place."""

    pipelines: tuple[Thoughts, ...]
    kinds: tuple[str, ...] = field(default=(PREFILL, DECODE, "score"), init=False)
    is_fixed: bool = field(default=False, init=False)

    def __call__(self, request: Request, rng: RequestRandom) -> Pipeline:
        return self.pipelines[request.index](request, rng)


def run(pipeline: Any, prompt: int = 10, num_clients: int = 1, **more: Any) -> Run:
    return play(table([0], [prompt], [1]), pipeline=pipeline, **{"perf": STEPS, "num_clients": num_clients} | more)


def peak(result: Run, client: int = 0) -> int:
    steps = result.records.steps.as_columns()
    return int(steps["kv_blocks"][steps["client"] == client].max())


@pytest.mark.parametrize("prompt", [16, 21, 64, 65])
@pytest.mark.parametrize("num", [1, 2, 5])
def test_the_kv_peak_is_the_prompt_once_and_every_thought(prompt: int, num: int) -> None:
    """Of n tokens in blocks of 4: the full blocks once, and for each thought what lies behind them."""
    length = 30
    result = run(Thoughts((length,) * num), prompt, block_size=4)
    full = prompt // 4
    behind = -(-(prompt + length - 1) // 4) - full
    assert peak(result) == full + num * behind
    assert result.clients[0].residents.kv.used == 0


@pytest.mark.parametrize("caching", [False, True])
def test_one_thought_is_plain_decoding(caching: bool) -> None:
    workload = table([0, 50, 900], [30, 9, 12], [7, 7, 7])
    plain = play(workload, perf=STEPS, caching=caching)
    forked = play(workload, perf=STEPS, caching=caching, pipeline=Thoughts((7,)))
    assert forked.records.steps.cells == plain.records.steps.cells
    assert forked.records.requests.cells == plain.records.requests.cells


def test_first_tokens_of_all_thoughts_come_out_with_the_prefill() -> None:
    result = run(Thoughts((5, 3, 1)))
    tasks = result.records.tasks.as_columns()
    decodes = tasks["kind"] == 1
    assert set(tasks["joined_ns"][decodes].tolist()) == {200}
    assert sorted(tasks["end_ns"][decodes].tolist()) == [200, 400, 600]
    assert result.records.requests.as_columns()["output_tokens"].tolist() == [9]


def test_the_first_that_ends_frees_the_others() -> None:
    result = run(Thoughts((9, 3, 7), k=1))
    assert result.records.requests.as_columns()["end_ns"].tolist() == [400]
    assert result.clients[0].residents.kv.used == 0
    assert not result.clients[0].residents.prefixes


def test_a_thought_of_one_token_ends_the_race_before_the_others_run() -> None:
    result = run(Thoughts((1, 3, 7), k=1))
    assert result.records.requests.as_columns()["end_ns"].tolist() == [200]
    assert len(result.records.steps) == 1
    assert result.clients[0].residents.kv.used == 0


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (5, 0, 4)])
def test_a_thought_of_no_tokens_ends_the_race_before_anybody_has_a_place(lengths: tuple[int, ...]) -> None:
    result = run(Thoughts(lengths, k=1))
    assert result.records.requests.as_columns()["end_ns"].tolist() == [200]
    assert result.clients[0].residents.kv.used == 0
    assert not result.clients[0].residents.running


def test_a_request_stays_until_thoughts_that_begin_after_the_race_are_over() -> None:
    result = run(Thoughts((0, 5), k=1, cancel_rest=False))
    assert result.records.requests.as_columns()["end_ns"].tolist() == [600]
    assert result.records.requests.as_columns()["output_tokens"].tolist() == [5]


def test_thoughts_that_have_lost_before_they_ran_make_room_at_once() -> None:
    """Both prompts end in one step, in which the lone thought decodes; all three of the second have places beside it.

    With the blocks that are left, one that had to wait for its place would wait longer.
    """
    pipeline = Each((Thoughts((10,)), Thoughts((1, 9, 9), k=1), Thoughts((5, 5, 5))))
    result = play(table([0, 1, 1], [4, 4, 4], [10, 9, 5]), pipeline=pipeline, perf=STEPS, num_blocks=5, block_size=4,
                  policy=lambda: Chunked(max_num_seqs=4))  # fmt: skip
    tasks = result.records.tasks.as_columns()
    decodes = (tasks["request"] == 2) & (tasks["kind"] == 1)
    assert (decodes & (tasks["joined_ns"] == result.records.steps.as_columns()["end_ns"][1])).sum() == 3


def test_thoughts_without_a_place_wait_for_one() -> None:
    result = run(Thoughts((5, 5, 5)), policy=lambda: Chunked(max_num_seqs=2))
    ends = result.records.requests.as_columns()["end_ns"].tolist()
    assert ends == [200 + 4 * 100 + 4 * 100]


def test_their_cache_is_sent_once_to_where_they_decode() -> None:
    serves = [(PREFILL,), (DECODE,)]
    result = run(Thoughts((5, 5, 5)), 30, 2, serves=serves, nic=KVLink(10, 1e9), block_size=4)
    assert result.records.transfers.as_columns()["bytes"].tolist() == [300]
    assert peak(result, 1) == 7 + 3 * 2
    assert result.clients[1].residents.kv.used == 0


def a_group_that_waits(prompt: int) -> Residents:
    """Of 8 blocks of 4: a prompt that two thoughts wait with, and a decode that needs another block now."""
    made = residents(KVCache(8, 4))
    for index, tokens in enumerate((prompt, 20)):
        one = task(index, tokens)
        made.enqueue(one)
        made.admit(one, tokens)
        made.computed(one, tokens)
        made.chunks_done()
        following = decode(index, tokens, 5)
        if index:
            made.follow(one, following)
            made.cohort.join(following, 5)
            continue
        followings = [following, decode(index, tokens, 5), decode(index, tokens, 5)]
        for waiting in made.fork(one, followings, 1):
            made.enqueue(waiting)
        made.leave(following, tokens, tokens)
    return made


def test_nothing_is_admitted_on_a_step_for_which_a_prompt_was_given_up() -> None:
    """Its own thoughts neither: they would take the blocks back that the decodes have got."""
    made = a_group_that_waits(12)
    assert made.grow_decodes() == 2
    assert [made.waiting[0].computed_tokens, len(made.handed_over), made.admit(made.waiting[0], 8)] == [0, 0, 0]
    made.begin()
    assert made.admit(made.waiting[0], 8) == 8


def test_who_holds_no_block_has_none_to_give_up() -> None:
    made = a_group_that_waits(3)
    assert made.grow_decodes() == 0
    assert not made.surrender()
    assert len(made.handed_over) == 2


@pytest.mark.parametrize("seed", sampled(range(300), 100))
def test_random_thoughts_obey_the_laws(seed: int) -> None:
    rng = random.Random(seed)
    num = rng.randint(1, 10)
    lengths = tuple(rng.randint(1, 30) for _ in range(rng.randint(1, 6)))
    pipeline = Thoughts(lengths, rng.randint(0, 3), rng.randint(0, 1))
    apart = rng.random() < 0.4
    keys = [tuple(rng.choice([(1, 2, 3), (1, 2, 4), (5,)])) for _ in range(num)]
    caching = rng.random() < 0.5
    workload = table(sorted(rng.randrange(20_000) for _ in range(num)), [rng.randint(1, 60) for _ in range(num)],
                     [1] * num, keys=keys if caching else None)  # fmt: skip
    workload.hash_block_size = 8 if caching else 0
    serves = [(PREFILL, "score"), (PREFILL,), (DECODE,)] if apart else [(PREFILL, DECODE, "score")] * 2
    result = play(
        workload, pipeline=pipeline, num_clients=len(serves), serves=serves,
        nic=KVLink(rng.randint(1, 50), 1e9, rng.choice([0, 500])), num_blocks=rng.choice([30, 60, 1000]), block_size=4,
        policy=lambda: rng.choice(POLICIES)(
            max_num_seqs=rng.randint(1, 6), max_num_batched_tokens=rng.randint(8, 64)),
        caching=caching, unit_tokens=8 if caching else 0, until_ns=rng.choice([1 << 62, rng.randrange(1, 60_000)]),
    )  # fmt: skip
    for client in result.clients:
        each = client.residents
        if not each.running and not each.sending and not each.num_waiting:
            assert each.kv.used == sum(client.reservations.blocks.values())
            assert not each.prefixes
