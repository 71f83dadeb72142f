"""Every router's decisions on hand-made views, and what queueing theory says of random, informed and stale choices."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from kit import LinearSteps, SmallScenario, play, rows, table
from mist.batching.chunked import Chunked
from mist.load import Measure, estimated_ns, fields_of, measured
from mist.registry import names
from mist.request import ClientView, Request, Stage, Task
from mist.routing.chunked_balancer import ChunkedBalancer
from mist.routing.decode_balancer import DecodeBalancer
from mist.routing.heavy_light import HeavyLight
from mist.routing.join_shortest_queue import JoinShortestQueue
from mist.routing.least_loaded import LeastLoaded
from mist.routing.least_outstanding import LeastOutstanding
from mist.routing.oracle_estimate import OracleEstimate
from mist.routing.power_of_two import PowerOfTwo
from mist.routing.prefill_balancer import PrefillBalancer
from mist.routing.prefix_affinity import PrefixAffinity
from mist.routing.random_choice import RandomChoice
from mist.routing.round_robin import RoundRobin
from mist.routing.runtime_estimate import RuntimeEstimate
from mist.routing.session_affinity import SessionAffinity
from mist.scenario import load
from mist.testing import random_scenario, record_bytes

MEASURES: tuple[Measure, ...] = (
    "outstanding", "waiting", "pending_prefill_tokens", "decodes", "tokens_in_process", "kv_in_use", "estimated_time",
)  # fmt: skip


def task(index: int = 0, tokens: int = 8, *, output: int = 5, predicted: int = 5, keys: Any = ()) -> Task:
    request = Request(index, 0, tokens, output, keys, predicted_output_tokens=predicted)
    return Task(request, Stage("prefill", tokens), 0, tokens, 0)


def views(**columns: tuple[int, ...]) -> list[ClientView]:
    made = [ClientView(i, f"gpu-{i}", kv_blocks=100) for i in range(len(next(iter(columns.values()))))]
    for name, column in columns.items():
        for view, value in zip(made, column, strict=True):
            setattr(view, name, value)
    return made


def chosen(router: Any, seen: list[ClientView], who: Task | None = None) -> int:
    return int(router.choose(who or task(), seen, 0).index)


def some_views(rng: random.Random, num_clients: int) -> list[ClientView]:
    fields = [f for f in ClientView.__dataclass_fields__ if f not in ("index", "name")]
    return [ClientView(i, f"gpu-{i}", *(rng.randint(1, 50) for _ in fields)) for i in range(num_clients)]


# --- decisions ---


def test_balancers_look_at_their_own_load_alone() -> None:
    seen = views(pending_prefill_tokens=(50, 10, 40), num_decodes=(1, 60, 5), num_outstanding=(9, 9, 1))
    assert chosen(PrefillBalancer(), seen) == 1
    assert chosen(DecodeBalancer(), seen) == 0
    assert chosen(ChunkedBalancer(), seen) == 2
    assert chosen(DecodeBalancer(), views(num_decodes=(2, 2), decode_context=(90, 80))) == 1
    assert chosen(PrefillBalancer(), views(pending_prefill_tokens=(3, 3), num_outstanding=(2, 1))) == 0
    assert chosen(JoinShortestQueue(), views(pending_prefill_tokens=(3, 3), num_outstanding=(2, 1))) == 1


@pytest.mark.parametrize(
    ("measure", "there"),
    [("outstanding", 0), ("waiting", 1), ("pending_prefill_tokens", 2), ("decodes", 1), ("tokens_in_process", 2),
     ("kv_in_use", 1), ("estimated_time", 0)],
)  # fmt: skip
def test_the_least_loaded_by_each_measure(measure: Measure, there: int) -> None:
    seen = views(
        num_outstanding=(1, 2, 3), num_waiting=(3, 1, 2), pending_prefill_tokens=(30, 20, 10),
        num_decodes=(5, 4, 6), decode_context=(100, 80, 85), kv_blocks_used=(60, 10, 50), kv_blocks=(100, 20, 80),
        chunk_tokens=(16, 16, 16), chunk_ns=(1, 9, 9), decode_ns=(1, 1, 1), longest_decode=(4, 5, 3),
    )  # fmt: skip
    assert chosen(LeastLoaded(measure), seen) == there
    assert chosen(PowerOfTwo(measure, num_choices=3), seen) == there


def test_a_tie_of_the_least_loaded_goes_to_fewer_tasks() -> None:
    assert chosen(LeastLoaded("kv_in_use"), views(kv_blocks_used=(4, 4), num_outstanding=(2, 1))) == 1


@pytest.mark.parametrize("measure", MEASURES)
def test_what_a_measure_reads_is_asked_for(measure: Measure) -> None:
    """Of the fields that aren't always there, a measure changes with exactly those that it names."""
    (view,) = some_views(random.Random(4), 1)
    on_demand = ("num_decodes", "longest_decode", "oracle_longest_decode", "chunk_tokens", "chunk_ns", "decode_ns")
    load_of = measured(measure)
    changed: dict[str, Any] = {field: {field: 10_000} for field in on_demand}
    reads = {field for field in on_demand if load_of(replace(view, **changed[field])) != load_of(view)}
    assert reads == fields_of(measure)
    assert LeastLoaded(measure).needs == PowerOfTwo(measure).needs == fields_of(measure)


