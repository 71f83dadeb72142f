"""Capacities: known ones of queues are found; verdicts, limits and oddities of made-up systems are told as they are.

Real runs are of one deterministic server, whose step takes the same time for each request; made-up systems stand in for
the executor and answer by a rule.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from mist.cli import main
from mist.errors import InvariantError, ScenarioError
from mist.scenario import Scenario
from mist.search.capacity import Capacity, Interrupted, capacity
from mist.search.evaluate import Job, Outcome
from mist.search.executors.processes import Processes
from mist.search.executors.serial import Serial
from mist.search.intervals import mean_interval, share_at_least
from mist.search.knobs import knob_of
from mist.search.pace import Pace

#: one request at a time, all alike: a server of deterministic service
ONE_BY_ONE = {
    "device": "h100-sxm",
    "model": "llama-3.1-8b",
    "perf": "roofline",
    "batching": {"continuous": {"max_num_seqs": 1}},
    "engine": {"name": "none", "step_overhead_ns": 0},
}


def server(arrivals: dict[str, Any], num_requests: int, **sections: Any) -> Scenario:
    work = {"arrivals": arrivals, "num_requests": num_requests, "input_tokens": 1000, "output_tokens": 1}
    return Scenario(
        name="server", workload=work, clients={"gpu": ONE_BY_ONE | sections.pop("gpu", {})},
        slo=sections.pop("slo", {"ttft_s": {"p99": 1}}), **sections,
    )  # fmt: skip


@pytest.fixture(scope="module")
def service_s() -> float:
    """What one request takes."""
    alone = server({"constant": {"rate_per_s": 1}}, 2).run().summary()["ttft_s"]
    assert alone["p50"] == alone["mean"]
    return float(alone["mean"])


# what queues are known to take


def test_equal_gaps_are_served_up_to_the_rate_of_the_server(service_s: float) -> None:
    num_requests, slack = 2001, 0.4
    # the backlog of request i is i (service - gap) where gaps are shorter
    target = service_s * (1 + slack)
    gap = service_s - 2 * slack * service_s / (num_requests - 1)
    scenario = server({"constant": {"rate_per_s": 1 / service_s}}, num_requests, slo={"ttft_s": {"mean": target}})
    found = capacity(scenario, tolerance=1e-5)
    assert found.value == pytest.approx(service_s / gap, rel=1.1e-5)
    assert found.value <= service_s / gap


@pytest.mark.long
def test_poisson_arrivals_meet_a_mean_as_an_m_d_1_queue_says(service_s: float) -> None:
    # mean time in an M/D/1 queue: S (1 + rho / 2 (1 - rho)), twice the service at rho = 2/3 (Pollaczek, Khinchine)
    scenario = server({"poisson": {"rate_per_s": 0.5 / service_s}}, 3000, slo={"ttft_s": {"mean": 2 * service_s}})
    told = capacity(scenario, seeds=range(4), tolerance=0.02, executor=Processes(2)).as_json()
    assert told["confidence"]["low"] < (2 / 3) / 0.5 < told["confidence"]["high"]
    assert told["confidence"]["mean"] == pytest.approx((2 / 3) / 0.5, rel=0.03)
    assert told["confidence"]["num_hold"] == 4
    assert told["found"]["requests_per_s"] == pytest.approx(told["found"]["value"] * 0.5 / service_s, rel=0.03)
    assert told["non_monotone"] == []


@pytest.mark.parametrize("load", [0.3, 1.7, 4.4])
def test_the_fewest_clients_are_the_load_rounded_up(service_s: float, load: float) -> None:
    scenario = server(
        {"constant": {"rate_per_s": load / service_s}}, 300, slo={"ttft_s": {"p99.9": service_s * 1.0001}},
        routing="round_robin", gpu={"tp": 1, "count": 3},
    )  # fmt: skip
    found = capacity(scenario, vary="clients.gpu.count")
    told = found.as_json()["found"]
    assert (told["value"], told["devices"]) == (math.ceil(load), math.ceil(load))
    assert told["requests_per_s"] == pytest.approx(load / service_s)
    assert told["ttft_p99_s"] == pytest.approx(service_s)
    assert told["throughput_requests_per_s"] == pytest.approx(told["output_tokens_per_s"])
    per_hour = told["throughput_requests_per_s"] * 3600
    assert told["usd_per_million_output_tokens"] == pytest.approx(told["usd_per_hour"] / per_hour * 1e6)


def test_the_most_at_once_of_a_closed_loop(service_s: float) -> None:
    scenario = server(
        {"closed_loop": {"concurrency": 2}}, 200, slo={"ttft_s": {"p99": service_s * 6.0001}}
    )  # fmt: skip
    for vary in ("workload.arrivals.closed_loop.concurrency", "workload.concurrency"):
        found = capacity(scenario, vary=vary)
        assert (found.value, found.shown(6)) == (6, "6 at once")


def test_a_saturated_run_holds_nothing(service_s: float) -> None:
    scenario = server({"constant": {"rate_per_s": 0.9 / service_s}}, 2000, slo={"ttft_s": {"p99": 1e6}})
    found = capacity(scenario, tolerance=0.001)
    assert 1 / 0.9 <= found.value <= 1.03 / 0.9
    assert "near capacity, the queue of gpu grew" in found.as_json()["seeds"][0]["because"]
    assert "saturated, the queue of gpu grew" in found.as_json()["runs"][-1]["because"]


@pytest.mark.parametrize(("num_requests", "most"), [(20, 1.36), (50, 1.2), (400, 1.15)])
def test_a_short_workload_holds_no_more_than_is_served(service_s: float, num_requests: int, most: float) -> None:
    # request i is answered after (i + 1) service, whatever the rate, so that no rate would miss this target
    slo = {"ttft_s": {"p99": 1.1 * num_requests * service_s}}
    found = capacity(server({"constant": {"rate_per_s": 0.5 / service_s}}, num_requests, slo=slo), tolerance=0.001)
    assert 1 <= found.value * 0.5 <= most


def test_a_workload_that_is_too_short_says_how_many_requests_would_do() -> None:
    work = {"arrivals": {"poisson": {"rate_per_s": 6}}, "input_tokens": 1000, "output_tokens": 100}
    gpu = {"device": "h100-sxm", "model": "llama-3.1-8b"}
    short, longer = (
        capacity(Scenario(seed=1, workload={**work, "num_requests": number}, clients={"gpu": gpu},
                          slo={"ttft_s": {"p99": 1}}), tolerance=0.1)
        for number in (50, 600)
    )  # fmt: skip
    assert short.value <= longer.value
    assert "ended while" in short.as_json()["seeds"][0]["because"]
    (note,) = short.notes()
    assert "too short to tell" in note
    assert 100 < int(note.split("workload.num_requests of ")[1].split()[0].replace(",", "")) < 1000


def test_what_is_long_enough_is_not_called_short() -> None:
    arrival = np.arange(101.0)
    assert Pace.of(arrival, arrival + 9).is_kept
    assert not Pace.of(arrival, arrival + 9).is_short
    late = Pace.of(arrival, arrival * 1.2 + 1)
    assert (late.arrived, late.is_kept, late.is_short, late.num_enough) == (50, False, True, 120)
    assert Pace.of(arrival[:1], arrival[:1]) is None


def test_a_slowdown_is_a_target_like_any_other(service_s: float) -> None:
    arrivals = {"poisson": {"rate_per_s": 0.5 / service_s}}
    times, seconds = (
        capacity(server(arrivals, 200, slo=slo), tolerance=0.1).value
        for slo in ({"ttft_slowdown": {"mean": 2}}, {"ttft_s": {"mean": 2 * service_s}})
    )
    assert times == seconds


def test_rates_of_all_tenants_that_have_one_rise_together(service_s: float) -> None:
    work = {"num_requests": 300, "input_tokens": 1000, "output_tokens": 1}
    tenants = {
        "one": {"workload": {**work, "arrivals": {"constant": {"rate_per_s": 0.2 / service_s}}, "rate_scale": 2}},
        "two": {"workload": {**work, "concurrency": 1, "num_requests": 30}},
    }
    scenario = Scenario(tenants=tenants, clients={"gpu": ONE_BY_ONE}, slo={"ttft_s": {"p50": 1}})
    assert knob_of(scenario).overrides(3.0) == {"tenants.one.workload.rate_scale": 6.0}


def test_the_same_seeds_give_the_same_document(service_s: float) -> None:
    scenario = server({"poisson": {"rate_per_s": 0.5 / service_s}}, 200, slo={"ttft_s": {"mean": 2 * service_s}})
    documents = [
        json.dumps(capacity(scenario, seeds=[4, 5], executor=executor).as_json())
        for executor in (Serial(), Processes(2), Serial())
    ]
    assert len(set(documents)) == 1
    with_one = capacity(scenario, seeds=[5]).as_json()
    assert with_one["seeds"] == [json.loads(documents[0])["seeds"][1] | {"num_runs": with_one["seeds"][0]["num_runs"]}]


# made-up systems


class Rule:
    """An executor that runs nothing: `holds(seed, value)` says whether a run meets its SLO."""

    def __init__(self, holds: Callable[[int, float], bool], path: str = "workload.rate_scale") -> None:
        self.holds, self.path, self.asked = holds, path, [0]

    def __enter__(self) -> Rule:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(self, jobs: Iterable[Job]) -> Iterator[Outcome]:
        for job in jobs:
            self.asked[0] += 1
            value, seed = job.overrides[self.path], job.overrides["seed"]
            met = self.holds(seed, value)
            late = 2.0 + (10 / value if self.path.endswith(".count") else 0)
            target = {"metric": "ttft_s", "statistic": "p99", "target_s": 1.0, "actual_s": 0.5 if met else late,
                      "num_lost": 0, "met": met}  # fmt: skip
            summary = {"slo": {"targets": [target]}, "saturated": False, "offered": {"requests_per_s": 4 * value}}
            yield Outcome(job.key, summary, None, 0.0)


def of_rule(holds: Callable[[int, float], bool], seeds: Iterable[int] = (0,), **options: Any) -> Capacity:
    rule = Rule(holds, options.pop("path", "workload.rate_scale"))
    scenario = options.pop("scenario", server({"poisson": {"rate_per_s": 4}}, 50))
    return capacity(scenario, seeds=list(seeds), executor=rule, **options)


@pytest.mark.parametrize("limit", [0.001, 0.3, 1.0, 1.01, 7.3, 900.0])
def test_any_limit_is_found_within_the_tolerance(limit: float) -> None:
    found = of_rule(lambda _, value: value <= limit, tolerance=0.02)
    assert limit / 1.02 <= found.value <= limit
    assert found.as_json()["seeds"][0]["fails_at"] > limit
    assert found.as_json()["seeds"][0]["because"] == "TTFT p99 is 2 s, not 1 s"
    assert not list(found.notes())


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 8, 41])
@pytest.mark.parametrize("start", [1, 3, 16])
def test_any_number_of_clients_is_found(limit: int, start: int) -> None:
    path = "clients.gpu.count"
    scenario = server({"poisson": {"rate_per_s": 4}}, 50, gpu={"count": start, "tp": 2})
    found = of_rule(lambda _, value: value >= limit, scenario=scenario, vary=path, path=path)
    assert (found.value, found.as_json()["found"]["devices"]) == (limit, 2 * limit)
    assert found.as_json()["tolerance"] is None


def test_what_is_found_holds_for_every_seed_and_says_how_sure_that_is() -> None:
    told = of_rule(lambda seed, value: value <= 2 + seed, seeds=range(5), tolerance=0.001).as_json()
    assert told["found"]["value"] == pytest.approx(2, rel=0.001)
    assert told["confidence"]["num_hold"] == told["confidence"]["num_seeds"] == 5
    assert told["confidence"]["share_at_least"] == pytest.approx(0.05 ** (1 / 5))
    assert told["confidence"]["mean"] == pytest.approx(4, rel=0.001)
    half = 2.7764 * math.sqrt(2.5) / math.sqrt(5)  # Student's t of 4 degrees of freedom at 97.5 %
    assert told["confidence"]["high"] == pytest.approx(4 + half, rel=0.001)


def test_what_holds_beyond_a_failure_is_told() -> None:
    found = of_rule(lambda seed, value: value <= 7.9 and not (seed == 1 and 3.5 < value < 4), seeds=range(2))
    told = found.as_json()
    assert {each["seed"] for each in told["non_monotone"]} == {1}
    assert any(note.startswith("Not monotone: seed 1 fails at ") for note in told["notes"])
    assert len(told["notes"]) == len(told["non_monotone"])


def test_where_nothing_holds_that_is_the_answer() -> None:
    found = of_rule(lambda seed, value: seed == 1, seeds=range(2))
    told = found.as_json()
    assert told["found"] is None
    assert told["confidence"]["mean"] is None
    assert "Seed 0: even at 0.0002441 x the rate it fails: TTFT p99" in told["notes"][0]
    assert "Seed 1: no end was found" in told["notes"][1]


def test_seeds_that_make_no_difference_are_told() -> None:
    assert "nothing is drawn" in of_rule(lambda _, value: value <= 2, seeds=range(3)).as_json()["notes"][-1]


def test_progress_ends_where_it_said() -> None:
    told: list[tuple[int, int]] = []
    of_rule(lambda _, value: value <= 3.3, seeds=range(3), progress=lambda *counts: told.append(counts))
    assert [done for done, _ in told] == list(range(1, len(told) + 1))
    assert told[-1][0] == told[-1][1]
    assert all(abs(total - len(told)) <= 12 for _, total in told)


# what can't be answered


def test_requests_that_are_lost_are_told_first() -> None:
    work = {"arrivals": {"poisson": {"rate_per_s": 6}}, "num_requests": 50, "input_tokens": 1000, "output_tokens": 100}
    scenario = Scenario(
        workload=work, clients={"gpu": {"device": "h100-sxm", "count": 2, "model": "llama-3.1-8b"}},
        events=[{"at_s": 3, "client_down": "gpu"}], slo={"ttft_s": {"p99": 1}},
    )  # fmt: skip
    runs = capacity(scenario, tolerance=0.5).as_json()["runs"]
    assert any("requests lost, which count as late: TTFT p99 of the others is 0.0" in str(r["because"]) for r in runs)
    gone = "50 requests lost, which count as late: no other request has a TTFT p99, target 1 s"
    assert runs[0]["because"] == gone


class Partly(Rule):
    """Can't be run beyond 3."""

    def run(self, jobs: Iterable[Job]) -> Iterator[Outcome]:
        for job, outcome in zip(copy := list(jobs), super().run(copy), strict=True):
            can = self.holds(0, job.overrides[self.path])
            yield outcome if can else Outcome(job.key, None, "x.yaml:3:\n  too fast", 0.0)


