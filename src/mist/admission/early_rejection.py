"""Early rejection: a request that will miss its targets by the load of now is turned away before it costs anything.

At arrival by the estimated TTFT of the best prefill client and the TPOT of the best decode client; by the latter once
more before a KV cache is handed over, since load has changed meanwhile. It never looks at what is already let in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from mist.load import PRICES
from mist.registry import register
from mist.request import DECODE, PREFILL, ClientView, Request
from mist.units import seconds_to_ns


@register("admission", "early_rejection")
@dataclass
class EarlyRejection:
    """Turn away who would wait for its first token longer than `ttft_s`, or decode slower than `tpot_s`.

    TTFT: (tokens pending + the prompt) x the time per token of a full chunk beside the decodes of now. TPOT: a decode
    step with one sequence more. Both on the best client of the stage. Source: early rejection in Qin et al.,
    "Mooncake" (arXiv 2407.00079, section 7), with estimates of its own.
    """

    ttft_s: float | None = None
    tpot_s: float | None = None
    needs: ClassVar[frozenset[str]] = PRICES
    asks_before_decode: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.ttft_s is None and self.tpot_s is None:
            raise ValueError("ttft_s and tpot_s are both left out: give one of them")
        for name in ("ttft_s", "tpot_s"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"{name} is {value}: give more than 0 s")

    @property
    def stages(self) -> tuple[str, ...]:
        """The stage kinds whose clients it looks at."""
        wanted = {PREFILL: self.ttft_s, DECODE: self.tpot_s}
        return tuple(kind for kind, target in wanted.items() if target is not None)

    def refuses(self, request: Request, views: Mapping[str, Sequence[ClientView]], now: int) -> str:
        ttft_ns = min((_ttft_ns(view, request.input_tokens) for view in views.get(PREFILL, ())), default=0)
        tpot_ns = min((view.decode_ns for view in views.get(DECODE, ())), default=0)
        if self.ttft_s is not None and ttft_ns > seconds_to_ns(self.ttft_s):
            return f"an estimated TTFT of more than {self.ttft_s:g} s"
        if self.tpot_s is not None and tpot_ns > seconds_to_ns(self.tpot_s):
            return f"an estimated TPOT of more than {self.tpot_s:g} s"
        return ""


def _ttft_ns(view: ClientView, num_tokens: int) -> float:
    return (view.pending_prefill_tokens + num_tokens) * view.chunk_ns / max(1, view.chunk_tokens)
