"""Jobs on a Ray cluster: one started here for the occasion, or one of many machines by its address.

Ray is an extra. Workers that die are replaced by Ray, which does their jobs again; an answer is taken once, by the
reference of its task. It ends only what it has started.
"""

from __future__ import annotations

import contextlib
import functools
import pickle
import socket
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from mist.errors import Problem, ScenarioError
from mist.registry import register
from mist.search.evaluate import Job, Outcome, evaluate
from mist.workers import Surroundings

#: jobs that wait at each core of the cluster, so that none is idle while an answer is on its way
_AHEAD = 2
#: how long the head of a cluster may take to answer
_CONNECT_S = 10.0


@register("executor", "ray")
@dataclass
class Ray:
    """Tasks of one core on the cluster at `address`; "" starts one here, of `num_workers` cores (0: all).

    Machines of a cluster need this version of MIST, and files that jobs name at the same places. `max_retries`: how
    often a job is done again whose worker has died, before that is its outcome.
    """

    address: str = ""
    num_workers: int = 0
    max_retries: int = 5
    _ray: Any = field(init=False, repr=False, default=None)
    _is_ours: bool = field(init=False, repr=False, default=False)
    _told: contextlib.ExitStack = field(init=False, repr=False, default_factory=contextlib.ExitStack)

    def __enter__(self) -> Ray:
        self._ray = _imported()
        if self._ray.is_initialized():
            return self
        quiet = {"log_to_driver": False, "logging_level": "error"}
        if self.address:
            try:
                _check_reachable(self.address)
                self._ray.init(address=self.address, **quiet)
            except (OSError, ValueError) as error:
                hint = "name the head of a running cluster, such as 10.0.0.1:6379 or ray://10.0.0.1:10001"
                message = f"there is no Ray cluster at {self.address!r}: {error}"
                raise ScenarioError(Problem(message, hint=hint)) from None
        else:
            self._ray.init(address="local", num_cpus=self.num_workers or None, include_dashboard=False, **quiet)
        self._is_ours = True
        # Ray prints what becomes of its workers, from a thread of its own, into what may be a document
        self._told.enter_context(contextlib.redirect_stdout(sys.stderr))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._told.close()
        if self._is_ours:
            self._ray.shutdown()
            self._is_ours = False

    def run(self, jobs: Iterable[Job]) -> Iterator[Outcome]:
        """The outcomes as they come; needs the `with` block."""
        if self._ray is None:
            with self:
                yield from self.run(jobs)
            return
        ray = self._ray
        task = ray.remote(max_retries=self.max_retries)(_evaluate).remote
        room = _AHEAD * max(1, int(ray.cluster_resources().get("CPU", 1)))
        here, waiting = ray.put(Surroundings.here()), iter(jobs)
        in_flight: dict[Any, str] = {}
        try:
            while True:
                while len(in_flight) < room and (job := next(waiting, None)) is not None:
                    in_flight[task(pickle.dumps(job), here)] = job.key
                if not in_flight:
                    return
                for reference in ray.wait(list(in_flight), num_returns=1)[0]:
                    outcome = _answer(ray, reference, in_flight[reference])
                    del in_flight[reference]
                    yield outcome
        finally:
            for reference in in_flight if ray.is_initialized() else ():
                ray.cancel(reference, force=True)


def _answer(ray: Any, reference: Any, key: str) -> Outcome:
    try:
        outcome: Outcome = ray.get(reference)
    except ray.exceptions.RayError as error:
        reason = (str(error).strip().splitlines() or [""])[-1 if isinstance(error, ray.exceptions.RayTaskError) else 0]
        return Outcome(key, None, f"Ray has no answer ({type(error).__name__}): {reason}", 0.0)
    return outcome


def _evaluate(pickled: bytes, surroundings: Surroundings) -> Outcome:
    """Of a job, whose modules may be found only in its surroundings."""
    _enter(surroundings)
    return evaluate(pickle.loads(pickled))


@functools.lru_cache(1)
def _enter(surroundings: Surroundings) -> None:
    """Once per worker and run."""
    surroundings.enter()


def _check_reachable(address: str) -> None:
    """OSError where nobody listens at HOST:PORT: Ray itself would try for minutes."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host, int(port)), _CONNECT_S).close()


def _imported() -> Any:
    try:
        import ray
    except ImportError:
        hint = "pip install 'ray>=2.9', or take --executor processes"
        raise ScenarioError(Problem("Ray isn't installed", hint=hint)) from None
    return ray
