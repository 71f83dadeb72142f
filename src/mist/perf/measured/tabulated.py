"""Operators of one deployment as lists: per-row operators by rows, prefill attention by length, decode by Σ context.

Built once per client from the prices of `deployed`, and monotone; the `kernels` model reads the lists for every step
and asks for the parts of a time to explain it. It never looks at a step itself.
"""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mist.perf import ORIGINS
from mist.perf.measured.deployed import PricedAttention, Pricing
from mist.perf.measured.families import BY_NAME
from mist.perf.measured.grid import EXTRAPOLATED, INTERPOLATED, Estimate, FloatArray, RaggedGrid, half_way
from mist.perf.operators import Operator, windowed_area

#: What one more prompt of a length costs is the slope from one sequence to this many.
_MANY_SEQUENCES = 64.0

#: An operator, its share of a time in ns, and the code of that share's origin.
Part = tuple[Operator, float, int]

#: For a number of sequences: ns at each node of Σ context, ns per token behind it, code of the origin of each interval.
DecodeRow = tuple[list[float], list[float], list[int]]


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

    def unused(self) -> RowTable:
        """The same table with uses of its own, none so far."""
        twin = copy.copy(self)
        twin.uses, twin.beyond_ns = [0] * len(self.uses), np.zeros(len(ORIGINS))
        return twin

    def time(self, rows: int) -> float:
        """Time for any number of `rows`, computed anew where the table ends; counted as used."""
        if rows < len(self.ns):
            self.uses[rows] += 1
            return self.ns[rows]
        ns, shares = self._beyond(rows)
        self.beyond_ns += shares
        return ns

    def parts(self, rows: int) -> list[Part]:
        """Each operator's share of `time(rows)`; not counted as used."""
        found = [(o, self._price.rows(o, np.array([float(rows)]))) for o in self._operators]
        ns = self.ns[rows] if rows < len(self.ns) else self._beyond(rows)[0]
        times = scaled([float(e.ns[0]) for _, e in found], ns if rows else 0.0)
        return [(o, time, int(e.origin[0])) for (o, e), time in zip(found, times, strict=True)]

    def used_ns(self) -> FloatArray:
        """Time answered so far by origin."""
        used: FloatArray = self.by_origin @ np.array(self.uses, np.float64) + self.beyond_ns
        return used

    def _beyond(self, rows: int) -> tuple[float, FloatArray]:
        shares = self._shares(np.array([float(rows)]))[:, 0]
        total = float(shares.sum())
        ns = max(total, self.ns[-1])
        return ns, shares * (ns / total if total else 0.0)

    def _shares(self, rows: FloatArray) -> FloatArray:
        shares = np.zeros((len(ORIGINS), len(rows)))
        for o in self._operators:
            found = self._price.rows(o, rows)
            for code in np.unique(found.origin):
                shares[code] += np.where((found.origin == code) & (rows > 0), found.ns, 0.0)
        return shares


