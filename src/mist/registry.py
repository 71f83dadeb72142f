"""Names for implementations: `register("batching", "chunked")` on a class, `lookup` by that name.

Each kind's shipped implementations live in one package (or module) and register themselves when it is
imported; look-ups import it first, so that adding a file to the package is all that a new policy needs.
Third parties register through the entry-point group `mist.plugins` or a `--plugin` file.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mist.errors import ScenarioError, nearest

T = TypeVar("T")

HOMES = {
    "arrivals": "mist.workload.synthetic",
    "lengths": "mist.workload.synthetic",
    "trace": "mist.workload",
    "pipeline": "mist.pipeline",
    "batching": "mist.batching",
    "order": "mist.batching.orders",
    "routing": "mist.routing",
    "admission": "mist.admission",
    "perf": "mist.perf",
    "eviction": "mist.memory.eviction",
    "executor": "mist.search.executors",
}

_registered: dict[str, dict[str, Any]] = {kind: {} for kind in HOMES}
_imported: set[str] = set()
_plugin_files: dict[str, None] = {}


@dataclass(frozen=True, slots=True)
class Named:
    """Marks a parameter of an implementation that is one itself, of `kind`: scenarios give it by name.

    A plain number stands for the one called `bare`. The parameter's default is such a number, or made by a registered
    class without arguments.
    """

    kind: str
    bare: str = ""


def register(kind: str, name: str) -> Callable[[T], T]:
    """Class decorator: `name` in a scenario's `kind` section now means this class.

    Raises ValueError for an unknown kind, or a name that another implementation holds already.
    """
    if kind not in _registered:
        raise ValueError(f"unknown kind {kind!r}: {nearest(kind, _registered)}")

    def add(implementation: T) -> T:
        holder = _registered[kind].get(name)
        if holder is not None and _origin(holder) != _origin(implementation):
            raise ValueError(f"{kind} {name!r} is taken by {_origin(holder)}")
        _registered[kind][name] = implementation
        return implementation

    return add


def lookup(kind: str, name: str) -> Any:
    """The implementation registered under `name`; KeyError whose message suggests the nearest name."""
    _import_home(kind)
    try:
        return _registered[kind][name]
    except KeyError:
        raise KeyError(f"no {kind} named {name!r}; {nearest(name, _registered[kind])}") from None


def name_of(implementation: Any) -> str:
    """The name that `implementation` is registered under, "" if it isn't."""
    found = (name for known in _registered.values() for name, each in known.items() if each is implementation)
    return next(found, "")


def names(kind: str) -> list[str]:
    """Every registered name of `kind`, sorted."""
    _import_home(kind)
    return sorted(_registered[kind])


def load_plugin_file(path: str | Path) -> None:
    """Run a Python file that registers implementations; ScenarioError where it can't be run."""
    path = Path(path)
    spec = importlib.util.spec_from_file_location(f"mist_plugin_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ScenarioError(f"plug-in {path} is not a Python file that can be read")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ScenarioError(f"plug-in {path} failed: {type(error).__name__}: {error}") from error
    _plugin_files[str(path.resolve())] = None


def plugin_files() -> tuple[str, ...]:
    """The plug-in files that were run, in order, with their whole paths: what another process must run too."""
    return tuple(_plugin_files)


def _import_home(kind: str) -> None:
    """Import what ships of a kind, and once the installed plug-ins; ScenarioError names one that fails."""
    if kind in _imported:
        return
    if not _imported:
        _imported.add("")
        _import_entry_points()
    module = importlib.import_module(HOMES[kind])
    for info in pkgutil.iter_modules(getattr(module, "__path__", [])):
        importlib.import_module(f"{HOMES[kind]}.{info.name}")
    _imported.add(kind)


def _import_entry_points() -> None:
    from importlib.metadata import entry_points

    for entry in entry_points(group="mist.plugins"):
        try:
            entry.load()
        except Exception as error:
            story = f"{type(error).__name__}: {error}"
            raise ScenarioError(f"the installed plug-in {entry.name} ({entry.value}) failed: {story}") from error


def _origin(implementation: Any) -> str:
    """Where a class is written: a plug-in's file may be imported under several module names."""
    module = implementation.__module__
    return f"{getattr(sys.modules.get(module), '__file__', None) or module}:{implementation.__qualname__}"
