"""Pipelines: which stages a request goes through. A pipeline is a generator that yields stages and gets results back.

The coordinator asks it for the next stage whenever one ends; where that stage runs and how long it takes is none of its
business. It may use the true output length only to say how long a decode is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from mist.request import Pipeline, Request

#: call it for a random generator of this request's own, the same under every policy
RequestRandom = Callable[[], np.random.Generator]


class PipelineFactory(Protocol):
    """Registered under the kind `pipeline`; a dataclass whose fields are its parameters.

    `kinds`: the stage kinds it may yield. `is_fixed`: every request goes through exactly these, in this order.
    It may have `sizes`, the names that it reads of a request's; then others in a scenario are remarked upon. It has
    `delays` where some of its kinds are those of a `Delay`, which no client serves.
    """

    @property
    def kinds(self) -> tuple[str, ...]: ...

    @property
    def is_fixed(self) -> bool: ...

    def __call__(self, request: Request, rng: RequestRandom) -> Pipeline:
        """The stages of `request`, one after another."""
        ...