class PrefillTable:
    """Prefill attention of one window by chunk length, all its layers; what `chunk` gives rises with its length.

    `area_ns`: time of one (new token, context token) pair in bulk; `kv_ns`: of a token's KV at data-sheet bandwidth.
    `launch_ns`: what is left of a launch besides its floor, at least. `origin`: code of `ORIGINS` of chunks without
    context. `reads_cache`: prefills read cached KV as decodes do; `decodes` are the tables of the same window.
    """

    def __init__(self, price: Pricing, operators: list[Operator], last: int, decodes: Sequence[DecodeTable]) -> None:
        self.window = operators[0].window
        self._decodes = [decode for decode in decodes if decode.window == self.window]
        self.reads_cache = any("prefill_context" in o.kv_bytes for o in operators)
        self._operators = operators
        self._curves = [_PrefillCurves(price.attention(o)) for o in operators]
        self.area_ns: float = sum(c.area_ns for c in self._curves)
        self.kv_ns = sum(o.repeats * o.kv_bytes.get("prefill_context", 0.0) for o in operators) * price.byte_ns
        self.launch_ns = sum(c.launch_ns for c in self._curves)
        self.origin = max(c.origin for c in self._curves)
        self._size = last + 1
        found: list[list[float]] = [x.tolist() for x in self._at(np.arange(last + 1, dtype=np.float64))]
        self._first, self._beside, self._per_context = found

    def chunk(self, c: int) -> tuple[float, float, float]:
        """For `c` new tokens, ns: alone; beside a longer chunk; per token of context before it."""
        first, beside, per_context = self._first, self._beside, self._per_context
        if c < self._size:
            return first[c], beside[c], per_context[c]
        one, more, slope = (float(x[0]) for x in self._at(np.array([float(c)])))
        return max(one, first[-1]), max(more, beside[-1]), max(slope, per_context[-1])

    def time(self, chunks: Sequence[tuple[int, int]]) -> tuple[float, float]:
        """(new tokens alone, with what their contexts add), ns."""
        if len(chunks) == 1:
            c, s = chunks[0]
            if not s and c < self._size:
                ns = self._first[c]
                return ns, ns
        return self._any_chunks_ns(chunks)

    def _any_chunks_ns(self, chunks: Sequence[tuple[int, int]]) -> tuple[float, float]:
        """The longest chunk, every other at the cost of one more of its length, and what their contexts add.

        Without a window that is the larger of the longest single one (few tiles: the kernel waits for the slowest) and
        all of them at the bulk rate, within a window the latter. No prefill that reads cached keys and values is faster
        than their bytes, nor than a decode over the same contexts.
        """
        window, size, first, beside, per_context = self.window, self._size, self._first, self._beside, self._per_context
        longest = longest_beside = further = slowest = area = 0.0
        attended = tokens = 0
        for c, s in chunks:
            alone, more, slope = (first[c], beside[c], per_context[c]) if c < size else self.chunk(c)
            if alone > longest:
                longest = alone
            if more > longest_beside:
                longest_beside = more
            further += more
            tokens += c
            if s:
                if not window:
                    area += c * s
                    attended += s
                    if s * slope > slowest:
                        slowest = s * slope
                elif s < window:
                    area += windowed_area(c, s, window) - windowed_area(c, 0, window)
                    attended += s
                else:  # the same, as every one of the c tokens sees a full window
                    ramp = c if c < window else window
                    area += ramp * (window - 0.5 * ramp)
                    attended += window
        new_ns = ns = longest + further - longest_beside
        if attended:
            bulk_ns = area * self.area_ns
            ns += slowest if slowest > bulk_ns else bulk_ns
            if self.reads_cache:
                attended += tokens
                least_ns = attended * self.kv_ns
                for decode in self._decodes:
                    decode_ns = decode.time(len(chunks), attended)[0]
                    if decode_ns > least_ns:
                        least_ns = decode_ns
                if least_ns > ns:
                    ns = least_ns
        return new_ns, ns

    def parts(self, chunks: Sequence[tuple[int, int]], ns: float, origin: int) -> list[Part]:
        """Each operator's share of `ns`, by what its own curve says of the chunks."""
        weights = []
        for curve in self._curves:
            first = curve.at(np.array([float(c) for c, _ in chunks]))[0]
            area = sum(windowed_area(c, s, self.window) if self.window else c * s for c, s in chunks)
            weights.append(float(first.sum()) + area * curve.area_ns)
        times = scaled(weights, ns)
        origins = [max(origin, curve.origin) if origin == EXTRAPOLATED else curve.origin for curve in self._curves]
        return list(zip(self._operators, times, origins, strict=True))

    def _at(self, lengths: FloatArray) -> list[FloatArray]:
        curves = [c.at(lengths) for c in self._curves]
        return [np.maximum.accumulate(sum(parts)) for parts in zip(*curves, strict=True)]


