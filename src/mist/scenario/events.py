"""What a user may write of what happens in a run: replicas that go down and come up, links that slow down or are cut.

A part of the schema; what an entry can tell by itself is refused here, and names that nothing has in `conflicts`. It
plays nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from typing import Annotated, Literal

from pydantic import Field

from mist.errors import Problem
from mist.scenario.clients import Name
from mist.scenario.named import Located, Section
from mist.scenario.quantities import MAX_SECONDS, Seconds

#: keys that say what happens, of which an event has one
WHAT = ("client_down", "client_up", "link")


class EventSection(Section):
    """One thing that happens at one time: a client goes down or comes up, or a link changes."""

    at_s: Seconds
    """when, on the run's clock"""
    client_down: Name | None = None
    """a replica such as gpu-1, or a pool with all of its replicas: all that its devices hold is lost"""
    client_up: Name | None = None
    """a replica, or a pool, that is there again, with nothing in its devices"""
    on_loss: Literal["retry", "fail"] | None = None
    """what becomes of tasks on a client that goes down: retry (left out) places them anew, fail ends their requests"""
    link: Name | None = None
    """a link by its name in the result's `links`"""
    factor: Annotated[float, Field(ge=0, le=1)] | None = None
    """the share of its bandwidth that the link has from then on; 0 cuts it"""
    for_s: Annotated[float, Field(gt=0, le=MAX_SECONDS)] | None = None
    """how long that lasts: then the client comes up, or the link has all of its bandwidth"""

    @classmethod
    def conflicts(cls, given: Set[str]) -> Iterator[Located]:
        """An event is one thing, with what belongs to it."""
        told = sorted(given & set(WHAT))
        if len(told) != 1:
            message = f"{' and '.join(told)} are in one event" if told else "nothing happens in this event"
            hint = "{at_s: 30, client_down: gpu-1, for_s: 60}, or {at_s: 30, link: NAME, factor: 0.1}"
            yield tuple(told[1:2]), Problem(message, hint=hint)
        elif "link" in told and "factor" not in given:
            yield ("link",), Problem("factor is missing", hint="such as factor: 0.1, or 0 for a link that is cut")
        for key, needed in (("factor", {"link"}), ("on_loss", {"client_down"}), ("for_s", {"link", "client_down"})):
            if key in given and len(told) == 1 and not needed & given:
                yield (key,), Problem(f"{key} is for {' or '.join(sorted(needed))}", hint=f"leave {key} out")
