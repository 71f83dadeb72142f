"""Session affinity: the turns of a session go to one client, whose prefix cache has the turns before.

The load balancer's sticky session. It looks at no content: what the client still has of a session isn't its business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from mist.registry import register
from mist.request import ClientView, Task


@register("routing", "session_affinity")
@dataclass
class SessionAffinity:
    """A session begins on the client with the fewest outstanding tasks, of these the one with the fewest sessions.

    It stays there but where that client has `max_num_outstanding` tasks or more, or where another has fewer tokens to
    compute + `load_weight` x tokens that wait for their prefill, as `prefix_affinity` weighs them: its client computes
    what the session's prompt has grown by since the last turn, any other all of it. Then it moves, and stays where it
    went. Requests of no session, and sessions that leave a full client, go where a session would begin.
    """

    reads_load: ClassVar[bool] = False
    reads_pending: ClassVar[bool] = True

    max_num_outstanding: int | None = None
    load_weight: float = 0.0
    #: tokens of each session's last prompt
    _sent: dict[int, int] = field(default_factory=dict, init=False, repr=False)
    _home: dict[int, int] = field(default_factory=dict, init=False, repr=False)
    _num_sessions: dict[int, int] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.max_num_outstanding is not None and self.max_num_outstanding < 1:
            raise ValueError(f"max_num_outstanding is {self.max_num_outstanding}: give at least 1, or leave it out")
        if not 0 <= self.load_weight < float("inf"):
            raise ValueError(f"load_weight is {self.load_weight}: give 0 or more tokens for a token that waits")

    def choose(self, task: Task, views: Sequence[ClientView], now: int) -> ClientView:
        session, sessions = task.request.session, self._num_sessions
        home = next((view for view in views if view.index == self._home.get(session)), None)
        is_full = self.max_num_outstanding is not None and home and home.num_outstanding >= self.max_num_outstanding
        if home is None or is_full:
            there = min(views, key=lambda view: (view.num_outstanding, sessions.get(view.index, 0)))
        else:
            there = self._lighter(home, views, session) if self.load_weight else home
        if self.load_weight and session >= 0:
            self._sent[session] = task.remaining_tokens
        if session >= 0 and there is not home:
            if session in self._home:  # which may not be among those to choose from
                sessions[self._home[session]] -= 1
            sessions[there.index] = sessions.get(there.index, 0) + 1
            self._home[session] = there.index
        return there

    def _lighter(self, home: ClientView, views: Sequence[ClientView], session: int) -> ClientView:
        """`home`, or the client on which the fewest tokens wait, if that makes up for the session's prefix."""
        other = min(views, key=lambda view: (view.pending_prefill_tokens, view.num_outstanding))
        lighter = self.load_weight * (home.pending_prefill_tokens - other.pending_prefill_tokens)
        return other if lighter > self._sent.get(session, 0) else home
