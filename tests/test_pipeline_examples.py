"""The examples of pipelines: every stage runs, hand-offs have the bytes of what they carry, sharing and reuse tell.

Runs them as they are, with the ledger, and few requests. It never checks a time, only which is longer.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from mist.cli import main
from mist.metrics.stages import stage_times
from mist.request import PREFILL
from mist.scenario import load
from mist.scenario.result import Result

EXAMPLES = Path(__file__).parent.parent / "examples"
NAMES = ("question-answering", "guarded-qa", "news-search", "code-generation", "chat-support", "shared-host")


def run(name: str, num_requests: int, *sets: str) -> Result:
    return load(EXAMPLES / f"{name}.yaml", [f"workload.num_requests={num_requests}", *sets]).run(check=True)


@pytest.mark.parametrize(
    ("name", "num_requests"), [*((name, 60) for name in NAMES), ("reasoning-math", 8), ("research-agent", 12)]
)
def test_times_of_stages_sum_to_e2e_for_every_request(name: str, num_requests: int) -> None:
    result = run(name, num_requests)
    records = result.records
    requests, tasks, transfers = (table.as_columns() for table in (records.requests, records.tasks, records.transfers))
    counts = result.metrics["requests"]
    assert counts["finished"] + counts["refused"] == num_requests
    assert {records.stage_kinds[kind] for kind in set(tasks["kind"].tolist())} == set(load(result.scenario).stages)
    order = np.argsort(tasks["request"], kind="stable")
    tasks = {key: values[order] for key, values in tasks.items()}
    times = stage_times(requests, tasks, len(records.stage_kinds), transfers)
    assert times.min() >= 0
    assert times.sum(axis=(1, 2)).tolist() == (requests["end_ns"] - requests["arrival_ns"]).tolist()


@pytest.mark.parametrize("name", [*NAMES, "research-agent"])
def test_what_check_resolves_reads_back_equal(name: str, tmp_path: Path) -> None:
    told = CliRunner().invoke(main, ["check", "--resolved", str(EXAMPLES / f"{name}.yaml")])
    assert told.exit_code == 0, told.output
    path = tmp_path / f"{name}.yaml"
    path.write_text(told.stdout)
    assert load(path) == load(EXAMPLES / f"{name}.yaml")


def test_news_search_sends_what_each_stage_reads() -> None:
    result = run("news-search", 3)
    rows = result.transfers
    prompts = result.requests["input_tokens"].tolist()
    sent: dict[tuple[str, str], dict[int, int]] = {}
    for request, sender, receiver, num_bytes in zip(
        *(list(rows[name]) for name in ("request", "sender", "receiver", "bytes")), strict=True
    ):
        sent.setdefault((sender, receiver), {})[int(request)] = int(num_bytes)
    tasks = result.records.tasks.as_columns()
    is_embed = tasks["kind"] == result.records.stage_kinds.index("embed")
    questions = dict(zip(tasks["request"][is_embed].tolist(), tasks["computed_tokens"][is_embed].tolist(), strict=True))
    assert sent == {
        ("embedder", "index"): dict.fromkeys(range(3), 768 * 4),
        ("index", "reranker"): {i: 4 * questions[i] + 20 * (8 + 512 * 4) for i in range(3)},
        ("reranker", "prefill"): {i: 4 * (prompts[i]) for i in range(3)},
        ("prefill", "decode"): {i: 128 * 1024 * (prompts[i]) for i in range(3)},
    }


def test_guards_beside_the_model_show_the_first_token_sooner() -> None:
    beside, before = (run("guarded-qa", 200, f"pipeline.guarded_qa.beside={beside}") for beside in ("true", "false"))
    assert beside.metrics["ttft_s"]["mean"] < before.metrics["ttft_s"]["mean"]
    shown = [result.requests["output_tokens"] == 0 for result in (beside, before)]
    assert np.array_equal(*shown)  # the same requests are refused
    assert 0 < shown[0].sum() < 20
    prefills = [
        int((result.records.tasks.as_columns()["kind"] == result.records.stage_kinds.index(PREFILL)).sum())
        for result in (beside, before)
    ]
    assert prefills[0] - prefills[1] == shown[0].sum()


def test_a_store_spares_what_it_has_and_nothing_where_computing_is_sooner() -> None:
    kept, nothing, slow = (
        run("code-generation", 200, *sets)
        for sets in ((), ("memories.platform.hit_rate=0",), ("memories.platform.memory=rack-ssd",))
    )
    assert kept.metrics["ttft_s"]["mean"] < nothing.metrics["ttft_s"]["mean"]
    assert set(kept.transfers["sender"]) == {"store"}
    assert kept.metrics["memories"]["store"]["hits"] == slow.metrics["memories"]["store"]["hits"] > 0
    assert len(slow.transfers["bytes"]) == 0, "each fetch is estimated to take longer than computing"
    assert (slow.requests["ttft_s"] == nothing.requests["ttft_s"]).all()


def test_a_host_tier_takes_its_hits_from_the_store() -> None:
    result = run("code-generation", 200, "clients.llama-70b.kv_cache.tiers=[host]")
    assert set(result.transfers["sender"]) == {"store", "host-0", "host-1"}
    fetched = {name: figures["fetched_bytes"] for name, figures in result.metrics["memories"].items()}
    assert 0 < fetched["store"] < run("code-generation", 200).metrics["memories"]["store"]["fetched_bytes"]


def test_an_index_is_slower_beside_the_kv_store_on_its_host() -> None:
    together, apart = run("chat-support", 300), run("chat-support", 300, "network.placement.index=spare")
    times = [result.metrics["stages"]["retrieve"]["serve_s"]["mean"] for result in (together, apart)]
    assert times[0] > times[1]
    bytes_sent = [sorted(result.transfers["bytes"].tolist()) for result in (together, apart)]
    assert bytes_sent[0] == bytes_sent[1], "placement moves bytes, and makes none"
