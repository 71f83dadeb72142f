"""Engine profiles as calibration reads and keeps them: which points a profile stands for, and what was fitted to them.

Around the fit, for the command: a profile's mapping and a file of points come in, a whole profile with the sources of
its constants goes out, which a scenario can name. It never changes a figure by itself.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

import yaml

from mist.calibration.points import Fit, changed, of_device, of_profile
from mist.errors import Problem, ScenarioError, nearest
from mist.scenario import catalogue
from mist.validation.engines import engine_profile
from mist.validation.points import Point, PointFile, Skip
from mist.validation.split import is_checking


def read_profile(given: str) -> dict[str, Any]:
    """The mapping of an engine profile, by its name or path; ScenarioError unless it stands for a shipped one.

    Points find their profile by engine and version, so that a file of one's own takes the place of its namesake.
    """
    _, written = catalogue.read("engines", given, Path())
    profile = catalogue.mapping("engines", written)
    known = catalogue.names("engines")
    if (name := str(profile["name"])) not in known:
        hint = f"its `name` says which it takes the place of; {nearest(name, known)}"
        raise ScenarioError(Problem(f"{name!r} is none of the profiles that points are run with", given, hint=hint))
    return profile


def points_of(file: PointFile, name: str, *, device: str = "", only_fitting: bool = False) -> list[Point]:
    """The points that are run with the profile `name`; ScenarioError where there is none.

    Of them those on `device` (the catalogue's name, "" any), and with `only_fitting` without those that the shipped
    figures are checked with.
    """
    by_profile: dict[str, list[Point]] = {}
    for point in file.points:
        if (device and _device_name(point["device"]) != device) or (only_fitting and is_checking(point)):
            continue
        try:
            by_profile.setdefault(str(engine_profile(point)["name"]), []).append(point)
        except Skip:
            continue
    if name not in by_profile:
        hint = f"its points are of {', '.join(sorted(by_profile))}" if by_profile else "it has no points of any engine"
        raise ScenarioError(Problem(f"no point is run with {name!r}", str(file.path), hint=hint))
    return by_profile[name]


def request_lists(file: PointFile) -> list[Path]:
    """Where the points' lists of requests may be, there or not."""
    named = {point["workload_file"] for point in file.points} - {""}
    return [file.path.parent / folder / name for name in sorted(named) for folder in ("workloads", "")]


@functools.cache
def _device_name(given: str) -> str:
    """The catalogue's name of a device that a point calls by it or by an alias; what it doesn't know, as given."""
    try:
        return str(catalogue.read("devices", given, Path())[0].name)
    except ScenarioError:
        return given


def fitted_profile(profile: Mapping[str, Any], fit: Fit, file: PointFile, when: str = "") -> dict[str, Any]:
    """`profile` with what was fitted; `sources` says of each constant how, to what and on which day (`when`)."""
    return _fitted(profile, of_profile(fit.values), of_profile(fit.standard_errors), fit, file, when)


def fitted_device(device: Mapping[str, Any], fit: Fit, file: PointFile, when: str = "") -> dict[str, Any]:
    """`device`, a mapping as in a catalogue file, with what was fitted of it and where that comes from."""
    return _fitted(device, of_device(fit.values), of_device(fit.standard_errors), fit, file, when)


def _fitted(
    mapping: Mapping[str, Any], values: Mapping[str, float], errors: Mapping[str, float | None], fit: Fit,
    file: PointFile, when: str,
) -> dict[str, Any]:  # fmt: skip
    compared = sorted({c.source for c in fit.residuals})
    origin = (
        f"mist calibrate points, {when or date.today().isoformat()}: {fit.num_values} values of {fit.num_points} "
        f"points in {file.path.name} ({', '.join(compared)}); median error {fit.after_pct:.1f} %, "
        f"{_percent(fit.left_out_pct)} of points left out"
    )
    found = changed(mapping, values)
    fitted = {name: f"fitted, standard error {_error(error)}; {origin}" for name, error in errors.items()}
    return {**found, "sources": {**found.get("sources", {}), **fitted}}


def rows(fit: Fit) -> list[dict[str, Any]]:
    """A row per constant, for a table."""
    return [
        {"constant": name, "value": f"{value:.5g}", "standard error": _error(fit.standard_errors[name])}
        for name, value in fit.values.items()
    ]


def sentences(fit: Fit) -> str:
    """How well it fits, before and after, and on what it hadn't seen."""
    return (
        f"{fit.num_values:,} values of {fit.num_points:,} points with {fit.profile}: median error "
        f"{fit.before_pct:.1f} % before, {fit.after_pct:.1f} % after; {_percent(fit.left_out_pct)} of each value as "
        "predicted without its point."
    )


def _error(standard_error: float | None) -> str:
    return "unknown" if standard_error is None else f"{standard_error:.2g}"


def _percent(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1f} %"


def document(fit: Fit) -> dict[str, Any]:
    """The fit as JSON values; errors in percent."""
    constants = {
        name: {"value": value, "standard_error": fit.standard_errors[name]} for name, value in fit.values.items()
    }
    numbers = {
        key: getattr(fit, key) for key in ("num_points", "num_values", "before_pct", "after_pct", "left_out_pct")
    }
    residuals = [
        {key: getattr(c, key) for key in ("id", "point", "source", "metric", "measured", "simulated", "ape")}
        for c in fit.residuals
    ]
    return {"constants": constants, **numbers, "warnings": list(fit.warnings), "residuals": residuals}


def to_yaml(profile: Mapping[str, Any]) -> str:
    """A profile as a file of the catalogue."""
    text: str = yaml.safe_dump(dict(profile), sort_keys=False, allow_unicode=True, width=120)
    return text


def write_profile(profile: Mapping[str, Any], path: Path) -> None:
    """Write it to `path`, which `outputs.check_file` found free."""
    path.write_text(to_yaml(profile), encoding="utf-8")
