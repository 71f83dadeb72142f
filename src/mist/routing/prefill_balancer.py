"""Prefill balancer: the client with the fewest prompt tokens still to be computed, nothing else.

For prefill clients, whose work is their pending tokens. Source: the prefill load of HERMES (arXiv 2504.09775); joining
the shortest queue also looks at tasks where tokens are equal, and this never does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mist.registry import register
from mist.request import ClientView, Task


@register("routing", "prefill_balancer")
@dataclass
class PrefillBalancer:
    """Fewest pending prefill tokens; the first on a tie."""

    def choose(self, task: Task, views: Sequence[ClientView], now: int) -> ClientView:
        return min(views, key=lambda view: view.pending_prefill_tokens)
