"""Best of N: thoughts with answers side by side from one prompt, then one of them is shown.

The prompt's KV blocks are held once. A reward model scores each as it ends, or they vote; it never says which wins: all
answers have the request's output length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mist.pipeline import RequestRandom
from mist.pipeline.thinking import SCORE, Thinking, candidate, read, require_counts, require_score, show, think
from mist.registry import register
from mist.request import DECODE, PREFILL, FirstOf, Pipeline, Request


@register("pipeline", "best_of_n")
@dataclass
class BestOfN(Thinking):
    """`n` candidates, each a thought of its own length and an answer; the first `k` of them decide, all where left out.

    `select`: by `reward`, for which a reward model reads prompt, thought and answer in a stage `score` as soon as that
    candidate has ended, or by `majority`, which takes no time. Once `k` candidates are through, the others are given
    up. One candidate is streamed, neither scored nor voted on; of several, the answer is shown when it is chosen.
    """

    n: int = 4
    k: int | None = None
    select: Literal["reward", "majority"] = "reward"
    score: str = SCORE

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts(n=self.n, k=self.k)
        require_score(self.score)
        if self.k is not None and self.k > self.n:
            raise ValueError(f"k is {self.k}, above the {self.n} candidates: give n at most")

    @property
    def kinds(self) -> tuple[str, ...]:
        return (PREFILL, DECODE, self.score) if self.select == "reward" else (PREFILL, DECODE)

    @property
    def is_fixed(self) -> bool:
        return False  # it generates more than the request's output

    def __call__(self, request: Request, rng: RequestRandom) -> Pipeline:
        prompt, answer = request.input_tokens, request.oracle_output_tokens
        thoughts = self.thoughts(request, rng, self.n)
        lengths = [thought + answer for thought in thoughts]
        if self.n == 1 or not min(lengths):
            yield from think(prompt, thoughts[0], answer)
            return
        yield read(prompt)
        score = self.score if self.select == "reward" else ""
        yield FirstOf(self.k or self.n, [candidate(prompt, length, score) for length in lengths])
        yield show(answer)
