"""The timeline's tracks against the records: spans sum to stage times, branches run beside, transfers, steps' names."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import numpy as np
import pytest

from kit import play, table
from mist.batching.chunked import Chunked
from mist.kernel import FOREVER
from mist.metrics.stages import stage_times
from mist.pipeline import RequestRandom
from mist.records import FINISHED, HAND_OFF, Records
from mist.report.timeline import trace_events
from mist.request import DECODE, PREFILL, All, Pipeline, Request, Stage
from mist.scenario import load
from test_hand_over import LINK
from test_hosts import scenario
from test_timeline import check_format, events_of

Events = list[dict[str, Any]]
KINDS = ("guard", "translate", PREFILL, DECODE)
SERVES: list[tuple[str, ...]] = [("guard",), ("translate", "guard"), (PREFILL,), (DECODE,), (DECODE,)]


@dataclass
class Tree:
    """A random tree of branches for each request, up to three deep, with answers and guards at its leaves."""

    seed: int
    kinds: tuple[str, ...] = field(default=KINDS, init=False)
    is_fixed: bool = field(default=False, init=False)

    def __call__(self, request: Request, rng: RequestRandom) -> Pipeline:
        yield from self._part(request, np.random.default_rng((self.seed, request.index)), 3)

    def _part(self, request: Request, rng: np.random.Generator, depth: int) -> Pipeline:
        for _ in range(int(rng.integers(1, 3))):
            choice = int(rng.integers(4))
            if choice == 0 and depth:
                yield All([self._part(request, rng, depth - 1) for _ in range(int(rng.integers(0, 4)))])
            elif choice == 1:
                yield Stage("guard", input_tokens=int(rng.integers(1, 200)), visible=False)
            elif choice == 2:
                yield Stage("translate", input_tokens=30, oracle_output_tokens=int(rng.integers(1, 9)), visible=False)
            else:
                yield Stage(PREFILL, input_tokens=request.input_tokens)
                yield Stage(DECODE, oracle_output_tokens=int(rng.integers(1, 20)))


def branched(seed: int) -> Records:
    """Requests of random trees over a slow link, some preempted, rejected or cut."""
    rng = random.Random(seed)
    num = rng.randint(1, 15)
    arrivals = np.cumsum([rng.choice([0, rng.randint(0, 4000)]) for _ in range(num)])
    inputs = [rng.choice([1, 16, 17, rng.randint(1, 150)]) for _ in range(num)]
    cached = [rng.randint(0, tokens) for tokens in inputs] if seed % 2 else None
    run = play(
        table(arrivals, inputs, [5] * num, cached_tokens=cached), pipeline=Tree(seed), num_clients=5, serves=SERVES,
        nic=LINK, host=LINK if cached else None, caching=bool(cached), num_blocks=rng.choice([12, 1000]),
        max_model_len=rng.choice([150, 1000]), policy=lambda: Chunked(max_num_seqs=4, max_num_batched_tokens=100),
        until_ns=FOREVER if seed % 3 else rng.randint(1000, 20_000),
    )  # fmt: skip
    return run.records


def host_records() -> Records:
    network = {"kv_transfer": {"bandwidth": "10 GB/s", "latency": "20 us"}}
    whole = scenario(network=network)
    gpu = whole["clients"].pop("gpu")
    whole["clients"] |= {"prefill": gpu | {"serves": ["prefill"]}, "decode": gpu | {"serves": ["decode"]}}
    return load(whole).run(check=True).records


def news_search() -> Records:
    """Three requests on a CPU node and three GPU nodes."""
    whole = scenario(
        pipeline=["embed", "retrieve", "rerank", "prefill", "decode"],
        network={"kv_transfer": {"bandwidth": "5 GB/s", "latency": "100 us"}},
    )
    whole["workload"] |= {"num_requests": 3}
    gpu = whole["clients"].pop("gpu")
    encoder = {"device": "h100-sxm", "model": "bge-large-en-v1.5", "serves": ["embed", "rerank"], "perf": "roofline"}
    whole["clients"] |= {"encoder": encoder, "prefill": gpu | {"serves": ["prefill"]}}
    whole["clients"] |= {"decode": gpu | {"serves": ["decode"]}}
    return load(whole).run(check=True).records


RUNS = [pytest.param(branched, (seed,), id=f"branched-{seed}") for seed in range(60)] + [
    pytest.param(host_records, (), id="host"),
    pytest.param(news_search, (), id="news-search"),
]


def lives(events: Events) -> Iterator[tuple[dict[str, Any], Events]]:
    """Each request's slice, and all slices below it: in its lane, and in those beside."""
    own = [event for event in events if event["pid"] == 1 and event["ph"] == "X"]
    for life in own:
        if not life["name"].startswith("request "):
            continue
        number, end = int(life["name"].split()[1]), life["ts"] + life["dur"]
        inside = [e for e in own if e is not life and e["tid"] == life["tid"] and life["ts"] <= e["ts"] < end]
        yield life, inside + [e for e in own if e["args"].get("request") == number]


