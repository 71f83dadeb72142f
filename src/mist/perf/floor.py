"""The floor under every step of a deployment: max(FLOP / peak, compulsory bytes / bandwidth), from a few array reads.

For performance models whose times follow from no operators, such as learned ones, which hold each answer against it.
It knows data-sheet peaks only, and never how long anything really takes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mist.perf import Deployment
from mist.perf.operators import NETWORK_KINDS, Operator, StepSums, forward_pass
from mist.request import Step

#: The sums of `StepSums` that work is linear in, in the order of all rates here.
_SUMS = ("tokens", "sampled", "decodes", "decode_context", "prefill_tokens", "prefill_context", "prefill_area")
#: Tokens for which the weights that a step touches are tabulated.
_TABULATED_TOKENS = 8192

_Rates = tuple[float, float, float, float, float, float, float]


class StepFloor:
    """Tabulated for one deployment: weights by tokens, all other work by its rate for each sum of a step.

    FLOP count at the peak of each operator's dtype, weights once, KV within each attention window; no activation counts
    and no time on the links. Attention groups that share experts count as even ones.
    """

    def __init__(self, deployment: Deployment) -> None:
        device = deployment.platform.device
        self._byte_ns = 1e9 / device.memory_bytes_per_s
        self._operators = [o for o in forward_pass(deployment) if o.kind not in NETWORK_KINDS]
        self._by_window: list[tuple[int, _Rates, _Rates]] = []
        for window in sorted({o.window for o in self._operators}):
            mine = [o for o in self._operators if o.window == window]
            flop_ns = _rates((o.flop, o.repeats * 1e9 / device.peak(o.dtype)) for o in mine)
            kv_ns = _rates((o.kv_bytes, o.repeats * self._byte_ns) for o in mine)
            self._by_window.append((window, flop_ns, kv_ns))
        self._sampled_ns, self._decodes_ns, self._prefill_ns = (
            sum(self._weights_ns(o, 1) for o in self._operators if o.driver in drivers)
            for drivers in (("sampled",), ("decodes",), ("prefill_tokens", "prefill_context"))
        )
        self._dense = [o for o in self._operators if o.driver in ("tokens", "shared_tokens")]
        last = max(deployment.max_num_batched_tokens, _TABULATED_TOKENS)
        self._dense_ns = [0.0, *self._dense_weights_ns(last)]

    def time(self, step: Step) -> float:
        """The floor of `step`, ns."""
        n, chunks, tokens = step.num_decodes, step.chunks, step.num_tokens
        memory = self._dense_ns[tokens] if tokens < len(self._dense_ns) else self._dense_at(tokens)
        if step.num_sampled:
            memory += self._sampled_ns
        if n:
            memory += self._decodes_ns
        context, area, compute = 0, 0.0, 0.0
        if chunks:
            memory += self._prefill_ns
            for c, s in chunks:
                context += s + c
                area += c * (s + 0.5 * c)
        sums = (tokens, step.num_sampled, n, step.decode_context, step.num_prefill_tokens, context, area)
        for window, (a, b, c_, d, e, f, g), (_, _, _, kv, _, prefill_kv, _) in self._by_window:
            t, r, m, x, p, y, z = _windowed(step, window) if window else sums
            compute += a * t + b * r + c_ * m + d * x + e * p + f * y + g * z
            memory += kv * x + prefill_kv * y
        return compute if compute > memory else memory

    def work(self, step: Step) -> tuple[float, float]:
        """(FLOP, compulsory bytes) of `step` on one device."""
        sums = StepSums.of(step)
        return sum(o.flop_of(sums) for o in self._operators), sum(o.compulsory_bytes_of(sums) for o in self._operators)

    def _dense_weights_ns(self, last: int) -> list[float]:
        if not any(o.experts for o in self._dense):
            return [self._dense_at(1)] * last
        return [self._dense_at(tokens) for tokens in range(1, last + 1)]

    def _dense_at(self, tokens: int) -> float:
        return sum(self._weights_ns(o, tokens) for o in self._dense)

    def _weights_ns(self, o: Operator, rows: int) -> float:
        one: dict[str, Any] = {o.driver: float(rows)}
        return o.repeats * self._byte_ns * o.weight_bytes_of(StepSums(**one))


def _windowed(step: Step, window: int) -> _Rates:
    seen = StepSums.of(step).windowed(window)
    a, b, c, d, e, f, g = (float(getattr(seen, name)) for name in _SUMS)
    return a, b, c, d, e, f, g


def _rates(parts: Iterable[tuple[Mapping[str, float], float]]) -> _Rates:
    """Σ coefficients x factor for each of `_SUMS`."""
    total = dict.fromkeys(_SUMS, 0.0)
    for coefficients, factor in parts:
        for name, value in coefficients.items():
            total["tokens" if name == "shared_tokens" else name] += factor * value
    a, b, c, d, e, f, g = total.values()
    return a, b, c, d, e, f, g
