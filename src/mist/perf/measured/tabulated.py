"""Operators of one deployment as lists: per-row operators by rows, prefill attention by length, decode by Σ context.

Built once per client from the measured tables and a fallback's prices, clamped to the data-sheet floor and monotone;
the `kernels` model reads the lists for every step. It never looks at a step itself.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from mist.perf import ORIGINS, Deployment, PerfModel
from mist.perf.measured.families import BY_NAME
from mist.perf.measured.grid import EXTRAPOLATED, INTERPOLATED, Estimate, FloatArray, RaggedGrid, half_way
from mist.perf.measured.pricing import attention, per_row
from mist.perf.measured.tables import OperatorTables
from mist.perf.operators import Operator, StepSums

#: Codes of `ORIGINS` behind the three of an `Estimate`.
ROOFLINE, CLAMPED = 3, 4

#: Points at which the fallback is asked, in rows; it is taken as linear between them.
_SAMPLES = np.unique(np.geomspace(1, 2**22, 133).round())
#: Lengths, numbers of sequences and sums of contexts at which the fallback prices attention.
_FALLBACK_NODES = np.array([2.0**i for i in range(25)])
#: What one more prompt of a length costs is the slope from one sequence to this many.
_MANY_SEQUENCES = 64.0


class OperatorPricing(PerfModel, Protocol):
    """What `kernels` asks of its fallback beyond a performance model."""

    def operator_ns(self, operator: Operator, sums: StepSums) -> float:
        """Time of all launches of `operator` in a step with these sums, ns."""
        ...


class _AttentionTimes(Protocol):
    """One layer of attention of equal sequences: prefill by (length, sequences), decode by (sequences, Σ context)."""

    @property
    def outer(self) -> FloatArray: ...

    @property
    def inner(self) -> FloatArray: ...

    def at(self, outer: float, inner: FloatArray) -> Estimate: ...


class Pricing:
    """Prices operators of one deployment: measured where there is a table, else by the fallback, never below floor."""

    def __init__(
        self, tables: OperatorTables, deployment: Deployment, fallback: OperatorPricing, cuda_graph: bool
    ) -> None:
        self.tables, self.deployment, self.fallback, self.cuda_graph = tables, deployment, fallback, cuda_graph
        platform = deployment.platform
        self.device = platform.device
        self.byte_ns = 1e9 / self.device.memory_bytes_per_s
        # every rank receives at least what it doesn't hold
        self.link_ns = (platform.tp - 1) / platform.tp * 1e9 / self.device.link_bytes_per_s

    def rows(self, o: Operator, rows: FloatArray) -> Estimate:
        """All launches of a per-row operator for each number of `rows`; origins are codes of `ORIGINS`."""
        found = per_row(self.tables, o, rows, self.deployment, self.cuda_graph)
        if found is None:
            samples = _SAMPLES[: int(np.searchsorted(_SAMPLES, rows.max())) + 1]
            times = [self.fallback.operator_ns(o, StepSums(**{o.driver: float(x)})) for x in samples]
            found = Estimate(np.interp(rows, samples, times), np.full(len(rows), ROOFLINE, np.int8))
        else:
            found = Estimate(o.repeats * found.ns, found.origin)
        if o.kind == "allreduce":
            return _clamp(found, o.repeats * o.bytes[o.driver] * rows * self.link_ns)
        compute = o.flop.get(o.driver, 0.0) * rows * self.flop_ns(o)
        return _clamp(found, o.repeats * np.maximum(compute, o.weight_bytes * self.byte_ns))

    def attention(self, o: Operator) -> _Attention:
        """All layers of an attention operator."""
        return _Attention(o, attention(self.tables, o, self.deployment) or _FallbackAttention(o, self.fallback), self)

    def flop_ns(self, o: Operator) -> float:
        """Data-sheet time of one FLOP of an operator."""
        return 1e9 / self.device.peak(o.dtype)


@dataclass(frozen=True, slots=True)
class _FallbackAttention:
    """An attention operator that isn't measured: one launch as the fallback prices it."""

    o: Operator
    fallback: OperatorPricing
    outer: FloatArray = field(default_factory=lambda: _FALLBACK_NODES)
    inner: FloatArray = field(default_factory=lambda: _FALLBACK_NODES)

    def at(self, outer: float, inner: FloatArray) -> Estimate:
        times = [self.fallback.operator_ns(self.o, _sums(self.o, outer, float(x))) / self.o.repeats for x in inner]
        return Estimate(np.array(times), np.full(len(inner), ROOFLINE, np.int8))