@pytest.mark.parametrize(
    ("by", "tokens", "predicted", "heavy"),
    [("output", 9000, 512, False), ("output", 1, 513, True), ("input", 2048, 9000, False), ("input", 2049, 1, True),
     ("either", 2048, 512, False), ("either", 2049, 1, True), ("either", 1, 513, True)],
)  # fmt: skip
def test_the_heavy_and_the_light_have_clients_of_their_own(by: Any, tokens: int, predicted: int, heavy: bool) -> None:
    seen = views(num_outstanding=(8, 9, 2, 1))
    assert chosen(HeavyLight(by), seen, task(tokens=tokens, predicted=predicted)) == (0 if heavy else 3)
    assert chosen(HeavyLight(by, heavy_share=0.01), seen[:2], task(tokens=tokens, predicted=predicted)) == (not heavy)
    assert chosen(HeavyLight(by), seen[:1], task(tokens=tokens, predicted=predicted)) == 0


def test_the_truth_makes_nobody_heavy() -> None:
    seen = views(num_outstanding=(0, 0))
    assert chosen(HeavyLight(), seen, task(output=5000, predicted=5)) == 1


def test_the_estimate_of_the_runtime_is_the_formula() -> None:
    """⌈(100 + 28) / 32⌉ = 4 steps of 50 ns, and a decode of 30 steps has 26 to go after them, 7 ns each."""
    (view,) = views(pending_prefill_tokens=(100,), chunk_tokens=(32,), chunk_ns=(50,), decode_ns=(7,))
    assert estimated_ns(view, 30, 28) == 4 * 50 + 26 * 7
    assert estimated_ns(view, 3, 28) == 4 * 50
    assert estimated_ns(ClientView(0, "host"), 30, 28) == 0


def test_the_runtime_estimate_tells_fast_clients_from_slow_ones() -> None:
    prices = {"chunk_tokens": (32, 32), "chunk_ns": (50, 100), "decode_ns": (10, 5)}
    seen = views(pending_prefill_tokens=(64, 0), longest_decode=(0, 0), **prices)
    assert chosen(RuntimeEstimate(), seen, task(tokens=32, predicted=3)) == 1  # 150 against 100 + 2 x 5
    assert chosen(RuntimeEstimate(), seen, task(tokens=32, predicted=99)) == 1  # 150 + 96 x 10 against 100 + 98 x 5
    seen = views(pending_prefill_tokens=(0, 0), longest_decode=(0, 90), **prices)
    assert chosen(RuntimeEstimate(), seen, task(tokens=32, predicted=20)) == 0  # 50 + 19 x 10 against 100 + 89 x 5
    assert chosen(RuntimeEstimate(), views(num_outstanding=(2, 1))) == 1  # clients without a model


