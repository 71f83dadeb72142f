"""Prefix hits that the workload states: not computed, but held; in host memory they are fetched first."""

from __future__ import annotations

import gzip
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kit import POLICIES, LinearSteps, Run, SmallScenario, engine, play, rows, table
from mist.batching.chunked import Chunked
from mist.errors import InvariantError, ScenarioError
from mist.metrics import ClientInfo, summarise
from mist.records import FINISHED, Records, Table
from mist.residents import Residents
from mist.scenario import load
from mist.testing import random_scenario
from mist.testing.cluster import KVLink
from mist.workload.columns import Columns, write_trace
from scenarios import sole_table

#: 10 bytes a token at one byte per ns, and 500 ns
HOST = KVLink(10, 1e9, 500)


def column(records: Records, table_name: str, name: str) -> list[int]:
    return list(getattr(records, table_name).as_columns()[name].tolist())


def alone(prompt: int, cached: int, output: int = 1, **options: Any) -> Run:
    return play(table([0], [prompt], [output], cached_tokens=[cached]), **{"caching": True, **options})


# --- in device memory ---


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("cached", [0, 1, 15, 16, 17, 98, 99])
def test_hits_are_held_but_not_computed(policy: Any, cached: int) -> None:
    run = alone(100, cached, policy=policy)
    assert column(run.records, "steps", "num_prefill_tokens") == [100 - cached]
    assert column(run.records, "steps", "kv_blocks") == [7]
    assert column(run.records, "requests", "cached_tokens") == [cached]
    assert column(run.records, "requests", "first_token_ns") == [LinearSteps().of(100 - cached, 0, 0, 1)]


def test_at_least_one_token_is_computed() -> None:
    assert column(alone(100, 100).records, "steps", "num_prefill_tokens") == [1]
    assert column(alone(1, 1).records, "steps", "num_prefill_tokens") == [1]


def test_without_prefix_caching_nothing_is_found() -> None:
    assert column(alone(100, 40, caching=False).records, "steps", "num_prefill_tokens") == [100]


def test_chunks_begin_behind_the_hit() -> None:
    """60 of 100 tokens are there: chunks of 16, 16 and 8, not of 16 less the hit each."""
    run = alone(100, 60, policy=lambda: Chunked(16, 4))
    assert column(run.records, "steps", "num_prefill_tokens") == [16, 16, 8]


def test_of_a_stated_and_a_matched_hit_the_longer_counts() -> None:
    """The second prompt begins like the first, of which two units of 16 tokens match."""
    keys: list[tuple[int, ...]] = [(1, 2, 3), (1, 2, 4)]
    for stated, found in ((5, 32), (40, 40)):
        workload = table([0, 10**6], [48, 48], [1, 1], keys, cached_tokens=[0, stated])
        run = play(workload, caching=True, unit_tokens=16)
        assert column(run.records, "requests", "cached_tokens") == [0, found]


def test_a_preempted_task_finds_them_again_and_counts_them_once() -> None:
    workload = table([0, 0], [24, 24], [30, 30], cached_tokens=[10, 10])
    run = play(workload, caching=True, num_blocks=6, policy=lambda: Chunked(64, 4), host=HOST)
    assert sum(column(run.records, "requests", "num_preemptions")) > 0
    assert column(run.records, "requests", "cached_tokens") == [10, 10]
    assert len(run.records.transfers) == 2


def test_a_decode_that_was_handed_over_is_not_fetched() -> None:
    serves = [("prefill",), ("decode",)]
    workload = table([0], [24], [30], cached_tokens=[10])
    run = play(workload, caching=True, num_clients=2, serves=serves, nic=KVLink(10), host=HOST)
    assert column(run.records, "transfers", "sender") == [-1, 0]
    assert column(run.records, "transfers", "bytes") == [100, 240]


