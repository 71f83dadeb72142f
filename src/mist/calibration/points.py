"""Fits constants of engine profiles to measured points: bounded least squares on the logarithm of simulated / measured.

Above validation, which runs the points: this changes the constants that they are run with, until the misfit is least.
What comes out is a profile that a user keeps. It never looks at points that it wasn't given, and never fits a device's
data sheet.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from scipy.optimize import least_squares

from mist.calibration import uncertainty
from mist.calibration.uncertainty import FloatArray
from mist.engine import OPERATOR_CLASSES, EngineProfile
from mist.errors import Problem, ScenarioError, nearest
from mist.hardware import GENERIC_EFFICIENCY, Device
from mist.validation.evaluate import Comparison, evaluate
from mist.validation.points import Point
from mist.validation.score import kind_of

#: what can be fitted: (least, most, scale of a change that matters)
BOUNDS: dict[str, tuple[float, float, float]] = {
    "step_overhead_ns": (0.0, 60e6, 0.5e6),
    "token_overhead_ns": (0.0, 1e6, 20e3),
    "prefill_overhead_ns": (0.0, 100e6, 2e6),
    "prefill_layer_overhead_ns": (0.0, 3e6, 100e3),
    "request_overhead_ns": (0.0, 500e6, 5e6),
    "prompt_token_overhead_ns": (0.0, 50e3, 2e3),
    "request_serial_ns": (0.0, 50e6, 1e6),
    "overhead_bytes": (0.0, 16 * 2**30, 2**30),
    **{f"time_factors.{n}": (1.0 if "_compute" in n else 0.3, 10.0, 0.1) for n in OPERATOR_CLASSES},
    **{f"device.efficiency.{name}": (0.02, 1.0, 0.05) for name in GENERIC_EFFICIENCY},
}
#: kinds of metrics that a fit looks at (no tails), and how much: first tokens repeat less well
WEIGHTS = {"ttft": 0.5, "tpot": 1.0, "itl": 1.0, "e2e": 1.0, "makespan": 1.0, "throughput": 1.0}
#: log misfit beyond which a point counts linearly instead of quadratically
_OUTLYING = 0.1
_MAX_ROUNDS = 4
#: weight of the assumption that an engine's kernels are as fast as the known ones, and how far off they may well be
_PRIOR_WEIGHT, _PRIOR_SPREAD = 0.1, 0.3

#: a compared value: its point's place among the points, its row's id and metric, and which of the rows that share both
Key = tuple[int, str, str, int]

#: called with the number of whole evaluations done and the misfit of the last
Progress = Callable[[int, float], None]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Fit:
    """What a fit found: each constant's value and standard error, the misfit before and after, and warnings.

    Errors are median absolute percentage errors over compared values; `left_out_pct` predicts each point from a fit
    without it (PRESS of the linearised model; see `uncertainty.left_out`). None is what the points can't tell.
    """

    profile: str
    values: Mapping[str, float]
    standard_errors: Mapping[str, float | None]
    num_points: int
    num_values: int
    before_pct: float
    after_pct: float
    left_out_pct: float | None
    warnings: tuple[str, ...] = ()
    residuals: tuple[Comparison, ...] = field(default=(), repr=False)


def fit_points(
    points: Sequence[Point],
    folder: Path,
    profile: Mapping[str, Any],
    constants: Sequence[str],
    *,
    device: Mapping[str, Any] | None = None,
    perf: Any = None,
    workers: int = 0,
    saturated: bool = True,
    progress: Progress | None = None,
) -> Fit:
    """The values of `constants` of `profile` (a mapping, as in a catalogue file) that fit `points` best.

    Constants that begin with `device.` are of `device`, a mapping too, which then stands for the points' device.
    `saturated` False leaves out values of saturated runs. ScenarioError for an unknown constant, and where no point
    runs. `workers` as in `evaluate`.
    """
    name = str(profile["name"])
    for constant in constants:
        if constant not in BOUNDS:
            raise ScenarioError(Problem(f"{constant!r} can't be fitted", hint=nearest(constant, BOUNDS)))
    parts = {_PROFILE: dict(profile), _DEVICE: dict(device or {})}
    start = np.array([_value(parts, constant) for constant in constants])
    scales = np.array([BOUNDS[c][2] for c in constants])
    lows, highs = (np.array([BOUNDS[c][i] for c in constants]) / scales for i in (0, 1))
    runs = _Runs(points, folder, tuple(constants), parts, perf, workers, saturated, progress)
    first = runs.compared(start)
    if not first:
        raise ScenarioError(Problem("none of the points can be run", hint="`mist validate` says why of each"))
    runs.keep(list(first))
    x0 = np.clip(start / scales, lows, highs)
    found = least_squares(
        lambda x: runs.residuals(x * scales), x0, jac=lambda x: runs.jacobian(x, scales, lows, highs),
        bounds=(lows, highs), loss="soft_l1", f_scale=_OUTLYING, max_nfev=_MAX_ROUNDS, xtol=1e-3, ftol=1e-3,
    )  # fmt: skip
    values = found.x * scales
    last = runs.compared(values)
    # scipy's own Jacobian has the weights of the loss in it, and its residuals have not
    jacobian, residuals = runs.jacobian(found.x, scales, lows, highs), runs.residuals(values)
    weights, data = uncertainty.soft_l1_weights(residuals, _OUTLYING), slice(len(first))
    errors = uncertainty.standard_errors(jacobian[data], residuals[data], weights[data])
    left_out = uncertainty.left_out(jacobian, residuals, weights, [place for place, *_ in first])
    return Fit(
        profile=name,
        values=dict(zip(constants, values.tolist(), strict=True)),
        standard_errors={
            constant: float(error) if np.isfinite(error) else None
            for constant, error in zip(constants, errors * scales, strict=True)
        },
        num_points=len({place for place, *_ in last}),
        num_values=len(last),
        before_pct=_median([c.ape for c in first.values()]),
        after_pct=_median([c.ape for c in last.values()]),
        left_out_pct=_median_pct(left_out / runs.weights),
        warnings=tuple(_warnings(constants, jacobian[data], weights[data], found.active_mask)),
        residuals=tuple(last.values()),
    )


def of_device(values: Mapping[str, T]) -> dict[str, T]:
    """Of fitted constants those of the device, by their names there."""
    return {_split(name)[1]: value for name, value in values.items() if _split(name)[0] == _DEVICE}


def of_profile(values: Mapping[str, T]) -> dict[str, T]:
    """Of fitted constants those of the engine profile."""
    return {name: value for name, value in values.items() if _split(name)[0] == _PROFILE}


def changed(mapping: Mapping[str, Any], values: Mapping[str, float]) -> dict[str, Any]:
    """A copy of a profile's or device's mapping with these constants, given by their dotted names."""
    found = {**mapping}
    for name, value in values.items():
        key, _, inner = name.partition(".")
        number: Any = round(value, 4) if inner else round(value)
        found[key] = {**found.get(key, {}), inner: number} if inner else number
    return found


_PROFILE, _DEVICE = "", "device."


def _split(constant: str) -> tuple[str, str]:
    """Whether a constant is the profile's or the device's, and its name there."""
    return (_DEVICE, constant.removeprefix(_DEVICE)) if constant.startswith(_DEVICE) else (_PROFILE, constant)


class _Runs:
    """The points, run with given constants; the comparisons that all runs have in common are what is fitted."""

    def __init__(
        self, points: Sequence[Point], folder: Path, constants: tuple[str, ...], parts: Mapping[str, dict[str, Any]],
        perf: Any, workers: int, saturated: bool, progress: Progress | None,
    ) -> None:  # fmt: skip
        self._points, self._folder, self._parts = points, folder, parts
        self._name = str(parts[_PROFILE]["name"])
        self._constants, self._perf, self._workers = constants, perf, workers
        self._saturated, self._progress = saturated, progress
        self._keys: list[Key] = []
        #: float64[kept], what multiplies each log misfit
        self.weights: FloatArray = np.ones(0)
        self._num_runs = 0
        self._known: dict[bytes, FloatArray] = {}

    def compared(self, values: FloatArray) -> dict[Key, Comparison]:
        """All comparisons that count, with these values of the constants."""
        values_of: dict[str, dict[str, float]] = {_PROFILE: {}, _DEVICE: {}}
        for constant, value in zip(self._constants, values.tolist(), strict=True):
            part, key = _split(constant)
            values_of[part][key] = value
        overrides = {self._name: changed(self._parts[_PROFILE], values_of[_PROFILE])}
        if device := self._parts[_DEVICE]:
            fitted = changed(device, values_of[_DEVICE])
            overrides |= {f"device:{name}": fitted for name in {point["device"] for point in self._points}}
        evaluated = evaluate(self._points, self._folder, overrides=overrides, perf=self._perf, workers=self._workers)
        self._num_runs += 1
        found: dict[Key, Comparison] = {}
        for place, each in enumerate(evaluated):
            seen: Counter[tuple[str, str]] = Counter()
            for c in each.comparisons:
                if kind_of(c.metric) in WEIGHTS and (self._saturated or not c.saturated) and c.profile == self._name:
                    found[place, c.id, c.metric, seen[c.id, c.metric]] = c
                    seen[c.id, c.metric] += 1
        return found

    def keep(self, keys: Sequence[Key]) -> None:
        """Fit these comparisons and no others; each point counts as one, however many values it has."""
        self._keys = list(keys)
        per_point = Counter(place for place, *_ in keys)
        weights = [WEIGHTS[kind_of(metric)] / per_point[place] ** 0.5 for place, _, metric, _ in keys]
        self.weights = np.array(weights)

    def residuals(self, values: FloatArray) -> FloatArray:
        """Weighted log misfits in the order of the kept, then the priors'; what doesn't run misfits by 1, weighted."""
        key = values.tobytes()
        if key not in self._known:
            found = self.compared(values)
            logs = [np.log(c.simulated / c.measured) if (c := found.get(kept)) else 1.0 for kept in self._keys]
            self._known[key] = np.concatenate((self.weights * np.array(logs), self._priors(values)))
            if self._progress is not None:
                self._progress(self._num_runs, float(np.median(np.abs(self._known[key]))))
        return self._known[key]

    def _priors(self, values: FloatArray) -> list[float]:
        """How far the time factors are from 1, so that what the points don't tell stays there."""
        factors = [v for c, v in zip(self._constants, values.tolist(), strict=True) if c.startswith("time_factors")]
        return [_PRIOR_WEIGHT * (value - 1.0) / _PRIOR_SPREAD for value in factors]

    def jacobian(self, x: FloatArray, scales: FloatArray, lows: FloatArray, highs: FloatArray) -> FloatArray:
        """Forward differences of about half a scale; backward where the bound is near."""
        base = self.residuals(x * scales)
        columns = []
        for i in range(len(x)):
            moved = x.copy()
            step = max(0.5, 0.1 * abs(x[i])) if self._constants[i] != "overhead_bytes" else 1.0
            if moved[i] + step > highs[i]:
                step = -step
            moved[i] += step
            columns.append((self.residuals(moved * scales) - base) / step)
        return np.array(columns).T


