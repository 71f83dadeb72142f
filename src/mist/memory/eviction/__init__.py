"""Eviction policies: which entry of a memory tier goes first. One file each, registered under the kind `eviction`.

A tier tells its policy of every use and asks it for victims when it runs full, and for what has outlived its time at
every look-up. A policy knows keys and times only: never sizes, contents or who uses them.
"""

from __future__ import annotations

from typing import Protocol


class Eviction(Protocol):
    """The order in which entries of one tier go; every tier has an instance of its own."""

    def touch(self, key: int, now: int) -> None:
        """`key` was inserted or used at `now` (ns, never decreasing)."""
        ...

    def evict(self, now: int, *, full: bool) -> int | None:
        """Forget a key and return it: one that has outlived its time, else, if the tier is `full`, the next to go.

        None if none has to go; a `full` tier holds at least one entry.
        """
        ...
