"""Executors: the same outcomes wherever jobs run, whatever one of them does, and nothing left behind.

Jobs are small runs; those that misbehave do so by their `measure`. The campaign on a Ray cluster is marked long.
"""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mist import registry
from mist.errors import InvariantError, ScenarioError
from mist.scenario import Scenario
from mist.search.evaluate import Executor, Job, Outcome, evaluate, summary_of
from mist.search.executors import executor_named
from mist.search.executors.processes import Processes
from mist.search.executors.serial import Serial
from processes import below, is_alive

SMALL: dict[str, Any] = {
    "workload": {
        "arrivals": {"poisson": {"rate_per_s": 4}},
        "num_requests": 60,
        "input_tokens": {"uniform": {"low": 10, "high": 900}},
        "output_tokens": 20,
    },
    "clients": {"gpu": {"device": "h100-sxm", "model": "llama-3.1-8b"}},
    "perf": "roofline",
}

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray, an extra, isn't installed")


def jobs(number: int = 6, **fields: Any) -> list[Job]:
    return [Job(f"seed {seed}", SMALL, {"seed": seed}, **fields) for seed in range(number)]


def by_key(outcomes: Iterator[Outcome]) -> dict[str, Outcome]:
    found = list(outcomes)
    assert len({outcome.key for outcome in found}) == len(found)
    return {outcome.key: outcome for outcome in found}


def as_json(outcomes: Iterator[Outcome]) -> str:
    """Everything but the time that it took, in the order of the keys."""
    found = sorted(by_key(outcomes).items())
    return json.dumps([(key, outcome.summary, outcome.error) for key, outcome in found])


def die_of_seed_3(scenario: Scenario) -> dict[str, Any]:
    if scenario.seed == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return {"seed": scenario.seed}


def misbehave(scenario: Scenario) -> dict[str, Any]:
    if scenario.seed == 1:
        raise InvariantError("1 + 1 = 3")
    if scenario.seed == 2:
        raise ZeroDivisionError("by nothing")
    return {"seed": scenario.seed}


def where(scenario: Scenario) -> dict[str, Any]:
    return {"folder": os.getcwd(), "data": os.environ.get("MIST_TOLD"), "pid": os.getpid()}


def sleep(scenario: Scenario) -> dict[str, Any]:
    time.sleep(60)
    return {}


# what a job is


def test_an_outcome_is_the_runs_summary_without_its_times(tmp_path: Path) -> None:
    outcome = evaluate(Job("a", SMALL, {"seed": 5, "clients.gpu.tp": 2}))
    scenario = Scenario.from_mapping({**SMALL, "seed": 5, "clients": {"gpu": {**SMALL["clients"]["gpu"], "tp": 2}}})
    expected = scenario.run().summary()
    del expected["simulator"]["timing"]
    assert (outcome.key, outcome.summary, outcome.error) == ("a", expected, None)
    assert outcome.cpu_s > 0


def test_sources_are_files_mappings_and_what_was_loaded(tmp_path: Path) -> None:
    (tmp_path / "card.yaml").write_text(
        "{name: card, peak_tflops: {bf16: 400}, memory_bytes: 96 GiB, memory_bytes_per_s: 3 TB/s}"
    )
    mapping = {**SMALL, "clients": {"gpu": {"device": "./card.yaml", "model": "llama-3.1-8b"}}}
    (tmp_path / "case.yaml").write_text(json.dumps(mapping))
    file = Job("file", tmp_path / "case.yaml")
    beside = Job("mapping", mapping, folder=tmp_path)
    loaded = Job("source", file.scenario().source)
    assert len({job.scenario().run().to_json().partition('"simulator"')[0] for job in (file, beside, loaded)}) == 1
    wrong = evaluate(Job("wrong", tmp_path / "case.yaml", {"clients.gpu.tp": 3}))
    assert wrong.summary is None
    assert "tp" in (wrong.error or "")
    assert "clients.gpu.tp=3" in (wrong.error or "")


