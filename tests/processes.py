"""Processes of this machine as /proc has them: who is below whom, and who is alive."""

from __future__ import annotations

from pathlib import Path

import pytest

PROC = Path("/proc")


def parents() -> dict[int, int]:
    """pid -> its parent's, of all processes."""
    if not (PROC / "self" / "stat").exists():
        pytest.skip("no /proc here: processes can't be counted")
    return {int(place.name): int(told[1]) for place in PROC.glob("[0-9]*") if (told := _stat(int(place.name)))}


def below(pid: int) -> list[int]:
    """All processes that `pid` has started, and those that these have."""
    pairs, found, above = parents(), [], {pid}
    while children := [each for each, parent in pairs.items() if parent in above]:
        found += children
        above = set(children)
    return found


def is_alive(pid: int) -> bool:
    """Whether it is there, and isn't only remembered for its parent to hear of its end."""
    return _stat(pid)[:1] not in ([], ["Z"])


def _stat(pid: int) -> list[str]:
    """State, parent and so on; nothing where it has ended."""
    try:
        return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
