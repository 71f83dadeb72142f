"""The file SPACE.yaml: a scenario, alternatives to what it says, a budget, objectives, constraints and a baseline.

The first thing that happens to a user's space; what leaves is a `Space`, whose choices are still to be made. All
problems are raised at once with their places. It never runs or validates the scenarios that come of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mist.errors import Problem, ScenarioError, nearest
from mist.scenario.nodes import Node, Place
from mist.scenario.source import KeyPath, Source, read_file
from mist.search.choices import Choice
from mist.search.objectives import Constraint, improves_with_load, unknown

_KEYS = ("name", "scenario", "space", "budget", "objectives", "constraints", "baseline")
#: alternatives by name, whole numbers from first to last, numbers that double from first to last
_ANY, _RANGE, _DOUBLING = "any", "range", "doubling"
#: values of one choice, beyond which neither enumerating nor sampling makes sense
MAX_OPTIONS = 10_000
#: numbers in their order, of which each is harder to serve than those before it
_LOAD = "load"


@dataclass(frozen=True, slots=True)
class Space:
    """A validated space. `tree` holds trees of choices by path into the scenario; `baseline` is plain data to set.

    `devices`: accelerators in all, at most so many where `at_most`, None without a budget; `source` is the scenario's,
    and `own` that of the space itself, which knows places.
    """

    name: str
    source: Source
    own: Source
    tree: dict[str, Any]
    devices: int | None
    at_most: bool
    objectives: tuple[str, ...]
    constraints: tuple[Constraint, ...]
    baseline: Mapping[str, Any] | None

    @property
    def load(self) -> str | None:
        """The name of the choice that is the load; None where the space says none."""
        return next((tree.name for tree in self.tree.values() if isinstance(tree, Choice) and tree.is_load), None)

    def label(self, name: str) -> str:
        """FILE:LINE:COLUMN of what the space says of a choice or a path into the scenario, for messages about it."""
        found = self.own.problem(_written(self.own, name), "", key=True)
        return f"{found.file}:{found.line}:{found.column}" if found.line else f"{found.file}: {name}"


def read_space(path: str | Path) -> Space:
    """The space in a YAML file; ScenarioError with every problem of it."""
    own = read_file(path)
    reader = _Reader(own)
    space = reader.space()
    if reader.problems:
        raise ScenarioError(reader.problems)
    assert space is not None
    return space


class _Reader:
    """Reads one space and gathers its problems."""

    def __init__(self, own: Source) -> None:
        self.own = own
        self.problems: list[Problem] = []
        self.loads: list[str] = []

    def space(self) -> Space | None:
        data = self.own.root.value
        if not isinstance(data, dict):
            self._add((), "a search space is a mapping", f"the keys are {', '.join(_KEYS)}")
            return None
        if "scenario" not in data and {"clients", "tenants"} & set(data):
            hint = f"write one of it: scenario: FILE, {_SPACE_HINT.removeprefix('such as ')}, objectives: [ttft_s.p99]"
            self._add((), "this is a scenario, not a search space", hint)
            return None
        for key in data:
            if key not in _KEYS:
                self._add((key,), f"there is no key {key!r}", nearest(key, _KEYS), key=True)
        for key, hint in (("scenario", "scenario: FILE, or the scenario itself"), ("space", _SPACE_HINT),
                          ("objectives", "such as objectives: [output_tokens_per_usd, ttft_s.p99]")):  # fmt: skip
            if key not in data:
                self._add((), f"the key {key!r} is missing", hint)
        devices, at_most = self._budget()
        parts: dict[str, Any] = {
            "name": str(self._plain("name") or self.own.name),
            "own": self.own,
            "source": self._scenario(),
            "tree": self._tree(),
            "devices": devices,
            "at_most": at_most,
            "objectives": self._objectives(),
            "constraints": self._constraints(),
            "baseline": self._baseline(),
        }
        return None if self.problems else Space(**parts)

    def _scenario(self) -> Source | None:
        given = self._plain("scenario")
        if isinstance(given, str):
            try:
                return read_file(self.own.folder / given)
            except ScenarioError as error:
                place = self.own.problem(("scenario",), "")
                self.problems += [
                    p if p.line else Problem(f"{p.file}: {p.message}", place.file, place.line, place.column, p.hint)
                    for p in error.problems
                ]
                return None
        if isinstance(given, dict):
            return Source(self.own.root.value["scenario"], self.own.folder, self.own.name)
        if given is not None:
            self._add(("scenario",), "a scenario is a file's name or a mapping", "such as scenario: chat.yaml")
        return None

    def _tree(self) -> dict[str, Any]:
        node = self.own.root.value.get("space")
        if node is None:
            return {}
        if not isinstance(node.value, dict) or not node.value:
            self._add(("space",), "the space is a mapping of paths into the scenario", _SPACE_HINT)
            return {}
        found: dict[str, Any] = {}
        for path, inner in node.value.items():
            for dotted, tree in _settings(self._read(inner, path), path):
                if dotted in found:
                    self._add(("space", path), f"{dotted} is here twice", "keep one", key=True)
                found[dotted] = tree
        if len(self.loads) > 1 or any(name not in found for name in self.loads):
            message = f"load is said of {', '.join(self.loads)}: there can be one, outside of all alternatives"
            self._add(("space",), message, "give the others as plain lists")
        return found

    def _read(self, node: Node, name: str) -> Any:
        """The tree below a node: a list is a choice, and so are `any`, `range` and `doubling`."""
        if isinstance(node.value, list):
            if not node.value:
                self._at(node, f"{name}: no value to choose", "give one at least")
            labels = [_label(inner) for inner in node.value]
            options = {}
            for index, inner in enumerate(node.value):
                label = labels[index] if labels[index] and labels.count(labels[index]) == 1 else str(index)
                is_list = isinstance(inner.value, list)  # a list in a list of choices is a value
                options[label] = _plain(inner) if is_list else self._read(inner, f"{name}[{label}]")
            return Choice(name, options)
        if not isinstance(node.value, dict):
            return node.value
        if len(node.value) == 1:
            key, inner = next(iter(node.value.items()))
            if key == _ANY:
                return self._any(inner, name)
            if key == _LOAD:
                return self._load(inner, name)
            if key in (_RANGE, _DOUBLING):
                return Choice(name, {str(number): number for number in self._numbers(key, inner, name)})
        return {key: self._read(inner, f"{name}.{key}") for key, inner in node.value.items()}

    def _any(self, node: Node, name: str) -> Choice:
        if not isinstance(node.value, dict) or not node.value:
            self._at(node, f"{name}: any holds alternatives by name", "such as any: {one: {...}, other: {...}}")
            return Choice(name, {"": None})
        return Choice(name, {label: self._read(inner, f"{name}[{label}]") for label, inner in node.value.items()})

    def _load(self, node: Node, name: str) -> Choice:
        self.loads.append(name)
        given = _plain(node)
        numbers = given if isinstance(given, list) and given else [0]
        known = all(isinstance(n, int | float) and not isinstance(n, bool) and n > 0 for n in numbers)
        if not known or sorted(set(numbers)) != numbers:
            self._at(node, f"{name}: {given!r:.60} are no loads", "such as load: [4, 6, 8]: numbers that rise")
        return Choice(name, {str(number): number for number in numbers}, is_load=True)

    def _numbers(self, kind: str, node: Node, name: str) -> list[int]:
        given = _plain(node)
        whole = isinstance(given, list) and all(isinstance(n, int) and not isinstance(n, bool) for n in given)
        step = given[2] if whole and len(given) == 3 and kind == _RANGE else 1
        if not whole or not 2 <= len(given) <= (3 if kind == _RANGE else 2) or not 0 < given[0] <= given[1] or step < 1:
            self._at(node, f"{name}: {given!r:.60} is no {kind}", f"such as {kind}: [1, 8], both ends included")
            return [1]
        if kind == _RANGE:
            if (total := (given[1] - given[0]) // step + 1) > MAX_OPTIONS:
                message = f"{name}: {total:,} numbers are more than the {MAX_OPTIONS:,} of one choice"
                wider = -(-(given[1] - given[0] + 1) // MAX_OPTIONS)
                self._at(node, message, f"by steps, such as range: [{given[0]}, {given[1]}, {wider}], or doubling")
                return [1]
            return list(range(given[0], given[1] + 1, step))
        return [given[0] << n for n in range(given[1].bit_length()) if given[0] << n <= given[1]]

    def _budget(self) -> tuple[int | None, bool]:
        given = self._plain("budget")
        if given is None:
            return None, False
        devices = given.get("devices") if isinstance(given, dict) and len(given) == 1 else None
        at_most = isinstance(devices, dict)
        if isinstance(devices, dict) and len(devices) == 1:
            devices = devices.get("at_most")
        if not isinstance(devices, int) or isinstance(devices, bool) or devices < 1:
            self._add(("budget",), f"{given!r:.60} is no budget", "devices: 8, or devices: {at_most: 8}")
            return None, False
        return devices, at_most

    def _objectives(self) -> tuple[str, ...]:
        given = self._plain("objectives")
        given = [given] if isinstance(given, str) else given
        if given is None:
            return ()
        if not isinstance(given, list) or not given:
            self._add(("objectives",), "objectives are a list of names", "such as [output_tokens_per_usd, ttft_s.p99]")
            return ()
        for index, name in enumerate(given):
            if (hint := unknown(str(name))) is not None:
                self._add(("objectives", index), f"there is no objective {name!r}", hint)
        return tuple(dict.fromkeys(str(name) for name in given))

    def _constraints(self) -> tuple[Constraint, ...]:
        given = self._plain("constraints")
        if given is None:
            return ()
        if not isinstance(given, dict):
            self._add(("constraints",), "constraints are bounds by objective", "such as {ttft_s.p99: 2}")
            return ()
        for name, bound in given.items():
            if (hint := unknown(name)) is not None:
                self._add(("constraints", name), f"there is no objective {name!r}", hint, key=True)
            if isinstance(bound, bool) or not isinstance(bound, int | float) or bound <= 0:
                self._add(("constraints", name), f"{bound!r} is no bound", "a number above 0")
            if self.loads and improves_with_load(name):
                message = f"{name} may hold at a higher load only, but a load is one that is harder the higher it is"
                self._add(("constraints", name), message, "give the loads as a plain list", key=True)
        return tuple(Constraint(name, bound) for name, bound in given.items())

    def _baseline(self) -> Mapping[str, Any] | None:
        given = self._plain("baseline")
        if given is not None and (not isinstance(given, dict) or "clients" not in given):
            hint = "clients: {gpu: {device: h100-sxm, model: ...}}; tp and count follow where they are left out"
            self._add(("baseline",), "a baseline says which clients it has", hint)
            return None
        return given

    def _plain(self, key: str) -> Any:
        node = self.own.root.value.get(key)
        return None if node is None else _plain(node)

    def _add(self, path: KeyPath, message: str, hint: str, *, key: bool = False) -> None:
        self.problems.append(self.own.problem(path, message, hint, key=key))

    def _at(self, node: Node, message: str, hint: str) -> None:
        place: Place = node.place
        self.problems.append(Problem(message, *place, hint))


_SPACE_HINT = "such as space: {clients.gpu.device: [h100-sxm, mi300x], clients.gpu.tp: [1, 2, 4]}"


def _settings(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    """What is set, by path: mappings that are no alternative are merged into what the scenario says."""
    if isinstance(tree, dict) and tree:
        for key, inner in tree.items():
            yield from _settings(inner, f"{path}.{key}")
    else:
        yield path, tree


def _label(node: Node) -> str:
    """What an alternative is called in results: the value, or the name of a short mapping's one key."""
    if isinstance(node.value, dict):
        return next(iter(node.value)) if len(node.value) == 1 else ""
    return str(_plain(node)).replace("True", "true").replace("False", "false")


def _plain(node: Node) -> Any:
    return Source(node).data()


def _written(own: Source, name: str) -> KeyPath:
    """Where the space itself says something of a choice, such as clients[apart].decode.tp, or of a path."""
    keys = own.at(("space",))
    over = max((key for key in keys if re.match(re.escape(key) + r"($|[.\[])", name)), key=len, default="")
    path: list[str | int] = ["space", over]
    for key, label in re.findall(r"\.([^.\[]+)|\[([^\]]*)\]", name[len(over) :]):
        path += [key] if key else [_ANY, label]
    return tuple(path)
