"""What `mist capacity` may vary: the rate of the load, its concurrency, or how many clients a pool has.

Between the command line and the bisection, which only knows values that are harder or easier. It runs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from mist.errors import Problem, ScenarioError, nearest
from mist.scenario.clients import Pool
from mist.scenario.tenancy import SOLE, Tenancy
from mist.scenario.value import Scenario

RATE = "rate"
_CHOICES = "rate, workload.concurrency, or the count of a pool such as clients.gpu.count"
#: a rate is never taken further from the scenario's than this, nor a number of clients beyond the other
_MOST_TIMES, _MOST_CLIENTS = 2.0**12, 4096
_MOST_CONCURRENT = 2**20
#: where a rate, as a share of the highest, is tried too: whether all below holds as well
_SHARES = (0.5, 0.75, 0.9)


@dataclass(frozen=True, slots=True)
class Knob:
    """A quantity with the value that the scenario has, and the values that make its load harder or easier to serve.

    `name`: "rate" (values are factors of the scenario's own) or a dotted path. `paths` are set to a value times what
    they are mapped to. `rises`: more of it is harder, so that the highest is looked for; else the fewest. `is_whole`:
    whole numbers only, from 1 to `most`. `devices`: of each unit, 0 where it isn't hardware.
    """

    name: str
    start: float
    paths: Mapping[str, float]
    rises: bool = True
    is_whole: bool = False
    most: float = _MOST_TIMES
    devices: int = 0

    def overrides(self, value: float) -> dict[str, float]:
        """What a scenario is changed by to have this value."""
        return {path: int(value) if self.is_whole else own * value for path, own in self.paths.items()}

    def harder(self, value: float) -> float | None:
        """The next value that is harder, by a factor of two; None beyond the limits."""
        return self._moved(value, self.rises)

    def easier(self, value: float) -> float | None:
        """The next value that is easier, by a factor of two; None beyond the limits."""
        return self._moved(value, not self.rises)

    def between(self, one: float, other: float, tolerance: float) -> float | None:
        """A value in the middle; None where the two are neighbours, or within `tolerance` of each other."""
        low, high = sorted((one, other))
        if self.is_whole:
            return (low + high) // 2 if high - low > 1 else None
        return math.sqrt(low * high) if high > low * (1 + tolerance) else None

    def checks(self, value: float) -> list[float]:
        """Easier values, at which what holds at `value` should hold too."""
        if not self.is_whole:
            return [share * value for share in _SHARES]
        near = {value // 2, 3 * value // 4, 9 * value // 10} if self.rises else {value + 1, 2 * value}
        return sorted(each for each in near if each != value and 1 <= each <= self.most)

    def _moved(self, value: float, up: bool) -> float | None:
        moved = value * 2 if up else value // 2 if self.is_whole else value / 2
        least = 1 if self.is_whole else 1 / self.most
        if self.is_whole and up and value < self.most:
            return min(moved, self.most)
        return moved if least <= moved <= self.most else None


def knob_of(scenario: Scenario, name: str = RATE) -> Knob:
    """The quantity of a scenario that is called `name`; ScenarioError where it has none, or none that can be varied."""
    if name == RATE:
        return _rate(scenario)
    if name.startswith("clients.") and name.endswith(".count"):
        return _clients(scenario, name)
    for tenant in scenario.tenants.values():
        process = tenant.workload.arrival_process
        if process is None or process.name != "closed_loop":
            continue
        path = ".".join(map(str, (*tenant.place, "workload")))
        if name in (f"{path}.concurrency", f"{path}.arrivals.closed_loop.concurrency"):
            number = tenant.workload.num_requests or _MOST_CONCURRENT
            written = (
                f"{path}.concurrency" if tenant.workload.concurrency else f"{path}.arrivals.closed_loop.concurrency"
            )
            return Knob(name, process.params["concurrency"], {written: 1.0}, is_whole=True, most=number)
    hint = f"--vary takes {_CHOICES}"
    raise ScenarioError(Problem(f"{name!r} can't be varied in {scenario.name}", hint=hint))


def _rate(scenario: Scenario) -> Knob:
    """All loads that don't wait for the system, scaled together."""
    paths = {}
    for tenant in scenario.tenants.values():
        if not _waits(tenant):
            paths[".".join((*map(str, tenant.place), "workload", "rate_scale"))] = tenant.workload.rate_scale
    if not paths:
        place = (*scenario.tenants[next(iter(scenario.tenants))].place, "workload")
        message = "this load has no rate: its requests wait for each other, or all come at once"
        closed = "workload.concurrency" if SOLE in scenario.tenants else "tenants.NAME.workload.concurrency"
        raise ScenarioError(scenario.problem(place, message, f"--vary {closed}, or give arrivals with a rate"))
    return Knob(RATE, 1.0, paths)


def _waits(tenant: Tenancy) -> bool:
    process = tenant.workload.arrival_process
    return process is not None and process.name in ("closed_loop", "all_at_once")


def _clients(scenario: Scenario, name: str) -> Knob:
    pool_name = name.removeprefix("clients.").removesuffix(".count")
    if pool_name not in scenario.clients:
        hint = nearest(pool_name, scenario.clients)
        raise ScenarioError(Problem(f"--vary {name}: there are no clients {pool_name!r}", hint=hint))
    pool = scenario.clients[pool_name]
    devices = pool.platform.num_devices if isinstance(pool, Pool) else 1
    return Knob(name, pool.count, {name: 1.0}, rises=False, is_whole=True, most=_MOST_CLIENTS, devices=devices)
