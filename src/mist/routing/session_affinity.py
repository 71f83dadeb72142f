"""Session affinity: the turns of a session go to one client, whose prefix cache has the turns before.

The load balancer's sticky session. It looks at no content: what the client still has of a session isn't its business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mist.registry import register
from mist.request import ClientView, Task


@register("routing", "session_affinity")
@dataclass
class SessionAffinity:
    """A session begins on the client with the fewest outstanding tasks, of these the one with the fewest sessions.

    It stays there but where that client has `max_num_outstanding` tasks or more: then it moves, and stays where it
    went. Requests of no session, and sessions that move, go where a session would begin.
    """

    max_num_outstanding: int | None = None
    _home: dict[int, int] = field(default_factory=dict, init=False, repr=False)
    _num_sessions: dict[int, int] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.max_num_outstanding is not None and self.max_num_outstanding < 1:
            raise ValueError(f"max_num_outstanding is {self.max_num_outstanding}: give at least 1, or leave it out")

    def choose(self, task: Task, views: Sequence[ClientView], now: int) -> ClientView:
        session = task.request.session
        home = next((view for view in views if view.index == self._home.get(session)), None)
        if home is not None and (self.max_num_outstanding is None or home.num_outstanding < self.max_num_outstanding):
            return home
        sessions = self._num_sessions
        there = min(views, key=lambda view: (view.num_outstanding, sessions.get(view.index, 0)))
        if session >= 0 and there is not home:
            if home is not None:
                sessions[home.index] -= 1
            sessions[there.index] = sessions.get(there.index, 0) + 1
            self._home[session] = there.index
        return there