def test_what_goes_wrong_is_the_outcomes_error() -> None:
    found = by_key(Serial().run(jobs(4, measure=misbehave)))
    assert [found[f"seed {i}"].summary for i in (0, 3)] == [{"seed": 0}, {"seed": 3}]
    assert "a bug: 1 + 1 = 3" in (found["seed 1"].error or "")
    assert found["seed 2"].error == "the simulator failed: ZeroDivisionError: by nothing"


# several processes


def test_processes_find_what_one_after_another_finds() -> None:
    expected = as_json(Serial().run(jobs()))
    with Processes(2) as executor:
        assert as_json(executor.run(jobs())) == expected
        assert as_json(executor.run(jobs())) == expected
    assert as_json(Processes(1).run(jobs())) == expected


def test_processes_are_kept_from_one_run_to_the_next_and_end_with_the_block() -> None:
    others = set(multiprocessing.active_children())
    with Processes(2) as executor:
        first, second = (
            {outcome.summary["pid"] for outcome in executor.run(jobs(8, measure=where)) if outcome.summary}
            for _ in range(2)
        )
        assert first & second
        assert len(first | second) == 2
    assert set(multiprocessing.active_children()) <= others


def test_a_process_that_dies_is_one_outcome_and_costs_no_other() -> None:
    with Processes(2) as executor:
        for _ in range(2):
            found = by_key(executor.run(jobs(8, measure=die_of_seed_3)))
            assert len(found) == 8
            assert "died" in (found.pop("seed 3").error or "")
            assert all(outcome.summary is not None for outcome in found.values())


def test_processes_have_the_folder_the_environment_and_the_plug_ins_of_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    list(Processes(2).run(jobs(2)))  # the server that they are forked from is there already
    plugin = tmp_path / "slow_and_steady.py"
    plugin.write_text(
        "from dataclasses import dataclass\n"
        "from mist.registry import register\n"
        "@register('routing', 'first_one')\n"
        "@dataclass\n"
        "class FirstOne:\n"
        "    def choose(self, task, views, now):\n"
        "        return 0\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MIST_TOLD", "something")
    registry.load_plugin_file(plugin)
    assert str(plugin) in registry.plugin_files()
    with Processes(2) as executor:
        told = [outcome.summary or {} for outcome in executor.run(jobs(2, measure=where))]
        assert {(each["folder"], each["data"]) for each in told} == {(str(tmp_path), "something")}
        (routed,) = executor.run([Job("plugged", SMALL, {"routing": "first_one"})])
    assert routed.error is None


def test_jobs_are_taken_as_there_is_room_for_them() -> None:
    taken: list[str] = []

    def asked() -> Iterator[Job]:
        for job in jobs(12, measure=where):
            taken.append(job.key)
            yield job

    with Processes(2) as executor:
        outcomes = executor.run(asked())
        next(outcomes)
        assert len(taken) < 12
        assert len(list(outcomes)) == 11


SLEEPING = """\
import signal, sys, test_executors
from mist.search.executors.processes import Processes

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start jobs in the background without it
    with Processes(2) as executor:
        print("started", flush=True)
        list(executor.run(test_executors.jobs(6, measure=test_executors.sleep)))
"""


