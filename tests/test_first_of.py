"""Branches of which the first few count: the rest is given up wherever it is, and frees all that it held."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest

from kit import POLICIES, sampled
from mist.pipeline import RequestRandom
from mist.records import DROPPED, FINISHED
from mist.request import DECODE, PREFILL, FirstOf, Pipeline, Request, Stage, StageResult
from mist.testing.cluster import KVLink, LinearSteps, Run, play, table

STEPS = LinearSteps(base=100, per_prefill_token=10, per_decode=0, per_context=0, per_prefill=0)
ANSWER = (PREFILL, DECODE)


@dataclass
class Racing:
    """`lengths` answers side by side, of which the first `k` count; then `after` tokens of prefill."""

    k: int
    lengths: tuple[int, ...]
    cancel_rest: bool = True
    after: int = 0
    kinds: tuple[str, ...] = field(default=(PREFILL, DECODE), init=False)
    is_fixed: bool = field(default=False, init=False)
    results: list[StageResult] = field(default_factory=list)

    def __call__(self, request: Request, rng: RequestRandom) -> Pipeline:
        branches = [self._answer(request, length) for length in self.lengths]
        self.results.append((yield FirstOf(self.k, branches, cancel_rest=self.cancel_rest)))
        yield Stage(PREFILL, input_tokens=self.after, visible=False)

    def _answer(self, request: Request, length: int) -> Pipeline:
        yield Stage(PREFILL, input_tokens=request.input_tokens)
        yield Stage(DECODE, oracle_output_tokens=length)


def run(pipeline: Any, num_clients: int = 1, **more: Any) -> Run:
    return play(table([0], [10], [1]), pipeline=pipeline, **{"perf": STEPS, "num_clients": num_clients} | more)


def ends(result: Run) -> list[int]:
    return result.records.requests.as_columns()["end_ns"].tolist()


def test_the_first_to_end_decide_and_the_rest_is_given_up() -> None:
    """Three prefills in one step of 400 ns, then steps of 100: the shortest has its fifth token at 800."""
    pipeline = Racing(1, (9, 5, 7))
    result = run(pipeline)
    assert ends(result) == [800]
    assert [part.output_tokens for part in pipeline.results[0].parts] == [5]
    tasks = result.records.tasks.as_columns()
    dropped = tasks["how"] == DROPPED
    assert (tasks["end_ns"][dropped].tolist(), tasks["generated_tokens"][dropped].tolist()) == ([800, 800], [5, 5])


def test_two_of_three() -> None:
    pipeline = Racing(2, (9, 5, 7))
    assert ends(run(pipeline)) == [1000]
    assert [part.output_tokens for part in pipeline.results[0].parts] == [5, 7]


def test_those_that_are_not_cancelled_run_to_their_ends() -> None:
    pipeline = Racing(1, (9, 5, 7), cancel_rest=False, after=10)
    result = run(pipeline)
    assert pipeline.results[0].end_ns == 800
    assert ends(result) == [1300]  # the last of nine tokens, one step of which computes the ten after
    assert not (result.records.tasks.as_columns()["how"] == DROPPED).any()


def test_more_than_there_are_is_all() -> None:
    assert ends(run(Racing(5, (9, 5)))) == [300 + 8 * 100]


@pytest.mark.parametrize("policy", POLICIES)
def test_what_waits_is_given_up_where_it_waits(policy: Any) -> None:
    """One sequence at a time: the second answer has not begun when the first is over."""
    result = run(Racing(1, (5, 5)), policy=lambda: policy(max_num_seqs=1))
    assert ends(result) == [200 + 4 * 100]
    tasks = result.records.tasks.as_columns()
    dropped = tasks["how"] == DROPPED
    assert tasks["started_ns"][dropped].tolist() == [-1]


def test_what_is_on_its_way_arrives_for_nobody() -> None:
    """The longer prompt's KV cache is on a slow link when the other client has answered."""

    @dataclass
    class Apart(Racing):
        def __call__(self, request: Request, rng: RequestRandom) -> Pipeline:
            yield FirstOf(1, [self._answer(request, 3), Stage("quick", input_tokens=10)])

        kinds: tuple[str, ...] = field(default=(PREFILL, DECODE, "quick"), init=False)

    serves = [(PREFILL,), (DECODE,), ("quick",)]
    result = run(Apart(1, ()), 3, serves=serves, nic=KVLink(100, 1e9), router=None)
    assert ends(result) == [200]
    assert result.records.transfers.as_columns()["end_ns"].tolist() == [1200]


@pytest.mark.parametrize("seed", sampled(range(200), 70))
def test_random_races_obey_the_laws(seed: int) -> None:
    rng = random.Random(seed)
    num = rng.randint(1, 12)
    lengths = tuple(rng.randint(1, 30) for _ in range(rng.randint(1, 5)))
    pipeline = Racing(rng.randint(1, 4), lengths, rng.random() < 0.7, rng.randint(0, 20))
    workload = table(sorted(rng.randrange(20_000) for _ in range(num)), [rng.randint(1, 60) for _ in range(num)],
                     [1] * num)  # fmt: skip
    apart = rng.random() < 0.4
    result = play(
        workload, pipeline=pipeline, num_clients=3 if apart else rng.randint(1, 2),
        serves=[(PREFILL,), (PREFILL,), (DECODE,)] if apart else None,
        nic=KVLink(rng.randint(1, 50), 1e9, rng.choice([0, 500])), num_blocks=rng.choice([30, 60, 1000]), block_size=4,
        policy=lambda: rng.choice(POLICIES)(
            max_num_seqs=rng.randint(1, 6), max_num_batched_tokens=rng.randint(8, 64)),
        caching=rng.random() < 0.5, until_ns=rng.choice([1 << 62, rng.randrange(1, 60_000)]),
    )  # fmt: skip
    for client in result.clients:
        residents = client.residents
        if not result.coordinator.num_cancelled and result.end_ns < 1 << 61 and not residents.running:
            assert residents.kv.used == sum(
                residents.kv.blocks_for(t.computed_tokens) for t in residents.sending.values()
            ) + sum(client.reservations.blocks.values())


def test_a_race_of_one_is_a_plain_answer() -> None:
    workload = table([0, 50, 900], [30, 9, 12], [7, 7, 7])
    plain = play(workload, perf=STEPS)
    raced = play(workload, perf=STEPS, pipeline=Racing(1, (7,)))
    status = raced.records.requests.as_columns()["status"].tolist()
    assert status == [FINISHED] * 3
    assert raced.records.steps.cells == plain.records.steps.cells
    assert raced.records.requests.cells == plain.records.requests.cells
