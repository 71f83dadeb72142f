"""Reasoning in several turns: each turn's prompt is everything so far, thoughts included, and what is added to it.

A request asks itself again, or a verifier asks it, until the last turn's answer is shown. It never says what is added.
"""

from __future__ import annotations

from dataclasses import dataclass

from mist.pipeline import RequestRandom
from mist.pipeline.thinking import Thinking, require_counts, think
from mist.registry import register
from mist.request import DECODE, PREFILL, Pipeline, Request


@register("pipeline", "multi_turn_reasoning")
@dataclass
class MultiTurnReasoning(Thinking):
    """`turns` times a thought of its own length and an answer, with `turn_tokens` added to the prompt after each.

    Where the client caches prefixes, a turn finds the blocks of the one before there, unless they were evicted or it is
    on another client. Only the last turn's answer is shown.
    """

    turns: int = 3
    turn_tokens: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts(turns=self.turns, turn_tokens=self.turn_tokens)

    @property
    def kinds(self) -> tuple[str, ...]:
        return (PREFILL, DECODE)

    @property
    def is_fixed(self) -> bool:
        return False

    def __call__(self, request: Request, rng: RequestRandom) -> Pipeline:
        prompt, answer = request.input_tokens, request.oracle_output_tokens
        *earlier, last = self.thoughts(request, rng, self.turns)
        for thought in earlier:
            yield from think(prompt, thought, answer, visible=False, is_resumed=True)
            prompt += thought + answer + self.turn_tokens
        yield from think(prompt, last, answer)
