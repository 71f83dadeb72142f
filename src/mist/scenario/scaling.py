"""What a user may write of a pool that scales: by a schedule, by a rule, and how long a replica takes to start.

A part of the schema, of `clients`. It starts and drains nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from typing import Annotated

from pydantic import Field, model_validator

from mist.errors import Problem
from mist.scenario.named import Located, Section, problem
from mist.scenario.quantities import MAX_SECONDS, Seconds


class Thresholds(Section):
    """Where a rule adds replicas, and where it takes some away."""

    above: Annotated[float, Field(ge=0)]
    """more replicas where it is more than this"""
    below: Annotated[float, Field(ge=0)] = 0.0
    """fewer where it is less than this"""

    @model_validator(mode="after")
    def _in_order(self) -> Thresholds:
        if self.below > self.above:
            raise problem(f"below {self.below:g} is more than above {self.above:g}", "let it be less", ("below",))
        return self


class RuleSection(Section):
    """How many replicas are wanted, by what waits for them."""

    queue: Thresholds | None = None
    """tasks that wait for each replica that serves"""
    wait_s: Thresholds | None = None
    """for how long whoever waits longest has"""
    every_s: Annotated[float, Field(ge=1e-3, le=MAX_SECONDS)] = 15.0
    """seconds from one look to the next"""
    step: Annotated[int, Field(ge=1, le=100_000)] = 1
    """replicas more, or less, at a time"""

    @classmethod
    def conflicts(cls, given: Set[str]) -> Iterator[Located]:
        """One thing is measured."""
        if len(given & {"queue", "wait_s"}) != 1:
            hint = "such as queue: {above: 8, below: 1}, or wait_s: {above: 2}"
            yield (), Problem("a rule goes by either queue or wait_s", hint=hint)


class Planned(Section):
    """Replicas that are wanted from a time on."""

    at_s: Seconds
    """when, on the run's clock"""
    count: Annotated[int, Field(ge=0, le=100_000)]
    """replicas"""


class ScalingSection(Section):
    """A pool of which not all replicas serve all the time; its `count` is the most that it may have."""

    initial_count: Annotated[int, Field(ge=0, le=100_000)] = 1
    """replicas that serve at first"""
    min_count: Annotated[int, Field(ge=0, le=100_000)] = 1
    """the fewest that a rule leaves"""
    start_up_s: Seconds = 0.0
    """from when a replica is wanted to when it serves: to get a machine, load weights, capture graphs"""
    schedule: list[Planned] = []  # noqa: RUF012
    """replicas wanted by time"""
    rule: RuleSection | None = None
    """replicas wanted by load"""

    def too_many(self, count: int) -> Iterator[Located]:
        """What asks for more replicas than the pool has."""
        told = [(("initial_count",), self.initial_count), (("min_count",), self.min_count)]
        told += [(("schedule", i, "count"), each.count) for i, each in enumerate(self.schedule)]  # type: ignore[misc]
        for place, number in told:
            if number > count and (number > 1 or place[0] == "schedule"):
                yield place, Problem(f"{number} replicas, and the pool has {count}", hint=f"raise its count of {count}")
