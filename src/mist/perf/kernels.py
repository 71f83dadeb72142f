"""The performance model of measured operators: each priced by its time as measured on the real device.

Prepared once per client: it interpolates the tables of `mist.perf.measured` for the model's shapes, then answers each
step from lists. What isn't measured a fallback prices, operator by operator; it never beats the data-sheet floor.
"""

from __future__ import annotations

import pickle
from array import array
from bisect import bisect_right
from collections.abc import MutableSequence
from copy import copy
from dataclasses import dataclass, field, fields, replace
from math import ceil
from typing import Literal

import numpy as np

from mist.perf import ORIGINS, Deployment, OperatorTime
from mist.perf.measured import EXTRAPOLATED, SYSTEMS, OperatorTables, find_tables
from mist.perf.measured.deployed import ROOFLINE, OperatorPricing, Pricing
from mist.perf.measured.tabulated import DecodeRow, DecodeTable, Part, PrefillTable, RowTable
from mist.perf.operators import Launches, Operator, StepSums, forward_pass
from mist.registry import register
from mist.request import Step

#: whose kernels were measured; the first stands in for engines without tables
FRAMEWORKS = ("vllm", "sglang", "trtllm")
#: Tokens that are tabulated at least; steps beyond the tables are computed by the same rules.
MIN_TABULATED_TOKENS = 8192
#: a context beyond all others
FOREVER = 1 << 62
#: Tokens of context, all prefills of a step together, up to which their expansion (latent attention) is tabulated.
_MAX_PREFILL_CONTEXT = 2**18
#: deployments whose tables a process keeps, some MB each
_MAX_TABULATED = 24

#: those that were tabulated, by all that they depend on, the one used last at the end
_tabulated: dict[tuple[object, ...], Kernels] = {}