def test_only_the_oracle_reads_the_truth_and_says_so() -> None:
    prices = {"chunk_tokens": (32, 32), "chunk_ns": (50, 100), "decode_ns": (10, 5)}
    seen = views(longest_decode=(0, 0), oracle_longest_decode=(0, 0), **prices)
    short, long = task(tokens=32, output=5, predicted=99), task(tokens=32, output=99, predicted=5)
    assert [chosen(OracleEstimate(), seen, each) for each in (short, long)] == [0, 1]
    assert [chosen(RuntimeEstimate(), seen, each) for each in (short, long)] == [1, 0]
    assert [name for name in names("routing") if name.startswith("oracle_")] == ["oracle_estimate"]


# --- draws ---


def test_draws_are_a_requests_own() -> None:
    """Whatever is asked before, and for whichever other request, the draw is the same; another seed gives others."""
    seen = views(num_outstanding=(0,) * 8)
    forwards = [chosen(RandomChoice(seed=1), seen, task(i)) for i in range(300)]
    router = RandomChoice(seed=1)
    assert [chosen(router, seen, task(i)) for i in reversed(range(300))][::-1] == forwards
    others = [chosen(RandomChoice(seed=2), seen, task(i)) for i in range(300)]
    assert 10 <= sum(map(int.__eq__, forwards, others)) <= 75  # an eighth of 300, by chance
    counts = np.bincount([chosen(router, seen, task(i)) for i in range(8000)], minlength=8)
    assert ((counts - 1000) ** 2 / 1000).sum() < 29.9  # chi-square, 7 degrees of freedom, 1e-4


def test_random_with_one_client_is_that_client() -> None:
    assert {chosen(RandomChoice(), views(num_outstanding=(9,)), task(i)) for i in range(20)} == {0}


@pytest.mark.parametrize("measure", MEASURES)
def test_two_choices_of_two_are_the_least_loaded_of_both(measure: Measure) -> None:
    rng = random.Random(3)
    for i in range(200):
        seen = some_views(rng, 2)
        least = min(seen, key=measured(measure))
        assert PowerOfTwo(measure, seed=i).choose(task(i), seen, 0) is least


def test_one_choice_is_random_and_two_differ() -> None:
    rng = random.Random(3)
    one = [chosen(PowerOfTwo(num_choices=1), some_views(rng, 5), task(i)) for i in range(300)]
    assert set(one) == set(range(5))
    seen = views(num_outstanding=(1, 2, 3))
    drawn = [chosen(PowerOfTwo(), seen, task(i)) for i in range(600)]
    counts = np.bincount(drawn, minlength=3)
    assert counts[2] == 0  # never the most loaded: the other of two is less
    assert abs(counts[0] - 400) < 4 * np.sqrt(600 * 2 / 9)


@pytest.mark.parametrize("values", [{"num_choices": 0}, {"heavy_share": 0}, {"heavy_share": 1.0}])
def test_parameters_out_of_range_are_refused(values: dict[str, Any]) -> None:
    policy: Any = PowerOfTwo if "num_choices" in values else HeavyLight
    with pytest.raises(ValueError, match=next(iter(values))):
        policy(**values)


# --- the limits of affinity ---


def test_affinity_that_weighs_no_load_follows_the_prefix_and_one_that_weighs_all_follows_the_load() -> None:
    rng = random.Random(9)
    by_prefix, by_load = PrefixAffinity(load_weight=0), PrefixAffinity(load_weight=1e12)
    sent: list[set[int]] = [set() for _ in range(3)]
    for i in range(300):
        first = 10 * rng.randint(0, 5)
        keys = tuple(100 * first + j for j in range(rng.randint(0, 9)))
        who, seen = task(i, tokens=10 * max(1, len(keys)), keys=keys), some_views(rng, 3)
        least = min(view.pending_prefill_tokens for view in seen)
        assert by_load.choose(who, seen, 0).pending_prefill_tokens == least

        def found(client: int, keys: tuple[int, ...] = keys) -> int:
            return next((n for n, key in enumerate(keys) if key not in sent[client]), len(keys))

        there = by_prefix.choose(who, seen, 0).index
        assert found(there) == max(map(found, range(3)))
        sent[there].update(keys)


