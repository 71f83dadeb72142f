"""What advice is made of: reasons for a latency or a cost, the changes that might help, and what each did when run.

Values that the rest of the package fills and words are made of. Nothing is measured or run here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

QUEUEING, KV, LINK, RETRIEVAL, STAGE, HOST, INTERFERENCE = (
    "queueing", "kv", "link", "retrieval", "stage", "host", "interference",
)  # fmt: skip
#: reasons for a cost alone, beside `HOST` and `KV`: devices that wait for work, and decodes of few sequences
IDLE, BATCH = "idle", "batch"
#: what the advice is called where no reason is above `HEALTHY`
NONE = "none"

#: a latency of which no single reason explains this share is called healthy: without it, most of it would be there
HEALTHY = 1 / 3


#: what a cost is told per, the first that there is
COST_FIGURES = ("usd_per_million_output_tokens", "usd_per_million_total_tokens")


@dataclass(frozen=True, slots=True)
class Change:
    """Overrides of the scenario, as `mist.run` takes them, and what they do in words."""

    words: str
    overrides: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class WhatIf:
    """A change that was run with the same seed: the figures that came out, and whether that which it is for fell."""

    change: Change
    figures: Mapping[str, float | None]
    helps: bool

    def as_json(self) -> dict[str, Any]:
        return {"change": self.change.words, "overrides": dict(self.change.overrides),
                "figures": dict(self.figures), "helps": self.helps}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Reason:
    """`share` of a figure is due to `code` at a pool, or at what joins two ("prefill -> decode").

    `figure`: a name of `Advice.figures`; `amount`: that share of it, in its unit; `facts`: what was seen there,
    fractions and seconds; `what_ifs`: those that were run, in the order of `changes`.
    """

    code: str
    at: str
    figure: str
    share: float
    amount: float
    facts: Mapping[str, Any] = field(default_factory=dict)
    what_ifs: Sequence[WhatIf] = ()

    def as_json(self) -> dict[str, Any]:
        return {"code": self.code, "at": self.at, "figure": self.figure, "share": self.share, "amount": self.amount,
                "facts": dict(self.facts), "what_ifs": [each.as_json() for each in self.what_ifs]}  # fmt: skip
