"""Batching policies that are for one stage alone, on clients that serve others: problems of a client's section.

A part of the schema. It looks at names alone, never at the pipeline or at other clients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mist import registry
from mist.errors import Problem
from mist.scenario.named import Located, Spec


def unserved(batching: Spec, serves: Sequence[str]) -> Iterator[Located]:
    """Stages that the client serves and its batching policy doesn't, as a problem at `batching`."""
    able = getattr(registry.lookup("batching", batching.name), "serves", None)
    others = [stage for stage in serves if able is not None and stage not in able]
    if others:
        message = f"{batching.name} serves {', '.join(able or ())} alone, and the client serves {', '.join(others)} too"
        yield ("batching", batching.name), Problem(message, hint="take another, or change serves")


def is_static(batching: Spec) -> bool:
    """Whether it admits only when nothing runs."""
    return batching.name == "static" or batching.params.get("capacity_scheduler_policy") == "static_batch"