def test_sessions_stay_for_ever_or_go_wherever_it_is_empty() -> None:
    always, never = SessionAffinity(), SessionAffinity(max_num_outstanding=1)
    for i in range(50):
        who, seen = task(i), views(num_outstanding=(3 + i, 1 + i % 2, 2 - i % 2))
        who.request.session = 7
        assert always.choose(who, seen, 0).index == 1
        assert never.choose(who, seen, 0).num_outstanding == 1


# --- what theory knows ---

NUM_SEEDS, NUM_REQUESTS, MEAN_NS = 10, 4000, 100_000


def mean_wait(router: Any, seed: int, refresh_ns: int = 0) -> float:
    """Of M/M/n, n = 8 at ρ = 0.9, in services: prompts of exponential lengths, one at a time on each client."""
    rng = np.random.default_rng(seed)
    prompts = np.maximum(1, rng.exponential(MEAN_NS, NUM_REQUESTS)).astype(np.int64)
    arrivals = np.cumsum(rng.exponential(MEAN_NS / (8 * 0.9), NUM_REQUESTS)).astype(np.int64)
    run = play(
        table(arrivals, prompts, [0] * NUM_REQUESTS),
        num_clients=8,
        router=router,
        policy=lambda: Chunked(1 << 40, 1),
        perf=LinearSteps(0, 1, 0, 0, 0),
        ledger=False,
        view_refresh_ns=refresh_ns,
    )
    rows = run.records.tasks.as_columns()
    return float((rows["started_ns"] - rows["queued_ns"]).mean() / MEAN_NS)


@pytest.mark.long
def test_informed_choices_beat_turns_and_turns_beat_chance() -> None:
    """JSQ < two choices < round robin < random, by the mean wait of paired runs, each at 99.9 % confidence."""
    makers: list[Any] = [
        lambda seed: LeastOutstanding(),
        lambda seed: PowerOfTwo(seed=seed),
        lambda seed: RoundRobin(),
        lambda seed: RandomChoice(seed=seed),
    ]
    waits = np.array([[mean_wait(make(seed), seed) for seed in range(NUM_SEEDS)] for make in makers])
    for better, worse in pairwise(waits):
        gain = worse - better
        half_width = 4.297 * gain.std(ddof=1) / np.sqrt(NUM_SEEDS)  # Student's t, 9 degrees of freedom, one-sided
        assert gain.mean() > half_width, (waits.mean(axis=1), gain)


# --- views of an age ---


def test_views_of_no_age_are_no_option_bit_for_bit() -> None:
    options: list[dict[str, Any]] = [{}, {"view_refresh_ns": 0}, {"view_refresh_ns": 1}]
    for seed in range(30):
        plain, same = (
            record_bytes(random_scenario(seed).play(router=JoinShortestQueue(), num_clients=3, **more).records)
            for more in options[:2]
        )
        assert plain == same
        # as good as no age: every instant is a period of its own, unless two requests come at once
        scenario = random_scenario(seed)
        spread = tuple((10 * at + i % 10, *rest) for i, (at, *rest) in enumerate(scenario.requests))
        apart = replace(scenario, requests=spread)  # type: ignore[arg-type]
        if len({at for at, *_ in spread}) == len(spread):
            fresh, each_ns = (
                record_bytes(apart.play(router=LeastOutstanding(), num_clients=3, **more).records)
                for more in options[::2]
            )
            assert fresh == each_ns


def test_within_a_period_everybody_sees_the_state_at_its_first_look() -> None:
    """Three come in one period and herd where nobody was; the next period sees all of them."""
    scenario = SmallScenario(tuple((at, 40, 0, ()) for at in (0, 10, 20, 1000, 1010)), num_blocks=1000)
    run = scenario.play(router=LeastOutstanding(), num_clients=3, view_refresh_ns=1000)
    fresh = scenario.play(router=LeastOutstanding(), num_clients=3)
    where = [r.records.tasks.as_columns() for r in (run, fresh)]
    stale, now = ([int(t["client"][t["request"] == i][0]) for i in range(5)] for t in where)
    assert stale == [0, 0, 0, 1, 1]
    assert now[:3] == [0, 1, 2]


