"""A cascade: the small model answers first, and where its answer isn't good enough a larger one answers anew.

The other way to save a large model is a `model_router`. How good an answer is isn't computed: which requests escalate
is drawn, or told by the workload, and a judge costs what its client says.
"""

from __future__ import annotations

from dataclasses import dataclass

from mist.pipeline import RequestRandom
from mist.pipeline.models import Models
from mist.pipeline.parts import BYTES_PER_TOKEN, require_names
from mist.registry import register
from mist.request import Pipeline, Request, Stage


@register("pipeline", "cascade")
@dataclass
class Cascade(Models):
    """Models in order, each on the whole prompt, until an answer is kept; the last model's always is.

    `escalate`: probability that a model's answer isn't kept; or `column` and `above`, as in `Models`. `judge`: a stage
    that reads prompt and answer of each model but the last, and writes `verdict_tokens`. `hold_answer`: an answer is
    shown once it is known to be kept, after the judge; else it is streamed, and taken back where a larger model answers
    anew. First token and output tokens are those of the answer that is kept.
    """

    escalate: float | None = None
    judge: str = ""
    verdict_tokens: int = 0
    hold_answer: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.escalate is None) != bool(self.column):
            raise ValueError("escalate: give a probability, or column and above in place of it")
        if self.escalate is not None and not 0 <= self.escalate <= 1:
            raise ValueError(f"escalate is {self.escalate:g}: give a probability, from 0 to 1")
        if self.judge:
            require_names(judge=self.judge)
        if self.verdict_tokens < 0 or (self.verdict_tokens and not self.judge):
            raise ValueError(f"verdict_tokens is {self.verdict_tokens}: give what a judge writes, or 0")

    @property
    def kinds(self) -> tuple[str, ...]:
        return (*self.models, *([self.judge] if self.judge else []))

    @property
    def is_fixed(self) -> bool:
        return False

    def __call__(self, request: Request, rng: RequestRandom) -> Pipeline:
        kept = self._kept(request, rng)
        for place in range(kept + 1):
            is_judged = place < len(self.models) - 1
            holds = place == kept and is_judged and self.hold_answer
            yield self.ask(place, request, visible=place == kept, gates=holds and not self.judge)
            if self.judge and is_judged:
                tokens = request.input_tokens + request.oracle_output_tokens
                num_bytes = tokens * BYTES_PER_TOKEN
                yield Stage(self.judge, tokens, self.verdict_tokens, False, input_bytes=num_bytes, gates=holds)

    def _kept(self, request: Request, rng: RequestRandom) -> int:
        """The place of the model whose answer is kept."""
        if self.escalate is None:
            return self.by_column(request)
        place, draw = 0, rng().random
        while place < len(self.models) - 1 and draw() < self.escalate:
            place += 1
        return place
