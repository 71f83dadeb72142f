"""Closed-loop sessions: read from agentic traces or drawn, and played so that each turn waits for the one before."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kit import play, table
from mist.errors import ScenarioError
from mist.records import FINISHED, REJECTED
from mist.routing.session_affinity import SessionAffinity
from mist.scenario.build import run
from mist.scenario.value import load
from mist.units import NS_PER_MS, NS_PER_S
from mist.workload import RequestTable
from mist.workload.columns import write_trace
from mist.workload.kv_cache_tester import KVCacheTester
from mist.workload.sessions import Stretches, begin_sessions, draw_sessions
from mist.workload.synthetic import AllAtOnce, ClosedLoop, Constant, Fixed, Poisson, Uniform
from mist.workload.trace import detect, find_trace, limit, rate_scale, read_trace
from scenarios import sole_table


def turn(t: float, i: int, hit: int = 0, *, agent: str = "0", api: float | None = 1.0, think: float | None = 0.0,
         o: int = 5) -> dict[str, Any]:  # fmt: skip
    return {"agent": agent, "t": t, "i": i, "o": o, "nb": i // 4, "hit": hit, "new": 0, "api": api, "think": think}


def put(folder: Path, *sessions: Sequence[dict[str, Any]], block_size: int = 4) -> Path:
    path = folder / "traces.jsonl"
    rows = [{"id": f"s{i}", "block_size": block_size, "requests": list(each)} for i, each in enumerate(sessions)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def columns(workload: RequestTable) -> tuple[list[int], list[int], list[int]]:
    assert workload.after is not None
    assert workload.think_ns is not None
    assert workload.sessions is not None
    return workload.sessions.tolist(), workload.after.tolist(), (workload.think_ns // NS_PER_MS).tolist()


# --- reading ---


def test_turns_wait_for_their_agent_and_share_its_prefix(tmp_path: Path) -> None:
    path = put(
        tmp_path,
        [turn(0, 16), turn(5, 24, 4, think=3.5), turn(30, 12, 2, think=None)],
        [turn(2, 8), turn(4, 20, 1, think=1)],
    )
    assert isinstance(detect(path), KVCacheTester)
    read = read_trace(path)
    assert columns(read) == ([0, 1, 1, 0, 0], [-1, -1, 1, 0, 3], [0, 0, 1000, 3500, 24_000])
    assert list(read.block_keys or ()) == [(0, 1, 2, 3), (7, 8), (7, 9, 10, 11, 12), (0, 1, 2, 3, 4, 5), (0, 1, 6)]
    assert read.hash_block_size == 4
    assert read.notes == ("In the trace 35.00% of the prompt tokens had been seen before in their session.",)


def test_units_of_several_blocks_hit_whole_units_only(tmp_path: Path) -> None:
    path = put(tmp_path, [turn(0, 18), turn(5, 24, 3)])
    read = read_trace(path, KVCacheTester(hash_block_size=8))
    assert list(read.block_keys or ()) == [(0, 1), (0, 2, 3)]
    with pytest.raises(ScenarioError, match="hash_block_size is 6, and the blocks have 4 tokens"):
        read_trace(path, KVCacheTester(hash_block_size=6))


def test_sub_agents_begin_after_what_their_agent_had_done(tmp_path: Path) -> None:
    path = put(
        tmp_path,
        [turn(0, 16), turn(3, 12, agent="0/1"), turn(3.5, 12, 2, agent="0/2"), turn(9, 12, 3, agent="0/1", think=5),
         turn(60, 40, 4, think=59)],
    )  # fmt: skip
    read = read_trace(path)
    assert columns(read) == ([0] * 5, [-1, 0, 0, 1, 0], [0, 2000, 2500, 5000, 59_000])
    assert read.block_keys is not None
    assert read.block_keys[2][:2] == read.block_keys[1][:2] == read.block_keys[3][:2]
    assert read.block_keys[4][:4] == read.block_keys[0]


def test_a_turn_whose_service_time_is_unknown_ends_as_it_began(tmp_path: Path) -> None:
    """Then its own service counts as idle time: the trace doesn't tell them apart."""
    read = read_trace(put(tmp_path, [turn(0, 8, api=None), turn(7, 12, 2, think=55.0)]))
    assert columns(read)[2] == [0, 7000]


