"""The search of retrieval-augmented generation: embed the question, search an index, re-rank what was found.

A piece of the pipelines `news_search` and `chat_support`, with its parameters. It never says what is found, only how
much of it there is to read and send.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mist.pipeline.parts import (
    BYTES_PER_DIM,
    BYTES_PER_ID,
    BYTES_PER_TOKEN,
    EMBED,
    RERANK,
    RETRIEVE,
    Tokens,
    require_names,
)
from mist.request import Request, Stage


@dataclass
class Search:
    """`passages` of `passage_tokens` each go into the prompt, of `candidates` that a re-ranker reads (0: no re-ranker).

    `query_tokens` of the question are embedded, `max_query_tokens` at most, the encoder's limit; None is all of the
    prompt but its passages. Where the workload tells `query_tokens`, `num_passages` or `passage_tokens` (of all
    passages together) of a request, these count. `max_pair_tokens`: the re-ranker's limit, to which question and
    passage together are cut. `embedding_dim` is the embedding's.
    """

    sizes: ClassVar[tuple[str, ...]] = ("query_tokens", "num_passages", "passage_tokens")
    passages: int = 5
    passage_tokens: int = 512
    candidates: int = 0
    query_tokens: int | None = None
    max_query_tokens: int = 512
    max_pair_tokens: int = 512
    embedding_dim: int = 768
    embed: str = EMBED
    retrieve: str = RETRIEVE
    rerank: str = RERANK

    def __post_init__(self) -> None:
        limits = ("max_query_tokens", "max_pair_tokens")
        for name in ("passages", "passage_tokens", *limits, "embedding_dim", "query_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}: give a number of at least 1")
        if self.candidates and self.candidates < self.passages:
            hint = "re-rank at least as many as are kept, or 0 for no re-ranker"
            raise ValueError(f"candidates is {self.candidates}, below the {self.passages} passages: {hint}")
        require_names(embed=self.embed, retrieve=self.retrieve, rerank=self.rerank)

    @property
    def search_kinds(self) -> tuple[str, ...]:
        """The stage kinds of the search."""
        return (self.embed, self.retrieve, self.rerank) if self.candidates else (self.embed, self.retrieve)

    def search(self, request: Request) -> Tokens:
        """The stages of the search; by how many tokens the prompt grows.

        Passages that the workload tells are in the prompt already. A request of no passages isn't searched for.
        """
        told = request.sizes.get("passage_tokens")
        passages = request.sizes.get("num_passages", self.passages)
        if not passages or told == 0:
            return 0
        passage_tokens = self.passage_tokens if told is None else -(-told // passages)
        query_tokens = self._query_tokens(request, told or 0)
        yield Stage(self.embed, query_tokens, input_bytes=query_tokens * BYTES_PER_TOKEN)
        yield Stage(self.retrieve, input_tokens=1, input_bytes=self.embedding_dim * BYTES_PER_DIM)
        if self.candidates:
            candidates = max(self.candidates, passages)
            found_bytes = candidates * (BYTES_PER_ID + passage_tokens * BYTES_PER_TOKEN)
            yield Stage(
                self.rerank,
                input_tokens=candidates * min(query_tokens + passage_tokens, self.max_pair_tokens),
                num_sequences=candidates,
                input_bytes=query_tokens * BYTES_PER_TOKEN + found_bytes,
            )
        return passages * passage_tokens if told is None else 0

    def _query_tokens(self, request: Request, tokens_of_passages: int) -> int:
        told = request.sizes.get("query_tokens", self.query_tokens)
        tokens = request.input_tokens - tokens_of_passages if told is None else told
        return max(1, min(tokens, self.max_query_tokens))
