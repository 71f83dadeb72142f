"""What commands share: JSON documents and tables of rows to print, how far a long piece of work has come, an option.

Under the commands. Results go to stdout, progress to stderr. It computes no figure.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import click


class Progress(Protocol):
    """Called with what is done and what there is, or may be, in all.

    `left_s`: seconds left, inf where they can't be told yet; None: in proportion to what was done since the first call.
    """

    def __call__(self, done: int, total: int, left_s: float | None = None, /) -> None: ...


#: seconds between two lines of progress where stderr is no terminal
_BETWEEN_LINES_S = 10.0
#: beyond so many seconds, the time that is left is told in minutes
_MOST_SECONDS = 180.0
#: seconds between two drawings of a bar
_BETWEEN_DRAWINGS_S = 0.1


def clean_up_when_terminated() -> None:
    """SIGTERM ends the process as Ctrl-C does: half-written files and other processes are removed on the way out."""
    import signal
    import threading

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def print_json(document: Any) -> None:
    """The document as JSON on stdout."""
    click.echo(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))


def table(rows: list[dict[str, Any]]) -> str:
    """Rows of equal keys as text in columns; numbers are right-aligned."""
    if not rows:
        return ""
    columns = [[key, *("" if row[key] is None else str(row[key]) for row in rows)] for key in rows[0]]
    aligned = []
    for key, column in zip(rows[0], columns, strict=True):
        width = max(map(len, column))
        right = any(isinstance(row[key], int | float) for row in rows)
        aligned.append([text.rjust(width) if right else text.ljust(width) for text in column])
    return "\n".join("  ".join(line).rstrip() for line in zip(*aligned, strict=True))


def folded(rows: list[dict[str, Any]], width: int = 100) -> list[dict[str, Any]]:
    """Rows of texts whose parameters and description go on below, so that lines have about `width` characters."""
    from itertools import zip_longest
    from textwrap import wrap

    wide = ("parameters", "description")
    narrow = sum(2 + max(len(str(row[key])) for row in rows) for key in rows[0] if key not in wide)
    lines: list[dict[str, Any]] = []
    for row in rows:
        each = (width - narrow) // len(wide) - 1
        texts = (wrap(row[key], each, break_long_words=key == "parameters") or [""] for key in wide)
        for number, parts in enumerate(zip_longest(*texts, fillvalue="")):
            first = row if number == 0 else dict.fromkeys(row, "")
            lines.append(first | dict(zip(wide, parts, strict=True)))
    return lines


def perf_models(text: str) -> list[str] | None:
    """The names in a list with commas, which are all known; None where there are none."""
    from mist import registry
    from mist.errors import Problem, ScenarioError, nearest

    named = [name.strip() for name in text.split(",") if name.strip()]
    known = registry.names("perf") if named else []
    unknown = [name for name in named if name not in known]
    if unknown:
        problem = Problem(f"--perf: there is no performance model {unknown[0]!r}", hint=nearest(unknown[0], known))
        raise ScenarioError(problem)
    return named or None


@contextmanager
def progress_of(what: str) -> Iterator[Progress]:
    """How many of `what` are done, and how long the rest may take: a bar on a terminal, else a line now and then."""
    with progresses_of(what) as (progress,):
        yield progress


@contextmanager
def progresses_of(*whats: str) -> Iterator[list[Progress]]:
    """As `progress_of` for pieces of work one behind the other."""
    if not sys.stderr.isatty():
        yield [_Lines(what) for what in whats]
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    description = TextColumn("{task.description}")
    columns = (description, BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}"))
    # drawn when something is done, by no thread of its own: processes are forked meanwhile
    with Progress(*columns, console=Console(stderr=True), transient=True, auto_refresh=False) as bar:
        yield [_Bar(bar, what) for what in whats]


class _Bar:
    """Progress as a bar, from the first call on."""

    def __init__(self, bar: Any, what: str) -> None:
        self._bar, self._pace = bar, _Pace()
        self._task = bar.add_task(what, total=None, left="", visible=False)

    def __call__(self, done: int, total: int, left_s: float | None = None, /) -> None:
        now = time.monotonic()
        left = _left(self._pace.left_s(now, done, total) if left_s is None else left_s)
        self._bar.update(self._task, completed=done, total=total, left=left, visible=True)
        if done == total or self._pace.is_due(now, _BETWEEN_DRAWINGS_S):
            self._bar.refresh()


class _Pace:
    """The time that is left, in proportion; what was done before the first call took no time. And when to tell it."""

    def __init__(self) -> None:
        self._began = self._told = time.monotonic()
        self._before = -1

    def left_s(self, now: float, done: int, total: int) -> float:
        if self._before < 0:
            self._before = done
        new = done - self._before
        return (now - self._began) * (total - done) / new if new else math.inf

    def is_due(self, now: float, after_s: float) -> bool:
        if now - self._told < after_s:
            return False
        self._told = now
        return True


class _Lines:
    """Progress as lines of text."""

    def __init__(self, what: str) -> None:
        self._what, self._pace, self._done = what, _Pace(), -1

    def __call__(self, done: int, total: int, left_s: float | None = None, /) -> None:
        now = time.monotonic()
        in_proportion_s = self._pace.left_s(now, done, total)
        if self._done < 0:
            self._done = done
        if done == self._done or not self._pace.is_due(now, _BETWEEN_LINES_S):
            return
        self._done = done
        left = _left(in_proportion_s if left_s is None else left_s)
        click.echo(f"{done:,} of {total:,} {self._what}{left and f', {left}'}", err=True)


def _left(left_s: float) -> str:
    if not 0 < left_s < math.inf:
        return ""
    return f"about {left_s:,.0f} s left" if left_s <= _MOST_SECONDS else f"about {left_s / 60:,.0f} min left"
