"""Excerpts of timelines against whole ones, tracks of tenants and of loans, timelines of results that are read back."""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from handmade import random_story
from mist.cli import main
from mist.errors import ScenarioError
from mist.records import Records
from mist.report.timeline import Excerpt, excerpt_of, num_events, trace_events, write_timeline
from mist.scenario import load
from mist.scenario.stored import read_result
from mist.units import NS_PER_S
from test_disaggregation_scenarios import APART
from test_events import GPU, played
from test_timeline import check_format, make, parsed
from test_timeline_tracks import RUNS, branched

Events = list[dict[str, Any]]


def of(records: Records, start: int, stop: int) -> Events:
    return parsed(trace_events(records, Excerpt(start, stop)))


def whole(records: Records) -> Events:
    return parsed(trace_events(records))


def span_of(records: Records) -> tuple[int, int]:
    tables = (records.requests, records.tasks, records.steps)
    first = min(records.requests.as_columns()["arrival_ns"].tolist(), default=0)
    return first, max((int(each.as_columns()["end_ns"].max()) for each in tables if len(each)), default=0)


def spans(events: Events) -> Counter[tuple[Any, ...]]:
    """Slices by process, category and name (lanes aside, which are given out anew), with their bounds."""
    return Counter(
        (e["pid"], e["pid"] == 1 or e["tid"], e["cat"], e["name"], e["ts"], e["ts"] + e["dur"])
        for e in events if e["ph"] == "X"
    )  # fmt: skip


def cut(found: Counter[tuple[Any, ...]], start: int, stop: int) -> Counter[tuple[Any, ...]]:
    """Those that overlap [start, stop), as much of them as does."""
    kept: Counter[tuple[Any, ...]] = Counter()
    for (*who, begin, end), number in found.items():
        if begin < stop and (end > start or begin >= start):
            kept[(*who, max(begin, start), min(end, stop))] += number
    return kept


def levels(events: Events, at: int) -> dict[tuple[int, str], int]:
    """What each counter stands at, those at nothing left out."""
    found: dict[tuple[int, str], int] = {}
    for e in events:
        if e["ph"] == "C" and e["ts"] <= at:
            (found[e["pid"], e["name"]],) = e["args"].values()
    return {key: value for key, value in found.items() if value}


@pytest.mark.parametrize(("make_records", "arguments"), RUNS)
def test_an_excerpt_is_what_the_whole_has_there(make_records: Any, arguments: Any) -> None:
    records = make_records(*arguments)
    first, last = span_of(records)
    rng, everything = random.Random(str(arguments)), whole(records)
    for _ in range(2):
        start, stop = sorted(rng.sample(range(first, last + 2), 2)) if last > first else (first, last + 1)
        events = of(records, start, stop)
        check_format(events)
        assert spans(events) == cut(spans(everything), start, stop)
        for at in {start, stop - 1, *(rng.randrange(start, stop) for _ in range(5))}:
            assert levels(events, at) == levels(everything, at)
        assert all(start <= e["ts"] <= e["ts"] + e.get("dur", 0) <= stop for e in events if "ts" in e)


@pytest.mark.parametrize("seed", range(0, 60, 3))
def test_excerpts_side_by_side_add_up_to_the_whole(seed: int) -> None:
    records = branched(seed)
    first, last = span_of(records)
    bounds = sorted({first, last + 1, *random.Random(seed).choices(range(first, last + 2), k=3)})
    total: dict[str, int] = defaultdict(int)
    for start, stop in pairwise(bounds):
        for e in of(records, start, stop):
            total[e["name"]] += e.get("dur", 0)
    expected: dict[str, int] = defaultdict(int)
    for e in whole(records):
        expected[e["name"]] += e.get("dur", 0)
    assert {name: time for name, time in total.items() if time} == {n: t for n, t in expected.items() if t}


def test_what_is_cut_says_so() -> None:
    records = Records(client_names=["gpu"], stage_kinds=["prefill"])
    records.steps.append((0, 1_000, 2_000, 1, 8, 0, 0, 5, 0))
    records.steps.append((0, 2_000, 3_000, 1, 8, 0, 0, 5, 0))
    (step,) = (e for e in of(records, 1_200, 1_700) if e["ph"] == "X")
    assert (step["ts"], step["dur"]) == (1_200, 500)
    assert step["args"]["cut"] == "begins earlier and ends later"
    assert [int(at * 1000) for at in step["args"]["whole_us"]] == [1_000, 2_000]
    sides = [e["args"].get("cut") for e in of(records, 1_500, 2_500) if e["ph"] == "X"]
    assert sides == ["begins earlier", "ends later"]
    assert ["cut" in e["args"] for e in of(records, 1_000, 3_000) if e["ph"] == "X"] == [False, False]


def test_a_counter_stands_where_it_stood() -> None:
    """KV blocks stay while a client is idle, and an excerpt that begins then knows them."""
    records = Records(client_names=["gpu"], stage_kinds=["prefill"])
    records.steps.append((0, 1_000, 2_000, 1, 8, 0, 0, 5, 2))
    records.steps.append((0, 9_000, 9_500, 1, 8, 0, 0, 6, 0))
    assert levels(of(records, 5_000, 6_000), 5_500) == {(2, "KV blocks"): 5, (2, "waiting"): 2}


