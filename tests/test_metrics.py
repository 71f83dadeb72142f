"""Metrics against runs whose every token and every second is known."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from handmade import Story, random_story
from mist.metrics import ClientInfo, summarise
from mist.metrics.distribution import Blocks, Multiset, distribution
from mist.metrics.latency import e2e_ns
from mist.metrics.load import littles_identity
from mist.metrics.stages import PARTS, stage_times
from mist.metrics.tokens import DecodeSteps, Segments, longest_gaps, token_gaps
from mist.metrics.window import Window
from mist.metrics.words import share
from mist.records import FINISHED, REJECTED, UNFINISHED, Records
from mist.testing import play, random_scenario, table

STORIES = [
    {"disaggregated": disaggregated, "num_clients": clients, "preempt": preempt, "cut": cut}
    for disaggregated, clients in ((False, 1), (False, 3), (True, 3))
    for preempt in (0.0, 0.5)
    for cut in (None, 90_000_000)
]


@pytest.fixture(params=range(3 * len(STORIES)), ids=lambda i: f"story{i}")
def story(request) -> Story:
    return random_story(request.param, **STORIES[request.param % len(STORIES)])


def in_order(records: Records) -> dict[str, np.ndarray]:
    tasks = records.tasks.as_columns()
    order = np.argsort(tasks["request"], kind="stable")
    return {name: column[order] for name, column in tasks.items()}


def expected(values_ns: list[float]) -> dict[str, float | None]:
    """What a summary must say of these values, computed the plain way."""
    if not values_ns:
        return {"mean": None, "p50": None, "p90": None, "p99": None}
    points = {f"p{p}": float(np.percentile(values_ns, p)) / 1e9 for p in (50, 90, 99)}
    return {"mean": pytest.approx(sum(values_ns) / len(values_ns) / 1e9, rel=1e-12), **points}


# --- distributions ---


def multiset(*blocks: tuple[list[int], list[int]]) -> Multiset:
    found = Multiset()
    for values, weights in blocks:
        found.add(np.array(values, np.int64), np.array(weights, np.int64))
    return found


TIMES = st.one_of(st.integers(0, 50), st.integers(0, 2**41))


@given(st.lists(st.lists(st.tuples(TIMES, st.integers(0, 6)), min_size=1, max_size=12), min_size=1, max_size=4))
def test_a_multiset_in_blocks_has_the_percentiles_of_the_expanded_column(blocks):
    percentiles = [0, 0.1, 25, 50, 66.6, 90, 99, 99.9, 100]
    found = multiset(*(tuple(zip(*pairs, strict=True)) for pairs in blocks))
    pairs = [pair for block in blocks for pair in block]
    expanded = np.repeat(*(np.array(column, np.int64) for column in zip(*pairs, strict=True)))
    assert found.distribution(percentiles) == distribution(expanded, percentiles)


def test_billions_need_no_billions_and_sums_do_not_overflow():
    found = multiset(([3, 1, 2], [10**9, 10**9, 1])).distribution([0, 50, 100])
    assert [found[name] for name in ("p0", "p50", "p100")] == [1e-9, 2e-9, 3e-9]
    assert multiset(([2**61], [3]), ([2**61], [3])).distribution()["mean"] == 2**61 / 1e9


def test_an_empty_column_has_no_percentiles():
    nothing = {"mean": None, "p50": None, "p90": None, "p99": None}
    assert distribution(np.zeros(0, np.int64)) == nothing
    assert multiset(([], []), ([5], [0])).distribution() == nothing


@given(st.lists(st.lists(st.integers(-3, 2**62)), max_size=4))
def test_blocks_keep_every_value(blocks):
    column = Blocks()
    for block in blocks:
        column.add(np.array(block, np.int64))
    assert column.whole().tolist() == [value for block in blocks for value in block]
    assert column.whole().dtype == np.int64


# --- against the token-by-token truth ---


def test_counts_add_up(story):
    counts = summarise(story.records, clients=story.clients)["requests"]
    assert counts["arrived"] == sum(number for name, number in counts.items() if name != "arrived")
    assert counts["finished"] == len(story.finished)


def test_latencies_are_those_of_the_tokens_seen(story):
    done = [job for job in story.jobs if job.index in story.finished]
    summary = summarise(story.records, clients=story.clients)
    end = {job.index: job.since for job in done}
    spoken = [job for job in done if job.tokens]
    assert summary["ttft_s"] == expected([job.tokens[0] - job.arrival for job in spoken])
    assert summary["e2e_s"] == expected([end[job.index] - job.arrival for job in done])
    per_token = [(end[j.index] - j.tokens[0]) / (len(j.tokens) - 1) for j in spoken if len(j.tokens) > 1]
    assert summary["tpot_s"] == expected(per_token)
    assert summary["itl_s"] == expected([b - a for job in spoken for a, b in pairwise(job.tokens)])


def test_longest_gaps_are_those_of_the_tokens_seen(story):
    decode_steps = DecodeSteps.of(story.records.steps.as_columns(), len(story.clients))
    segments = Segments.of(in_order(story.records), decode_steps)
    longest = longest_gaps(segments, decode_steps, len(story.jobs))
    assert longest.tolist() == [max((b - a for a, b in pairwise(job.tokens)), default=-1) for job in story.jobs]


def test_stage_parts_are_what_each_request_lived_through_and_tile_it(story):
    requests = story.records.requests.as_columns()
    finished = {name: column[requests["status"] == FINISHED] for name, column in requests.items()}
    times = stage_times(finished, in_order(story.records), 2)
    assert times.sum(axis=(1, 2)).tolist() == e2e_ns(finished).tolist()
    for row, request in zip(times, finished["request"].tolist(), strict=True):
        spent = story.jobs[request].spent
        assert row.tolist() == [[spent.get((kind, part[:-2]), 0) for part in PARTS] for kind in (0, 1)]


def test_stage_means_sum_to_the_mean_e2e(story):
    summary = summarise(story.records, clients=story.clients)
    means = [parts[part]["mean"] for parts in summary["stages"].values() for part in PARTS]
    assert sum(means) == pytest.approx(summary["e2e_s"]["mean"], rel=1e-12)
    means = [parts["ttft_s"]["mean"] for parts in summary["stages"].values()]
    assert sum(means) == pytest.approx(summary["ttft_s"]["mean"], rel=1e-12)


def test_stage_parts_until_the_first_token_sum_to_the_ttft(story):
    requests = story.records.requests.as_columns()
    spoken = (requests["status"] == FINISHED) & (requests["first_token_ns"] >= 0)
    requests = {name: column[spoken] for name, column in requests.items()}
    whole, until = (
        stage_times(requests, in_order(story.records), 2, None, end) for end in ("end_ns", "first_token_ns")
    )
    assert (until >= 0).all()
    assert (until <= whole).all()
    assert until.sum(axis=(1, 2)).tolist() == (requests["first_token_ns"] - requests["arrival_ns"]).tolist()


def test_littles_identity(story):
    integral, sojourns = littles_identity(story.records.requests.as_columns(), story.end)
    assert integral == sojourns > 0


@pytest.mark.parametrize("bounds", [(None, None), (40_000_000, None), (None, 60_000_000), (30_000_000, 80_000_000)])
def test_client_figures_are_sums_over_the_window(story, bounds):
    window = Window.of(story.records, bounds)
    summary = summarise(story.records, clients=story.clients, window=bounds)
    replicas = {r["name"]: r for pool in summary["clients"].values() for r in pool["replicas"]}
    steps = list(zip(*(c.tolist() for c in story.records.steps.as_columns().values()), strict=True))
    for index, client in enumerate(story.clients):
        inside = [
            (min(stop, window.end_ns) - max(start, window.start_ns), prefills + decodes, tokens, blocks)
            for who, start, stop, prefills, tokens, decodes, _, blocks, _ in steps
            if who == index and stop > window.start_ns and start < window.stop_ns
        ]
        busy = sum(step[0] for step in inside)
        figures = replicas[client.name]
        assert figures["steps"] == len(inside)
        assert figures["utilisation"] == pytest.approx(busy / window.span_ns)
        assert figures["prefill_tokens"] == sum(step[2] for step in inside)
        assert figures["kv_peak"] == max((step[3] for step in inside), default=0) / 100
        if busy:
            assert figures["mean_batch"] == pytest.approx(sum(step[0] * step[1] for step in inside) / busy)
            assert figures["kv_mean"] == pytest.approx(sum(step[0] * step[3] for step in inside) / busy / 100)
        emitted = [at for at, who in story.tokens if who == index and window.start_ns <= at < window.stop_ns]
        assert figures["output_tokens"] == len(emitted)


def test_a_pool_sums_its_replicas(story):
    for pool in summarise(story.records, clients=story.clients)["clients"].values():
        replicas = pool["replicas"]
        for total in ("preemptions", "steps", "prefill_tokens", "output_tokens", "kv_tokens_capacity"):
            assert pool[total] == sum(replica[total] for replica in replicas)
        assert pool["utilisation"] == pytest.approx(np.mean([replica["utilisation"] for replica in replicas]))
        assert pool["kv_peak"] == max(replica["kv_peak"] for replica in replicas)


def test_preemptions_are_those_that_happened(story):
    pools = summarise(story.records, clients=story.clients)["clients"].values()
    assert sum(pool["preemptions"] for pool in pools) == sum(job.preemptions for job in story.jobs)


def test_throughput_counts_what_happened_in_the_span(story):
    window = Window.of(story.records, (20_000_000, 80_000_000))
    rates = summarise(story.records, clients=story.clients, window=(20_000_000, 80_000_000))["throughput"]
    tokens = [at for at, _ in story.tokens if window.start_ns <= at < window.stop_ns]
    ends = [j.since for j in story.jobs if j.index in story.finished and window.start_ns <= j.since < window.stop_ns]
    prompts = [
        16 * job.prompt
        for job in story.jobs
        if (job.tokens or job.index in story.finished)
        and window.start_ns <= (job.tokens or [job.since])[0] < window.stop_ns
    ]
    span_s = window.span_ns / 1e9
    assert rates["requests_per_s"] == pytest.approx(len(ends) / span_s)
    assert rates["output_tokens_per_s"] == pytest.approx(len(tokens) / span_s)
    assert rates["total_tokens_per_s"] == pytest.approx((len(tokens) + sum(prompts)) / span_s)


def test_a_window_measures_the_requests_that_arrive_in_it(story):
    bounds = (30_000_000, 70_000_000)
    summary = summarise(story.records, clients=story.clients, window=bounds)
    arrived = {job.index for job in story.jobs if bounds[0] <= job.arrival < bounds[1]}
    assert summary["requests"]["arrived"] == len(arrived)
    done = [job for job in story.jobs if job.index in arrived & story.finished]
    assert summary["e2e_s"] == expected([job.since - job.arrival for job in done])
    assert summary["itl_s"] == expected([b - a for job in done for a, b in pairwise(job.tokens)])
    assert "requests: those that arrived from" in summary["notes"][0]


def test_the_document_is_json_without_nan(story):
    targets = {"ttft_s": {"p99": 0.01}, "itl_s": {"p99.9": 0.01}}
    summary = summarise(story.records, clients=story.clients, slo=targets)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert list(summary)[:6] == ["schema_version", "requests", "ttft_s", "tpot_s", "itl_s", "e2e_s"]


def test_nothing_happened():
    records = Records(client_names=["gpu"], stage_kinds=["prefill", "decode"])
    summary = summarise(records, clients=[ClientInfo("gpu", "gpu", 10, 16, 4)], slo={"itl_s": {"mean": 1}})
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert summary["duration_s"] == 0
    assert summary["clients"]["gpu"]["utilisation"] is None
    assert summary["slo"]["met"] is None
    assert not summary["saturated"]


def test_a_window_that_nothing_arrives_in():
    story = random_story(1)
    summary = summarise(story.records, clients=story.clients, window=(10**15, None))
    assert summary["requests"]["arrived"] == 0
    assert summary["e2e_s"]["p50"] is None
    json.dumps(summary, allow_nan=False)


def test_censoring_is_said_in_words():
    story = random_story(3, cut=60_000_000, num_clients=1)
    summary = summarise(story.records, clients=story.clients)
    assert summary["requests"]["unfinished"] > 0
    assert any(f"{summary['requests']['unfinished']} unfinished" in note for note in summary["notes"])
    rows = story.records.requests.as_columns()
    longest = (rows["end_ns"] - rows["arrival_ns"])[rows["status"] == UNFINISHED].max() / 1e9
    told = f"had been in the system for up to {longest:.3g} s: true percentiles may be higher"
    assert any(told in note for note in summary["notes"])


def test_nothing_finished_is_said_in_words():
    records = Records(client_names=["gpu"], stage_kinds=["prefill"])
    for i in range(3):
        records.requests.append((i, 10 * i, -1, 10 * i, REJECTED, 0, 8, 0, 0, 0))
    summary = summarise(records, clients=[ClientInfo("gpu", "gpu")])
    assert summary["notes"] == ["No request finished, so there are no latencies: 3 rejected."]
    assert not summary["saturated"]
    assert summary["backlog"] is None


def test_one_request_is_one():
    records = Records(client_names=["gpu"], stage_kinds=["prefill"])
    records.requests.append((0, 0, -1, 5, FINISHED, -1, 8, 0, 0, 0))
    notes = summarise(records, clients=[ClientInfo("gpu", "gpu")])["notes"]
    assert notes == [
        "Latencies are of the only request, with no warm-up cut.",
        "Only one request arrived: whether such load would saturate can't be told.",
    ]
    records.requests.append((1, 7, -1, 9, REJECTED, 0, 8, 0, 0, 0))
    notes = summarise(records, clients=[ClientInfo("gpu", "gpu")])["notes"]
    assert notes == ["Latencies are of the 1 request that finished, with no warm-up cut; 1 rejected is left out."]


def test_a_window_outside_the_run_says_so():
    story = random_story(1)
    note = summarise(story.records, clients=story.clients, window=(10**15, 2 * 10**15))["notes"][0]
    assert note.startswith("The window lies outside the run, whose last event is ")


@pytest.mark.parametrize(
    ("fraction", "words"),
    [
        (0.0, "0%"), (1e-9, "<0.1%"), (0.0123, "1.2%"), (0.0996, "10%"), (0.5, "50%"), (0.9849, "98%"),
        (0.9949, "99.5%"), (0.996, "99.6%"), (0.9994, "99.9%"), (0.9999, ">99.9%"), (1.0, "100%"), (2.5, "250%"),
    ],
)  # fmt: skip
def test_a_share_is_never_rounded_to_all_or_nothing(fraction, words):
    assert share(fraction) == words


def test_hidden_tokens_before_the_first_visible_one_make_no_gaps():
    records = Records(client_names=["gpu"], stage_kinds=["decode"])
    for end in (20, 30, 40, 90, 110):
        records.steps.append((0, end - 5, end, 0, 0, 1, 50, 1, 0))
    # a hidden decode (tokens at 10, 20, 30), then the visible one (tokens at 50, 90, 110)
    records.tasks.append((0, 0, 0, 0, 0, 0, 10, 30, 0, 0, 0, 0, 2, 3))
    records.tasks.append((0, 1, 0, 0, 30, 40, 50, 110, 0, 0, 0, 3, 5, 3))
    records.requests.append((0, 0, 50, 110, FINISHED, -1, 8, 3, 0, 0))
    summary = summarise(records, clients=[ClientInfo("gpu", "gpu")], slo={"itl_s": {"p50": 3.5e-8}})
    assert summary["itl_s"]["p50"] == 3e-8
    assert summary["slo"]["attainment"] == 0
    assert summary["clients"]["gpu"]["output_tokens"] == 6


def test_a_way_back_to_the_user_belongs_to_the_last_stage():
    records = Records(client_names=["gpu"], stage_kinds=["prefill", "decode"])
    records.tasks.append((0, 0, 0, 0, 5, 8, -1, 20, 0, 8, 0, -1, -1, 0))
    records.tasks.append((0, 1, 1, 0, 23, 23, 23, 40, 0, 0, 0, 0, 0, 1))
    records.requests.append((0, 1, 23, 47, FINISHED, -1, 8, 1, 0, 0))
    times = stage_times(records.requests.as_columns(), in_order(records), 2)
    assert times.tolist() == [[[3, 12, 4], [0, 17, 3 + 7]]]


def test_a_segment_that_never_started_only_waited():
    records = Records(client_names=["gpu"], stage_kinds=["prefill"])
    records.tasks.append((0, 0, 0, 0, 5, -1, -1, 15, 2, 0, 0, -1, -1, 0))
    records.tasks.append((0, 0, 0, 0, 15, 20, -1, 30, 0, 8, 0, -1, -1, 0))
    records.requests.append((0, 5, -1, 30, FINISHED, -1, 8, 0, 0, 0))
    assert stage_times(records.requests.as_columns(), in_order(records), 1).tolist() == [[[15, 10, 0]]]


def test_prefix_hits_are_a_share_of_the_tokens_needed():
    records = Records(client_names=["gpu"], stage_kinds=["prefill"])
    for i, cached in enumerate((0, 48)):
        records.tasks.append((i, 0, 0, 0, 10 * i, 10 * i, -1, 10 * i + 10, 0, 64 - cached, cached, -1, -1, 0))
        records.steps.append((0, 10 * i, 10 * i + 10, 1, 64 - cached, 0, 0, 4, 0))
        records.requests.append((i, 10 * i, -1, 10 * i + 10, FINISHED, -1, 64, 0, cached, 0))
    clients = [ClientInfo("gpu", "gpu", 8, 16)]
    assert summarise(records, clients=clients)["clients"]["gpu"]["prefix_hit_rate"] == 48 / 128
    late = summarise(records, clients=clients, window=(10, None))["clients"]["gpu"]
    assert late["prefix_hit_rate"] == 48 / 64


def test_what_a_preempted_task_finds_of_its_own_is_no_prefix_hit():
    records = Records(client_names=["gpu"], stage_kinds=["prefill"])
    records.tasks.append((0, 0, 0, 0, 0, 0, -1, 10, 1, 48, 16, -1, -1, 0))
    records.tasks.append((0, 0, 0, 0, 10, 20, -1, 30, 1, 4, 60, -1, -1, 0))
    records.tasks.append((0, 0, 0, 0, 30, 40, -1, 50, 0, 4, 60, -1, -1, 0))
    records.tasks.append((1, 0, 0, 0, 50, 50, -1, 60, 0, 64, 0, -1, -1, 0))
    for i, (start, tokens) in enumerate(((0, 48), (20, 4), (40, 4), (50, 64))):
        records.steps.append((0, start, start + 10, 1, tokens, 0, 0, 4, 0))
        if i > 1:
            records.requests.append((i - 2, 0, -1, start + 10, FINISHED, -1, 64, 0, 16, 2))
    gpu = summarise(records, clients=[ClientInfo("gpu", "gpu", 8, 16)])["clients"]["gpu"]
    assert gpu["prefix_hit_rate"] == 16 / (16 + 48 + 64)
    assert gpu["prefill_tokens"] == 48 + 4 + 4 + 64


def test_the_offered_rate_is_that_of_the_arrivals():
    records = Records(client_names=["gpu"], stage_kinds=["prefill"])
    for i in range(5):
        status = FINISHED if i < 4 else UNFINISHED
        records.requests.append((i, 10**9 + i * 5 * 10**8, -1, 10**10, status, -1, 8, 0, 0, 0))
    clients = [ClientInfo("gpu", "gpu")]
    asked = np.array([10, 20, 30, 40, 100])
    offered = summarise(records, clients=clients, oracle_output_tokens=asked)["offered"]
    assert offered == {"requests_per_s": 2.0, "output_tokens_per_s": 80.0, "served_share": 0.5, "span_s": 2.0}
    late = summarise(records, clients=clients, oracle_output_tokens=asked, window=(2 * 10**9, None))["offered"]
    tokens = {"output_tokens_per_s": pytest.approx(2 * 170 / 3), "served_share": 70 / 170}
    assert late == {"requests_per_s": 2.0, **tokens, "span_s": 1.0}
    assert summarise(records, clients=clients, open_loop=False)["offered"] is None
    nothing = dict.fromkeys(("requests_per_s", "output_tokens_per_s", "served_share", "span_s"))
    assert summarise(records, clients=clients, window=(3 * 10**9, None))["offered"] == nothing


def test_a_window_holds_its_start_and_not_its_end():
    records = Records(client_names=["gpu"], stage_kinds=["prefill"])
    for i in range(5):
        records.requests.append((i, 10 * i, -1, 10 * i + 5, FINISHED, -1, 8, 0, 0, 0))
    clients = [ClientInfo("gpu", "gpu")]
    assert summarise(records, clients=clients, window=(10, 30))["requests"]["arrived"] == 2
    assert summarise(records, clients=clients, window=(10, None))["requests"]["arrived"] == 4
    assert summarise(records, clients=clients)["requests"]["arrived"] == 5


# --- the simulator's own records ---


@pytest.mark.parametrize("seed", range(60))
def test_laws_over_the_records_of_the_engine(seed):
    run = random_scenario(seed).play()
    records = run.records
    requests = records.requests.as_columns()
    finished = {name: column[requests["status"] == FINISHED] for name, column in requests.items()}
    times = stage_times(finished, in_order(records), len(records.stage_kinds))
    assert times.min(initial=0) >= 0
    assert times.sum(axis=(1, 2)).tolist() == e2e_ns(finished).tolist()
    decode_steps = DecodeSteps.of(records.steps.as_columns(), len(records.client_names))
    gaps, weights = token_gaps(Segments.of(in_order(records), decode_steps), decode_steps)
    several = finished["output_tokens"] > 1
    assert weights.min(initial=0) >= 0
    assert gaps[weights > 0].min(initial=0) >= 0
    assert weights.sum() == (finished["output_tokens"][several] - 1).sum()
    assert (gaps * weights).sum() == (finished["end_ns"] - finished["first_token_ns"])[several].sum()
    assert len(set(littles_identity(requests, run.end_ns))) == 1
    summary = summarise(records, clients=[ClientInfo(name, "gpu") for name in records.client_names])
    rejected = np.count_nonzero(requests["status"] == REJECTED)
    assert summary["requests"]["finished"] + rejected == summary["requests"]["arrived"]
    emitted = summary["throughput"]["output_tokens_per_s"] or 0
    assert emitted * summary["duration_s"] == pytest.approx(finished["output_tokens"].sum())


def test_play_of_several_replicas_has_figures_per_replica():
    run = play(table([0] * 8, [20] * 8, [10] * 8), num_clients=2)
    clients = [ClientInfo(name, "gpu") for name in run.records.client_names]
    pool = summarise(run.records, clients=clients, open_loop=False)["clients"]["gpu"]
    assert len(pool["replicas"]) == 2
    assert pool["output_tokens"] == 80
    assert pool["prefill_tokens"] == 160


def test_hidden_tokens_are_no_throughput():
    """Ten tokens of a draft and five of an answer in ten seconds: half a token a second is seen."""
    records = Records(client_names=["gpu"], stage_kinds=["draft", "decode"])
    records.tasks.append((0, 0, 0, 0, 0, 0, 10**9, 5 * 10**9, 0, 8, 0, 0, 9, 10))
    records.tasks.append((0, 1, 1, 0, 5 * 10**9, 5 * 10**9, 6 * 10**9, 10**10, 0, 8, 0, 9, 13, 5))
    for step in range(13):
        records.steps.append((0, step * 10**9 // 2, (step + 1) * 10**9 // 2, 0, 0, 1, 9, 1, 0))
    records.requests.append((0, 0, 6 * 10**9, 10**10, FINISHED, -1, 8, 5, 0, 0))
    summary = summarise(records, clients=[ClientInfo("gpu", "gpu")])
    assert summary["throughput"]["output_tokens_per_s"] == pytest.approx(0.5)
