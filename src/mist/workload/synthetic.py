"""Synthetic workloads: arrival processes and length distributions, drawn from the scenario's seed before the run.

Each is a dataclass whose fields are its parameters; `draw_table` puts them together. Nothing here sees a policy or a
client, and drawing more requests never changes the first ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mist.registry import register
from mist.units import NS_PER_S
from mist.workload import ArrivalProcess, IntArray, LengthDistribution, RequestTable

FloatArray = npt.NDArray[np.floating[Any]]

#: candidates that thinning draws at a time
_CHUNK = 4096


def draw_table(
    num_requests: int,
    arrivals: ArrivalProcess,
    input_tokens: LengthDistribution,
    output_tokens: LengthDistribution,
    seed: np.random.SeedSequence,
) -> RequestTable:
    """`num_requests` requests; arrivals, inputs and outputs are drawn independently of one another from `seed`.

    The same seed gives the same inputs under every arrival process and output distribution, and vice versa.
    """
    if num_requests < 1:
        raise ValueError(f"num_requests is {num_requests}: give at least 1")
    rngs = [
        np.random.default_rng(np.random.SeedSequence(seed.entropy, spawn_key=(*seed.spawn_key, purpose)))
        for purpose in range(3)
    ]
    return RequestTable(
        arrival_ns=arrivals.arrival_ns(num_requests, rngs[0]),
        input_tokens=input_tokens.sample(num_requests, rngs[1]),
        output_tokens=output_tokens.sample(num_requests, rngs[2]),
        concurrency=getattr(arrivals, "concurrency", None),
    )


@register("arrivals", "poisson")
@dataclass(frozen=True, slots=True)
class Poisson:
    """Independent exponential gaps: many users who don't know of one another."""

    rate_per_s: float

    def __post_init__(self) -> None:
        _require_positive("rate_per_s", self.rate_per_s)

    def arrival_ns(self, num_requests: int, rng: np.random.Generator) -> IntArray:
        """Arrival times, int64[num_requests] in ns; the first gap starts at 0."""
        return _running_sum(rng.exponential(NS_PER_S / self.rate_per_s, num_requests))


@register("arrivals", "gamma")
@dataclass(frozen=True, slots=True)
class Gamma:
    """Independent gamma gaps with a standard deviation of `cv` means: above 1 burstier than Poisson, below steadier."""

    rate_per_s: float
    cv: float = 1.0

    def __post_init__(self) -> None:
        _require_positive("rate_per_s", self.rate_per_s)
        _require_cv(self.cv, "`constant`")

    def arrival_ns(self, num_requests: int, rng: np.random.Generator) -> IntArray:
        """Arrival times, int64[num_requests] in ns; the first gap starts at 0."""
        shape = self.cv**-2
        return _running_sum(rng.gamma(shape, NS_PER_S / (self.rate_per_s * shape), num_requests))


@register("arrivals", "constant")
@dataclass(frozen=True, slots=True)
class Constant:
    """One request every 1 / `rate_per_s` seconds, the first at 0."""

    rate_per_s: float

    def __post_init__(self) -> None:
        _require_positive("rate_per_s", self.rate_per_s)

    def arrival_ns(self, num_requests: int, rng: np.random.Generator) -> IntArray:
        """Arrival times, int64[num_requests] in ns, each rounded by itself so that errors don't add up."""
        gap = NS_PER_S / self.rate_per_s
        _require_century(num_requests * gap)
        return _whole(np.arange(num_requests) * gap)


@register("arrivals", "all_at_once")
@dataclass(frozen=True, slots=True)
class AllAtOnce:
    """Every request arrives at 0: an offline batch."""

    def arrival_ns(self, num_requests: int, rng: np.random.Generator) -> IntArray:
        """Zeros, int64[num_requests]."""
        return np.zeros(num_requests, dtype=np.int64)


