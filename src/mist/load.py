"""Load measures: the numbers by which routers and admission policies compare clients, read off their views.

Shared by the policies that take a `measure`, and by the estimates of time. It looks at views only, and chooses nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

from mist.request import ClientView

Measure = Literal[
    "outstanding", "waiting", "pending_prefill_tokens", "decodes", "tokens_in_process", "kv_in_use", "estimated_time"
]

#: fields of a view that are only brought up to date for policies that say that they read them
PRICES = frozenset({"chunk_tokens", "chunk_ns", "decode_ns"})


def estimated_ns(view: ClientView, longest_decode: int, prefill_tokens: int = 0) -> int:
    """How long a client will be at work, ns, with `prefill_tokens` more and `longest_decode` steps to decode.

    Prefill steps x t_chunk + max(0, longest remaining decode - prefill steps) x t_decode: a decode gains a token in
    each prefill step too. Source: the runtime estimate of HERMES (arXiv 2504.09775). 0 for a client without a model.
    """
    prefill_steps = prefill_steps_of(view, prefill_tokens)
    return prefill_steps * view.chunk_ns + max(0, longest_decode - prefill_steps) * view.decode_ns


def prefill_steps_of(view: ClientView, prefill_tokens: int = 0) -> int:
    """Full chunks that what waits there and `prefill_tokens` more make."""
    return -(-(view.pending_prefill_tokens + prefill_tokens) // view.chunk_tokens) if view.chunk_tokens else 0


def measured(measure: Measure) -> Callable[[ClientView], float]:
    """The function of a view that `measure` stands for; less is better."""
    return _MEASURES[measure]


def fields_of(measure: Measure) -> frozenset[str]:
    """The fields of a view that have to be asked for."""
    return _FIELDS.get(measure, frozenset())


_MEASURES: Mapping[str, Callable[[ClientView], float]] = {
    "outstanding": lambda view: view.num_outstanding,
    "waiting": lambda view: view.num_waiting,
    "pending_prefill_tokens": lambda view: view.pending_prefill_tokens,
    "decodes": lambda view: view.num_decodes,
    "tokens_in_process": lambda view: view.pending_prefill_tokens + view.decode_context,
    "kv_in_use": lambda view: view.kv_blocks_used / max(1, view.kv_blocks),
    "estimated_time": lambda view: estimated_ns(view, view.longest_decode),
}
_FIELDS: Mapping[str, frozenset[str]] = {
    "decodes": frozenset({"num_decodes"}),
    "estimated_time": PRICES | {"longest_decode"},
}
