"""Fields that name an entry of a catalogue, and fields that are filled in later: what the sections of a client share.

A part of the schema, below its sections. A field comes out as the device, model or engine that was named; what is
wrong with it is told at its own place. It never looks at another field.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationInfo
from pydantic_core import CoreSchema, core_schema

from mist.errors import Problem, ScenarioError
from mist.scenario import catalogue
from mist.scenario.named import problem, problems, short
from mist.scenario.source import KeyPath


def left_out() -> Any:
    """The default of what is filled in once the engine and the model are known."""
    return Field(default_factory=lambda: None)


@dataclass(frozen=True, slots=True)
class Catalogued:
    """Marks a field as a value of a catalogue: written as a name, the path of a file, or a mapping."""

    kind: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.with_info_plain_validator_function(self._validate)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [{"enum": catalogue.names(self.kind)}, {"type": "string"}, {"type": "object"}]}

    def _validate(self, given: Any, info: ValidationInfo) -> Any:
        if not isinstance(given, str | dict):
            known = f"known: {', '.join(catalogue.names(self.kind))}"
            raise problem(f"must be a name, the path of a file or a mapping, not {short(given)}", known)
        folder = (info.context or {}).get("folder", Path())
        try:
            return catalogue.read(self.kind, given, folder)[0]
        except ScenarioError as error:
            raise problems(_inside(given, p) for p in error.problems) from None


def _inside(given: Any, found: Problem) -> tuple[KeyPath, Problem]:
    path, message = catalogue.key_of(found.message, given)
    return path, replace(found, message=message.removeprefix(".".join(map(str, path))).lstrip(": "))
