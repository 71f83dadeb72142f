"""The catalogues that ship with MIST, and a user's own devices, models and engines, as values.

The schema asks here for whatever a scenario names: a catalogue entry, a file beside the scenario, or a mapping written
in place. It reads only what is asked for, and never decides what a figure means: that is the value's own class.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from mist.cost import PriceList
from mist.engine import EngineProfile
from mist.errors import Problem, ScenarioError, nearest
from mist.hardware import Device
from mist.memory.tier import MemoryTier
from mist.model import ModelSpec
from mist.perf.step_profile import StepProfile
from mist.scenario.nodes import parse
from mist.scenario.source import KeyPath, Source, read_file
from mist.speculation import AcceptedLengths

_LIKE_A_PATH = re.compile(r"^[./~]|\.(ya?ml|json)(\.gz)?$|\\")


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of a catalogue; `aliases` are the other names that a scenario may use.

    `checkpoints`: of these, the names of a model's checkpoints in other dtypes than its own, with the dtype.
    """

    name: str
    aliases: tuple[str, ...]
    source: Source
    checkpoints: Mapping[str, str] = field(default_factory=dict)

    def checkpoint_dtype(self, name: str) -> str | None:
        """The dtype of the checkpoint that is called `name` (in any case); None leaves it to the entry."""
        return next((dtype for alias, dtype in self.checkpoints.items() if alias.lower() == name.lower()), None)


def entries(kind: str) -> list[Entry]:
    """All entries of a catalogue, by name."""
    return list(_catalogue(kind))


def names(kind: str) -> list[str]:
    """The names of a catalogue's entries, sorted."""
    return [entry.name for entry in _catalogue(kind)]


def aliases(kind: str) -> frozenset[str]:
    """The names and aliases of a catalogue's entries, in lower case."""
    return frozenset(_index(kind))


def canonical(kind: str, name: str) -> str | None:
    """The name of the entry that is called `name`, in any case; None where none is."""
    entry = _index(kind).get(name.lower())
    return entry.name if entry else None


def read(kind: str, given: str | Mapping[str, Any], folder: Path) -> tuple[Any, str | dict[str, Any]]:
    """What `given` means: its value, and the form in which it can be written anywhere (a catalogue name or a mapping).

    A text is a name or alias of the catalogue, else a path looked up in `folder`; the value is a Device, ModelSpec,
    EngineProfile, StepProfile, MemoryTier, AcceptedLengths or PriceList, for workloads the mapping
    itself. ScenarioError lists all problems; those of a mapping given in place have no file, and their messages begin
    with the key.
    """
    if isinstance(given, Mapping):
        return _build(kind, given, "inline"), dict(given)
    entry = _entry(kind, given)
    if entry is not None:
        value = _shipped(kind, entry) if kind in _VALUES else _build_from(kind, entry.source, entry.name)
        if dtype := entry.checkpoint_dtype(given):
            value = replace(value, checkpoint_dtype=dtype)
        return value, entry.name
    path = _file(kind, given, folder)
    source = _readable(path)
    name = path.parent.name if path.name == "config.json" else path.stem
    return _build_from(kind, source, name), {"name": name, **source.data()}


def mapping(kind: str, given: str | Mapping[str, Any]) -> dict[str, Any]:
    """The mapping behind a name of the catalogue; one written in place is itself."""
    if isinstance(given, Mapping):
        return dict(given)
    entry = _entry(kind, given)
    if entry is None:
        raise KeyError(given)
    return entry.source.data()


@functools.cache
def digest(name: str) -> str:
    """What the entries of all catalogues that are called `name` say, as a short text; empty where none is."""
    found = [str(entry.source.data()) for kind in _BUILDERS if (entry := _index(kind).get(name.lower())) is not None]
    return hashlib.sha256("".join(found).encode()).hexdigest() if found else ""


def key_of(message: str, data: Any) -> tuple[KeyPath, str]:
    """The key of `data` that a message begins with, as a path (empty if none), and the message without its title."""
    title, colon, rest = message.partition(": ")
    for text in (rest, message) if colon else (message,):
        path: KeyPath = tuple(re.split(r"[\s:]", text, maxsplit=1)[0].split("."))
        if isinstance(data, Mapping) and path[0] in data:
            return path, text
    return (), rest if colon and " " not in title else message


def _entry(kind: str, given: str) -> Entry | None:
    """The entry of that name or alias, in any case; None if there is none.

    A file is called by one of its entry's names, so that for those no other file is read.
    """
    file = f"{given.lower()}.yaml"
    return _read(kind, file) if file in _files(kind) else _index(kind).get(given.lower())


@functools.cache
def _files(kind: str) -> frozenset[str]:
    return frozenset(file.name for file in (files("mist") / "data" / kind).iterdir() if file.name.endswith(".yaml"))


@functools.cache
def _read(kind: str, file: str) -> Entry:
    text = (files("mist") / "data" / kind / file).read_text(encoding="utf-8")
    source = Source(parse(text, f"mist/data/{kind}/{file}"), Path())
    data = source.data()
    name, checkpoints = str(data.get("id") or data["name"]), data.get("checkpoints") or {}
    return Entry(name, (*(data.get("aliases") or ()), *checkpoints), source, checkpoints)


@functools.cache
def _catalogue(kind: str) -> tuple[Entry, ...]:
    found = [_read(kind, file) for file in sorted(_files(kind))]
    return tuple(sorted(found, key=lambda entry: entry.name))


