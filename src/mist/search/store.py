"""What has been run already: an Optuna study in a SQLite file or a database, from which a killed search goes on.

Under the laboratory, which asks for what is known and adds what is new. A trial is one run, whole, with the excerpt of
its summary; a strategy is run again from its start and finds its runs here. It never decides what is run.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mist.errors import InvariantError, Problem, ScenarioError
from mist.search.objectives import maximised, objective

if TYPE_CHECKING:
    import optuna

#: what is kept of a run: its `excerpt` or its `error`, and the processor time `cpu_s` that it took
Run = dict[str, Any]

_TRIES, _PAUSE_S = 10, 0.5


class Store:
    """Runs by key, in memory and, with a study, kept."""

    def __init__(self, study: optuna.Study | None = None, objectives: Sequence[str] = ()) -> None:
        self._study, self._objectives = study, objectives
        self.runs: dict[str, Run] = {}
        if study is not None:
            for trial in study.get_trials(deepcopy=False):
                run = json.loads(trial.user_attrs.get("run", "{}"))
                # one that failed may have run out of memory, so it is tried again
                if run.get("excerpt") is not None:
                    self.runs[trial.user_attrs["key"]] = run

    def add(self, key: str, run: Run, **about: Any) -> None:
        """Keep a run, at once; `about` is told beside it for who reads the study."""
        self.runs[key] = run
        if self._study is None:
            return
        from optuna.trial import TrialState, create_trial

        excerpt = run.get("excerpt")
        values = [] if excerpt is None else [objective(excerpt, name) for name in self._objectives]
        known = [value for value in values if value is not None and math.isfinite(value)]
        whole = excerpt is not None and len(known) == len(values)
        self._study.add_trial(
            create_trial(
                state=TrialState.COMPLETE if whole else TrialState.FAIL,
                values=known if whole else None,
                user_attrs={"key": key, "run": json.dumps(run), **about},
            )
        )


def open_store(url: str | Path | None, name: str, objectives: Sequence[str]) -> Store:
    """The store in a SQLite file (a path) or a database (a URL), made where there is none; in memory for None."""
    if url is None:
        return Store()
    where = f"sqlite:///{url.resolve()}" if isinstance(url, Path) else url
    if where.startswith("postgresql://"):
        where = where.replace(
            "postgresql:", "postgresql+psycopg:", 1
        )  # of its drivers the one that is an extra of MIST
    for tries_left in reversed(range(_TRIES)):
        try:
            return Store(_study(where, f"{name}: {', '.join(objectives)}", objectives), objectives)
        except Exception as error:
            told = str(error)
            if tries_left and ("already exists" in told or "duplicate key" in told):
                time.sleep(_PAUSE_S)  # another search makes the tables of a new database just now
                continue
            hint = "such as sqlite:///search.db or postgresql://user@host/database"
            if isinstance(error, ImportError):
                hint = "PostgreSQL's driver is an extra: pip install 'psycopg[binary]'"
            told = f"the store can't be opened: {type(error).__name__}: {told.splitlines()[0]:.200}"
            raise ScenarioError(Problem(told, hint=hint)) from None
    raise InvariantError("the last try neither opened the store nor told why not")


def _study(where: str, name: str, objectives: Sequence[str]) -> optuna.Study:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(
        study_name=name,
        storage=where,
        directions=["maximize" if maximised(each) else "minimize" for each in objectives],
        load_if_exists=True,
    )


def excerpt_of(run: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The excerpt of a run; None where it failed."""
    found: Mapping[str, Any] | None = run.get("excerpt")
    return found
