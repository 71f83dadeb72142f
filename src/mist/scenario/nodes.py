"""YAML and Python mappings as a tree of nodes in which every value knows its file, line and column.

Below `Source`: the text of a file or of an option comes in, nodes or a list of problems go out. It never knows what a
key means, never builds objects from tags, and never expands an alias beyond its limits.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from mist.errors import Problem, ScenarioError

MAX_VALUES = 100_000
MAX_DEPTH = 50

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_INT = re.compile(r"[-+]?[0-9][0-9_]*")
_BASED_INT = re.compile(r"0x[0-9a-fA-F_]+|0o[0-7_]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*\.?[0-9_]*)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WORDS = {"": None, "~": None, "null": None, "Null": None, "NULL": None,
          "true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}  # fmt: skip


class Place(NamedTuple):
    """Where something was written; `line` and `column` are 1-based, 0 where it has none (an option, a mapping)."""

    file: str
    line: int = 0
    column: int = 0


@dataclass(slots=True)
class Node:
    """A value and its places: `value` is a scalar, a dict of nodes or a list of nodes."""

    value: Any
    place: Place
    key_place: Place | None = None


def parse(text: str, file: str, *, lines: bool = True, max_values: int = MAX_VALUES) -> Node:
    """The one YAML document in `text` as nodes; ScenarioError with every problem found.

    Scalars follow YAML 1.2: 1e9 is a number; on, off, yes, no, dates and 10:20 are text. Not-a-number and infinity are
    refused. Anchors and merge keys work, within `max_values` values after expansion. `lines` False leaves lines out.
    """
    return _Parser(text, file, lines, max_values).document()


def from_data(value: Any, place: Place) -> Node:
    """Plain Python data as nodes that all lie at `place`; ScenarioError for what YAML could not hold."""
    problems: list[Problem] = []
    node = _from_data(value, place, (), problems)
    if problems:
        raise ScenarioError(problems)
    return node


def is_text(scalar: str) -> bool:
    """Whether an unquoted `scalar` would be read as text, not as a number, a truth value or nothing."""
    try:
        return scalar not in _WORDS and isinstance(_number(scalar), str)
    except (OverflowError, ValueError):
        return False


class _Parser:
    """Nodes out of the events of one YAML document; an alias reads its anchor's events again, within the limits."""

    def __init__(self, text: str, file: str, lines: bool, max_values: int) -> None:
        self.text, self.file, self.lines = text, file, lines
        self.max_values, self.num_values = max_values, 0
        self.problems: list[Problem] = []
        self.anchors: dict[str, int] = {}
        self.open_anchors: set[str] = set()
        self.events: list[Any] = []

    def document(self) -> Node:
        self._scan()
        starts = [event for event in self.events if isinstance(event, yaml.DocumentStartEvent)]
        if not starts:
            raise ScenarioError(
                Problem("the file is empty", self.file, hint="`mist run --help` shows a first scenario")
            )
        if len(starts) > 1:
            self._add(starts[1], "a second document begins here", "keep one document a file, without `---` between")
        node, _ = self._node(2, 0)
        if self.problems:
            raise ScenarioError(self.problems)
        return node

    def _scan(self) -> None:
        try:
            depth = 0
            for event in yaml.parse(self.text, Loader=_Loader):
                self.events.append(event)
                depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
                self._limit(event, depth, len(self.events) // 2)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            place = self._place(mark.line, mark.column) if mark else Place(self.file)
            what = ", ".join(part for part in (error.context, error.problem) if part)
            kind = "JSON" if self._is_json() else "YAML"
            raise ScenarioError(Problem(f"not valid {kind}: {what}", *place, self._syntax_hint(mark))) from None
        except yaml.YAMLError as error:
            raise ScenarioError(Problem(*self._bad_character(error), "remove it, or save the file as text")) from None

    def _is_json(self) -> bool:
        return self.file.removesuffix(".gz").endswith(".json")

    def _syntax_hint(self, mark: Any) -> str:
        if self._is_json():
            return "is the file cut short? check that commas, quotes, brackets and braces are there and closed"
        rows = self.text.splitlines()
        near = rows[max(0, mark.line - 1) : mark.line + 1] if mark else []
        if any("\t" in row[: len(row) - len(row.lstrip())] for row in near):
            return "YAML is indented with spaces: replace the tab"
        return "check the indentation, the colons, and that quotes and brackets are closed"

    def _bad_character(self, error: yaml.YAMLError) -> tuple[str, str, int, int]:
        for number, row in enumerate(self.text.split("\n"), start=1):
            bad = re.search(r"[^\t\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", row)
            if bad:
                place = self._place(number - 1, bad.start())
                return f"character U+{ord(bad[0]):04X} can't be in YAML", *place
        return f"not valid YAML: {error}", self.file, 0, 0

    def _node(self, index: int, depth: int) -> tuple[Node, int]:
        """The node that begins at event `index`, and the index after its last event."""
        event = self.events[index]
        place = self._place(event.start_mark.line, event.start_mark.column)
        self.num_values += 1
        self._limit(event, depth, self.num_values)
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event, place, depth), index + 1
        if event.anchor:
            self.anchors[event.anchor] = index
        if event.tag and event.tag != "!":
            self._add(event, f"the tag {event.tag!r} is not used in scenarios", "remove the tag")
        if isinstance(event, yaml.ScalarEvent):
            return Node(self._scalar(event), place), index + 1
        self.open_anchors.add(event.anchor)
        read = self._mapping if isinstance(event, yaml.MappingStartEvent) else self._list
        value, after = read(index + 1, depth + 1)
        self.open_anchors.discard(event.anchor)
        return Node(value, place), after

    def _limit(self, event: Any, depth: int, num_values: int) -> None:
        """Stop reading, lest a small file cost much time or memory."""
        if depth > MAX_DEPTH or num_values > self.max_values:
            what = f"{MAX_DEPTH} levels" if depth > MAX_DEPTH else f"{self.max_values:,} values, aliases expanded"
            self._add(event, f"more than {what}", "keep the data in a file of its own, such as a trace")
            raise ScenarioError(self.problems)

    def _alias(self, event: Any, place: Place, depth: int) -> Node:
        start = self.anchors.get(event.anchor)
        if start is None or event.anchor in self.open_anchors:
            why = "contains itself" if start is not None else "has no anchor before it"
            self._add(event, f"the alias *{event.anchor} {why}", f"write &{event.anchor} at the value that it repeats")
            return Node(None, place)
        return self._node(start, depth)[0]

    def _list(self, index: int, depth: int) -> tuple[list[Node], int]:
        nodes = []
        while not isinstance(self.events[index], yaml.SequenceEndEvent):
            node, index = self._node(index, depth)
            nodes.append(node)
        return nodes, index + 1

    def _mapping(self, index: int, depth: int) -> tuple[dict[str, Node], int]:
        own: dict[str, Node] = {}
        merged: list[Node] = []
        while not isinstance(key := self.events[index], yaml.MappingEndEvent):
            name, index = self._key(index, depth)
            node, index = self._node(index, depth)
            node = replace(node, key_place=self._place(key.start_mark.line, key.start_mark.column))
            if name == "<<" and key.implicit[0]:
                merged.extend(self._mappings(key, node))
            elif name in own:
                first = own[name].key_place
                self._add(
                    key,
                    f"the key {name!r} is here twice",
                    f"it is first on line {first.line if first else 0}; keep one",
                )
            elif name is not None:
                own[name] = node
        for node in merged:
            for name, inner in node.value.items():
                own.setdefault(name, inner)
        return own, index + 1

    def _key(self, index: int, depth: int) -> tuple[str | None, int]:
        event = self.events[index]
        if isinstance(event, yaml.ScalarEvent):
            return str(event.value), index + 1
        self._add(event, "a key must be a plain name", "quote it if it begins with one of [ { * &")
        return None, self._node(index, depth)[1]

    def _mappings(self, key: Any, node: Node) -> list[Node]:
        nodes = node.value if isinstance(node.value, list) else [node]
        if not all(isinstance(inner.value, dict) for inner in nodes):
            self._add(key, "only mappings can be merged with <<", "for example <<: *defaults")
            return []
        return nodes

    def _scalar(self, event: Any) -> Any:
        text = event.value
        if not event.implicit[0]:
            return text
        if text in _WORDS:
            return _WORDS[text]
        try:
            return _number(text)
        except (OverflowError, ValueError):
            self._add(
                event, f"{text[:40]} is not a finite number", "leave the key out for its default, or give a number"
            )
            return 0

    def _add(self, event: Any, message: str, hint: str) -> None:
        place = self._place(event.start_mark.line, event.start_mark.column)
        problem = Problem(message, *place, hint)
        if problem not in self.problems:
            self.problems.append(problem)

    def _place(self, line: int, column: int) -> Place:
        return Place(self.file, line + 1, column + 1) if self.lines else Place(self.file)


