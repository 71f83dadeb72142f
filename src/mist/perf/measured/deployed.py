"""Every operator of one deployment priced: measured where there is a table, else by the fallback; never below floor.

Between the lookups in the tables and the lists that are built from these prices. It never looks at a step itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from mist.perf import Deployment, PerfModel
from mist.perf.measured.experts import FUSED, fused_experts, fused_ns, local_width
from mist.perf.measured.grid import Estimate, FloatArray
from mist.perf.measured.latent import DECODE_MODULE, PREFILL_MODULE, latent_attention
from mist.perf.measured.pricing import attention, per_row
from mist.perf.measured.tables import OperatorTables
from mist.perf.operators import NETWORK_KINDS, Operator, StepSums

#: Codes of `ORIGINS` behind the three of an `Estimate`.
ROOFLINE, CLAMPED = 3, 4

#: Points at which the fallback is asked, in rows; it is taken as linear between them.
_SAMPLES = np.unique(np.geomspace(1, 2**22, 133).round())
#: Lengths, numbers of sequences and sums of contexts at which the fallback prices attention.
_FALLBACK_NODES = np.array([2.0**i for i in range(25)])


class OperatorPricing(PerfModel, Protocol):
    """What `kernels` asks of its fallback beyond a performance model."""

    expert_imbalance: float

    def operator_ns(self, operator: Operator, sums: StepSums) -> float:
        """Time of all launches of `operator` in a step with these sums, ns."""
        ...


class AttentionTimes(Protocol):
    """One layer of attention of equal sequences: prefill by (length, sequences), decode by (sequences, Σ context)."""

    @property
    def outer(self) -> FloatArray: ...

    @property
    def inner(self) -> FloatArray: ...

    def at(self, outer: float, inner: FloatArray) -> Estimate: ...


class Pricing:
    """Prices the `operators` of one deployment. `distribution`: over experts, as the tables name them."""

    def __init__(
        self, tables: OperatorTables, deployment: Deployment, operators: Sequence[Operator],
        fallback: OperatorPricing, distribution: str,
    ) -> None:  # fmt: skip
        self.tables, self.deployment, self.operators, self.fallback = tables, deployment, operators, fallback
        self.device = deployment.platform.device
        self.byte_ns = 1e9 / self.device.memory_bytes_per_s
        self._experts = fused_experts(tables, operators, deployment, distribution)

    def rows(self, o: Operator, rows: FloatArray) -> Estimate:
        """All launches of a per-row operator for each number of `rows`; origins are codes of `ORIGINS`."""
        if self._experts is not None and o.name in FUSED:
            return self._fused_share(o, rows)
        found = per_row(self.tables, o, self._queries(o) * rows, self.deployment)
        if found is None:
            return _clamp(Estimate(self._fallback_ns(o, rows), _roofline(rows)), self._floor_ns(o, rows))
        times = self.deployment.time_factor(o.kind, o.dtype) * o.repeats * found.ns
        return _slowed(_clamp(Estimate(times, found.origin), self._floor_ns(o, rows)), self._slowdown([o], rows))

    def attention(self, o: Operator) -> PricedAttention:
        """All layers of an attention operator."""
        times: AttentionTimes | None
        if o.kind == "attention_encoder" or not any(g.latent for g in self.deployment.model.layers):
            times = attention(self.tables, o, self.deployment)
        else:
            names = PREFILL_MODULE if o.kind == "attention_prefill" else DECODE_MODULE
            times = latent_attention(self.tables, o, self.deployment, self._others_ns(o, names))
        if times is None:
            return PricedAttention(o, _FallbackAttention(o, self.fallback), self, 1.0)
        is_capped = self.deployment.clock_of(o.kind) < 1
        return PricedAttention(o, times, self, self.deployment.time_factor(o.kind, o.dtype), is_capped)

    def flop_ns(self, o: Operator) -> float:
        """Data-sheet time of one FLOP of an operator."""
        return 1e9 / self.device.peak(o.dtype)

    def capped(self, kind: str, compute: FloatArray, memory: FloatArray) -> FloatArray:
        """What a lower clock multiplies a known time by, of work that takes these times (> 0) by the data sheet.

        What it does to the longer of the two: all of it where compute binds, nothing where memory does by far.
        """
        clock = self.deployment.clock_of(kind)
        return np.maximum(compute / clock, memory) / np.maximum(np.maximum(compute, memory), 1e-9)

    def _fused_share(self, o: Operator, rows: FloatArray) -> Estimate:
        """The measured time of all experts' operators, split as the fallback prices them; the floor is that of all."""
        assert self._experts is not None
        fused = [other for other in self.operators if other.name in FUSED]
        prices = {other.name: self._fallback_ns(other, rows) for other in fused}
        share = prices[o.name] / np.maximum(sum(prices.values()), 1e-9)
        tokens = rows * self.deployment.platform.attn_dp
        found = fused_ns(self._experts, local_width(self.deployment), tokens)
        floor = np.sum([self._floor_ns(other, rows) for other in fused], axis=0)
        times = self.deployment.time_factor(o.kind, o.dtype) * o.repeats * found.ns
        priced = _slowed(_clamp(Estimate(times, found.origin), floor), self._slowdown(fused, rows))
        return Estimate(priced.ns * share, priced.origin)

    def _slowdown(self, operators: Sequence[Operator], rows: FloatArray) -> FloatArray:
        """What a power cap multiplies the time of one kernel by that does these per-row operators; 1 of a network's."""
        if self.deployment.clock_of(operators[0].kind) == 1 or operators[0].kind in NETWORK_KINDS:
            return np.ones(len(rows))
        compute, memory = np.zeros(len(rows)), np.zeros(len(rows))
        for o in operators:
            touched = o.experts.touched_share(o.groups * rows) if o.experts else 1.0
            compute += o.repeats * o.flop.get(o.driver, 0.0) * rows * self.flop_ns(o)
            memory += o.repeats * (o.weight_bytes * touched + o.bytes.get(o.driver, 0.0) * rows) * self.byte_ns
        return self.capped(operators[0].kind, compute, memory)

    def _fallback_ns(self, o: Operator, rows: FloatArray) -> FloatArray:
        samples = _SAMPLES[: int(np.searchsorted(_SAMPLES, rows.max())) + 1]
        return np.interp(rows, samples, [self.fallback.operator_ns(o, driven(o.driver, float(x))) for x in samples])

    def _floor_ns(self, o: Operator, rows: FloatArray) -> FloatArray:
        """What no device beats: FLOP over peak, touched weights and KV over bandwidth, received bytes over the link."""
        if o.kind in NETWORK_KINDS:
            ranks, device = (o.shape[1] if o.kind != "message" else 1), self.device
            received = o.repeats * o.bytes[o.driver] * rows * ((ranks - 1) / ranks if ranks > 1 else 1.0)
            links = [device.link_bytes_per_s]
            if o.kind == "message" or ranks > device.scale_up_domain:
                links.append(device.inter_node_bytes_per_s)
            return received * 1e9 / max(links)
        touched = o.experts.touched_share(o.groups * rows) if o.experts else 1.0
        memory = o.weight_bytes * touched + o.kv_bytes.get(o.driver, 0.0) * rows
        compute = o.flop.get(o.driver, 0.0) * rows * self.flop_ns(o)
        return o.repeats * np.maximum(compute, memory * self.byte_ns)

    def _others_ns(self, attention: Operator, names: Sequence[str]) -> Callable[[FloatArray], FloatArray]:
        """What the operators of these names take in one layer, ns, by tokens (all of them new)."""
        others = [o for o in self.operators if o.name in names]
        rows = [_SAMPLES / self._queries(o) for o in others]
        full_clock = [self.rows(o, x).ns / self._slowdown([o], x) for o, x in zip(others, rows, strict=True)]
        times = np.sum([ns / attention.repeats for ns in full_clock], axis=0)
        return lambda tokens: np.interp(tokens, _SAMPLES, times)

    def _queries(self, o: Operator) -> int:
        """Rows that an operator has for each unit of its driver."""
        return self.deployment.tokens_per_decode if o.driver == "decodes" else 1


