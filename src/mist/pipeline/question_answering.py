"""Question answering: prefill, then decode, with stages before and after them on request.

The plainest pipeline. It never looks into the text: what a stage before or after does is its client's business.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mist.pipeline import RequestRandom
from mist.pipeline.parts import BYTES_PER_TOKEN, answer, require_names
from mist.registry import register
from mist.request import DECODE, PREFILL, Pipeline, Request, Stage


@register("pipeline", "question_answering")
@dataclass
class QuestionAnswering:
    """`before`: stages that read the prompt first, such as [tokenize]; `after`: those that read the answer when it is
    whole, such as [detokenize]. ValueError where one of them is a prefill or decode.
    """

    sizes: ClassVar[tuple[str, ...]] = ()
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for parameter in ("before", "after"):
            for kind in getattr(self, parameter):
                require_names(**{parameter: kind})

    @property
    def kinds(self) -> tuple[str, ...]:
        return (*self.before, PREFILL, DECODE, *self.after)

    @property
    def is_fixed(self) -> bool:
        return not self.after  # without an answer there is nothing for these to read

    def __call__(self, request: Request, rng: RequestRandom) -> Pipeline:
        for kind in self.before:
            yield Stage(kind, request.input_tokens, input_bytes=request.input_tokens * BYTES_PER_TOKEN)
        result = yield from answer(request, request.input_tokens)
        if result.output_tokens:
            for kind in self.after:
                yield Stage(kind, result.output_tokens, input_bytes=result.output_tokens * BYTES_PER_TOKEN)