def test_a_value_that_cant_be_run_bounds_the_search() -> None:
    found = capacity(server({"poisson": {"rate_per_s": 4}}, 5), executor=Partly(lambda _, value: value <= 3))
    assert 3 / 1.02 <= found.value <= 3
    assert found.as_json()["seeds"][0]["because"] == "can't be run: x.yaml:3: too fast"
    assert "Seed 0: the search ended at 3.0" in next(found.notes())


def test_clients_that_an_event_names_bound_the_fewest(service_s: float) -> None:
    arrivals = {"constant": {"rate_per_s": 0.5 / service_s}}
    events = [{"at_s": 0.5, "client_down": "gpu-2", "for_s": 0.1}]
    scenario = server(arrivals, 200, gpu={"count": 4}, events=events)
    found = capacity(scenario, vary="clients.gpu.count")
    assert found.value == 3
    assert "there is no client 'gpu-2'" in found.as_json()["seeds"][0]["because"]
    notes = list(capacity(scenario, tolerance=1).notes())
    assert any(note.startswith("Events and schedules stay at their times") for note in notes)


def test_more_clients_that_change_nothing_end_the_search(service_s: float) -> None:
    scenario = server({"constant": {"rate_per_s": 0.5 / service_s}}, 100, slo={"ttft_s": {"p99": service_s / 2}})
    found = capacity(scenario, vary="clients.gpu.count")
    assert found.value is None
    assert found.as_json()["seeds"][0]["num_runs"] == 2
    (note,) = found.notes()
    assert "even at 2 clients it fails: TTFT p99" in note
    assert note.endswith("More clients change nothing.")


