"""Pipelines: which stages a request goes through. A pipeline is a generator that yields stages and gets results back.

The coordinator asks it for the next stage whenever one ends; where that stage runs and how long it takes is none of its
business. It may use the true output length only to say how long a decode is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from mist.registry import register
from mist.request import DECODE, PREFILL, Pipeline, Request, Stage

#: call it for a random generator of this request's own, the same under every policy
RequestRandom = Callable[[], np.random.Generator]


class PipelineFactory(Protocol):
    """Registered under the kind `pipeline`; a dataclass whose fields are its parameters.

    `kinds`: the stage kinds it may yield. `is_fixed`: every request goes through exactly these, in this order.
    """

    @property
    def kinds(self) -> tuple[str, ...]: ...

    @property
    def is_fixed(self) -> bool: ...

    def __call__(self, request: Request, rng: RequestRandom) -> Pipeline:
        """The stages of `request`, one after another."""
        ...


@register("pipeline", "stages")
@dataclass
class StageList:
    """A plain list of stages: a decode generates the request's output, any other stage computes its input.

    `kinds`: the stages, in order; one decode at most, directly after the stage whose context it continues. A decode of
    no tokens is left out. ValueError for a list that isn't so.
    """

    kinds: tuple[str, ...] = (PREFILL, DECODE)
    is_fixed: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        if not self.kinds:
            raise ValueError("a request needs at least one stage: such as [prefill, decode]")
        if self.kinds[0] == DECODE:
            raise ValueError("a decode needs a prefill before it: such as [prefill, decode]")
        if self.kinds.count(DECODE) > 1:
            raise ValueError(f"{self.kinds.count(DECODE)} decodes: each generates the whole output, so keep one")

    def __call__(self, request: Request, rng: RequestRandom) -> Pipeline:
        for kind in self.kinds:
            if kind != DECODE:
                yield Stage(kind, input_tokens=request.input_tokens)
            elif request.oracle_output_tokens:
                yield Stage(DECODE, oracle_output_tokens=request.oracle_output_tokens)
