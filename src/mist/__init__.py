"""MIST: an event-driven simulator of LLM serving.

`run("scenario.yaml")` returns a `Result`; `Scenario` and the errors are here too, and all else is in the submodules.
Importing this package loads none of them, so that it costs next to nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mist.errors import InvariantError, ScenarioError
    from mist.scenario import Scenario
    from mist.scenario.result import Result

__version__ = "0.1.0"

__all__ = ["InvariantError", "Result", "Scenario", "ScenarioError", "__version__", "run"]

_HOMES = {
    "InvariantError": "mist.errors",
    "Result": "mist.scenario.result",
    "Scenario": "mist.scenario",
    "ScenarioError": "mist.errors",
}


def run(
    scenario: str | Path | Mapping[str, Any] | Scenario,
    *,
    check: bool = False,
    progress: Callable[[int, int], None] | None = None,
    records: str = "full",
    **overrides: Any,
) -> Result:
    """Simulate a scenario (a YAML file, a mapping or a `Scenario`) to the end.

    `overrides` replace values by dotted path: seed=3, or **{"clients.gpu.tp": 2}. `check` recounts every conservation
    law while running. `progress` is called with requests done and requests in all. `records="summary"` is for long
    runs: the summary is the same to the last bit, tables aren't kept. Raises ScenarioError, and InvariantError where a
    law breaks.
    """
    from mist.scenario import load
    from mist.scenario.build import run as run_scenario

    return run_scenario(load(scenario, **overrides), check=check, progress=progress, records=records)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mist' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