def test_an_interrupt_ends_the_processes_too(tmp_path: Path) -> None:
    script = tmp_path / "sleeping.py"
    script.write_text(SLEEPING)
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    running = subprocess.Popen(
        [sys.executable, str(script)], env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert running.stdout is not None
    assert running.stdout.readline() == "started\n"
    children = _children(running.pid, at_least=3)
    os.killpg(running.pid, signal.SIGINT)
    _, told = running.communicate(timeout=60)
    assert "KeyboardInterrupt" in told
    for _ in range(600):
        if not any(map(is_alive, children)):
            break
        time.sleep(0.1)
    assert not any(map(is_alive, children))


def _children(parent: int, at_least: int) -> list[int]:
    """Processes below `parent`: there are three at least, the server and the workers that it forks."""
    for _ in range(600):
        if len(found := below(parent)) > at_least:
            break
        time.sleep(0.1)
    return found


# by name


def test_executors_are_chosen_by_name() -> None:
    assert isinstance(executor_named("serial"), Serial)
    chosen = executor_named(num_workers=3, address="")
    assert isinstance(chosen, Processes)
    assert chosen.num_workers == 3
    with pytest.raises(ScenarioError, match="did you mean 'processes'"):
        executor_named("process")
    with pytest.raises(ScenarioError, match="serial has no address"):
        executor_named("serial", address="10.0.0.1:6379")


def test_ray_that_isnt_installed_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ScenarioError, match="pip install"):
        list(executor_named("ray").run(jobs(1)))


# Ray


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[Executor]:
    with executor_named("ray", num_workers=3) as executor:
        yield executor


def slowly(scenario: Scenario) -> dict[str, Any]:
    """Long enough that somebody dies at it, whose number is told."""
    told = Path(os.environ["MIST_TOLD"])
    (told / str(os.getpid())).touch()
    time.sleep(1)
    (told / str(os.getpid())).unlink()
    return summary_of(scenario)


def die_once(scenario: Scenario) -> dict[str, Any]:
    """The first worker that gets it is killed in the middle."""
    marker = Path(os.environ["MIST_TOLD"])
    if scenario.seed == 3 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return summary_of(scenario)


def test_what_ray_prints_is_in_no_document(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    quiet = SimpleNamespace(is_initialized=lambda: False, init=lambda **_: None, shutdown=lambda: None)
    monkeypatch.setitem(sys.modules, "ray", quiet)
    with executor_named("ray"):
        print("a worker died")
    print("{}")
    assert tuple(capsys.readouterr()) == ("{}\n", "a worker died\n")


@needs_ray
@pytest.mark.long
def test_a_ray_cluster_finds_what_one_process_finds(ray_cluster: Executor) -> None:
    assert as_json(ray_cluster.run(jobs(12))) == as_json(Serial().run(jobs(12)))
    assert as_json(ray_cluster.run(jobs(4, measure=misbehave))) == as_json(Serial().run(jobs(4, measure=misbehave)))


@needs_ray
@pytest.mark.long
def test_a_killed_worker_of_ray_costs_and_doubles_nothing(
    ray_cluster: Executor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIST_TOLD", str(tmp_path / "died"))
    expected = as_json(Serial().run(jobs(10)))
    assert as_json(ray_cluster.run(jobs(10, measure=die_once))) == expected
    assert (tmp_path / "died").exists()


@needs_ray
@pytest.mark.long
def test_a_worker_killed_from_outside_is_replaced(
    ray_cluster: Executor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIST_TOLD", str(tmp_path))
    outcomes = ray_cluster.run(jobs(12, measure=slowly))
    found = [next(outcomes)]
    while not (under_way := list(tmp_path.iterdir())):
        time.sleep(0.05)
    worker = under_way[0]
    os.kill(int(worker.name), signal.SIGKILL)
    found += outcomes
    assert worker.exists()  # it was in the middle
    assert as_json(iter(found)) == as_json(Serial().run(jobs(12)))


@needs_ray
@pytest.mark.long
def test_a_job_that_always_kills_its_worker_is_one_outcome(ray_cluster: Executor) -> None:
    found = by_key(ray_cluster.run(jobs(6, measure=die_of_seed_3)))
    assert len(found) == 6
    assert "WorkerCrashedError" in (found.pop("seed 3").error or "")
    assert all(outcome.summary is not None for outcome in found.values())


@needs_ray
def test_no_cluster_at_an_address_is_told() -> None:
    with pytest.raises(ScenarioError, match="no Ray cluster"), executor_named("ray", address="127.0.0.1:1"):
        pass
