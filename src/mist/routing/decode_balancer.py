"""Decode balancer: the client with the fewest decodes, which is the one whose decode steps are the shortest.

For decode clients, or for mixed ones where answers are long. Source: the decode load of HERMES (arXiv 2504.09775). It
never looks at prompts that wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from mist.registry import register
from mist.request import ClientView, Task


@register("routing", "decode_balancer")
@dataclass
class DecodeBalancer:
    """Fewest decodes, those included that wait or are under way; then the least context, then the first."""

    needs: ClassVar[frozenset[str]] = frozenset({"num_decodes"})

    def choose(self, task: Task, views: Sequence[ClientView], now: int) -> ClientView:
        return min(views, key=lambda view: (view.num_decodes, view.decode_context))