@dataclass(frozen=True, slots=True)
class _FallbackAttention:
    """An attention operator that isn't measured: one launch as the fallback prices it."""

    o: Operator
    fallback: OperatorPricing
    outer: FloatArray = field(default_factory=lambda: _FALLBACK_NODES)
    inner: FloatArray = field(default_factory=lambda: _FALLBACK_NODES)

    def at(self, outer: float, inner: FloatArray) -> Estimate:
        times = [self.fallback.operator_ns(self.o, _equal(self.o, outer, float(x))) / self.o.repeats for x in inner]
        return Estimate(np.array(times), _roofline(inner))


@dataclass(frozen=True, slots=True)
class PricedAttention:
    """All layers of an attention operator, `factor` times as long as known, never below their floor.

    `is_capped`: the times are those of a full clock, and the devices run under a power cap.
    """

    o: Operator
    times: AttentionTimes
    price: Pricing
    factor: float
    is_capped: bool = False

    def at(self, outer: float, inner: FloatArray) -> Estimate:
        """Time, ns, rising along `inner`."""
        found = self.times.at(outer, inner)
        ns = self.factor * self.o.repeats * found.ns
        if self.is_capped:
            ns = ns * self._slowdown(outer, inner)
        return _clamp(Estimate(np.maximum.accumulate(ns), found.origin), self.floor_ns(outer, inner))

    def _slowdown(self, outer: float, inner: FloatArray) -> FloatArray:
        sums = [_equal(self.o, outer, float(x)) for x in inner]
        compute = np.array([self.o.flop_of(s) for s in sums]) * self.price.flop_ns(self.o)
        return self.price.capped(
            self.o.kind, compute, np.array([self.o.bytes_of(s) for s in sums]) * self.price.byte_ns
        )

    def floor_ns(self, outer: float, inner: FloatArray) -> FloatArray:
        """FLOP over peak or KV bytes over bandwidth, whichever is more."""
        sums = [_equal(self.o, outer, float(x)) for x in inner]
        compute = np.array([self.o.flop_of(s) for s in sums]) * self.price.flop_ns(self.o)
        memory = np.array([self.o.compulsory_bytes_of(s) for s in sums]) * self.price.byte_ns
        return np.maximum(compute, memory)


def driven(driver: str, x: float) -> StepSums:
    """The sums of which one is `x`, all others 0."""
    given: dict[str, Any] = {driver: x}
    return StepSums(**given)


def _equal(o: Operator, outer: float, inner: float) -> StepSums:
    """Decode: `outer` sequences with `inner` tokens of context in all; prefill: `inner` prompts of `outer` tokens."""
    if o.driver == "decodes":
        return StepSums(decodes=outer, decode_context=inner)
    one = StepSums(prefill_context=outer, prefill_area=outer * outer / 2, chunks=((int(outer), 0),)).windowed(o.window)
    return StepSums(
        prefill_tokens=inner * outer, prefill_context=inner * outer, prefill_area=inner * one.prefill_area
    )  # fmt: skip


def _roofline(x: FloatArray) -> Any:
    return np.full(len(x), ROOFLINE, np.int8)


def _slowed(found: Estimate, factor: FloatArray) -> Estimate:
    return Estimate(found.ns * factor, found.origin)


def _clamp(found: Estimate, floor: FloatArray) -> Estimate:
    return Estimate(np.maximum(found.ns, floor), np.where(found.ns < floor, np.int8(CLAMPED), found.origin))
