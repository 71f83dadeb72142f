"""Running measured points: every load, every reason to skip, journals that were cut, processes that die or hang."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from measured import CLOSED, OFFLINE, OPEN, STAGED, STATIC, TRACE, write_points, write_request_list
from mist.errors import InvariantError, ScenarioError
from mist.scenario.build import run
from mist.validation import evaluate as evaluation
from mist.validation import journal as journals
from mist.validation.evaluate import Evaluated, evaluate
from mist.validation.limit import TooLong, time_limit
from mist.validation.points import read_points
from mist.validation.score import report
from mist.workers import each

ROOFLINE = ["roofline"]


def evaluated(folder: Path, *points: Mapping[str, str], **options: object) -> list[Evaluated]:
    file = read_points(write_points(folder, *points))
    return evaluate(file.points, folder, **{"perf": ROOFLINE, "workers": 1, **options})  # type: ignore[arg-type]


def reasons(folder: Path, **columns: str) -> str:
    (found,) = evaluated(folder, {**OPEN, **columns})
    assert not found.comparisons
    return " | ".join(reason for _, reason in found.skipped)


PER_REQUEST = "ttft_mean_ms=30 tpot_p90_ms=9 itl_p99_ms=9 e2e_p50_ms=300 output_tokens_per_s=60 makespan_s=4"


@pytest.mark.parametrize(
    ("load", "metrics", "saturated"),
    [
        (STATIC, "batch_e2e_s=0.2 batch_prefill_ms=20 tpot_mean_ms=9 decode_tokens_per_s_per_device=300 "
                 "prefill_tokens_per_s_per_device=9000 total_tokens_per_s=9", False),
        (OFFLINE, PER_REQUEST, True),
        (CLOSED, PER_REQUEST, False),
        ({**CLOSED, "num_requests": ""}, PER_REQUEST, False),
        (OPEN, PER_REQUEST.replace("=60", "=63"), False),
        ({**OPEN, "arrival": "constant"}, "output_tokens_per_s=10", True),
        (STAGED, "ttft_mean_ms=30", False),
        ({**STAGED, "arrival": "poisson"}, "ttft_p99_ms=30 ttft_mean_ms=6000", True),
        (TRACE, PER_REQUEST, False),
        ({**TRACE, "load": "open_loop", "arrival": "", "rate_per_s": "2"}, "requests_per_s=2", False),
        ({**CLOSED, "prefix_cached_tokens": "100"}, "ttft_mean_ms=30", False),
        ({**CLOSED, "prefix_cached_tokens": "100", "prefix_tier": "cpu"}, "ttft_mean_ms=30", False),
        ({**CLOSED, "spec_decode": "eagle:3:0.5"}, "tpot_mean_ms=5", False),
        ({**CLOSED, "tp": "2", "num_devices": "4", "dp": "2"}, "output_tokens_per_s_per_device=100", False),
        ({**CLOSED, "topology": "pd", "prefill_pool": "1xTP1", "decode_pool": "1xTP1", "tp": "", "num_devices": "2",
          "interconnect": "ib:50"}, "tpot_mean_ms=3 ttft_mean_ms=30", False),
    ],
    ids=lambda value: "-".join(str(v) for v in list(value.values())[:2]) if isinstance(value, dict) else "",
)  # fmt: skip
def test_every_load_is_compared(tmp_path: Path, load: Mapping[str, str], metrics: str, saturated: bool) -> None:
    write_request_list(tmp_path)
    (found,) = evaluated(tmp_path, {**load, "measured": metrics})
    assert found.skipped == ()
    assert [c.metric for c in found.comparisons] == [pair.partition("=")[0] for pair in metrics.split()]
    for c in found.comparisons:
        assert c.simulated > 0
        assert c.error == pytest.approx(100 * (c.simulated / c.measured - 1))
        assert c.ape == abs(c.error)
        assert (c.saturated, c.trust, c.source, c.perf) == (saturated, "A", "made", "roofline")


def test_a_closed_loop_is_saturated_beyond_the_kv_cache(tmp_path: Path) -> None:
    # Llama-3.1-8B leaves room for some 400,000 tokens on 80 GB
    loop = {**CLOSED, "isl": "4000", "osl": "2", "measured": "requests_per_s=1"}
    few, many = evaluated(tmp_path, {**loop, "concurrency": "50"}, {**loop, "concurrency": "200"})
    assert [c.saturated for each in (few, many) for c in each.comparisons] == [False, True]


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"device": "h900"}, "there is no device 'h900' in the catalogue"),
        ({"device": ""}, "there is no device ''"),
        ({"model": "acme/Llama-9-9B"}, "there is no model 'acme/Llama-9-9B' in the catalogue"),
        ({"engine": "warp9"}, "there is no profile of the engine 'warp9'"),
        ({"load": "burst"}, "the load is 'burst'"),
        ({"rate_per_s": ""}, "rate_per_s and stages are empty"),
        ({"rate_per_s": "fast"}, "rate_per_s is 'fast', not a number"),
        ({"rate_per_s": "-1"}, "rate_per_s is -1"),
        ({"rate_per_s": "nan"}, "rate_per_s is nan"),
        ({"arrival": "lunar"}, "an open loop with arrivals 'lunar'"),
        ({"stages": "8"}, "stages are '8', not as 8:600s;20:600s"),
        ({"isl": ""}, "isl is empty"),
        ({"isl_dist": "pareto"}, "isl_dist is 'pareto'"),
        ({"isl_dist": "uniform:1"}, "isl_dist is 'uniform:1'"),
        ({"osl_dist": "uniform:a:b"}, "osl_dist is 'uniform:a:b'"),
        ({"tp": "1.5"}, "tp is 1.5, not a whole number"),
        ({"tp": "3", "num_devices": "4"}, "4 devices are not whole replicas of tp 3"),
        ({"weights_dtype": "fp3"}, "fp3"),
        ({"kv_dtype": "fp3"}, "fp3"),
        ({"spec_decode": "eagle:3"}, "no acceptance is stated"),
        ({"prefix_tier": "tape"}, "a prefix cache in 'tape'"),
        ({"topology": "pd", "prefill_pool": "2"}, "prefill_pool is '2', not as 2xTP4"),
        ({"load": "trace"}, "workload_file is empty"),
        ({"load": "trace", "workload_file": "lost.csv"}, "there is no request list lost.csv"),
        ({"load": "trace", "workload_file": "points.csv"}, "the request list points.csv can't be used"),
        ({"load": "closed_loop"}, "concurrency is empty"),
        ({"load": "static_batch"}, "batch_size is empty"),
        ({"num_requests": "2000000"}, "2,000,000 requests are more than the 1,000,000"),
        ({"model": "meta-llama/Llama-3.1-405B"}, "does not fit"),
        ({"measured": "smiles_per_s=3"}, "there is no metric 'smiles_per_s'"),
        ({"measured": "kv_transfer_ms=3"}, "the run has no kv_transfer_ms"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_compared_is_a_skip_with_its_reason(
    tmp_path: Path, columns: dict[str, str], reason: str
) -> None:
    assert reason in reasons(tmp_path, **columns)


@pytest.mark.parametrize("error", [InvariantError("1 = 2"), ZeroDivisionError("by 0"), KeyError("x"), MemoryError()])
def test_whatever_the_simulator_raises_is_a_skip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(_: object) -> None:
        raise error

    monkeypatch.setattr(evaluation, "run", fail)
    assert reasons(tmp_path) == f"the simulator failed: {type(error).__name__}: {error}"


def test_a_point_that_takes_too_long_is_a_skip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "run", lambda _: time.sleep(60))
    (found,) = evaluated(tmp_path, OPEN, limit_s=0.05)
    assert [reason for _, reason in found.skipped] == ["the simulation took longer than 0.05 s"]


def test_no_limit_is_left_behind() -> None:
    with time_limit(0.05):
        pass
    time.sleep(0.1)
    with pytest.raises(TooLong), time_limit(0.01):
        time.sleep(5)
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_all_rows_are_accounted_for(tmp_path: Path) -> None:
    points = [{**STATIC, "measured": "batch_e2e_s=1 smiles=2 batch_prefill_ms=x"}, {**OPEN, "device": "h900"}, OFFLINE]
    file = read_points(write_points(tmp_path, *points))
    coverage = report(file, evaluate(file.points, tmp_path, perf=ROOFLINE, workers=1))["coverage"]
    assert (coverage["rows"], coverage["runnable"], coverage["run"], len(coverage["skipped"])) == (5, 5, 2, 3)


# processes


def test_several_processes_find_what_one_does(tmp_path: Path) -> None:
    points = [{**STATIC, "batch_size": str(n)} for n in (1, 2, 4)] + [{**OPEN, "device": "h900"}]
    done: list[tuple[int, int]] = []
    alone = evaluated(tmp_path, *points)
    together = evaluated(tmp_path, *points, workers=2, progress=lambda *counts: done.append(counts))
    assert together == alone
    assert done == [(i, 4) for i in range(5)]


def _die_of_three(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number


def test_a_process_that_dies_costs_no_other_work() -> None:
    found = dict(each(_die_of_three, range(8), 2))
    assert found == {i: None if i == 3 else i * i for i in range(8)}


def _is_there(worker: BaseProcess) -> bool:
    """Not `is_alive`, which says yes of a process whose end the pool's own thread was told of first."""
    assert worker.pid is not None
    try:
        os.kill(worker.pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_workers_end_with_who_asked_for_them() -> None:
    before = set(multiprocessing.active_children())
    results = each(_die_of_three, [1, 2, 4, 5, 6], 2)
    next(results)
    workers = set(multiprocessing.active_children()) - before
    results.close()  # type: ignore[attr-defined]
    for worker in workers:
        worker.join(10)
    assert workers
    assert not any(map(_is_there, workers))


# journals


def counting(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the points that run from here on."""
    ran: list[str] = []

    def counted(scenario: Any) -> Any:
        ran.append(scenario.name)
        return run(scenario)

    monkeypatch.setattr(evaluation, "run", counted)
    return ran


SMALL = [{**STATIC, "batch_size": str(n)} for n in (1, 2, 4)]


def test_a_journal_that_was_cut_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = counting(monkeypatch)
    journal = tmp_path / "out" / "journal.jsonl"
    whole = evaluated(tmp_path, *SMALL, journal=journal)
    lines = journal.read_text().splitlines(keepends=True)
    assert (len(lines), ran) == (3, ["p0", "p1", "p2"])
    for cut in (lines[0] + lines[1][:40], lines[0][:30], "", "".join(lines)):
        journal.write_text(cut)
        kept = cut.count("\n")
        ran.clear()
        assert evaluated(tmp_path, *SMALL, journal=journal) == whole
        assert ran == ["p0", "p1", "p2"][kept:]
        assert [json.loads(line)["point"] for line in journal.read_text().splitlines()] == ["p0", "p1", "p2"]


def test_a_journal_answers_only_for_what_it_saw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = counting(monkeypatch)
    journal = tmp_path / "journal.jsonl"
    write_request_list(tmp_path)
    trace = {**TRACE, "measured": "e2e_mean_ms=300"}
    evaluated(tmp_path, trace, journal=journal)
    for changed in ({"measured": "e2e_mean_ms=301"}, {"tp": "2", "num_devices": "2"}):
        evaluated(tmp_path, trace | changed, journal=journal)
    evaluated(tmp_path, trace, journal=journal, overrides={"vllm-0.10": {"step_overhead_ns": 9}})
    evaluated(tmp_path, trace, journal=journal, limit_s=60.0)
    listed = tmp_path / "workloads" / "list.csv"
    listed.write_text(listed.read_text() + "9,5,5\n")
    evaluated(tmp_path, trace, journal=journal)
    assert len(ran) == 6
    monkeypatch.setattr(journals, "_simulator", lambda: "another")
    evaluated(tmp_path, trace, journal=journal)
    evaluated(tmp_path, trace, journal=journal)
    assert len(ran) == 7


def test_another_file_is_no_journal(tmp_path: Path) -> None:
    other = tmp_path / "notes.txt"
    other.write_text("dear diary\n")
    with pytest.raises(ScenarioError, match="is no journal of a validation"):
        evaluated(tmp_path, *SMALL, journal=other)
    assert other.read_text() == "dear diary\n"
