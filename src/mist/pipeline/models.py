"""Several models that could answer a request: their names, the rule that picks one by a column, and their quality.

A piece of the pipelines `model_router` and `cascade`, with their common parameters. It never says where a model runs:
that is its client's, which serves the stage of the model's name.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

from mist.pipeline.parts import BYTES_PER_TOKEN, require_names
from mist.request import Request, Stage


@dataclass
class Models:
    """`models` are stage kinds, the smallest model first: each computes the whole prompt and generates the answer.

    `column`: a size that the workload tells of each request, such as its difficulty; one `above` a limit goes beyond
    the model of that limit, so there is a limit for each model but the last. `quality` of an answer by model, an input
    on any scale: the result tells the mean over the answers served.
    """

    models: tuple[str, ...] = ("small", "large")
    column: str = ""
    above: int | tuple[int, ...] | None = None
    quality: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.models) < 2 or len(set(self.models)) < len(self.models):
            raise ValueError(f"models is {list(self.models)}: give at least two names that differ")
        for kind in self.models:
            require_names(models=kind)
        if bool(self.column) != (self.above is not None):
            raise ValueError("column and above go together: such as column: difficulty, above: 3")
        self.limits("above", self.above)
        if self.quality and self.quality.keys() != set(self.models):
            raise ValueError(f"quality is of {', '.join(self.quality)}: give one of each of {', '.join(self.models)}")

    @property
    def needs_sizes(self) -> tuple[str, ...]:
        """Sizes that the workload has to tell of each request."""
        return (self.column,) if self.column else ()

    def limits(self, parameter: str, given: int | tuple[int, ...] | None) -> tuple[int, ...]:
        """The limits that a parameter gives, one for each model but the last; ValueError where they aren't so."""
        if given is None:
            return ()
        limits = (given,) if isinstance(given, int) else given
        if len(limits) != len(self.models) - 1 or list(limits) != sorted(set(limits)):
            hint = f"a limit for each of {', '.join(self.models[:-1])}, rising"
            raise ValueError(f"{parameter} is {', '.join(map(str, limits)) or 'empty'}: give {hint}")
        return limits

    def by_column(self, request: Request) -> int:
        """The place in `models` of the one that the request's column asks for."""
        return bisect_left(self.limits("above", self.above), request.sizes[self.column])

    def ask(self, place: int, request: Request, *, visible: bool = True, gates: bool = False) -> Stage:
        """The stage in which a model answers: the prompt is sent to it as text."""
        return Stage(
            self.models[place],
            input_tokens=request.input_tokens,
            oracle_output_tokens=request.oracle_output_tokens,
            visible=visible,
            input_bytes=request.input_tokens * BYTES_PER_TOKEN,
            gates=gates,
            reads_prompt=True,
        )
