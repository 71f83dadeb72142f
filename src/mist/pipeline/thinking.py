"""How long requests think: lengths of thoughts, and the piece of pipelines that thinks and then answers.

A part of the reasoning pipelines, with the parameters that they share. All draws are the request's own and are made
before its first stage, so that they are the same under every policy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mist.pipeline import RequestRandom
from mist.pipeline.parts import BYTES_PER_TOKEN, Answer, require_names
from mist.request import DECODE, PREFILL, Request, Stage, StageResult

#: the stage in which a reward model reads what was generated
SCORE = "score"
#: the size of a request that tells the tokens of its thoughts
REASONING_TOKENS = "reasoning_tokens"


@dataclass
class Thinking:
    """A request generates `scale` times its output: a thought of `scale` - 1 outputs, which the user doesn't see, then
    its answer, the output.

    Where the workload tells a request's `reasoning_tokens`, these are its thought. With `cv` above 0 each thought's
    length is drawn from a lognormal distribution of that mean and coefficient of variation; `max_thought_tokens` caps
    it. ValueError for values out of range.
    """

    scale: float = 5.0
    cv: float = 0.0
    max_thought_tokens: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.scale <= 1e6:
            raise ValueError(f"scale is {self.scale:g}: give all tokens over those of the answer, at least 1")
        require_cv(self.cv)
        require_counts(max_thought_tokens=self.max_thought_tokens)

    def thoughts(self, request: Request, rng: RequestRandom, num_thoughts: int) -> list[int]:
        """Tokens of each of `num_thoughts` thoughts; the first ones are the same whatever their number."""
        mean = request.sizes.get(REASONING_TOKENS, (self.scale - 1) * request.oracle_output_tokens)
        lengths = around(mean, self.cv, num_thoughts, rng)
        return [min(length, self.max_thought_tokens or length) for length in lengths.tolist()]


def around(mean: float, cv: float, num: int, rng: RequestRandom) -> npt.NDArray[np.int64]:
    """`num` lengths of this mean, int64[num]: lognormal (ln X ~ N(ln(mean) - s^2/2, s^2), s^2 = ln(1 + cv^2)), rounded
    and at least 1; without a `cv` all are the mean, and nothing is drawn."""
    if not mean or not cv:
        return np.full(num, round(mean), np.int64)
    variance = math.log1p(cv**2)
    drawn = mean * np.exp(math.sqrt(variance) * rng().standard_normal(num) - variance / 2)
    return np.rint(np.clip(drawn, 1, 2**40)).astype(np.int64)


def read(prompt_tokens: int) -> Stage:
    """The prefill of a prompt, which is sent as text to where it is computed."""
    return Stage(PREFILL, input_tokens=prompt_tokens, input_bytes=prompt_tokens * BYTES_PER_TOKEN)


def think(prompt_tokens: int, thought: int, answer: int, *, visible: bool = True, is_resumed: bool = False) -> Answer:
    """Prefill, then one decode of a thought and the answer, of which the user sees the answer if it is `visible`."""
    result = yield read(prompt_tokens)
    if thought + answer:
        result = yield Stage(
            DECODE,
            oracle_output_tokens=thought + answer,
            visible=visible,
            hidden_tokens=thought,
            is_resumed=is_resumed,
        )
    return result


def candidate(prompt_tokens: int, num_tokens: int, score: str = "") -> Answer:
    """A decode beside others from the context of one prefill, then its `score`, which reads the prompt and all of it.

    The user sees nothing of it. Its result is the decode's, the end of the last stage aside.
    """
    result = yield Stage(DECODE, oracle_output_tokens=num_tokens, visible=False)
    if not score:
        return result
    tokens = prompt_tokens + num_tokens
    scored = yield Stage(score, input_tokens=tokens, visible=False, input_bytes=tokens * BYTES_PER_TOKEN)
    return StageResult(result.start_ns, scored.end_ns, result.output_tokens)


def show(num_tokens: int) -> Stage:
    """Tokens of a candidate are chosen and shown at once."""
    return Stage("", shown_tokens=num_tokens)


def require_cv(cv: float) -> None:
    """ValueError for a coefficient of variation that no lognormal distribution has."""
    if not 0 <= cv <= 100:
        raise ValueError(f"cv is {cv:g}: give the standard deviation over the mean, from 0 (all alike) to 100")


def require_counts(**counts: int | None) -> None:
    """ValueError, which names the parameter, for a number below 1; None is left out."""
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}: give a number of at least 1")


def require_score(score: str) -> None:
    """ValueError for a name that the stage of a reward model can't have."""
    require_names(score=score)
