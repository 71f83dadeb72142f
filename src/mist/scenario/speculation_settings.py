"""What a user may write of a pool's speculative decoding: how many tokens are drafted, by what, and accepted how often.

A part of the schema, of a `Pool`. A validated section says what drafts for a model. It never looks at the devices or
the engine: whether they go together is the pool's to check.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationInfo, model_validator
from pydantic_core import CoreSchema, core_schema

from mist.errors import Problem
from mist.model import ModelSpec
from mist.scenario.catalogued import Catalogued, left_out
from mist.scenario.named import Located, Section, problem
from mist.speculation import AcceptedLengths


class _ShareOrMeasured(Catalogued):
    """Marks a field as a share, 0 to 1, or as measured lengths of the catalogue."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        share = core_schema.float_schema(ge=0, le=1, strict=True)
        return core_schema.with_info_wrap_validator_function(self._read, share)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        named = super().__get_pydantic_json_schema__(schema, handler)["anyOf"]
        return {"anyOf": [{"type": "number", "minimum": 0, "maximum": 1}, *named]}

    def _read(self, given: Any, handler: Any, info: ValidationInfo) -> Any:
        return self._validate(given, info) if isinstance(given, str | dict) else handler(given)


class SpeculationSettings(Section):
    """Speculative decoding: drafts for every decode in each of its steps, verified together by the model."""

    num_draft_tokens: Annotated[int, Field(ge=1, le=64)]
    """tokens drafted for each sequence and step"""
    acceptance: Annotated[float | AcceptedLengths, _ShareOrMeasured("acceptance")] | None = None
    """accepted / drafted tokens, a step then emits 1 + num_draft_tokens x acceptance on average; or as it was measured:
    a name of `mist list acceptance`, the path of a file or a mapping"""
    accepted_length: Annotated[float, Field(ge=1, le=65)] | None = None
    """mean tokens that a step emits, its own one included, in place of acceptance"""
    method: Literal["draft_model", "eagle", "mtp", "ngram"] = left_out()
    """what drafts: a model of its own, a head of one decoder layer (eagle, mtp), or free look-ups (ngram)"""
    draft_model: Annotated[ModelSpec, Catalogued("models")] | None = None
    """the model that drafts, on the same devices: a name of `mist list models`, or the path of a config.json"""
    draft_cost: Annotated[float, Field(ge=0, le=100)] | None = None
    """device time of one drafted token over that of the step that verifies, in place of the priced passes"""

    @classmethod
    def conflicts(cls, given: Set[str]) -> Iterator[Located]:
        """Something has to draft, and how often that is accepted has to be known."""
        if not given & {"method", "draft_model"}:
            yield (
                ("method",),
                Problem("it isn't said what drafts", hint="method: mtp, eagle or ngram; or a draft_model"),
            )
        if {"acceptance", "accepted_length"} <= given:
            message = "acceptance and accepted_length are both given"
            yield ("accepted_length",), Problem(message, hint="keep one of them")
        if not given & {"acceptance", "accepted_length"}:
            hint = "acceptance: 0.6 of the drafted tokens, or a name of `mist list acceptance`; or accepted_length: 2.4"
            yield ("acceptance",), Problem("it isn't said how often drafts are accepted", hint=hint)

    @model_validator(mode="after")
    def _agrees(self) -> SpeculationSettings:
        method = self.method or "draft_model"
        if method == "draft_model" and self.draft_model is None:
            raise problem("no draft_model is given", "such as draft_model: llama-3.2-1b", ("method",))
        if method != "draft_model" and self.draft_model is not None:
            raise problem(f"a draft_model is given, and the method is {method}", "remove one of them", ("method",))
        if self.draft_model is not None and self.draft_model.is_encoder:
            raise problem(f"{self.draft_model.name} is an encoder: it drafts nothing", "a decoder", ("draft_model",))
        self._check_lengths()
        return self.model_copy(update={"method": method})

    def _check_lengths(self) -> None:
        """ValidationError where fewer drafts were measured, or could be accepted."""
        k = self.num_draft_tokens
        if isinstance(self.acceptance, AcceptedLengths) and k > len(self.acceptance.accepted_lengths):
            message = f"{self.acceptance.name} was measured with up to {len(self.acceptance.accepted_lengths)} drafted"
            raise problem(message, "lower num_draft_tokens, or give a share", ("acceptance",))
        if self.accepted_length is not None and self.accepted_length > k + 1:
            message = f"a step that verifies {k} emits {k + 1} tokens at most, not {self.accepted_length:g}"
            raise problem(message, f"a mean from 1 to {k + 1}", ("accepted_length",))

    @property
    def accepted_share(self) -> float:
        """Accepted over drafted tokens, however the user told them."""
        if isinstance(self.acceptance, float):
            return self.acceptance
        k, length = self.num_draft_tokens, self.accepted_length
        if isinstance(self.acceptance, AcceptedLengths):
            length = self.acceptance.accepted_lengths[k - 1]
        assert length is not None
        return (length - 1) / k

    @property
    def tokens_per_decode(self) -> int:
        """Tokens that a step computes for each sequence: the one sampled last, and the drafts."""
        return 1 + self.num_draft_tokens

    def draft_of(self, model: ModelSpec) -> ModelSpec | None:
        """What drafts for `model`: a head is its last decoder layer and its classifier; None for look-ups."""
        if self.method in ("eagle", "mtp"):
            return replace(model, name=f"{self.method} head of {model.name}", layers=(model.layers[-1].repeated(1),))
        return self.draft_model