def test_without_an_slo_it_says_what_to_write() -> None:
    with pytest.raises(ScenarioError, match="no SLO") as caught:
        capacity(server({"poisson": {"rate_per_s": 4}}, 5, slo={}))
    assert "ttft_s: {p99: 1.5}" in str(caught.value)


@pytest.mark.parametrize(
    ("vary", "message"),
    [
        ("rate", "no rate"),
        ("clients.cpu.count", "no clients 'cpu'"),
        ("clients.gpu.tp", "can't be varied"),
        ("workload.num_requests", "--vary takes rate"),
    ],
)
def test_what_cant_be_varied_is_told(vary: str, message: str) -> None:
    with pytest.raises(ScenarioError, match=message):
        capacity(server({"closed_loop": {"concurrency": 2}}, 5), vary=vary)


BROKEN = "a law of the simulation broke, which is a bug: x"


@pytest.mark.parametrize(("text", "error"), [("clients.gpu: too many", ScenarioError), (BROKEN, InvariantError)])
def test_a_run_that_fails_ends_it_with_the_place(text: str, error: type[Exception]) -> None:
    class Failing(Rule):
        def run(self, jobs: Iterable[Job]) -> Iterator[Outcome]:
            return (Outcome(job.key, None, text, 0.0) for job in jobs)

    with pytest.raises(error, match="rate at 1: "):
        capacity(server({"poisson": {"rate_per_s": 4}}, 5), executor=Failing(lambda *_: True))


