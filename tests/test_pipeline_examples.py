"""The examples of the shipped pipelines: every stage is run, and each hand-off has the bytes of what it carries.

Runs them as they are, with the ledger.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mist.metrics.stages import stage_times
from mist.request import PREFILL
from mist.scenario import load
from mist.scenario.result import Result

EXAMPLES = Path(__file__).parent.parent / "examples"
NAMES = ("question-answering", "guarded-qa", "news-search")


def run(name: str, num_requests: int, *sets: str) -> Result:
    return load(EXAMPLES / f"{name}.yaml", [f"workload.num_requests={num_requests}", *sets]).run(check=True)


@pytest.mark.parametrize(("name", "num_requests"), [*((name, 60) for name in NAMES), ("reasoning-math", 8)])
def test_times_of_stages_sum_to_e2e_for_every_request(name: str, num_requests: int) -> None:
    result = run(name, num_requests)
    records = result.records
    requests, tasks = records.requests.as_columns(), records.tasks.as_columns()
    assert result.metrics["requests"]["finished"] == num_requests
    assert {records.stage_kinds[kind] for kind in set(tasks["kind"].tolist())} == set(load(result.scenario).stages)
    order = np.argsort(tasks["request"], kind="stable")
    times = stage_times(requests, {key: values[order] for key, values in tasks.items()}, len(records.stage_kinds))
    assert times.min() >= 0
    assert times.sum(axis=(1, 2)).tolist() == (requests["end_ns"] - requests["arrival_ns"]).tolist()


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
        ("reranker", "prefill"): {i: 4 * (prompts[i] + 5 * 512) for i in range(3)},
        ("prefill", "decode"): {i: 128 * 1024 * (prompts[i] + 5 * 512) for i in range(3)},
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
