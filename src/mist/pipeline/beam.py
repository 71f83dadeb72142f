"""Beam search over thoughts: in rounds, each beam is continued several times, all are scored and the best are kept.

A beam goes on with a new prefill of the prompt and its thought so far, from which its continuations share the KV
blocks. It never says which beams are best: that is drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

from mist.pipeline import RequestRandom
from mist.pipeline.parts import Answer
from mist.pipeline.thinking import SCORE, around, candidate, read, require_counts, require_cv, require_score, think
from mist.registry import register
from mist.request import DECODE, PREFILL, All, Pipeline, Request


@register("pipeline", "beam")
@dataclass
class Beam:
    """`rounds` rounds of `width` beams with `expansion` continuations each, all of them from the prompt at first.

    A continuation has `round_tokens` tokens, on average where `cv` is above 0 (lognormal), and a reward model reads it
    behind prompt and thought in a stage `score`, once it has ended. When all of a round are scored, `width` of them are
    kept; after the last round the answer, the request's output, is streamed behind the best. ValueError for values out
    of range.
    """

    width: int = 4
    expansion: int = 4
    rounds: int = 4
    round_tokens: int = 256
    cv: float = 0.0
    score: str = SCORE

    def __post_init__(self) -> None:
        require_counts(width=self.width, expansion=self.expansion, rounds=self.rounds, round_tokens=self.round_tokens)
        require_cv(self.cv)
        require_score(self.score)

    @property
    def kinds(self) -> tuple[str, ...]:
        return (PREFILL, DECODE, self.score)

    @property
    def is_fixed(self) -> bool:
        return False

    def __call__(self, request: Request, rng: RequestRandom) -> Pipeline:
        draws, num = rng(), self.width * self.expansion
        beams = [0]
        for _ in range(self.rounds):
            lengths = around(self.round_tokens, self.cv, num, lambda: draws).tolist()
            best = draws.permutation(num)[: self.width].tolist()
            each = num // len(beams)
            parts = [lengths[i * each : (i + 1) * each] for i in range(len(beams))]
            prompts = [request.input_tokens + thought for thought in beams]
            yield All([self._continued(prompt, part) for prompt, part in zip(prompts, parts, strict=True)])
            thoughts = [beams[i // each] + length for i, length in enumerate(lengths)]
            beams = [thoughts[i] for i in best]
        yield from think(request.input_tokens + beams[0], 0, request.oracle_output_tokens)

    def _continued(self, prompt_tokens: int, lengths: list[int]) -> Answer:
        """A beam's prefill, then its continuations."""
        yield read(prompt_tokens)
        return (yield All([candidate(prompt_tokens, length, self.score) for length in lengths]))
