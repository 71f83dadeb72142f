"""The band that every result carries: from checked comparisons to a sentence and a JSON value, or an honest no."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from measured import invoke
from mist.scenario import bands as reader
from mist.scenario import catalogue, load
from mist.scenario.remarks import remarks
from mist.validation.bands import bands
from mist.validation.evaluate import Comparison

#: names of points of the checking part, and one of the other
CHECKED, FITTED = ("b", "c", "d"), "a"
SCENARIO = {
    "workload": {"concurrency": 1, "num_requests": 2, "input_tokens": 64, "output_tokens": 4},
    "clients": {"gpu": {"device": "h100-sxm", "model": "llama-3.1-8b", "engine": "vllm-0.15"}},
    "perf": "roofline",
}


def compared(error: float, metric: str = "ttft_mean_ms", **values: Any) -> Comparison:
    fields: dict[str, Any] = {"point": "b", "source": "s", "trust": "A", "saturated": False, "device": "h100-sxm",
                              "profile": "vllm-0.15", "perf": "roofline"}  # fmt: skip
    return Comparison(id="i", metric=metric, measured=1.0, simulated=1 + error / 100, ape=abs(error), error=error,
                      engine="vllm", model="meta-llama/Llama-3.1-8B-Instruct", **fields | values)  # fmt: skip


def test_only_what_is_checked_trusted_and_not_saturated_makes_a_band() -> None:
    found = bands(
        [compared(5), compared(-9, point="c"), compared(99, point=FITTED), compared(99, trust="C"),
         compared(99, saturated=True), compared(99, metric="ttft_p99_ms"), compared(2, metric="makespan_s")]
    )  # fmt: skip
    assert found == {
        "vllm-0.15": {
            "h100-sxm": {
                "perf": "roofline",
                "points": 2,
                "models": ["meta-llama/Llama-3.1-8B"],
                "ttft": {"n": 2, "median_ape": 7.0, "p90_ape": 8.6},
                "throughput": {"n": 1, "median_ape": 2.0, "p90_ape": 2.0},
            }
        }
    }


def test_the_performance_model_of_most_points_counts() -> None:
    found = bands([compared(5, perf="kernels"), compared(9, perf="kernels", point="c"), compared(50)])
    assert found["vllm-0.15"]["h100-sxm"]["perf"] == "kernels"
    assert found["vllm-0.15"]["h100-sxm"]["ttft"]["n"] == 2


@pytest.fixture
def banded(monkeypatch: pytest.MonkeyPatch) -> Mapping[str, Any]:
    found = bands([compared(5), compared(9, point="c"), compared(3, metric="tpot_mean_ms")])
    monkeypatch.setattr(reader, "_bands", lambda: found)
    return found


def statement(**changes: Any) -> str:
    return remarks(load(SCENARIO, **changes))[-1]


def test_a_result_says_how_far_off_its_kind_was(banded: Mapping[str, Any]) -> None:
    assert statement() == (
        "Expected error (vllm-0.15 on h100-sxm, 2 checked points): "
        "TTFT ±7 % (P90 8.6 %), TPOT ±3 % (P90 3 %), in the median."
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"clients.gpu.device": "l40s"}, "no checked point of vllm-0.15 on l40s"),
        ({"clients.gpu.engine": "sglang-0.5"}, "no checked point of sglang-0.5 on h100-sxm"),
        ({"clients.gpu.engine": {**catalogue.mapping("engines", "vllm-0.15"), "step_overhead_ns": 5}},
         "vllm-0.15 is not as it ships"),
        ({"clients.gpu.device": {**catalogue.mapping("devices", "h100-sxm"), "memory_bytes": "96 GiB"}},
         "h100-sxm is not as it ships"),
        ({"clients.gpu.power_cap_w": 500}, "there is no band for a power cap"),
        ({"clients.gpu.pp": 2}, "there is no band for pp 2"),
        ({"clients.gpu.model": "qwen3-30b-a3b", "clients.gpu.ep": 2, "clients.gpu.attn_dp": 2},
         "there is no band for attn_dp 2"),
        ({"clients.gpu.speculation": {"method": "ngram", "num_draft_tokens": 2, "acceptance": 0.5},
          "clients.gpu.kv_cache.prefix_tier": "cpu"},
         "there is no band for speculative decoding, prefixes in host memory"),
        ({"clients.gpu.serves": ["decode"],
          "clients.first": {**SCENARIO["clients"]["gpu"], "serves": ["prefill"]}},  # type: ignore[index]
         "there is no band for a pool for prefill only"),
        ({"pipeline": {"question_answering": {"before": ["tokenize"], "after": ["detokenize"]}},
          "clients.text": {"device": "epyc-9554", "perf": "cpu_text", "serves": ["tokenize", "detokenize"]}},
         "there is no band for pipelines with tokenize, detokenize"),
        ({"pipeline": "kv_reuse", "clients.store": {"memory": "ddr5", "serves": ["kv_retrieve"]}},
         "there is no band for prefixes from a KV store"),
    ],
)  # fmt: skip
def test_what_nobody_checked_says_so(banded: Mapping[str, Any], changes: dict[str, Any], reason: str) -> None:
    assert statement(**changes) == f"Expected error: not validated here: {reason}."


def test_a_saturated_run_has_no_band(banded: Mapping[str, Any]) -> None:
    workload = {"arrivals": {"poisson": {"rate_per_s": 100}}, "num_requests": 1000, "input_tokens": 4000,
                "output_tokens": 4}  # fmt: skip
    summary = load({**SCENARIO, "workload": workload}).run().summary()
    assert summary["saturated"]
    assert summary["expected_error"]["gpu"]["errors"] == {}
    told = "Expected error: not validated here: this run is saturated, and what was checked isn't."
    assert summary["expected_error"]["gpu"]["statement"] == summary["notes"][-1] == told


def test_another_model_or_another_way_to_price_is_told(
    banded: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = statement(**{"clients.gpu.model": "mistral-7b"})
    assert told.endswith("in the median. Checked with meta-llama/Llama-3.1-8B only.")
    other = {"vllm-0.15": {"h100-sxm": {**banded["vllm-0.15"]["h100-sxm"], "perf": "kernels"}}}
    monkeypatch.setattr(reader, "_bands", lambda: other)
    notes = load(SCENARIO).run().summary()["notes"]
    assert notes[-1].endswith("These were priced by kernels, and this run by roofline: not validated.")


def test_the_command_prints_it_and_the_document_carries_it(banded: Mapping[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump({**SCENARIO, "clients": {
        "one": SCENARIO["clients"]["gpu"], "two": {**SCENARIO["clients"]["gpu"], "device": "l40s"}}}))  # type: ignore[index]  # fmt: skip
    found = json.loads(invoke("run", path, "--json").stdout)["expected_error"]
    assert found["one"]["errors"]["ttft"] == {"n": 2, "median_ape": 7.0, "p90_ape": 8.6}
    assert (found["one"]["points"], found["one"]["perf"]) == (2, "roofline")
    assert (found["two"]["points"], found["two"]["errors"]) == (0, {})
    for command in ("run", "check"):
        text = " ".join(invoke(command, path).stdout.split())
        assert "Expected error (vllm-0.15 on h100-sxm, 2 checked points): TTFT ±7 %" in text
        assert "not validated here: no checked point of vllm-0.15 on l40s." in text


def test_the_bands_that_ship_are_of_engines_and_devices_that_ship() -> None:
    for engine, devices in reader._bands().items():
        assert engine in catalogue.names("engines")
        for device, band in devices.items():
            assert device in catalogue.names("devices")
            assert band["points"] >= 1
            assert reader.KINDS.keys() & band.keys()
