"""Runtime estimate: the client that will be done first, by the times of its own steps and by predicted lengths.

It tells fast clients from slow ones, which counts can't. Source: the runtime estimate of HERMES (arXiv 2504.09775),
with step times from each client's performance model. It never sees true output lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from mist.load import PRICES, estimated_ns
from mist.registry import register
from mist.request import ClientView, Task


@register("routing", "runtime_estimate")
@dataclass
class RuntimeEstimate:
    """Least prefill steps x t_chunk + max(0, longest remaining decode - prefill steps) x t_decode, with the task there.

    Prefill steps: pending tokens over the tokens of a full chunk, rounded up. The fewest outstanding tasks, then the
    first, on a tie.
    """

    needs: ClassVar[frozenset[str]] = PRICES | {"longest_decode"}
    sizes: ClassVar[tuple[str, ...]] = ("predicted_output_tokens",)

    def choose(self, task: Task, views: Sequence[ClientView], now: int) -> ClientView:
        decodes = task.request.predicted_output_tokens

        def cost(view: ClientView) -> tuple[int, int]:
            longest = max(view.longest_decode, decodes)
            return estimated_ns(view, longest, task.remaining_tokens), view.num_outstanding

        return min(views, key=cost)
