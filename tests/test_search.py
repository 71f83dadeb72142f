"""Searches of small spaces: against brute force, twice, cut and gone on with, by every strategy; and the command."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from kit import sampled
from mist.cli import main
from mist.errors import InvariantError, ScenarioError
from mist.scenario import catalogue, load
from mist.scenario.tables import build_tables
from mist.search.evaluate import Job, Outcome, evaluate
from mist.search.executors import executor_named
from mist.search.legal import legal_points
from mist.search.run import search
from mist.search.space import read_space
from mist.search.store import open_store

SPACE: dict[str, Any] = {
    "name": "small",
    "scenario": {
        "seed": 3,
        "workload": {
            "arrivals": {"poisson": {"rate_per_s": 20}},
            "num_requests": 400,
            "input_tokens": {"lognormal": {"mean": 800, "cv": 0.6}},
            "output_tokens": 40,
        },
        "clients": {"gpu": {"device": "h100-sxm", "model": "llama-3.1-8b", "perf": "roofline"}},
        "slo": {"ttft_s": {"p99": 0.4}, "tpot_s": {"p99": 0.025}},
    },
    "space": {
        "clients.gpu": {
            "device": ["h100-sxm", "a100-sxm-80gb", "l40s"],
            "tp": [1, 2],
            "count": {"range": [1, 2]},
            "batching": {"chunked": {"max_num_batched_tokens": [512, 2048]}},
        }
    },
    "budget": {"devices": {"at_most": 3}},
    "objectives": ["devices", "ttft_s.p99"],
    "baseline": {"clients": {"gpu": {"device": "h100-sxm", "model": "llama-3.1-8b", "perf": "roofline"}}},
}


class Backwards:
    """Runs jobs from the last to the first, as workers that overtake each other would."""

    def run(self, jobs: Iterable[Job]) -> Iterator[Outcome]:
        with executor_named("serial") as serial:
            yield from reversed(list(serial.run(jobs)))


def written(folder: Path, space: dict[str, Any] | None = None, **changed: Any) -> Path:
    path = folder / "space.yaml"
    path.write_text(yaml.safe_dump({**(space or SPACE), **changed}, sort_keys=False))
    return path


def found(path: Path, executor: Any = None, **options: Any) -> dict[str, Any]:
    """The document without its times."""
    with executor_named("serial") as serial:
        document = search(path, executor or serial, **{"num_seeds": 2, **options}).document
    assert set(document.pop("timing")) == {"wall_s", "cpu_s", "runs_per_cpu_s"}
    return document


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("space"))


@pytest.fixture(scope="module")
def halved(path: Path) -> dict[str, Any]:
    return found(path)


def by_hand() -> list[tuple[tuple[int, float], tuple[str, int, int, int]]]:
    """(devices, TTFT P99) over two seeds of every deployment that meets its SLOs on average, that nothing beats."""
    scored = []
    for device, tp, count, tokens in itertools.product(
        ("h100-sxm", "a100-sxm-80gb", "l40s"), (1, 2), (1, 2), (512, 2048)
    ):
        if tp * count > 3:
            continue
        figures = []
        for seed in (3, 4):
            chosen = {"device": device, "tp": tp, "count": count}
            overrides = {f"clients.gpu.{key}": value for key, value in chosen.items()} | {"seed": seed}
            overrides["clients.gpu.batching"] = {"chunked": {"max_num_batched_tokens": tokens}}
            plain = load(SPACE["scenario"], **overrides)
            arrivals = build_tables(plain)[""].arrival_ns
            warmup_s = float(arrivals[40] - arrivals[0]) / 1e9
            summary = load(SPACE["scenario"], **overrides, warmup_s=warmup_s).run().summary()
            saturated = 1.0 if summary["saturated"] else 0.0
            figures.append((summary["ttft_s"]["p99"], summary["tpot_s"]["p99"], saturated))
        ttft, tpot, saturated = (sum(column) / 2 for column in zip(*figures, strict=True))
        if ttft <= 0.4 and tpot <= 0.025 and not saturated:
            scored.append(((tp * count, ttft), (device, tp, count, tokens)))
    return sorted(
        (mine, who)
        for mine, who in scored
        if not any(other != mine and other[0] <= mine[0] and other[1] <= mine[1] for other, _ in scored)
    )


def test_the_front_equals_brute_force(path: Path, halved: dict[str, Any]) -> None:
    exhaustive = found(path, strategy="exhaustive")
    expected = by_hand()
    assert len(expected) >= 2
    for document in (exhaustive, found(path, strategy="bounded"), halved):
        front = document["front"]
        assert [tuple(each["choices"].values()) for each in front] == [tuple(map(str, who)) for _, who in expected]
        assert [each["objectives"]["ttft_s.p99"]["mean"] for each in front] == pytest.approx(
            [v[1] for v, _ in expected]
        )
        assert document["best"] == exhaustive["best"]
        assert document["gain"] == exhaustive["gain"]
    shares = [each["share"] for each in halved["runs"]]
    assert shares == [0.25, 1.0]
    whole = [each["runs"] for each in halved["runs"] if each["share"] == 1]
    assert whole[0] < exhaustive["runs"][0]["runs"], "halving left nothing out"


def test_the_same_search_gives_the_same_whoever_runs_it(path: Path, halved: dict[str, Any], tmp_path: Path) -> None:
    assert json.dumps(found(path)) == json.dumps(halved)
    assert json.dumps(found(path, Backwards(), store=tmp_path / "search.db")) == json.dumps(halved)


@pytest.mark.parametrize("share", sampled([0.3, 0.1, 0.9], 1))
def test_a_search_that_is_cut_goes_on(path: Path, halved: dict[str, Any], tmp_path: Path, share: float) -> None:
    store = tmp_path / "search.db"
    total = sum(each["runs"] for each in halved["runs"])

    class Killed(Exception):
        pass

    def kill(done: int, *_: float) -> None:
        if done >= share * total:
            raise Killed

    with pytest.raises(Killed):
        found(path, store=store, progress=kill)
    before = len(open_store(store, "small", SPACE["objectives"]).runs)
    assert share * total - 1 <= before <= share * total + 1
    assert json.dumps(found(path, store=store)) == json.dumps(halved)
    runs = open_store(store, "small", SPACE["objectives"]).runs
    assert len(runs) <= total, "something was run twice"


def test_a_store_is_a_study_that_optuna_reads(path: Path, halved: dict[str, Any], tmp_path: Path) -> None:
    import optuna

    found(path, store=tmp_path / "search.db")
    study = optuna.load_study(study_name="small: devices, ttft_s.p99", storage=f"sqlite:///{tmp_path / 'search.db'}")
    lowest = min(trial.values[0] for trial in study.get_trials() if trial.user_attrs["share"] == 1)
    assert lowest == 1
    assert {"seed", "warmup_s", "choices", "key", "run", "share"} <= study.trials[0].user_attrs.keys()


@pytest.mark.parametrize("strategy", sampled(["nsga2", "nsga3", "tpe"], 2))
def test_samplers_are_deterministic_and_find_the_front(path: Path, halved: dict[str, Any], strategy: str) -> None:
    one = found(path, strategy=strategy, num_trials=24)
    assert json.dumps(one) == json.dumps(found(path, Backwards(), strategy=strategy, num_trials=24))
    assert one["best"]["best devices"]["objectives"]["devices"]["mean"] == 1
    assert one["front"][0]["choices"]["clients.gpu.device"] == halved["front"][0]["choices"]["clients.gpu.device"]


def test_gain_and_cost_of_real_measurements(halved: dict[str, Any]) -> None:
    assert halved["baseline"]["devices"] == 1
    assert halved["gain"]["objective"] == "devices"
    assert halved["gain"]["factor"]["mean"] == pytest.approx(1.0)
    seconds_of_load = 400 / 20
    assert halved["real"]["device_hours"] > sum(each["runs"] for each in halved["runs"]) * seconds_of_load / 3600 / 4


def test_what_can_not_keep_up_is_in_no_front(tmp_path: Path) -> None:
    rates = {"workload.arrivals.poisson.rate_per_s": [20, 2000], "clients.gpu.tp": [1]}
    document = found(written(tmp_path, {**SPACE, "space": rates}, objectives=["output_tokens_per_s"]))
    (best,) = document["front"]
    assert best["choices"]["workload.arrivals.poisson.rate_per_s"] == "20"
    assert best["seeds_met"] == best["num_seeds"] == 2


def test_nothing_feasible_is_told_and_is_no_error(tmp_path: Path) -> None:
    document = found(written(tmp_path, constraints={"ttft_s.p99": 1e-6}))
    told = document["remarks"]
    assert "The baseline meets the constraints under no load of the space." in told
    assert any(each.startswith("Nothing ran on the whole workload") for each in told)
    assert document["front"] == []
    assert document["gain"] is None
    assert set(document["best"].values()) == {None}


def test_seeds_that_draw_nothing_are_told(tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n" + "0.5,100,20\n" * 40)
    drawn = found(written(tmp_path))
    assert not any("All seeds" in each for each in drawn["remarks"])
    read = found(written(tmp_path, scenario={**SPACE["scenario"], "workload": {"trace": "mine.csv"}}))
    assert any(each.startswith("All seeds gave the same") for each in read["remarks"])


@pytest.mark.parametrize("own", [{"warmup_s": 8}, {"window_s": "8:15"}])
def test_prefixes_are_longer_than_a_warm_up(tmp_path: Path, own: dict[str, Any]) -> None:
    path = written(tmp_path, scenario={**SPACE["scenario"], **own})
    document = found(path, num_seeds=1)
    assert document["configurations"]["failed"] == []
    assert document["front"] == found(path, num_seeds=1, strategy="exhaustive")["front"] != []


def test_a_run_that_failed_is_tried_again(path: Path, halved: dict[str, Any], tmp_path: Path) -> None:
    class Short(Backwards):
        """Its first job dies."""

        def run(self, jobs: Iterable[Job]) -> Iterator[Outcome]:
            for i, outcome in enumerate(super().run(jobs)):
                yield outcome if i else Outcome(outcome.key, None, "its process died", 0.0)

    store = tmp_path / "search.db"
    assert found(path, Short(), store=store)["configurations"]["failed"] != []
    assert json.dumps(found(path, store=store)) == json.dumps(halved)


@pytest.mark.parametrize("strategy", ["halving", "exhaustive", "nsga2"])
def test_that_all_runs_failed_is_an_error_with_what_they_failed_with(tmp_path: Path, strategy: str) -> None:
    late = {"warmup_s": 1e5, "workload": {**SPACE["scenario"]["workload"], "num_requests": 20}}
    path = written(tmp_path, scenario={**SPACE["scenario"], **late})
    result = CliRunner().invoke(main, ["search", str(path), "--executor", "serial", "--seeds", "1", "--trials", "4",
                                       "--strategy", strategy, "--out", str(tmp_path / "out")])  # fmt: skip
    assert result.exit_code == 2
    assert re.search(r"space.yaml:\d+:\d+: all \d+ runs failed\n    \d+ with .*no request arrives after", result.stderr)
    assert "Nothing meets" not in result.output
    assert not (tmp_path / "out" / "result.json").exists()


@pytest.mark.parametrize("strategy", ["halving", "exhaustive", "nsga2", "tpe"])
def test_that_nothing_is_legal_is_an_error_by_any_strategy(tmp_path: Path, strategy: str) -> None:
    path = written(tmp_path, {**SPACE, "space": {"clients.gpu.tp": [3, 5, 7]}}, budget={"devices": {"at_most": 8}})
    result = CliRunner().invoke(main, ["search", str(path), "--executor", "serial", "--seeds", "1", "--trials", "1",
                                       "--strategy", strategy, "--out", str(tmp_path / "out")])  # fmt: skip
    assert result.exit_code == 2
    assert re.search(r"space.yaml:\d+:\d+: none of the 3 configurations can be run", result.stderr)
    assert re.search(r"    \d+: .*tp", result.stderr)
    assert not (tmp_path / "out" / "result.json").exists()


def test_configurations_that_failed_are_counted_and_not_their_runs(tmp_path: Path) -> None:
    class Cold(Backwards):
        def run(self, jobs: Iterable[Job]) -> Iterator[Outcome]:
            for job in jobs:
                assert isinstance(job.source, dict)
                fails = job.source["clients"]["gpu"]["tp"] == 2
                yield Outcome(job.key, None, "it died", 0.0) if fails else evaluate(job)

    space = {"clients.gpu": {"device": ["h100-sxm", "a100-sxm-80gb"], "tp": [1, 2]}}
    document = found(written(tmp_path, {**SPACE, "space": space}), Cold(), strategy="exhaustive", num_seeds=3)
    assert document["configurations"]["failed"] == [{"error": "it died", "count": 2}]


@pytest.mark.parametrize(("bug", "kind"), [(True, InvariantError), (False, ScenarioError)])
def test_errors_are_counted_where_all_runs_failed(path: Path, bug: bool, kind: type[Exception]) -> None:
    class Broken(Backwards):
        def run(self, jobs: Iterable[Job]) -> Iterator[Outcome]:
            for i, job in enumerate(jobs):
                error = ["out of memory\n  at once", "it died", f"rare {i}"][(0, 1, 0, 1, 2)[i % 5]]
                broken = "a law of the simulation broke, which is a bug: " if bug else ""
                yield Outcome(job.key, None, broken + error, 0.0)

    first = r"all \d+ runs failed\n    \d+ with .*(out of memory|it died)\n    \d+ with .*(out of memory|it died)\n"
    with pytest.raises(kind, match=first) as told:
        found(path, Broken())
    assert re.search(r"1 with .*rare \d+\n    and \d+ other errors", str(told.value))


def test_dollars_without_prices_are_refused(tmp_path: Path) -> None:
    scenario = {**SPACE["scenario"], "workload": {**SPACE["scenario"]["workload"], "num_requests": 20}}
    space = written(tmp_path, scenario=scenario, objectives=["devices", "quality"])
    with pytest.raises(ScenarioError, match=r"space.yaml:\d+:\d+: no run has a value of quality"):
        found(space)


def test_the_best_of_a_single_vendor_is_told_by_what_devices_say(tmp_path: Path) -> None:
    own = {"peak_tflops": {"bf16": 900}, "memory_bytes": "80 GiB", "memory_bytes_per_s": "3 TB/s"}
    devices = [
        {"name": "one", "vendor": "acme", **own},
        {"name": "two", "vendor": "acme", **own},
        {"name": "lone", **own},
    ]
    client = {"model": "llama-3.1-8b", "perf": "roofline", "device": devices}
    space = {**SPACE, "budget": {"devices": 2}, "space": {"clients": [{"a": client, "b": client}]}}
    legal = legal_points(read_space(written(tmp_path, space)))
    assert {(point.kinds, point.vendors) for point in legal.points.values()} == {
        (("one",), ("acme",)), (("two",), ("acme",)), (("one", "two"), ("acme",)), (("lone",), ("lone",)),
        (("lone", "one"), ("acme", "lone")), (("lone", "two"), ("acme", "lone")),
    }  # fmt: skip


@pytest.mark.parametrize("entry", catalogue.entries("devices"), ids=lambda entry: entry.name)
def test_accelerators_of_the_catalogue_say_their_vendor(entry: catalogue.Entry) -> None:
    device = catalogue.read("devices", entry.name, Path())[0]
    assert device.num_cores or device.vendor in ("nvidia", "amd", "intel", "google", "sambanova")


def test_the_command_writes_deployments_that_run(path: Path, halved: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["search", str(path), "--seeds", "2", "--executor", "serial", "--out", str(out)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    for told in ("Pareto front", "engine defaults", "device-hours", "not the devices of the budget"):
        assert told in result.stdout
    document = json.loads((out / "result.json").read_text())
    document.pop("timing")
    assert json.dumps(document) == json.dumps(halved)
    assert sorted(p.name for p in out.glob("*.yaml")) == sorted(f"{each['name']}.yaml" for each in halved["front"])
    summary = load(out / "front-1.yaml").run().summary()
    assert summary["requests"]["finished"] == 400
    again = CliRunner().invoke(main, arguments)
    assert again.exit_code == 0
    assert again.stdout == result.stdout


def test_the_command_keeps_folders_of_others(path: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    result = CliRunner().invoke(main, ["search", str(path), "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "isn't empty" in result.stderr
