"""The contract suites, over everything that ships and over deliberately broken policies, pipelines and models."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import pytest

from kit import LinearSteps
from mist.admission.early_rejection import EarlyRejection
from mist.admission.max_waiting import MaxWaiting
from mist.admission.rate_limit import RateLimit
from mist.batching.chunked import Chunked
from mist.batching.continuous import Continuous
from mist.errors import InvariantError
from mist.memory.eviction.lru import LRU
from mist.memory.eviction.ttl import TTL
from mist.perf.roofline import Roofline
from mist.pipeline.agent import Agent
from mist.pipeline.beam import Beam
from mist.pipeline.cascade import Cascade
from mist.pipeline.model_router import ModelRouter
from mist.pipeline.stages import StageList
from mist.registry import lookup, names
from mist.request import Batch, Stage, Wait
from mist.routing.least_loaded import LeastLoaded
from mist.routing.least_outstanding import LeastOutstanding
from mist.testing import (
    AdmissionContract,
    BatchingContract,
    EvictionContract,
    OrderContract,
    PerfModelContract,
    PipelineContract,
    RoutingContract,
    small_deployment,
)

CONTRACTS = {
    "batching": (BatchingContract, "policy"),
    "routing": (RoutingContract, "router"),
    "admission": (AdmissionContract, "admission"),
    "pipeline": (PipelineContract, "pipeline"),
    "perf": (PerfModelContract, "model"),
    "eviction": (EvictionContract, "policy"),
    "order": (OrderContract, "order"),
}
#: implementations whose parameters have no defaults, or such that tiny clients take long
COMPLETE: dict[str, Any] = {
    "agent": partial(Agent, call_tokens=9, tool_output_tokens=60),
    "ttl": partial(TTL, 100),
    "beam": partial(Beam, width=2, expansion=2, rounds=1, round_tokens=4),
    "cascade": partial(Cascade, escalate=0.4),
    "least_loaded": partial(LeastLoaded, "tokens_in_process"),
    "early_rejection": partial(EarlyRejection, ttft_s=2e-6, tpot_s=1.1e-6),
    "max_waiting": partial(MaxWaiting, 1),
    "rate_limit": partial(RateLimit, 1e6, 2),
    "model_router": partial(ModelRouter, probability={"small": 0.6}),
}


def suite(kind: str, make: Any) -> Any:
    """The contract of `kind` for what `make` returns."""
    contract, method = CONTRACTS[kind]
    return type("Suite", (contract,), {method: staticmethod(make)})()


def checks(kind: str) -> list[str]:
    return [name for name in dir(CONTRACTS[kind][0]) if name.startswith("test_")]


def is_host_model(kind: str, name: str) -> bool:
    """Whether it is a `HostModel`, whose parameters have no defaults; their own tests hold them to their contract."""
    return kind == "perf" and hasattr(lookup(kind, name), "demand")


@pytest.mark.parametrize(
    ("kind", "name", "check"),
    [
        (kind, name, check)
        for kind in CONTRACTS
        for name in names(kind)
        for check in checks(kind)
        if not is_host_model(kind, name)
    ],
)
def test_what_ships_keeps_its_contract(kind: str, name: str, check: str) -> None:
    implementation = COMPLETE.get(name, lookup(kind, name))
    if kind == "perf" and (problem := implementation().supports(small_deployment())):
        pytest.skip(problem)  # needs data or a fallback; its own tests bring them
    checked = suite(kind, implementation)
    checked.oracle = name.startswith("oracle_")
    getattr(checked, check)()


def test_the_made_up_performance_model_keeps_the_contract() -> None:
    for check in checks("perf"):
        getattr(suite("perf", LinearSteps), check)()


# --- broken on purpose ---


class Keeper(LRU):
    """Never gives up what was used first."""

    def evict(self, now: int, *, full: bool) -> int | None:
        self._order.move_to_end(next(iter(self._order))) if self._order else None
        return super().evict(now, full=full and len(self._order) > 1)


class Forgetful(LRU):
    """Gives up what it has given up before."""

    def evict(self, now: int, *, full: bool) -> int | None:
        return next(iter(self._order)) if full else None


@pytest.mark.parametrize("broken", [Keeper, Forgetful])
def test_broken_eviction_policies_are_caught(broken: Any) -> None:
    with pytest.raises(AssertionError, match="go"):
        suite("eviction", broken).test_what_is_there_goes_once()


class Lazy(Chunked):
    """Stops admitting once three have run."""

    def next_batch(self, queue: Any, cohort: Any, budget: Any, now: int) -> Batch | Wait:
        self.served = getattr(self, "served", 0)
        if self.served >= 3 and not cohort.count and not queue.prefilling:
            return Wait()
        batch = super().next_batch(queue, cohort, budget, now)
        self.served += len(batch.chunks) if isinstance(batch, Batch) else 0
        return batch


class Greedy(Chunked):
    """Takes twice the tokens that it may."""

    def next_batch(self, queue: Any, cohort: Any, budget: Any, now: int) -> Batch | Wait:
        double = Chunked(2 * self.max_num_batched_tokens, self.max_num_seqs)
        return double.next_batch(queue, cohort, budget, now)


class Clairvoyant(Continuous):
    """Serves the shortest true output first."""

    def next_batch(self, queue: Any, cohort: Any, budget: Any, now: int) -> Batch | Wait:
        queue.waiting = type(queue.waiting)(sorted(queue.waiting, key=lambda t: t.request.oracle_output_tokens))
        return super().next_batch(queue, cohort, budget, now)


class Sharing(Chunked):
    """Remembers across runs."""

    steps: ClassVar[list[int]] = []

    def next_batch(self, queue: Any, cohort: Any, budget: Any, now: int) -> Batch | Wait:
        self.steps.append(now)
        half = Chunked(self.max_num_batched_tokens, max(1, self.max_num_seqs // (1 + len(self.steps) % 2)))
        return half.next_batch(queue, cohort, budget, now)


class Unreserved(Chunked):
    """Decodes without reserving blocks for it."""

    def next_batch(self, queue: Any, cohort: Any, budget: Any, now: int) -> Batch | Wait:
        return Batch([], decode=True) if cohort.count else super().next_batch(queue, cohort, budget, now)


class Homebound(Chunked):
    """Decodes once it has had a prompt of its own."""

    def next_batch(self, queue: Any, cohort: Any, budget: Any, now: int) -> Batch | Wait:
        self.had_one = getattr(self, "had_one", False) or len(queue) > 0
        return super().next_batch(queue, cohort, budget, now) if self.had_one else Wait()


@pytest.mark.parametrize(
    ("policy", "check", "says"),
    [
        (Homebound, "test_it_serves_decodes_that_are_handed_over", "idles with"),
        (Lazy, "test_it_serves_every_request_within_its_limits", "idles with 0 running tasks"),
        (Greedy, "test_it_serves_every_request_within_its_limits", "tokens of"),
        (Unreserved, "test_it_serves_every_request_within_its_limits", "KV blocks"),
        (Clairvoyant, "test_it_does_not_know_true_output_lengths", "name it oracle_"),
        (Sharing, "test_the_same_scenario_gives_the_same_records", "share state"),
    ],
)
def test_broken_batching_policies_are_caught(policy: Any, check: str, says: str) -> None:
    with pytest.raises((AssertionError, InvariantError), match=says):
        getattr(suite("batching", policy), check)()


def test_a_batch_that_the_client_cannot_run_is_caught() -> None:
    class Empty(Chunked):
        def next_batch(self, *_: Any) -> Batch | Wait:
            return Batch([], decode=True)

    class Overdone(Chunked):
        def next_batch(self, queue: Any, cohort: Any, budget: Any, now: int) -> Batch | Wait:
            batch = super().next_batch(queue, cohort, budget, now)
            if isinstance(batch, Batch):
                batch.chunks = [(task, n + 1) for task, n in batch.chunks]
            return batch

    class Impatient(Chunked):
        def next_batch(self, queue: Any, cohort: Any, budget: Any, now: int) -> Batch | Wait:
            return Wait(now)

    for policy, says in ((Empty, "empty batch"), (Overdone, "a chunk of"), (Impatient, "Wait")):
        with pytest.raises((AssertionError, InvariantError), match=says):
            suite("batching", policy).test_it_serves_every_request_within_its_limits()


class Elsewhere:
    """Makes up a view, once in a while."""

    def choose(self, task: Any, views: Any, now: int) -> Any:
        return type(views[0])(7, "nowhere") if now % 7 == 3 else views[0]


class Scribbler(LeastOutstanding):
    def choose(self, task: Any, views: Any, now: int) -> Any:
        views[0].num_outstanding += 1
        return views[0]


class PeekingRouter(LeastOutstanding):
    def choose(self, task: Any, views: Any, now: int) -> Any:
        return views[task.request.oracle_output_tokens % 2]


class ForgetfulRouter:
    """Its counter belongs to the class."""

    turns: ClassVar[list[int]] = []

    def choose(self, task: Any, views: Any, now: int) -> Any:
        self.turns.append(now)
        return views[len(self.turns) // 2 % len(views)]


@pytest.mark.parametrize(
    ("router", "check", "says"),
    [
        (Elsewhere, "test_it_chooses_one_of_the_views_and_changes_none", "not among"),
        (Scribbler, "test_it_chooses_one_of_the_views_and_changes_none", "changed the views"),
        (PeekingRouter, "test_it_does_not_know_true_output_lengths", "name it oracle_"),
        (ForgetfulRouter, "test_the_same_scenario_gives_the_same_records", "share state"),
    ],
)
def test_broken_routers_are_caught(router: Any, check: str, says: str) -> None:
    with pytest.raises(AssertionError, match=says):
        getattr(suite("routing", router), check)()


def stages(*made: Stage, kinds: tuple[str, ...] = ("prefill", "decode"), fixed: bool = False) -> Any:
    """A pipeline that yields `made` whatever the request."""

    class Made(StageList):
        def __call__(self, request: Any, rng: Any) -> Any:
            for stage in made:
                result = yield stage
                assert result.end_ns > result.start_ns

    factory = Made(kinds)
    factory.is_fixed = fixed
    return factory


@pytest.mark.parametrize(
    ("factory", "says"),
    [
        (stages(Stage("embed", 1)), "announced were"),
        (stages(Stage("prefill", 1), kinds=("prefill", "rerank"), fixed=True), "a fixed pipeline"),
        (stages(Stage("decode", oracle_output_tokens=1)), "a decode comes first"),
        (stages(Stage("prefill", 0)), "of no tokens"),
        (stages(Stage("prefill", 1), Stage("decode")), "a decode of no tokens"),
        (stages(*[Stage("prefill", 1)] * 1001), "isn't over"),
    ],
)
def test_broken_pipelines_are_caught(factory: Any, says: str) -> None:
    with pytest.raises(AssertionError, match=says):
        suite("pipeline", lambda: factory).test_it_yields_the_stages_that_it_announces()


class Fractional(LinearSteps):
    def step_time(self, step: Any) -> int:
        return super().step_time(step) / 2  # type: ignore[return-value]


class BelowFloor(LinearSteps):
    def floor_time(self, step: Any) -> int:
        return 5000


class Warming(Roofline):
    """Gets faster with every answer."""

    def step_time(self, step: Any) -> int:
        self._dense = [0.99 * ns for ns in self._dense]
        return super().step_time(step)


@pytest.mark.parametrize(
    ("model", "check", "says"),
    [
        (Fractional, "test_times_are_whole_nanoseconds_and_never_beat_the_floor", "not an int"),
        (BelowFloor, "test_times_are_whole_nanoseconds_and_never_beat_the_floor", "beat the floor"),
        (partial(LinearSteps, per_context=-1), "test_more_work_never_takes_less_time", "ns for Step"),
        (Warming, "test_an_answer_depends_on_the_step_alone", "answered before"),
    ],
)
def test_broken_performance_models_are_caught(model: Any, check: str, says: str) -> None:
    with pytest.raises(AssertionError, match=says):
        getattr(suite("perf", model), check)()
