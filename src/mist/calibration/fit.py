"""The fit of step times: bounded least squares per regime, and its error on operating points that it hadn't seen.

Between a table of profiled steps and a step profile. It never drops a step, and never judges itself by steps that it
was fitted to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mist.calibration.step_table import FloatArray, IntArray, StepTable
from mist.perf.step_profile import FEATURES, REGIMES, Regime

#: Distinct numbers of new tokens up to which each is a knot; of more the knots are quantiles.
MAX_KNOTS = 16
NUM_QUANTILE_KNOTS = 8
#: Operating points are held out one by one up to this number, else in as many folds.
MAX_FOLDS = 40
#: A regime with fewer operating points is left out.
MIN_GROUPS = 3
#: Features that correlate more than this can't be told apart.
MAX_CORRELATION = 0.99
MAX_CONDITION = 100.0
#: Share of a column that the columns before it must leave unexplained.
_INDEPENDENT = 1e-6


@dataclass(frozen=True, slots=True)
class RegimeFit:
    """A fitted regime and how it fares, in percent.

    `mean_pct`, `median_pct`, `p90_pct`: absolute errors of held-out groups, each the mean over its distinct steps, of
    whose repeats the median counts. `step_*`: of the single held-out steps. `noise_*`: how far repeats of the same step
    lie from their median, corrected for their number (None without repeats): `num_repeats` times of `num_repeated`
    distinct steps, which have the held-out error `repeated_mean_pct`.
    """

    name: str
    regime: Regime
    num_steps: int
    num_groups: int
    mean_pct: float
    median_pct: float
    p90_pct: float
    step_mean_pct: float
    step_median_pct: float
    noise_mean_pct: float | None
    noise_median_pct: float | None
    num_repeats: int
    num_repeated: int
    repeated_mean_pct: float | None
    held_out: tuple[HeldOut, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class HeldOut:
    """One held-out group: means of its sequences, new tokens and context, of measured and predicted time, its error."""

    sequences: float
    new_tokens: float
    context: float
    measured_ns: float
    predicted_ns: float
    error_pct: float


def fit_regimes(table: StepTable) -> tuple[list[RegimeFit], list[str]]:
    """Each regime with enough operating points, and remarks on those without."""
    fits, remarks = [], []
    features, groups, repeats = table.features(), table.groups(), table.repeats()
    for name in REGIMES:
        mine = table.regime(name)
        num_groups = len(np.unique(groups[mine]))
        if num_groups < MIN_GROUPS:
            if num_groups:
                remarks.append(
                    f"{name}: only {num_groups} operating points, at least {MIN_GROUPS} are needed: left out"
                )
            continue
        fits.append(_fit_regime(name, features[mine], table.time_ns[mine], groups[mine], repeats[mine]))
    return fits, remarks


def _fit_regime(name: str, features: FloatArray, ns: FloatArray, groups: IntArray, repeats: IntArray) -> RegimeFit:
    regime, warnings = fit(name, features, ns)
    predicted = held_out(features, ns, groups, lambda x, y: fit(name, x, y)[0])
    errors = 100 * np.abs(predicted / ns - 1)
    points = [_group_error(ns[groups == g], predicted[groups == g], repeats[groups == g], features[groups == g])
              for g in np.unique(groups)]  # fmt: skip
    by_group = np.array([p.error_pct for p in points])
    noise = repeat_noise(ns, repeats)
    _, which, counts = np.unique(repeats, return_inverse=True, return_counts=True)
    repeated = counts[which.reshape(-1)] > 1
    return RegimeFit(
        name, regime, len(ns), len(points),
        mean_pct=float(by_group.mean()), median_pct=float(np.median(by_group)),
        p90_pct=float(np.percentile(by_group, 90)),
        step_mean_pct=float(errors.mean()), step_median_pct=float(np.median(errors)),
        noise_mean_pct=float(noise.mean()) if len(noise) else None,
        noise_median_pct=float(np.median(noise)) if len(noise) else None,
        num_repeats=len(noise), num_repeated=int((counts > 1).sum()),
        repeated_mean_pct=float(errors[repeated].mean()) if len(noise) else None,
        held_out=tuple(points), warnings=tuple(warnings),
    )  # fmt: skip


def fit(name: str, features: FloatArray, ns: FloatArray) -> tuple[Regime, list[str]]:
    """The regime with the least squares of relative errors and no negative rate, and what the data can't tell apart.

    `features`: [steps, 4]. Columns that those before them explain are left out; in decode steps sequences and attention
    work always are.
    """
    knots = _knots(features[:, 0])
    pieces = _pieces(features[:, 0], knots)
    columns = np.concatenate([np.ones((len(ns), 1)), pieces, features[:, 1:]], axis=1)
    order = [*range(pieces.shape[1] + 1), *(1 + pieces.shape[1] + FEATURES[1:].index(f) for f in _PREFERENCE)]
    kept, implied = _independent(columns, order)
    found = np.zeros(columns.shape[1])
    found[kept] = nnls(columns[:, kept] / ns[:, None], np.ones(len(ns)))
    rates = found[1 + pieces.shape[1] :]
    ranges = {f: (float(features[:, i].min()), float(features[:, i].max())) for i, f in enumerate(FEATURES)}
    base = np.concatenate([[0.0], np.cumsum(found[1 : 1 + pieces.shape[1]] * np.diff(knots))])
    knot_ns = (found[0] + base).tolist()
    sequence_ns, context_ns, attention_ns = rates.tolist()
    regime = Regime(tuple(knots.tolist()), tuple(knot_ns), sequence_ns, context_ns, attention_ns, ranges)
    first = 1 + pieces.shape[1]
    dropped = [FEATURES[1 + i - first] for i in implied if i >= first]
    return regime, _indistinct(name, features, dropped)


#: Which of features that explain each other keeps the time: contexts before the work that follows from them.
_PREFERENCE = ("context", "attention", "sequences")
#: Features that follow from others in every step of a kind.
_BY_DEFINITION = {"decode": {"sequences", "attention"}}


def held_out(
    features: FloatArray, ns: FloatArray, groups: IntArray, learn: Callable[[FloatArray, FloatArray], Regime]
) -> FloatArray:
    """For each step the time by a regime that was learned without its group (or its fold of groups), ns."""
    _, number = np.unique(groups, return_inverse=True)
    fold = number.reshape(-1) % MAX_FOLDS
    predicted = np.zeros(len(ns))
    for k in np.unique(fold):
        out = fold == k
        predicted[out] = learn(features[~out], ns[~out]).time_ns(features[out])
    return predicted


def repeat_noise(ns: FloatArray, repeats: IntArray) -> FloatArray:
    """|time / median - 1| of each step that was measured n > 1 times, in percent, times √(n / (n - 1))."""
    found = []
    for number in np.unique(repeats):
        times = ns[repeats == number]
        if (n := len(times)) > 1:
            found.append(100 * np.abs(times / np.median(times) - 1) * np.sqrt(n / (n - 1)))
    joined: FloatArray = np.concatenate(found) if found else np.zeros(0)
    return joined


def nnls(columns: FloatArray, target: FloatArray) -> FloatArray:
    """x >= 0 with the least |columns·x - target|² (Lawson and Hanson, Solving Least Squares Problems, 1974, ch. 23).

    `columns`: [rows, n]; columns of any magnitude, none of them all 0.
    """
    scale = np.linalg.norm(columns, axis=0)
    a = columns / scale
    x, passive = np.zeros(a.shape[1]), np.zeros(a.shape[1], bool)
    tolerance = 1e-9 * float(np.abs(a.T @ target).max())
    for _ in range(10 * a.shape[1]):
        gradient = np.where(passive, -np.inf, a.T @ (target - a @ x))
        if gradient.max() <= tolerance:
            break
        passive[int(gradient.argmax())] = True
        x = _feasible(a, target, x, passive)
    solution: FloatArray = x / scale
    return solution


def _feasible(a: FloatArray, target: FloatArray, x: FloatArray, passive: np.typing.NDArray[np.bool_]) -> FloatArray:
    """From `x` towards the least squares over the `passive` columns; those that reach 0 on the way leave them."""
    while True:
        best = np.zeros(len(x))
        best[passive] = np.linalg.lstsq(a[:, passive], target, rcond=None)[0]
        negative = passive & (best <= 0)
        if not negative.any():
            return best
        share = float(np.min(x[negative] / (x[negative] - best[negative])))
        x = x + share * (best - x)
        passive &= x > 1e-12
        x[~passive] = 0.0


def _knots(new_tokens: FloatArray) -> FloatArray:
    distinct = np.unique(new_tokens)
    if len(distinct) <= MAX_KNOTS:
        return distinct
    return np.unique(np.quantile(distinct, np.linspace(0, 1, NUM_QUANTILE_KNOTS)).round())


def _pieces(new_tokens: FloatArray, knots: FloatArray) -> FloatArray:
    """[steps, knots - 1]: how many of a step's new tokens lie between two knots."""
    return np.clip(new_tokens[:, None] - knots[None, :-1], 0.0, np.diff(knots)[None, :])


