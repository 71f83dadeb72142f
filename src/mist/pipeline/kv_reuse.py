"""Reuse of KV caches, as in code generation: fetch what a KV store has of the prompt, compute the rest, decode.

The store is a client; what it finds is sent along to the prefill. It never says what is in the store.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mist.pipeline import RequestRandom
from mist.pipeline.parts import KV_RETRIEVE, answer, find_kv, require_names
from mist.registry import register
from mist.request import DECODE, PREFILL, Pipeline, Request


@register("pipeline", "kv_reuse")
@dataclass
class KVReuse:
    """A KV store is asked, in a stage `kv_retrieve`, for the front of each prompt of which the workload tells content.

    That is the workload's `cached_tokens`, else its block keys; without either there is nothing to ask for.
    """

    sizes: ClassVar[tuple[str, ...]] = ()
    kv_retrieve: str = KV_RETRIEVE

    def __post_init__(self) -> None:
        require_names(kv_retrieve=self.kv_retrieve)

    @property
    def kinds(self) -> tuple[str, ...]:
        return (self.kv_retrieve, PREFILL, DECODE)

    @property
    def is_fixed(self) -> bool:
        return False  # not every prompt has content to ask for

    def __call__(self, request: Request, rng: RequestRandom) -> Pipeline:
        found = yield from find_kv(request, self.kv_retrieve, request.input_tokens)
        yield from answer(request, request.input_tokens, found_tokens=found)
