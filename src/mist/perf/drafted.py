"""Steps of speculative decoding: a target model that verifies, and before it the passes that draft for it.

A client that speculates gets it in place of its performance model. It prices nothing itself but sums what the models of
target and draft say; it never knows how many drafts are accepted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from mist.perf import ORIGINS, Deployment, OperatorTime, PerfModel
from mist.request import Step


@dataclass(slots=True)
class Drafted:
    """A prepared `target` whose steps verify, after `num_draft_tokens` passes, one for each token drafted.

    With a `draft` model (prepared, for one token per decode) these are its forward passes over the step's decodes, at
    their contexts; the first takes the step's prefill chunks along, whose keys and values the draft needs too. Without,
    a pass takes `draft_cost` of the step that verifies.
    """

    target: PerfModel
    num_draft_tokens: int
    draft: PerfModel | None = None
    draft_cost: float = 0.0
    _target_ns: int = field(init=False, default=0)
    _draft_ns: int = field(init=False, default=0)

    @property
    def includes_host(self) -> bool:
        """Whether the target's times hold the engine's host time."""
        return bool(getattr(self.target, "includes_host", False))

    def supports(self, deployment: Deployment) -> str | None:
        """What the target says."""
        return self.target.supports(deployment)

    def prepare(self, deployment: Deployment) -> None:
        """Prepare the target; the draft has a deployment of its own."""
        self.target.prepare(deployment)

    def step_time(self, step: Step) -> int:
        """Device time of the drafts and of the step that verifies them, ns."""
        target_ns = self.target.step_time(step)
        draft_ns = self._share_of(target_ns)
        if self.draft is not None:
            draft_ns += sum(self.draft.step_time(drafting) * times for drafting, times in self._passes(step))
        self._target_ns += target_ns
        self._draft_ns += draft_ns
        return target_ns + draft_ns

    def floor_time(self, step: Step) -> int:
        """The floors of all passes, one after the other."""
        floor = self.target.floor_time(step)
        if self.draft is not None:
            floor += sum(self.draft.floor_time(drafting) * times for drafting, times in self._passes(step))
        return floor

    def explain(self, step: Step) -> list[OperatorTime]:
        """The operators of the drafts, all passes together, and then those of the target."""
        found: list[OperatorTime] = []
        verified = self.target.explain(step)
        if self.draft is not None:
            for drafting, times in self._passes(step):
                found += [_repeated(o, times) for o in self.draft.explain(drafting)]
        elif share := self._share_of(self.target.step_time(step)):
            found.append(OperatorTime("drafts", self.num_draft_tokens, 0.0, 0.0, share, "launch", "roofline", 0.0))
        return found + verified

    def provenance(self) -> dict[str, float]:
        """Share of the answered device time by origin, the draft's own; an assumed cost has the target's origins."""
        of_target = self.target.provenance()
        if self.draft is None or not self._draft_ns:
            return of_target
        of_draft, share = self.draft.provenance(), self._draft_ns / (self._target_ns + self._draft_ns)
        mixed = {o: (1 - share) * of_target.get(o, 0.0) + share * of_draft.get(o, 0.0) for o in ORIGINS}
        return {origin: part for origin, part in mixed.items() if part}

    def _share_of(self, target_ns: int) -> int:
        return round(self.num_draft_tokens * self.draft_cost * target_ns)

    def _passes(self, step: Step) -> Iterator[tuple[Step, int]]:
        """The draft's steps, and how often each is run."""
        decodes = Step(step.num_decodes, step.decode_context, num_sampled=step.num_decodes)
        if step.chunks:
            yield _shared(replace(decodes, chunks=step.chunks, num_prefill_tokens=step.num_prefill_tokens), step), 1
        if step.num_decodes:
            times = self.num_draft_tokens - bool(step.chunks)
            if times:
                yield _shared(decodes, step), times


def _shared(drafting: Step, step: Step) -> Step:
    """A draft's step with its part of the tokens that all attention groups have together."""
    if not step.shared_tokens:
        return drafting
    return replace(drafting, shared_tokens=-(-step.shared_tokens * drafting.num_tokens // step.num_tokens))


def _repeated(o: OperatorTime, times: int) -> OperatorTime:
    return replace(
        o,
        name=f"draft_{o.name}",
        count=o.count * times,
        flop=o.flop * times,
        bytes=o.bytes * times,
        time_ns=o.time_ns * times,
        floor_ns=o.floor_ns * times,
    )