def test_a_span_is_counted_from_the_first_arrival(tmp_path: Path) -> None:
    result = make(random_story(3, num_clients=2))
    first, last = span_of(result.records)
    length = (last - first) / NS_PER_S
    assert excerpt_of(result.records, (0.25 * length, None)).start_ns == first + round(0.25 * length * NS_PER_S)
    path = write_timeline(result, tmp_path / "t.json", (0.25 * length, 0.5 * length))
    document = json.loads(path.read_text())
    begin, _, _, end, *_ = document["otherData"]["excerpt"].split()
    assert (float(begin), float(end)) == pytest.approx((0.25 * length, 0.5 * length))
    with pytest.raises(ScenarioError, match=r"the run was over .* after the first arrival"):
        write_timeline(result, tmp_path / "t.json", (length + 1, None))
    assert json.loads(path.read_text()) == document


@pytest.mark.parametrize("seed", range(4))
def test_the_number_of_events_is_foretold_about(seed: int) -> None:
    records = make(random_story(seed, num_requests=200, num_clients=2, disaggregated=seed % 2 == 1)).records
    real = len([e for e in whole(records) if e["ph"] != "M"])
    assert real / 1.6 < num_events(records) < real * 1.6
    first, last = span_of(records)
    part = (0.0, (last - first) / NS_PER_S / 4)
    assert 0.1 * num_events(records) < num_events(records, part) < 0.5 * num_events(records)


# --- tenants, loans ---


def test_requests_of_each_tenant_have_tracks_of_their_own() -> None:
    workload = {"arrivals": {"poisson": {"rate_per_s": 40}}, "num_requests": 30, "input_tokens": 90, "output_tokens": 9}
    tenants = {name: {"workload": workload} for name in ("chat", "code", "mail")}
    shared = {"workload": None, "clients": {"gpu": GPU}, "tenants": tenants}
    result = load({key: value for key, value in shared.items() if value is not None}).run(check=True)
    events = whole(result.records)
    check_format(events)
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    places = {names[e["pid"]]: e["args"]["sort_index"] for e in events if e["name"] == "process_sort_index"}
    assert sorted(places, key=places.__getitem__) == [
        "requests of chat",
        "requests of code",
        "requests of mail",
        "gpu",
    ]
    seen: dict[str, list[int]] = defaultdict(list)
    for e in events:
        if e["ph"] == "X" and e["name"].startswith("request "):
            seen[names[e["pid"]]].append(int(e["name"].split()[1]))
    firsts = {f"requests of {name}": first for name, first in result.records.tenants}
    assert {name: sorted(numbers) for name, numbers in seen.items()} == {
        name: list(range(first, first + 30)) for name, first in firsts.items()
    }
    at = int(result.records.requests.as_columns()["arrival_ns"][7])
    rows = result.records.requests.as_columns()
    there = (rows["arrival_ns"] <= at) & (rows["end_ns"] > at)
    stood = {names[pid]: value for (pid, name), value in levels(events, at).items() if name == "in the system"}
    assert sum(stood.values()) == there.sum()


def lending() -> Any:
    crowd = {"arrivals": {"poisson": {"rate_per_s": 80}}, "num_requests": 200, "input_tokens": 3000,
             "output_tokens": 20}  # fmt: skip
    clients = {**APART["clients"], "decode": {**APART["clients"]["decode"], "lending": {"threshold_tokens": 6000}}}
    return load(APART | {"workload": crowd, "clients": clients}).run(check=True)


def scaling() -> Any:
    rule = {"initial_count": 1, "start_up_s": 2, "schedule": [{"at_s": 1, "count": 2}, {"at_s": 8, "count": 1}]}
    return played(
        clients={"gpu": {**GPU, "count": 3, "scaling": rule}}, events=[{"at_s": 4, "client_down": "gpu-0", "for_s": 1}]
    )


