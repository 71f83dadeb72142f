"""Chat support: a search for passages, then reuse of the conversation's KV cache, prefill of the rest, decode.

The conversation stands in front of the prompt and the passages behind it, so that both searches count. It never says
what is found in either.
"""

from __future__ import annotations

from dataclasses import dataclass

from mist.pipeline import RequestRandom
from mist.pipeline.parts import KV_RETRIEVE, answer, find_kv, require_names
from mist.pipeline.search import Search
from mist.registry import register
from mist.request import DECODE, PREFILL, Pipeline, Request


@register("pipeline", "chat_support")
@dataclass
class ChatSupport(Search):
    """Parameters as in `Search`; a KV store is asked in a stage `kv_retrieve`, as in `KVReuse`."""

    kv_retrieve: str = KV_RETRIEVE

    def __post_init__(self) -> None:
        super().__post_init__()
        require_names(kv_retrieve=self.kv_retrieve)

    @property
    def kinds(self) -> tuple[str, ...]:
        return (*self.search_kinds, self.kv_retrieve, PREFILL, DECODE)

    @property
    def is_fixed(self) -> bool:
        return False  # not every request has passages, or content to ask for

    def __call__(self, request: Request, rng: RequestRandom) -> Pipeline:
        prompt_tokens = request.input_tokens + (yield from self.search(request))
        found = yield from find_kv(request, self.kv_retrieve, prompt_tokens)
        yield from answer(request, prompt_tokens, found_tokens=found)
