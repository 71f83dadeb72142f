"""Routing policies: which client serves a task. One file per policy.

A router sees `ClientView` snapshots of the clients that can serve the stage, never the clients themselves, and no
true output length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from mist.request import ClientView, Task


class RoutingPolicy(Protocol):
    """Registered under the kind `routing`; a dataclass whose fields are its parameters."""

    def choose(self, task: Task, views: Sequence[ClientView], now: int) -> ClientView:
        """One of `views` (never empty), at time `now` in ns."""
        ...