# intervals and the command


def test_bounds_of_shares_and_means() -> None:
    assert share_at_least(0, 7) == 0
    assert share_at_least(1, 1) == pytest.approx(0.05)
    # the chance of 8 or more of 10 at this share is 5 %
    p = share_at_least(8, 10)
    assert sum(math.comb(10, k) * p**k * (1 - p) ** (10 - k) for k in (8, 9, 10)) == pytest.approx(0.05)
    assert mean_interval([3.0]) == (3.0, None, None)
    assert mean_interval([2.0, 2.0]) == (2.0, 2.0, 2.0)


def test_the_command_prints_a_table_or_a_document(tmp_path: Path, service_s: float) -> None:
    path = tmp_path / "server.yaml"
    path.write_text(server({"constant": {"rate_per_s": 0.25 / service_s}}, 100).to_yaml())
    options = [str(path), "--set", f"slo.ttft_s.p99={service_s * 1.0001}", "--executor", "serial", "--seeds", "2"]
    printed = CliRunner().invoke(main, ["capacity", *options])
    assert printed.exit_code == 0, printed.output
    assert "holds up to 4 x the rate, 42.9" in printed.output
    assert "nothing is drawn" in printed.output
    assert "confidence" not in printed.output
    options += ["--set", f"workload.arrivals={{poisson: {{rate_per_s: {0.25 / service_s}}}}}"]
    options += ["--set", f"slo.ttft_s.p99={service_s * 4}"]
    drawn = CliRunner().invoke(main, ["capacity", *options])
    assert "2 of 2 seeds hold there: with 95% confidence at least 22% of all would." in drawn.output
    options = options[:-4]
    document = json.loads(CliRunner().invoke(main, ["capacity", *options, "--json"]).stdout)
    assert document["found"]["value"] == pytest.approx(4, rel=0.02)
    assert document["slo"] == [{"metric": "ttft_s", "statistic": "p99", "target_s": service_s * 1.0001}]
    unknown = CliRunner().invoke(main, ["capacity", str(path), "--executor", "seriel"])
    assert unknown.exit_code == 2
    assert "did you mean 'serial'" in unknown.output
    nothing = CliRunner().invoke(main, ["capacity", *options[:2], f"slo.ttft_s.p99={service_s / 2}", *options[3:]])
    assert nothing.exit_code == 1
    assert "no value holds for every seed" in nothing.output


