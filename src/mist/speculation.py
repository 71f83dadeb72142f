"""Speculative decoding: how many steps an answer takes, and the cohort of sequences that verify drafts together.

Where a client speculates, its residents keep a `SpeculativeCohort` in place of a `Cohort`: still O(1) a step, with a
path drawn when a sequence joins first. It never prices a draft, and never sees what the drafted tokens are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from mist.cohort import Cohort
from mist.hardware import MappingReader
from mist.request import Task

#: Tokens per step are whole multiples of 2^-PACE_BITS: sums of contexts stay exact integers.
PACE_BITS = 32


@dataclass(frozen=True, slots=True)
class AcceptedLengths:
    """Acceptance as measured on `model` by `method`: tokens per step, `accepted_lengths[k - 1]` with k drafted ones.

    The token that the model itself adds counts: each is 1 + accepted drafts / steps.
    """

    name: str
    accepted_lengths: tuple[float, ...]
    model: str = ""
    method: str = ""
    aliases: tuple[str, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any]) -> AcceptedLengths:
        """Measured lengths from a catalogue file or a user's YAML; ScenarioError lists all that is wrong with them."""
        reader = MappingReader(data, {f.name for f in fields(cls)}, ("name", "accepted_lengths"))
        given = data.get("accepted_lengths") or ()
        lengths = list(given) if isinstance(given, list | tuple) else [given]
        for k, length in enumerate(lengths, 1):
            if isinstance(length, bool) or not isinstance(length, int | float) or not 1 <= length <= k + 1:
                reader.problem("accepted_lengths", f"has {length!r} for {k} drafted, where 1 to {k + 1} would do")
        reader.finish()
        texts = {key: str(data.get(key) or "") for key in ("name", "model", "method")}
        aliases = tuple(str(alias) for alias in data.get("aliases") or ())
        sources = {str(key): str(text) for key, text in (data.get("sources") or {}).items()}
        return cls(accepted_lengths=tuple(map(float, lengths)), aliases=aliases, sources=sources, **texts)