@dataclass(frozen=True, slots=True)
class _Attention:
    """All layers of an attention operator, never below their floor."""

    o: Operator
    times: _AttentionTimes
    price: Pricing

    def at(self, outer: float, inner: FloatArray) -> Estimate:
        found = self.times.at(outer, inner)
        ns = np.maximum.accumulate(self.o.repeats * found.ns)
        return _clamp(Estimate(ns, found.origin), self.floor_ns(outer, inner))

    def floor_ns(self, outer: float, inner: FloatArray) -> FloatArray:
        """FLOP over peak or KV bytes over bandwidth, whichever is more."""
        sums = [_sums(self.o, outer, float(x)) for x in inner]
        compute = np.array([self.o.flop_of(s) for s in sums]) * self.price.flop_ns(self.o)
        memory = np.array([self.o.compulsory_bytes_of(s) for s in sums]) * self.price.byte_ns
        return np.maximum(compute, memory)


def _sums(o: Operator, outer: float, inner: float) -> StepSums:
    """Decode: `outer` sequences with `inner` tokens of context in all; prefill: `inner` prompts of `outer` tokens."""
    if o.driver == "decodes":
        return StepSums(decodes=outer, decode_context=inner)
    tokens = inner * outer
    return StepSums(prefill_tokens=tokens, prefill_context=tokens, prefill_area=tokens * outer / 2)


class RowTable:
    """Operators that depend on a number of rows alone, summed: `ns` for 0 .. `last` rows, `uses` of each so far.

    `by_origin`: [origins, rows], `ns` split by origin.
    """

    def __init__(self, price: Pricing, operators: list[Operator], last: int) -> None:
        self._price, self._operators = price, operators
        shares = self._shares(np.arange(last + 1, dtype=np.float64))
        total = shares.sum(axis=0)
        rising = np.maximum.accumulate(total)  # lines extrapolated along n or k could fall a little
        self.by_origin = shares * np.divide(rising, total, out=np.ones_like(total), where=total > 0)
        self.ns: list[float] = rising.tolist()
        self.uses = [0] * (last + 1)
        self.beyond_ns: FloatArray = np.zeros(len(ORIGINS))

    def time(self, rows: int) -> float:
        """Time for any number of `rows`, computed anew where the table ends; counted as used."""
        if rows < len(self.ns):
            self.uses[rows] += 1
            return self.ns[rows]
        shares = self._shares(np.array([float(rows)]))[:, 0]
        ns = max(float(shares.sum()), self.ns[-1])
        self.beyond_ns += shares * (ns / shares.sum())
        return ns

    def used_ns(self) -> FloatArray:
        """Time answered so far by origin."""
        used: FloatArray = self.by_origin @ np.array(self.uses, np.float64) + self.beyond_ns
        return used

    def _shares(self, rows: FloatArray) -> FloatArray:
        shares = np.zeros((len(ORIGINS), len(rows)))
        for o in self._operators:
            found = self._price.rows(o, rows)
            for code in np.unique(found.origin):
                shares[code] += np.where((found.origin == code) & (rows > 0), found.ns, 0.0)
        return shares


