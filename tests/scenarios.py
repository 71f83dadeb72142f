"""Valid scenarios that tests of the schema start from, and how they read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mist.errors import ScenarioError
from mist.scenario import Scenario, load
from mist.scenario.tables import build_tables
from mist.workload import RequestTable

SMALL = """\
name: small
seed: 3
workload:
  arrivals: {poisson: {rate_per_s: 4}}
  num_requests: 100
  lengths: azure-conversation
clients:
  gpu: {device: h100-sxm, model: llama-3.1-8b}
"""

LARGE = """\
name: large
seed: 11
workload:
  concurrency: 16
  num_requests: 50
  input_tokens: {lognormal: {mean: 900, cv: 1.5, max: 8000}}
  output_tokens: 128
pipeline: [prefill, decode]
clients:
  big:
    device: h100-sxm
    count: 2
    tp: 4
    model: meta-llama/Llama-3.1-70B-Instruct
    weights_dtype: fp8
    kv_dtype: fp8
    serves: [prefill, decode]
    engine: vllm-0.10
    batching: {chunked: {max_num_batched_tokens: 512, max_num_seqs: 64}}
    kv_cache: {num_blocks: 4000, block_size: 32, watermark: 0.01, enable_prefix_caching: false}
    perf: [roofline]
    max_model_len: 16384
  own:
    device:
      name: card
      peak_tflops: {bf16: 400, fp8: 800}
      memory_bytes: 96 GiB
      memory_bytes_per_s: 3 TB/s
    model: llama-3.1-8b
    engine: {name: mine, step_overhead_ns: 1 ms, max_num_seqs: 32}
    kv_cache: {capacity_tokens: 100000}
routing: {prefill: least_outstanding, decode: {round_robin: {}}}
slo: {ttft_s: {p50: 0.5, p99: 1.5}, e2e_s: {mean: 20}}
warmup_s: 5
window_s: 10:60
max_time_s: 3600
perf: {roofline: {}}
"""

TRACED = """\
workload:
  trace: trace.csv
  columns: {arrival: at_s, input_tokens: prompt, output_tokens: answer}
  rate_scale: 0.5
  limit: 2
clients:
  a100:
    device: a100-sxm-80gb
    model: ./config.json
    batching: static
routing: round_robin
window_s: 30
warmup_s: 1
"""


def read(folder: Path, text: str, *sets: str) -> Scenario:
    path = folder / "case.yaml"
    path.write_text(text)
    return load(path, sets)


def problems(folder: Path, text: str, *sets: str) -> list[Any]:
    with pytest.raises(ScenarioError) as caught:
        read(folder, text, *sets)
    return list(caught.value.problems)


def places(found: list[Any]) -> list[tuple[int, int]]:
    return [(p.line, p.column) for p in found]


def sole_table(scenario: Scenario) -> RequestTable:
    """The requests of a scenario with a single workload."""
    (table,) = build_tables(scenario).values()
    return table
