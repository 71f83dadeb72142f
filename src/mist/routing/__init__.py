"""Routing policies: which client serves a task. One file per policy.

A router sees `ClientView` snapshots of the clients that can serve the stage, never the clients themselves, and no
true output length.
"""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Sequence
from typing import Protocol

from mist.request import ClientView, Task


class RoutingPolicy(Protocol):
    """Registered under the kind `routing`; a dataclass whose fields are its parameters.

    It may have `needs`, a frozenset of fields of a view that are brought up to date only for policies that read them;
    and `sizes`, the names that it reads of a request's. With `reads_load` False it reads no more of a view than whose
    it is and `num_outstanding`, so that nothing else is brought up to date; with `reads_pending` True beside that
    `pending_prefill_tokens`, of some views. One with `choose_of(task, views, now, everyone)` is asked that where only
    some clients can ever hold the task: `views` are theirs, and `everyone` the indices of all that would be offered. A
    parameter `seed` that is None is drawn from the run's seed.
    """

    def choose(self, task: Task, views: Sequence[ClientView], now: int) -> ClientView:
        """One of `views` (never empty), at time `now` in ns."""
        ...


def rng_of(seed: int | None, task: Task) -> random.Random:
    """A generator of this task's own: its draws depend on no other request and on no other choice."""
    key = struct.pack("<Qqq", seed or 0, task.request.index, task.stage_index)
    return random.Random(hashlib.blake2b(key, digest_size=8).digest())
