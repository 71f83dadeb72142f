"""Pipelines that branch: side by side on several clients, joined by the last, with gates, and told apart exactly."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from mist.batching.continuous import Continuous
from mist.errors import InvariantError
from mist.fabric import Path
from mist.metrics.stages import stage_times
from mist.pipeline import RequestRandom
from mist.records import FINISHED, REJECTED
from mist.request import DECODE, PREFILL, All, Pipeline, Request, Stage, StageResult
from mist.sharing import Channel
from mist.testing.cluster import KVLink, LinearSteps, Run, play, table

STEPS = LinearSteps(base=100, per_prefill_token=10, per_decode=0, per_context=0, per_prefill=0)


@dataclass
class Guarded:
    """A guard beside the answer."""

    guard_tokens: int = 50
    gates: bool = False
    kinds: tuple[str, ...] = field(default=("guard", PREFILL, DECODE), init=False)
    is_fixed: bool = field(default=False, init=False)
    results: list[StageResult] = field(default_factory=list)

    def __call__(self, request: Request, rng: RequestRandom) -> Pipeline:
        guard = Stage("guard", input_tokens=self.guard_tokens, gates=self.gates, visible=False)
        self.results.append((yield All([guard, self._answer(request)])))

    def _answer(self, request: Request) -> Pipeline:
        yield Stage(PREFILL, input_tokens=request.input_tokens)
        yield Stage(DECODE, oracle_output_tokens=request.oracle_output_tokens)


def run(pipeline: object, inputs: list[int], outputs: list[int], serves: list[tuple[str, ...]], **more: object) -> Run:
    arrivals = [0] * len(inputs)
    return play(table(arrivals, inputs, outputs), pipeline=pipeline, perf=STEPS, num_clients=len(serves),
                serves=serves, **more)  # type: ignore[arg-type]  # fmt: skip


def ends(result: Run) -> list[int]:
    return result.records.requests.as_columns()["end_ns"].tolist()


ANSWER, GUARD = (PREFILL, DECODE), ("guard",)
#: a prompt of 10 tokens and 4 of output: 200 ns, then three steps of 100
ANSWERED = 500


@pytest.mark.parametrize(("guard_tokens", "expected"), [(5, ANSWERED), (40, ANSWERED), (41, 510), (200, 2100)])
def test_branches_run_side_by_side_and_the_last_one_ends_the_request(guard_tokens: int, expected: int) -> None:
    pipeline = Guarded(guard_tokens)
    result = run(pipeline, [10], [4], [ANSWER, GUARD])
    assert ends(result) == [expected]
    joined = pipeline.results[0]
    assert [part.end_ns for part in joined.parts] == [100 + 10 * guard_tokens, ANSWERED]
    assert (joined.start_ns, joined.end_ns, joined.output_tokens) == (0, expected, 4)


@pytest.mark.parametrize(("guard_tokens", "first_token"), [(5, 200), (10, 200), (20, 300), (200, 2100)])
def test_a_gate_holds_the_first_token_back(guard_tokens: int, first_token: int) -> None:
    result = run(Guarded(guard_tokens, gates=True), [10], [4], [ANSWER, GUARD])
    assert result.records.requests.as_columns()["first_token_ns"].tolist() == [first_token]


@pytest.mark.parametrize("guard_tokens", [1, 15, 30, 90])
def test_times_of_stages_sum_to_e2e_on_the_critical_path(guard_tokens: int) -> None:
    num = 12
    inputs, outputs = [5 + 3 * i for i in range(num)], [1 + i % 5 for i in range(num)]
    result = run(Guarded(guard_tokens), inputs, outputs, [ANSWER, GUARD], policy=lambda: Continuous(max_num_seqs=2))
    requests, tasks = result.records.requests.as_columns(), result.records.tasks.as_columns()
    order = np.argsort(tasks["request"], kind="stable")
    times = stage_times(requests, {k: v[order] for k, v in tasks.items()}, 3)
    assert times.min() >= 0
    assert times.sum(axis=(1, 2)).tolist() == (requests["end_ns"] - requests["arrival_ns"]).tolist()


def test_the_critical_path_leaves_out_who_was_not_waited_for() -> None:
    result = run(Guarded(200), [10], [4], [ANSWER, GUARD])
    requests, tasks = result.records.requests.as_columns(), result.records.tasks.as_columns()
    assert stage_times(requests, tasks, 3)[0].tolist() == [[0, 2100, 0], [0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("guard_tokens", [1, 20, 90])
def test_times_until_the_first_token_sum_to_the_ttft(guard_tokens: int) -> None:
    result = run(Guarded(guard_tokens, gates=True), [10, 20, 9], [4, 1, 7], [ANSWER, GUARD])
    requests, tasks = result.records.requests.as_columns(), result.records.tasks.as_columns()
    order = np.argsort(tasks["request"], kind="stable")
    times = stage_times(requests, {k: v[order] for k, v in tasks.items()}, 3, None, "first_token_ns")
    assert times.min() >= 0
    assert times.sum(axis=(1, 2)).tolist() == (requests["first_token_ns"] - requests["arrival_ns"]).tolist()


def test_a_guard_that_ends_while_the_cache_is_on_its_way_was_not_waited_for() -> None:
    """Prefill to 200 ns, its cache there at 1,200, decodes to 1,500; the guard ends at 610."""
    result = run(Guarded(51), [10], [4], [(PREFILL,), (DECODE,), GUARD], nic=KVLink(100, 1e9))
    requests, tasks = result.records.requests.as_columns(), result.records.tasks.as_columns()
    times = stage_times(requests, tasks, 3, result.records.transfers.as_columns())
    assert times[0].tolist() == [[0, 0, 0], [0, 200, 0], [0, 300, 1000]]


def test_a_request_rejected_in_one_branch_leaves_when_the_other_is_over() -> None:
    result = run(Guarded(), [10, 500], [4, 4], [ANSWER, GUARD], max_model_len=100)
    requests = result.records.requests.as_columns()
    by_request = dict(zip(requests["request"].tolist(), requests["status"].tolist(), strict=True))
    assert by_request == {0: FINISHED, 1: REJECTED}
    assert requests["output_tokens"][requests["request"] == 1].tolist() == [0]


def test_a_request_rejected_in_its_first_branch_starts_no_other() -> None:
    result = run(Guarded(guard_tokens=500), [10], [4], [ANSWER, GUARD], max_model_len=100)
    assert result.records.requests.as_columns()["status"].tolist() == [REJECTED]
    assert len(result.records.tasks) == 0


@dataclass
class Nested:
    """Branches in branches, some of them empty, and a stage after all."""

    kinds: tuple[str, ...] = field(default=("a", "b", "c"), init=False)
    is_fixed: bool = field(default=False, init=False)

    def __call__(self, request: Request, rng: RequestRandom) -> Pipeline:
        result = yield All(
            [Stage("a", input_tokens=10), self._inner(), (All([]).branches and Stage("a")) or Stage("c")]
        )
        assert len(result.parts) == 3
        yield Stage("c", input_tokens=1)

    def _inner(self) -> Pipeline:
        inner = yield All([Stage("b", input_tokens=20), Stage("c", input_tokens=30)])
        empty = yield All([])
        assert (len(inner.parts), empty.parts) == (2, ())
        return inner.parts[0]


def test_branches_may_branch() -> None:
    result = run(Nested(), [1], [1], [("a",), ("b",), ("c",)])
    assert ends(result) == [400 + 110]


@dataclass
class DecodeAfterJoin:
    kinds: tuple[str, ...] = field(default=(PREFILL, DECODE), init=False)
    is_fixed: bool = field(default=False, init=False)

    def __call__(self, request: Request, rng: RequestRandom) -> Pipeline:
        yield All([Stage(PREFILL, input_tokens=5), Stage(PREFILL, input_tokens=6)])
        yield Stage(DECODE, oracle_output_tokens=3)


def test_a_decode_cannot_follow_a_join() -> None:
    with pytest.raises(InvariantError, match="must directly follow the stage that leaves its KV cache"):
        run(DecodeAfterJoin(), [1], [1], [ANSWER])


@dataclass
class Translated:
    """A stage that computes and generates on its own client before the answer."""

    kinds: tuple[str, ...] = field(default=("translate", PREFILL, DECODE), init=False)
    is_fixed: bool = field(default=False, init=False)

    def __call__(self, request: Request, rng: RequestRandom) -> Pipeline:
        english = yield Stage("translate", input_tokens=request.input_tokens, oracle_output_tokens=6, visible=False)
        yield Stage(PREFILL, input_tokens=english.output_tokens)
        yield Stage(DECODE, oracle_output_tokens=request.oracle_output_tokens)


def test_a_stage_may_compute_and_generate() -> None:
    result = run(Translated(), [10], [4], [("translate",), ANSWER])
    translated = 200 + 5 * 100
    assert ends(result) == [translated + 160 + 300]
    requests = result.records.requests.as_columns()
    assert (requests["first_token_ns"].tolist(), requests["output_tokens"].tolist()) == ([translated + 160], [4])
    assert result.records.tasks.as_columns()["generated_tokens"].tolist() == [6, 0, 4]


@dataclass
class Reranked:
    candidates: int
    tokens: int
    kinds: tuple[str, ...] = field(default=("rerank",), init=False)
    is_fixed: bool = field(default=True, init=False)

    def __call__(self, request: Request, rng: RequestRandom) -> Pipeline:
        yield Stage("rerank", input_tokens=self.candidates * self.tokens, num_sequences=self.candidates)


@dataclass
class Seen(LinearSteps):
    chunks: list[list[tuple[int, int]]] = field(default_factory=list)

    def step_time(self, step: object) -> int:
        self.chunks.append(list(step.chunks))  # type: ignore[attr-defined]
        return 1000


def test_candidates_are_sequences_of_their_own() -> None:
    seen = Seen()
    play(table([0], [1], [0]), pipeline=Reranked(3, 7), perf=seen, serves=[("rerank",)], num_clients=1,
         policy=lambda: Continuous(max_num_batched_tokens=64), max_model_len=7)  # fmt: skip
    assert seen.chunks == [[(7, 0), (7, 0), (7, 0)]]


def test_a_chunk_ends_within_a_candidate_and_the_next_goes_on_there() -> None:
    from mist.batching.chunked import Chunked

    seen = Seen()
    play(table([0], [1], [0]), pipeline=Reranked(3, 7), perf=seen, serves=[("rerank",)], num_clients=1,
         policy=lambda: Chunked(max_num_batched_tokens=10, max_num_seqs=4))  # fmt: skip
    assert seen.chunks == [[(7, 0), (3, 0)], [(4, 3), (6, 0)], [(1, 6)]]


def test_only_prefill_and_decode_find_the_prompts_prefix() -> None:
    """A guard's text is another one, though it comes from the same request."""
    workload = table([0, 10**9], [64, 64], [4, 4], keys=[(1, 2), (1, 2)], cached_tokens=[0, 0])
    workload.hash_block_size = 32
    result = play(workload, pipeline=Guarded(64), perf=STEPS, caching=True, unit_tokens=32,
                  serves=[("guard", PREFILL, DECODE)])  # fmt: skip
    tasks = result.records.tasks.as_columns()
    guards = tasks["kind"] == 0
    assert tasks["cached_tokens"][guards].tolist() == [0, 0]
    assert tasks["cached_tokens"][tasks["kind"] == 1].tolist() == [0, 32]


class OneLink:
    """Every path is one channel of 1 byte per ns."""

    carries_all = True

    def __init__(self) -> None:
        self.channel = Channel("link", 1e9)

    def path(self, sender: int, receiver: int) -> Path:
        return Path((self.channel,), 0)


@dataclass
class HandedOn:
    """What a tokeniser leaves goes to a prefill, as the next stage or as a branch."""

    branches: bool
    kinds: tuple[str, ...] = field(default=("tokenize", PREFILL), init=False)
    is_fixed: bool = field(default=False, init=False)

    def __call__(self, request: Request, rng: RequestRandom) -> Pipeline:
        yield Stage("tokenize", input_tokens=10)
        prefill = Stage(PREFILL, input_tokens=10, input_bytes=700)
        yield All([prefill]) if self.branches else prefill


@pytest.mark.parametrize("branches", [False, True])
def test_what_is_handed_on_is_sent_to_a_branch_as_to_a_stage(branches: bool) -> None:
    result = run(HandedOn(branches), [10], [0], [("tokenize",), (PREFILL,)], paths=OneLink())
    assert result.records.transfers.as_columns()["bytes"].tolist() == [700]
    assert ends(result) == [200 + 700 + 200]
