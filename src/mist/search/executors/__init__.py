"""Where jobs run: in this process, in several, or on a Ray cluster. One file each, registered as `executor`.

Chosen by name for the commands; the contract is `mist.search.evaluate.Executor`. None of them changes an outcome.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from mist import registry
from mist.errors import Problem, ScenarioError
from mist.search.evaluate import Executor

#: the one that is taken where none is named
DEFAULT = "processes"


def executor_named(name: str = DEFAULT, **options: Any) -> Executor:
    """The executor of this name; of `options` (such as num_workers) those that are set and that it has.

    Raises ScenarioError for a name or an option that it hasn't.
    """
    try:
        kind = registry.lookup("executor", name)
    except KeyError as error:
        raise ScenarioError(Problem(str(error.args[0]))) from None
    known = {field.name for field in dataclasses.fields(kind)}
    given = {key: value for key, value in options.items() if value}
    if unknown := sorted(set(given) - known):
        raise ScenarioError(Problem(f"the executor {name} has no {unknown[0]}", hint="leave it out"))
    executor: Executor = kind(**given)
    return executor
