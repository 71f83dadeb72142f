"""Queueing theory as an oracle: with degenerate step times the client is a textbook queue, and agrees with the book.

Tolerance: the confidence interval at alpha = 1e-4 by batch means; seeds are fixed. Where steps are not infinitely
short, the effect is in the formula.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import comb, exp, factorial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kit import LinearSteps, Run, play, sampled, table
from mist.batching.chunked import Chunked
from mist.pipeline.stages import StageList
from mist.request import Pipeline, Request, Stage
from mist.routing.round_robin import RoundRobin

Floats = npt.NDArray[np.float64]

STEP = 1_000_000  # ns
NUM_BATCHES = 32
T_QUANTILE = 4.461  # Student's t with 31 degrees of freedom at 1 - 1e-4 / 2
UNLIMITED = 1 << 40


def agrees(samples: Any, expected: float, *, at_most: float) -> None:
    """The mean of `samples` is `expected`, within its confidence interval, which is tighter than `at_most` of it."""
    kept = np.asarray(samples, dtype=float)
    kept = kept[len(kept) // (NUM_BATCHES + 1) :]  # the first batch warms up
    means = np.array([batch.mean() for batch in np.array_split(kept, NUM_BATCHES)])
    half_width = T_QUANTILE * means.std(ddof=1) / np.sqrt(NUM_BATCHES)
    assert abs(means.mean() - expected) <= half_width, f"{means.mean():.5g} ± {half_width:.3g}, expected {expected:.5g}"
    assert half_width <= at_most * expected, f"±{half_width:.3g} of {expected:.5g} proves little"


def poisson(rng: np.random.Generator, n: int, mean_gap_ns: float) -> npt.NDArray[np.int64]:
    return np.cumsum(rng.exponential(mean_gap_ns, n)).astype(np.int64)


def one_at_a_time() -> Chunked:
    return Chunked(max_num_batched_tokens=UNLIMITED, max_num_seqs=1)


def sojourn_ns(run: Run) -> Floats:
    """End minus arrival, by arrival."""
    rows = run.records.requests.as_columns()
    return (rows["end_ns"] - rows["arrival_ns"])[np.argsort(rows["request"])].astype(float)


def wait_ns(run: Run, kind: int = 0) -> Floats:
    """Start minus queueing of the tasks of a kind, by request."""
    rows = run.records.tasks.as_columns()
    mine = rows["kind"] == kind
    order = np.argsort(rows["request"][mine])
    return (rows["started_ns"] - rows["queued_ns"])[mine][order].astype(float)


def lindley(arrivals: Any, services: Any) -> npt.NDArray[np.int64]:
    """Waits behind one server, first come first served: W' = max(0, W + S - gap), exact in integers."""
    waits = [0]
    for gap, service in zip(np.diff(arrivals).tolist(), services.tolist(), strict=False):
        waits.append(max(0, waits[-1] + service - gap))
    return np.array(waits)


# --- one server: M/G/1, first come first served ---

PER_TOKEN = LinearSteps(base=0, per_prefill_token=1, per_decode=0, per_context=0, per_prefill=0)
SERVICES: dict[str, Callable[[np.random.Generator, int], Floats]] = {
    "M/D/1": lambda rng, n: np.full(n, 1.0),
    "M/M/1": lambda rng, n: rng.exponential(1.0, n),
    "M/H/1": lambda rng, n: np.where(rng.random(n) < 0.75, 0.5, 2.5),
}
SECOND_MOMENT = {"M/D/1": 1.0, "M/M/1": 2.0, "M/H/1": 0.75 * 0.25 + 0.25 * 6.25}


@pytest.mark.parametrize("queue", sampled(SERVICES, 2))
def test_one_slot_is_pollaczek_khinchine(queue: str) -> None:
    """E[W] = λ E[S²] / 2(1 - ρ): at ρ = 0.8 two services for M/D/1, four for M/M/1."""
    rho, n = 0.8, 40_000
    rng = np.random.default_rng(11)
    prompts = np.maximum(1, STEP * SERVICES[queue](rng, n)).astype(np.int64)
    arrivals = poisson(rng, n, STEP / rho)
    run = play(table(arrivals, prompts, [0] * n), policy=one_at_a_time, perf=PER_TOKEN)
    assert np.array_equal(wait_ns(run), lindley(arrivals, prompts))
    agrees(wait_ns(run) / STEP, rho * SECOND_MOMENT[queue] / (2 * (1 - rho)), at_most=0.25)


