"""Races whose branches fetch KV caches: what is cancelled on its way leaves no room taken and no task behind."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest

from mist.pipeline import RequestRandom
from mist.registry import register
from mist.request import DECODE, PREFILL, FirstOf, Pipeline, Request, Stage
from mist.scenario import load


@register("pipeline", "racing_fetches")
@dataclass
class RacingFetches:
    """A quick stage of `quick` tokens beside answers whose prefixes are fetched; the first to end counts."""

    quick: int = 100
    answers: int = 2
    kinds: tuple[str, ...] = field(default=("quick", PREFILL, DECODE), init=False)
    is_fixed: bool = field(default=False, init=False)

    def __call__(self, request: Request, rng: RequestRandom) -> Pipeline:
        answers = [self._answer(request) for _ in range(self.answers)]
        yield FirstOf(1, [Stage("quick", input_tokens=self.quick), *answers])

    def _answer(self, request: Request) -> Pipeline:
        yield Stage(PREFILL, input_tokens=request.input_tokens)
        if request.oracle_output_tokens:
            yield Stage(DECODE, oracle_output_tokens=request.oracle_output_tokens)


@pytest.mark.parametrize("seed", range(25))
def test_races_of_fetches_obey_the_laws(seed: int) -> None:
    rng = random.Random(seed)
    gpu = {"device": "h100-sxm", "model": "llama-3.1-8b", "perf": "roofline"}
    tier = {"capacity": "1 TB", "bandwidth": rng.choice(["1 GB/s", "40 GB/s"]), "latency": "1 ms", "hit_rate": 0.9}
    kv: dict[str, Any] = {"tiers": ["host"], "fetch": "always", "num_blocks": rng.choice([600, 5000])}
    result = load(
        {
            "seed": seed,
            "workload": {"arrivals": {"poisson": {"rate_per_s": rng.choice([5, 60])}}, "num_requests": 60,
                         "input_tokens": 4000, "output_tokens": 8, "cached_tokens": 3500},
            "pipeline": {"racing_fetches": {"quick": rng.choice([50, 2000]), "answers": rng.randint(1, 3)}},
            "clients": {"fast": gpu | {"serves": ["quick"]}, "gpu": gpu | {"kv_cache": kv}},
            "memories": {"host": tier},
        }
    ).run(check=True)  # fmt: skip
    assert result.metrics["requests"]["finished"] == 60
