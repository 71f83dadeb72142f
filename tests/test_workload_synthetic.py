"""Arrival processes and length distributions: their moments, their seeds, and what they refuse.

Tolerances are four to five standard errors at a fixed seed. Never looks at a simulation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mist import registry
from mist.workload import ArrivalProcess, LengthDistribution
from mist.workload.synthetic import (
    AllAtOnce,
    Bursty,
    ClosedLoop,
    Constant,
    Fixed,
    Gamma,
    Lognormal,
    Poisson,
    Quantiles,
    Uniform,
    draw_table,
)

N = 100_000
ARRIVALS: list[ArrivalProcess] = [
    Poisson(7.0),
    Gamma(7.0, 2.5),
    Gamma(7.0, 0.3),
    Constant(7.0),
    AllAtOnce(),
    Bursty(7.0, 6.0, 30.0, 3.0),
    ClosedLoop(5, 2.0),
]
LENGTHS: list[LengthDistribution] = [
    Fixed(256),
    Uniform(3, 9),
    Lognormal(1155, 0.9),
    Lognormal(1155, 0.9, 2048),
    Quantiles([(0, 1), (0.5, 100), (1, 2000)]),
]


def rng(seed: int = 1) -> np.random.Generator:
    return np.random.default_rng(seed)


def gaps_s(process: ArrivalProcess, n: int = N) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.diff(process.arrival_ns(n, rng()), prepend=0) / 1e9


@pytest.mark.parametrize(("process", "cv"), [(Poisson(7.0), 1.0), (Gamma(7.0, 2.5), 2.5), (Gamma(7.0, 0.3), 0.3)])
def test_gaps_have_the_mean_and_cv_asked_for(process: ArrivalProcess, cv: float) -> None:
    gaps = gaps_s(process)
    assert gaps.mean() == pytest.approx(1 / 7, rel=5 * cv / math.sqrt(N))
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.03)
    assert np.corrcoef(gaps[:-1], gaps[1:])[0, 1] == pytest.approx(0, abs=5 / math.sqrt(N))


def test_poisson_gaps_are_exponential() -> None:
    gaps = np.sort(gaps_s(Poisson(7.0)))
    distance = np.abs(1 - np.exp(-7 * gaps) - (np.arange(N) + 0.5) / N).max()
    assert distance < 1.95 / math.sqrt(N)  # Kolmogorov-Smirnov, alpha = 1e-3


def test_gamma_of_cv_1_is_poisson_in_distribution() -> None:
    deciles = np.arange(0.1, 1, 0.1)
    quantiles = np.quantile(gaps_s(Gamma(7.0, 1.0)), deciles)
    assert quantiles == pytest.approx(-np.log1p(-deciles) / 7, rel=0.03)


def test_constant_arrivals_do_not_drift() -> None:
    arrivals = Constant(3.0).arrival_ns(3_000_001, rng())
    assert arrivals[[0, 1, 3, 3_000_000]].tolist() == [0, 333_333_333, 10**9, 10**15]


def test_bursty_has_its_mean_rate_and_its_shape() -> None:
    process = Bursty(rate_per_s=20.0, burst_factor=6.0, period_s=30.0, sharpness=3.0)
    times = process.arrival_ns(200_000, rng()) / 1e9
    whole = times < math.floor(times[-1] / 30) * 30
    assert whole.sum() / (math.floor(times[-1] / 30) * 30) == pytest.approx(process.mean_rate_per_s, rel=0.012)
    phase = times[whole] % 30
    num_periods = math.floor(times[-1] / 30)
    quiet = np.count_nonzero(phase >= 15) / (15 * num_periods)
    peak = np.count_nonzero(np.abs(phase - 7.5) < 0.25) / (0.5 * num_periods)
    assert quiet == pytest.approx(20, rel=0.02)
    assert peak == pytest.approx(120, rel=0.03)


def test_bursty_without_a_burst_is_poisson() -> None:
    process = Bursty(7.0, burst_factor=1.0)
    gaps = gaps_s(process)
    assert process.mean_rate_per_s == 7.0
    assert gaps.std() / gaps.mean() == pytest.approx(1, rel=0.03)


@pytest.mark.parametrize(("sharpness", "mean"), [(1.0, 1 / math.pi), (2.0, 0.25)])
def test_mean_of_the_swell_against_known_integrals(sharpness: float, mean: float) -> None:
    assert Bursty(1.0, 2.0, 60.0, sharpness).mean_rate_per_s == pytest.approx(1 + mean)


def test_closed_loop_ramps_up_and_says_its_concurrency() -> None:
    table = draw_table(6, ClosedLoop(4, ramp_s=2.0), Fixed(1), Fixed(1), np.random.SeedSequence(1))
    assert table.concurrency == 4
    assert table.arrival_ns.tolist() == [0, 500_000_000, 1_000_000_000, 1_500_000_000, 1_500_000_000, 1_500_000_000]


def test_all_at_once_and_fixed() -> None:
    assert not AllAtOnce().arrival_ns(5, rng()).any()
    assert Fixed(256).sample(3, rng()).tolist() == [256] * 3


def test_uniform_takes_every_value_equally_often() -> None:
    values, counts = np.unique(Uniform(3, 9).sample(N, rng()), return_counts=True)
    assert values.tolist() == list(range(3, 10))
    assert counts / N == pytest.approx(np.full(7, 1 / 7), rel=0.04)


def test_lognormal_has_the_mean_and_cv_asked_for() -> None:
    drawn = Lognormal(1155, 0.9).sample(4 * N, rng())
    assert drawn.mean() == pytest.approx(1155, rel=0.007)
    assert drawn.std() / drawn.mean() == pytest.approx(0.9, rel=0.03)
    clipped = Lognormal(1155, 0.9, 2048).sample(4 * N, rng())
    assert clipped.max() == 2048
    assert np.array_equal(clipped, np.minimum(drawn, 2048))


def test_quantiles_come_back() -> None:
    points = [(0, 1), (0.5, 100), (0.9, 400), (1, 2000)]
    drawn = Quantiles(points).sample(4 * N, rng())
    assert np.quantile(drawn, [0.25, 0.5, 0.9, 0.95]) == pytest.approx([50.5, 100, 400, 1200], rel=0.02)
    assert drawn.mean() == pytest.approx(0.5 * 50.5 + 0.4 * 250 + 0.1 * 1200, rel=0.01)
    assert drawn.min() == 1
    assert drawn.max() <= 2000


@pytest.mark.parametrize("process", ARRIVALS, ids=repr)
def test_arrivals_are_ordered_and_their_start_does_not_depend_on_their_number(process: ArrivalProcess) -> None:
    long = process.arrival_ns(10_000, rng(3))
    assert long.dtype == np.int64
    assert long[0] >= 0
    assert np.all(np.diff(long) >= 0)
    assert np.array_equal(long[:1_000], process.arrival_ns(1_000, rng(3)))


@pytest.mark.parametrize("lengths", LENGTHS, ids=repr)
def test_lengths_are_positive_and_their_start_does_not_depend_on_their_number(lengths: LengthDistribution) -> None:
    long = lengths.sample(10_000, rng(3))
    assert long.dtype == np.int64
    assert long.min() >= 1
    assert np.array_equal(long[:1_000], lengths.sample(1_000, rng(3)))


def test_draws_are_independent_of_what_else_is_drawn() -> None:
    seed = np.random.SeedSequence(7)
    pairs: list[tuple[ArrivalProcess, LengthDistribution]] = [
        (Poisson(1.0), Fixed(1)),
        (Bursty(9.0), Uniform(1, 90)),
        (AllAtOnce(), Uniform(1, 90)),
    ]
    tables = [draw_table(500, arrivals, Lognormal(900, 1.2), outputs, seed) for arrivals, outputs in pairs]
    assert all(np.array_equal(t.input_tokens, tables[0].input_tokens) for t in tables)
    assert np.array_equal(tables[1].output_tokens, tables[2].output_tokens)
    same_law = draw_table(N, AllAtOnce(), Uniform(1, 10**6), Uniform(1, 10**6), seed)
    assert np.corrcoef(same_law.input_tokens, same_law.output_tokens)[0, 1] == pytest.approx(0, abs=5 / math.sqrt(N))
    other = draw_table(500, AllAtOnce(), Lognormal(900, 1.2), Fixed(1), np.random.SeedSequence(8))
    assert not np.array_equal(other.input_tokens, tables[0].input_tokens)


@pytest.mark.parametrize(
    ("kind", "name", "parameters"),
    [
        ("arrivals", "poisson", {"rate_per_s": 0}),
        ("arrivals", "poisson", {"rate_per_s": math.nan}),
        ("arrivals", "poisson", {"rate_per_s": math.inf}),
        ("arrivals", "gamma", {"rate_per_s": 1, "cv": 0}),
        ("arrivals", "gamma", {"rate_per_s": -1}),
        ("arrivals", "constant", {"rate_per_s": -1}),
        ("arrivals", "bursty", {"rate_per_s": 1, "burst_factor": 0.5}),
        ("arrivals", "bursty", {"rate_per_s": 1, "burst_factor": 1e9}),
        ("arrivals", "bursty", {"rate_per_s": 1, "period_s": 0}),
        ("arrivals", "bursty", {"rate_per_s": 1, "sharpness": math.nan}),
        ("arrivals", "closed_loop", {"concurrency": 0}),
        ("arrivals", "closed_loop", {"concurrency": 1, "ramp_s": -1}),
        ("lengths", "fixed", {"tokens": 0}),
        ("lengths", "fixed", {"tokens": 2**40}),
        ("lengths", "uniform", {"low": 0, "high": 3}),
        ("lengths", "uniform", {"low": 4, "high": 3}),
        ("lengths", "lognormal", {"mean": 0, "cv": 1}),
        ("lengths", "lognormal", {"mean": 10, "cv": 0}),
        ("lengths", "lognormal", {"mean": 10, "cv": 1, "max": 0}),
        ("lengths", "quantiles", {"points": [(0, 1)]}),
        ("lengths", "quantiles", {"points": [(0, 1, 2), (1, 2, 3)]}),
        ("lengths", "quantiles", {"points": [(0.1, 1), (1, 2)]}),
        ("lengths", "quantiles", {"points": [(0, 1), (0.5, 2), (0.5, 3), (1, 4)]}),
        ("lengths", "quantiles", {"points": [(0, 5), (1, 4)]}),
        ("lengths", "quantiles", {"points": [(0, -5), (1, 4)]}),
        ("lengths", "quantiles", {"points": [(0, 1), (1, math.nan)]}),
    ],
)
def test_bad_parameters_are_refused_with_what_would_do(kind: str, name: str, parameters: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"give|must"):
        registry.lookup(kind, name)(**parameters)


def test_rates_so_low_that_time_would_overflow_are_refused() -> None:
    for process in (Poisson(1e-9), Gamma(1e-9), Constant(1e-9), Bursty(1e-12)):
        with pytest.raises(ValueError, match="raise rate_per_s"):
            process.arrival_ns(1000, rng())
    with pytest.raises(ValueError, match="at least 1"):
        draw_table(0, Poisson(1.0), Fixed(1), Fixed(1), np.random.SeedSequence(1))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Gamma(6, cv=1e-300),
        lambda: Gamma(6, cv=1e300),
        lambda: Lognormal(5, cv=1e300),
        lambda: Lognormal(1e308, cv=1e308),
        lambda: Lognormal(1e308, cv=1),
        lambda: Uniform(1, 2**63),
        lambda: ClosedLoop(99999999999999999999),
        lambda: Poisson(5e-324),
        lambda: Fixed(10**5000),
    ],
)
def test_figures_beyond_arithmetic_are_refused_by_name(make: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"^(cv|mean|high|concurrency|rate_per_s|tokens) is .{1,40}: give"):
        make()


@pytest.mark.parametrize("cv", [1e-6, 1e9])
def test_the_widest_variations_can_be_drawn(cv: float) -> None:
    rng = np.random.default_rng(0)
    assert Lognormal(5, cv).sample(1000, rng).min() >= 1
    assert np.all(np.diff(Gamma(1e9, cv).arrival_ns(1000, rng)) >= 0)