@register("arrivals", "bursty")
@dataclass(frozen=True, slots=True)
class Bursty:
    """A Poisson process whose rate swells once a period: rate x [1 + (f - 1) max(0, sin(2 pi t / period))^w].

    `rate_per_s` is the rate between bursts, f = `burst_factor` the peak in units of it, w = `sharpness` narrows the
    peak. Drawn by thinning (Lewis and Shedler, 1979).
    """

    rate_per_s: float
    burst_factor: float = 4.0
    period_s: float = 60.0
    sharpness: float = 1.0

    def __post_init__(self) -> None:
        for name in ("rate_per_s", "period_s", "sharpness"):
            _require_positive(name, getattr(self, name))
        if not 1 <= self.burst_factor <= 1000:
            raise ValueError(f"burst_factor is {self.burst_factor}: give the peak rate over rate_per_s, 1 to 1000")

    @property
    def mean_rate_per_s(self) -> float:
        """The rate over whole periods; the mean of max(0, sin)^w is Gamma((w+1)/2) / (2 sqrt(pi) Gamma(w/2+1))."""
        w = self.sharpness
        swell = math.exp(math.lgamma((w + 1) / 2) - math.lgamma(w / 2 + 1)) / (2 * math.sqrt(math.pi))
        return self.rate_per_s * (1 + (self.burst_factor - 1) * swell)

    def arrival_ns(self, num_requests: int, rng: np.random.Generator) -> IntArray:
        """Arrival times, int64[num_requests] in ns; time 0 is the start of a period."""
        peak_gap_ns = NS_PER_S / (self.rate_per_s * self.burst_factor)
        kept: list[IntArray] = []
        missing, start_ns = num_requests, 0
        while missing > 0:
            times = _running_sum(rng.exponential(peak_gap_ns, _CHUNK), start_ns)
            accepted = times[rng.random(_CHUNK) * self.burst_factor < self._swell(times)][:missing]
            kept.append(accepted)
            missing, start_ns = missing - len(accepted), int(times[-1])
        return np.concatenate(kept)

    def _swell(self, times_ns: IntArray) -> FloatArray:
        sine: FloatArray = np.sin(times_ns * (2 * math.pi / (self.period_s * NS_PER_S)))
        swell: FloatArray = np.maximum(sine, 0) ** self.sharpness
        return 1 + (self.burst_factor - 1) * swell


@register("arrivals", "staged")
@dataclass(frozen=True, slots=True)
class Staged:
    """One rate after another, as load generators ramp: `stages` are [requests per s, seconds]; the last one goes on.

    `process` within a stage: `poisson`, or `constant` for equal gaps.
    """

    stages: Sequence[tuple[float, float]]
    process: Literal["poisson", "constant"] = "poisson"

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("stages is empty: give [requests per s, seconds] for each, such as [[8, 600], [20, 600]]")
        for rate, seconds in self.stages:
            _require_positive("a rate of stages", rate)
            _require_positive("a duration of stages", seconds)

    @property
    def mean_rate_per_s(self) -> float:
        """The rate over all stages, each once."""
        return sum(rate * s for rate, s in self.stages) / sum(s for _, s in self.stages)

    def arrival_ns(self, num_requests: int, rng: np.random.Generator) -> IntArray:
        """Arrival times, int64[num_requests] in ns: unit gaps, stretched so that each stage has its rate."""
        gaps = rng.exponential(1.0, num_requests) if self.process == "poisson" else np.ones(num_requests)
        if self.process == "constant":
            gaps[:1] = 0.0  # as `constant`: the first one comes at 0
        rates, seconds = (np.array(column, dtype=np.float64) for column in zip(*self.stages, strict=True))
        expected = np.concatenate([[0.0], np.cumsum(rates * seconds)])
        starts = np.concatenate([[0.0], np.cumsum(seconds)])
        counts = np.cumsum(gaps)
        stage = np.minimum(np.searchsorted(expected, counts, side="right") - 1, len(rates) - 1)
        times_s = starts[stage] + (counts - expected[stage]) / rates[stage]
        return _whole(times_s * NS_PER_S)


@register("arrivals", "closed_loop")
@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """`concurrency` requests at all times: the next one starts when one ends.

    Over `ramp_s` the first ones start one by one, evenly spaced, so that they don't run in lockstep.
    """

    concurrency: int
    ramp_s: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.concurrency <= 2**40:
            given = _short(self.concurrency)
            raise ValueError(f"concurrency is {given}: give the requests in the system, at least 1 and at most 2**40")
        if not 0 <= self.ramp_s <= 1e9:
            raise ValueError(f"ramp_s is {self.ramp_s}: give seconds up to 1e9, 0 for all at once")

    def arrival_ns(self, num_requests: int, rng: np.random.Generator) -> IntArray:
        """Starts of the first `concurrency` requests, int64[num_requests] in ns; the last one repeated for the rest."""
        turn = np.minimum(np.arange(num_requests), self.concurrency - 1)
        return np.rint(turn * (self.ramp_s * NS_PER_S / self.concurrency)).astype(np.int64)


@register("lengths", "fixed")
@dataclass(frozen=True, slots=True)
class Fixed:
    """Every request has `tokens` tokens."""

    tokens: int

    def __post_init__(self) -> None:
        _require_tokens("tokens", self.tokens)

    def sample(self, num_requests: int, rng: np.random.Generator) -> IntArray:
        """Token counts, int64[num_requests]."""
        return np.full(num_requests, self.tokens, dtype=np.int64)