class PrefillTable:
    """Prefill attention by chunk length, all layers; what `chunk` gives rises with its length.

    `area_ns`: time of one (new token, context token) pair in bulk. `launch_ns`: what is left of a launch besides its
    floor, at least. `origin`: code of `ORIGINS` of chunks without context.
    """

    def __init__(self, price: Pricing, operators: list[Operator], last: int) -> None:
        self._curves = [_PrefillCurves(price.attention(o)) for o in operators]
        self.area_ns: float = sum(c.area_ns for c in self._curves)
        self.launch_ns = sum(c.launch_ns for c in self._curves)
        self.origin = max(c.origin for c in self._curves)
        self._lists: list[list[float]] = [x.tolist() for x in self._at(np.arange(last + 1, dtype=np.float64))]

    def chunk(self, c: int) -> tuple[float, float, float]:
        """For `c` new tokens, ns: alone; beside a longer chunk; per token of context before it."""
        first, further, context = self._lists
        if c < len(first):
            return first[c], further[c], context[c]
        one, more, per_context = self._at(np.array([float(c)]))
        return max(float(one[0]), first[-1]), max(float(more[0]), further[-1]), max(float(per_context[0]), context[-1])

    def _at(self, lengths: FloatArray) -> list[FloatArray]:
        curves = [c.at(lengths) for c in self._curves]
        return [np.maximum.accumulate(sum(parts)) for parts in zip(*curves, strict=True)]


class _PrefillCurves:
    """One prefill operator by length c: the first sequence, each further one, and what a token of context adds."""

    def __init__(self, part: _Attention) -> None:
        nodes, one = part.times.outer, np.ones(1)
        found = [part.at(length, np.array([1.0, _MANY_SEQUENCES])) for length in nodes]
        ns = np.array([f.ns for f in found])
        floor = np.array([part.floor_ns(length, one)[0] for length in nodes])
        first = np.maximum.accumulate(ns[:, 0])
        further = np.maximum.accumulate(np.maximum((ns[:, 1] - ns[:, 0]) / (_MANY_SEQUENCES - 1), floor))
        self._first, self._further = (RaggedGrid(_LENGTHS.scaled(nodes)[None, :], curve) for curve in (first, further))
        self.launch_ns = float(max(0.0, (first - floor).min()))
        self.origin = max(INTERPOLATED, int(np.median([f.origin[0] for f in found])))
        base = half_way(nodes)
        area_floor = part.o.repeats * part.o.flop["prefill_area"] * part.price.flop_ns(part.o)
        self.area_ns = max(2 * (first[-1] - first[base]) / (nodes[-1] ** 2 - nodes[base] ** 2), area_floor)
        self._lengths, self._slopes = self._context_slopes(nodes[-1])

    def at(self, lengths: FloatArray) -> list[FloatArray]:
        slopes = np.maximum(np.interp(lengths, self._lengths, self._slopes), self.area_ns * lengths)
        return [_along(self._first, lengths), _along(self._further, lengths), slopes]

    def _context_slopes(self, longest: float) -> tuple[FloatArray, FloatArray]:
        """What a token of context before a chunk of c costs: d time / d (c²/2) at c, times c.

        Both where tiles wait for the slowest (time grows with the context of one tile) and in bulk (with c times the
        context) that is the time's growth with the context. Launch noise at small c only raises it, so the smallest
        slope of any longer chunk bounds it.
        """
        lengths = np.geomspace(1.0, longest / np.sqrt(2.0), 64)
        low, high = (_along(self._first, lengths * factor) for factor in (np.sqrt(0.5), np.sqrt(2.0)))
        slopes = (high - low) / (0.75 * lengths)
        return lengths, np.minimum.accumulate(slopes[::-1])[::-1]


_LENGTHS = BY_NAME["context_attention"].axes[1]


def _along(curve: RaggedGrid, lengths: FloatArray) -> FloatArray:
    return curve.at((), _LENGTHS.scaled(lengths)).ns


