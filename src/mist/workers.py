"""Many independent pieces of work on several processes, of which some may die; they are kept from one call to the next.

Under searches and validations, which say what the work is. A process that the system kills costs no other piece of
work: those that were in flight are done again one by one. It never looks into the work or its result.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from types import TracebackType
from typing import TypeVar

from mist import registry

Item = TypeVar("Item")
Done = TypeVar("Done")

#: what processes inherit of the environment, besides all that begins with MIST_
_INHERITED = ("XDG_CACHE_HOME",)
#: imported once by the server that processes are forked from
_PRELOADED = ("mist.scenario.build",)


@dataclass(frozen=True)
class Surroundings:
    """What the work of a process depends on besides its arguments: folder, environment, modules and plug-in files."""

    folder: str
    module_paths: tuple[str, ...]
    environment: tuple[tuple[str, str], ...]
    plugins: tuple[str, ...]

    @classmethod
    def here(cls) -> Surroundings:
        """Those of this process."""
        named = sorted((k, v) for k, v in os.environ.items() if k.startswith("MIST_") or k in _INHERITED)
        return cls(os.getcwd(), tuple(sys.path), tuple(named), registry.plugin_files())

    def enter(self) -> None:
        """Make them this process's own; on another machine the folder may be missing, which files then tell."""
        with contextlib.suppress(FileNotFoundError):
            os.chdir(self.folder)
        sys.path += [path for path in self.module_paths if path not in sys.path]
        for name in [name for name in os.environ if name.startswith("MIST_") or name in _INHERITED]:
            del os.environ[name]
        os.environ.update(self.environment)
        for plugin in self.plugins:
            if plugin not in registry.plugin_files():
                registry.load_plugin_file(plugin)


class Workers:
    """`num_workers` processes, started when there is work for them and ended by `close`; one is this process itself.

    They are forked from a server that has imported the simulator and nothing else of the caller's, where the system has
    that, else started anew: so a script that uses them needs its `if __name__ == "__main__"`.
    """

    def __init__(self, num_workers: int) -> None:
        self.num_workers = num_workers
        self._pool: ProcessPoolExecutor | None = None
        self._others: set[object] = set()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close(kill=kind is not None)

    def each(self, work: Callable[[Item], Done], items: Iterable[Item]) -> Iterator[tuple[int, Done | None]]:
        """(index, result) of every item as they are done, in any order; None where a process died of this item.

        Items are taken as there is room for them. Whatever ends the iteration early ends the processes too.
        """
        if self.num_workers <= 1:
            yield from ((i, work(item)) for i, item in enumerate(items))
            return
        waiting = enumerate(items)
        try:
            while suspects := (yield from self._until_one_dies(work, waiting)):
                for i, item in suspects:
                    yield i, self._alone(work, item)
        except BaseException:
            self.close(kill=True)
            raise

    def close(self, *, kill: bool = False) -> None:
        """End the processes, at once if `kill`; they are started anew where there is work again."""
        pool, self._pool = self._pool, None
        if pool is None:
            return
        if kill:
            for child in set(multiprocessing.active_children()) - self._others:
                child.kill()
        pool.shutdown(wait=not kill, cancel_futures=True)

    def _until_one_dies(
        self, work: Callable[[Item], Done], waiting: Iterator[tuple[int, Item]]
    ) -> Generator[tuple[int, Done], None, list[tuple[int, Item]]]:
        """Results of what `waiting` gives; what was in flight when a process died comes back, nothing if none did."""
        pool = self._started()
        in_flight: dict[Future[Done], tuple[int, Item]] = {}
        try:
            while True:
                while len(in_flight) < 2 * self.num_workers and (taken := next(waiting, None)) is not None:
                    in_flight[_submitted(pool, work, taken[1])] = taken
                if not in_flight:
                    return []
                for future in wait(in_flight, return_when=FIRST_COMPLETED).done:
                    result = future.result()
                    yield in_flight.pop(future)[0], result
        except BrokenProcessPool:
            self.close()
            return list(in_flight.values())

    def _alone(self, work: Callable[[Item], Done], item: Item) -> Done | None:
        try:
            return self._started(1).submit(work, item).result()
        except BrokenProcessPool:
            return None
        finally:
            self.close()

    def _started(self, num_workers: int = 0) -> ProcessPoolExecutor:
        if self._pool is None:
            self._others = set(multiprocessing.active_children())
            self._pool = ProcessPoolExecutor(
                num_workers or self.num_workers, _context(), _begin, (Surroundings.here(),)
            )
        return self._pool


def each(work: Callable[[Item], Done], items: Iterable[Item], num_workers: int) -> Iterator[tuple[int, Done | None]]:
    """`Workers.each`, by processes that end with it."""
    with Workers(num_workers) as workers:
        yield from workers.each(work, items)


def _submitted(pool: ProcessPoolExecutor, work: Callable[[Item], Done], item: Item) -> Future[Done]:
    """The item's future; one that is broken, as the others are, where a process has died meanwhile."""
    try:
        return pool.submit(work, item)
    except BrokenProcessPool as error:
        broken: Future[Done] = Future()
        broken.set_exception(error)
        return broken


def _context() -> BaseContext:
    """Neither threads nor locks of this process are copied into others, as plain forks would."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOADED))
    return context


def _begin(surroundings: Surroundings) -> None:
    """Leave interruptions to the parent process, and end with it however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    surroundings.enter()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
