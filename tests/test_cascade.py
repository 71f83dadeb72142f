"""Model routing and cascades: which models answer, closed forms on a lone request, what the user sees, and quality.

The small model is on the first client and the large one on the second. The ledger is on in every run here.
"""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kit import POLICIES, LinearSteps, Run, play, table
from mist.batching import BatchingPolicy
from mist.errors import ScenarioError
from mist.metrics.quality import answers, summarise_quality
from mist.pipeline import PipelineFactory
from mist.pipeline.cascade import Cascade
from mist.pipeline.model_router import ModelRouter
from mist.records import FINISHED, Records
from mist.request import Request, Stage
from mist.routing.least_outstanding import LeastOutstanding
from mist.routing.round_robin import RoundRobin
from mist.scenario import load
from mist.testing import PipelineContract, SmallScenario, random_scenario, record_bytes
from mist.workload import RequestTable

EXAMPLE = Path(__file__).parent.parent / "examples" / "cascade.yaml"
SMALL = LinearSteps(base=1000, per_prefill_token=10, per_decode=3, per_context=1, per_prefill=7)
LARGE = LinearSteps(base=9000, per_prefill_token=70, per_decode=5, per_context=2, per_prefill=11)
SERVES: list[tuple[str, ...]] = [("small",), ("large",)]
QUALITY = {"small": 0.7, "large": 0.9}

VARIANTS: dict[str, PipelineFactory] = {
    "shares": ModelRouter(probability={"small": 0.7}),
    "lengths": ModelRouter(max_input_tokens=12),
    "classified": ModelRouter(probability={"small": 0.4}, classifier="classify", verdict_tokens=2),
    "cascade": Cascade(escalate=0.4),
    "streamed": Cascade(escalate=0.4, hold_answer=False),
    "judged": Cascade(escalate=0.4, judge="judge", verdict_tokens=1),
    "three": Cascade(("small", "medium", "large"), escalate=0.5),
}


@pytest.mark.parametrize("name", VARIANTS)
class TestContract(PipelineContract):
    """Each keeps the contract of pipelines."""

    @pytest.fixture(autouse=True)
    def _named(self, name: str) -> None:
        self.made = VARIANTS[name]

    def pipeline(self) -> PipelineFactory:
        return self.made


def two_models(pipeline: PipelineFactory, workload: RequestTable, **how: Any) -> Run:
    """A run in which every step of the large model takes its own time; other stages run on a third client."""

    def prepare(_: Any, clients: list[Any]) -> None:
        clients[1].perf = LARGE

    others = tuple(kind for kind in pipeline.kinds if kind not in QUALITY)
    serves = [*SERVES, others] if others else SERVES
    how = {"perf": SMALL, "num_clients": len(serves), "serves": serves, "prepare": prepare, **how}
    return play(workload, pipeline=pipeline, **how)


def column(run: Run, name: str) -> list[int]:
    columns = run.records.requests.as_columns()
    return list(columns[name][np.argsort(columns["request"])].tolist())


def asked_of(records: Records) -> list[list[str]]:
    """The stage kinds of each request, in order."""
    tasks = records.tasks.as_columns()
    found: list[list[str]] = [[] for _ in range(len(records.requests))]
    for request, kind, how in zip(*(tasks[name].tolist() for name in ("request", "kind", "how")), strict=True):
        if how == 0:
            found[request].append(records.stage_kinds[kind])
    return found


def alone(steps: LinearSteps, prompt: int, output: int) -> tuple[int, int]:
    """(TTFT, E2E) of a lone request: its prompt in one step, then a step for each token after the first."""
    first = steps.of(prompt, 0, 0, 1)
    return first, first + sum(steps.of(0, 1, prompt + 1 + i, 0) for i in range(output - 1))


def workload(num: int = 40, gap_ns: int = 3000) -> RequestTable:
    made = table([gap_ns * i for i in range(num)], [5 + 7 * i % 31 for i in range(num)], [i % 6 for i in range(num)])
    made.sizes = {"difficulty": np.arange(num, dtype=np.int64) % 10}
    return made


# --- closed forms ---


@pytest.mark.parametrize(("prompt", "output"), [(30, 12), (1, 1), (7, 2), (25, 0)])
def test_a_cascade_that_escalates_takes_the_sum_of_both(prompt: int, output: int) -> None:
    small, large = (alone(steps, prompt, output) for steps in (SMALL, LARGE))
    for hold in (True, False):
        run = two_models(Cascade(escalate=1.0, hold_answer=hold), table([50], [prompt], [output]))
        assert column(run, "end_ns") == [50 + small[1] + large[1]]
        assert column(run, "first_token_ns") == [50 + small[1] + large[0] if output else -1]
        assert column(run, "output_tokens") == [output]  # of the answer that is kept
        assert asked_of(run.records) == [["small", "large"]]


