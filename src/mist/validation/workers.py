"""Many independent pieces of work on several processes, of which some may die; and a limit on the time of each.

Under the evaluation, which says what the work is. A process that the system kills costs no other piece of work: those
that were in flight are done again one by one. It never looks into the work or its result.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")
Done = TypeVar("Done")


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


def each(work: Callable[[Item], Done], items: Sequence[Item], num_workers: int) -> Iterator[tuple[int, Done | None]]:
    """(index, result) of every item as they are done, in any order; None where a process died of this item.

    One worker is this process itself. Whatever ends the iteration early ends the processes too.
    """
    num_workers = min(num_workers, len(items))
    if num_workers <= 1:
        yield from ((i, work(item)) for i, item in enumerate(items))
        return
    others = set(multiprocessing.active_children())
    waiting = deque(range(len(items)))
    try:
        while waiting:
            suspects = yield from _until_one_dies(work, items, waiting, num_workers)
            for i in suspects:
                yield i, _alone(work, items[i])
    except BaseException:
        for child in set(multiprocessing.active_children()) - others:
            child.kill()
        raise


def _until_one_dies(
    work: Callable[[Item], Done], items: Sequence[Item], waiting: deque[int], num_workers: int
) -> Generator[tuple[int, Done], None, list[int]]:
    """Results of what `waiting` holds; what was in flight when a process died comes back."""
    pool = ProcessPoolExecutor(num_workers, initializer=_follow_parent)
    in_flight: dict[Future[Done], int] = {}
    try:
        while waiting or in_flight:
            while waiting and len(in_flight) < 2 * num_workers:
                in_flight[pool.submit(work, items[waiting[0]])] = waiting[0]
                waiting.popleft()
            for future in wait(in_flight, return_when=FIRST_COMPLETED).done:
                result = future.result()
                yield in_flight.pop(future), result
    except BrokenProcessPool:
        return list(in_flight.values())
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return []


def _alone(work: Callable[[Item], Done], item: Item) -> Done | None:
    with ProcessPoolExecutor(1, initializer=_follow_parent) as pool:
        try:
            return pool.submit(work, item).result()
        except BrokenProcessPool:
            return None


def _follow_parent() -> None:
    """Leave interruptions to the parent process, and end with it however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
