"""What a user wrote: a scenario's file, mapping and options as plain data that can be pointed at.

The first thing that happens to a user's YAML (plain or gzipped), to a Python mapping and to `--set path=value`; what
leaves is a `Source`, which the schema validates. It never knows what a key means.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mist.errors import Problem, ScenarioError, nearest
from mist.scenario.nodes import Node, Place, from_data, parse

MAX_BYTES = 4_000_000

#: keys and list indices from the top of the file to a value
KeyPath = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Source:
    """What a user wrote: a tree of nodes, the folder beside which relative paths are looked up, and the file's name."""

    root: Node
    folder: Path = field(default_factory=Path.cwd)
    name: str = "scenario"

    def data(self) -> dict[str, Any]:
        """The whole source as plain data: dicts, lists and scalars."""
        plain: dict[str, Any] = _plain(self.root)
        return plain

    def at(self, path: KeyPath) -> Any:
        """The plain data at `path`; KeyError where nothing was written there."""
        found, depth = self._nearest(path)
        if depth < len(path):
            raise KeyError(path)
        return _plain(found)

    def problem(self, path: KeyPath, message: str, hint: str = "", *, key: bool = False) -> Problem:
        """A problem with the value at `path` (or its `key`), placed there or at the nearest thing around it."""
        node, depth = self._nearest(path)
        place = node.place
        if node.key_place and (
            node.value is None or isinstance(node.value, dict | list) or (key and depth == len(path))
        ):
            place = node.key_place
        return Problem(message, place.file, place.line, place.column, hint)

    def with_value(self, path: KeyPath, value: Any, label: str) -> Source:
        """A copy with `value` (plain data) at `path`, placed at `label`; mappings on the way are created.

        A name on the way becomes a mapping: `batching: chunked` takes ("batching", "chunked", "max_num_seqs").
        Raises ScenarioError where the path runs through a value that holds no such key.
        """
        place = Place(label)
        return replace(self, root=_set(self.root, path, (), from_data(value, place), place))

    def _nearest(self, path: KeyPath) -> tuple[Node, int]:
        node = self.root
        for depth, key in enumerate(path):
            inner = _child(node, key)
            if inner is None and not (
                key == 0 and not isinstance(node.value, list)
            ):  # a list of one may go without [ ]
                return node, depth
            node = inner or node
        return node, len(path)


def read_file(path: str | Path) -> Source:
    """The YAML file at `path` (gzipped if it ends in .gz); ScenarioError with all of its problems."""
    path = Path(path)
    name = path.name.removesuffix(".gz").removesuffix(".yaml").removesuffix(".yml")
    return Source(parse(read_text(path), str(path)), path.parent, name)


def read_mapping(mapping: Mapping[str, Any], label: str = "scenario", folder: Path | None = None) -> Source:
    """A Python mapping as a source; ScenarioError for values that YAML could not hold."""
    return Source(from_data(mapping, Place(label)), folder or Path.cwd())


def override(source: Source, assignments: Iterable[str]) -> Source:
    """`source` with each "path=value" of `--set` applied, values read as YAML; ScenarioError lists every bad one."""
    problems: list[Problem] = []
    for text in assignments:
        label = f"--set {text}"
        dotted, equals, value = text.partition("=")
        keys = key_path(dotted.strip())
        if not equals or "" in keys:
            problems.append(Problem("not of the form path=value", label, hint="for example --set clients.gpu.tp=2"))
            continue
        try:
            node = parse(value, label, lines=False) if value.strip() else Node(None, Place(label))
            source = replace(source, root=_set(source.root, keys, (), node, Place(label)))
        except ScenarioError as error:
            problems.extend(error.problems)
    if problems:
        raise ScenarioError(problems)
    return source


def key_path(dotted: str) -> KeyPath:
    """The path in "clients.gpu.perf.0": keys, and indices of lists."""
    return tuple(int(key) if key.isdecimal() else key for key in dotted.split("."))


def read_text(path: Path, max_bytes: int = MAX_BYTES) -> str:
    """The text of a small file, gunzipped if it ends in .gz; ScenarioError where it can't be read as UTF-8."""
    name = str(path)
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            raw = stream.read(max_bytes + 1)
    except FileNotFoundError:
        raise ScenarioError(Problem("there is no such file", name, hint=_beside(path))) from None
    except IsADirectoryError:
        raise ScenarioError(Problem("this is a folder, not a file", name, hint=_inside(path))) from None
    except (OSError, EOFError, zlib.error, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ScenarioError(Problem(f"the file can't be read: {reason}", name)) from None
    if len(raw) > max_bytes:
        hint = "a trace belongs under `workload: {trace: FILE}`" if max_bytes == MAX_BYTES else ""
        raise ScenarioError(Problem(f"the file is larger than {max_bytes:,} bytes", name, hint=hint))
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = raw[: error.start]
        line, column = before.count(b"\n") + 1, error.start - before.rfind(b"\n")
        message = f"byte 0x{raw[error.start]:02x} is not UTF-8"
        raise ScenarioError(Problem(message, name, line, column, "save the file as UTF-8 text")) from None


def _plain(node: Node) -> Any:
    if isinstance(node.value, dict):
        return {key: _plain(inner) for key, inner in node.value.items()}
    if isinstance(node.value, list):
        return [_plain(inner) for inner in node.value]
    return node.value


def _child(node: Node, key: str | int) -> Node | None:
    if isinstance(node.value, dict):
        return node.value.get(str(key))
    if isinstance(node.value, list) and isinstance(key, int) and 0 <= key < len(node.value):
        inner: Node = node.value[key]
        return inner
    return None


def _set(node: Node, path: KeyPath, above: KeyPath, value: Node, place: Place) -> Node:
    """A copy of `node` with `value` at `path` below it; the rest is shared."""
    if not path:
        return replace(value, key_place=node.key_place if node.key_place == place else place)
    key, rest = path[0], path[1:]
    inner = _child(node, key) or Node(None, place, place)
    if isinstance(node.value, list) and isinstance(key, int) and key < len(node.value):
        items = list(node.value)
        items[key] = _set(inner, rest, (*above, key), value, place)
        return replace(node, value=items)
    if node.value is None or node.value == str(key):
        return replace(node, value={str(key): _set(inner, rest, (*above, key), value, place)})
    if isinstance(node.value, dict):
        return replace(node, value={**node.value, str(key): _set(inner, rest, (*above, key), value, place)})
    where, what = ".".join(map(str, above)) or "the scenario", _plain(node)
    raise ScenarioError(Problem(f"{where} is {what!r:.60}, which holds no {key!r}", *place, f"set {where} itself"))


def _beside(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"there is no folder {folder} either"
    found = [p.name for p in folder.iterdir() if p.suffix in (".yaml", ".yml", ".gz", path.suffix)]
    return nearest(path.name, found) if found else f"the folder {folder} holds no YAML file"


def _inside(path: Path) -> str:
    found = sorted(p.name for p in path.glob("*.y*ml"))[:5]
    return f"it holds {', '.join(found)}" if found else "give the YAML file itself"
