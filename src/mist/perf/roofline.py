"""The roofline model: every operator takes max(FLOP / attained FLOP/s, bytes / attained bytes/s) plus its launch.

It is prepared once per client and then answers each step from a few lists: dense layers and all-reduces by tokens, the
classifier by rows, attention from sums. It never models the engine's host time, and never answers below the floor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from mist.hardware import Device
from mist.perf import Deployment
from mist.perf.operators import Operator, StepSums, forward_pass
from mist.registry import register
from mist.request import Step

FloatArray = npt.NDArray[np.float64]

#: Tokens that are tabulated at least; steps beyond the tables are computed by the same formulas.
MIN_TABULATED_TOKENS = 8192


@dataclass(slots=True)
class _Attention:
    """Time of one attention operator in a step: launch + max(area · flop_ns, context · kv_ns + tokens · token_ns)."""

    launch_ns: float = 0.0
    flop_ns: float = 0.0
    kv_ns: float = 0.0
    token_ns: float = 0.0


@register("perf", "roofline")
@dataclass(slots=True)
class Roofline:
    """Williams, Waterman and Patterson's roofline (CACM 2009), per operator, with the device's attained fractions.

    In a mixed step prefills and decodes share one attention kernel, so the longer launch alone is paid.
    """

    _dense: list[float] = field(init=False, repr=False)
    _classifier: list[float] = field(init=False, repr=False)
    _dense_at: Callable[[FloatArray], FloatArray] = field(init=False, repr=False)
    _classifier_at: Callable[[FloatArray], FloatArray] = field(init=False, repr=False)
    _prefill: list[_Attention] = field(init=False, repr=False)
    _decode: list[_Attention] = field(init=False, repr=False)
    _decode_launch_ns: float = field(init=False, repr=False)
    _mixed_launch_ns: float = field(init=False, repr=False)
    _ramp_tokens: float = field(init=False, repr=False)
    _operators: list[Operator] = field(init=False, repr=False)
    _device: Device = field(init=False, repr=False)
    _deployment: Deployment = field(init=False, repr=False)

    def supports(self, deployment: Deployment) -> str | None:
        """None, or why the deployment can't be priced: pipeline stages, indivisible heads, too many ranks."""
        platform, device = deployment.platform, deployment.platform.device
        if platform.pp != 1:
            return f"the roofline prices one pipeline stage, not pp = {platform.pp}"
        if platform.tp > device.scale_up_domain:
            return f"tp = {platform.tp} exceeds the {device.scale_up_domain} devices that {device.name} links"
        return deployment.model.tp_problem(platform.tp)

    def prepare(self, deployment: Deployment) -> None:
        """Tabulate `deployment`: dense layers and all-reduces for 0 .. max tokens, classifier for 0 .. max rows."""
        self._deployment = deployment
        self._device = device = deployment.platform.device
        self._operators = forward_pass(deployment)
        dense = [o for o in self._operators if o.driver == "tokens"]
        classifier = [o for o in self._operators if o.driver == "sampled"]
        self._dense_at = lambda x: _time_ns(dense, x, deployment)
        self._classifier_at = lambda x: _time_ns(classifier, x, deployment)
        num_tokens = max(deployment.max_num_batched_tokens, MIN_TABULATED_TOKENS)
        self._dense = self._dense_at(np.arange(num_tokens + 1, dtype=np.float64)).tolist()
        self._classifier = self._classifier_at(np.arange(deployment.max_num_seqs + 1, dtype=np.float64)).tolist()
        self._prefill = [_attention(o, device, deployment) for o in self._operators if o.driver == "prefill_tokens"]
        self._decode = [_attention(o, device, deployment) for o in self._operators if o.driver == "decodes"]
        self._decode_launch_ns = sum(d.launch_ns for d in self._decode)
        pairs = zip(self._prefill, self._decode, strict=True)
        self._mixed_launch_ns = sum(max(p.launch_ns, d.launch_ns) for p, d in pairs)
        self._ramp_tokens = device.attention_ramp_tokens

    def step_time(self, step: Step) -> int:
        """Device time of `step`, ns, rounded up."""
        num_decodes, chunks = step.num_decodes, step.chunks
        try:
            ns = self._dense[step.num_prefill_tokens + num_decodes] + self._classifier[step.num_sampled]
        except IndexError:
            ns = self._beyond_tables(step)
        if num_decodes:
            context = step.decode_context
            for d in self._decode:
                memory = context * d.kv_ns + num_decodes * d.token_ns
                compute = context * d.flop_ns
                ns += memory if memory > compute else compute
            if not chunks:
                return int(ns + self._decode_launch_ns) + 1
        if chunks:
            ns += self._prefill_ns(chunks, step.num_prefill_tokens, num_decodes)
        return int(ns) + 1

    def floor_time(self, step: Step) -> int:
        """max(FLOP / peak, bytes / bandwidth) of the whole step, ns, rounded down.

        FLOP at the peak of each operator's dtype; bytes are the weights that the step touches, once, and its KV. No
        activation counts (it may stay in a cache), nor any time on the links.
        """
        sums = StepSums.of(step)
        compute = sum(o.flop_of(sums) / self._device.peak(o.dtype) for o in self._operators)
        memory = sum(o.compulsory_bytes_of(sums) for o in self._operators if o.kind != "allreduce")
        return int(max(compute, memory / self._device.memory_bytes_per_s) * 1e9)

    def provenance(self) -> dict[str, float]:
        """All of the time comes from the roofline."""
        return {"roofline": 1.0}

    def operator_ns(self, operator: Operator, sums: StepSums) -> float:
        """Time of all launches of `operator` in a step with these sums, ns; for models that lack its measurement."""
        if not operator.runs(sums):
            return 0.0
        if operator.driver in ("tokens", "sampled"):
            rows = np.array([getattr(sums, operator.driver)], dtype=np.float64)
            return float(_time_ns([operator], rows, self._deployment)[0])
        a = _attention(operator, self._device, self._deployment)
        if operator.driver == "decodes":
            work, context, tokens = sums.decode_context, sums.decode_context, sums.decodes
        else:
            work = sums.prefill_area + sums.prefill_tokens * self._ramp_tokens
            context, tokens = sums.prefill_context, sums.prefill_tokens
        return a.launch_ns + max(work * a.flop_ns, context * a.kv_ns + tokens * a.token_ns)

    def _prefill_ns(self, chunks: list[tuple[int, int]], num_tokens: int, num_decodes: int) -> float:
        area, context = num_tokens * self._ramp_tokens, 0
        for c, s in chunks:
            area += c * (s + 0.5 * c)
            context += s + c
        ns = self._mixed_launch_ns if num_decodes else 0.0
        for p in self._prefill:
            ns += max(area * p.flop_ns, context * p.kv_ns + num_tokens * p.token_ns)
            if not num_decodes:
                ns += p.launch_ns
        return ns

    def _beyond_tables(self, step: Step) -> float:
        dense = self._dense_at(np.array([step.num_tokens], dtype=np.float64))
        classifier = self._classifier_at(np.array([step.num_sampled], dtype=np.float64))
        return float(dense[0] + classifier[0])


