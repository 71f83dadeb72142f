"""The shipped pipelines: which stages they yield with which sizes, what they send, and how they run on small clients.

First as plain generators that are answered by hand, then on a cluster. Every expected size is written out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from mist.errors import ScenarioError
from mist.metrics.stages import stage_times
from mist.pipeline import PipelineFactory
from mist.pipeline.beam import Beam
from mist.pipeline.best_of_n import BestOfN
from mist.pipeline.chat_support import ChatSupport
from mist.pipeline.guarded_qa import GuardedQA
from mist.pipeline.kv_reuse import KVReuse
from mist.pipeline.multi_turn_reasoning import MultiTurnReasoning
from mist.pipeline.news_search import NewsSearch
from mist.pipeline.question_answering import QuestionAnswering
from mist.pipeline.reasoning import Reasoning
from mist.pipeline.stages import StageList
from mist.records import FINISHED, REFUSED
from mist.registry import lookup, names
from mist.request import DECODE, PREFILL, Fork, Pipeline, Request, Stage, StageResult
from mist.scenario.value import load
from mist.testing import LinearSteps, PipelineContract, Run, play, table

NONE: Mapping[str, int] = {}


def request(
    prompt: int = 100, output: int = 10, *, sizes: Mapping[str, int] = NONE, keys: int = 0, hit: int = 0
) -> Request:
    return Request(0, 0, prompt, output, tuple(range(keys)), hit, dict(sizes))


@dataclass
class Driver:
    """Follows a pipeline; a KV store finds `found` tokens. Branches are walked one after another and noted as such."""

    found: int = 0
    stages: list[Stage] = field(default_factory=list)
    num_branches: list[int] = field(default_factory=list)

    def follow(self, pipeline: Pipeline) -> StageResult:
        last = StageResult(0, 0)
        try:
            wanted = next(pipeline)
            while True:
                last = self.answer(wanted)
                wanted = pipeline.send(last)
        except StopIteration as end:
            return end.value or last

    def answer(self, wanted: Stage | Fork) -> StageResult:
        if isinstance(wanted, Stage):
            self.stages.append(wanted)
            return StageResult(0, 1, wanted.oracle_output_tokens, self.found if wanted.kind == "kv_retrieve" else 0)
        self.num_branches.append(len(wanted.branches))
        parts = tuple(self.answer(b) if isinstance(b, Stage) else self.follow(b) for b in wanted.branches)
        return StageResult(0, 1, sum(part.output_tokens for part in parts), parts=parts)


def stages_of(pipeline: PipelineFactory, of: Request, *, found: int = 0, seed: int = 0) -> list[Stage]:
    driver = Driver(found)
    driver.follow(pipeline(of, lambda: np.random.default_rng(seed)))
    assert {stage.kind for stage in driver.stages} <= set(pipeline.kinds)
    return driver.stages


def kinds_of(pipeline: PipelineFactory, of: Request, **how: Any) -> list[str]:
    return [stage.kind for stage in stages_of(pipeline, of, **how)]


VARIANTS: dict[str, Callable[[], PipelineFactory]] = {
    "question_answering": QuestionAnswering,
    "tokenized": lambda: QuestionAnswering(before=("tokenize",), after=("detokenize",)),
    "guarded_qa": GuardedQA,
    "beside": lambda: GuardedQA(beside=True, refused=0.4, verdict_tokens={"guard_input": 2}),
    "two_guards": lambda: GuardedQA(("regex", "llm_guard"), ("llm_guard",), beside=True, hold_answer=True),
    "refusing": lambda: GuardedQA(refused=0.5, output_guards=()),
    "news_search": NewsSearch,
    "reranked": lambda: NewsSearch(passages=2, passage_tokens=5, candidates=4),
    "kv_reuse": KVReuse,
    "chat_support": lambda: ChatSupport(passages=2, passage_tokens=5, candidates=3),
    "reasoning": lambda: Reasoning(scale=3, cv=0.5),
    "best_of_n": lambda: BestOfN(scale=2.5, cv=0.8),
    "majority": lambda: BestOfN(n=5, k=2, select="majority", cv=0.8),
    "multi_turn_reasoning": lambda: MultiTurnReasoning(scale=2, turn_tokens=3, cv=0.3),
    "beam": lambda: Beam(width=2, expansion=2, rounds=3, round_tokens=6, cv=0.5),
}


@pytest.mark.parametrize("name", VARIANTS)
class TestContract(PipelineContract):
    """Each keeps the contract of pipelines."""

    @pytest.fixture(autouse=True)
    def _named(self, name: str) -> None:
        self.make = VARIANTS[name]

    def pipeline(self) -> PipelineFactory:
        return self.make()


def test_all_that_ship_are_here() -> None:
    shipped = {
        "beam", "best_of_n", "chat_support", "guarded_qa", "kv_reuse", "multi_turn_reasoning", "news_search",
        "question_answering", "reasoning",
    }  # fmt: skip
    assert shipped <= set(names("pipeline"))
    assert {type(make()) for make in VARIANTS.values()} == {lookup("pipeline", name) for name in shipped}


# --- question answering ---


def test_question_answering() -> None:
    asked = request(100, 10)
    assert stages_of(QuestionAnswering(), asked) == [
        Stage(PREFILL, 100, input_bytes=400),
        Stage(DECODE, oracle_output_tokens=10),
    ]
    assert kinds_of(QuestionAnswering(), request(100, 0)) == [PREFILL]
    both = QuestionAnswering(before=("tokenize",), after=("detokenize",))
    assert both.kinds == ("tokenize", PREFILL, DECODE, "detokenize")
    assert stages_of(both, asked) == [
        Stage("tokenize", 100, input_bytes=400),
        *stages_of(QuestionAnswering(), asked),
        Stage("detokenize", 10, input_bytes=40),
    ]
    assert kinds_of(both, request(100, 0)) == ["tokenize", PREFILL]
    assert (QuestionAnswering(before=("tokenize",)).is_fixed, both.is_fixed) == (True, False)


# --- guarded question answering ---


def guard(kind: str, tokens: int, *, gates: bool = False, verdict: int = 0) -> Stage:
    return Stage(kind, tokens, verdict, visible=False, input_bytes=4 * tokens, gates=gates)


def test_guards_before_and_after() -> None:
    answer = stages_of(QuestionAnswering(), request(100, 10))
    assert stages_of(GuardedQA(), request(100, 10)) == [
        guard("guard_input", 100, gates=True), *answer, guard("guard_output", 10),
    ]  # fmt: skip
    several = GuardedQA(("regex", "llm"), ("llm",), hold_answer=True, verdict_tokens={"llm": 3})
    assert stages_of(several, request(100, 10)) == [
        guard("regex", 100, gates=True), guard("llm", 100, gates=True, verdict=3), *answer,
        guard("llm", 10, gates=True, verdict=3),
    ]  # fmt: skip
    assert kinds_of(GuardedQA(), request(100, 0)) == ["guard_input", PREFILL]
    assert kinds_of(GuardedQA((), ()), request()) == [PREFILL, DECODE]


def test_guards_beside_the_answer() -> None:
    driver = Driver()
    driver.follow(GuardedQA(beside=True, verdict_tokens={"guard_input": 5})(request(100, 10), np.random.default_rng))
    assert driver.num_branches == [2]
    assert [stage.kind for stage in driver.stages] == ["guard_input", PREFILL, DECODE, "guard_output"]
    assert [stage.gates for stage in driver.stages] == [True, False, False, False]
    assert driver.stages[-1].input_tokens == 10  # not the verdict's tokens too


def test_a_refused_request_ends_with_its_guards_and_shows_nothing() -> None:
    assert kinds_of(GuardedQA(refused=1.0), request()) == ["guard_input"]
    beside = stages_of(GuardedQA(refused=1.0, beside=True), request())
    assert [stage.kind for stage in beside] == ["guard_input", PREFILL, DECODE]  # it was computed all the same
    assert not any(stage.visible for stage in beside)


@pytest.mark.parametrize("beside", [False, True])
def test_the_share_that_is_refused(beside: bool) -> None:
    pipeline = GuardedQA(refused=0.3, beside=beside)
    refused = [DECODE not in [s.kind for s in stages_of(pipeline, request(), seed=i) if s.visible] for i in range(2000)]
    assert np.mean(refused) == pytest.approx(0.3, abs=0.04)
    # the same requests, whatever runs beside what
    assert refused == [np.random.default_rng(i).random() < 0.3 for i in range(2000)]


def test_nothing_is_drawn_where_nothing_is_refused() -> None:
    def never() -> np.random.Generator:
        raise AssertionError("drawn")

    assert Driver().follow(GuardedQA()(request(), never)).output_tokens == 0


# --- retrieval ---


def test_news_search_without_a_re_ranker() -> None:
    assert stages_of(NewsSearch(passages=3, passage_tokens=200), request(50, 10)) == [
        Stage("embed", 50, input_bytes=200),
        Stage("retrieve", 1, input_bytes=768 * 4),
        Stage(PREFILL, 650, input_bytes=2600),
        Stage(DECODE, oracle_output_tokens=10),
    ]


def test_a_re_ranker_reads_each_candidate_with_the_question() -> None:
    pipeline = NewsSearch(passages=3, passage_tokens=200, candidates=20, query_tokens=30, embedding_dim=1024)
    assert pipeline.kinds == ("embed", "retrieve", "rerank", PREFILL, DECODE)
    assert stages_of(pipeline, request(50, 10)) == [
        Stage("embed", 30, input_bytes=120),
        Stage("retrieve", 1, input_bytes=4096),
        Stage("rerank", 20 * 230, num_sequences=20, input_bytes=120 + 20 * (8 + 800)),
        Stage(PREFILL, 650, input_bytes=2600),
        Stage(DECODE, oracle_output_tokens=10),
    ]


@pytest.mark.parametrize(
    ("parameters", "pair"), [({}, 512), ({"max_pair_tokens": 514}, 514), ({"passage_tokens": 9}, 59)]
)
@pytest.mark.parametrize("pipeline", [NewsSearch, ChatSupport])
def test_a_pair_is_cut_to_what_the_re_ranker_reads(pipeline: Any, parameters: dict[str, int], pair: int) -> None:
    found = stages_of(pipeline(candidates=20, **parameters), request(50))
    rerank = next(stage for stage in found if stage.kind == "rerank")
    assert rerank.input_tokens == rerank.num_sequences * pair


def test_a_re_ranker_of_514_positions_serves_the_default_passages() -> None:
    served = {
        "encoder": {"device": "l4", "model": "bge-reranker-base", "serves": ["embed", "rerank"]},
        "index": {"device": "epyc-9554", "perf": {"flat_search": {"num_vectors": 1000, "dim": 768}},
                  "serves": ["retrieve"]},
        "gpu": {"device": "h100-sxm", "model": "llama-3.1-8b"},
    }  # fmt: skip
    workload = {"arrivals": "all_at_once", "num_requests": 2, "input_tokens": 600, "output_tokens": 2}
    scenario = load({"workload": workload, "clients": served, "pipeline": {"news_search": {"candidates": 20}}})
    assert scenario.run(check=True).metrics["requests"]["finished"] == 2


@pytest.mark.parametrize(
    ("parameters", "sizes", "expected"),
    [
        ({}, {}, 80),
        ({}, {"query_tokens": 7}, 7),
        ({"query_tokens": 20}, {}, 20),
        ({"query_tokens": 20}, {"query_tokens": 7}, 7),
        ({}, {"passage_tokens": 60, "num_passages": 2}, 20),
        ({"max_query_tokens": 64}, {}, 64),
        ({}, {"query_tokens": 0}, 1),
        ({}, {"passage_tokens": 80, "num_passages": 2}, 1),
    ],
)
def test_tokens_of_the_question(parameters: dict[str, Any], sizes: dict[str, int], expected: int) -> None:
    assert stages_of(NewsSearch(**parameters), request(80, sizes=sizes))[0] == Stage(
        "embed", expected, input_bytes=4 * expected
    )


@pytest.mark.parametrize(
    ("sizes", "prompt", "reranked"),
    [
        ({}, 1000 + 2 * 100, 4 * 110),
        ({"num_passages": 3}, 1000 + 3 * 100, 4 * 110),
        ({"num_passages": 6}, 1000 + 6 * 100, 6 * 110),  # all that are kept are read
        ({"num_passages": 3, "passage_tokens": 601}, 1000, 4 * (10 + 201)),  # in the prompt already
        ({"passage_tokens": 600}, 1000, 4 * (10 + 300)),
    ],
)
def test_passages_that_the_workload_tells(sizes: dict[str, int], prompt: int, reranked: int) -> None:
    pipeline = NewsSearch(passages=2, passage_tokens=100, candidates=4, query_tokens=10)
    _, _, rerank, prefill, _ = stages_of(pipeline, request(1000, sizes=sizes))
    assert (prefill.input_tokens, rerank.input_tokens) == (prompt, reranked)
    assert rerank.input_tokens == rerank.num_sequences * (reranked // rerank.num_sequences)


@pytest.mark.parametrize(
    "sizes", [{"num_passages": 0}, {"passage_tokens": 0}, {"passage_tokens": 0, "num_passages": 0}]
)
def test_a_request_of_no_passages_is_not_searched_for(sizes: dict[str, int]) -> None:
    pipeline = NewsSearch(candidates=9)
    assert stages_of(pipeline, request(50, sizes=sizes)) == stages_of(QuestionAnswering(), request(50))


# --- reuse of KV caches ---


def test_kv_reuse_asks_for_what_the_workload_tells() -> None:
    assert kinds_of(KVReuse(), request(100)) == [PREFILL, DECODE]
    asked, prefill, _ = stages_of(KVReuse(), request(100, hit=60, keys=7), found=60)
    assert (asked, prefill) == (
        Stage("kv_retrieve", 60, input_bytes=400), Stage(PREFILL, 100, found_tokens=60, input_bytes=400),
    )  # fmt: skip
    asked, prefill, _ = stages_of(KVReuse(), request(100, keys=7), found=48)
    assert (asked.input_tokens, prefill.found_tokens) == (100, 48)
    _, prefill, _ = stages_of(KVReuse(), request(100, keys=7), found=100)
    assert prefill.found_tokens == 99  # one is computed
    _, prefill, _ = stages_of(KVReuse(), request(100, keys=7), found=0)
    assert prefill.found_tokens == 0


def test_chat_support_searches_then_asks_for_the_conversation() -> None:
    pipeline = ChatSupport(passages=2, passage_tokens=50, kv_retrieve="kv_retrieve")
    assert pipeline.kinds == ("embed", "retrieve", "kv_retrieve", PREFILL, DECODE)
    assert stages_of(pipeline, request(300, 10, keys=19), found=288) == [
        Stage("embed", 300, input_bytes=1200),
        Stage("retrieve", 1, input_bytes=3072),
        Stage("kv_retrieve", 300, input_bytes=1600),
        Stage(PREFILL, 400, found_tokens=288, input_bytes=1600),
        Stage(DECODE, oracle_output_tokens=10),
    ]
    # passages stand behind the conversation: all of it may be found
    assert stages_of(pipeline, request(300, keys=19), found=300)[3].found_tokens == 300
    assert kinds_of(pipeline, request(300)) == ["embed", "retrieve", PREFILL, DECODE]


# --- parameters ---


@pytest.mark.parametrize(
    ("name", "parameters", "told"),
    [
        ("question_answering", {"before": ["prefill"]}, "before is 'prefill'"),
        ("question_answering", {"after": [""]}, "after is ''"),
        ("guarded_qa", {"input_guards": ["decode"]}, "input_guards is 'decode'"),
        ("guarded_qa", {"refused": 1.5}, "refused is 1.5"),
        ("guarded_qa", {"verdict_tokens": {"guard_input": -1}}, "verdict_tokens of 'guard_input' is -1"),
        ("guarded_qa", {"verdict_tokens": {"guard": 3}}, "verdict_tokens has 'guard'"),
        ("guarded_qa", {"input_guards": [], "beside": True}, "beside needs input_guards"),
        ("guarded_qa", {"input_guards": [], "refused": 0.1}, "refused needs input_guards"),
        ("guarded_qa", {"output_guards": [], "hold_answer": True}, "hold_answer needs output_guards"),
        ("news_search", {"passages": 0}, "passages is 0"),
        ("news_search", {"passage_tokens": 0}, "passage_tokens is 0"),
        ("news_search", {"max_pair_tokens": 0}, "max_pair_tokens is 0"),
        ("news_search", {"query_tokens": 0}, "query_tokens is 0"),
        ("news_search", {"candidates": 4}, "candidates is 4, below the 5 passages"),
        ("news_search", {"retrieve": "prefill"}, "retrieve is 'prefill'"),
        ("kv_reuse", {"kv_retrieve": "decode"}, "kv_retrieve is 'decode'"),
        ("chat_support", {"embedding_dim": 0}, "embedding_dim is 0"),
        ("chat_support", {"kv_retrieve": ""}, "kv_retrieve is ''"),
        ("chat_support", {"passagse": 2}, "did you mean 'passages'"),
        ("reasoning", {"scale": 0.5}, "scale is 0.5"),
        ("reasoning", {"cv": -1.0}, "cv is -1"),
        ("reasoning", {"max_thought_tokens": 0}, "max_thought_tokens is 0"),
        ("best_of_n", {"n": 0}, "n is 0"),
        ("best_of_n", {"n": 2, "k": 3}, "k is 3, above the 2 candidates"),
        ("best_of_n", {"score": "decode"}, "score is 'decode'"),
        ("best_of_n", {"select": "vote"}, "'vote'"),
        ("multi_turn_reasoning", {"turns": 0}, "turns is 0"),
        ("beam", {"width": 0}, "width is 0"),
        ("beam", {"round_tokens": 0}, "round_tokens is 0"),
        ("beam", {"score": ""}, "score is ''"),
    ],
)
def test_parameters_that_do_not_do(name: str, parameters: dict[str, Any], told: str) -> None:
    sections = {
        "workload": {"arrivals": "all_at_once", "num_requests": 2, "input_tokens": 9, "output_tokens": 9},
        "clients": {"gpu": {"device": "h100-sxm", "model": "llama-3.1-8b"}},
        "pipeline": {name: parameters},
    }
    with pytest.raises(ScenarioError) as error:
        load(sections)
    assert told in str(error.value)


# --- on clients ---

STEPS = LinearSteps(base=1000, per_prefill_token=10, per_decode=5, per_context=0, per_prefill=0)
EACH_ALONE: dict[str, list[tuple[str, ...]]] = {
    "guarded": [("guard_input", "guard_output"), (PREFILL, DECODE)],
    "rag": [("embed",), ("retrieve",), ("rerank",), (PREFILL, DECODE)],
}


def run(pipeline: PipelineFactory, serves: list[tuple[str, ...]], num: int = 20, **how: Any) -> Run:
    inputs, outputs = [5 + 3 * i for i in range(num)], [i % 5 for i in range(num)]
    workload = table([4000 * i for i in range(num)], inputs, outputs)
    workload.sizes = how.pop("sizes", {})
    result = play(workload, pipeline=pipeline, perf=STEPS, num_clients=len(serves), serves=serves, **how)
    assert np.isin(result.records.requests.as_columns()["status"], (FINISHED, REFUSED)).all()
    return result


def column(result: Run, name: str) -> list[int]:
    columns = result.records.requests.as_columns()
    return list(columns[name][np.argsort(columns["request"])].tolist())


def test_question_answering_runs_as_the_list_of_its_stages() -> None:
    together: list[tuple[str, ...]] = [(PREFILL, DECODE), (PREFILL, DECODE)]
    apart: list[tuple[str, ...]] = [(PREFILL,), (DECODE,)]
    for serves in (together, apart):
        ours, plain = run(QuestionAnswering(), serves).records, run(StageList(), serves).records
        for name in ("requests", "tasks", "steps", "transfers"):
            ours_columns, plain_columns = (getattr(records, name).as_columns() for records in (ours, plain))
            assert all(np.array_equal(ours_columns[key], plain_columns[key]) for key in plain_columns)


def test_the_prompt_grows_by_the_passages() -> None:
    result = run(NewsSearch(passages=2, passage_tokens=30, candidates=3), EACH_ALONE["rag"])
    tasks = result.records.tasks.as_columns()
    computed = {
        kind: tasks["computed_tokens"][tasks["kind"] == index][np.argsort(tasks["request"][tasks["kind"] == index])]
        for index, kind in enumerate(result.records.stage_kinds)
    }
    inputs = np.array(column(result, "input_tokens")) - 60  # that of a request is its prompt with the passages
    assert np.array_equal(computed["embed"], inputs)
    assert computed["retrieve"].tolist() == [1] * 20
    assert np.array_equal(computed["rerank"], 3 * (inputs + 30))
    assert np.array_equal(computed[PREFILL], inputs + 60)


def test_the_first_token_comes_from_the_prefill_whatever_was_before_it() -> None:
    result = run(NewsSearch(candidates=6), EACH_ALONE["rag"])
    tasks = result.records.tasks.as_columns()
    is_prefill = tasks["kind"] == result.records.stage_kinds.index(PREFILL)
    ends = dict(zip(tasks["request"][is_prefill].tolist(), tasks["end_ns"][is_prefill].tolist(), strict=True))
    for index, (first, tokens) in enumerate(
        zip(column(result, "first_token_ns"), column(result, "output_tokens"), strict=True)
    ):
        assert first == (ends[index] if tokens else -1)


@pytest.mark.parametrize("name", ["guarded_qa", "beside", "two_guards", "reranked", "chat_support", "tokenized"])
def test_times_of_stages_sum_to_e2e(name: str) -> None:
    pipeline = VARIANTS[name]()
    serves = [tuple(dict.fromkeys(kind for kind in pipeline.kinds if kind not in (PREFILL, DECODE))), (PREFILL, DECODE)]
    result = run(pipeline, serves)
    requests, tasks = result.records.requests.as_columns(), result.records.tasks.as_columns()
    order = np.argsort(tasks["request"], kind="stable")
    times = stage_times(
        requests, {key: values[order] for key, values in tasks.items()}, len(result.records.stage_kinds)
    )
    assert times.sum(axis=(1, 2)).tolist() == (requests["end_ns"] - requests["arrival_ns"]).tolist()


def test_no_token_is_shown_before_the_guard_beside_has_passed() -> None:
    serves = EACH_ALONE["guarded"]
    before, beside, open_ = (
        run(pipeline, serves)
        for pipeline in (GuardedQA(output_guards=()), GuardedQA(output_guards=(), beside=True), QuestionAnswering())
    )
    tasks = beside.records.tasks.as_columns()
    is_guard = tasks["kind"] == beside.records.stage_kinds.index("guard_input")
    passed = dict(zip(tasks["request"][is_guard].tolist(), tasks["end_ns"][is_guard].tolist(), strict=True))
    for index, (guarded, unguarded) in enumerate(
        zip(column(beside, "first_token_ns"), column(open_, "first_token_ns"), strict=True)
    ):
        assert guarded == (max(passed[index], unguarded) if unguarded >= 0 else -1)
    waited, in_parallel = (np.array(column(result, "end_ns")).sum() for result in (before, beside))
    assert in_parallel < waited


def test_a_held_answer_is_shown_when_its_guard_has_passed() -> None:
    held, streamed = (run(GuardedQA(hold_answer=hold), EACH_ALONE["guarded"]) for hold in (True, False))
    assert column(held, "end_ns") == column(streamed, "end_ns")
    answered = np.array(column(held, "output_tokens")) > 0
    first, end = (np.array(column(held, name))[answered] for name in ("first_token_ns", "end_ns"))
    assert np.array_equal(first, end)
    assert (np.array(column(streamed, "first_token_ns"))[answered] < end).all()


@pytest.mark.parametrize("beside", [False, True])
def test_refused_requests_have_no_tokens(beside: bool) -> None:
    pipeline = GuardedQA(refused=0.5, beside=beside, output_guards=())
    result = run(pipeline, EACH_ALONE["guarded"], num=60)
    tokens = np.array(column(result, "output_tokens"))
    asked = np.arange(60) % 5
    assert set((tokens == asked)[asked > 0].tolist()) == {True, False}
    assert ((tokens == asked) | (tokens == 0)).all()
    prefills = int((result.records.tasks.as_columns()["kind"] == result.records.stage_kinds.index(PREFILL)).sum())
    assert (prefills == 60) == beside


def test_sizes_of_the_workload_reach_the_pipeline() -> None:
    sizes = {"num_passages": np.arange(20, dtype=np.int64) % 3}
    result = run(NewsSearch(passages=9, passage_tokens=30), EACH_ALONE["rag"], sizes=sizes)
    tasks = result.records.tasks.as_columns()
    prefill = tasks["kind"] == result.records.stage_kinds.index(PREFILL)
    by_request = dict(zip(tasks["request"][prefill].tolist(), tasks["computed_tokens"][prefill].tolist(), strict=True))
    assert [by_request[i] for i in range(20)] == [5 + 3 * i + 30 * (i % 3) for i in range(20)]
