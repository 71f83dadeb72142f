"""The timeline, checked against the rules of the Trace Event Format and against the run that it shows."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from collections.abc import Iterable
from decimal import Decimal
from pathlib import Path

import pytest

from handmade import Story, random_story
from mist.metrics import summarise
from mist.records import REJECTED, Records
from mist.report.timeline import trace_events, write_timeline
from mist.scenario.result import Result
from mist.testing import random_scenario

REQUIRED = {
    "M": {"pid", "tid", "name", "args"},
    "X": {"pid", "tid", "ts", "dur", "name", "cat", "args"},
    "C": {"pid", "tid", "ts", "name", "args"},
    "i": {"pid", "tid", "ts", "s", "name"},
    "s": {"pid", "tid", "ts", "id", "cat", "name"},
    "t": {"pid", "tid", "ts", "id", "cat", "name"},
    "f": {"pid", "tid", "ts", "id", "cat", "name", "bp"},
}


def make(story: Story) -> Result:
    return Result("a run", {}, story.records, summarise(story.records, clients=story.clients), {"version": "0.1.0"})


def events_of(records: Records) -> list[dict]:
    """The events with exact times, in whole ns."""
    return parsed(trace_events(records))


def parsed(texts: Iterable[str]) -> list[dict]:
    events = [json.loads(event, parse_float=Decimal) for event in texts]
    for event in events:
        for key in {"ts", "dur"} & set(event):
            assert event[key] * 1000 == int(event[key] * 1000)
            event[key] = int(event[key] * 1000)
    return events


def check_format(events: list[dict]) -> None:
    """Known phases with their fields; slices nest; arrows bind to slices; every thread's process has a name."""
    slices = defaultdict(list)
    for event in events:
        assert REQUIRED[event["ph"]] <= set(event)
        if event["ph"] == "X":
            assert event["dur"] >= 0
            slices[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    for thread in slices.values():
        check_nesting(thread)
    named = {event["pid"] for event in events if event["name"] == "process_name"}
    assert {event["pid"] for event in events} == named
    check_arrows(events, slices)


def check_nesting(spans: list[tuple[int, int]]) -> None:
    open_ends: list[int] = []
    assert [start for start, _ in spans] == sorted(start for start, _ in spans)
    for start, end in spans:
        while open_ends and open_ends[-1] <= start:
            open_ends.pop()
        assert not open_ends or end <= open_ends[-1]
        open_ends.append(end)


def check_arrows(events: list[dict], slices: dict) -> None:
    arrows = defaultdict(list)
    for event in events:
        if event["ph"] in "stf":
            arrows[event["id"]].append(event)
            spans = slices[event["pid"], event["tid"]]
            assert any(start <= event["ts"] < end for start, end in spans)
    for arrow in arrows.values():
        assert [event["ph"] for event in arrow] == ["s", *["t"] * (len(arrow) - 2), "f"]
        times = [event["ts"] for event in arrow]
        assert times == sorted(times)


STORIES = [
    {"disaggregated": disaggregated, "num_clients": 3, "preempt": preempt, "cut": cut}
    for disaggregated in (False, True)
    for preempt in (0.0, 0.5)
    for cut in (None, 90_000_000)
]


@pytest.mark.parametrize("seed", range(2 * len(STORIES)))
def test_the_format_holds(seed):
    check_format(events_of(random_story(seed, **STORIES[seed % len(STORIES)]).records))


@pytest.mark.parametrize("seed", range(30))
def test_the_format_holds_for_the_engine(seed):
    check_format(events_of(random_scenario(seed).play().records))


def test_every_step_and_request_is_there():
    story = random_story(3, num_clients=3, disaggregated=True)
    events = events_of(story.records)
    steps = [event for event in events if event.get("cat") == "step"]
    columns = [column.tolist() for column in story.records.steps.as_columns().values()]
    expected = sorted((c + 2, start, end - start, decodes) for c, start, end, _, _, decodes, _, _, _ in zip(*columns))  # noqa: B905
    assert sorted((e["pid"], e["ts"], e["dur"], e["args"]["num_decodes"]) for e in steps) == expected
    lives = {event["name"]: event for event in events if event["ph"] == "X" and event["name"].startswith("request ")}
    rows = story.records.requests.as_columns()
    for request, arrival, end, status in zip(
        *(rows[name].tolist() for name in ("request", "arrival_ns", "end_ns", "status")), strict=True
    ):
        if status != REJECTED:
            life = lives[f"request {request}"]
            assert (life["ts"], life["dur"]) == (arrival, end - arrival)
    rejected = [event for event in events if event["ph"] == "i"]
    assert len(rejected) == (rows["status"] == REJECTED).sum() > 0
    assert rejected[0]["args"]["reason"] == "too long"


def test_the_parts_of_a_life_are_those_that_were_lived():
    story = random_story(7, num_clients=3, disaggregated=True, preempt=0.5)
    events = events_of(story.records)
    lane_events = [event for event in events if event["pid"] == 1 and event["ph"] == "X"]
    spent = defaultdict(lambda: defaultdict(int))
    current = -1
    for event in lane_events:
        if event["name"].startswith("request "):
            current = int(event["name"].split()[1])
        else:
            spent[current][event["name"]] += event["dur"]
    for job in story.jobs:
        if job.index not in story.finished:
            continue
        truth = job.spent.get
        assert spent[job.index]["wait for prefill"] == truth((0, "wait"), 0)
        assert spent[job.index]["prefill"] == truth((0, "serve"), 0)
        assert spent[job.index]["wait for decode"] == truth((1, "wait"), 0)
        assert spent[job.index]["decode"] == truth((1, "serve"), 0)
        assert spent[job.index]["hand-over"] == truth((0, "transfer"), 0) + truth((1, "transfer"), 0)


def test_counters_return_to_zero_when_a_client_falls_idle():
    records = Records(client_names=["gpu"], stage_kinds=["prefill"])
    records.steps.append((0, 0, 1_500, 1, 8, 2, 90, 7, 3))
    records.steps.append((0, 1_500, 3_000, 0, 0, 3, 90, 7, 0))
    records.steps.append((0, 9_000, 9_500, 0, 0, 3, 90, 8, 0))
    counters = [(e["ts"], e["name"], *e["args"].values()) for e in events_of(records) if e["ph"] == "C"]
    assert counters == [
        (0, "running", 3), (0, "waiting", 3), (0, "KV blocks", 7), (1_500, "waiting", 0), (3_000, "running", 0),
        (9_000, "running", 3), (9_000, "KV blocks", 8), (9_500, "running", 0),
    ]  # fmt: skip


def test_an_arrow_leads_from_the_request_through_its_steps():
    records = Records(client_names=["prefill", "decode"], stage_kinds=["prefill", "decode"])
    records.steps.append((0, 10, 20, 1, 8, 0, 0, 1, 0))
    for start in (30, 40, 50):
        records.steps.append((1, start, start + 10, 0, 0, 1, 9, 1, 0))
    records.tasks.append((0, 0, 0, 0, 5, 10, -1, 20, 0, 8, 0, -1, -1, 0))
    records.tasks.append((0, 1, 1, 1, 25, 30, 30, 60, 0, 0, 0, 0, 3, 4))
    records.requests.append((0, 5, 30, 60, 0, -1, 8, 4, 0, 0))
    arrow = [(e["ph"], e["pid"], e["ts"]) for e in events_of(records) if e["ph"] in "stf"]
    assert arrow == [("s", 1, 5), ("t", 2, 10), ("t", 3, 30), ("f", 3, 50)]


def test_names_need_no_care(tmp_path):
    story = random_story(1, num_clients=1)
    story.records.client_names[0] = 'a "quoted" name\\ with ünïcode'
    story.records.reasons[0] = 'line\nbreak "and quotes"'
    check_format(events_of(story.records))
    document = json.loads(write_timeline(make(story), tmp_path / "t.json").read_text())
    assert story.records.client_names[0] in {e["args"].get("name") for e in document["traceEvents"] if "args" in e}


def test_files_are_whole_plain_or_packed_and_repeatable(tmp_path):
    plain = write_timeline(make(random_story(1)), tmp_path / "t.json")
    packed = write_timeline(make(random_story(1)), tmp_path / "a" / "t.json.gz")
    again = write_timeline(make(random_story(1)), tmp_path / "other-name.gz")
    assert gzip.decompress(packed.read_bytes()) == plain.read_bytes()
    assert packed.read_bytes() == again.read_bytes()
    document = json.loads(plain.read_text())
    assert document["otherData"] == {"scenario": "a run", "simulator": "MIST 0.1.0"}
    assert document["displayTimeUnit"] == "ns"


def test_a_crash_leaves_the_earlier_file(tmp_path, monkeypatch):
    path = write_timeline(make(random_story(1)), tmp_path / "t.json")
    before = path.read_bytes()

    def crash(*_: Records) -> list[str]:
        raise KeyboardInterrupt

    monkeypatch.setattr("mist.report.timeline.trace_events", crash)
    with pytest.raises(KeyboardInterrupt):
        write_timeline(make(random_story(2)), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["t.json"]


def test_an_empty_run_has_a_timeline(tmp_path):
    records = Records(client_names=["gpu"], stage_kinds=["prefill"])
    path = write_timeline(Result("empty", {}, records, {}), Path(tmp_path) / "t.json")
    assert {event["ph"] for event in json.loads(path.read_text())["traceEvents"]} == {"M"}


def test_thousands_of_steps_are_written(tmp_path):
    story = random_story(0, num_requests=1500, mean_gap=10_000_000)
    path = write_timeline(make(story), tmp_path / "t.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert sum(event["ph"] == "X" and event["pid"] > 1 for event in events) == len(story.records.steps)
