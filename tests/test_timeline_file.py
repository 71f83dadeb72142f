"""The file of a timeline against the records: sums of spans, read by ourselves and by Perfetto's trace processor.

The same sums are asked of both, exactly: in whole nanoseconds, which is what Perfetto keeps.
"""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

import trace_processor
from mist.records import TRANSFER_KINDS
from mist.report.timeline import write_timeline
from mist.scenario import load
from mist.scenario.result import Result
from test_hosts import scenario

#: by category and name: how many spans, and their sum in ns
Sums = dict[tuple[str, str], tuple[int, int]]
NODES = {"cpu": {"host": "epyc-9554", "nic": {"bandwidth": "12.5 GB/s"}}, "gpu": {"count": 3, "devices": 1}}


@pytest.fixture(scope="module")
def search() -> Result:
    """Forty questions on a CPU and three GPU nodes: embedded, searched for, ranked again, answered."""
    whole = scenario(pipeline={"news_search": {"passages": 5, "passage_tokens": 512, "candidates": 20}})
    whole["workload"] |= {"num_requests": 40, "arrivals": {"poisson": {"rate_per_s": 30}}, "output_tokens": 40}
    gpu = whole["clients"].pop("gpu")
    ranker = {"device": "h100-sxm", "model": "bge-reranker-v2-m3", "serves": ["rerank"], "perf": "roofline"}
    encoder = {"device": "epyc-9554", "model": "e5-base-v2", "serves": ["embed"], "perf": "roofline"}
    whole["clients"] |= {"embedder": encoder, "reranker": ranker, "prefill": gpu | {"serves": ["prefill"]}}
    whole["clients"] |= {"decode": gpu | {"serves": ["decode"]}}
    places = {"embedder": "cpu", "index": "cpu", "reranker": "gpu-0", "prefill": "gpu-1", "decode": "gpu-2"}
    whole["network"] = {"preset": "h100-nvl8", "nodes": NODES, "placement": places}
    return load(whole).run(check=True)


@pytest.fixture(scope="module")
def timeline(search: Result, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_timeline(search, tmp_path_factory.mktemp("timeline") / "search.json.gz")


def recorded(result: Result) -> Sums:
    """What the records say: each stage's waiting and serving, steps by client, transfers by kind, requests."""
    found: dict[tuple[str, str], list[int]] = defaultdict(list)
    records = result.records
    for row in rows(records.tasks):
        name, admitted = (
            records.stage_kinds[row["kind"]],
            row["started_ns"] if row["started_ns"] >= 0 else row["end_ns"],
        )
        found["stage", f"wait for {name}"].append(admitted - row["queued_ns"])
        found["stage", name].append(row["end_ns"] - admitted)
    for row in rows(records.steps):
        found["step", records.client_names[row["client"]]].append(row["end_ns"] - row["start_ns"])
    for row in rows(records.transfers):
        found["transfer", TRANSFER_KINDS[row["kind"]]].append(row["end_ns"] - row["start_ns"])
    for row in rows(records.requests):
        found["request", ""].append(row["end_ns"] - row["arrival_ns"])
    return {key: (sum(map(bool, spans)), sum(spans)) for key, spans in found.items() if any(spans)}


def rows(table: Any) -> list[dict[str, int]]:
    columns = table.as_columns()
    return [dict(zip(columns, row, strict=True)) for row in zip(*(c.tolist() for c in columns.values()), strict=True)]


def test_spans_in_the_file_sum_to_the_records(search: Result, timeline: Path) -> None:
    events = json.loads(gzip.decompress(timeline.read_bytes()), parse_float=Decimal)["traceEvents"]
    processes = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    found: dict[tuple[str, str], list[int]] = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            nanoseconds = event["dur"] * 1000
            assert nanoseconds == int(nanoseconds)
            assert event["ts"] * 1000 == int(event["ts"] * 1000)
            found[key_of(event["cat"], event["name"], processes[event["pid"]], event["args"].get("kind"))].append(
                int(nanoseconds)
            )
    sums = {key: (len(spans), sum(spans)) for key, spans in found.items()}
    handed = sums.pop(("stage", "hand-over"))
    assert sums == recorded(search)
    # a request is its stages and what is between them
    assert handed[1] == sums["request", ""][1] - sum(total for (kind, _), (_, total) in sums.items() if kind == "stage")
    assert {name for kind, name in sums if kind == "stage"} >= {"embed", "retrieve", "rerank", "prefill", "decode"}


def key_of(category: str, name: str, process: str, kind: str | None) -> tuple[str, str]:
    if category == "request":
        return ("request", "") if name.startswith("request ") else ("stage", name)
    return (category, process if category == "step" else str(kind))


needs_perfetto = pytest.mark.skipif(trace_processor.missing() is not None, reason=str(trace_processor.missing()))

_SLICES = """
    select s.category, s.name, p.name, extract_arg(s.arg_set_id, 'args.kind'), count(*), sum(s.dur)
    from slice s join thread_track t on s.track_id = t.id join thread using (utid) join process p using (upid)
    group by 1, 2, 3, 4
"""


@needs_perfetto
def test_perfetto_reads_the_same_sums(search: Result, timeline: Path) -> None:
    trouble, slices, flows, levels, depth = trace_processor.ask(timeline, [
        "select name, value from stats where value > 0 and severity != 'info'",
        _SLICES,
        "select count(*) from flow",
        "select t.name, c.value from counter c join process_counter_track t on c.track_id = t.id order by c.ts, c.id",
        "select max(depth) from slice",
    ])  # fmt: skip
    assert trouble == []
    sums: dict[tuple[str, str], tuple[int, int]] = {}
    for category, name, process, kind, number, total in slices:
        key = key_of(category, name, process, kind)
        before = sums.get(key, (0, 0))
        sums[key] = (before[0] + number, before[1] + total)
    sums.pop(("stage", "hand-over"))
    assert sums == recorded(search)
    assert depth == [(1,)]  # stages are in their requests, and nothing else is in anything
    # from each request at least to the steps of its five stages
    assert flows[0][0] >= 5 * len(search.records.requests)
    steps = search.records.steps.as_columns()
    running = [value for name, value in levels if name == "running sequences"]
    assert max(running) == (steps["num_prefills"] + steps["num_decodes"]).max()
    assert [value for name, value in levels if name == "in the system requests"][-1] == 0
