"""What a user may write of a pool's speculative decoding: how many tokens are drafted, by what, and accepted how often.

A part of the schema, of a `Pool`. A validated section says what drafts for a model. It never looks at the devices or
the engine: whether they go together is the pool's to check.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field, model_validator

from mist.errors import Problem
from mist.model import ModelSpec
from mist.scenario.catalogued import Catalogued, left_out
from mist.scenario.named import Located, Section, problem


class SpeculationSettings(Section):
    """Speculative decoding: drafts for every decode in each of its steps, verified together by the model."""

    num_draft_tokens: Annotated[int, Field(ge=1, le=64)]
    """tokens drafted for each sequence and step"""
    acceptance: Annotated[float, Field(ge=0, le=1)]
    """accepted / drafted tokens; a step then emits 1 + num_draft_tokens x acceptance on average"""
    method: Literal["draft_model", "eagle", "mtp", "ngram"] = left_out()
    """what drafts: a model of its own, a head of one decoder layer (eagle, mtp), or free look-ups (ngram)"""
    draft_model: Annotated[ModelSpec, Catalogued("models")] | None = None
    """the model that drafts, on the same devices: a name of `mist list models`, or the path of a config.json"""
    draft_cost: Annotated[float, Field(ge=0, le=100)] | None = None
    """device time of one drafted token over that of the step that verifies, in place of the priced passes"""

    @classmethod
    def conflicts(cls, given: Set[str]) -> Iterator[Located]:
        """Something has to draft."""
        if not given & {"method", "draft_model"}:
            yield (
                ("method",),
                Problem("it isn't said what drafts", hint="method: mtp, eagle or ngram; or a draft_model"),
            )

    @model_validator(mode="after")
    def _agrees(self) -> SpeculationSettings:
        method = self.method or "draft_model"
        if method == "draft_model" and self.draft_model is None:
            raise problem("no draft_model is given", "such as draft_model: llama-3.2-1b", ("method",))
        if method != "draft_model" and self.draft_model is not None:
            raise problem(f"a draft_model is given, and the method is {method}", "remove one of them", ("method",))
        if self.draft_model is not None and self.draft_model.is_encoder:
            raise problem(f"{self.draft_model.name} is an encoder: it drafts nothing", "a decoder", ("draft_model",))
        return self.model_copy(update={"method": method})

    @property
    def tokens_per_decode(self) -> int:
        """Tokens that a step computes for each sequence: the one sampled last, and the drafts."""
        return 1 + self.num_draft_tokens

    def draft_of(self, model: ModelSpec) -> ModelSpec | None:
        """What drafts for `model`: a head is its last decoder layer and its classifier; None for look-ups."""
        if self.method in ("eagle", "mtp"):
            return replace(model, name=f"{self.method} head of {model.name}", layers=(model.layers[-1].repeated(1),))
        return self.draft_model