def test_two_routers_that_share_a_client_see_the_same() -> None:
    seen: list[tuple[int, ClientView]] = []

    class Spy(LeastOutstanding):
        def choose(self, who: Any, views: Any, now: int) -> ClientView:
            seen.extend((now // 500, replace(view)) for view in views)
            return super().choose(who, views, now)

    prefill, decode = [("prefill",)] * 2, [("prefill", "decode")] * 2
    for seed in range(10):
        random_scenario(seed).play(router=Spy(), num_clients=4, serves=prefill + decode, view_refresh_ns=500)
        by_period: dict[tuple[int, int], ClientView] = {}
        for period, view in seen:
            assert by_period.setdefault((period, view.index), view) == view
        seen.clear()


def test_the_older_the_views_the_longer_the_wait() -> None:
    """Least outstanding on views a few services old is worse than fresh (Mitzenmacher, "How useful is old
    information?", 2000), and herds until it is worse than chance."""
    waits = [
        np.mean([mean_wait(LeastOutstanding(), seed, age) for seed in range(3)]) for age in (0, MEAN_NS, 20 * MEAN_NS)
    ]
    chance = np.mean([mean_wait(RandomChoice(seed=seed), seed) for seed in range(3)])
    assert waits[0] < waits[1] < chance < waits[2]


# --- in a scenario ---

PAIR: dict[str, Any] = {
    "seed": 3,
    "workload": {
        "arrivals": {"poisson": {"rate_per_s": 20}}, "num_requests": 120,
        "input_tokens": {"lognormal": {"mean": 900, "cv": 1}}, "output_tokens": {"lognormal": {"mean": 80, "cv": 1}},
    },
    "clients": {
        "fast": {"device": "h100-sxm", "count": 2, "model": "llama-3.1-8b", "perf": "roofline"},
        "slow": {"device": "a100-sxm-80gb", "count": 2, "model": "llama-3.1-8b", "perf": "roofline"},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", names("routing"))
def test_every_router_runs_from_a_scenario_and_reads_back(name: str) -> None:
    routing = {"least_loaded": {"least_loaded": "estimated_time"}}.get(name, name)
    scenario = load(PAIR, routing=routing, view_refresh_s=0.01)
    result = scenario.run(check=True)
    assert result.metrics["requests"]["finished"] == 120
    again = load(scenario.resolved())
    assert again == scenario
    assert rows(again.run().records) == rows(result.records)


def test_the_seed_of_the_scenario_is_that_of_its_routers() -> None:
    first, same, other, own = (
        load(PAIR, routing=routing, seed=seed).run().records.tasks.as_columns()["client"].tolist()
        for routing, seed in (("random", 3), ("random", 3), ("random", 4), ({"random": {"seed": 9}}, 3))
    )
    assert first == same
    assert first != other
    assert first != own


def test_the_runtime_estimate_uses_the_faster_device_more() -> None:
    rows = load(PAIR, routing="runtime_estimate").run().records.tasks.as_columns()
    prefills = np.bincount(rows["client"][rows["kind"] == 0], minlength=4)
    assert prefills[:2].sum() > 1.2 * prefills[2:].sum()


def test_no_refresh_is_not_written_and_a_period_is() -> None:
    assert "view_refresh_s" not in load(PAIR).resolved()
    assert load(PAIR, view_refresh_s=0.5).resolved()["view_refresh_s"] == 0.5
    plain, zero = load(PAIR).run(), load(PAIR, view_refresh_s=0).run()
    assert record_bytes(plain.records) == record_bytes(zero.records)
    assert plain.metrics == zero.metrics


def test_a_workload_may_tell_routers_what_it_predicts() -> None:
    told = {**PAIR, "workload": {**PAIR["workload"], "sizes": {"predicted_output_tokens": 600}}}
    remark = "predicted_output_tokens"
    assert not any(remark in note for note in load(told, routing="heavy_light").run().metrics["notes"])
    assert any(remark in note for note in load(told, routing="random").run().metrics["notes"])
