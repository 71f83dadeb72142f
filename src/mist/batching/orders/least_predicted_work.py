"""The least work first, as far as can be predicted: tokens of the prompt to compute and of the output expected.

Shortest job first on predicted lengths, as in Qiu et al., "Efficient Interactive LLM Serving with Proxy Model-based
Sequence Length Prediction" (2024). The prediction is the request's; the true length is never seen.
"""

from __future__ import annotations

from dataclasses import dataclass

from mist.registry import register
from mist.request import Task


@register("order", "least_predicted_work")
@dataclass
class LeastPredictedWork:
    """Fewest prompt tokens to compute + `predicted_output_tokens` of the request first."""

    def key(self, task: Task) -> tuple[int, ...]:
        return (task.remaining_tokens + task.request.predicted_output_tokens,)
