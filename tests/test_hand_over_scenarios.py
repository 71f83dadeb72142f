"""Scenarios with prefill and decode in pools of their own: the example, bytes, notes, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mist.errors import ScenarioError
from mist.report.timeline import write_timeline
from mist.scenario import load

EXAMPLE = Path(__file__).parent.parent / "examples" / "prefill-decode.yaml"
POOLS = """\
seed: 2
workload: {arrivals: {poisson: {rate_per_s: 4}}, num_requests: 60, input_tokens: 1000, output_tokens: 20}
clients:
  prefill: {device: h100-sxm, model: llama-3.1-8b, serves: [prefill], count: 2}
  decode: {device: a100-sxm-80gb, model: llama-3.1-8b, serves: [decode]}
perf: roofline
"""
NETWORK = "network: {kv_transfer: {bandwidth: 50 GB/s, latency: 1 ms, efficiency: 0.8}}\n"


def scenario(folder: Path, text: str) -> Any:
    (folder / "pools.yaml").write_text(text)
    return load(folder / "pools.yaml")


def test_the_example_runs_by_the_laws(tmp_path: Path) -> None:
    result = load(EXAMPLE, ["workload.num_requests=200"]).run(check=True)
    moved = result.summary()["kv_transfer"]
    assert moved["transfers"] > 0
    assert moved["time_s"]["mean"] > 0
    assert "KV transfer" in str(result)
    assert len(result.transfers["request"]) == moved["transfers"]
    json.loads(write_timeline(result, tmp_path / "timeline.json").read_text())


def test_a_scenario_moves_keys_and_values_of_all_layers(tmp_path: Path) -> None:
    result = scenario(tmp_path, POOLS + NETWORK).run(check=True)
    # 2 (K, V) x 32 layers x 8 heads x 128 x 2 bytes a token: 131 MB at 40 GB/s, and 1 ms
    assert set(result.transfers["bytes"].tolist()) == {1000 * 131_072}
    assert result.summary()["kv_transfer"]["time_s"]["p50"] == pytest.approx(131_072_000 / 40e9 + 1e-3)
    assert set(result.transfers["receiver"]) == {"decode"}
    assert set(result.transfers["sender"]) == {"prefill-0", "prefill-1"}
    assert not any("no time" in note for note in result.metrics["notes"])
    again = load(result.scenario)
    assert again.network.kv_transfer is not None
    assert again.run().to_json().split('"timing"')[0] == result.to_json().split('"timing"')[0]


def test_a_narrow_kv_cache_moves_half(tmp_path: Path) -> None:
    text = POOLS.replace("serves: [prefill]", "serves: [prefill], kv_dtype: fp8")
    assert set(scenario(tmp_path, text).run().transfers["bytes"].tolist()) == {1000 * 65_536}


def test_a_transfer_that_costs_nothing_is_told(tmp_path: Path) -> None:
    result = scenario(tmp_path, POOLS).run(check=True)
    assert any("in no time" in note for note in result.metrics["notes"])
    assert result.summary()["kv_transfer"]["time_s"]["p99"] == 0
    one = POOLS.replace(", serves: [prefill], count: 2", "").replace(", serves: [decode]", "")
    assert not any("in no time" in note for note in scenario(tmp_path, one).run().metrics["notes"])


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("a100-sxm-80gb, model: llama-3.1-8b", "a100-sxm-80gb, model: mistral-7b", "which has another model"),
        ("serves: [decode]", "serves: [decode], batching: static", "no static batch can"),
        ("serves: [decode]", "serves: [prefill]", "no client serves the stage 'decode'"),
    ],
)
def test_pools_that_cannot_work_together_are_refused(tmp_path: Path, old: str, new: str, says: str) -> None:
    with pytest.raises(ScenarioError, match=says):
        scenario(tmp_path, POOLS.replace(old, new))
