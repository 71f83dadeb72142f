"""Which configurations of a space can be run at all, and for what reasons the others can't.

Between the space and the strategies: choices come in; a `Point`, complete and validated, or a `Refusal` goes out. It
runs nothing, and drops nothing without a reason that is counted.
"""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mist.errors import Problem, ScenarioError
from mist.hardware import Device
from mist.scenario import catalogue
from mist.scenario.pricing import refusals_of
from mist.scenario.source import KeyPath, Source, key_path
from mist.scenario.value import Scenario
from mist.search.choices import count, every
from mist.search.space import Space

#: written for a count: as many replicas as the budget leaves
REST = "rest"
_DEGREES = ("tp", "pp", "attn_dp")

#: what the problems of a scenario mean to a search; others are told in their own words
_REASONS = (
    (r"does not fit on|must fit|fits? into", "the model doesn't fit into the devices' memory"),
    (r"heads|don't divide|doesn't divide|too few for pp|doesn't fill whole groups|no experts to split",
     "tp, pp, ep or attn_dp doesn't divide the model or the devices"),
    (r"no fp32 rate", "the devices don't compute in the dtype"),
    (r"has another model|have others than|one model and kv_dtype", "pools that exchange KV caches differ in layout"),
)  # fmt: skip
DUPLICATE = "the same as another but for the order or the names of clients"
UNPRICED = "no performance model supports it"
OVER, UNEVEN = "not the devices of the budget", "the budget is no whole number of replicas"


@dataclass(frozen=True, eq=False)
class Point:
    """A legal configuration: what was chosen, the scenario, its resolved form, and its accelerators."""

    number: int
    choices: Mapping[str, str]
    scenario: Scenario
    resolved: Mapping[str, Any]
    devices: int

    @functools.cached_property
    def deployment(self) -> str:
        """What serves, as text: the same for points that differ in their load alone."""
        return json.dumps(self.resolved["clients"], sort_keys=True, default=str)

    @functools.cached_property
    def kinds(self) -> tuple[str, ...]:
        """The names of its accelerators."""
        return tuple(sorted({device.name for device in self._accelerators()}))

    @functools.cached_property
    def vendors(self) -> tuple[str, ...]:
        """Who makes its accelerators; for one that says no vendor its own name."""
        return tuple(sorted({device.vendor or device.name for device in self._accelerators()}))

    @property
    def standing(self) -> int:
        """2 for one kind of device, 1 for several of one vendor, else 0: in how many contests beside all it is."""
        return (len(self.kinds) == 1) + (len(self.vendors) == 1)

    def _accelerators(self) -> Iterator[Device]:
        return (pool.device for pool in self.scenario.pools.values() if not pool.device.num_cores)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a configuration isn't run: a `reason` to count, and its `problem` in full."""

    reason: str
    problem: str


@dataclass
class Legal:
    """Points by number, and what was refused: counts and an example by reason, and remarks for the user."""

    points: dict[int, Point] = field(default_factory=dict)
    refused: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    num_configurations: int = 0

    def add(
        self, space: Space, choices: Mapping[str, str], settings: Mapping[str, Any], *, again: bool = False
    ) -> Point | None:
        """The point of these choices, if it is legal; else it is counted.

        One that is the same as an earlier one is counted too or, where `again`, is that one.
        """
        found = examine(space, choices, settings, len(self.points))
        if isinstance(found, Point) and (same := self._known.get(identity(found.resolved))) is not None:
            if again:
                return same
            found = Refusal(DUPLICATE, f"{_told(choices)} is {_told(same.choices)}")
        self.num_configurations += 1
        if isinstance(found, Refusal):
            self.refused[found.reason] += 1
            self.examples.setdefault(found.reason, found.problem)
            return None
        self.points[found.number] = self._known[identity(found.resolved)] = found
        return found

    def __post_init__(self) -> None:
        self._known: dict[str, Point] = {}


def legal_points(space: Space, progress: Callable[[int, int], None] | None = None) -> Legal:
    """Every configuration of the space, tried; ScenarioError where none is legal.

    `progress` is called with those that were tried and all that there are.
    """
    legal, total = Legal(), count(space.tree)
    kept: set[tuple[str, str]] = set()
    why: dict[tuple[str, str], Counter[str]] = {}
    for choices, settings in every(space.tree):
        before = legal.refused.copy()
        point = legal.add(space, choices, settings)
        if point is not None:
            kept.update(choices.items())
        for chosen in choices.items():
            why.setdefault(chosen, Counter()).update(legal.refused - before)
        if progress is not None:
            progress(legal.num_configurations, total)
    check_any(space, legal)
    legal.remarks = [
        f"{space.label(name)}: {name}: {label} is in no legal configuration: {_blamed(name, reasons)}"
        for (name, label), reasons in why.items()
        if (name, label) not in kept
    ]
    return legal


def check_any(space: Space, legal: Legal) -> None:
    """ScenarioError with the reasons, counted, where nothing that was tried is legal."""
    if legal.points:
        return
    place = space.own.problem(("space",), "")
    total, tried = count(space.tree), legal.num_configurations
    # a sampler may have drawn one again, or missed some
    message = f"none of the {total:,} configurations can be run" + (f", in {tried:,} tries" if tried != total else "")
    hint = "; ".join(f"{number:,}: {legal.examples[reason]}" for reason, number in legal.refused.most_common(3))
    raise ScenarioError(Problem(message, place.file, place.line, place.column, hint))


