"""`mist calibrate steps`: from a file of profiled engine steps to a step profile, with its error on held-out steps.

The whole of one calibration: read, fit, judge, and name what was measured by the catalogues' names, so that a scenario
finds the profile to be its deployment's. It prints nothing and writes only what it is told to.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mist.calibration.fit import RegimeFit, fit_regimes
from mist.calibration.step_files import read_steps
from mist.errors import Problem, ScenarioError
from mist.model import DTYPE_BYTES, ModelSpec
from mist.model.quantization import UNKNOWN
from mist.perf.step_profile import StepProfile
from mist.scenario import catalogue
from mist.scenario.outputs import check_file
from mist.scenario.value import to_yaml


@dataclass(frozen=True, slots=True)
class StepCalibration:
    """A fitted profile, the fit of each regime, and remarks: what was left out, what the data can't tell apart."""

    profile: StepProfile
    fits: tuple[RegimeFit, ...]
    remarks: tuple[str, ...]

    def rows(self) -> list[dict[str, Any]]:
        """The error table, a regime a row, in percent; see `RegimeFit`."""
        return [
            {
                "regime": f.name,
                "steps": f.num_steps,
                "groups": f.num_groups,
                "mean %": round(f.mean_pct, 2),
                "median %": round(f.median_pct, 2),
                "P90 %": round(f.p90_pct, 2),
                "steps' mean %": round(f.step_mean_pct, 2),
                "steps' median %": round(f.step_median_pct, 2),
                "noise mean %": _rounded(f.noise_mean_pct),
                "noise median %": _rounded(f.noise_median_pct),
                "repeats": f.num_repeats,
            }
            for f in self.fits
        ]

    def to_yaml(self) -> str:
        """The profile as the file that a scenario names."""
        return to_yaml(self.profile.as_mapping())


def calibrate_steps(
    path: str | Path,
    *,
    file_format: str = "auto",
    model: str = "",
    device: str = "",
    tp: int | None = None,
    weights_dtype: str = "auto",
    kv_dtype: str = "auto",
    name: str = "",
    engine: str = "",
    source: str = "",
    licence: str = "",
    date: str = "",
    device_time_only: bool = False,
) -> StepCalibration:
    """Learn a step profile from the steps in `path`.

    `model` and `device` are names of the catalogues or paths, needed unless the file tells them; `tp` is 1 unless it
    does. `device_time_only`: the file's times hold none of the engine's host time. `date`: today's unless given.
    Raises ScenarioError with all that can't be read or named, or where there are too few operating points.
    """
    only: dict[str, str | int] = {}
    given: dict[str, Any] = {}
    for kind, text in (("model", model), ("device", device)):
        if text:
            given[kind] = catalogue.read(f"{kind}s", text, Path())[0]
            only[kind] = given[kind].name
    if tp is not None:
        only["tp"] = tp
    table = read_steps(Path(path), file_format, only)
    facts = {**table.facts, **only}
    for kind in ("model", "device"):
        if not facts.get(kind):
            hint = f"give --{kind}, a name of `mist list {kind}s`"
            raise ScenarioError(Problem(f"the file doesn't tell the {kind}", str(path), hint=hint))
        given.setdefault(kind, catalogue.read(f"{kind}s", str(facts[kind]), Path())[0])
    fits, remarks = fit_regimes(table)
    if not fits:
        raise ScenarioError([Problem(remark, str(path), hint="profile more batches and prompts") for remark in remarks])
    spec, degree = given["model"], int(facts.get("tp", 1))
    profile = StepProfile(
        name=name or f"{_short(spec.name)}-{given['device'].name}-tp{degree}",
        model=spec.name,
        device=given["device"].name,
        tp=degree,
        weights_dtype=_weights(spec, weights_dtype),
        kv_dtype=_dtype("bf16" if kv_dtype == "auto" else kv_dtype),
        regimes={f.name: replace(f.regime, errors=_errors(f)) for f in fits},
        includes_host=not device_time_only,
        engine=engine,
        source=source or Path(path).name,
        licence=licence,
        calibrated=date or datetime.date.today().isoformat(),
        notes=(*table.notes, *remarks, *(warning for f in fits for warning in f.warnings)),
    )
    return StepCalibration(_readable(profile), tuple(fits), profile.notes)


def write_profile(calibration: StepCalibration, path: Path, *, overwrite: bool = False) -> None:
    """Write the profile to `path`; ScenarioError where something is there already, or where it can't be written."""
    check_file(path, overwrite=overwrite)
    path.write_text(calibration.to_yaml(), encoding="utf-8")


def _readable(profile: StepProfile) -> StepProfile:
    """`profile` as its file says it: with numbers rounded to what the data can tell."""
    return StepProfile.from_mapping(_rounded_all(profile.as_mapping()))


def _rounded_all(value: Any) -> Any:
    if isinstance(value, dict):
        # ranges stay as they are: rounded, the outermost steps could lie outside
        return {key: inner if key == "ranges" else _rounded_all(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_rounded_all(inner) for inner in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value


def _weights(spec: ModelSpec, dtype: str) -> str:
    if dtype != "auto":
        return _dtype(dtype)
    if spec.checkpoint_dtype == UNKNOWN:
        raise ScenarioError(Problem(f"the quantisation of {spec.name} isn't known", hint="give --weights-dtype"))
    return spec.checkpoint_dtype


def _dtype(dtype: str) -> str:
    if dtype not in DTYPE_BYTES:
        raise ScenarioError(Problem(f"there is no dtype {dtype!r}", hint=f"known: {', '.join(DTYPE_BYTES)}"))
    return dtype


def _errors(f: RegimeFit) -> dict[str, float]:
    """What the profile keeps of a fit's judgement, percent."""
    found: dict[str, float | int | None] = {
        "num_steps": f.num_steps, "num_groups": f.num_groups, "mean_pct": f.mean_pct, "median_pct": f.median_pct,
        "p90_pct": f.p90_pct, "step_mean_pct": f.step_mean_pct, "step_median_pct": f.step_median_pct,
        "noise_mean_pct": f.noise_mean_pct, "noise_median_pct": f.noise_median_pct,
    }  # fmt: skip
    return {
        key: value if isinstance(value, int) else round(value, 2) for key, value in found.items() if value is not None
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)


def _short(name: str) -> str:
    return name.rpartition("/")[2].lower()


def worst_groups(fit: RegimeFit, count: int = 5) -> Sequence[dict[str, Any]]:
    """The held-out groups with the largest errors, worst first, as rows."""
    worst = sorted(fit.held_out, key=lambda h: -h.error_pct)[:count]
    return [
        {"regime": fit.name, "sequences": round(h.sequences), "new tokens": round(h.new_tokens),
            "context": round(h.context),
         "measured ms": round(h.measured_ns / 1e6, 2), "predicted ms": round(h.predicted_ns / 1e6, 2),
         "error %": round(h.error_pct, 1)}
        for h in worst
    ]  # fmt: skip