def _value(parts: Mapping[str, dict[str, Any]], constant: str) -> float:
    part, name = _split(constant)
    key, _, inner = name.partition(".")
    if part == _DEVICE:
        if not parts[_DEVICE]:
            raise ScenarioError(Problem(f"{constant} is of a device, and none is named"))
        return Device.from_mapping(parts[_DEVICE]).efficiency_of(inner, "bf16")
    value = getattr(EngineProfile.from_mapping(parts[_PROFILE]), key)
    return float(value.get(inner, 1.0) if inner else value)


def _warnings(
    constants: Sequence[str], jacobian: FloatArray, weights: FloatArray, at_bound: Iterable[int]
) -> Iterator[str]:
    """What the points don't tell of the constants."""
    changing = uncertainty.changes_something(jacobian)
    for constant, changes, bound in zip(constants, changing, at_bound, strict=True):
        if not changes:
            yield f"{constant} changes nothing at these points: it can't be told from them"
        elif bound:
            yield f"{constant} is at its bound"
    for i, j, correlation in uncertainty.confounded(jacobian, weights):
        yield (
            f"{constants[j]} and {constants[i]} can't be told apart by these points "
            f"(correlation {correlation:+.2f}): fix one of them"
        )


def _median_pct(logs: FloatArray) -> float | None:
    """Median error in percent of values whose log misfits these are; None where none is known."""
    known = logs[np.isfinite(logs)]
    return _median(np.abs(np.expm1(known)) * 100) if len(known) else None


def _median(values: Sequence[float] | FloatArray) -> float:
    return float(np.median(values)) if len(values) else float("nan")
