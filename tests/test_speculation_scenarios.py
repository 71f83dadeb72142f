"""Speculative decoding in scenarios: what may be written, what is refused, memory and limits."""

from __future__ import annotations

from pathlib import Path

import pytest

from mist.scenario import Scenario, load
from mist.scenario.build import run
from mist.speculation import AcceptedLengths
from mist.testing import record_bytes
from scenarios import SMALL, places, problems, read

SPECULATING = SMALL.replace("model: llama-3.1-8b}", "model: llama-3.1-8b, perf: roofline, speculation: {%s}}")


def scenario(folder: Path, settings: str, *sets: str) -> Scenario:
    return read(folder, SPECULATING % settings, *sets)


@pytest.mark.parametrize(
    ("settings", "draft"),
    [
        ("method: mtp, num_draft_tokens: 3, acceptance: 0.6", "mtp head of"),
        ("draft_model: llama-3.2-1b, num_draft_tokens: 4, acceptance: 0.7", "llama-3.2-1b"),
        ("draft_model: ./config.json, num_draft_tokens: 1, acceptance: 0.9", ""),
        ("method: ngram, num_draft_tokens: 2, acceptance: 0.25", ""),
        ("method: eagle, num_draft_tokens: 2, acceptance: 1, draft_cost: 0.1", "eagle head of"),
    ],
)
def test_a_pool_speculates(folder: Path, settings: str, draft: str) -> None:
    loaded = scenario(folder, settings)
    pool = loaded.pools["gpu"]
    assert draft in (pool.draft.model.name.lower() if pool.draft else "")
    again = Scenario.from_mapping(loaded.resolved())
    assert again == loaded
    result = run(loaded, check=True)
    assert pool.speculation is not None
    k, share = pool.speculation.num_draft_tokens, pool.speculation.accepted_share
    note = next(n for n in result.metrics["notes"] if "tokens per sequence and decode step" in n)
    assert float(note.split()[1]) == pytest.approx(1 + k * share, rel=0.05)
    plain = read(folder, SMALL, "clients.gpu.perf=roofline")
    assert result.metrics["tpot_s"]["mean"] < run(plain).metrics["tpot_s"]["mean"]
    assert result.metrics["itl_s"]["mean"] >= result.metrics["tpot_s"]["mean"]


def test_drafts_need_memory(folder: Path) -> None:
    plain = read(folder, SMALL).pools["gpu"].kv_capacity()
    head = scenario(folder, "method: mtp, num_draft_tokens: 3, acceptance: 0.6").pools["gpu"].kv_capacity()
    whole = scenario(folder, "draft_model: llama-3.2-1b, num_draft_tokens: 3, acceptance: 0.6")
    draft = whole.pools["gpu"].kv_capacity()
    assert plain.block_bytes * 33 == head.block_bytes * 32  # a layer more
    llama_layer = 2 * (4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336)
    assert head.weight_bytes - plain.weight_bytes == pytest.approx(llama_layer, rel=1e-3)
    assert draft.weight_bytes - plain.weight_bytes == pytest.approx(2 * 1.236e9, rel=0.01)
    assert draft.block_bytes - plain.block_bytes == 16 * 2 * 2 * 16 * 8 * 64