@pytest.mark.parametrize(("prompt", "output"), [(30, 12), (1, 1), (7, 2)])
def test_an_answer_that_is_kept_is_shown_whole_or_streamed(prompt: int, output: int) -> None:
    first, end = alone(SMALL, prompt, output)
    for hold, judge in product((True, False), ("", "judge")):
        run = two_models(Cascade(escalate=0.0, hold_answer=hold, judge=judge), table([50], [prompt], [output]))
        judged = SMALL.of(prompt + output, 0, 0, 1) if judge else 0
        assert column(run, "end_ns") == [50 + end + judged]
        assert column(run, "first_token_ns") == [50 + (end + judged if hold else first)]
        assert column(run, "output_tokens") == [output]


def test_without_escalation_it_is_the_small_model_bit_for_bit() -> None:
    streamed = two_models(Cascade(escalate=0.0, hold_answer=False), workload())
    routed = two_models(ModelRouter(probability={"small": 1.0}), workload())
    assert record_bytes(streamed.records) == record_bytes(routed.records)
    plain = play(workload(), perf=SMALL)  # prefill and decode on one client: the same steps and requests
    assert plain.records.steps.cells == streamed.records.steps.cells
    assert plain.records.requests.cells == streamed.records.requests.cells
    held = two_models(Cascade(escalate=0.0), workload())
    assert held.records.steps.cells == streamed.records.steps.cells
    assert column(held, "end_ns") == column(streamed, "end_ns")


def test_always_escalating_asks_the_large_model_when_the_small_one_is_done() -> None:
    """The large model's requests are those of a run of its own, which arrive when the small one's answers end."""
    both = two_models(Cascade(escalate=1.0), workload())
    small = two_models(Cascade(escalate=0.0), workload())
    ends = column(small, "end_ns")
    order = np.argsort(ends, kind="stable")
    given = workload()
    later = table(np.array(ends)[order], given.input_tokens[order], given.output_tokens[order])
    large = play(later, perf=LARGE)
    for name in ("first_token_ns", "end_ns", "output_tokens"):
        assert np.array(column(both, name))[order].tolist() == column(large, name)


# --- who is asked ---


@pytest.mark.parametrize("policy", POLICIES)
def test_who_is_asked_does_not_depend_on_the_policy(policy: type[BatchingPolicy]) -> None:
    """Common random numbers: the request's own, whatever batches, routes or how tight memory is."""
    serves: list[tuple[str, ...]] = [("small", "judge"), ("large", "judge", "classify"), ("small", "large", "classify")]
    for pipeline in (
        Cascade(escalate=0.4, judge="judge"),
        ModelRouter(probability={"small": 0.6}, classifier="classify"),
    ):
        chosen = [pipeline_kinds(pipeline, i) for i in range(40)]
        for router, blocks in ((RoundRobin(), 1000), (LeastOutstanding(), 20)):
            run = play(workload(gap_ns=300), pipeline=pipeline, policy=policy, router=router, num_blocks=blocks,
                       block_size=4, num_clients=3, serves=serves)  # fmt: skip
            assert asked_of(run.records) == chosen


def pipeline_kinds(pipeline: PipelineFactory, index: int) -> list[str]:
    made = workload()
    sizes = {name: int(values[index]) for name, values in made.sizes.items()}
    request = Request(index, 0, int(made.input_tokens[index]), int(made.output_tokens[index]), sizes=sizes)
    stages = list(pipeline(request, lambda: np.random.default_rng((7, index))))
    return [stage.kind for stage in stages if isinstance(stage, Stage)]


@pytest.mark.parametrize("share", [0.0, 0.25, 0.8, 1.0])
def test_shares(share: float) -> None:
    num = 4000
    requests = [Request(i, 0, 10, 5) for i in range(num)]

    def kinds(pipeline: PipelineFactory) -> list[list[str]]:
        made = [pipeline(r, lambda r=r: np.random.default_rng((1, r.index))) for r in requests]  # type: ignore[misc]
        return [[stage.kind for stage in stages if isinstance(stage, Stage)] for stages in made]

    error = 3.9 * math.sqrt(share * (1 - share) / num)
    routed = kinds(ModelRouter(probability={"small": share}))
    assert abs(routed.count(["small"]) / num - share) <= error
    escalated = kinds(Cascade(escalate=share))
    assert abs(escalated.count(["small", "large"]) / num - share) <= error
    three = kinds(Cascade(("small", "medium", "large"), escalate=share))
    for stages, wanted in ((1, 1 - share), (2, share * (1 - share)), (3, share**2)):
        found = sum(len(each) == stages for each in three) / num
        assert abs(found - wanted) <= 3.9 * math.sqrt(wanted * (1 - wanted) / num)
    more = kinds(ModelRouter(probability={"small": min(1, share + 0.1)}))
    assert all(after == ["small"] for before, after in zip(routed, more, strict=True) if before == ["small"])


