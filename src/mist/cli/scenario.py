"""What commands on a scenario share: the argument and the options that change it, loading it, and its plug-ins.

Under the commands. Options become overrides of the scenario, and all problems are told at once. It runs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from mist.errors import Problem
    from mist.scenario import Scenario


def scenario_options(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.argument("scenario", type=click.Path(path_type=Path))(change_options(command))


def change_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What changes a scenario, wherever it comes from."""
    options = (
        click.option("--set", "sets", multiple=True, metavar="PATH=VALUE", help="Change one value; may be repeated."),
        click.option("--seed", type=int, help="Draw everything from this seed."),
        click.option("--warmup", type=float, metavar="S", help="Leave the first seconds out of the metrics."),
        click.option("--window", metavar="A:B", help="Measure only requests that arrive from A to B seconds."),
        click.option("--limit", type=int, metavar="N", help="Only the first N requests, of each tenant."),
        click.option("--rate-scale", type=float, metavar="X", help="Arrivals X times as fast."),
        click.option(
            "--plugin", "plugins", multiple=True, metavar="FILE", help="A Python file that registers policies."
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def load_scenario(
    scenario: Path,
    sets: tuple[str, ...],
    plugins: tuple[str, ...],
    seed: int | None,
    warmup: float | None,
    window: str | None,
    limit: int | None,
    rate_scale: float | None,
) -> Scenario:
    from mist.errors import ScenarioError
    from mist.scenario import load

    problems: list[Problem] = []
    try:
        load_plugins(plugins)
    except ScenarioError as error:  # the scenario's own problems are told with it
        problems += error.problems
    options: dict[str, Any] = {"seed": seed, "warmup_s": warmup, "window_s": window}
    try:
        workloads = _workloads(scenario) if limit is not None or rate_scale is not None else {}
        for place, has_rate in workloads.items():
            options |= {f"{place}.limit": limit, f"{place}.rate_scale": rate_scale if has_rate else None}
        loaded = load(scenario, sets, **{path: value for path, value in options.items() if value is not None})
    except ScenarioError as error:
        raise ScenarioError([*problems, *error.problems]) from None
    if problems:
        raise ScenarioError(problems)
    return loaded


def _workloads(scenario: Path) -> dict[str, bool]:
    """Where the workloads of a scenario's file are, and whether each has a rate: all but closed loops beside others."""
    from mist.scenario.source import read_file

    data = read_file(scenario).data()
    tenants = data.get("tenants") if isinstance(data, dict) else None
    if not isinstance(tenants, dict):
        return {"workload": True}
    return {f"tenants.{name}.workload": not _is_closed_loop(tenant) for name, tenant in tenants.items()}


def _is_closed_loop(tenant: Any) -> bool:
    workload = tenant.get("workload") if isinstance(tenant, dict) else None
    if not isinstance(workload, dict):
        return False
    arrivals = workload.get("arrivals")
    return "concurrency" in workload or (isinstance(arrivals, dict) and "closed_loop" in arrivals)


def load_plugins(plugins: Iterable[str]) -> None:
    """Every plug-in; ScenarioError tells all that can't be loaded."""
    from mist import registry
    from mist.errors import ScenarioError

    problems: list[Problem] = []
    for plugin in plugins:
        try:
            registry.load_plugin_file(plugin)
        except ScenarioError as error:
            problems += error.problems
    if problems:
        raise ScenarioError(problems)


def inputs(scenario: Scenario, path: Path, plugins: Iterable[str]) -> list[Path]:
    """The files that a run reads: the scenario, its trace, its devices, models and engines, and plug-ins."""
    found = [path, *map(Path, plugins)]
    found += [scenario.trace_path(name) for name, tenant in scenario.tenants.items() if tenant.workload.trace]
    for pool in scenario.source.data()["clients"].values():
        written = (pool.get(key) for key in ("device", "model", "engine"))
        found += [scenario.folder / name for name in written if isinstance(name, str)]
    return [file.resolve() for file in found if file.is_file()]