@dataclass(frozen=True, slots=True)
class Speculation:
    """`num_draft_tokens` k are drafted for each sequence and step; `acceptance` is accepted over drafted tokens.

    A step verifies k drafts at once. Draft i is accepted with probability p if all before it were (Leviathan et al.,
    arXiv 2211.17192, section 3.1), so that a step emits 1 + A tokens with P(A >= i) = p^i, and p solves
    p + p^2 + ... + p^k = k x acceptance: mean tokens per step are 1 + k x acceptance exactly. The step that
    reaches an answer's end drops what it has beyond it.

    `rng_of(request index, stage index)`: the generator of that stage, whatever the policy does.
    """

    num_draft_tokens: int
    acceptance: float
    rng_of: Callable[[int, int], np.random.Generator]
    #: p^k, ..., p^1
    _thresholds: npt.NDArray[np.float64] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        powers = np.arange(self.num_draft_tokens, 0, -1)
        object.__setattr__(self, "_thresholds", _chain(self.num_draft_tokens, self.acceptance) ** powers)

    @property
    def tokens_per_step(self) -> float:
        """Mean tokens that a step emits for each sequence."""
        return 1 + self.num_draft_tokens * self.acceptance

    def num_steps(self, num_tokens: int, rng: np.random.Generator) -> int:
        """Draw the steps that `num_tokens` take; of one generator, a longer answer's path begins as a shorter one's."""
        steps = tokens = 0
        while True:
            size = int((num_tokens - tokens) / self.tokens_per_step) + 8
            rejected = np.searchsorted(self._thresholds, rng.random(size), side="right")
            emitted = tokens + np.cumsum(1 + self.num_draft_tokens - rejected)
            if emitted[-1] >= num_tokens:
                return steps + int(np.searchsorted(emitted, num_tokens)) + 1
            steps, tokens = steps + size, int(emitted[-1])

    def pace(self, task: Task, num_tokens: int) -> int:
        """Tokens per step of `task`, in 2^-PACE_BITS and rounded up, drawn for the `num_tokens` it has to go."""
        rng = self.rng_of(task.request.index, task.stage_index)
        return -(-(num_tokens << PACE_BITS) // self.num_steps(num_tokens, rng))


def _chain(num_draft_tokens: int, acceptance: float) -> float:
    """The p in [0, 1] at which p + p^2 + ... + p^k is k x acceptance, by bisection to the last bit."""
    low, high = 0.0, 1.0
    if acceptance >= 1:
        return high
    while low < (middle := (low + high) / 2) < high:
        if sum(middle**i for i in range(1, num_draft_tokens + 1)) > num_draft_tokens * acceptance:
            high = middle
        else:
            low = middle
    return low if acceptance else 0.0


class SpeculativeCohort(Cohort):
    """A cohort in which a sequence gains its own number of tokens a step, its `pace`, whole tokens counting.

    The pace is drawn when a task joins first and kept when it is preempted and joins again. After s steps it has
    generated floor(s x pace) tokens; `sum_context` is the floor of the sum of exact contexts. Each step reserves blocks
    for the token sampled last and k drafts; rejected drafts leave theirs to the next step. `new_blocks`: step counter
    -> blocks that the step after it needs, entered when a sequence joins.
    """

    __slots__ = ("_exact_context", "_sum_pace", "new_blocks", "speculation")

    def __init__(self, block_size: int, speculation: Speculation) -> None:
        super().__init__(block_size)
        self.speculation = speculation
        self.tokens_per_decode = 1 + speculation.num_draft_tokens
        self.new_blocks: dict[int, int] = {}
        self._exact_context = 0
        self._sum_pace = 0

    def generated(self, task: Task) -> int:
        to_go = task.stage.oracle_output_tokens - task.generated_tokens
        return min(to_go, (self.step - task.join_step) * task.pace >> PACE_BITS)

    def step_of(self, task: Task, num_tokens: int) -> int:
        return task.join_step - (-(num_tokens << PACE_BITS) // task.pace)

    def reserved_tokens(self, task: Task, growing: bool) -> int:
        steps = self.step - task.join_step - (not growing)
        if steps < 0:
            return task.target_tokens  # its first step is still to come
        return task.target_tokens + (steps * task.pace >> PACE_BITS) + self.tokens_per_decode

    def num_new_blocks(self) -> int:
        return self.new_blocks.get(self.step, 0)

    def join(self, task: Task, num_tokens: int) -> None:
        if not task.pace:
            task.pace = self.speculation.pace(task, num_tokens)
        self._enter(task, -(-(num_tokens << PACE_BITS) // task.pace))
        self._sum_pace += task.pace
        self._add_context(task.target_tokens << PACE_BITS)
        self._plan_blocks(task, 1)

    def advance(self) -> list[Task] | None:
        self.new_blocks.pop(self.step, None)
        self._exact_context += self._sum_pace
        finished = super().advance()
        self._add_context(0)
        return finished

    def leave(self, task: Task) -> None:
        self._plan_blocks(task, -1)
        super().leave(task)

    def clear(self) -> None:
        super().clear()
        self.new_blocks.clear()
        self._exact_context = self._sum_pace = 0

    def _drop(self, task: Task) -> None:
        self.count -= 1
        self._sum_pace -= task.pace
        self._add_context(-(task.target_tokens << PACE_BITS) - (self.step - task.join_step) * task.pace)

    def _add_context(self, exact: int) -> None:
        self._exact_context += exact
        self.sum_context = self._exact_context >> PACE_BITS

    def _plan_blocks(self, task: Task, change: int) -> None:
        """Add `change` to `new_blocks` at every step from now on at which `task` needs one block more.

        A sequence that holds m blocks needs another once its context and the tokens of a step exceed m x block size.
        """
        held = -(-self.reserved_tokens(task, False) // self.block_size)
        missing = held * self.block_size - self.tokens_per_decode + 1 - task.target_tokens << PACE_BITS
        while (at := task.join_step + max(0, -(-missing // task.pace))) < task.finish_step:
            self.new_blocks[at] = self.new_blocks.get(at, 0) + change
            missing += self.block_size << PACE_BITS