def _blamed(name: str, reasons: Counter[str]) -> str:
    """Of the reasons against a choice one that names it, else all, the most frequent first."""
    path = re.sub(r"\[[^\]]*\]", "", name)
    named = next((reason for reason in reasons if path in reason), None)
    return named or "; ".join(reason for reason, _ in reasons.most_common())


def examine(space: Space, choices: Mapping[str, str], settings: Mapping[str, Any], number: int) -> Point | Refusal:
    """The point of these choices, or why it can't be run."""
    source = space.source
    try:
        for path, value in settings.items():
            source = source.with_value(key_path(path), value, space.label(path))
        source = fill_rest(space, source)
        if (reason := _beyond(space, source)) is not None:
            return Refusal(*reason)
        scenario = Scenario.from_source(source)
    except ScenarioError as error:
        return Refusal(reason_of(error.problems[0]), str(error.problems[0]))
    devices = accelerators(scenario)
    if not within(space, devices):
        return Refusal(OVER, f"{devices} devices: {_told(choices)}")
    for name, pool in scenario.pools.items():
        if refusals := refusals_of(pool.perf, pool.deployment()):
            return Refusal(UNPRICED, f"{name}: {'; '.join(refusals)}")
    resolved = {key: value for key, value in scenario.resolved().items() if key != "name"}
    return Point(number, choices, scenario, resolved, devices)


def accelerators(scenario: Scenario) -> int:
    """Devices in all pools, those that are CPUs aside."""
    return sum(pool.count * pool.platform.num_devices for pool in scenario.pools.values() if not pool.device.num_cores)


def within(space: Space, devices: int) -> bool:
    """Whether so many accelerators are within the budget."""
    return space.devices is None or devices == space.devices or (space.at_most and devices < space.devices)


def fill_rest(space: Space, source: Source) -> Source:
    """`source` with `count: rest` replaced by what the budget leaves; ScenarioError where there is no budget."""
    clients = _clients(source)
    resting = [name for name, client in clients.items() if client.get("count") == REST]
    if not resting:
        return source
    place: KeyPath = ("clients", resting[-1], "count")
    if space.devices is None or len(resting) > 1:
        hint = "budget: {devices: 8}, and `rest` for one client"
        raise ScenarioError(source.problem(place, "`rest` is what a budget leaves to one client", hint))
    each = replica_devices(clients[resting[0]]) or 1
    left = space.devices - sum(_devices(source, client) for name, client in clients.items() if name != resting[0])
    if left < each or (left % each and not space.at_most):
        raise ScenarioError(source.problem(place, f"{UNEVEN}: {left} left for replicas of {each}"))
    return source.with_value(place, left // each, space.label("clients"))


def replica_devices(client: Mapping[str, Any]) -> int | None:
    """Devices of a replica as written, None where it isn't a client with whole degrees of parallelism."""
    degrees = [client.get(key, 1) for key in _DEGREES]
    if "model" not in client or not all(isinstance(degree, int) and degree > 0 for degree in degrees):
        return None
    product = 1
    for degree in degrees:
        product *= degree
    return product


def reason_of(problem: Problem) -> str:
    """What a problem is counted under."""
    if UNEVEN in problem.message:
        return UNEVEN
    for pattern, reason in _REASONS:
        if re.search(pattern, problem.message):
            return reason
    return re.sub(r"(?<![\w.-])\d[\d,.]*(?![\w-])", "N", problem.message)


def identity(resolved: Mapping[str, Any]) -> str:
    """Equal for scenarios that differ in the order or the names of their clients, where nothing else says these."""
    clients = resolved["clients"]
    rest = json.dumps({key: value for key, value in resolved.items() if key != "clients"}, sort_keys=True, default=str)
    if any(f'"{name}"' in rest for name in clients):
        return json.dumps([clients, rest], default=str)
    return json.dumps([sorted(json.dumps(client, sort_keys=True, default=str) for client in clients.values()), rest])


def _beyond(space: Space, source: Source) -> tuple[str, str] | None:
    """More devices than the budget has, which is told before anything is validated."""
    total = sum(_devices(source, client) for client in _clients(source).values())
    return (OVER, f"{total} devices") if space.devices is not None and total > space.devices else None


def _devices(source: Source, client: Mapping[str, Any]) -> int:
    """Accelerators of a client as written; 0 where its device is a CPU, or what is written makes no sense."""
    each, number = replica_devices(client), client.get("count", 1)
    if not each or not isinstance(number, int):
        return 0
    try:
        device = catalogue.read("devices", client.get("device", ""), source.folder)[0]
    except ScenarioError:
        return 0  # which validation will tell
    return 0 if device.num_cores else each * number


def _clients(source: Source) -> dict[str, Any]:
    data = source.data().get("clients")
    return {n: c for n, c in data.items() if isinstance(c, dict)} if isinstance(data, dict) else {}


def _told(choices: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {label}" for name, label in choices.items()) or "the scenario as it is"