class _PrefillCurves:
    """One prefill operator by length c: the first sequence, each further one, and what a token of context adds."""

    def __init__(self, part: PricedAttention) -> None:
        self._window = part.o.window
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
        work = self._areas(nodes[[base, -1]])
        self.area_ns = max(float((first[-1] - first[base]) / (work[1] - work[0])), area_floor)
        self._lengths, self._slopes = self._context_slopes(nodes[-1])

    def at(self, lengths: FloatArray) -> list[FloatArray]:
        slopes = np.maximum(np.interp(lengths, self._lengths, self._slopes), self.area_ns * lengths)
        return [_along(self._first, lengths), _along(self._further, lengths), slopes]

    def _areas(self, lengths: FloatArray) -> FloatArray:
        """(Query, key) pairs of prompts within the window."""
        ramp = np.minimum(lengths, self._window) if self._window else lengths
        return ramp * ramp / 2 + (lengths - ramp) * self._window

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
    """Decode attention of one window, all its layers: for each number of sequences, times at `nodes` of Σ context.

    `rows[n]` for each number of sequences; `full[n]`, with a window: (ns, code) of sequences that fill it.
    """

    def __init__(self, price: Pricing, operators: list[Operator], last: int) -> None:
        self.window = operators[0].window
        self._operators = operators
        parts = [price.attention(o) for o in operators]
        nodes = np.unique(np.concatenate([[1.0], *(part.times.inner for part in parts)]))
        self.nodes: list[float] = nodes.tolist()
        kv_bytes = sum(o.repeats * o.kv_bytes["decode_context"] for o in operators)
        work = sum(o.repeats * o.flop["decode_context"] * price.flop_ns(o) for o in operators)
        self._floor_rate = max(kv_bytes * price.byte_ns, work)
        self._grids = [_DecodeGrid(part, nodes) for part in parts]
        ns, origins = self._at(np.arange(last + 1, dtype=np.float64))
        self._highest, self._highest_rate = ns[-1], 0.0
        self.rows = self._rows(ns, origins)
        self._highest_rate = self.rows[-1][1][-1]
        self.launch_ns = float(max(0.0, (ns - self._floor_rate * nodes).min()))
        self._beyond: dict[int, DecodeRow] = {}
        self.full: list[tuple[float, int]] = []
        if self.window:
            self.full = [(0.0, 0), *(self.time(n, n * self.window) for n in range(1, last + 1))]

    def row(self, n: int) -> DecodeRow:
        """As `rows[n]`, for any number of sequences."""
        if n < len(self.rows):
            return self.rows[n]
        if n not in self._beyond:
            ns, origins = self._at(np.array([float(n)]))
            self._beyond[n] = self._rows(np.maximum(ns, self._highest), origins)[0]
        return self._beyond[n]

    def time(self, n: int, context: float) -> tuple[float, int]:
        """ns of `n` sequences that attend to `context` tokens in all, each to the window at most; and its origin."""
        if self.window and context >= self.window * n:
            if n < len(self.full):
                return self.full[n]
            context = self.window * n
        times, rates, origins = self.rows[n] if n < len(self.rows) else self.row(n)
        k = bisect_right(self.nodes, context) - 1
        return times[k] + (context - self.nodes[k]) * rates[k], origins[k]

    def parts(self, n: int, context: float) -> list[Part]:
        """Each operator's share of `time(n, context)`."""
        ns, _ = self.time(n, context)
        if self.window:
            context = min(context, self.window * n)
        k = bisect_right(self.nodes, context) - 1
        found = [grid.at(np.array([float(n)])) for grid in self._grids]
        times = scaled([float(np.interp(context, self.nodes, f.ns[0])) for f in found], ns)
        origins = [_interval_codes(f.origin)[0][k] for f in found]
        return list(zip(self._operators, times, origins, strict=True))

    def _at(self, sequences: FloatArray) -> tuple[FloatArray, npt.NDArray[np.int8]]:
        """[sequences, nodes] times, rising along both, and their origins."""
        found = [grid.at(sequences) for grid in self._grids]
        # the floor is a line, the clamped nodes of a window aren't: what lies between two of them is below it otherwise
        ns = np.maximum(np.sum([f.ns for f in found], axis=0), self._floor_rate * np.array(self.nodes))
        origins = np.max([f.origin for f in found], axis=0)
        return np.maximum.accumulate(np.maximum.accumulate(ns, axis=0), axis=1), origins

    def _rows(self, ns: FloatArray, origins: npt.NDArray[np.int8]) -> list[DecodeRow]:
        nodes = np.array(self.nodes)
        base = half_way(nodes)
        last = np.maximum((ns[:, -1] - ns[:, base]) / (nodes[-1] - nodes[base]), self._floor_rate)
        last = np.maximum.accumulate(np.maximum(last, self._highest_rate))  # rises with the sequences too
        rates = np.concatenate([np.diff(ns, axis=1) / np.diff(nodes), last[:, None]], axis=1)
        return list(zip(ns.tolist(), rates.tolist(), _interval_codes(origins), strict=True))


class _DecodeGrid:
    """One decode operator: [measured numbers of sequences, nodes of Σ context], interpolated along the sequences."""

    def __init__(self, part: PricedAttention, nodes: FloatArray) -> None:
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


def _interval_codes(origins: npt.NDArray[np.int8]) -> list[list[int]]:
    """[sequences, nodes] origins of the intervals behind each node: the worse of both ends; the last is open."""
    codes = np.maximum(origins, np.roll(origins, -1, axis=1))
    codes[:, -1] = np.maximum(origins[:, -1], EXTRAPOLATED)
    found: list[list[int]] = codes.tolist()
    return found


def scaled(weights: Sequence[float], total: float) -> list[float]:
    """`total` split in proportion to `weights`, evenly where they are all 0."""
    whole = sum(weights)
    return [total * w / whole if whole else total / len(weights) for w in weights]
