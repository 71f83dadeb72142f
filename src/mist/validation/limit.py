"""A limit on the real time of a piece of work.

Under the evaluation, which says what the work is. It never looks into the work or its result.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class TooLong(BaseException):
    """The limit of a piece of work has passed; no `Exception`, so that nothing inside takes it for its own."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """TooLong where the block lasts longer; no limit outside of a main thread, or on systems without timers."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise TooLong

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
