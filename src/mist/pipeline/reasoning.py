"""Reasoning on one path: prefill, then one decode of a thought that the user doesn't see and the answer behind it.

The lengths are those of `thinking.py`. It never says what is thought.
"""

from __future__ import annotations

from dataclasses import dataclass

from mist.pipeline import RequestRandom
from mist.pipeline.thinking import Thinking, think
from mist.registry import register
from mist.request import DECODE, PREFILL, Pipeline, Request


@register("pipeline", "reasoning")
@dataclass
class Reasoning(Thinking):
    """TTFT is the first token of the answer, so the thought counts in it; parameters as in `Thinking`."""

    @property
    def kinds(self) -> tuple[str, ...]:
        return (PREFILL, DECODE)

    @property
    def is_fixed(self) -> bool:
        return False  # it generates more than the request's output

    def __call__(self, request: Request, rng: RequestRandom) -> Pipeline:
        (thought,) = self.thoughts(request, rng, 1)
        yield from think(request.input_tokens, thought, request.oracle_output_tokens)
