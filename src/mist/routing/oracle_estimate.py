"""The oracle: the runtime estimate with true output lengths, which no router can know.

The bound of what better predictions could bring: compare `runtime_estimate`. It is the one shipped router that reads
the truth, and its name says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from mist.load import PRICES, estimated_ns
from mist.registry import register
from mist.request import ClientView, Task


@register("routing", "oracle_estimate")
@dataclass
class OracleEstimate:
    """As `runtime_estimate`, of true lengths: those of what is on the client and of the task itself."""

    needs: ClassVar[frozenset[str]] = PRICES | {"oracle_longest_decode"}

    def choose(self, task: Task, views: Sequence[ClientView], now: int) -> ClientView:
        decodes = task.stage.oracle_output_tokens or task.request.oracle_output_tokens

        def cost(view: ClientView) -> tuple[int, int]:
            longest = max(view.oracle_longest_decode, decodes)
            return estimated_ns(view, longest, task.remaining_tokens), view.num_outstanding

        return min(views, key=cost)