def test_played_by_time_nothing_waits(tmp_path: Path) -> None:
    read = read_trace(put(tmp_path, [turn(0, 8), turn(7, 12, 2)]), KVCacheTester(replay="times"))
    assert (read.after, read.think_ns) == (None, None)
    assert read.arrival_ns.tolist() == [0, 7 * NS_PER_S]
    assert read.sessions is not None


def test_what_cannot_be_used_is_told_by_its_line(tmp_path: Path) -> None:
    bad = [
        turn(0, 0),
        turn(-1, 8),
        turn(0, 8, 3),
        turn(0, 8, api=-1.0),
        turn(0, 8) | {"agent": 3},
        turn(0, 8) | {"o": 1.5},
    ]
    path = put(tmp_path, [turn(0, 8)], bad)
    with pytest.raises(ScenarioError) as error:
        read_trace(path)
    assert [(each.line, each.message) for each in error.value.problems] == [
        (2, "request 0: i is '0'"),
        (2, "request 1: t is '-1'"),
        (2, "request 2: 3 blocks hit of 2 in 8 tokens"),
        (2, "request 3: api is '-1.0'"),
        (2, "request 4: agent is '3'"),
        (2, "request 5: o is '1.5'"),
    ]


NO_SESSIONS: list[list[dict[str, Any]]] = [
    [{"id": 1, "block_size": 4, "requests": 7}],
    [{"id": 1, "block_size": 0, "requests": []}],
    [{"id": 1, "block_size": 4, "requests": []}],
    [{"id": 1}],
]


@pytest.mark.parametrize("rows", NO_SESSIONS)
def test_files_without_sessions_are_refused(tmp_path: Path, rows: list[object]) -> None:
    path = tmp_path / "bad.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    with pytest.raises(ScenarioError, match=r"bad\.jsonl\.gz"):
        read_trace(path, KVCacheTester())


# --- the table ---


