"""The contract suites: what every batching or eviction policy, router, pipeline and performance model has to hold.

A third party's test class inherits one and names its implementation; any runner that collects `test_` methods does the
rest. Every run is small, random and under the ledger; the suites never judge how good a policy is.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from mist.batching import BatchingPolicy, Budget, CohortView, Queue
from mist.batching.chunked import Chunked
from mist.batching.orders import Order
from mist.hardware import Device, Platform
from mist.memory.eviction import Eviction
from mist.model import LayerGroup, ModelSpec
from mist.perf import BOUNDS, ORIGINS, Deployment, PerfModel
from mist.pipeline import PipelineFactory
from mist.records import FINISHED, REFUSED, REJECTED, UNFINISHED, Records
from mist.request import (
    DECODE,
    PREFILL,
    Batch,
    ClientView,
    Delay,
    Fork,
    Pipeline,
    Request,
    Stage,
    StageResult,
    Step,
    Task,
    Wait,
)
from mist.routing import RoutingPolicy
from mist.testing.cluster import KVLink, Run, SmallScenario, random_scenario, record_bytes, with_hints
from mist.units import GB, GIB, NS_PER_S

#: A run of a small scenario that isn't over by then (tens of thousands of steps) will never be.
LIVELOCK_NS = 50_000_000
#: what delays may add to that, in which nobody works
LONGEST_DELAYS_NS = 3600 * NS_PER_S


def _all_leave(run: Run, what: str) -> None:
    status = run.records.requests.as_columns()["status"]
    stuck = int((status == UNFINISHED).sum())
    assert not stuck, f"{what}: {stuck} requests are still in the system after {LIVELOCK_NS} ns"
    assert bool(np.isin(status, (FINISHED, REJECTED, REFUSED)).all()), f"{what}: status {sorted(set(status.tolist()))}"


def _same_until_it_knows(what: str, scenario: SmallScenario, play_it: Callable[[SmallScenario], Run]) -> None:
    """Lengthen one output: no step that starts before that request's end in the shorter run may differ."""
    rows = play_it(scenario).records
    outcome = rows.requests.as_columns()
    finished = np.flatnonzero((outcome["status"] == FINISHED) & (outcome["output_tokens"] > 1))
    for at in finished[:2].tolist():
        longer = play_it(scenario.with_longer_output(int(outcome["request"][at]), 9)).records
        known_ns = int(outcome["end_ns"][at])
        before = [[row for row in _rows(run) if row[1] < known_ns and row[2] <= known_ns] for run in (rows, longer)]
        assert before[0] == before[1], f"{what} reads true output lengths; name it oracle_* and set `oracle = True`"


def _rows(records: Records) -> list[tuple[int, ...]]:
    columns = records.steps.as_columns()
    return sorted(zip(*(columns[name].tolist() for name in records.steps.columns), strict=True))


@dataclass
class _Checked:
    """A batching policy whose every batch is looked at before the client sees it."""

    policy: BatchingPolicy
    max_num_seqs: int = field(init=False)
    max_num_batched_tokens: int = field(init=False)
    order: Order | None = field(init=False)
    reserves_output: bool = field(init=False)

    def __post_init__(self) -> None:
        self.reserves_output = getattr(self.policy, "reserves_output", False)
        self.max_num_seqs = self.policy.max_num_seqs
        self.max_num_batched_tokens = self.policy.max_num_batched_tokens
        self.order = getattr(self.policy, "order", None)

    def next_batch(self, queue: Queue, cohort: CohortView, budget: Budget, now: int) -> Batch | Wait:
        batch = self.policy.next_batch(queue, cohort, budget, now)
        if isinstance(batch, Wait):
            assert batch.until_ns is None or batch.until_ns > now, f"Wait({batch.until_ns}) at {now} ns"
            return batch
        assert len({id(task) for task, _ in batch.chunks}) == len(batch.chunks), "a task has two chunks in one step"
        for task, num_tokens in batch.chunks:
            story = f"request {task.request.index}: a chunk of {num_tokens} tokens"
            assert task.admission >= 0, f"{story}, but it isn't admitted (or was preempted meanwhile)"
            assert 1 <= num_tokens <= task.remaining_tokens, f"{story} of {task.remaining_tokens}"
        assert budget.num_running <= self.max_num_seqs, f"{budget.num_running} sequences of {self.max_num_seqs}"
        total = sum(num_tokens for _, num_tokens in batch.chunks) + (cohort.count if batch.decode else 0)
        alone = len(batch.chunks) == 1 and not batch.decode
        assert total <= self.max_num_batched_tokens or alone, f"{total} tokens of {self.max_num_batched_tokens}"
        return batch


