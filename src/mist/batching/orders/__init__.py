"""Orders: which of a client's tasks is admitted first, and which is preempted first. One file per order.

A batching policy takes tasks from the front of its queue; the order says who stands there. It gives keys and nothing
else: it never sees the queue, other tasks, the time or true output lengths.
"""

from __future__ import annotations

from typing import Protocol

from mist.request import Task


class Order(Protocol):
    """Registered under the kind `order`; a dataclass whose fields are its parameters, held by a batching policy.

    The smallest key is admitted first. When KV blocks run out, the running task with the largest key is preempted, and
    it waits again at its place, not in front. Between equal keys the task that came to the client first goes first.

    A key is taken once, as its task comes to the client, and stays through preemptions. So ranks never change, and no
    two are equal: the smallest of all is never preempted while another runs, nobody that ranks behind it is admitted
    before it, and alone it fits; hence it ends, and then so does the next: no two tasks preempt each other for ever.
    """

    def key(self, task: Task) -> tuple[int, ...]:
        """The key of `task`, of the same length for every task."""
        ...