def spent(slices: Events) -> dict[str, int]:
    times: dict[str, int] = defaultdict(int)
    for one in slices:
        times[one["name"]] += one["dur"]
    return dict(times)


@pytest.mark.parametrize(("make", "arguments"), RUNS)
def test_tracks_keep_the_format(make: Any, arguments: Any) -> None:
    check_format(events_of(make(*arguments)))


@pytest.mark.parametrize(("make", "arguments"), RUNS)
def test_spans_on_the_critical_path_sum_to_the_stage_times(make: Any, arguments: Any) -> None:
    records = make(*arguments)
    requests, tasks = records.requests.as_columns(), records.tasks.as_columns()
    order = np.argsort(tasks["request"], kind="stable")
    finished = {name: column[requests["status"] == FINISHED] for name, column in requests.items()}
    times = stage_times(
        finished,
        {name: column[order] for name, column in tasks.items()},
        len(records.stage_kinds),
        records.transfers.as_columns(),
    )
    expected = {}
    for request, of_stages in zip(finished["request"].tolist(), times, strict=True):
        parts = {"hand-over": int(of_stages[:, 2].sum())}
        for kind, (wait, serve, _) in zip(records.stage_kinds, of_stages.tolist(), strict=True):
            parts |= {f"wait for {kind}": wait, kind: serve}
        expected[request] = {name: time for name, time in parts.items() if time}
    seen = {}
    for life, slices in lives(events_of(records)):
        lane = [one for one in slices if one["tid"] == life["tid"]]
        if life["args"]["status"] == "finished":
            seen[int(life["name"].split()[1])] = spent(lane)
        if lane:
            assert sum(one["dur"] for one in lane) == life["dur"]
    assert seen == expected


