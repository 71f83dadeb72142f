"""Model routing: each request is answered by one of several models, chosen at random, by length, column or classifier.

The other way to save a large model is a `cascade`. Which replica of the chosen model takes the request is the routing
policy's to say, never this pipeline's.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from itertools import accumulate

from mist.pipeline import RequestRandom
from mist.pipeline.models import Models
from mist.pipeline.parts import BYTES_PER_TOKEN, require_names
from mist.registry import register
from mist.request import Pipeline, Request, Stage


@register("pipeline", "model_router")
@dataclass
class ModelRouter(Models):
    """One rule of three: `probability` of each model, what is left being the last one's; `max_input_tokens` of each
    model but the last; or `column` and `above`, as in `Models`.

    `classifier`: a stage that reads the prompt before the choice and writes `verdict_tokens`; what it decides is told
    by the rule, and what it costs by its client.
    """

    probability: dict[str, float] = field(default_factory=dict)
    max_input_tokens: int | tuple[int, ...] | None = None
    classifier: str = ""
    verdict_tokens: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if [bool(self.probability), self.max_input_tokens is not None, bool(self.column)].count(True) != 1:
            raise ValueError("models are chosen by one of probability, max_input_tokens, or column and above")
        if unknown := self.probability.keys() - set(self.models):
            raise ValueError(f"probability has {sorted(unknown)[0]!r}: give it for {', '.join(self.models)}")
        if min(self.probability.values(), default=0) < 0 or sum(self.probability.values()) > 1 + 1e-9:
            raise ValueError("probability: give shares of the requests, from 0 to 1, and 1 together at most")
        self.limits("max_input_tokens", self.max_input_tokens)
        if self.classifier:
            require_names(classifier=self.classifier)
        if self.verdict_tokens < 0 or (self.verdict_tokens and not self.classifier):
            raise ValueError(f"verdict_tokens is {self.verdict_tokens}: give what a classifier writes, or 0")
        #: upper ends of the models' shares of [0, 1), the last one's aside
        self._shares = list(accumulate(self.probability.get(kind, 0.0) for kind in self.models[:-1]))

    @property
    def kinds(self) -> tuple[str, ...]:
        return (*([self.classifier] if self.classifier else []), *self.models)

    @property
    def is_fixed(self) -> bool:
        return False

    def __call__(self, request: Request, rng: RequestRandom) -> Pipeline:
        if self.classifier:
            num_bytes = request.input_tokens * BYTES_PER_TOKEN
            yield Stage(self.classifier, request.input_tokens, self.verdict_tokens, False, input_bytes=num_bytes)
        yield self.ask(self._choose(request, rng), request)

    def _choose(self, request: Request, rng: RequestRandom) -> int:
        if self.probability:
            return bisect_right(self._shares, rng().random())
        if self.column:
            return self.by_column(request)
        return bisect_left(self.limits("max_input_tokens", self.max_input_tokens), request.input_tokens)
