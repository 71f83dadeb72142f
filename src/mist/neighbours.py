"""Whom a client talks to: the coordinator behind it, who watches it, who lets it start its steps and who delays them.

Contracts that `client` relies on and that the coordinator, the ledger, the kernel, lanes, hosts and swap spaces keep.
Nothing here does anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from mist.memory.hierarchy import Found
from mist.network import Network
from mist.perf import Demand
from mist.request import StageResult, Step, Task, Wait

if TYPE_CHECKING:
    from mist.client import Client


class Next(Protocol):
    """What a client tells its coordinator, and the network that this holds."""

    @property
    def network(self) -> Network: ...

    def stage_done(self, task: Task, result: StageResult, client: Client, now: int) -> Sequence[Task]:
        """`task` is done; the decodes that continue with its KV cache, here or elsewhere, if any."""
        ...

    def hand_over(self, task: Task, followings: Sequence[Task], client: Client, now: int) -> bool:
        """`followings` decode on from `task` on another client; False where none can, and the request has left."""
        ...

    def rejected(self, task: Task, client: Client, reason: str, now: int) -> None: ...

    def starves(self, client: Client, now: int) -> None:
        """`client` idles though tasks wait there, and has room reserved for others."""
        ...

    def dropped(self, task: Task, now: int) -> None:
        """A task that was cancelled has left its client."""
        ...


class Watcher(Protocol):
    """A ledger's view of a client's life; every call comes before the client acts on what it says."""

    def step_started(self, client: Client, step: Step, device_ns: int, now: int) -> None: ...

    def step_finished(self, client: Client, now: int) -> None: ...

    def step_lost(self, client: Client, now: int) -> None: ...

    def fetches(self, client: Client, task: Task, first_token: int, found: Sequence[Found], now: int) -> None: ...

    def idles(self, client: Client, wait: Wait, now: int) -> None: ...


class Waker(Protocol):
    """Who lets a client start its steps: the kernel, or the lane in which it keeps step with others."""

    def wake(self, client: Client) -> None: ...

    def void(self, client: Client, now: int) -> bool: ...


class Shares(Protocol):
    """What a client's steps share with others: they take as long as these let them."""

    def work(self, demand: Demand, alone_ns: int, done: Callable[[Any, int], None], argument: Any, now: int) -> Any:
        """Begin a step that takes `alone_ns` where nobody else is; `done(argument, time_ns)` comes at its end."""
        ...

    def stop(self, work: Any, now: int) -> None:
        """That step ends for nobody."""
        ...
