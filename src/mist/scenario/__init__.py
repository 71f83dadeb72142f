"""Scenarios: what a user writes, read, validated and completed into a value that a run is built from.

The layer above the simulator. `Scenario` and `load` are here; `build` turns a scenario into a run and a `Result`. It
never simulates anything, and reports every problem of the user's files at once.
"""

from __future__ import annotations

from mist.scenario.schema import ScenarioFile
from mist.scenario.value import Scenario, load

__all__ = ["Scenario", "ScenarioFile", "load"]