class DecodeTable:
    """Decode attention, all layers: for each number of sequences, times at `nodes` of Σ context and rates between.

    `rows[n]`: (ns at each node, ns per token of context behind it, code of `ORIGINS` of each interval).
    """

    def __init__(self, price: Pricing, operators: list[Operator], last: int) -> None:
        parts = [price.attention(o) for o in operators]
        nodes = np.unique(np.concatenate([[1.0], *(part.times.inner for part in parts)]))
        self.nodes: list[float] = nodes.tolist()
        self._floor_rate = sum(float(part.floor_ns(1.0, np.ones(1))[0]) for part in parts)
        self._grids = [_DecodeGrid(part, nodes) for part in parts]
        ns, origins = self._at(np.arange(last + 1, dtype=np.float64))
        self._highest = ns[-1]
        self.rows = self._rows(ns, origins)
        self.launch_ns = float(max(0.0, (ns - self._floor_rate * nodes).min()))
        self._beyond: dict[int, tuple[list[float], list[float], list[int]]] = {}

    def row(self, n: int) -> tuple[list[float], list[float], list[int]]:
        """As `rows[n]`, for any number of sequences."""
        if n < len(self.rows):
            return self.rows[n]
        if n not in self._beyond:
            ns, origins = self._at(np.array([float(n)]))
            self._beyond[n] = self._rows(np.maximum(ns, self._highest), origins)[0]
        return self._beyond[n]

    def time(self, n: int, context: int) -> float:
        """ns of `n` sequences that attend to `context` tokens in all."""
        times, rates, _ = self.row(n)
        k = bisect_right(self.nodes, context) - 1
        return times[k] + (context - self.nodes[k]) * rates[k]

    def _at(self, sequences: FloatArray) -> tuple[FloatArray, npt.NDArray[np.int8]]:
        """[sequences, nodes] times, rising along both, and their origins."""
        found = [grid.at(sequences) for grid in self._grids]
        ns = np.sum([f.ns for f in found], axis=0)
        origins = np.max([f.origin for f in found], axis=0)
        return np.maximum.accumulate(np.maximum.accumulate(ns, axis=0), axis=1), origins

    def _rows(self, ns: FloatArray, origins: npt.NDArray[np.int8]) -> list[tuple[list[float], list[float], list[int]]]:
        nodes = np.array(self.nodes)
        base = half_way(nodes)
        last = np.maximum((ns[:, -1] - ns[:, base]) / (nodes[-1] - nodes[base]), self._floor_rate)
        rates = np.concatenate([np.diff(ns, axis=1) / np.diff(nodes), last[:, None]], axis=1)
        codes = np.maximum(origins, np.roll(origins, -1, axis=1))
        codes[:, -1] = np.maximum(origins[:, -1], EXTRAPOLATED)
        return list(zip(ns.tolist(), rates.tolist(), codes.tolist(), strict=True))


class _DecodeGrid:
    """One decode operator: [measured numbers of sequences, nodes of Σ context], interpolated along the sequences."""

    def __init__(self, part: _Attention, nodes: FloatArray) -> None:
        self._sequences = part.times.outer
        found = [part.at(n, nodes) for n in self._sequences]
        ns, self._origin = np.array([f.ns for f in found]), np.array([f.origin for f in found])
        # few sequences of contexts beyond the measured ones take no longer than more sequences of the same sum
        known = np.where(self._origin == EXTRAPOLATED, np.inf, ns)
        ceiling = np.minimum.accumulate(known[::-1], axis=0)[::-1]
        self._ns = np.maximum.accumulate(np.minimum(ns, ceiling), axis=0)

    def at(self, sequences: FloatArray) -> Estimate:
        """[sequences, nodes]; past the last measured number of sequences at the last rate."""
        columns = [RaggedGrid(self._sequences[None, :], column).at((), sequences) for column in self._ns.T]
        near = np.minimum(np.searchsorted(self._sequences, sequences), len(self._sequences) - 1)
        origin = np.maximum(np.array([c.origin for c in columns]).T, self._origin[near])
        return Estimate(np.array([c.ns for c in columns]).T, np.maximum(origin, np.int8(INTERPOLATED)))


def _clamp(found: Estimate, floor: FloatArray | Sequence[float]) -> Estimate:
    low = np.asarray(floor)
    return Estimate(np.maximum(found.ns, low), np.where(found.ns < low, np.int8(CLAMPED), found.origin))