def _independent(columns: FloatArray, order: list[int]) -> tuple[list[int], list[int]]:
    """Columns that those before them in `order` don't explain, and the others that aren't constant."""
    kept: list[int] = []
    implied = []
    for i in order:
        column = columns[:, i]
        basis = columns[:, kept] / np.linalg.norm(columns[:, kept], axis=0)
        rest = column - basis @ np.linalg.lstsq(basis, column, rcond=None)[0] if kept else column
        if np.linalg.norm(rest) > _INDEPENDENT * max(float(np.linalg.norm(column)), 1e-300):
            kept.append(i)
        elif float(np.ptp(column)) > 0:
            implied.append(i)
    return kept, implied


def _indistinct(name: str, features: FloatArray, dropped: list[str]) -> list[str]:
    """Sentences on features that the data can't tell apart."""
    own = _BY_DEFINITION.get(name, set())
    told = [f"{name}: {f} follows from other features in every step: its time is in theirs"
            for f in dropped if f not in own]  # fmt: skip
    varied = [i for i, f in enumerate(FEATURES) if np.ptp(features[:, i]) > 0 and f not in own and f not in dropped]
    if len(varied) < 2:
        return told
    correlation: FloatArray = np.atleast_2d(np.corrcoef(features[:, varied].T))
    for i in range(len(varied)):
        for j in range(i):
            if abs(correlation[i, j]) > MAX_CORRELATION:
                pair = f"{FEATURES[varied[j]]} and {FEATURES[varied[i]]}"
                told.append(f"{name}: {pair} can't be told apart (correlation {correlation[i, j]:.3f})")
    if not told and (condition := float(np.sqrt(np.linalg.cond(correlation)))) > MAX_CONDITION:
        told.append(f"{name}: features can hardly be told apart (condition number {condition:.0f})")
    return told


def _group_error(ns: FloatArray, predicted: FloatArray, repeats: IntArray, features: FloatArray) -> HeldOut:
    medians = [(np.median(ns[repeats == r]), np.mean(predicted[repeats == r])) for r in np.unique(repeats)]
    measured, expected = (np.array(column) for column in zip(*medians, strict=True))
    error = float(np.mean(100 * np.abs(expected / measured - 1)))
    new_tokens, sequences, context = features[:, :3].mean(axis=0).tolist()
    return HeldOut(sequences, new_tokens, context, float(measured.mean()), float(expected.mean()), error)