# --- several servers, in steps ---


def mean_sojourn(rate: float, end: float, served: Callable[[int], int], length: Callable[[int], float]) -> float:
    """E[T] of a queue in rounds, exactly: with n in the system a round lasts length(n), serves served(n) of them (each
    ends with probability `end`, geometric services), and whoever arrives meanwhile joins at its end.

    The chain of n at the starts of rounds, solved by iteration; then Little's law on its time average.
    """
    size = 220
    n = np.arange(1, size)
    moves = np.zeros((size, size))  # n at a round's start -> n at its end
    for i in n:
        arrivals = np.cumprod(np.r_[exp(-rate * length(i)), rate * length(i) / n])
        ends = [comb(served(i), k) * end**k * (1 - end) ** (served(i) - k) for k in range(served(i) + 1)]
        moves[i] = np.convolve(np.r_[np.zeros(i - served(i)), ends[::-1]], arrivals)[:size]
    moves[0, 1] = 1.0  # an idle server starts a round with the next arrival
    kept = moves / moves.sum(axis=1, keepdims=True)
    share = np.linalg.lstsq(np.vstack([kept.T - np.eye(size), np.ones(size)]), np.r_[np.zeros(size), 1.0], rcond=None)[
        0
    ]
    lasts = np.r_[1 / rate, [length(i) for i in n]]
    area = share[1:] @ (n * lasts[1:] + rate * lasts[1:] ** 2 / 2)
    return float(area / (share @ lasts) / rate)


def erlang_c_wait(servers: int, rho: float) -> float:
    """E[W] of M/M/c in services (Erlang C)."""
    a = servers * rho
    queue = a**servers / factorial(servers) / (1 - rho)
    waits = queue / (sum(a**k / factorial(k) for k in range(servers)) + queue)
    return waits / (servers * (1 - rho))


@pytest.mark.parametrize("servers", sampled([4, 1], 1))
def test_slots_of_constant_steps_are_m_m_c(servers: int) -> None:
    """Decode steps of constant duration, geometric outputs: `max_num_seqs` servers that start on step boundaries."""
    rho, mean_steps, n = 0.8, 4, 15_000 * servers

    def exact(steps: int) -> float:
        return mean_sojourn(rho * servers / steps, 1 / steps, lambda i: min(i, servers), lambda i: 1.0) - steps

    assert exact(1000) / 1000 == pytest.approx(erlang_c_wait(servers, rho), rel=0.005)
    rng = np.random.default_rng(12)
    outputs = rng.geometric(1 / mean_steps, n)
    arrivals = poisson(rng, n, STEP * mean_steps / (rho * servers))
    run = play(
        table(arrivals, [1] * n, outputs),
        policy=lambda: Chunked(max_num_batched_tokens=UNLIMITED, max_num_seqs=servers),
        perf=LinearSteps(base=STEP, per_prefill_token=0, per_decode=0, per_context=0, per_prefill=0),
    )
    agrees(sojourn_ns(run) / STEP - outputs, exact(mean_steps), at_most=0.35)


LENGTHS: dict[str, Callable[[np.random.Generator, int], npt.NDArray[np.int64]]] = {
    "deterministic": lambda rng, n: np.full(n, 10),
    "geometric": lambda rng, n: rng.geometric(1 / 10, n),
    "bimodal": lambda rng, n: np.where(rng.random(n) < 0.8, 5, 30),
}


