"""Ranks: the places of one client's tasks in its order, and a queue that keeps them.

Between an order, which gives keys, and the residents of a client, who admit the smallest rank and preempt the largest.
It never admits or preempts.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Sequence

from mist.batching.orders import Order
from mist.request import Task


class Ranks:
    """Ranks by `order`: a task's key and its number among those that came to the client, so no two are equal."""

    __slots__ = ("_num_ranked", "order")

    def __init__(self, order: Order) -> None:
        self.order = order
        self._num_ranked = 0

    def of(self, task: Task) -> tuple[int, ...]:
        """The rank of `task`, which it gets the first time and keeps."""
        if not task.rank:
            task.rank = self._next(self.order.key(task))
        return task.rank

    def pass_on(self, done: Task, followings: Sequence[Task]) -> None:
        """`followings` rank where `done` did, the first of them exactly there."""
        first, *others = followings
        first.rank = done.rank
        for task in others:
            task.rank = self._next(done.rank[:-1])

    def queue(self) -> RankedQueue:
        """An empty queue of tasks by rank."""
        return RankedQueue(self)

    def last(self, tasks: Iterable[Task]) -> Task:
        """Whoever of `tasks` has the largest rank."""
        return max(tasks, key=_rank)

    def _next(self, key: tuple[int, ...]) -> tuple[int, ...]:
        self._num_ranked += 1
        return (*key, self._num_ranked)


class RankedQueue(list[Task]):
    """Tasks by rank, smallest first, with the calls of a deque: at whichever end one is added, it goes to its place."""

    __slots__ = ("_ranks",)

    def __init__(self, ranks: Ranks) -> None:
        super().__init__()
        self._ranks = ranks

    def append(self, task: Task) -> None:
        self._ranks.of(task)
        insort(self, task, key=_rank)

    appendleft = append

    def popleft(self) -> Task:
        return self.pop(0)


def _rank(task: Task) -> tuple[int, ...]:
    return task.rank