class Cut(Rule):
    """The user stops it after so many runs."""

    most: int = 6

    def run(self, jobs: Iterable[Job]) -> Iterator[Outcome]:
        for job in jobs:
            if self.asked[0] == self.most:
                raise KeyboardInterrupt
            yield from super().run([job])


def test_what_is_known_when_it_is_stopped_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scenario = server({"poisson": {"rate_per_s": 4}}, 50)
    with pytest.raises(Interrupted) as stopped:
        capacity(scenario, executor=Cut(lambda _, value: value <= 11))
    told = stopped.value.known.as_json()
    assert told["complete"] is False
    assert told["found"] is None
    (seed,) = told["seeds"]
    assert (seed["value"], seed["fails_at"], seed["num_runs"]) == (8, pytest.approx(math.sqrt(128)), 6)
    assert told["notes"] == []
    assert of_rule(lambda _, value: value <= 11).as_json()["complete"] is True
    path = tmp_path / "server.yaml"
    path.write_text(scenario.to_yaml())
    command = importlib.import_module("mist.cli.capacity")
    monkeypatch.setattr(command, "chosen_executor", lambda *_: Cut(lambda _, value: value <= 11))
    printed = CliRunner().invoke(main, ["capacity", str(path)])
    assert printed.exit_code == 130
    assert "interrupted; so far" in printed.output
    assert "8 x the rate" in printed.output
    document = CliRunner().invoke(main, ["capacity", str(path), "--json"])
    assert json.loads(document.stdout)["complete"] is False


@pytest.mark.parametrize("fails", [True, False])
def test_failures_that_no_number_of_clients_makes_up_for_are_told(service_s: float, fails: bool) -> None:
    arrivals = {"constant": {"rate_per_s": 0.9 / service_s}}
    events = [{"at_s": 20.5 * service_s, "client_down": "gpu-0", "on_loss": "fail"}] if fails else []
    scenario = server(arrivals, 60, gpu={"count": 2}, events=events, slo={"ttft_s": {"p99": service_s * 1.01}})
    found = capacity(scenario, vary="clients.gpu.count")
    assert (found.value is None) is fails
    assert any("lost or late however many there are" in note for note in found.notes()) is fails
