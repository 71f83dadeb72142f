"""A rate limit per tenant: a token bucket, which fills at a rate and is emptied by the requests that it lets in.

What gateways charge their users by, in requests or in tokens. It looks at no client.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from mist.registry import register
from mist.request import ClientView, Request
from mist.units import NS_PER_S


@register("admission", "rate_limit")
@dataclass
class RateLimit:
    """Turn away who finds too little in the bucket; it holds `burst` and fills at `rate_per_s`, full at first.

    `of`: what is counted, requests, or tokens: those of the prompt and those predicted of the output. Kept as the
    instant at which the bucket will be full again: the virtual scheduling form of the generic cell rate algorithm
    (ITU-T I.371), exact in integer ns.
    """

    rate_per_s: float
    burst: int = 1
    of: Literal["requests", "tokens"] = "requests"
    sizes: ClassVar[tuple[str, ...]] = ("predicted_output_tokens",)
    _full_ns: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.rate_per_s > 0:
            raise ValueError(f"rate_per_s is {self.rate_per_s}: give more than 0")
        if self.of == "tokens" and self.burst == 1:
            raise ValueError("burst: give the tokens that the bucket holds, more than those of the longest request")
        if self.burst < 1:
            raise ValueError(f"burst is {self.burst}: give at least 1")

    def refuses(self, request: Request, views: Mapping[str, Sequence[ClientView]], now: int) -> str:
        cost = 1 if self.of == "requests" else request.input_tokens + request.predicted_output_tokens
        full_ns = max(self._full_ns, now) + int(cost * NS_PER_S / self.rate_per_s)  # down, so that a burst fits
        if full_ns - now > int(self.burst * NS_PER_S / self.rate_per_s):
            return f"more than {self.rate_per_s:g} {self.of} a second, with a burst of {self.burst:,}"
        self._full_ns = full_ns
        return ""