def _number(text: str) -> int | float | str:
    """The number that a plain scalar is, else the text itself; ValueError or OverflowError unless finite."""
    if _INT.fullmatch(text):
        return int(text.replace("_", ""))
    if _BASED_INT.fullmatch(text):
        return int(text.replace("_", ""), 0)
    if _FLOAT.fullmatch(text):
        return _whole(float(text.replace("_", "")))
    if _NOT_FINITE.fullmatch(text):
        raise ValueError(text)
    return text


def _whole(value: float) -> int | float:
    """`value`, as an int where it is one, so that 1e9 can be a count; ValueError unless finite."""
    if not math.isfinite(value):
        raise ValueError(value)
    return int(value) if value.is_integer() and abs(value) < 2**53 else value


def _from_data(value: Any, place: Place, path: tuple[str | int, ...], problems: list[Problem]) -> Node:
    where = ".".join(map(str, path)) or "the scenario"
    if len(path) > MAX_DEPTH:
        problems.append(Problem(f"{where[:80]}...: more than {MAX_DEPTH} levels deep", *place))
    elif isinstance(value, Mapping):
        return Node({str(k): replace(_from_data(v, place, (*path, str(k)), problems), key_place=place)
                     for k, v in value.items()}, place)  # fmt: skip
    elif isinstance(value, list | tuple):
        return Node([_from_data(v, place, (*path, i), problems) for i, v in enumerate(value)], place)
    elif isinstance(value, Path):
        return Node(str(value), place)
    elif value is None or isinstance(value, str | bool | int):
        return Node(value, place)
    elif hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return _from_data(value.item(), place, path, problems)
    elif isinstance(value, float) and math.isfinite(value):
        return Node(_whole(value), place)
    else:
        problems.append(Problem(f"{where}: {value!r:.60} is not plain data", *place,
                                "use finite numbers, text, lists and mappings"))  # fmt: skip
    return Node(None, place)