@pytest.mark.parametrize(("make", "arguments"), RUNS)
def test_every_segment_is_there_once_and_within_its_request(make: Any, arguments: Any) -> None:
    records = make(*arguments)
    expected: dict[int, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for row in zip(*(column.tolist() for column in records.tasks.as_columns().values()), strict=True):
        request, _, kind, _, queued, started, _, ended, *_ = row
        name, admitted = records.stage_kinds[kind], started if started >= 0 else ended
        for part, time in ((f"wait for {name}", admitted - queued), (name, ended - admitted)):
            if time:
                expected[request][part] += time
    seen = {}
    for life, slices in lives(events_of(records)):
        for one in slices:
            assert life["ts"] <= one["ts"] <= one["ts"] + one["dur"] <= life["ts"] + life["dur"]
        parts = spent(slices)
        parts.pop("hand-over", None)
        if parts:
            seen[int(life["name"].split()[1])] = parts
    assert seen == expected


def test_random_runs_show_what_these_laws_are_about() -> None:
    events = [event for seed in range(60) for event in events_of(branched(seed))]
    names = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert {"lane 1, beside", "lane 1, beside (2)", "gpu-2 ->", "gpu-2 -> (2)", "host memory of gpu-2 ->"} <= names
    said = {event["args"].get("end") for event in events if event["ph"] == "X"}
    assert {"preempted", "cut", "arrived"} <= said


@pytest.mark.parametrize("seed", range(0, 60, 7))
def test_the_same_run_gives_the_same_events(seed: int) -> None:
    assert list(trace_events(branched(seed))) == list(trace_events(branched(seed)))


def test_names_of_threads_are_in_the_order_of_their_numbers() -> None:
    events = events_of(branched(4))
    places = {(e["pid"], e["tid"]): e["args"]["sort_index"] for e in events if e["name"] == "thread_sort_index"}
    assert all(place == thread for (_, thread), place in places.items())
    lanes = sorted((e["tid"], e["args"]["name"]) for e in events if e["name"] == "thread_name" and e["pid"] == 1)
    numbers = [int(name.removeprefix("lane ").split(",")[0]) for _, name in lanes]
    assert numbers == sorted(numbers)
    assert len({thread for thread, _ in lanes}) == len(lanes)


# --- by hand ---


def transfer(records: Records, **cells: int) -> None:
    row = {"request": 0, **cells}
    records.transfers.append([row.get(name, 0) for name in records.transfers.columns])


def by_hand() -> Records:
    """A guard beside a prompt whose KV cache moves on, and a search before both."""
    records = Records(
        ["index", "prefill", "decode", "guard"], stage_kinds=["embed", "retrieve", PREFILL, DECODE, "guard"]
    )
    records.tasks.append((0, 0, 1, 0, 10, 20, -1, 100, 0, 1, 0, -1, -1, 0))
    records.tasks.append((0, 2, 4, 3, 130, 140, -1, 180, 0, 9, 0, -1, -1, 0))
    records.tasks.append((0, 1, 2, 1, 130, 150, -1, 200, 0, 8, 0, -1, -1, 0))
    records.tasks.append((0, 3, 3, 2, 250, 250, 250, 300, 0, 0, 0, 0, 5, 6))
    records.steps.append((0, 20, 100, 1, 1, 0, 0, 0, 0))
    records.steps.append((3, 140, 180, 1, 9, 0, 0, 0, 0))
    records.steps.append((1, 150, 200, 1, 8, 0, 0, 1, 0))
    records.steps.append((2, 250, 300, 0, 0, 1, 9, 1, 0))
    transfer(records, kind=HAND_OFF, sender=0, receiver=3, bytes=20_000, queued_ns=100, start_ns=110, end_ns=130)
    transfer(records, kind=HAND_OFF, sender=0, receiver=1, bytes=20_000, queued_ns=100, start_ns=100, end_ns=130)
    transfer(records, sender=1, receiver=2, bytes=5 << 28, queued_ns=200, start_ns=220, end_ns=250)
    records.requests.append((0, 10, 250, 310, 0, -1, 8, 6, 0, 0))
    return records


def slices(records: Records, process: int) -> dict[str, list[tuple[int, int, str]]]:
    """(begin, end, name) of each slice by the name of its thread."""
    events = [event for event in events_of(records) if event["pid"] == process]
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    found: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
    for e in events:
        if e["ph"] == "X":
            found[names[e["tid"]]].append((e["ts"], e["ts"] + e["dur"], e["name"]))
    return dict(found)


def test_transfers_are_slices_of_their_sender() -> None:
    assert slices(by_hand(), 6) == {
        "index ->": [(100, 130, "hand-over 20 kB to prefill")],
        "index -> (2)": [(110, 130, "hand-over 20 kB to guard")],
        "prefill ->": [(220, 250, "KV 1.2 GiB to decode")],
    }
    events = [event for event in events_of(by_hand()) if event["pid"] == 6]
    waits = [event["args"] for event in events if event["ph"] == "X"]
    assert waits[2] == {
        "request": 0,
        "kind": "kv_transfer",
        "bytes": 5 << 28,
        "wait_us": Decimal("0.020"),
        "end": "arrived",
    }
    counters = [(e["ts"], e["name"], e["args"]["bytes"]) for e in events if e["ph"] == "C"]
    assert counters == [
        (100, "index -> in flight", 20_000), (110, "index -> in flight", 40_000), (130, "index -> in flight", 0),
        (220, "prefill -> in flight", 5 << 28), (250, "prefill -> in flight", 0),
    ]  # fmt: skip


def test_what_was_not_waited_for_is_beside() -> None:
    found = slices(by_hand(), 1)
    assert found["lane 1"] == [
        (10, 310, "request 0"), (10, 20, "wait for retrieve"), (20, 100, "retrieve"), (100, 130, "hand-over"),
        (130, 150, "wait for prefill"), (150, 200, "prefill"), (200, 250, "hand-over"), (250, 300, "decode"),
        (300, 310, "hand-over"),
    ]  # fmt: skip
    assert found["lane 1, beside"] == [(100, 130, "hand-over"), (130, 140, "wait for guard"), (140, 180, "guard")]


def test_an_arrow_goes_through_the_transfers() -> None:
    arrows = defaultdict(list)
    for event in events_of(by_hand()):
        if event["ph"] in "stf":
            arrows[event["id"]].append((event["pid"], event["ts"]))
    assert arrows[0] == [(1, 10), (2, 20), (6, 100), (3, 150), (6, 220), (4, 250)]
    assert arrows[1] == [(1, 100), (6, 110), (5, 140)]


def test_steps_without_prefills_are_named_by_their_tasks() -> None:
    records = Records(["host", "gpu"], stage_kinds=["retrieve", "embed", PREFILL])
    for request, (kind, started, ended) in enumerate([(0, 10, 20), (1, 10, 20), (1, 10, 30), (0, 20, 30), (1, -1, 25)]):
        records.tasks.append((request, 0, kind, 0, 5, started, -1, ended, 0, 1, 0, -1, -1, 0))
    records.tasks.append((9, 0, 2, 1, 5, 10, -1, 20, 0, 1, 0, -1, -1, 0))
    records.steps.append((0, 10, 20, 3, 70, 0, 0, 0, 0))
    records.steps.append((0, 20, 30, 2, 70, 2, 0, 0, 0))
    records.steps.append((1, 10, 20, 1, 70, 0, 0, 0, 0))
    assert [name for *_, name in slices(records, 2)["steps"]] == [
        "retrieve x 1 + embed x 2", "retrieve x 1 + embed x 1 + 2 decodes",
    ]  # fmt: skip
    assert [name for *_, name in slices(records, 3)["steps"]] == ["prefill 70"]


@pytest.mark.parametrize("seed", range(0, 60, 4))
def test_steps_name_as_many_tasks_as_they_compute(seed: int) -> None:
    for event in events_of(branched(seed)):
        if event.get("cat") == "step" and event["pid"] in (2, 3):
            parts = [part.split(" x ") for part in event["name"].split(" + ") if " x " in part]
            assert sum(int(number) for _, number in parts) == event["args"]["num_prefills"]
            assert {kind for kind, _ in parts} <= {"guard", "translate"}


def test_a_host_tells_its_searches_and_no_kv_blocks() -> None:
    records = host_records()
    host = records.client_names.index("index")
    events = [event for event in events_of(records) if event["pid"] == host + 2]
    steps = [event for event in events if event["ph"] == "X"]
    searches = [int(event["name"].removeprefix("retrieve x ")) for event in steps]
    assert searches == [event["args"]["num_prefills"] for event in steps]
    assert sum(searches) == 50
    assert "KV blocks" not in {event["name"] for event in events}


def test_what_took_no_time_or_never_left_is_no_slice() -> None:
    records = by_hand()
    records.transfers.cells[:] = records.transfers.cells[:0]
    assert not any(event["pid"] == 6 for event in events_of(records))
    transfer(records, sender=1, receiver=2, bytes=100, queued_ns=200, start_ns=200, end_ns=200)
    transfer(records, sender=1, receiver=2, bytes=100, queued_ns=200, start_ns=-1, end_ns=-1)
    assert not any(event["pid"] == 6 for event in events_of(records))
    transfer(records, sender=1, receiver=2, bytes=100, queued_ns=200, start_ns=210, end_ns=-1)
    transfer(records, sender=1, receiver=-1, bytes=3 << 10, queued_ns=200, start_ns=210, end_ns=-1)
    transfer(records, sender=-2, receiver=1, bytes=3 << 20, queued_ns=200, start_ns=210, end_ns=290)
    records.memory_names.append("NVMe")
    assert slices(records, 6) == {
        "prefill ->": [(210, 310, "KV 100 B to decode")],
        "prefill -> (2)": [(210, 310, "KV 3 KiB to host memory")],
        "NVMe ->": [(210, 290, "KV 3 MiB to prefill")],
    }


def test_news_search_reads_at_a_glance() -> None:
    records = news_search()
    assert {name for *_, name in slices(records, 2)["steps"]} == {"retrieve x 1"}
    assert {name for *_, name in slices(records, 3)["steps"]} == {"embed x 1", "rerank x 1"}
    assert {name for *_, name in slices(records, 4)["steps"]} == {"prefill 100"}
    # 100 tokens of 128 KiB
    assert [name for *_, name in slices(records, 6)["prefill ->"]] == ["KV 12 MiB to decode"] * 3
    stages = ["embed", "retrieve", "rerank", "prefill", "hand-over", "decode"]
    for life, parts in lives(events_of(records)):
        assert [one["name"] for one in parts if not one["name"].startswith("wait")] == stages
        assert life["args"]["status"] == "finished"
