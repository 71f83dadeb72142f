"""What a search space may say, what is legal in it and why the rest isn't; objectives and the order of scores."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from mist import run
from mist.errors import ScenarioError
from mist.scenario import load
from mist.search.baseline import baseline_points
from mist.search.choices import Choice, count, every
from mist.search.legal import DUPLICATE, OVER, UNEVEN, legal_points
from mist.search.objectives import HOPELESS, Constraint, excesses, maximised, objective
from mist.search.pareto import Score, covers, front, ranked
from mist.search.space import Space, read_space
from mist.search.strategies import Halving, corrected

SCENARIO: dict[str, Any] = {
    "workload": {
        "arrivals": {"poisson": {"rate_per_s": 2}},
        "num_requests": 20,
        "input_tokens": 50,
        "output_tokens": 5,
    },
    "clients": {"gpu": {"device": "h100-sxm", "model": "llama-3.1-8b", "perf": "roofline"}},
}  # fmt: skip


def read(folder: Path, tree: dict[str, Any], **keys: Any) -> Space:
    path = folder / "space.yaml"
    given = {"scenario": SCENARIO, "space": tree, "objectives": ["devices"], **keys}
    path.write_text(yaml.safe_dump(given, sort_keys=False))
    return read_space(path)


def problems(folder: Path, text: str) -> str:
    path = folder / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ScenarioError) as error:
        read_space(path)
    return str(error.value)


def test_a_scenario_is_told_to_be_none(tmp_path: Path) -> None:
    told = problems(tmp_path, yaml.safe_dump(SCENARIO))
    assert "this is a scenario, not a search space" in told
    assert "scenario: FILE, space: {" in told
    assert "there is no key" not in told


def test_choices_inside_an_alternative_are_made_only_there() -> None:
    inner = Choice("b", {"1": 1, "2": 2})
    tree = {"a": Choice("a", {"plain": 0, "more": {"b": inner}}), "c": Choice("c", {"x": "x", "y": "y"})}
    found = list(every(tree))
    assert len(found) == 6
    assert count(tree) == 6
    assert ({"a": "plain", "c": "y"}, {"a": 0, "c": "y"}) in found
    assert ({"a": "more", "b": "2", "c": "x"}, {"a": {"b": 2}, "c": "x"}) in found


def test_how_many_configurations_were_examined_is_told(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    legal_points(read(tmp_path, {"clients.gpu.tp": [1, 3], "seed": {"range": [1, 4]}}), lambda *each: told.append(each))
    assert told == [(number, 8) for number in range(1, 9)]


def test_lists_ranges_doublings_and_named_alternatives(tmp_path: Path) -> None:
    layouts = {
        "together": {"gpu": {"device": "h100-sxm", "model": "llama-3.1-8b", "perf": "roofline", "tp": [1, 2]}},
        "apart": {
            side: {"device": ["h100-sxm", "mi300x"], "model": "llama-3.1-8b", "perf": "roofline", "serves": [[side]]}
            for side in ("prefill", "decode")
        },
    }
    space = read(tmp_path, {"clients": {"any": layouts}, "routing": ["round_robin", "least_outstanding"]})
    legal = legal_points(space)
    assert len(legal.points) == 2 * (2 + 4)
    split = [point for point in legal.points.values() if point.choices["clients"] == "apart"]
    assert {point.scenario.clients["decode"].serves[0] for point in split} == {"decode"}
    pairs = {(p.choices["clients[apart].prefill.device"], p.choices["clients[apart].decode.device"]) for p in split}
    assert len(pairs) == 4, "pairs of devices are ordered"
    numbers = {"clients.gpu.count": {"range": [2, 6, 2]}, "seed": {"doubling": [1, 7]}}
    counts = [
        (p.scenario.clients["gpu"].count, p.scenario.seed)
        for p in legal_points(read(tmp_path, numbers)).points.values()
    ]
    assert counts == [(n, seed) for n in (2, 4, 6) for seed in (1, 2, 4)]


def test_reasons_are_counted(tmp_path: Path) -> None:
    tree = {
        "clients.gpu.model": ["llama-3.1-8b", "llama-3.1-70b"],
        "clients.gpu.tp": [1, 3, 4],
        "clients.gpu.count": [1, 2],
        "clients.gpu.batching": [{"chunked": {"max_num_batched_tokens": 64, "max_num_seqs": 128}}, "chunked"],
    }
    legal = legal_points(read(tmp_path, tree, budget={"devices": {"at_most": 4}}))
    assert legal.num_configurations == 24
    # 8B: tp 1 with one or two, tp 4 with one; 70B: tp 4 with one
    assert len(legal.points) == 4
    assert legal.refused[OVER] == 2 * (1 + 1) * 2  # two of tp 3 or 4, both models, both batchings
    dividing = "tp, pp, ep or attn_dp doesn't divide the model or the devices"
    assert legal.refused[dividing] == 2  # with the batching that is right; else that is told first
    assert legal.refused["the model doesn't fit into the devices' memory"] == 2
    assert sum(legal.refused.values()) + len(legal.points) == 24
    assert set(legal.examples) == set(legal.refused)
    (remark,) = (remark for remark in legal.remarks if "clients.gpu.tp: 3 is in no legal" in remark)
    assert "space.yaml:" in remark
    assert OVER in remark
    assert dividing in remark, "a larger budget wouldn't help"


def test_the_same_in_another_order_runs_once(tmp_path: Path) -> None:
    pool = {"device": ["h100-sxm", "a100-sxm-80gb"], "model": "llama-3.1-8b", "perf": "roofline"}
    legal = legal_points(read(tmp_path, {"clients": [{"one": pool, "two": pool}]}))
    assert len(legal.points) == 3
    assert legal.refused == {DUPLICATE: 1}
    mentioned = {"clients": [{"one": pool, "two": pool}], "events": [[{"at_s": 1, "client_down": "one"}]]}
    assert len(legal_points(read(tmp_path, mentioned)).points) == 4, "they are told apart elsewhere"


def test_the_rest_of_a_budget(tmp_path: Path) -> None:
    tree = {"clients.gpu.count": ["rest"], "clients.gpu.tp": [1, 2, 4]}
    by_tp = {p.choices["clients.gpu.tp"]: p.scenario.clients["gpu"].count
             for p in legal_points(read(tmp_path, tree, budget={"devices": 6})).points.values()}  # fmt: skip
    assert by_tp == {"1": 6, "2": 3}
    legal = legal_points(read(tmp_path, tree, budget={"devices": 6}))
    assert legal.refused == {UNEVEN: 1}
    legal = legal_points(read(tmp_path, tree, budget={"devices": {"at_most": 6}}))
    assert [p.devices for p in legal.points.values()] == [6, 6, 4]
    cpu = {"device": "epyc-9554", "serves": [["tokenize"]], "perf": "cpu_text"}
    stages = ["tokenize", "prefill", "decode"]
    with_cpu = {"clients.cpu": [cpu], "pipeline": [stages], "clients.gpu.count": ["rest"]}
    points = legal_points(read(tmp_path, with_cpu, budget={"devices": 3})).points.values()
    assert [p.devices for p in points] == [3], "CPUs are no accelerators"


def test_nothing_legal_is_an_error_with_the_reasons(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match=r"none of the 2 configurations can be run") as error:
        legal_points(read(tmp_path, {"clients.gpu.devise": ["h100-sxm", "l40s"]}))
    assert "did you mean 'device'" in str(error.value)
    assert "space.yaml:" in str(error.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- 1", "bad.yaml:1:1: a search space is a mapping"),
        ("space: {}\nobjectiv: [devices]", "did you mean 'objectives'"),
        ("scenario: none.yaml", "there is no such file"),
        ("objectives: [ttft_s.p98]", "did you mean 'ttft_s.p99'"),
        ("objectives: []", "objectives are a list of names"),
        ("budget: 8", "devices: {at_most: 8}"),
        ("budget: {devices: 0}", "is no budget"),
        ("constraints: {ttft_s.p99: fast}", "bad.yaml:1:27: 'fast' is no bound"),
        ("constraints: {ttft: 1}", "there is no objective 'ttft'"),
        ("space: {clients.gpu.tp: []}", "no value to choose"),
        ("space: {clients.gpu.tp: {range: [4, 1]}}", "is no range"),
        (
            "space: {seed: {range: [1, 10000000]}}",
            "seed: 10,000,000 numbers are more than the 10,000 of one choice\n"
            "    by steps, such as range: [1, 10000000, 1000]",
        ),
        ("space: {seed: {range: [1, 100000000000000000000, 2]}}", "50,000,000,000,000,000,000 numbers are more"),
        ("space: {clients.gpu.tp: {doubling: 4}}", "is no doubling"),
        ("space: {clients.gpu.tp: {doubling: [1, 8, 2]}}", "is no doubling"),
        ("space: {clients.gpu.tp: [1, 2], clients.gpu: {tp: [2, 4]}}", "clients.gpu.tp is here twice"),
        ("space: {clients: {any: [1]}}", "any holds alternatives by name"),
        ("baseline: {device: h100-sxm}", "a baseline says which clients it has"),
        ("space: [1]", "the space is a mapping of paths"),
    ],
)
def test_what_is_wrong_is_told_at_its_place(tmp_path: Path, text: str, expected: str) -> None:
    found = problems(tmp_path, text)
    assert expected in found
    assert "bad.yaml" in found


def test_a_baseline_takes_the_smallest_tp_that_fits_and_fills_the_budget(tmp_path: Path) -> None:
    model = {"device": "h100-sxm", "model": "llama-3.1-70b", "perf": "roofline"}
    rates = {"workload.arrivals.poisson.rate_per_s": [1, 2], "clients.gpu.tp": [1]}
    given = {"baseline": {"clients": {"gpu": model}}}
    (slow, fast) = baseline_points(read(tmp_path, rates, budget={"devices": 8}, **given))
    pools = [point.scenario.pools["gpu"] for point in (slow, fast)]
    assert [(pool.tp, pool.count) for pool in pools] == [(4, 2), (4, 2)] or [(p.tp, p.count) for p in pools] == [
        (2, 4)
    ] * 2
    assert [p.resolved["workload"]["arrivals"]["poisson"]["rate_per_s"] for p in (slow, fast)] == [1, 2]
    at_most = baseline_points(read(tmp_path, rates, budget={"devices": {"at_most": 8}}, **given))
    assert len({point.devices for point in at_most}) > 1


SUMMARY: dict[str, Any] = {
    "devices": 4,
    "open_loop": True,
    "saturated": False,
    "offered": {"output_tokens_per_s": 100.0, "requests_per_s": 2.0},
    "throughput": {"output_tokens_per_s": 80.0, "total_tokens_per_s": 900.0, "requests_per_s": 1.5},
    "cost": {"usd_per_hour": 10.0},
    "energy": None,
    "ttft_s": {"p99": 1.5},
    "slo": {"targets": [
        {"metric": "ttft_s", "statistic": "p99", "target_s": 1.0, "actual_s": 1.5, "num_lost": 0, "met": False},
        {"metric": "e2e_s", "statistic": "p50", "target_s": 4.0, "actual_s": 3.0, "num_lost": 0, "met": True},
    ]},
}  # fmt: skip


def test_objectives_of_a_summary() -> None:
    assert objective(SUMMARY, "output_tokens_per_usd") == 100 * 3600 / 10
    assert objective({**SUMMARY, "saturated": True}, "output_tokens_per_usd") == 80 * 3600 / 10
    assert objective({**SUMMARY, "open_loop": False}, "output_tokens_per_usd") == 80 * 3600 / 10
    assert objective(SUMMARY, "total_tokens_per_usd") == 900 * 3600 / 10
    assert objective(SUMMARY, "usd_per_million_output_tokens") == pytest.approx(1e6 * 10 / 3600 / 100)
    assert objective(SUMMARY, "usd_per_thousand_requests") == pytest.approx(1e3 * 10 / 3600 / 2)
    assert objective(SUMMARY, "devices") == 4
    assert objective(SUMMARY, "ttft_s.p99") == 1.5
    assert objective(SUMMARY, "joules_per_output_token") is None
    assert objective({**SUMMARY, "cost": None}, "output_tokens_per_usd") is None
    dearer = {**SUMMARY, "cost": {"usd_per_hour": 20.0}}
    assert objective(dearer, "output_tokens_per_usd") == objective(SUMMARY, "output_tokens_per_usd") / 2  # type: ignore[operator]
    assert maximised("output_tokens_per_usd")
    assert not maximised("usd_per_million_output_tokens")
    assert not maximised("ttft_s.p99")


def test_tokens_of_requests_that_were_not_served_earn_nothing() -> None:
    kept = objective(SUMMARY, "output_tokens_per_usd")
    counts = {"arrived": 100, "finished": 5, "rejected": 95}
    lost = {**SUMMARY, "requests": counts, "offered": {**SUMMARY["offered"], "served_share": 0.03}}
    assert objective(lost, "output_tokens_per_usd") == pytest.approx(0.03 * kept)  # type: ignore[operator]
    assert objective(lost, "requests_per_usd") == pytest.approx(0.05 * 2 * 3600 / 10)
    assert objective(lost, "usd_per_thousand_requests") == pytest.approx(1e3 * 10 / 3600 / 0.1)
    earlier = {**SUMMARY, "requests": counts}  # a summary that has no share of tokens
    assert objective(earlier, "output_tokens_per_usd") == pytest.approx(0.05 * kept)  # type: ignore[operator]
    nothing = {**lost, "requests": {**counts, "finished": 0}, "offered": {**lost["offered"], "served_share": 0.0}}
    assert objective(nothing, "output_tokens_per_usd") == objective(nothing, "requests_per_usd") == 0
    assert objective(nothing, "usd_per_million_output_tokens") is None
    whole = {
        **SUMMARY,
        "requests": {"arrived": 7, "finished": 7},
        "offered": {**SUMMARY["offered"], "served_share": 1.0},
    }
    assert objective(whole, "output_tokens_per_usd") == kept


def test_the_best_is_not_the_one_that_rejects_what_it_cannot_hold(tmp_path: Path) -> None:
    path = tmp_path / "rejecting.yaml"
    path.write_text(
        "workload: {arrivals: {poisson: {rate_per_s: 5}}, num_requests: 60,\n"
        "           input_tokens: {uniform: {low: 100, high: 6000}}, output_tokens: 10}\n"
        "clients: {gpu: {device: h100-sxm, model: llama-3.1-8b, kv_cache: {num_blocks: 2000}}}\n"
        "perf: roofline\n"
    )
    large, small = (run(load(path, **{"clients.gpu.kv_cache.num_blocks": blocks})).summary() for blocks in (2000, 20))
    assert large["requests"]["finished"] == 60
    assert not large["saturated"]
    share = small["requests"]["finished"] / 60
    assert 0 < share < 0.5
    for name in ("output_tokens_per_usd", "requests_per_usd"):
        found, whole = objective(small, name), objective(large, name)
        assert found == pytest.approx(share * whole)  # type: ignore[operator]


def test_constraints_say_by_what_share_they_are_missed() -> None:
    found = excesses(
        SUMMARY, (Constraint("usd_per_hour", 8), Constraint("output_tokens_per_s", 100), Constraint("mean_w", 1))
    )
    assert found == {
        "slo.ttft_s.p99": 0.5, "slo.e2e_s.p50": -0.25, "usd_per_hour": 0.25,
        "output_tokens_per_s": pytest.approx(0.25), "mean_w": HOPELESS,
    }  # fmt: skip
    lost = {**SUMMARY["slo"]["targets"][1], "met": False, "num_lost": 9}
    assert excesses({**SUMMARY, "slo": {"targets": [lost]}}, ()) == {"slo.e2e_s.p50": HOPELESS}
    assert excesses({**SUMMARY, "slo": None, "saturated": True}, ()) == {"saturated": 1.0}
    long = {"saturated": True, "slo": None, "offered": {"span_s": 30.0}, "e2e_s": {"mean": 3.0}}
    short = long | {"offered": {"span_s": 29.0}}
    assert excesses({**SUMMARY, **long}, (), is_prefix=True) == {"saturated": 1.0}
    assert excesses({**SUMMARY, **short}, (), is_prefix=True) == {}, "all of it is ramp"
    assert excesses({**SUMMARY, **short}, ()) == {"saturated": 1.0}


def test_a_target_may_be_a_slowdown(tmp_path: Path) -> None:
    path = tmp_path / "slow.yaml"
    path.write_text(
        "workload: {arrivals: {poisson: {rate_per_s: 4}}, num_requests: 40, input_tokens: 512, output_tokens: 32}\n"
        "clients: {gpu: {device: h100-sxm, model: llama-3.1-8b}}\n"
        "perf: roofline\n"
        "slo: {ttft_slowdown: {p99: 50}, e2e_slowdown: {p50: 1.0001}}\n"
    )
    found = excesses(run(path).summary(), ())
    assert found["slo.ttft_slowdown.p99"] < 0 < found["slo.e2e_slowdown.p50"]


@pytest.mark.parametrize("seed", range(20))
def test_fronts_against_the_definition(seed: int) -> None:
    rng = random.Random(seed)
    scores = {
        i: Score(tuple(float(rng.randrange(6)) for _ in range(1 + seed % 3)), rng.choice([0.0, 0.0, 0.3]))
        for i in range(40)
    }
    feasible = {i: s for i, s in scores.items() if s.violation == 0}

    def beaten(values: tuple[float, ...]) -> bool:
        others = (s.values for s in feasible.values())
        return any(o != values and all(a <= b for a, b in zip(o, values, strict=True)) for o in others)

    expected = {s.values for s in feasible.values() if not beaten(s.values)}
    found = front(scores)
    assert [scores[i].values for i in found] == sorted(expected)
    order = ranked(scores)
    assert sorted(order) == list(scores)
    assert {scores[i].values for i in order[: sum(s.values in expected for s in feasible.values())]} == expected
    assert all(scores[i].violation == 0 for i in order[: len(feasible)])
    assert ranked({}) == front({}) == []


def test_a_point_covers_what_it_is_as_good_as() -> None:
    assert covers(Score((1.0, 2.0)), Score((1.0, 2.0)))
    assert not covers(Score((1.0, 2.0)), Score((0.99, 3.0)))
    assert covers(Score((1.0, 2.0)), Score((0.99, 3.0)), margin=0.02)
    assert covers(Score((-100.0,)), Score((-100.5,)), margin=0.01)
    assert not covers(Score((0.0,), 0.1), Score((5.0,)))


def test_prefixes_and_their_correction() -> None:
    assert Halving().shares(2000) == [1 / 16, 1 / 4, 1]
    assert Halving().shares(150) == [1]
    assert Halving().shares(2000, skipped=0.1) == [1 / 4, 1]
    assert Halving(eta=2, min_requests=500).shares(2000) == [1 / 4, 1 / 2, 1]
    both = [(Score((1.0, -10.0)), Score((2.0, -9.0)))] * 3
    assert corrected(Score((3.0, -20.0)), [both], 3) == Score((6.0, -18.0))
    assert corrected(Score((3.0, -20.0)), [both], 4) == Score((3.0, -20.0)), "too few to tell"
    own = [(Score((1.0, -10.0)), Score((5.0, -10.0)))]
    assert corrected(Score((3.0, -20.0)), [own, both], 2) == Score((6.0, -18.0)), "too few under the same load"
    assert corrected(Score((3.0, -20.0)), [own, both], 1) == Score((15.0, -20.0))
