"""The shortest prompt first, where the time to the first token counts and prompts differ widely.

Shortest job first (Phipps, "Machine repair as a priority waiting-line problem", Operations Research 4, 1956), with the
prompt as the job. Long prompts wait for ever while shorter ones keep coming faster than they are served.
"""

from __future__ import annotations

from dataclasses import dataclass

from mist.registry import register
from mist.request import Task


@register("order", "shortest_prompt")
@dataclass
class ShortestPrompt:
    """Fewest tokens of context first: those of the prompt, or what a decode that was handed over goes on from."""

    def key(self, task: Task) -> tuple[int, ...]:
        return (task.target_tokens,)