@functools.cache
def _index(kind: str) -> dict[str, Entry]:
    """Every name and alias in lower case; a name comes before another entry's alias."""
    index: dict[str, Entry] = {}
    for entry in _catalogue(kind):
        for alias in entry.aliases:
            index.setdefault(alias.lower(), entry)
    return index | {entry.name.lower(): entry for entry in _catalogue(kind)}


def _file(kind: str, given: str, folder: Path) -> Path:
    try:
        path = folder / Path(given).expanduser()
        if path.is_dir():
            path = path / "config.json" if kind == "models" else path
        if path.exists():
            return path
    except (OSError, RuntimeError, ValueError):  # too long for a name, no home folder, a zero byte
        path = folder
    what = {
        "steps": "step profile",
        "memories": "memory",
        "acceptance": "measured acceptance",
        "prices": "list of prices",
    }.get(kind, kind.removesuffix("s"))
    if _LIKE_A_PATH.search(given):
        raise ScenarioError(
            Problem(f"there is no {what} file {str(path)!r}", hint="paths start at the scenario's folder")
        )
    hint = nearest(given, {entry.name for entry in _catalogue(kind)} | set(_index(kind)))
    if not hint.startswith("did"):
        hint = f"known: {', '.join(names(kind))}; or give the path of a file"
    raise ScenarioError(Problem(f"there is no {what} {given!r} in the catalogue", hint=hint))


def _readable(path: Path) -> Source:
    """The file at `path`; one that can't be read at all is a problem of whoever names it."""
    try:
        return read_file(path)
    except ScenarioError as error:
        raise ScenarioError(
            p if p.line else Problem(f"{p.file}: {p.message}", hint=p.hint or "name a file that can be read")
            for p in error.problems
        ) from None


def _shipped(kind: str, entry: Entry) -> Any:
    """The value of a catalogue's own entry, which is built once: many scenarios of a search name the same few."""
    if (kind, entry.name) not in _built:
        _built[kind, entry.name] = _build_from(kind, entry.source, entry.name)
    return _built[kind, entry.name]


def _build_from(kind: str, source: Source, name: str) -> Any:
    """The value in a file, with problems placed in it."""
    data = source.data()
    try:
        return _build(kind, data, name)
    except ScenarioError as error:
        problems = []
        for problem in error.problems:
            path, message = key_of(problem.message, data)
            problems.append(source.problem(path, message, problem.hint or f"see {_example(kind)}"))
        raise ScenarioError(problems) from None


def _build(kind: str, data: Any, name: str) -> Any:
    if not isinstance(data, Mapping):
        raise ScenarioError(Problem("must be a mapping", hint=f"see {_example(kind)}"))
    try:
        return _BUILDERS[kind]({"name": name, **data})
    except ValueError as error:
        title, _, rest = str(error).partition(": ")
        raise ScenarioError([Problem(text) for text in (rest or title).split("; ")]) from None
    except (TypeError, AttributeError) as error:
        raise ScenarioError(Problem(f"a value has the wrong type: {error}", hint=f"see {_example(kind)}")) from None


def _model(data: Mapping[str, Any]) -> ModelSpec:
    """A model from a catalogue entry (its `config` within), or from a Hugging Face config itself."""
    config = data.get("config", data)
    if not isinstance(config, Mapping):
        raise ScenarioError(Problem("config must be a mapping", hint="the contents of a Hugging Face config.json"))
    return ModelSpec.from_hf_config(str(data.get("id") or data["name"]), config)


def _prices(data: Mapping[str, Any]) -> PriceList:
    """A list of prices, with devices under the names of their entries, which their files have too."""
    prices, known = PriceList.from_mapping(data), _files("devices")

    def name_of(device: str) -> str:
        return device if f"{device}.yaml" in known else canonical("devices", device) or device

    return replace(prices, devices={name_of(device): price for device, price in prices.devices.items()})


def _example(kind: str) -> str:
    return {
        "devices": "`mist list devices`; a device is {name, peak_tflops: {bf16: 500}, memory_bytes: 64 GiB, "
        "memory_bytes_per_s: 2 TB/s}",
        "models": "`mist list models`; a model is the contents of a Hugging Face config.json",
        "memories": "`mist list memories`; a memory is {name, capacity_bytes: 2 TB, bytes_per_s: 25 GB/s, "
        "latency_ns: 0.1 ms}",
        "acceptance": "`mist list acceptance`; a measured acceptance is {name, accepted_lengths: [1.8, 2.4, 2.8]}, "
        "tokens per step with 1, 2, 3 drafted",
        "prices": "`mist list prices`; a list of prices is {name, devices: {h100-sxm: 2.5}}, USD per device-hour",
    }.get(kind, f"`mist list {kind}`")


_BUILDERS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "devices": Device.from_mapping,
    "models": _model,
    "engines": EngineProfile.from_mapping,
    "steps": StepProfile.from_mapping,
    "memories": MemoryTier.from_mapping,
    "acceptance": AcceptedLengths.from_mapping,
    "workloads": dict,
    "networks": dict,
    "prices": _prices,
}
#: kinds whose entries are values, and not mappings that whoever reads them may change
_VALUES = frozenset(_BUILDERS) - {"workloads", "networks"}
_built: dict[tuple[str, str], Any] = {}
