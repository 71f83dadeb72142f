"""Regenerates the catalogue of workloads, src/mist/data/workloads: quantile tables of public traces.

Run by hand as `MIST_DATA=FOLDER python studies/quantile_tables.py`, where FOLDER (or its `traces`) holds the public
traces. It writes marginal distributions only, never a row of a trace.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from servegen import ServeGen

from mist.units import NS_PER_S
from mist.workload import RequestTable, TraceFormat
from mist.workload.azure import Azure
from mist.workload.columns import Columns
from mist.workload.mooncake import Mooncake
from mist.workload.trace import find_trace
from mist.workload.vidur import Vidur

CATALOGUE = Path(__file__).parents[1] / "src" / "mist" / "data" / "workloads"

#: every 2.5 % up to P95, then denser and denser towards the maximum
P = (
    0,
    0.005,
    *(round(0.025 * i, 3) for i in range(1, 39)),
    0.96,
    0.97,
    0.98,
    0.985,
    0.99,
    0.995,
    0.9975,
    0.999,
    0.9995,
    1,
)

HEADER = """\
# Computed from the public trace named below by studies/quantile_tables.py; no row of the trace is in here.
# Marginal distributions only: drawing from them loses the correlation of input with output, the order of requests,
# bursts, and shared prefixes. To compare deployments closely, replay the trace itself.
"""


@dataclass(frozen=True)
class Entry:
    """One workload of the catalogue; `timed` says that the trace's clock is that of one service."""

    name: str
    description: str
    file: str
    trace_format: TraceFormat
    source: str
    licence: str
    timed: bool = True
    #: what its sizes follow from, where it isn't told as such
    assumed: str = ""


_AZURE = "Azure/AzurePublicDataset, {}, Nov 2023; Patel et al., Splitwise, ISCA 2024"
_MOONCAKE = "kvcache-ai/Mooncake, FAST25 {}; Qin et al., Mooncake, FAST 2025"

ENTRIES = (
    Entry(
        "azure-conversation",
        "chat with a hosted LLM service, one hour",
        "azure_llm_2023/AzureLLMInferenceTrace_conv.csv.gz",
        Azure(),
        _AZURE.format("AzureLLMInferenceTrace_conv.csv"),
        "CC-BY-4.0",
    ),
    Entry(
        "azure-code",
        "code completion: long prompts, short answers, one hour",
        "azure_llm_2023/AzureLLMInferenceTrace_code.csv.gz",
        Azure(),
        _AZURE.format("AzureLLMInferenceTrace_code.csv"),
        "CC-BY-4.0",
    ),
    Entry(
        "mooncake-conversation",
        "long-context chat, one hour; its prefixes are not in this table",
        "mooncake_fast25/conversation_trace.jsonl.gz",
        Mooncake(),
        _MOONCAKE.format("conversation_trace.jsonl"),
        "Apache-2.0",
    ),
    Entry(
        "mooncake-synthetic",
        "long-document questions put together from public data sets; its prefixes are not in this table",
        "mooncake_fast25/synthetic_trace.jsonl.gz",
        Mooncake(),
        _MOONCAKE.format("synthetic_trace.jsonl"),
        "Apache-2.0",
    ),
    Entry(
        "arxiv-summarization",
        "summaries of scientific papers, Llama-2 tokens, prompts cut at 4,096 in total; lengths only",
        "vidur/data__processed_traces__arxiv_summarization_stats_llama2_tokenizer_filtered_v2.csv.gz",
        Vidur(),
        "microsoft/vidur, arxiv_summarization_stats_llama2_tokenizer_filtered_v2; Agrawal et al., Vidur, MLSys 2024",
        "MIT",
        timed=False,
    ),
    Entry(
        "ragpulse",
        "questions to a policy assistant with retrieved passages in the prompt, one week",
        "ragpulse/0_trace.jsonl.gz",
        Columns("timestamp", input_tokens="input_length", output_tokens="output_length", time_unit="s"),
        "flashserve/RAGPulse, 0_trace.jsonl; arXiv 2511.12979",
        "MIT",
    ),
    Entry(
        "agentic-coding",
        "steps of coding agents: very long prompts, largely shared; lengths only",
        "kv_cache_tester/agentic_requests.csv.gz",
        Columns(arrival="t_s", input_tokens="in_tokens", output_tokens="out_tokens"),
        "callanjfox/kv-cache-tester, 710 sessions",
        "Apache-2.0",
        timed=False,
    ),
    Entry(
        "servegen-reasoning",
        "requests to DeepSeek-R1 on a public cloud, one day: thoughts of reasoning_tokens, then answers; lengths only",
        "servegen_reasoning/deepseek-r1/chunk-0-trace.csv",
        ServeGen(),
        "alibaba/ServeGen, reason/deepseek-r1, 73 clients; Xiang et al., arXiv 2505.09999",
        "Apache-2.0",
        timed=False,
        assumed="Drawn from distributions by client and six hours, the share of reasoning independently of the length.",
    ),
)


def main() -> None:
    """Write every entry of the catalogue."""
    for entry in ENTRIES:
        path = CATALOGUE / f"{entry.name}.yaml"
        path.write_text(render(entry, read(entry)))
        print(path.name, file=sys.stderr)


def read(entry: Entry) -> RequestTable:
    """The trace of an entry, found through MIST_DATA."""
    return entry.trace_format.read(find_trace(entry.file, Path(), os.environ))


def render(entry: Entry, table: RequestTable) -> str:
    """The YAML text of an entry."""
    lines = [f"name: {entry.name}", f"description: '{entry.description}'", f"source: '{entry.source}'"]
    lines += [f"licence: {entry.licence}", f"num_requests: {len(table)}"]
    if entry.timed:
        gaps = np.diff(table.arrival_ns)
        lines += [
            f"duration_s: {int(table.arrival_ns[-1]) / NS_PER_S:.3f}",
            f"rate_per_s: {1e9 / gaps.mean():.4g}",
            f"interarrival_cv: {gaps.std() / gaps.mean():.3g}",
        ]
    lines += _marginal("input_tokens", table.input_tokens) + _marginal("output_tokens", table.output_tokens)
    if table.sizes:
        lines += ["sizes:", *(f"  {line}" for name, tokens in table.sizes.items() for line in _marginal(name, tokens))]
    header = HEADER + (f"# {entry.assumed}\n" if entry.assumed else "")
    return header + "\n".join(lines) + "\n"


def _marginal(name: str, tokens: npt.NDArray[np.int64]) -> list[str]:
    quantiles = np.quantile(tokens, P)
    points = [f"[{p:g}, {round(float(value), 1):.10g}]" for p, value in zip(P, quantiles, strict=True)]
    rows = [", ".join(points[i : i + 6]) for i in range(0, len(points), 6)]
    return [f"{name}:", f"  mean: {tokens.mean():.1f}", "  quantiles: [", *(f"    {row}," for row in rows), "  ]"]


if __name__ == "__main__":
    main()
