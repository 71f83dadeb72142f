"""Where jobs run, by name. It changes no outcome."""

from __future__ import annotations

from typing import Any

from mist.errors import Problem, ScenarioError
from mist.search.evaluate import Executor, Serial

DEFAULT = "serial"


def executor_named(name: str = DEFAULT, **options: Any) -> Executor:
    """The executor of this name; ScenarioError for a name that there isn't."""
    if name != DEFAULT:
        raise ScenarioError(Problem(f"there is no executor {name!r}", hint=f"known: {DEFAULT}"))
    return Serial()
