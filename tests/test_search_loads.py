"""Searches whose load rises: the same front and best as of every load, by fewer runs; made-up systems and a real one.

Made-up systems answer by a rule in the executor's place, so that many spaces can be searched.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from kit import sampled
from mist.errors import ScenarioError
from mist.search.evaluate import Job, Outcome
from mist.search.executors import executor_named
from mist.search.ladders import hope, hopes_of, ladders_of
from mist.search.legal import legal_points
from mist.search.objectives import at_best, improves_with_load, maximised
from mist.search.pareto import Score
from mist.search.run import search
from mist.search.space import read_space

RATE = "workload.arrivals.poisson.rate_per_s"
LOADS = [1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32]
GPU = {"device": "h100-sxm", "model": "llama-3.1-8b", "perf": "roofline"}
SCENARIO: dict[str, Any] = {
    "seed": 5,
    "workload": {
        "arrivals": {"poisson": {"rate_per_s": 1}}, "num_requests": 1600, "input_tokens": 600, "output_tokens": 20,
    },
    "clients": {"gpu": GPU},
    "slo": {"ttft_s": {"p99": 0.5}},
}  # fmt: skip
POINTS = {"clients.gpu": {"device": ["h100-sxm", "l40s", "mi300x"], "tp": [1, 2],
                          "batching": {"chunked": {"max_num_seqs": [64, 128]}}}}  # fmt: skip


def written(folder: Path, loads: Any, **changed: Any) -> Path:
    path = folder / "space.yaml"
    space = {"name": "loads", "scenario": SCENARIO, "space": {RATE: loads, **POINTS},
             "objectives": ["output_tokens_per_usd", "ttft_s.p99"], "baseline": {"clients": {"gpu": GPU}}}  # fmt: skip
    path.write_text(yaml.safe_dump({**space, **changed}, sort_keys=False))
    return path


def rng_of_seed(seed: int) -> float:
    """How a seed's requests differ from others', from -1 to 1."""
    return random.Random(f"requests {seed}").uniform(-1, 1)


class MadeUp:
    """Deployments with drawn capacities and prices: their TTFT rises with the load, on short prefixes less."""

    def __init__(self, seed: int, scatter: float = 0.0) -> None:
        self.seed, self.scatter, self.asked = seed, scatter, 0

    def run(self, jobs: Iterable[Job]) -> Iterator[Outcome]:
        for job in jobs:
            self.asked += 1
            yield Outcome(job.key, self.summary(job), None, 0.1)

    def summary(self, job: Job) -> dict[str, Any]:
        assert isinstance(job.source, dict)
        gpu, number = job.source["clients"]["gpu"], job.overrides.get("workload.limit", 1600)
        rng = random.Random(f"{self.seed} {gpu['device']} {gpu['tp']} {gpu['batching']}")
        capacity, alone, usd = rng.uniform(0.5, 40), rng.uniform(0.05, 0.3), rng.uniform(2, 12) * gpu["tp"]
        capacity *= 1 + self.scatter * rng_of_seed(job.overrides["seed"])
        rate = job.source["workload"]["arrivals"]["poisson"]["rate_per_s"]
        shown = rate * (0.8 + 0.2 * number / 1600)
        ttft = alone * (1 + shown / (capacity - shown)) if shown < capacity else 100.0
        target = {"metric": "ttft_s", "statistic": "p99", "target_s": 0.5, "actual_s": ttft, "met": ttft <= 0.5}
        return {
            "open_loop": True, "saturated": shown >= capacity, "offered": {"output_tokens_per_s": 20.0 * rate},
            "throughput": {"output_tokens_per_s": 20.0 * min(rate, capacity)}, "cost": {"usd_per_hour": usd, "usd": 1},
            "ttft_s": {"p99": ttft}, "slo": {"targets": [target]}, "duration_s": number / rate, "provenance": {},
        }  # fmt: skip


def front(document: dict[str, Any]) -> list[dict[str, str]]:
    return [each["choices"] for each in document["front"]]


def behind(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """By what share one deployment is worse than the other in what it is worst at beside it."""
    shares = []
    for name, found in theirs["objectives"].items():
        share = ours["objectives"][name]["mean"] / found["mean"] - 1
        shares.append(-share if maximised(name) else share)
    return max(shares)


@pytest.mark.parametrize("seed", sampled(range(8), 4))
def test_rising_loads_give_what_every_load_gives(tmp_path: Path, seed: int) -> None:
    every, bisected, halved, pruned = (MadeUp(seed) for _ in range(4))
    brute = search(written(tmp_path, LOADS), every, strategy="exhaustive", num_seeds=1).document
    path = written(tmp_path, {"load": LOADS})
    whole = search(path, bisected, strategy="exhaustive", num_seeds=1).document
    half = search(path, halved, num_seeds=1).document
    branch = search(path, pruned, strategy="bounded", num_seeds=1).document
    assert front(whole) == front(branch) == front(brute)
    assert branch["best"] == whole["best"]
    assert pruned.asked < bisected.asked
    for title, best in brute["best"].items():
        if best is None:
            assert whole["best"][title] is half["best"][title] is None
            continue
        assert whole["best"][title]["objectives"] == best["objectives"]
        # what a shorter prefix hides is worth 1 % at most
        first = next(iter(best["objectives"]))
        ours, theirs = (each["best"][title]["objectives"][first]["mean"] for each in (half, brute))
        assert ours == pytest.approx(theirs, rel=0.01)
    far = [min(behind(ours, theirs) for ours in half["front"]) for theirs in brute["front"]]
    assert sum(share > 0.02 for share in far) <= 1, "the front has holes"
    assert whole["baseline"] == brute["baseline"]
    assert bisected.asked < 0.7 * every.asked
    runs = {each["share"]: each["runs"] for each in half["runs"]}
    assert runs[1] < 0.5 * bisected.asked
    assert whole["configurations"]["deployments"] == 12
    assert whole["configurations"]["legal"] == brute["configurations"]["legal"] == 12 * len(LOADS)


@pytest.mark.parametrize("first_seed", sampled(range(6), 3))
def test_the_highest_load_is_that_of_all_seeds_not_of_the_first(tmp_path: Path, first_seed: int) -> None:
    loads = [round(1.08**k, 3) for k in range(45)]
    changed = {"scenario": SCENARIO | {"seed": first_seed}, "objectives": ["output_tokens_per_usd"]}
    points = {"clients.gpu.device": ["h100-sxm", "l40s"]}
    brute, half = (
        search(written(tmp_path, given, space={RATE: given, **points}, **changed), MadeUp(3, 0.1),
               strategy=strategy, num_seeds=4).document
        for given, strategy in ((loads, "exhaustive"), ({"load": loads}, "halving"))
    )  # fmt: skip
    assert brute["front"], "nothing to compare"
    assert front(half) == front(brute)
    assert half["best"] == brute["best"]
    assert half["baseline"] == brute["baseline"]


@pytest.mark.parametrize("first_seed", sampled(range(6), 3))
def test_a_baseline_has_the_highest_load_that_all_seeds_hold(tmp_path: Path, first_seed: int) -> None:
    loads = [round(1.08**k, 3) for k in range(45)]
    changed = {"scenario": SCENARIO | {"seed": first_seed}, "objectives": ["output_tokens_per_usd"]}
    for given in (loads, {"load": loads}):
        path = written(tmp_path, given, space={RATE: given}, **changed)  # of the baseline alone
        document = search(path, MadeUp(3, 0.1), strategy="exhaustive", num_seeds=4).document
        assert document["gain"]["factor"]["mean"] == 1


class HardAtFirst(MadeUp):
    """Nobody keeps up with the first requests of the workload alone."""

    def summary(self, job: Job) -> dict[str, Any]:
        return super().summary(job) | {"saturated": "workload.limit" in job.overrides}


def test_a_load_may_be_elsewhere_than_in_the_workload(tmp_path: Path) -> None:
    space = {"clients.gpu.device": ["h100-sxm", "l40s"], "warmup_s": {"load": [1, 2]}}
    document = search(written(tmp_path, [1], space=space), MadeUp(1), num_seeds=1).document
    assert document["configurations"]["deployments"] == 2
    assert document["baseline"]["choices"]["warmup_s"] in ("1", "2")


def test_a_halving_that_never_saw_the_whole_workload_tells_so(tmp_path: Path) -> None:
    path = written(tmp_path, {"load": LOADS})
    halved, whole = (search(path, HardAtFirst(1), strategy=each, num_seeds=1).document
                     for each in ("halving", "bounded"))  # fmt: skip
    assert whole["front"]
    assert not halved["front"]
    told = "Nothing ran on the whole workload"
    assert any(told in remark and "bounded" in remark for remark in halved["remarks"])
    assert not any(told in remark for remark in whole["remarks"])


def test_a_real_space_by_bisection_and_by_every_load(tmp_path: Path) -> None:
    scenario = SCENARIO | {"workload": SCENARIO["workload"] | {"num_requests": 120}}
    points = {"clients.gpu": {"device": ["h100-sxm", "l40s"], "tp": [1, 2]}}
    loads = [5, 10, 20, 40, 60]
    with executor_named("serial") as serial:
        found = [
            search(written(tmp_path, given, scenario=scenario, space={RATE: given, **points}), serial,
                   strategy="exhaustive", num_seeds=1).document
            for given in (loads, {"load": loads})
        ]  # fmt: skip
    assert found[0]["best"] == found[1]["best"]
    assert front(found[0]) == front(found[1])
    assert found[0]["front"], "nothing to compare"


@pytest.mark.parametrize(("loads", "is_last"), [([1, 2], True), ([1, 2, 400], False)])
def test_a_best_under_the_highest_load_is_told(tmp_path: Path, loads: list[int], is_last: bool) -> None:
    document = search(written(tmp_path, {"load": loads}), MadeUp(1), num_seeds=1).document
    assert any("under the highest load of the space" in remark for remark in document["remarks"]) is is_last


def test_deployments_are_counted_apart_from_loads(tmp_path: Path) -> None:
    for loads, number, load in (([1, 2], 24, None), ({"load": [1, 2]}, 12, RATE)):
        space = read_space(written(tmp_path, loads))
        assert space.load == load
        ladders = ladders_of(legal_points(space).points.values(), space.load)
        assert len(ladders) == number
        assert {ladder.loads for ladder in ladders} == {(1.0, 2.0) if load else (1.0,)}


@pytest.mark.parametrize(
    ("tree", "constraints", "expected"),
    [
        ({RATE: {"load": [4, 2]}}, {}, "numbers that rise"),
        ({RATE: {"load": [2, 2]}}, {}, "numbers that rise"),
        ({RATE: {"load": []}}, {}, "numbers that rise"),
        ({RATE: {"load": ["a"]}}, {}, "numbers that rise"),
        ({RATE: {"load": [True]}}, {}, "numbers that rise"),
        ({RATE: {"load": [1]}, "workload.rate_scale": {"load": [1, 2]}}, {}, "there can be one"),
        ({"clients": {"any": {"a": {"gpu": {"tp": {"load": [1, 2]}}}}}}, {}, "outside of all alternatives"),
        ({RATE: {"load": [1, 2]}}, {"output_tokens_per_s": 10}, "may hold at a higher load only"),
    ],
)
def test_what_is_no_load_is_told_at_its_place(
    tmp_path: Path, tree: dict[str, Any], constraints: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ScenarioError, match=rf"(?s)space.yaml:\d+:\d+.*{expected}"):
        read_space(written(tmp_path, [1], space=tree, constraints=constraints))


def test_what_a_load_could_be_at_best() -> None:
    assert at_best("output_tokens_per_usd", 10.0, 2.0) == at_best("goodput_requests_per_s", 10.0, 2.0) == 20.0
    assert at_best("usd_per_million_output_tokens", 10.0, 2.0) == at_best("joules_per_output_token", 10.0, 2.0) == 5.0
    assert at_best("ttft_s.p99", 10.0, 2.0) == at_best("devices", 10.0, 2.0) == at_best("attainment", 10.0, 2.0) == 10.0
    assert not improves_with_load("ttft_s.p99")
    names = ("output_tokens_per_usd", "ttft_s.p99")
    assert hope(names, Score((-10.0, 0.2), 0.0), 3.0) == Score((-30.0, 0.2), 0.0)


def test_hopes_are_those_of_the_next_lower_load(tmp_path: Path) -> None:
    space = read_space(written(tmp_path, {"load": [1, 2, 4, 8]}))
    ladder = ladders_of(legal_points(space).points.values(), space.load)[0]
    numbers = [point.number for point in ladder.points]
    known = {numbers[1]: Score((-10.0, 0.2)), numbers[3]: Score((-1.0, 9.0), 5.0)}
    assert hopes_of(("output_tokens_per_usd", "ttft_s.p99"), ladder, known) == {2: Score((-20.0, 0.2))}
