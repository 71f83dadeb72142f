"""Which tasks and clients memories are for: prompts alone, one model's KV caches in a store, and no encoder's.

On whole scenarios of a few requests; the ledger watches every run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mist.scenario import load
from test_memory_scenarios import changed, hashed, problem, scenario

TOLD = {"host": {"memory": "ddr5", "hit_rate": 1.0}}


def of_stages(result: Any) -> set[tuple[str, int]]:
    """(stage kind, tokens found) of all tasks."""
    return set(zip(result.tasks["stage"], result.tasks["cached_tokens"].tolist(), strict=True))


def guarded(memories: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A guard on the client that answers, which reads a text of its own."""
    mapping = scenario(memories, pipeline={"guarded_qa": {"input_guards": ["guard"], "output_guards": []}}, **more)
    cache = {"tiers": ["host"], "fetch": "always", "enable_prefix_caching": False}
    return changed(mapping, count=1, serves=["guard", "prefill", "decode"], kv_cache=cache)


def test_only_prompts_find_what_memories_have_of_prompts(tmp_path: Path) -> None:
    by_rate = load(guarded(TOLD)).run(check=True)
    assert of_stages(by_rate) == {("guard", 0), ("prefill", 3000), ("decode", 0)}
    workload = hashed(tmp_path, [[1, 2], [1, 2]])
    by_content = load(guarded({"host": {"memory": "ddr5"}}, workload=workload)).run(check=True)
    assert of_stages(by_content) == {("guard", 0), ("prefill", 0), ("prefill", 1024), ("decode", 0)}
    assert list(by_content.transfers["kind"]) == ["kv_write", "prefix_fetch"]