def test_shares_of_three_models() -> None:
    router = ModelRouter(("a", "b", "c"), probability={"c": 0.3, "a": 0.5})  # b is asked for 0, c for the rest
    kinds = [next(router(Request(i, 0, 1, 1), lambda i=i: np.random.default_rng(i))).kind for i in range(500)]  # type: ignore
    assert set(kinds) == {"a", "c"}


def test_lengths_and_columns_choose() -> None:
    made = workload()
    lengths, difficulty = made.input_tokens.tolist(), made.sizes["difficulty"].tolist()
    rules: list[tuple[PipelineFactory, list[bool]]] = [
        (ModelRouter(max_input_tokens=12), [n > 12 for n in lengths]),
        (ModelRouter(column="difficulty", above=6), [d > 6 for d in difficulty]),
        (Cascade(column="difficulty", above=6), [d > 6 for d in difficulty]),
    ]
    for pipeline, is_large in rules:
        asked = asked_of(two_models(pipeline, workload()).records)
        assert [kinds[-1] == "large" for kinds in asked] == is_large
        assert all(("small" in kinds) == (isinstance(pipeline, Cascade) or not large)
                   for kinds, large in zip(asked, is_large, strict=True))  # fmt: skip
    three = ("a", "b", "c")
    places = [Cascade(three, "d", (2, 5)).by_column(Request(0, 0, 1, 1, sizes={"d": d})) for d in (0, 2, 3, 5, 6)]
    assert places == [0, 0, 1, 1, 2]


# --- many requests ---


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "three"])
def test_random_scenarios_under_the_ledger(name: str) -> None:
    for seed in range(60):
        scenario = random_scenario(seed)
        serves = [("small",), ("large", "judge"), ("small", "large", "judge", "classify")]
        run = scenario.play(POLICIES[seed % len(POLICIES)], pipeline=VARIANTS[name], num_clients=3, serves=serves)
        requests = run.records.requests.as_columns()
        outputs = np.array([output for _, _, output, _ in scenario.requests])
        finished = requests["status"] == FINISHED
        assert (requests["output_tokens"] == outputs[requests["request"]])[finished].all()
        for client in run.clients:
            assert client.residents.kv.used == 0


def test_prompts_share_prefixes_on_each_model() -> None:
    """The second of two equal prompts finds the first one's blocks, on the small model and on the large one."""
    keys = (1, 2, 3, 4)
    scenario = SmallScenario(((0, 16, 3, keys), (10**7, 16, 3, keys)), max_num_batched_tokens=64, unit_tokens=4,
                             caching=True)  # fmt: skip
    for pipeline, models in ((Cascade(escalate=1.0), 2), (ModelRouter(probability={"small": 0.0}), 1)):
        run = scenario.play(pipeline=pipeline, num_clients=2, serves=SERVES)
        tasks = run.records.tasks.as_columns()
        assert tasks["cached_tokens"].tolist() == [0] * models + [12] * models
    judged = scenario.play(pipeline=Cascade(escalate=0.0, judge="judge"), num_clients=1, serves=[("small", "judge")])
    tasks = judged.records.tasks.as_columns()
    is_judge = tasks["kind"] == judged.records.stage_kinds.index("judge")
    assert not tasks["cached_tokens"][is_judge].any()  # it begins with its own instructions


# --- quality ---


def quality_of(run: Run, quality: dict[str, float]) -> dict[str, Any] | None:
    requests, tasks = run.records.requests.as_columns(), run.records.tasks.as_columns()
    finished = {name: values[requests["status"] == FINISHED] for name, values in requests.items()}
    return summarise_quality(quality, answers(quality, finished, tasks, run.records.stage_kinds))


def test_quality_is_the_mean_over_the_answers_kept() -> None:
    for pipeline in (
        Cascade(escalate=0.4),
        Cascade(escalate=0.4, judge="judge"),
        ModelRouter(probability={"small": 0.7}),
    ):
        run = two_models(pipeline, workload())
        kept = [[kind for kind in kinds if kind in QUALITY][-1] for kinds in asked_of(run.records)]
        answered = [kind for kind, tokens in zip(kept, column(run, "output_tokens"), strict=True) if tokens]
        share = answered.count("large") / len(answered)
        found = quality_of(run, QUALITY)
        assert found is not None
        assert found["mean"] == pytest.approx(0.7 * (1 - share) + 0.9 * share)
        assert found["answered_by"] == pytest.approx({"small": 1 - share, "large": share})
    assert quality_of(run, {}) is None
    nothing = two_models(Cascade(escalate=0.4), table([0], [5], [0]))
    assert quality_of(nothing, QUALITY) == {"mean": None, "answered_by": {"small": None, "large": None}}


