"""The clients of a scenario by what is written of them: with a model, without one, or a KV store.

A part of the schema that only tells them apart. What each may say is in `clients`, `hosts` and `stores`.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

from mist import registry
from mist.scenario.clients import Pool
from mist.scenario.hosts import HostPool
from mist.scenario.named import Section
from mist.scenario.pricing import runs_without_model
from mist.scenario.stores import StorePool

AnyClient = Pool | HostPool | StorePool


class _ByContent:
    """Marks the union: with `memory` a `StorePool`, with a performance model that needs no other a `HostPool`."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        choices = {tag: handler.generate_schema(kind) for tag, kind in _KINDS.items()}
        return core_schema.tagged_union_schema(choices, _kind_of)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return handler(core_schema.union_schema(list(schema["choices"].values())))


#: parts of a location that stand for no key begin with [
_KINDS: dict[str, type[Section]] = {"[model]": Pool, "[host]": HostPool, "[store]": StorePool}


def _kind_of(value: Any) -> str:
    for tag, kind in _KINDS.items():
        if isinstance(value, kind):
            return tag
    if not isinstance(value, dict) or "model" in value:
        return "[model]"
    if "memory" in value:
        return "[store]"
    perf = value.get("perf")
    name = next(iter(perf), "") if isinstance(perf, dict) else perf
    known = isinstance(name, str) and name in registry.names("perf")
    return "[host]" if known and runs_without_model(str(name)) else "[model]"


AnyPool = Annotated[AnyClient, _ByContent()]