def random_hits(seed: int, **options: Any) -> Run:
    scenario, rng = random_scenario(seed), random.Random(seed)

    class Stated(SmallScenario):
        def workload(self) -> Any:
            made = super().workload()
            made.cached_tokens = np.array([rng.randint(0, n) for n in made.input_tokens.tolist()])
            return made

    fields = {name: getattr(scenario, name) for name in SmallScenario.__dataclass_fields__}
    fields |= {"caching": True, "num_blocks": max(1, scenario.num_blocks // 2)}
    return Stated(**fields).play(POLICIES[seed % len(POLICIES)], **options)


@pytest.mark.parametrize("host", [None, HOST])
def test_random_workloads_with_hits_obey_the_laws(host: KVLink | None) -> None:
    preemptions = hits = 0
    for seed in range(300):
        run = random_hits(seed, host=host, engine_profile=engine(request_ns=seed % 2 * 300))
        requests = run.records.requests.as_columns()
        preemptions += int(requests["num_preemptions"].sum())
        hits += int(requests["cached_tokens"].sum())
        once = (requests["status"] == FINISHED) & (requests["num_preemptions"] == 0)
        assert (requests["cached_tokens"] < requests["input_tokens"])[once].all()
    assert preemptions > 10
    assert hits > 1000


def test_no_stated_hits_are_no_hits() -> None:
    for seed in range(50):
        scenario = random_scenario(seed)
        workload = scenario.workload()
        workload.cached_tokens = np.zeros(len(workload), np.int64)
        sizes: dict[str, Any] = {"num_blocks": scenario.num_blocks, "block_size": scenario.block_size, "caching": True}
        with_zeros = play(workload, host=HOST, **sizes)
        workload.cached_tokens = None
        assert rows(with_zeros.records) == rows(play(workload, **sizes).records)


# --- in host memory ---


def test_a_fetch_takes_its_time_before_the_first_chunk() -> None:
    run = alone(100, 60, host=HOST, engine_profile=engine(request_ns=70))
    arrival = 70 + 600 + 500
    assert column(run.records, "steps", "start_ns") == [arrival]
    assert column(run.records, "steps", "num_prefill_tokens") == [40]
    assert column(run.records, "transfers", "queued_ns") == [70]
    assert column(run.records, "transfers", "end_ns") == [arrival]
    assert column(run.records, "transfers", "sender") == [-1]
    summary = summarise(run.records, clients=[ClientInfo("gpu-0", "gpu")])
    assert summary["prefix_fetch"]["time_s"]["mean"] == pytest.approx(1100e-9)
    assert summary["kv_transfer"] is None
    assert summary["stages"]["prefill"]["wait_s"]["mean"] == pytest.approx(arrival * 1e-9)


def test_fetches_of_one_client_share_its_link_and_others_pass_them() -> None:
    run = play(table([0, 0, 0], [100, 100, 50], [1, 1, 1], cached_tokens=[60, 60, 0]), caching=True, host=HOST)
    assert column(run.records, "transfers", "start_ns") == [0, 0]
    assert column(run.records, "transfers", "end_ns") == [1700, 1700]
    assert run.records.tasks.as_columns()["started_ns"].min() == 0
    assert column(run.records, "steps", "num_prefill_tokens")[0] == 50


def test_hits_that_are_computed_all_the_same_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Table.__init__

    def tampering(self: Table, columns: Any) -> None:
        original(self, columns)
        if "how" in columns:
            place, pack = columns.index("cached_tokens"), self.pack
            self.pack = lambda *row: pack(*row[:place], 0, *row[place + 1 :])

    monkeypatch.setattr(Table, "__init__", tampering)
    with pytest.raises(InvariantError, match="computed and found tokens of a request are not those of its prompt"):
        alone(100, 60)


def test_hits_without_blocks_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Residents.admit

    def admit(self: Residents, task: Any, max_tokens: int, *, whole: bool = False) -> int:
        chunk = original(self, task, max_tokens, whole=whole)
        if chunk:
            self.kv.free += self.kv.blocks_for(task.cached_tokens)
        return chunk

    monkeypatch.setattr(Residents, "admit", admit)
    with pytest.raises(InvariantError, match="KV blocks"):
        alone(100, 60, num_blocks=100)


# --- what a user writes ---

HITS = """\
workload: {concurrency: 1, num_requests: 3, input_tokens: 8000, output_tokens: 2, cached_tokens: 7000}
clients: {gpu: {device: h100-sxm, model: llama-3.1-8b}}
perf: roofline
"""


def scenario(folder: Path, text: str) -> Any:
    (folder / "hits.yaml").write_text(text)
    return load(folder / "hits.yaml")


def test_a_scenario_with_hits_in_either_tier(tmp_path: Path) -> None:
    near = scenario(tmp_path, HITS).run(check=True)
    far = scenario(tmp_path, HITS.replace("8b}", "8b, kv_cache: {prefix_tier: cpu}}")).run(check=True)
    none = scenario(tmp_path, HITS.replace(", cached_tokens: 7000", ", cached_tokens: 0")).run(check=True)
    assert near.requests["cached_tokens"].tolist() == far.requests["cached_tokens"].tolist() == [7000] * 3
    fetched = far.summary()["prefix_fetch"]
    assert fetched["mean_bytes"] == 7000 * 131_072
    assert fetched["time_s"]["mean"] == pytest.approx(7000 * 131_072 / 51e9 + 10e-6)
    assert far.requests["ttft_s"] - near.requests["ttft_s"] == pytest.approx(fetched["time_s"]["mean"])
    assert none.requests["ttft_s"].min() > 2 * near.requests["ttft_s"].max()
    assert "prefix fetch" in str(far)
    assert near.summary()["clients"]["gpu"]["prefix_hit_rate"] == pytest.approx(7 / 8)


def test_each_rank_fetches_its_share(tmp_path: Path) -> None:
    whole, split = (
        scenario(tmp_path, HITS.replace("8b}", f"8b, tp: {tp}, kv_cache: {{prefix_tier: cpu}}}}")).run().summary()
        for tp in (1, 4)
    )
    assert whole["prefix_fetch"]["mean_bytes"] == split["prefix_fetch"]["mean_bytes"] == 7000 * 131_072
    alone, shared = (each["prefix_fetch"]["time_s"]["p50"] - 10e-6 for each in (whole, split))
    assert alone == pytest.approx(4 * shared, rel=0.02)


def test_hits_have_a_random_stream_of_their_own(tmp_path: Path) -> None:
    text = HITS.replace("cached_tokens: 7000", "cached_tokens: {uniform: {low: 1, high: 20000}}")
    plain, drawn = (sole_table(scenario(tmp_path, each)) for each in (HITS, text))
    assert plain.input_tokens.tolist() == drawn.input_tokens.tolist()
    assert drawn.cached_tokens is not None
    assert drawn.cached_tokens.max() == 7999
    assert len(set(drawn.cached_tokens.tolist())) > 1


def test_a_pool_that_finds_nothing_is_told(tmp_path: Path) -> None:
    text = HITS.replace("8b}", "8b, kv_cache: {enable_prefix_caching: false}}")
    result = scenario(tmp_path, text).run()
    assert result.requests["cached_tokens"].tolist() == [0] * 3
    (tmp_path / "in.csv").write_text(TRACE)
    traced = "workload: {trace: in.csv}\n" + text.partition("\n")[2]
    for each in (result, scenario(tmp_path, traced).run()):
        assert any("gpu: prefix caching is off" in note for note in each.metrics["notes"])


TRACE = "arrival_ns,input_tokens,output_tokens,cached_tokens\n0,100,3,60\n5,10,3,10\n9,20,3,0\n"


@pytest.mark.parametrize("name", ["out.csv", "out.jsonl.gz"])
def test_a_trace_has_a_column_of_hits(tmp_path: Path, name: str) -> None:
    (tmp_path / "in.csv").write_text(TRACE)
    read = Columns().read(tmp_path / "in.csv")
    assert read.cached_tokens is not None
    assert read.cached_tokens.tolist() == [60, 9, 0]
    write_trace(read, tmp_path / name)
    again = Columns().read(tmp_path / name)
    assert again.cached_tokens is not None
    assert again.cached_tokens.tolist() == [60, 9, 0]
    text = HITS.replace("concurrency: 1, num_requests: 3, input_tokens: 8000, output_tokens: 2", "trace: in.csv")
    assert scenario(tmp_path, text).tenants[""].workload.cached_tokens is not None
    own = scenario(tmp_path, text.replace(", cached_tokens: 7000", ""))
    assert own.run(check=True).requests["cached_tokens"].tolist() == [60, 9, 0]
    stated = sole_table(scenario(tmp_path, text.replace("cached_tokens: 7000", "cached_tokens: 15, limit: 2")))
    assert stated.cached_tokens is not None
    assert stated.cached_tokens.tolist() == [15, 9]


def test_a_named_column_of_hits_must_be_there_and_hold_tokens(tmp_path: Path) -> None:
    path = tmp_path / "in.csv.gz"
    path.write_bytes(gzip.compress(TRACE.replace("cached_tokens", "found").encode()))
    named = Columns(cached_tokens="found").read(path)
    assert named.cached_tokens is not None
    assert named.cached_tokens.tolist() == [60, 9, 0]
    assert Columns().read(path).cached_tokens is None
    with pytest.raises(ScenarioError, match="no column 'hits'"):
        Columns(cached_tokens="hits").read(path)
    path.write_text(TRACE.replace(",60", ",-6"))
    with pytest.raises(ScenarioError, match="cached_tokens is '-6'"):
        Columns().read(path)