# --- scenarios ---


def test_the_example_trades_quality_for_cost() -> None:
    sets = ["workload.num_requests=200"]
    results = {
        share: load(EXAMPLE, [*sets, f"pipeline.cascade.escalate={share}"]).run(check=True) for share in (0.0, 0.3, 1.0)
    }
    means = [result.metrics["quality"]["mean"] for result in results.values()]
    busy = [result.metrics["clients"]["large"]["utilisation"] for result in results.values()]
    given = load(EXAMPLE).tenants[""].pipeline.params["quality"]
    assert (means[0], means[2]) == pytest.approx((given["small"], given["large"]))
    assert means == sorted(means)
    assert busy == sorted(busy)
    assert busy[0] == 0
    assert "answered by small" in str(results[0.3])
    assert load(results[0.3].scenario).run().metrics["quality"] == results[0.3].metrics["quality"]


BASE: dict[str, Any] = {
    "workload": {"arrivals": "all_at_once", "num_requests": 8, "input_tokens": 90, "output_tokens": 9},
    "clients": {
        "small": {"device": "h100-sxm", "model": "llama-3.2-1b", "serves": ["small"]},
        "large": {"device": "h100-sxm", "model": "llama-3.1-8b", "serves": ["large"]},
    },
}


@pytest.mark.parametrize(
    ("pipeline", "told"),
    [
        ({"cascade": {}}, "escalate: give a probability"),
        ({"cascade": {"escalate": 1.2}}, "escalate is 1.2"),
        ({"cascade": {"escalate": 0.2, "column": "difficulty", "above": 3}}, "in place of it"),
        ({"cascade": {"column": "difficulty"}}, "column and above go together"),
        ({"cascade": {"column": "difficulty", "above": [1, 2]}}, "above is 1, 2: give a limit for each of small"),
        ({"cascade": {"escalate": 0.2, "models": ["small"]}}, "models is ['small']"),
        ({"cascade": {"escalate": 0.2, "models": ["small", "decode"]}}, "models is 'decode'"),
        ({"cascade": {"escalate": 0.2, "quality": {"small": 0.7}}}, "quality is of small: give one of each"),
        ({"cascade": {"escalate": 0.2, "verdict_tokens": 2}}, "verdict_tokens is 2"),
        ({"cascade": {"escalate": 0.2, "judge": "prefill"}}, "judge is 'prefill'"),
        ({"model_router": {}}, "one of probability, max_input_tokens, or column"),
        ({"model_router": {"probability": {"small": 0.5}, "max_input_tokens": 9}}, "one of probability"),
        ({"model_router": {"probability": {"smal": 0.5}}}, "probability has 'smal'"),
        ({"model_router": {"probability": {"small": 0.8, "large": 0.3}}}, "1 together at most"),
        ({"model_router": {"probability": {"small": -0.1}}}, "from 0 to 1"),
        ({"model_router": {"max_input_tokens": [4, 2], "models": ["a", "b", "c"]}}, "max_input_tokens is 4, 2"),
        ({"model_router": {"probability": {"small": 0.5}, "classifier": "decode"}}, "classifier is 'decode'"),
        ({"model_router": {"column": "difficulty", "above": 3}}, "the workload tells no size 'difficulty'"),
        ({"model_router": {"probability": {"small": 0.5}, "classifier": "gate"}}, "gate"),
    ],
)
def test_parameters_that_do_not_do(pipeline: dict[str, Any], told: str) -> None:
    with pytest.raises(ScenarioError) as error:
        load({**BASE, "pipeline": pipeline}).run()
    assert told in str(error.value)


def test_a_model_that_answers_may_speculate() -> None:
    speculation = {"method": "mtp", "num_draft_tokens": 3, "acceptance": 1.0}
    clients = {name: {**pool, "perf": "roofline", "speculation": speculation} for name, pool in BASE["clients"].items()}
    scenario = {**BASE, "clients": clients, "pipeline": {"cascade": {"escalate": 1.0}}}
    tasks = load(scenario).run(check=True).records.tasks.as_columns()
    assert set((tasks["last_step"] - tasks["join_step"]).tolist()) == {2}  # 8 tokens after the first, 4 a step
