"""What a user may write of a pool that scales: by a schedule, by a rule, and how long a replica takes to start.

A part of the schema, of `clients`. It starts and drains nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, model_validator

from mist.errors import Problem
from mist.scenario.named import Located, Section, problem
from mist.scenario.quantities import MAX_SECONDS, Seconds

if TYPE_CHECKING:
    from mist.scenario.value import Scenario


#: what a rule may go by
MEASURES = ("queue", "wait_s", "deadline_share")


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
    deadline_share: Thresholds | None = None
    """how much of the time to the deadline of its first token has passed, the most of those that wait; 1: all"""
    every_s: Annotated[float, Field(ge=1e-3, le=MAX_SECONDS)] = 15.0
    """seconds from one look to the next"""
    step: Annotated[int, Field(ge=1, le=100_000)] = 1
    """replicas more, or less, at a time"""

    @classmethod
    def conflicts(cls, given: Set[str]) -> Iterator[Located]:
        """One thing is measured."""
        if len(given & set(MEASURES)) != 1:
            hint = "such as queue: {above: 8, below: 1}, wait_s: {above: 2}, or deadline_share: {above: 0.5}"
            yield (), Problem("a rule goes by one of queue, wait_s and deadline_share", hint=hint)


class Planned(Section):
    """Replicas that are wanted from a time on."""

    at_s: Seconds
    """when, on the run's clock"""
    count: Annotated[int, Field(ge=0, le=100_000)]
    """replicas"""


class ScalingSection(Section):
    """A pool of which not all replicas serve all the time; its `count` is the most that it may have."""

    initial_count: Annotated[int, Field(ge=0, le=100_000)] = 1
    """replicas that serve at first, however many the pool may have"""
    min_count: Annotated[int, Field(ge=0, le=100_000)] = 1
    """the fewest that a rule leaves, at most `initial_count`"""
    start_up_s: Seconds = 0.0
    """from when a replica is wanted to when it serves: to get a machine, load weights, capture graphs"""
    schedule: list[Planned] = []  # noqa: RUF012
    """replicas wanted by time"""
    rule: RuleSection | None = None
    """replicas wanted by load"""

    def misfits(self, count: int) -> Iterator[Located]:
        """What can't be in a pool of `count` replicas, and what goes against something else here."""
        yield from self._too_many(count)
        if self.rule is not None and self.min_count > self.initial_count:
            message = f"a rule leaves no fewer than {self.min_count}, and {self.initial_count} serve at first"
            hint = f"give min_count: {self.initial_count}, or initial_count: {self.min_count}"
            yield ("min_count",), Problem(message, hint=hint)
        if self.rule is None and not any([self.initial_count, *(each.count for each in self.schedule)]):
            hint = "give initial_count at least 1, a rule, or a schedule that starts some"
            yield ("initial_count",), Problem("no replica ever serves", hint=hint)
        times = [each.at_s for each in self.schedule]
        for i, each in enumerate(self.schedule):
            if self.rule is not None and each.count < self.min_count:
                message = f"{each.count} replicas, and the rule leaves no fewer than {self.min_count}"
                yield ("schedule", i, "count"), Problem(message, hint=f"give min_count: {each.count}")
            if each.at_s in times[:i]:
                hint = "keep one of them"
                yield ("schedule", i, "at_s"), Problem(f"{each.at_s:g} s is here twice", hint=hint)

    def _too_many(self, count: int) -> Iterator[Located]:
        told = [(("initial_count",), self.initial_count), (("min_count",), self.min_count)]
        told += [(("schedule", i, "count"), each.count) for i, each in enumerate(self.schedule)]  # type: ignore[misc]
        for place, number in told:
            if number > count and (number > 1 or place[0] == "schedule"):
                yield place, Problem(f"{number} replicas, and the pool has {count}", hint=f"raise its count of {count}")


def without_deadlines(scenario: Scenario) -> Iterator[Located]:
    """Rules that go by deadlines where no request has one."""
    for name, pool in scenario.pools.items():
        if pool.scaling is None or pool.scaling.rule is None or pool.scaling.rule.deadline_share is None:
            continue
        served = [tenant for tenant in scenario.tenants.values() if name in scenario.clients_of(tenant.name)]
        # a trace may bring them along
        if not any(t.slo.ttft_s or t.slo.e2e_s or t.workload.trace or t.workload.sizes for t in served):
            hint = "give an slo, such as ttft_s: {p99: 1}, or let the rule go by queue or wait_s"
            yield (
                ("clients", name, "scaling", "rule", "deadline_share"),
                Problem("no request has a deadline", hint=hint),
            )