@pytest.mark.parametrize(
    ("settings", "sets", "path", "says"),
    [
        ("num_draft_tokens: 3, acceptance: 0.5", (), "method", "it isn't said what drafts"),
        ("num_draft_tokens: 3, acceptance: 0.5, method: draft_model", (), "method", "no draft_model is given"),
        ("num_draft_tokens: 3, acceptance: 0.5, method: mtp, draft_model: llama-3.2-1b", (), "method", "the method is"),
        ("num_draft_tokens: 3, acceptance: 1.5, method: mtp", (), "acceptance", "at most 1"),
        ("num_draft_tokens: 3, method: mtp", (), "acceptance", "how often drafts are accepted"),
        ("num_draft_tokens: 3, acceptance: 0.5, accepted_length: 2, method: mtp", (), "accepted_length", "both given"),
        ("num_draft_tokens: 3, accepted_length: 4.5, method: mtp", (), "accepted_length", "emits 4 tokens at most"),
        ("num_draft_tokens: 3, accepted_length: 0.5, method: mtp", (), "accepted_length", "at least 1"),
        ("num_draft_tokens: 9, acceptance: glm-5.2-mtp-thinking, method: mtp", (), "acceptance", "up to 8 drafted"),
        ("num_draft_tokens: 3, acceptance: glm-5.2, method: mtp", (), "acceptance", "no measured acceptance 'glm-5.2'"),
        ("num_draft_tokens: 3, acceptance: {name: a, accepted_lengths: [2.5]}, method: mtp", (), "acceptance",
         "2.5 for 1 drafted"),
        ("num_draft_tokens: 3, acceptance: true, method: mtp", (), "acceptance", ""),
        ("num_draft_tokens: 0, acceptance: 0.5, method: mtp", (), "num_draft_tokens", "at least 1"),
        ("num_draft_tokens: 3, acceptance: 0.5, method: medusa", (), "method", "one of"),
        ("num_draft_tokens: 3, acceptance: 0.5, draft_model: nothing", (), "draft_model", "nothing"),
        ("num_draft_tokens: 3, acceptance: 0.5, method: mtp", ("clients.gpu.pp=2",), "speculation", "pipeline stages"),
        ("num_draft_tokens: 3, acceptance: 0.5, method: mtp",
         ("clients.gpu.batching={chunked: {max_num_seqs: 256, max_num_batched_tokens: 1000}}",),
         "batching.chunked", "1,000 tokens a step don't hold 256 sequences of 4"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_told(folder: Path, settings: str, sets: tuple[str, ...], path: str, says: str) -> None:
    found = problems(folder, SPECULATING % settings, *sets)
    assert any(path in p.message or path in p.file for p in found)
    assert any(says in p.message for p in found)
    assert sets or all(line >= 1 for line, _ in places(found))


def test_default_limits_leave_room_for_the_drafts(folder: Path) -> None:
    limits = scenario(folder, "method: ngram, num_draft_tokens: 40, acceptance: 0.5").pools["gpu"].batching.build()
    assert limits.max_num_seqs * 41 <= limits.max_num_batched_tokens


def test_another_policy_draws_the_same_paths(folder: Path) -> None:
    """Common random numbers: decode steps of each request, under chunked and continuous batching."""
    found = []
    for policy in ("chunked", "continuous"):
        loaded = load(scenario(folder, "method: ngram, num_draft_tokens: 3, acceptance: 0.5"),
                      [f"clients.gpu.batching={policy}"])  # fmt: skip
        tasks = run(loaded, check=True).records.tasks.as_columns()
        joined = tasks["join_step"] >= 0
        steps = (tasks["last_step"] - tasks["join_step"])[joined]
        found.append(dict(zip(tasks["request"][joined].tolist(), steps.tolist(), strict=True)))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("settings", "share"),
    [
        ("acceptance: deepseek-v4-pro-mtp", (2.97 - 1) / 3),
        ("acceptance: DeepSeek-V4-Pro-MTP-thinking", (2.49 - 1) / 3),
        ("accepted_length: 2.4", 1.4 / 3),
        ("accepted_length: 1", 0),
        ("accepted_length: 4", 1),
        ("acceptance: {name: mine, accepted_lengths: [1.5, 1.8, 1.9]}", 0.3),
        ("acceptance: ./mine.yaml", 0.2),
    ],
)
def test_acceptance_in_other_words(folder: Path, settings: str, share: float) -> None:
    (folder / "mine.yaml").write_text("name: mine\naccepted_lengths: [1.2, 1.4, 1.6, 1.8]\n")
    loaded = scenario(folder, f"method: ngram, num_draft_tokens: 3, {settings}")
    settled = loaded.pools["gpu"].speculation
    assert settled is not None
    assert settled.accepted_share == pytest.approx(share, abs=1e-15)
    again = Scenario.from_mapping(loaded.resolved())
    assert again == loaded
    result = run(loaded, check=True)
    told = run(scenario(folder, f"method: ngram, num_draft_tokens: 3, acceptance: {settled.accepted_share!r}"))
    assert record_bytes(result.records) == record_bytes(told.records)
    is_measured = isinstance(settled.acceptance, AcceptedLengths)
    assert any("with 3 drafted were measured of" in note for note in result.metrics["notes"]) == is_measured