@register("lengths", "uniform")
@dataclass(frozen=True, slots=True)
class Uniform:
    """Whole numbers from `low` to `high`, both included, all equally likely."""

    low: int
    high: int

    def __post_init__(self) -> None:
        _require_tokens("low", self.low)
        _require_tokens("high", self.high)
        if self.high < self.low:
            raise ValueError(f"high is {self.high} and low is {self.low}: give a high of at least the low")

    def sample(self, num_requests: int, rng: np.random.Generator) -> IntArray:
        """Token counts, int64[num_requests]."""
        return rng.integers(self.low, self.high, num_requests, dtype=np.int64, endpoint=True)


@register("lengths", "lognormal")
@dataclass(frozen=True, slots=True)
class Lognormal:
    """Lognormal lengths of the given mean and coefficient of variation, rounded, from 1 to `max` (clipped).

    ln X ~ N(ln(mean) - s^2/2, s^2) with s^2 = ln(1 + cv^2); `mean` and `cv` are those before clipping.
    """

    mean: float
    cv: float
    max: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.mean < 2**40:
            raise ValueError(f"mean is {_short(self.mean)}: give a number of tokens above 0 and below 2**40")
        _require_cv(self.cv, "`fixed`")
        if self.max is not None:
            _require_tokens("max", self.max)

    def sample(self, num_requests: int, rng: np.random.Generator) -> IntArray:
        """Token counts, int64[num_requests]."""
        variance = math.log1p(self.cv**2)
        drawn = rng.lognormal(math.log(self.mean) - variance / 2, math.sqrt(variance), num_requests)
        return _whole(np.clip(drawn, 1, self.max or 2**40))


@register("lengths", "quantiles")
@dataclass(frozen=True, slots=True)
class Quantiles:
    """An empirical distribution as (p, tokens) points, linear between them; drawn through its inverse.

    p rises from 0 to 1, tokens never fall: the first point is the minimum, the last the maximum.
    """

    points: Sequence[tuple[float, float]]

    def __post_init__(self) -> None:
        if len(self.points) < 2 or any(len(point) != 2 for point in self.points):
            raise ValueError(f"points are {str(self.points)[:60]}: give at least two pairs (p, tokens)")
        table = np.asarray(self.points, dtype=np.float64)
        if table[0, 0] != 0 or table[-1, 0] != 1 or not np.all(np.diff(table[:, 0]) > 0):
            raise ValueError("the p of points must rise from 0 to 1: sort them, and name each p once")
        if not (np.all(np.diff(table[:, 1]) >= 0) and table[0, 1] >= 0 and table[-1, 1] < 2**40):
            raise ValueError("the tokens of points must be >= 0, below 2**40 and never fall as p rises: sort them")

    def sample(self, num_requests: int, rng: np.random.Generator) -> IntArray:
        """Token counts >= 1, int64[num_requests]."""
        p, tokens = np.asarray(self.points, dtype=np.float64).T
        return np.maximum(_whole(np.interp(rng.random(num_requests), p, tokens)), 1)


def _running_sum(gaps_ns: FloatArray, start_ns: int = 0) -> IntArray:
    """Times after each gap, summed in integers so that no error grows with time."""
    _require_century(start_ns + float(gaps_ns.sum()))
    return start_ns + np.cumsum(_whole(gaps_ns))


def _whole(values: FloatArray) -> IntArray:
    return np.rint(values).astype(np.int64)


def _require_century(last_ns: float) -> None:
    if not last_ns < 2**62:
        raise ValueError("the last request would arrive in more than a century: raise rate_per_s")


def _require_positive(name: str, value: float) -> None:
    if not 1e-300 <= value <= 1e18:
        raise ValueError(f"{name} is {_short(value)}: give a number above 0 and at most 1e18")


def _require_cv(value: float, constant: str) -> None:
    """Within bounds whose squares, and the shapes and scales that follow from them, are finite."""
    if not 1e-6 <= value <= 1e9:
        raise ValueError(f"cv is {_short(value)}: give a number above 0, from 1e-6 to 1e9 ({constant} has a cv of 0)")


def _require_tokens(name: str, value: int) -> None:
    if not 1 <= value < 2**40:
        raise ValueError(f"{name} is {_short(value)}: give a number of tokens, at least 1 and below 2**40")


def _short(value: float) -> str:
    """A number as a message shows it: whole numbers may have thousands of digits."""
    return f"{value}" if isinstance(value, float) or abs(value) < 10**40 else f"a number of {value.bit_length()} bits"
