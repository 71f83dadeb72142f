"""Batching policies that don't go with their client: for one stage alone, or without what a client must know of them.

A part of the schema: problems of a client's section. It never looks at the pipeline or at other clients.
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


def unlimited(batching: Spec) -> Iterator[Located]:
    """Limits of a step that the policy, which may be a plug-in's, doesn't say; a KV cache is sized by them."""
    if batching.refused():
        return
    policy = batching.build()
    for name in ("max_num_seqs", "max_num_batched_tokens"):
        if getattr(policy, name, None) is None:
            hint = f"a field such as `{name}: int = 2048`: the memory of a step's activations is reckoned with it"
            yield ("batching", batching.name), Problem(f"the batching policy {batching.name} has no {name}", hint=hint)


def is_static(batching: Spec) -> bool:
    """Whether it admits only when nothing runs."""
    return batching.name == "static" or batching.params.get("capacity_scheduler_policy") == "static_batch"
