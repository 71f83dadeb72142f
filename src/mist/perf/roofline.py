"""The roofline model: every operator takes max(FLOP / attained FLOP/s, bytes / attained bytes/s) plus its launch.

It is prepared once per client and then answers each step from a few lists: dense layers and collectives by tokens, the
classifier by rows, attention from sums. It never models the engine's host time, and never answers below the floor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mist.hardware import Device, Platform
from mist.perf import Deployment, OperatorTime
from mist.perf.operators import NETWORK_KINDS, Launches, Operator, StepSums, forward_pass, windowed_area
from mist.registry import register
from mist.request import Step

FloatArray = npt.NDArray[np.float64]

#: Tokens that are tabulated at least; steps beyond the tables are computed by the same formulas.
MIN_TABULATED_TOKENS = 8192

#: Drivers whose operators depend on that number of rows alone.
_ROW_DRIVERS = ("tokens", "shared_tokens", "sampled")
#: Kinds of operators that run at another class's efficiency.
_CLASSES = {"grouped_gemm": "gemm", "attention_encoder": "attention_prefill"}
#: The sums that drive prefill and decode operators, as (work, context, rows).
_PREFILL = ("prefill_area", "prefill_context", "prefill_tokens")
_DECODE = ("", "decode_context", "decodes")


class _Linear(NamedTuple):
    """All launches of an operator that is linear in (work, context, rows) of a step, seen through its window.

    launch + max(work · work_flop + context · context_flop + rows · row_flop, weights + context · kv + rows · row), ns.
    """

    window: int
    launch: float
    work_flop: float
    context_flop: float
    row_flop: float
    weights: float
    kv: float
    row: float

    def parts(self, work: float, context: float, rows: float) -> tuple[float, float]:
        """Time to compute and time of memory, ns."""
        compute = work * self.work_flop + context * self.context_flop + rows * self.row_flop
        return compute, self.weights + context * self.kv + rows * self.row


@register("perf", "roofline")
@dataclass(slots=True)
class Roofline:
    """Williams, Waterman and Patterson's roofline (CACM 2009), per operator, with the device's attained fractions.

    In a mixed step prefills and decodes share one attention kernel, so the longer launch alone is paid. Contexts of
    decodes beyond an attention window count as their mean. `expert_imbalance`: rows of the busiest of the ranks that
    experts are spread over, over the mean. `eager_launch_ns`: what a kernel costs the host where no graph is replayed;
    a step takes at least that of all its kernels.
    """

    expert_imbalance: float = 1.0
    eager_launch_ns: float = 5_000.0
    _dense: list[float] = field(init=False, repr=False)
    _shared: list[float] = field(init=False, repr=False)
    _classifier: list[float] = field(init=False, repr=False)
    _decode_rows: list[float] = field(init=False, repr=False)
    _prefill: list[_Linear] = field(init=False, repr=False)
    _decode: list[tuple[int, float, float, float]] = field(init=False, repr=False)
    _prefill_launch_ns: float = field(init=False, repr=False)
    _saved_launches_ns: list[float] = field(init=False, repr=False)
    _saved_launch_ns: float = field(init=False, repr=False)
    _is_eager: bool = field(init=False, repr=False)
    _operators: list[Operator] = field(init=False, repr=False)
    _launches: Launches = field(init=False, repr=False)
    _device: Device = field(init=False, repr=False)
    _platform: Platform = field(init=False, repr=False)
    _deployment: Deployment = field(init=False, repr=False)

    def supports(self, deployment: Deployment) -> str | None:
        """None, or why the deployment can't be priced: sizes that don't divide, groups that straddle nodes."""
        p = deployment.platform
        return p.problem() or deployment.model.parallel_problem(p.tp, p.pp, p.ep, p.attn_dp)

    def prepare(self, deployment: Deployment) -> None:
        """Tabulate `deployment`: by tokens what all of them pass, by sampled rows and by decodes what only these do."""
        self._deployment, self._platform = deployment, deployment.platform
        self._device = deployment.platform.device
        self._is_eager = not deployment.cuda_graph
        self._operators = forward_pass(deployment, self.expert_imbalance)
        self._launches = Launches(self._operators)
        num_tokens = max(deployment.max_num_batched_tokens, MIN_TABULATED_TOKENS)
        seqs = np.arange(deployment.max_num_seqs + 1, dtype=np.float64)
        sampled = np.arange(deployment.max_num_seqs * deployment.tokens_per_decode + 1, dtype=np.float64)
        tokens = np.arange(num_tokens + 1, dtype=np.float64)
        self._dense = self._row_driven_ns("tokens", tokens).tolist()
        is_shared = deployment.platform.attn_dp > 1
        self._shared = self._row_driven_ns("shared_tokens", tokens).tolist() if is_shared else []
        self._classifier = self._row_driven_ns("sampled", sampled).tolist()
        self._decode_rows = self._decode_rows_ns(seqs).tolist()
        self._prefill = [self._linear(o) for o in self._operators if o.driver in _PREFILL]
        decode = [self._linear(o) for o in self._operators if o.kind == "attention_decode"]
        self._decode = [(p.window, p.context_flop, p.kv, p.row) for p in decode]  # plain tuples unpack faster
        self._prefill_launch_ns = sum(p.launch for p in self._prefill)
        self._saved_launches_ns = self._saved_launches()
        self._saved_launch_ns = sum(self._saved_launches_ns)

    def step_time(self, step: Step) -> int:
        """Device time of `step`, ns, rounded up; what a step is with several stages or groups: see `PerfModel`."""
        num_decodes, chunks = step.num_decodes, step.chunks
        try:
            tokens = step.num_prefill_tokens + num_decodes * step.tokens_per_decode
            ns = self._dense[tokens] + self._classifier[step.num_sampled]
            if num_decodes:
                ns += self._decode_rows[num_decodes]
            if self._shared:
                ns += self._shared[step.shared_tokens or step.num_tokens]
        except IndexError:
            ns = self._beyond_tables(step)
        if num_decodes:
            for window, flop, kv, row in self._decode:
                context = step.decode_context
                if window and context > window * num_decodes:
                    context = window * num_decodes
                memory = context * kv + num_decodes * row
                compute = context * flop
                ns += memory if memory > compute else compute
        if chunks:
            ns += self._prefill_ns(chunks, step.num_prefill_tokens)
            if num_decodes:
                ns -= self._saved_launch_ns
        if self._is_eager:
            ns = max(ns, self.eager_launch_ns * self._launches.of(step))
        return int(ns) + 1

    def decode_times(self, num_decodes: int, decode_context: int, num_steps: int, host_ns: int) -> list[int] | None:
        """`step_time` of steps of so many decodes alone that follow each other; None where attention is of kinds."""
        if self._shared or self._is_eager or len(self._decode) != 1:
            return None
        ((window, flop, kv, row),) = self._decode
        if window or num_decodes >= min(len(self._dense), len(self._classifier), len(self._decode_rows)):
            return None
        fixed_ns = self._dense[num_decodes] + self._classifier[num_decodes] + self._decode_rows[num_decodes]
        rows_ns = num_decodes * row
        contexts = range(decode_context, decode_context + num_steps * num_decodes, num_decodes)
        return [int(fixed_ns + max(context * kv + rows_ns, context * flop)) + 1 + host_ns for context in contexts]

    def decoded(self, num_decodes: int, decode_context: int, num_steps: int) -> None:
        """All of the time comes from the roofline, whatever was run."""

    def floor_time(self, step: Step) -> int:
        """max(FLOP / peak, bytes / bandwidth) of the whole step, ns, rounded down.

        FLOP at the peak of each operator's dtype; bytes are the weights that the step touches, once, and its KV. No
        activation counts (it may stay in a cache), nor any time on the links.
        """
        sums = StepSums.of(step)
        compute = sum(o.flop_of(sums) / self._device.peak(o.dtype) for o in self._operators)
        memory = sum(o.compulsory_bytes_of(sums) for o in self._operators if o.kind not in NETWORK_KINDS)
        return int(max(compute, memory / self._device.memory_bytes_per_s) * 1e9)

    def explain(self, step: Step) -> list[OperatorTime]:
        """The operators of `step` in order, and last what the host adds where it launches every kernel itself."""
        sums = StepSums.of(step)
        is_mixed = step.chunks and step.num_decodes
        saved = self._saved_launches_ns if is_mixed else [0.0] * len(self._operators)
        pairs = zip(self._operators, saved, strict=True)
        found = [self._explained(o, sums, saved_ns) for o, saved_ns in pairs if o.runs(sums)]
        idle = self.eager_launch_ns * self._launches.of(step) - sum(t.time_ns for t in found) if self._is_eager else 0.0
        if idle > 0:
            found.append(OperatorTime("waiting_for_host", 1, 0.0, 0.0, idle, "launch", "roofline", 0.0))
        return found

    def provenance(self) -> dict[str, float]:
        """All of the time comes from the roofline."""
        return {"roofline": 1.0}

    def operator_ns(self, operator: Operator, sums: StepSums) -> float:
        """Time of all launches of `operator` in a step with these sums, ns; for models that lack its measurement."""
        if not operator.runs(sums):
            return 0.0
        compute, transfer, launch = self._parts(operator, sums)
        return launch + max(compute, transfer)

    def floor_ns(self, operator: Operator, sums: StepSums) -> float:
        """FLOP over peak, compulsory bytes over bandwidth or received bytes over the link, whichever is more, ns."""
        device = self._device
        if operator.kind in NETWORK_KINDS:
            return operator.repeats * float(self._wire_ns(operator, np.array([getattr(sums, operator.driver)]))[0])
        compute = operator.flop_of(sums) / device.peak(operator.dtype)
        return 1e9 * max(compute, operator.compulsory_bytes_of(sums) / device.memory_bytes_per_s)

    def _wire_ns(self, o: Operator, rows: FloatArray) -> FloatArray:
        """Received bytes of one launch over the fastest link, ns, for each number of rows."""
        ranks = o.shape[1] if o.kind != "message" else 2
        received = o.bytes[o.driver] * rows * (1.0 if o.kind == "message" else (ranks - 1) / ranks)
        wire: FloatArray = received * 1e9 / max(self._device.link_bytes_per_s, self._device.inter_node_bytes_per_s)
        return wire

    def _explained(self, o: Operator, sums: StepSums, saved_launch: float) -> OperatorTime:
        compute, transfer, launch = self._parts(o, sums)
        launch -= saved_launch
        transfer_bound = "network" if o.kind in NETWORK_KINDS else "memory"
        bound = max((compute, "compute"), (transfer, transfer_bound), (launch, "launch"))[1]
        time_ns = launch + max(compute, transfer)
        flop, moved, floor = o.flop_of(sums), o.bytes_of(sums), self.floor_ns(o, sums)
        return OperatorTime(o.name, o.repeats, flop, moved, time_ns, bound, "roofline", floor)

    def _parts(self, o: Operator, sums: StepSums) -> tuple[float, float, float]:
        """Times to compute, to move data and to launch, ns, over all launches."""
        if o.driver in _ROW_DRIVERS:
            rows = np.array([getattr(sums, o.driver)], dtype=np.float64)
            compute, transfer, launch = self._per_launch(o, rows)
            return o.repeats * float(compute[0]), o.repeats * float(transfer[0]), o.repeats * launch
        seen, linear = sums.windowed(o.window), self._linear(o)
        work, context, rows_of = _PREFILL if o.driver in _PREFILL else _DECODE
        values = (getattr(seen, work) if work else 0.0, getattr(seen, context), getattr(seen, rows_of))
        return (*linear.parts(*values), linear.launch)

    def _per_launch(self, o: Operator, rows: FloatArray) -> tuple[FloatArray, FloatArray, float]:
        """(compute, memory or network, launch) of one launch of a row-driven operator, ns, for each number of rows."""
        device, factor = self._device, self._deployment.time_factor(o.kind, o.dtype)
        peak = device.peak(o.dtype) * self._deployment.clock_of(o.kind)
        if o.kind in NETWORK_KINDS:
            network = np.maximum(
                factor * _network_ns(o, self._platform, o.bytes[o.driver] * rows), self._wire_ns(o, rows)
            )
            launch = 0.0 if o.kind == "message" else factor * _network_launch_ns(o, device)
            return np.zeros_like(rows), network - launch, launch
        # a GEMM has an efficiency on each side of the ridge, a memory-bound kernel only one
        kind = _CLASSES.get(o.kind, o.kind)
        memory_class = "gemm_memory" if kind == "gemm" else kind
        weights = o.weight_bytes * o.experts.touched_share(o.groups * rows) if o.experts else o.weight_bytes
        flop_ns = 1e9 / (peak * min(1.0, device.efficiency_of(kind, o.dtype) / factor))
        byte_ns = 1e9 / (device.memory_bytes_per_s * min(1.0, device.efficiency_of(memory_class, o.dtype) / factor))
        compute = o.flop.get(o.driver, 0.0) * rows * flop_ns
        memory = (weights + o.bytes[o.driver] * rows) * byte_ns
        return compute, memory, factor * device.launch_ns(kind, o.dtype)

    def _row_driven_ns(self, driver: str, rows: FloatArray) -> FloatArray:
        """Summed time of the operators that depend on one driver alone; 0 rows take no time."""
        total = np.zeros_like(rows)
        for o in self._operators:
            if o.driver == driver:
                compute, transfer, launch = self._per_launch(o, rows)
                total += o.repeats * (np.maximum(compute, transfer) + launch)
        return np.where(rows > 0, total, 0.0)

    def _decode_rows_ns(self, rows: FloatArray) -> FloatArray:
        """What decodes take whatever their contexts: operators of their rows alone, and the launches of attention."""
        total = np.zeros_like(rows)
        for o in self._operators:
            if o.driver == "decodes":
                linear = self._linear(o)
                total += linear.launch
                if o.kind != "attention_decode":
                    total += np.maximum(rows * linear.row_flop, linear.weights + rows * linear.row)
        return total

    def _linear(self, o: Operator) -> _Linear:
        """The hot path's constants of an operator that prefills or decodes drive.

        Prefill attention is priced by its compute efficiency, decode by its memory efficiency; the other side of each
        runs at that of GEMMs.
        """
        device, kv_dtype, kind = self._device, self._deployment.kv_dtype, _CLASSES.get(o.kind, o.kind)
        prefill, decode = kind == "attention_prefill", kind == "attention_decode"
        compute = device.efficiency_of("attention_prefill" if prefill else "gemm", kv_dtype if prefill else o.dtype)
        memory = device.efficiency_of("attention_decode" if decode else "gemm_memory", kv_dtype)
        factor = self._deployment.time_factor(o.kind, o.dtype)
        peak = device.peak(o.dtype) * self._deployment.clock_of(o.kind)
        flop_ns = 1e9 * o.repeats / (peak * min(1.0, compute / factor))
        byte_ns = 1e9 * o.repeats / (device.memory_bytes_per_s * min(1.0, memory / factor))
        ramp = device.attention_ramp_tokens if prefill else 0.0
        work, context, rows = _PREFILL if o.driver in _PREFILL else _DECODE
        return _Linear(
            window=o.window,
            launch=factor * o.repeats * device.launch_ns(kind, kv_dtype if prefill or decode else o.dtype),
            work_flop=o.flop.get(work, 0.0) * flop_ns,
            context_flop=o.flop.get(context, 0.0) * flop_ns,
            row_flop=(o.flop.get(rows, 0.0) + o.flop.get(work, 0.0) * ramp) * flop_ns,
            weights=o.weight_bytes * byte_ns,
            kv=o.bytes.get(context, 0.0) * byte_ns,
            row=o.bytes.get(rows, 0.0) * byte_ns,
        )

    def _saved_launches(self) -> list[float]:
        """What each operator saves in a mixed step: of each pair of attention operators the shorter launch."""
        saved = [0.0] * len(self._operators)
        kinds = ("attention_prefill", "attention_decode")
        attention = [i for i, o in enumerate(self._operators) if o.kind in kinds]
        for pair in zip(attention[::2], attention[1::2], strict=True):
            launches = {i: self._linear(self._operators[i]).launch for i in pair}
            shorter = min(pair, key=launches.__getitem__)
            saved[shorter] = launches[shorter]
        return saved

    def _prefill_ns(self, chunks: Sequence[tuple[int, int]], num_tokens: int) -> float:
        ns = self._prefill_launch_ns
        seen = -1
        for window, _, work_flop, context_flop, row_flop, weights, kv, row in self._prefill:
            if window != seen:
                seen, area, context = window, 0.0, 0.0
                for c, s in chunks:
                    if window and s + c > window:
                        if s >= window:
                            area += c * window
                            context += window + c
                        else:
                            area += windowed_area(c, s, window)
                            context += s + c
                    else:
                        area += c * (s + 0.5 * c)
                        context += s + c
            memory = weights + context * kv + num_tokens * row
            compute = area * work_flop + context * context_flop + num_tokens * row_flop
            ns += memory if memory > compute else compute
        return ns

    def _beyond_tables(self, step: Step) -> float:
        ns = self._row_driven_ns("tokens", np.array([step.num_tokens], dtype=np.float64))
        ns += self._row_driven_ns("shared_tokens", np.array([step.shared_tokens or step.num_tokens], dtype=np.float64))
        ns += self._row_driven_ns("sampled", np.array([step.num_sampled], dtype=np.float64))
        if step.num_decodes:
            ns += self._decode_rows_ns(np.array([step.num_decodes], dtype=np.float64))
        return float(ns[0])


def _network_ns(o: Operator, platform: Platform, message_bytes: FloatArray) -> FloatArray:
    """Times of one launch of an operator that moves data between devices, ns, by size."""
    ranks = o.shape[1]
    if o.kind == "allreduce":
        return platform.all_reduce_ns(message_bytes)
    if o.kind == "allgather":
        return platform.all_gather_ns(message_bytes, ranks)
    if o.kind == "alltoall":
        return platform.all_to_all_ns(message_bytes, ranks)
    return platform.message_ns(message_bytes, crosses_domains=bool(ranks))


def _network_launch_ns(o: Operator, device: Device) -> float:
    return device.launch_ns("allreduce", min(o.shape[1], device.scale_up_domain))