@pytest.mark.parametrize("lengths", sampled(LENGTHS, 2))
def test_compute_bound_steps_are_processor_sharing(lengths: str) -> None:
    """A step takes time in proportion to its tokens: E[T] = E[S] / (1 - ρ), whatever the lengths.

    In rounds of one token each, an arrival first waits for the round to end, ρt / 2(1 - ρ); the mean work in the
    system being that of any M/G/1, everybody's rounds shorten so much that
    E[T] = (E[S] + ρt (1/2 - E[k]² / E[k²])) / (1 - ρ) for k tokens of t each.
    """
    rho, n = 0.6, 20_000
    rng = np.random.default_rng(13)
    outputs = LENGTHS[lengths](rng, n)
    run = play(
        table(poisson(rng, n, STEP * 10 / rho), [1] * n, outputs),
        policy=lambda: Chunked(max_num_batched_tokens=UNLIMITED, max_num_seqs=UNLIMITED // 2),
        perf=LinearSteps(base=0, per_prefill_token=STEP, per_decode=STEP, per_context=0, per_prefill=0),
    )
    moments = {"deterministic": 100.0, "geometric": 190.0, "bimodal": 0.8 * 25 + 0.2 * 900}
    expected = (10 + rho * (0.5 - 100 / moments[lengths])) / (1 - rho)
    agrees(sojourn_ns(run) / STEP, expected, at_most=0.15)
    if lengths == "geometric":
        exact = mean_sojourn(rho / 10, 1 / 10, lambda i: i, float)
        assert expected == pytest.approx(exact, rel=0.005)
        agrees(sojourn_ns(run) / STEP, exact, at_most=0.15)


@pytest.mark.parametrize("lengths", sampled(LENGTHS, 2))
def test_memory_bound_steps_are_an_infinite_server(lengths: str) -> None:
    """Constant steps, no limits: nobody waits but for the step in flight; the number in the system is Poisson."""
    load, n = 12.0, 20_000
    rng = np.random.default_rng(14)
    outputs = LENGTHS[lengths](rng, n)
    run = play(
        table(poisson(rng, n, STEP * 10 / load), [1] * n, outputs),
        policy=lambda: Chunked(max_num_batched_tokens=UNLIMITED, max_num_seqs=UNLIMITED // 2),
        perf=LinearSteps(base=STEP, per_prefill_token=0, per_decode=0, per_context=0, per_prefill=0),
    )
    residual = sojourn_ns(run) / STEP - outputs
    assert residual.min() >= 0
    assert residual.max() < 1
    agrees(residual, 0.5, at_most=0.05)
    steps = run.records.steps.as_columns()
    number = (steps["num_decodes"] + steps["num_prefills"]).astype(float)
    agrees(number, load, at_most=0.06)
    agrees((number - load) ** 2, load, at_most=0.25)
    at_most_ten = sum(load**k / factorial(k) for k in range(11)) * exp(-load)
    agrees(number <= 10, at_most_ten, at_most=0.25)


# --- several stations ---


@dataclass
class TwoStations(StageList):
    """Two stages whose lengths are drawn independently, exponential with these means in tokens."""

    kinds: tuple[str, ...] = ("first", "second")
    means: Sequence[float] = (1.0, 1.0)
    is_fixed: bool = field(default=True, init=False)

    def __call__(self, request: Request, rng: Any) -> Pipeline:
        draws = rng()
        for kind, mean in zip(self.kinds, self.means, strict=True):
            yield Stage(kind, input_tokens=max(1, round(draws.exponential(mean))))


@pytest.mark.long
def test_stations_in_series_are_a_jackson_network() -> None:
    """Each station is an M/M/1 of its own, and the numbers at both are independent (product form)."""
    rhos, n = (0.6, 0.7), 30_000
    rng = np.random.default_rng(15)
    run = play(
        table(poisson(rng, n, STEP), [1] * n, [0] * n),
        pipeline=TwoStations(means=[rho * STEP for rho in rhos]),
        num_clients=2,
        serves=[("first",), ("second",)],
        policy=one_at_a_time,
        perf=PER_TOKEN,
    )
    tasks = run.records.tasks.as_columns()
    for kind, rho in enumerate(rhos):
        rows = np.flatnonzero(tasks["kind"] == kind)
        rows = rows[np.argsort(tasks["request"][rows])]
        assert np.array_equal(wait_ns(run, kind), lindley(tasks["queued_ns"][rows], tasks["computed_tokens"][rows]))
        agrees(wait_ns(run, kind) / STEP, rho * rho / (1 - rho), at_most=0.2)
    empty = [idle_at(run, client, poisson(rng, n, STEP)) for client in (0, 1)]
    agrees(empty[0] & empty[1], (1 - rhos[0]) * (1 - rhos[1]), at_most=0.2)


def idle_at(run: Run, client: int, instants: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Whether `client` has no step in flight at each of `instants`."""
    steps = run.records.steps.as_columns()
    mine = steps["client"] == client
    at = np.searchsorted(steps["start_ns"][mine], instants, side="right") - 1
    return (at < 0) | (steps["end_ns"][mine][at] <= instants)


def test_behind_a_constant_station_an_equal_one_never_waits() -> None:
    n = 2_000
    rng = np.random.default_rng(16)
    run = play(
        table(poisson(rng, n, STEP / 0.9), [STEP] * n, [0] * n),
        pipeline=StageList(("first", "second")),
        num_clients=2,
        serves=[("first",), ("second",)],
        policy=one_at_a_time,
        perf=PER_TOKEN,
    )
    assert wait_ns(run, 0).max() > 0
    assert wait_ns(run, 1).max() == 0


@dataclass
class RandomRouter:
    """Tosses a fair coin."""

    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(17))

    def choose(self, task: Any, views: Any, now: int) -> Any:
        return views[int(self.rng.integers(len(views)))]


def erlang_2_wait(rho: float) -> float:
    """E[W] of E2/M/1 in services: σ / (1 - σ) with σ = (2ρ / (2ρ + 1 - σ))², the root below one."""
    sigma = 0.5
    for _ in range(500):
        sigma = (2 * rho / (2 * rho + 1 - sigma)) ** 2
    return sigma / (1 - sigma)


@pytest.mark.parametrize("router", sampled([RoundRobin, RandomRouter], 1))
def test_two_replicas_are_two_stations(router: Any) -> None:
    """Round robin leaves each an E2/M/1 (every other arrival), a coin an M/M/1 (split Poisson)."""
    rho, n = 0.6, 40_000
    rng = np.random.default_rng(18)
    prompts = np.maximum(1, rng.exponential(STEP, n)).astype(np.int64)
    arrivals = poisson(rng, n, STEP / (2 * rho))
    run = play(
        table(arrivals, prompts, [0] * n),
        num_clients=2,
        router=router(),
        policy=one_at_a_time,
        perf=PER_TOKEN,
    )
    tasks = run.records.tasks.as_columns()
    expected = erlang_2_wait(rho) if router is RoundRobin else rho / (1 - rho)
    for client in (0, 1):
        here = np.sort(tasks["request"][tasks["client"] == client])
        assert np.array_equal(wait_ns(run)[here], lindley(arrivals[here], prompts[here]))
    agrees(wait_ns(run) / STEP, expected, at_most=0.25)


# --- Little ---


def test_littles_identity_between_the_tables() -> None:
    """Σ over steps of number running x duration = Σ over segments of end - start, to the nanosecond."""
    n = 3_000
    rng = np.random.default_rng(19)
    run = play(
        table(poisson(rng, n, 4000), rng.integers(1, 50, n), rng.integers(0, 50, n)),
        policy=lambda: Chunked(max_num_batched_tokens=UNLIMITED, max_num_seqs=20),
    )
    steps, tasks = run.records.steps.as_columns(), run.records.tasks.as_columns()
    running = (steps["num_prefills"] + steps["num_decodes"]) * (steps["end_ns"] - steps["start_ns"])
    assert int(running.sum()) == int((tasks["end_ns"] - tasks["started_ns"]).sum())
    requests = run.records.requests.as_columns()
    waiting = int((tasks["started_ns"] - tasks["queued_ns"])[tasks["kind"] == 0].sum())
    assert int(running.sum()) + waiting == int((requests["end_ns"] - requests["arrival_ns"]).sum())
