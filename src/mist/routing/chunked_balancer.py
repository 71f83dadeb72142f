"""Chunked balancer: the client whose next steps have the fewest tokens: prompts still to be computed, and its decodes.

For clients that mix chunks of prompts with decodes, which share one budget of tokens per step. Source: the load of
chunked clients in HERMES (arXiv 2504.09775). It never tells long contexts from short ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from mist.registry import register
from mist.request import ClientView, Task


@register("routing", "chunked_balancer")
@dataclass
class ChunkedBalancer:
    """Fewest pending prefill tokens + decodes (a token each per step); the first on a tie."""

    needs: ClassVar[frozenset[str]] = frozenset({"num_decodes"})

    def choose(self, task: Task, views: Sequence[ClientView], now: int) -> ClientView:
        return min(views, key=lambda view: view.pending_prefill_tokens + view.num_decodes)