def test_loans_are_slices_of_who_was_lent() -> None:
    records = lending().records
    events = whole(records)
    check_format(events)
    shown = sorted((e["pid"] - 2, e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") == "loan")
    rows = records.loans.as_columns()
    assert shown == sorted(zip(*(rows[name].tolist() for name in ("client", "start_ns", "end_ns")), strict=True))
    assert shown
    threads = {(e["pid"], e["args"]["name"]) for e in events if e["name"] == "thread_name"}
    assert {(client + 2, "lent") for client, *_ in shown} <= threads


def test_a_loan_that_is_not_over_lasts_to_the_end() -> None:
    records = Records(client_names=["decode"], stage_kinds=["prefill"])
    records.steps.append((0, 0, 900, 1, 8, 0, 0, 5, 0))
    records.loans.append((0, 300, -1))
    (loan,) = (e for e in whole(records) if e.get("cat") == "loan")
    assert (loan["ts"], loan["dur"], loan["args"]) == (300, 600, {"returned": False})


# --- from folders ---


@pytest.mark.parametrize("run", [lending, scaling], ids=["lending", "scaling"])
def test_a_stored_result_has_the_same_timeline(run: Any, tmp_path: Path) -> None:
    result = run()
    stored = read_result(result.write(tmp_path / "out"))
    assert list(trace_events(stored.records)) == list(trace_events(result.records))
    assert {name: column.tolist() for name, column in stored.changes.items()} == {
        name: column.tolist() for name, column in result.changes.items()
    }
    assert len(result.records.loans) + len(result.records.changes)


def test_changes_of_a_replica_come_back_for_its_lanes(tmp_path: Path) -> None:
    pool = {**GPU, "count": 2, "pp": 2}
    result = played(clients={"gpu": pool}, events=[{"at_s": 2, "client_down": "gpu-1", "for_s": 1}])
    stored = read_result(result.write(tmp_path / "out"))
    assert sorted(stored.records.changes.cells) == sorted(result.records.changes.cells)
    assert list(trace_events(stored.records)) == list(trace_events(result.records))


SCENARIO = """
workload: {arrivals: {poisson: {rate_per_s: 20}}, num_requests: 60, input_tokens: 200, output_tokens: 20}
clients: {gpu: {device: h100-sxm, model: llama-3.1-8b, perf: roofline}}
"""


@pytest.fixture
def scenario(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("s.yaml").write_text(SCENARIO)
    return "s.yaml"


def invoke(*arguments: Any) -> Any:
    return CliRunner().invoke(main, [str(each) for each in arguments])


def test_a_run_and_its_folder_write_the_same_excerpt(scenario: str) -> None:
    ran = invoke("run", scenario, "--out", "out", "--trace", "a.json", "--trace-span", "0.5:1")
    assert (ran.exit_code, "The timeline from 0.5 s to 1 s is a.json" in ran.stderr) == (0, True)
    later = invoke("report", "out", "--trace", "b.json", "--trace-span", "0.5:1")
    assert (later.exit_code, later.stdout) == (0, "")
    assert Path("a.json").read_bytes() == Path("b.json").read_bytes()
    assert not Path("out/report.html").exists()
    assert invoke("report", "out", "--trace", "b.json").exit_code == 2
    both = invoke("report", "out", "--trace", "b.json", "--report", "r.html", "--overwrite")
    assert both.exit_code == 0
    assert Path("r.html").is_file()
    assert len(Path("b.json").read_text()) > len(Path("a.json").read_text())


@pytest.mark.parametrize("span", ["60", "5:5", "9:2", "a:b", "1:nan", "-1:3", "0:inf", "nan:", ":0", "1:2:3", ""])
def test_a_span_that_is_none_is_refused_before_anything_runs(
    scenario: str, span: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mist.scenario.build.run", lambda *_, **__: pytest.fail("ran before it looked"))
    result = invoke("run", scenario, "--trace", "t.json", f"--trace-span={span}")
    assert result.exit_code == 2
    told = " ".join(result.stderr.split())
    assert ("without length" if span in ("5:5", "9:2", ":0") else "is no span of time: write 60:120") in told
    assert not Path("t.json").exists()


def test_two_files_are_not_one(scenario: str) -> None:
    assert invoke("run", scenario, "--out", "out").exit_code == 0
    assert "written twice" in invoke("report", "out", "--trace", "t.json", "--report", "./t.json").stderr
    assert not Path("t.json").exists()


def test_a_span_may_end_after_the_run(scenario: str) -> None:
    assert invoke("run", scenario, "--trace", "t.json", "--trace-span", "0.5:1e300").exit_code == 0
    assert invoke("run", scenario, "--trace", "u.json", "--trace-span", "0.5:").exit_code == 0
    assert Path("t.json").read_bytes() == Path("u.json").read_bytes()


def test_a_span_without_a_timeline_is_refused(scenario: str) -> None:
    assert "--trace-span is for --trace" in invoke("run", scenario, "--trace-span", "1:2").stderr


def test_results_are_not_lost_for_a_span_after_the_end(scenario: str) -> None:
    result = invoke("run", scenario, "--out", "out", "--trace", "t.json", "--trace-span", "99:")
    assert result.exit_code == 2
    assert "the run was over" in result.stderr
    assert "60 arrived, 60 finished" in result.stdout
    assert len(read_result("out").records.requests) == 60
    assert not Path("t.json").exists()


def test_a_timeline_too_long_for_viewers_is_told(scenario: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mist.report.timeline.MANY_EVENTS", 1000)
    assert "--trace-span 0:60" in invoke("run", scenario, "--trace", "t.json").stderr
    assert "--trace-span 0:60" not in invoke("run", scenario, "--trace", "u.json", "--trace-span", "0:0.2").stderr


def test_a_search_has_no_timeline(tmp_path: Path) -> None:
    from mist.search.outcome import RESULT

    (tmp_path / RESULT).write_text("{}")
    result = invoke("report", tmp_path, "--trace", tmp_path / "t.json")
    assert (result.exit_code, "a timeline is of one run" in result.stderr) == (2, True)
