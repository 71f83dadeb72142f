"""Performance models: how long a step takes on a client's hardware. One contract, whatever the source of the numbers.

A model is prepared once per client (it tabulates there), then answers `step_time` with a few array reads per step.
It knows nothing of queues, policies or time of day; engine host overheads are added by the client.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from mist.hardware import Platform
from mist.model import ModelSpec
from mist.request import Step

#: where a step time may come from
ORIGINS = ("measured", "interpolated", "extrapolated", "roofline", "clamped")


@dataclass(frozen=True, slots=True)
class Deployment:
    """What a performance model is prepared for: a model in given dtypes on a platform, with the engine's limits."""

    model: ModelSpec
    platform: Platform
    weights_dtype: str
    kv_dtype: str
    max_num_batched_tokens: int
    max_num_seqs: int


class PerfModel(Protocol):
    """Registered under the kind `perf`; a dataclass whose fields are its parameters."""

    def supports(self, deployment: Deployment) -> str | None:
        """None if it can price this deployment's steps, else the reason why not."""
        ...

    def prepare(self, deployment: Deployment) -> None:
        """Build the tables for `deployment`; called once, before any step."""
        ...

    def step_time(self, step: Step) -> int:
        """Device time of `step` in ns; at least `floor_time(step)`."""
        ...

    def floor_time(self, step: Step) -> int:
        """max(FLOP / peak, bytes / bandwidth) of the step's work in ns, from data-sheet peaks: nothing can beat it."""
        ...

    def provenance(self) -> dict[str, float]:
        """Share of the answered device time by origin; the keys are among `ORIGINS`."""
        ...