class BatchingContract:
    """Inherit, and return your policy from `policy`. `oracle`: it reads true output lengths and says so in its name."""

    oracle = False
    num_scenarios = 40

    def policy(self, max_num_seqs: int, max_num_batched_tokens: int) -> BatchingPolicy:
        """A fresh instance with these limits."""
        raise NotImplementedError

    def _play(self, scenario: SmallScenario) -> Run:
        """On one client, or where the policy `serves` one stage alone with a chunked one beside it for the other."""
        mine = getattr(self.policy(max_num_seqs=9, max_num_batched_tokens=9), "serves", (PREFILL, DECODE))
        serves = [each for each in (mine, tuple(kind for kind in (PREFILL, DECODE) if kind not in mine)) if each]
        clients = iter(range(2))

        def policy(max_num_seqs: int, max_num_batched_tokens: int) -> BatchingPolicy:
            if next(clients):
                return Chunked(max_num_batched_tokens, max_num_seqs)
            return _Checked(self.policy(max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens))

        return scenario.play(policy, num_clients=len(serves), serves=serves, until_ns=LIVELOCK_NS)

    def test_it_serves_every_request_within_its_limits(self) -> None:
        for seed in range(self.num_scenarios):
            _all_leave(self._play(random_scenario(seed)), f"random_scenario({seed})")

    def test_it_serves_decodes_that_are_handed_over(self) -> None:
        """They join what runs without passing its queue; it decodes for them, and computes again who was preempted."""
        if DECODE not in getattr(self.policy(max_num_seqs=9, max_num_batched_tokens=9), "serves", (DECODE,)):
            return
        for seed in range(self.num_scenarios):
            clients = iter((Chunked, lambda **limits: _Checked(self.policy(**limits))))
            run = random_scenario(seed).play(
                lambda clients=clients, **limits: next(clients)(**limits),
                num_clients=2,
                serves=[(PREFILL,), (DECODE,)],
                nic=KVLink(bytes_per_token=8, bytes_per_s=1e9),
                until_ns=LIVELOCK_NS,
            )
            _all_leave(run, f"random_scenario({seed})")

    def test_the_same_scenario_gives_the_same_records(self) -> None:
        for seed in range(self.num_scenarios // 4):
            first, second = (record_bytes(self._play(random_scenario(seed)).records) for _ in range(2))
            assert first == second, f"random_scenario({seed}) differs from run to run: instances share state"

    def test_it_does_not_know_true_output_lengths(self) -> None:
        for seed in range(0 if self.oracle else self.num_scenarios):
            _same_until_it_knows("the policy", random_scenario(seed, roomy=True), self._play)


class RoutingContract:
    """Inherit, and return your policy from `router`. `oracle`: it reads true output lengths and says so in its name."""

    oracle = False
    num_scenarios = 40

    def router(self) -> RoutingPolicy:
        """A fresh instance."""
        raise NotImplementedError

    def _play(self, scenario: SmallScenario) -> Run:
        num_clients = 2 + len(scenario.requests) % 3
        workload = with_hints(scenario.workload(), len(scenario.requests))
        return scenario.play(workload=workload, router=self.router(), num_clients=num_clients, until_ns=LIVELOCK_NS)

    def test_it_chooses_one_of_the_views_and_changes_none(self) -> None:
        rng = random.Random(1)
        router = self.router()
        for now in range(5 * self.num_scenarios):
            indices = sorted(rng.sample(range(8), rng.randint(1, 5)))
            views = [_view(i, rng) for i in indices]
            task = Task(Request(now, now, 10, 5), Stage("prefill", 10), 0, 10, now)
            before = copy.deepcopy(views)
            chosen = router.choose(task, views, now)
            assert any(chosen is view for view in views), f"it chose {chosen}, which was not among {views}"
            assert views == before, "it changed the views"

    def test_every_request_is_served(self) -> None:
        for seed in range(self.num_scenarios):
            _all_leave(self._play(random_scenario(seed)), f"random_scenario({seed})")

    def test_the_same_scenario_gives_the_same_records(self) -> None:
        for seed in range(self.num_scenarios // 4):
            first, second = (record_bytes(self._play(random_scenario(seed)).records) for _ in range(2))
            assert first == second, f"random_scenario({seed}) differs from run to run: instances share state"

    def test_it_does_not_know_true_output_lengths(self) -> None:
        for seed in range(0 if self.oracle else self.num_scenarios):
            _same_until_it_knows("the router", random_scenario(seed, roomy=True), self._play)


def _view(index: int, rng: random.Random) -> ClientView:
    view = ClientView(index, f"gpu-{index}", kv_blocks=64)
    view.num_waiting, view.num_running = rng.randint(0, 3), rng.randint(0, 3)
    view.num_outstanding = view.num_waiting + view.num_running
    view.pending_prefill_tokens, view.decode_context = rng.randint(0, 99), rng.randint(0, 99)
    view.kv_blocks_used = rng.randint(0, 64)
    view.num_decodes, view.longest_decode, view.oracle_longest_decode = (rng.randint(0, 9) for _ in range(3))
    view.chunk_tokens, view.chunk_ns, view.decode_ns = rng.randint(1, 64), rng.randint(1, 999), rng.randint(1, 99)
    return view


class PipelineContract:
    """Inherit, and return your pipeline from `pipeline`."""

    num_requests = 40
    max_num_stages = 1000

    def pipeline(self) -> PipelineFactory:
        """A fresh instance."""
        raise NotImplementedError

    def _stages(self, factory: PipelineFactory, index: int) -> list[tuple[Stage | None, Stage]]:
        """The stages of a made-up request, each answered as if it had taken 1 µs, branches one after another.

        Each comes with the stage before it, that of the fork where it begins a branch; None: it is the first, or after
        a join.
        """
        request = Request(index, 0, 1 + 7 * index % 50, index % 9)
        stages: list[tuple[Stage | None, Stage]] = []
        self._follow(factory(request, lambda: np.random.default_rng(index)), None, stages)
        return stages

    def _follow(
        self, pipeline: Pipeline, before: Stage | None, stages: list[tuple[Stage | None, Stage]]
    ) -> StageResult:
        last = StageResult(0, 0)
        try:
            stage = next(pipeline)
            while len(stages) < self.max_num_stages:
                last = self._answer(stage, before, stages)
                before = stage if isinstance(stage, Stage) else None
                stage = pipeline.send(last)
        except StopIteration as end:
            return end.value or last
        raise AssertionError(f"a pipeline isn't over after {self.max_num_stages} stages")

    def _answer(
        self, stage: Stage | Fork, before: Stage | None, stages: list[tuple[Stage | None, Stage]]
    ) -> StageResult:
        if isinstance(stage, Stage):
            if not stage.shown_tokens:
                stages.append((before, stage))
            now = 1000 * len(stages)
            return StageResult(now - 1000, now, stage.oracle_output_tokens)
        parts = tuple(
            self._answer(branch, before, stages) if isinstance(branch, Stage) else self._follow(branch, before, stages)
            for branch in stage.branches
        )
        return StageResult(0, 1000 * len(stages), sum(part.output_tokens for part in parts), parts=parts)

    def test_it_yields_the_stages_that_it_announces(self) -> None:
        factory = self.pipeline()
        for index in range(self.num_requests):
            stages = self._stages(factory, index)
            kinds = [stage.kind for _, stage in stages]
            assert set(kinds) <= set(factory.kinds), f"stages {kinds}, announced were {factory.kinds}"
            if factory.is_fixed:
                expected = [k for k in factory.kinds if k != DECODE or index % 9]
                assert kinds == expected, f"a fixed pipeline of {factory.kinds} yielded {kinds}"
            for before, stage in stages:
                if stage.kind == DECODE:
                    assert before is not None, "a decode comes first; it needs a prefill before it"
                    assert before.kind != DECODE, "a decode follows a decode"
                    assert stage.oracle_output_tokens >= 1, "a decode of no tokens; leave it out"
                elif isinstance(stage, Delay):
                    assert stage.kind in getattr(factory, "delays", ()), f"{stage.kind!r} isn't one of its `delays`"
                else:
                    assert stage.input_tokens >= 1, f"a stage {stage.kind!r} of no tokens; leave it out"

    def test_the_same_random_numbers_give_the_same_stages(self) -> None:
        for index in range(self.num_requests):
            assert self._stages(self.pipeline(), index) == self._stages(self.pipeline(), index)

    def test_every_request_is_served(self) -> None:
        serves = [tuple(dict.fromkeys(self.pipeline().kinds))] * 2
        for seed in range(self.num_requests):
            scenario = random_scenario(seed, roomy=True)
            pipeline = self.pipeline()
            until = LIVELOCK_NS + (LONGEST_DELAYS_NS if getattr(pipeline, "delays", ()) else 0)
            run = scenario.play(pipeline=pipeline, num_clients=2, serves=serves, until_ns=until)
            _all_leave(run, f"random_scenario({seed})")


def small_deployment(tp: int = 1) -> Deployment:
    """A made-up model of 2 layers on a made-up device."""
    layers = LayerGroup(num_layers=2, hidden_size=512, num_heads=8, num_kv_heads=4, head_size=64, ffn_size=1024)
    device = Device("test device", {"bf16": 100e12, "fp8": 200e12}, 16 * GIB, 1000 * GB)
    model = ModelSpec("test model", (layers,), vocab_size=32_000, tied_embeddings=False, max_context=1 << 16)
    return Deployment(model, Platform(device, tp), "bf16", "bf16", max_num_batched_tokens=512, max_num_seqs=64)


class PerfModelContract:
    """Inherit, and return your model from `model`; `deployments` names some that it supports."""

    num_steps = 300

    def model(self) -> PerfModel:
        """A fresh instance, not yet prepared."""
        raise NotImplementedError

    def deployments(self) -> Sequence[Deployment]:
        return (small_deployment(), small_deployment(tp=2))

    def _prepared(self, deployment: Deployment) -> PerfModel:
        model = self.model()
        problem = model.supports(deployment)
        assert problem is None, f"unsupported: {problem}"
        model.prepare(deployment)
        return model

    def _step(self, rng: random.Random, deployment: Deployment) -> Step:
        """A step within the deployment's limits."""
        num_decodes = rng.randint(0, deployment.max_num_seqs - 4)
        chunks = [(rng.randint(1, 100), rng.randint(0, 4000)) for _ in range(rng.randint(0 if num_decodes else 1, 4))]
        step = _step_of(chunks, num_decodes, num_decodes * rng.randint(1, 4000))
        if deployment.platform.attn_dp > 1:
            step.shared_tokens = rng.choice((0, rng.randint(1, 1000)))
        return step

    def test_times_are_whole_nanoseconds_and_never_beat_the_floor(self) -> None:
        rng = random.Random(1)
        for deployment in self.deployments():
            model = self._prepared(deployment)
            for _ in range(self.num_steps):
                step = self._step(rng, deployment)
                given = copy.deepcopy(step)
                time, floor = model.step_time(step), model.floor_time(step)
                assert type(time) is int, f"step_time gave {time!r}, not an int of ns"
                assert type(floor) is int, f"floor_time gave {floor!r}, not an int of ns"
                assert time >= floor >= 0, f"{time} ns beat the floor of {floor} ns: {step}"
                assert step == given, "it changed the step"

    def test_more_work_never_takes_less_time(self) -> None:
        rng = random.Random(2)
        for deployment in self.deployments():
            model = self._prepared(deployment)
            for _ in range(self.num_steps):
                step = self._step(rng, deployment)
                for more in _more_work(step):
                    times = model.step_time(step), model.step_time(more)
                    assert times[0] <= times[1], f"{times[0]} ns for {step}, but {times[1]} ns for {more}"

    def test_an_answer_depends_on_the_step_alone(self) -> None:
        rng = random.Random(3)
        for deployment in self.deployments():
            steps = [self._step(rng, deployment) for _ in range(self.num_steps)]
            one, other = self._prepared(deployment), self._prepared(deployment)
            forwards = [one.step_time(step) for step in steps]
            backwards = [other.step_time(step) for step in reversed(steps)]
            assert forwards == backwards[::-1], "times depend on the steps answered before"

    def test_the_operators_of_a_step_explain_its_time(self) -> None:
        rng = random.Random(5)
        for deployment in self.deployments():
            model = self._prepared(deployment)
            for _ in range(self.num_steps // 5):
                step = self._step(rng, deployment)
                time, operators = model.step_time(step), model.explain(step)
                total = sum(o.time_ns for o in operators)
                assert abs(total - time) <= 1.01, f"operators sum to {total} ns, the step takes {time} ns: {step}"
                for o in operators:
                    assert o.bound_by in BOUNDS, o
                    assert o.origin in ORIGINS, o
                    assert o.time_ns >= 0, o

    def test_provenance_is_made_of_shares(self) -> None:
        for deployment in self.deployments():
            model = self._prepared(deployment)
            model.step_time(self._step(random.Random(4), deployment))
            shares = model.provenance()
            assert shares.keys() <= set(ORIGINS), shares
            assert all(0 <= share <= 1 for share in shares.values()), shares
            assert abs(sum(shares.values()) - 1) < 1e-9, f"{shares} don't sum to 1"


class EvictionContract:
    """Inherit, and return your policy from `policy`."""

    num_stories = 40

    def policy(self) -> Eviction:
        """A fresh instance."""
        raise NotImplementedError

    def _victims(self, seed: int) -> list[int | None]:
        """What goes in a random story of uses and full instants, until nothing is left."""
        rng, policy = random.Random(seed), self.policy()
        there: set[int] = set()
        victims, now = [], 0
        for left in reversed(range(200)):
            now += rng.choice([0, 1, 10**9, 10**12])
            if left > 20 and rng.random() < 0.7:
                key = rng.randrange(12)
                policy.touch(key, now)
                there.add(key)
                continue
            full = bool(there) and (left <= 20 or rng.random() < 0.7)
            victim = policy.evict(now, full=full)
            assert victim in there or (victim is None and not full), f"{victim} goes of {there} (full: {full})"
            there.discard(-1 if victim is None else victim)
            victims.append(victim)
        assert not there, f"{there} never go"
        assert policy.evict(now, full=False) is None, "what is gone goes again"
        return victims

    def test_what_is_there_goes_once(self) -> None:
        for seed in range(self.num_stories):
            self._victims(seed)

    def test_the_same_story_has_the_same_victims(self) -> None:
        for seed in range(self.num_stories):
            assert self._victims(seed) == self._victims(seed), f"story {seed} differs: instances share state"


def _step_of(chunks: list[tuple[int, int]], num_decodes: int, context: int) -> Step:
    return Step(num_decodes, context, chunks, sum(c for c, _ in chunks), num_decodes + len(chunks))


def _more_work(step: Step) -> list[Step]:
    """`step` with one more decode, or a token more: of decode context, of a chunk, of its context, in other groups."""
    n, context, chunks = step.num_decodes, step.decode_context, step.chunks
    more = [_step_of(chunks, n + 1, context + 1)]
    if n:
        more.append(_step_of(chunks, n, context + 1))
    if chunks:
        (c, s), *rest = chunks
        more += [_step_of([(c + 1, s), *rest], n, context), _step_of([(c, s + 1), *rest], n, context)]
    shared = step.shared_tokens
    more = [replace(larger, shared_tokens=shared) for larger in more]
    return [*more, replace(step, shared_tokens=shared + 1)] if shared else more
