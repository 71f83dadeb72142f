"""Admission policies: whether a request is let in at all. One file per policy.

Asked between a request's arrival and its first stage, with the views that routers see. A policy never picks a client,
never delays anybody, and sees no true output length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from mist.request import ClientView, Request


class AdmissionPolicy(Protocol):
    """Registered under the kind `admission`; a dataclass whose fields are its parameters. Each tenant has its own.

    It may have `needs` and `sizes`, as routers do; `stages`, the stage kinds without which it can't say anything; and
    `asks_before_decode`: it is asked once more, with the decode clients alone, before a KV cache is handed over.
    """

    def refuses(self, request: Request, views: Mapping[str, Sequence[ClientView]], now: int) -> str:
        """Why `request` is turned away at `now` (ns), in words that are counted; "" lets it in.

        `views`: of the clients that may serve it, by stage kind.
        """
        ...
