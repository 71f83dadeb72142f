"""News search: retrieval-augmented generation. Embed, retrieve, perhaps re-rank, then prefill of what is found, decode.

The search is that of `search.py`. It never says which passages are found.
"""

from __future__ import annotations

from dataclasses import dataclass

from mist.pipeline import RequestRandom
from mist.pipeline.parts import answer
from mist.pipeline.search import Search
from mist.registry import register
from mist.request import DECODE, PREFILL, Pipeline, Request


@register("pipeline", "news_search")
@dataclass
class NewsSearch(Search):
    """The question's search, then the answer from the prompt with the passages found; parameters as in `Search`."""

    @property
    def kinds(self) -> tuple[str, ...]:
        return (*self.search_kinds, PREFILL, DECODE)

    @property
    def is_fixed(self) -> bool:
        return False  # not every request has passages

    def __call__(self, request: Request, rng: RequestRandom) -> Pipeline:
        grown = yield from self.search(request)
        yield from answer(request, request.input_tokens + grown)
