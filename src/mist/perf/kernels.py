"""The performance model of measured operators: GEMM, attention and all-reduce times as measured on the real device.

Prepared once per client: it interpolates the tables of `mist.perf.measured` for the model's shapes, then answers each
step from lists. What isn't measured (norms, embedding, holes) a fallback prices; it never beats the data-sheet floor.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from mist.perf import ORIGINS, Deployment
from mist.perf.measured import EXTRAPOLATED, SYSTEMS, OperatorTables, find_tables
from mist.perf.measured.tabulated import DecodeTable, OperatorPricing, PrefillTable, Pricing, RowTable
from mist.perf.operators import forward_pass
from mist.registry import register
from mist.request import Step

#: Tokens that are tabulated at least; steps beyond the tables are computed by the same rules.
MIN_TABULATED_TOKENS = 8192


@register("perf", "kernels")
@dataclass(slots=True)
class Kernels:
    """Sums of measured operator times.

    `framework`: whose kernels; `version`: of its tables, "" the newest for the device. `cuda_graph`: all-reduces as
    launched from a captured graph. `tables`: a folder to read in place of the installed package's. `system`: whose
    tables, "" those of the deployment's device. `fallback` prices the operators that aren't measured.
    """

    framework: Literal["vllm", "sglang", "trtllm"] = "vllm"
    version: str = ""
    cuda_graph: bool = True
    system: str = ""
    tables: str = ""
    fallback: OperatorPricing | None = None
    _dense: RowTable = field(init=False, repr=False)
    _classifier: RowTable = field(init=False, repr=False)
    _prefill: PrefillTable = field(init=False, repr=False)
    _decode: DecodeTable = field(init=False, repr=False)
    _shared_launch_ns: float = field(init=False, repr=False)
    _attention_ns: list[float] = field(init=False, repr=False)

    def supports(self, deployment: Deployment) -> str | None:
        """None, or why not: no tables for the device, no fallback, or what the fallback can't price."""
        found = self._open(deployment)
        if isinstance(found, str):
            return found
        if self.fallback is None:
            return "no fallback for operators that aren't measured; list one behind it, as in perf: [kernels, roofline]"
        return self.fallback.supports(deployment)

    def prepare(self, deployment: Deployment) -> None:
        """Tabulate `deployment`: per-row operators for 0 .. max tokens, attention by length, sequences, Σ context."""
        tables = self._open(deployment)
        assert isinstance(tables, OperatorTables), tables
        assert self.fallback is not None
        self.fallback.prepare(deployment)
        price = Pricing(tables, deployment, self.fallback, self.cuda_graph)
        num_tokens = max(deployment.max_num_batched_tokens, MIN_TABULATED_TOKENS)
        num_seqs = deployment.max_num_seqs
        by_driver = {
            driver: [o for o in forward_pass(deployment) if o.driver == driver]
            for driver in ("tokens", "sampled", "prefill_tokens", "decodes")
        }
        self._dense = RowTable(price, by_driver["tokens"], num_tokens)
        self._classifier = RowTable(price, by_driver["sampled"], num_seqs)
        self._prefill = PrefillTable(price, by_driver["prefill_tokens"], num_tokens)
        self._decode = DecodeTable(price, by_driver["decodes"], num_seqs)
        self._shared_launch_ns = min(self._prefill.launch_ns, self._decode.launch_ns)
        self._attention_ns = [0.0] * len(ORIGINS)

    def step_time(self, step: Step) -> int:
        """Device time of `step`, ns, rounded up. Prefills and decodes of a mixed step share one attention launch."""
        num_decodes, chunks = step.num_decodes, step.chunks
        dense, classifier = self._dense, self._classifier
        tokens, sampled = step.num_prefill_tokens + num_decodes, step.num_sampled
        try:
            ns = dense.ns[tokens] + classifier.ns[sampled]
        except IndexError:
            ns = dense.time(tokens) + classifier.time(sampled)
        else:
            dense.uses[tokens] += 1
            classifier.uses[sampled] += 1
        if num_decodes:
            decode, context = self._decode, step.decode_context
            rows = decode.rows
            times, rates, origins = rows[num_decodes] if num_decodes < len(rows) else decode.row(num_decodes)
            nodes = decode.nodes
            k = bisect_right(nodes, context) - 1
            attention_ns = times[k] + (context - nodes[k]) * rates[k]
            self._attention_ns[origins[k]] += attention_ns
            ns += attention_ns
        if chunks:
            ns += self._prefill_ns(chunks, self._shared_launch_ns if num_decodes else 0.0)
        return int(ns) + 1

    def floor_time(self, step: Step) -> int:
        """The fallback's floor: it depends on the work and the data sheet alone."""
        assert self.fallback is not None
        return self.fallback.floor_time(step)

    def provenance(self) -> dict[str, float]:
        """Share of the answered device time by origin; before the first step all of it counts as measured."""
        totals = np.array(self._attention_ns) + self._dense.used_ns() + self._classifier.used_ns()
        total = float(totals.sum())
        if not total:
            return {"measured": 1.0}
        return {name: float(ns) / total for name, ns in zip(ORIGINS, totals, strict=True)}

    def _open(self, deployment: Deployment) -> OperatorTables | str:
        """The tables for a deployment's device, or why there are none."""
        folder = find_tables(self.tables)
        if isinstance(folder, str):
            return folder
        name = deployment.platform.device.name
        system = self.system or SYSTEMS.get(name, "")
        if not system:
            return f"no operators were measured on {name}"
        tables = OperatorTables(folder, system, self.framework, self.version)
        return tables.problem() or tables

    def _prefill_ns(self, chunks: Sequence[tuple[int, int]], shared_ns: float) -> float:
        """The longest chunk, every other at the cost of one more of its length, and what their contexts add.

        Contexts cost the larger of the longest single one (few tiles: the kernel waits for the slowest) and all of
        them at the bulk rate. No prefill is faster than a decode over the same contexts. `shared_ns` is taken off.
        """
        table = self._prefill
        longest = longest_further = further = slowest = area = 0.0
        context = 0
        for c, s in chunks:
            alone, beside, per_context = table.chunk(c)
            longest, longest_further = max(longest, alone), max(longest_further, beside)
            further += beside
            slowest = max(slowest, s * per_context)
            area += c * s
            context += s + c
        new_ns = longest + further - longest_further
        bulk_ns = area * table.area_ns
        ns = max(new_ns + max(slowest, bulk_ns), self._decode.time(len(chunks), context)) - shared_ns
        known = min(new_ns - shared_ns, ns)
        self._attention_ns[table.origin] += known
        self._attention_ns[EXTRAPOLATED] += ns - known
        return ns
