"""A pipeline that is a plain list of stages; `pipeline: [prefill, decode]` in a scenario stands for it.

The default. Every request goes through the same list: it asks nothing of a request but its lengths.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from mist.pipeline import RequestRandom
from mist.registry import register
from mist.request import DECODE, PREFILL, Pipeline, Request, Stage


@register("pipeline", "stages")
@dataclass
class StageList:
    """A plain list of stages: a decode generates the request's output, any other stage computes its input.

    `kinds`: the stages, in order; one decode at most, directly after the stage whose context it continues. A decode of
    no tokens is left out. ValueError for a list that isn't so.
    """

    sizes: ClassVar[tuple[str, ...]] = ()
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