def test_sessions_begin_by_an_arrival_process_and_keep_their_own_times(tmp_path: Path) -> None:
    path = put(tmp_path, [turn(0, 16), turn(5, 24, 4)], [turn(0, 8)], [turn(1, 8), turn(2, 8, 2)])
    begun = begin_sessions(read_trace(path), Constant(rate_per_s=0.5), np.random.default_rng(0))
    assert columns(begun)[0] == [0, 1, 2, 2, 0]
    assert (begun.arrival_ns // NS_PER_S).tolist() == [0, 2, 4, 5, 5]
    assert columns(begun)[1] == [-1, -1, -1, 2, 0]
    with pytest.raises(ValueError, match="closed loop"):
        begin_sessions(read_trace(path), ClosedLoop(2), np.random.default_rng(0))


def test_the_first_requests_never_wait_for_later_ones(tmp_path: Path) -> None:
    path = put(tmp_path, [turn(0, 16), turn(5, 24, 4)], [turn(0, 8), turn(2, 12, 2)])
    for count in range(1, 5):
        cut = limit(read_trace(path), count)
        assert cut.after is not None
        assert (cut.after < np.arange(count)).all()
        assert cut.sessions is not None
        assert len(cut.sessions) == count
    fast = rate_scale(read_trace(path), 2)
    assert columns(fast)[2] == columns(read_trace(path))[2]
    with pytest.raises(ScenarioError, match="closed loop"):
        write_trace(fast, tmp_path / "out.csv")


# --- playing ---


def chains(num_sessions: int, turns: int, think_ns: int, gap_ns: int = 1000) -> RequestTable:
    """Sessions that begin `gap_ns` apart, with turns of 8 tokens in and 3 out."""
    num = num_sessions * turns
    workload = table([i // turns * gap_ns for i in range(num)], [8] * num, [3] * num)
    workload.sessions = np.repeat(np.arange(num_sessions), turns)
    workload.after = np.array([i - 1 if i % turns else -1 for i in range(num)])
    workload.think_ns = np.where(workload.after < 0, 0, think_ns)
    return workload


@given(st.integers(1, 5), st.integers(1, 6), st.sampled_from([0, 1, 777, 10**6]), st.integers(1, 3))
def test_think_times_are_exact_and_sessions_never_overlap(sessions: int, turns: int, think: int, clients: int) -> None:
    workload = chains(sessions, turns, think)
    requests = play(workload, num_clients=clients).records.requests.as_columns()
    order = np.argsort(requests["request"])
    begin, end = requests["arrival_ns"][order], requests["end_ns"][order]
    assert len(order) == sessions * turns
    assert (requests["status"] == FINISHED).all()
    assert workload.after is not None
    waits = workload.after >= 0
    assert (begin[waits] == end[workload.after[waits]] + think).all()
    assert (begin[~waits] == workload.arrival_ns[~waits]).all()


def test_one_session_is_the_sum_of_its_turns() -> None:
    """A session alone takes the turns' own times and the think times between them, to the nanosecond."""
    alone = play(chains(1, 1, 0)).records.requests.as_columns()["end_ns"][0]
    whole = play(chains(1, 7, 5000)).records.requests.as_columns()["end_ns"].max()
    assert whole == 7 * alone + 6 * 5000


def test_a_session_goes_on_after_a_rejected_turn() -> None:
    workload = chains(1, 3, 10)
    workload.input_tokens[1] = 1000
    requests = play(workload, max_model_len=100).records.requests.as_columns()
    assert requests["status"].tolist() == [FINISHED, REJECTED, FINISHED]
    assert requests["arrival_ns"][2] == requests["end_ns"][1] + 10


def test_what_has_not_arrived_when_the_clock_stops_never_does() -> None:
    requests = play(chains(2, 5, 10**9), until_ns=10**9).records.requests.as_columns()
    assert len(requests["request"]) == 2


def test_one_request_may_release_several() -> None:
    workload = chains(1, 3, 0)
    workload.after = np.array([-1, 0, 0])
    workload.think_ns = np.array([0, 5, 9])
    requests = play(workload).records.requests.as_columns()
    by_request = dict(zip(requests["request"].tolist(), requests["arrival_ns"].tolist(), strict=True))
    end = requests["end_ns"][requests["request"] == 0][0]
    assert (by_request[1], by_request[2]) == (end + 5, end + 9)


def test_turns_find_the_turn_before_on_its_client() -> None:
    """With session affinity all but what a turn adds is in the cache; by turns on other clients it isn't."""
    workload = chains(3, 4, 1000)
    workload.input_tokens = np.tile(np.array([8, 16, 24, 32]), 3)
    workload.block_keys = [tuple(range(100 * s, 100 * s + 2 * (t + 1))) for s in range(3) for t in range(4)]
    found = play(workload, num_clients=3, caching=True, unit_tokens=4, block_size=4, router=SessionAffinity())
    cached = found.records.tasks.as_columns()
    hits = cached["cached_tokens"][cached["kind"] == 0]
    assert sorted(hits.tolist()) == sorted([0, 8, 16, 24] * 3)


# --- drawn ---


def draw(seed: int = 0, **changes: Any) -> RequestTable:
    values: dict[str, Any] = {
        "turns": Uniform(1, 6), "input_tokens": Uniform(3, 90), "output_tokens": Uniform(1, 40),
        "think_ms": Uniform(1, 5000), "system_tokens": 70, "hash_block_size": 16,
    }  # fmt: skip

    def rng_of(purpose: str) -> np.random.Generator:
        return np.random.default_rng([seed, *purpose.encode()])

    return draw_sessions(20, Poisson(2.0), rng_of=rng_of, **(values | changes))


@given(st.integers(0, 50))
def test_each_drawn_prompt_begins_with_all_that_was_said(seed: int) -> None:
    drawn = draw(seed)
    assert drawn.after is not None
    assert drawn.block_keys is not None
    assert drawn.sessions is not None
    common = drawn.block_keys[0][: 70 // 16]
    for i, before in enumerate(drawn.after.tolist()):
        keys, prompt = drawn.block_keys[i], int(drawn.input_tokens[i])
        assert len(keys) == prompt // 16
        assert keys[: len(common)] == common
        if before < 0:
            assert 73 <= prompt <= 160
            continue
        said = int(drawn.input_tokens[before] + drawn.output_tokens[before])
        assert before < i
        assert drawn.sessions[before] == drawn.sessions[i]
        assert 3 <= prompt - said <= 90
        assert keys[: len(drawn.block_keys[before])] == drawn.block_keys[before]
    others = [set(k[len(common) :]) for k, b in zip(drawn.block_keys, drawn.after.tolist(), strict=True) if b < 0]
    assert sum(map(len, others)) == len(set().union(*others))


def test_draws_of_one_purpose_leave_the_others() -> None:
    one, other = draw(), draw(think_ms=Fixed(9), system_tokens=0)
    assert sorted(one.output_tokens.tolist()) == sorted(other.output_tokens.tolist())
    assert sorted((one.input_tokens - 70).tolist()) == sorted(other.input_tokens.tolist())


def test_a_scenario_draws_sessions(tmp_path: Path) -> None:
    text = """
name: sessions
workload:
  sessions: {num_sessions: 6, turns: 4, think_ms: 500, system_tokens: 512}
  arrivals: {poisson: {rate_per_s: 2}}
  input_tokens: 300
  output_tokens: 20
clients:
  gpu: {device: h100-sxm, count: 2, model: llama-3.1-8b, perf: roofline, engine: ideal}
routing: session_affinity
"""
    path = tmp_path / "sessions.yaml"
    path.write_text(text)
    result = run(load(path), check=True)
    assert result.metrics["requests"]["finished"] == 24
    assert not result.metrics["open_loop"]
    path.write_text(text.replace("  input_tokens", "  num_requests: 9\n  input_tokens"))
    with pytest.raises(ScenarioError, match="num_requests is not for sessions"):
        load(path)


def test_a_scenario_replays_sessions(tmp_path: Path) -> None:
    put(tmp_path, *[[turn(0, 160, 0), turn(5, 240, 30, think=3.5)]] * 3, block_size=4)
    path = tmp_path / "replay.yaml"
    path.write_text(
        "name: replay\nworkload: {trace: traces.jsonl, arrivals: {constant: {rate_per_s: 1}},"
        " format: {kv_cache_tester: {hash_block_size: 16, num_sessions: 2}}}\n"
        "clients: {gpu: {device: h100-sxm, model: llama-3.1-8b, perf: roofline, engine: vllm-0.10}}\n"
    )
    assert sole_table(load(path)).arrival_ns.tolist() == [0, NS_PER_S, 5 * NS_PER_S, 6 * NS_PER_S]
    result = run(load(path), check=True)
    requests = result.records.requests.as_columns()
    assert sorted(requests["cached_tokens"].tolist()) == [0, 0, 112, 112]
    gaps = requests["arrival_ns"][2:] - requests["end_ns"][:2]
    assert gaps.tolist() == [3_500_000_000] * 2


def test_all_sessions_may_begin_at_once() -> None:
    drawn = draw_sessions(3, AllAtOnce(), turns=Fixed(2), input_tokens=Fixed(5), output_tokens=Fixed(1),
                          think_ms=Fixed(1), rng_of=lambda _: np.random.default_rng(0))  # fmt: skip
    assert drawn.arrival_ns.tolist() == [0, 0, 0, NS_PER_MS, NS_PER_MS, NS_PER_MS]


# --- the public trace ---

PUBLIC = "kv_cache_tester/agentic_traces_compact.jsonl.gz"


def test_prompts_are_put_together_from_stretches() -> None:
    keys = Stretches([(range(3),), (range(2), range(3, 5)), ()], 5)
    assert list(keys) == [(0, 1, 2), (0, 1, 3, 4), ()]
    assert list(keys[1:]) == [(0, 1, 3, 4), ()]
    assert list(keys.reordered([2, 0])) == [(), (0, 1, 2)]


def test_the_public_trace_is_whole() -> None:
    try:
        path = find_trace(PUBLIC, Path(), os.environ)
    except ScenarioError:
        pytest.skip(f"MIST_DATA names no folder with {PUBLIC}")
    read = read_trace(path)
    assert len(read) == 49_334
    assert read.sessions is not None
    assert len(np.unique(read.sessions)) == 710
    assert read.after is not None
    assert (read.after < np.arange(len(read))).all()
    assert read.block_keys is not None
    # each block that wasn't seen before in its session is a key of its own, and no other
    assert 1 + max(max(keys) for keys in read.block_keys) == 94_310_647 - 90_859_688