@register("perf", "kernels")
@dataclass(slots=True)
class Kernels:
    """Sums of measured operator times.

    `framework`: whose kernels, "" the engine's or else vLLM's; `version`: of its tables, "" the one that the engine's
    profile names, else the newest for the device.
    `tables`: a folder to read in place of the installed package's. `system`: whose tables, "" those of the deployment's
    device. `distribution` of tokens over experts, as the tables name it: others stand in where it wasn't measured.
    `eager_launch_ns`: what a kernel costs the host where no graph is replayed. `fallback` prices the operators that
    aren't measured.
    """

    framework: Literal["", "vllm", "sglang", "trtllm"] = ""
    version: str = ""
    system: str = ""
    tables: str = ""
    distribution: str = "power_law_1.2"
    eager_launch_ns: float = 5_000.0
    fallback: OperatorPricing | None = None
    _operators: list[Operator] = field(init=False, repr=False)
    _launches: Launches = field(init=False, repr=False)
    _dense: RowTable = field(init=False, repr=False)
    _shared: RowTable | None = field(init=False, repr=False)
    _classifier: RowTable = field(init=False, repr=False)
    _decode_rows: RowTable | None = field(init=False, repr=False)
    _prefill_rows: RowTable | None = field(init=False, repr=False)
    _prefill: list[tuple[PrefillTable, float]] = field(init=False, repr=False)
    _decode: list[DecodeTable] = field(init=False, repr=False)
    _decode_lists: list[tuple[int, list[DecodeRow], list[float], list[int], list[tuple[float, int]], DecodeTable]] = (
        field(init=False, repr=False)
    )
    _num_alike: int = field(init=False, repr=False)
    #: steps of decodes alone that were run and aren't counted yet: decodes, Σ context of the first, steps
    _ran: MutableSequence[int] = field(init=False, repr=False)
    _attention_ns: list[float] = field(init=False, repr=False)
    _is_eager: bool = field(init=False, repr=False)

    def supports(self, deployment: Deployment) -> str | None:
        """None, or why not: no tables for the device, no fallback, or what the fallback can't price."""
        found = self._open(deployment)
        if isinstance(found, str):
            return found
        if self.fallback is None:
            return "no fallback for operators that aren't measured; list one behind it, as in perf: [kernels, roofline]"
        return self.fallback.supports(deployment)

    def prepare(self, deployment: Deployment) -> None:
        """Tabulate `deployment`: per-row operators for 0 .. max tokens, attention by length, sequences, Σ context.

        Deployments that were tabulated lately in this process aren't again: theirs are shared, but for what is counted.
        """
        tables = self._open(deployment)
        assert isinstance(tables, OperatorTables), tables
        key = (repr(self), tables.identity(), pickle.dumps(deployment))
        if (known := _tabulated.pop(key, None)) is None:
            self._tabulate(tables, deployment)
            self._begin()
            known = copy(self)
        else:
            for name in ("fallback", *(each.name for each in fields(self) if not each.init)):
                setattr(self, name, getattr(known, name))
        _tabulated[key] = known
        if len(_tabulated) > _MAX_TABULATED:
            del _tabulated[next(iter(_tabulated))]
        self._begin()

    def _begin(self) -> None:
        """Count from here on, and for itself."""
        self._dense, self._classifier = self._dense.unused(), self._classifier.unused()
        self._shared, self._decode_rows, self._prefill_rows = (
            table.unused() if table else None for table in (self._shared, self._decode_rows, self._prefill_rows)
        )
        self._ran = array("q")
        self._attention_ns = [0.0] * len(ORIGINS)

    def _tabulate(self, tables: OperatorTables, deployment: Deployment) -> None:
        assert self.fallback is not None
        # asked for single operators and floors, never for steps: it needs no tables of its own
        self.fallback.prepare(replace(deployment, max_num_batched_tokens=1, max_num_seqs=1))
        self._is_eager = not deployment.cuda_graph
        self._operators = forward_pass(deployment, self.fallback.expert_imbalance)
        self._launches = Launches(self._operators)
        price = Pricing(tables, deployment, self._operators, self.fallback, self.distribution)
        num_tokens = max(deployment.max_num_batched_tokens, MIN_TABULATED_TOKENS)
        num_seqs = deployment.max_num_seqs

        def rows(driver: str, last: int) -> RowTable:
            found = [o for o in self._operators if o.driver == driver and not o.kind.startswith("attention")]
            return RowTable(price, found, last)

        self._dense = rows("tokens", num_tokens)
        self._shared = rows("shared_tokens", num_tokens) if deployment.platform.attn_dp > 1 else None
        self._classifier = rows("sampled", num_seqs * deployment.tokens_per_decode)
        is_latent = any(o.driver == "prefill_context" for o in self._operators)
        self._decode_rows = rows("decodes", num_seqs) if is_latent else None
        self._prefill_rows = rows("prefill_context", _MAX_PREFILL_CONTEXT) if is_latent else None
        self._decode = [DecodeTable(price, found, num_seqs) for found in self._by_window("decodes")]
        self._decode_lists = [
            (d.window, d.rows, d.nodes, [*map(ceil, d.nodes[1:]), FOREVER], d.full, d) for d in self._decode
        ]
        is_alike = len(self._decode) == 1 and not (
            self._decode[0].window or self._shared or self._decode_rows or self._is_eager
        )
        num_tabled = min(len(self._dense.ns), len(self._classifier.ns), *(len(d.rows) for d in self._decode))
        self._num_alike = num_tabled if is_alike else 0
        self._prefill = []
        for found in self._by_window("prefill_tokens"):
            p = PrefillTable(price, found, num_tokens, self._decode)
            shared_ns = min(p.launch_ns, sum(d.launch_ns for d in self._decode if d.window == p.window))
            self._prefill.append((p, shared_ns))

    def step_time(self, step: Step) -> int:
        """Device time of `step`, ns, rounded up. Prefills and decodes of a mixed step share one attention launch."""
        num_decodes, chunks = step.num_decodes, step.chunks
        dense, classifier = self._dense, self._classifier
        tokens, sampled = step.num_prefill_tokens + num_decodes * step.tokens_per_decode, step.num_sampled
        try:
            ns = dense.ns[tokens] + classifier.ns[sampled]
        except IndexError:
            ns = dense.time(tokens) + classifier.time(sampled)
        else:
            dense.uses[tokens] += 1
            classifier.uses[sampled] += 1
        if self._shared:
            ns += self._shared.time(step.shared_tokens or tokens)
        if num_decodes:
            by_origin, context = self._attention_ns, step.decode_context
            if self._decode_rows:
                ns += self._decode_rows.time(num_decodes)
            for window, rows, nodes, _, full, table in self._decode_lists:
                if num_decodes >= len(rows):
                    attention_ns, origin = table.time(num_decodes, context)
                elif window and context >= window * num_decodes:
                    attention_ns, origin = full[num_decodes]
                else:
                    times, rates, origins = rows[num_decodes]
                    k = bisect_right(nodes, context) - 1
                    attention_ns, origin = times[k] + (context - nodes[k]) * rates[k], origins[k]
                by_origin[origin] += attention_ns
                ns += attention_ns
        if chunks:
            by_origin = self._attention_ns
            for prefill, shared_ns in self._prefill:
                new_ns, attention_ns = prefill.time(chunks)
                if attention_ns > new_ns:
                    by_origin[EXTRAPOLATED] += attention_ns - new_ns
                if num_decodes:
                    new_ns -= shared_ns
                    attention_ns -= shared_ns
                by_origin[prefill.origin] += new_ns
                ns += attention_ns
            if self._prefill_rows:
                context = 0
                for c, s in chunks:
                    context += c + s
                ns += self._prefill_rows.time(context)
        if self._is_eager:
            idle_ns = max(0.0, self.eager_launch_ns * self._launches.of(step) - ns)
            self._attention_ns[ROOFLINE] += idle_ns
            ns += idle_ns
        return int(ns) + 1

    def decode_times(self, num_decodes: int, decode_context: int, num_steps: int, host_ns: int) -> list[int] | None:
        """`step_time` of steps of so many decodes alone that follow each other: up to the next node of a table."""
        if num_decodes >= self._num_alike:
            return None
        _, rows, nodes, ends, _, _ = self._decode_lists[0]
        fixed_ns = self._dense.ns[num_decodes] + self._classifier.ns[num_decodes]
        times, rates, _ = rows[num_decodes]
        k = bisect_right(nodes, decode_context) - 1
        node_ns, node, rate, end = times[k], nodes[k], rates[k], ends[k]
        last = decode_context + num_steps * num_decodes
        contexts = range(decode_context, last if last < end else end, num_decodes)
        host_ns += 1
        return [int(fixed_ns + (node_ns + (context - node) * rate)) + host_ns for context in contexts]

    def decoded(self, num_decodes: int, decode_context: int, num_steps: int) -> None:
        """So many steps that follow each other were run; those that `decode_times` told of are counted in the end."""
        if num_decodes < self._num_alike:
            self._ran.extend((num_decodes, decode_context, num_steps))

    def explain(self, step: Step) -> list[OperatorTime]:
        """The operators of `step` in order, and last what the host adds where it launches every kernel itself.

        Work, floor and what bounds an operator are the fallback's; so are the names.
        """
        assert self.fallback is not None
        sums = StepSums.of(step)
        parts = {id(o): (ns, code) for o, ns, code in self._parts(step, sums)}
        running = [o for o in self._operators if o.runs(sums)]
        found = []
        for o, theirs in zip(running, self.fallback.explain(step), strict=False):
            ns, code = parts[id(o)]
            found.append(replace(theirs, time_ns=ns, origin=ORIGINS[code]))
        idle_ns = (
            self.eager_launch_ns * self._launches.of(step) - sum(t.time_ns for t in found) if self._is_eager else 0.0
        )
        if idle_ns > 0:
            found.append(OperatorTime("waiting_for_host", 1, 0.0, 0.0, idle_ns, "launch", "roofline", 0.0))
        return found

    def floor_time(self, step: Step) -> int:
        """The fallback's floor: it depends on the work and the data sheet alone."""
        assert self.fallback is not None
        return self.fallback.floor_time(step)

    def provenance(self) -> dict[str, float]:
        """Share of the answered device time by origin; before the first step all of it counts as measured."""
        self._count_decoded()
        tables = (self._dense, self._shared, self._classifier, self._decode_rows, self._prefill_rows)
        totals = np.array(self._attention_ns) + np.sum([t.used_ns() for t in tables if t], axis=0)
        total = float(totals.sum())
        if not total:
            return {"measured": 1.0}
        return {name: float(ns) / total for name, ns in zip(ORIGINS, totals, strict=True)}

    def _count_decoded(self) -> None:
        num_decodes, contexts, num_steps = np.array(self._ran, dtype=np.int64).reshape(-1, 3).T
        self._ran = array("q")
        if not len(num_steps):
            return
        steps = np.bincount(num_decodes, num_steps)
        for n in np.flatnonzero(steps).tolist():
            self._dense.uses[n] += int(steps[n])
            self._classifier.uses[n] += int(steps[n])
            here = num_decodes == n
            _, rows, nodes, _, _, _ = self._decode_lists[0]
            times, rates, origins = (np.array(each) for each in rows[n])
            k = np.searchsorted(nodes, contexts[here], side="right") - 1
            mean = contexts[here] + n * (num_steps[here] - 1) / 2
            spent = num_steps[here] * (times[k] + (mean - np.array(nodes)[k]) * rates[k])
            for origin, ns in enumerate(np.bincount(origins[k], spent).tolist()):
                self._attention_ns[origin] += ns

    def _open(self, deployment: Deployment) -> OperatorTables | str:
        """The tables for a deployment's device, or why there are none."""
        folder = find_tables(self.tables)
        if isinstance(folder, str):
            return folder
        name = deployment.platform.device.name
        system = self.system or SYSTEMS.get(name, "")
        if not system:
            return f"no operators were measured on {name}"
        framework = self.framework or (deployment.engine if deployment.engine in FRAMEWORKS else FRAMEWORKS[0])
        nearest = deployment.tables_version if framework == deployment.engine else ""
        tables = OperatorTables(folder, system, framework, self.version or nearest)
        if not self.framework and framework != FRAMEWORKS[0] and tables.problem():
            tables = OperatorTables(folder, system, FRAMEWORKS[0], self.version)
        return tables.problem() or tables

    def _by_window(self, driver: str) -> list[list[Operator]]:
        """Attention operators of one driver, those of each window together."""
        found: dict[int, list[Operator]] = {}
        for o in self._operators:
            if o.driver == driver and o.kind.startswith("attention"):
                found.setdefault(o.window, []).append(o)
        return list(found.values())

    def _parts(self, step: Step, sums: StepSums) -> list[Part]:
        """What each operator of `step` takes; of prefill attention, whichever origin most of it has."""
        found = self._dense.parts(step.num_tokens) + self._classifier.parts(step.num_sampled)
        if self._shared:
            found += self._shared.parts(step.shared_tokens or step.num_tokens)
        if step.num_decodes:
            if self._decode_rows:
                found += self._decode_rows.parts(step.num_decodes)
            for decode in self._decode:
                found += decode.parts(step.num_decodes, step.decode_context)
        if step.chunks:
            for table, shared_ns in self._prefill:
                shared_ns = shared_ns if step.num_decodes else 0.0
                new_ns, ns = table.time(step.chunks)
                origin = table.origin if new_ns - shared_ns >= ns - new_ns else max(table.origin, EXTRAPOLATED)
                found += table.parts(step.chunks, ns - shared_ns, origin)
            if self._prefill_rows:
                found += self._prefill_rows.parts(int(sums.prefill_context))
        return found
