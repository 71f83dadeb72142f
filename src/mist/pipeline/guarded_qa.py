"""Guarded question answering: guards read the prompt, before the model or beside it, and the answer.

Whether a guard is a list of expressions, a classifier or a model that writes its verdict is told by the client that
serves its stage. It never shows a token of a prompt that the guards have not passed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from mist.pipeline import RequestRandom
from mist.pipeline.parts import BYTES_PER_TOKEN, GUARD_INPUT, GUARD_OUTPUT, Answer, answer, require_names
from mist.registry import register
from mist.request import DECODE, PREFILL, TURNED_AWAY, All, Pipeline, Request, Stage, StageResult


@register("pipeline", "guarded_qa")
@dataclass
class GuardedQA:
    """Input guards, prefill, decode, output guards; guards of a list follow each other.

    `verdict_tokens`: tokens that a guard writes, by its stage; one that isn't named only reads. `refused`: share of
    requests that the input guards refuse; such a request ends with them, and isn't counted as served. `beside`: the
    input guards run beside prefill and decode, whose tokens are held back until they have passed; the tokens of a
    refused request are never shown.
    `hold_answer`: the answer is held back until the output guards have passed, else it is streamed while it is written.
    """

    sizes: ClassVar[tuple[str, ...]] = ()
    input_guards: tuple[str, ...] = (GUARD_INPUT,)
    output_guards: tuple[str, ...] = (GUARD_OUTPUT,)
    beside: bool = False
    hold_answer: bool = False
    refused: float = 0.0
    verdict_tokens: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for parameter in ("input_guards", "output_guards"):
            for kind in getattr(self, parameter):
                require_names(**{parameter: kind})
        if not 0 <= self.refused <= 1:
            raise ValueError(f"refused is {self.refused:g}: give a share of the requests, from 0 to 1")
        for kind, tokens in self.verdict_tokens.items():
            if kind not in (*self.input_guards, *self.output_guards):
                raise ValueError(f"verdict_tokens has {kind!r}: give a stage of input_guards or output_guards")
            if tokens < 0:
                raise ValueError(f"verdict_tokens of {kind!r} is {tokens}: give the tokens that it writes, or 0")
        for parameter in ("beside", "refused"):
            if getattr(self, parameter) and not self.input_guards:
                raise ValueError(f"{parameter} needs input_guards: such as [{GUARD_INPUT}]")
        if self.hold_answer and not self.output_guards:
            raise ValueError(f"hold_answer needs output_guards: such as [{GUARD_OUTPUT}]")

    @property
    def kinds(self) -> tuple[str, ...]:
        return (*self.input_guards, PREFILL, DECODE, *self.output_guards)

    @property
    def is_fixed(self) -> bool:
        return False

    def __call__(self, request: Request, rng: RequestRandom) -> Pipeline:
        is_refused = self.refused > 0 and bool(rng().random() < self.refused)
        if self.beside:
            guards = self._guards(self.input_guards, request.input_tokens, gates=True)
            both = yield All((guards, answer(request, request.input_tokens, visible=not is_refused)))
            result = both.parts[1]
        elif self.input_guards:
            yield from self._guards(self.input_guards, request.input_tokens, gates=True)
        if is_refused:
            return TURNED_AWAY
        if not self.beside:
            result = yield from answer(request, request.input_tokens)
        if result.output_tokens:
            yield from self._guards(self.output_guards, result.output_tokens, gates=self.hold_answer)
        return None

    def _guards(self, kinds: tuple[str, ...], tokens: int, *, gates: bool) -> Answer:
        """Guards that read the same text, one after another; the result of the last."""
        result = StageResult(0, 0)
        for kind in kinds:
            result = yield Stage(
                kind,
                input_tokens=tokens,
                oracle_output_tokens=self.verdict_tokens.get(kind, 0),
                visible=False,
                input_bytes=tokens * BYTES_PER_TOKEN,
                gates=gates,
            )
        return result
