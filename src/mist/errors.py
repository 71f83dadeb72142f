"""The two errors that MIST raises on purpose: the user's file is wrong, or MIST itself is.

Everything else propagates as it is. A `ScenarioError` carries every problem found in one pass, each with
its place and its remedy; an `InvariantError` carries the law that broke, with its numbers.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with a user's file; `line` and `column` are 1-based, 0 where there is none."""

    message: str
    file: str = ""
    line: int = 0
    column: int = 0
    hint: str = ""

    def __str__(self) -> str:
        place = self.file
        if self.line:
            place += f":{self.line}"
            if self.column:
                place += f":{self.column}"
        text = f"{place}: {self.message}" if place else self.message
        return f"{text}\n    {self.hint}" if self.hint else text


class ScenarioError(Exception):
    """The user's scenario, trace or catalogue file can't be used; lists all problems found at once."""

    def __init__(self, problems: Problem | str | Iterable[Problem]) -> None:
        if isinstance(problems, str):
            problems = Problem(problems)
        self.problems: tuple[Problem, ...] = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__("\n".join(str(p) for p in self.problems))


class InvariantError(Exception):
    """A law of the simulation broke: a bug in MIST or in a plug-in, never in the user's numbers."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A "did you mean" sentence for `name` among `known`, or the list of what is known."""
    choices = sorted(set(known))
    close = difflib.get_close_matches(name, choices, n=3, cutoff=0.6)
    if close:
        return f"did you mean {' or '.join(repr(c) for c in close)}?"
    return f"known: {', '.join(choices)}" if choices else "none are known"