def _time_ns(operators: list[Operator], rows: FloatArray, deployment: Deployment) -> FloatArray:
    """Summed time of operators that depend on one driver alone, for each number of `rows`; 0 rows take no time."""
    device = deployment.platform.device
    total = np.zeros_like(rows)
    for o in operators:
        if o.kind == "allreduce":
            per_launch = np.array([deployment.platform.all_reduce_ns(o.bytes["tokens"] * x) for x in rows])
        else:
            # a GEMM has an efficiency on each side of the ridge, a memory-bound kernel only one
            memory_class = "gemm_memory" if o.kind == "gemm" else o.kind
            compute = o.flop.get(o.driver, 0.0) * rows / (device.peak(o.dtype) * device.efficiency_of(o.kind, o.dtype))
            memory = (o.weight_bytes + o.bytes[o.driver] * rows) / (
                device.memory_bytes_per_s * device.efficiency_of(memory_class, o.dtype)
            )
            per_launch = np.maximum(compute, memory) * 1e9 + device.launch_ns(o.kind, o.dtype)
        total += o.repeats * per_launch
    return np.where(rows > 0, total, 0.0)


def _attention(o: Operator, device: Device, deployment: Deployment) -> _Attention:
    """The hot path's constants for an attention operator, summed over its layers.

    Prefill is priced by its compute efficiency, decode by its memory efficiency; the other side runs at that of GEMMs.
    """
    prefill = o.kind == "attention_prefill"
    variant = deployment.kv_dtype
    compute = device.efficiency_of(o.kind if prefill else "gemm", variant if prefill else o.dtype)
    memory = device.efficiency_of("gemm_memory" if prefill else o.kind, variant)
    flop_ns = 1e9 * o.repeats / (device.peak(o.dtype) * compute)
    byte_ns = 1e9 * o.repeats / (device.memory_bytes_per_s * memory)
    context, tokens, work = (
        ("prefill_context", "prefill_tokens", "prefill_area")
        if prefill
        else ("decode_context", "decodes", "decode_context")
    )
    return _Attention(
        launch_ns=o.repeats * device.launch_ns(o.kind, variant),
        flop_ns=o.flop[work] * flop_ns,
        kv_ns=o.bytes[context] * byte_ns,
        token_ns=o.bytes[tokens] * byte_ns,
    )
