"""The scenario as a value: validated, complete, with every default in it, and able to point at its own source.

What `build` turns into a run. It is made from a file, a mapping or keywords; all problems are raised at once as a
`ScenarioError`. It never changes, holds no policy instance, and writes itself as a YAML that gives the same run.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError

from mist.errors import Problem, ScenarioError, nearest
from mist.memory.tier import BACK
from mist.request import DECODE, PREFILL
from mist.scenario import catalogue
from mist.scenario.clients import Pool
from mist.scenario.hosts import HostPool
from mist.scenario.memory import Memory, misfits
from mist.scenario.memory_groups import forks
from mist.scenario.named import Located, Section, Spec
from mist.scenario.network import Network, numbered
from mist.scenario.nodes import is_text
from mist.scenario.placement import Placement, place
from mist.scenario.pools import AnyClient
from mist.scenario.schema import ScenarioFile, Slo, Workload
from mist.scenario.source import KeyPath, Source, key_path, override, read_file, read_mapping
from mist.scenario.stores import StorePool
from mist.speculation import AcceptedLengths
from mist.workload.trace import find_trace

if TYPE_CHECKING:
    from mist.scenario.result import Result


@dataclass(frozen=True, init=False, eq=False)
class Scenario:
    """A validated scenario; made by `load`, `from_mapping`, or from its sections as keywords.

    `stages` are the kinds that the pipeline may yield; `routing` has a policy for each, but for its delays. `placement`
    says where clients are; None where the network has no nodes. `window_s` is (start, end).
    Two scenarios are equal when their resolved forms are.
    """

    name: str
    seed: int
    workload: Workload
    pipeline: Spec
    stages: tuple[str, ...]
    clients: Mapping[str, AnyClient]
    memories: Mapping[str, Memory]
    routing: Mapping[str, Spec]
    network: Network
    placement: Placement | None
    slo: Slo
    warmup_s: float
    window_s: tuple[float, float] | None
    max_time_s: float | None
    source: Source

    def __init__(self, **sections: Any) -> None:
        self._complete(read_mapping(sections))

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any], *, folder: Path | None = None) -> Scenario:
        """The scenario in a mapping; relative paths start at `folder`, by default the current one."""
        return cls.from_source(read_mapping(mapping, folder=folder))

    @classmethod
    def from_source(cls, source: Source) -> Scenario:
        """The scenario that was written; ScenarioError with all of its problems."""
        scenario = cls.__new__(cls)
        scenario._complete(source)
        return scenario

    @property
    def pools(self) -> dict[str, Pool]:
        """Those of the clients that run a model."""
        return {name: pool for name, pool in self.clients.items() if isinstance(pool, Pool)}

    @property
    def hosts(self) -> dict[str, HostPool]:
        """Those that don't."""
        return {name: pool for name, pool in self.clients.items() if isinstance(pool, HostPool)}

    @property
    def stores(self) -> dict[str, StorePool]:
        """Those that are KV stores."""
        return {name: pool for name, pool in self.clients.items() if isinstance(pool, StorePool)}

    @property
    def store_users(self) -> dict[str, Pool]:
        """Those that fetch from KV stores and write to them: all that compute prompts, where there is a store."""
        computing = {name: pool for name, pool in self.pools.items() if PREFILL in pool.serves}
        return {name: pool for name, pool in computing.items() if not pool.model.is_encoder} if self.stores else {}

    def memory_of(self, store: StorePool) -> Memory:
        """What a KV store keeps KV caches in."""
        return self.memories.get(store.memory) or Memory.model_validate({"memory": store.memory})

    @property
    def folder(self) -> Path:
        """Where relative paths start."""
        return self.source.folder

    def run(self, *, check: bool = False) -> Result:
        """Simulate it to the end; `check` recounts every conservation law on the way."""
        from mist.scenario.build import run

        return run(self, check=check)

    def problem(self, path: KeyPath, message: str, hint: str = "") -> Problem:
        """A problem with what was written at `path`, such as ("clients", "gpu", "tp"), for a ScenarioError."""
        return self.source.problem(path, message, hint)

    def trace_path(self) -> Path:
        """The trace file; ScenarioError where it isn't, or where the workload has none."""
        try:
            return find_trace(self.workload.trace or "", self.folder, os.environ)
        except ScenarioError as error:
            raise ScenarioError(
                self.problem(("workload", "trace"), p.message, p.hint) for p in error.problems
            ) from None

    def resolved(self) -> dict[str, Any]:
        """Every value of the scenario, defaults included, as plain data that reads back as this scenario anywhere.

        Names of catalogues stay names, files of devices, models and engines are written in place, and a trace found
        beside the scenario gets its whole path.
        """
        return _without_none(
            {
                "name": self.name,
                "seed": self.seed,
                "workload": self._resolved_workload(),
                "pipeline": self.pipeline.plain(),
                "clients": {name: self._resolved_client(name) for name in self.clients},
                "memories": {name: self._resolved_memory(name) for name in self.memories} or None,
                "routing": {stage: spec.plain() for stage, spec in self.routing.items()},
                "network": self._resolved_network() or None,
                "slo": {metric: targets for metric, targets in self.slo.model_dump().items() if targets},
                "warmup_s": self.warmup_s,
                "window_s": self.window_s and list(self.window_s),
                "max_time_s": self.max_time_s,
            }
        )

    def to_yaml(self) -> str:
        """The resolved scenario as YAML."""
        return to_yaml(self.resolved())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Scenario) and self.resolved() == other.resolved()

    def __hash__(self) -> int:
        return hash((self.name, self.seed, tuple(self.clients)))

    def _complete(self, source: Source) -> None:
        """Fill the fields of this still empty instance from what was written."""
        data = source.data()
        if not isinstance(data, dict):
            hint = "the keys are " + ", ".join(ScenarioFile.model_fields)
            raise ScenarioError(source.problem((), "a scenario is a mapping of sections", hint))
        try:
            file = ScenarioFile.model_validate(data, context={"folder": source.folder})
        except ValidationError as error:
            raise ScenarioError(_problems(error, source)) from None
        stages, delays = tuple(dict.fromkeys(file.pipeline.build().kinds)), delays_of(file.pipeline)
        named = file.routing
        every = named.get("") or Spec("routing", "least_outstanding")
        fields: dict[str, Any] = {key: getattr(file, key) for key in ScenarioFile.model_fields if key != "perf"}
        fields |= {
            "name": file.name or source.name,
            "source": source,
            "stages": stages,
            "clients": {name: _with_perf(client, file.perf) for name, client in file.clients.items()},
            "routing": {stage: named.get(stage, every) for stage in stages if stage not in delays},
            "window_s": _window(file),
        }
        placed = self._place(file.network, fields["clients"]) if file.network.has_nodes else None
        fields["placement"] = placed if isinstance(placed, Placement) else None
        if isinstance(placed, Placement):
            fields["network"] = placed.network
        for key, value in fields.items():
            object.__setattr__(self, key, value)
        misplaced = placed if isinstance(placed, list) else []
        found = [_placed(source, loc, p.message, p.hint) for loc, p in [*self._conflicts(file), *misplaced]]
        if found:
            raise ScenarioError(found)

    @staticmethod
    def _place(network: Network, clients: Mapping[str, AnyClient]) -> Placement | list[Located]:
        hint = "give it the CPU whose host it is on, such as device: epyc-9554"
        nowhere: list[Located] = [
            (("clients", name), Problem("a KV store in a network with nodes is on one of them", hint=hint))
            for name, client in clients.items()
            if client.device is None
        ]
        return nowhere or place(network, clients)

    def _conflicts(self, file: ScenarioFile) -> Iterator[Located]:
        """What doesn't go together between sections."""
        served = {stage for client in self.clients.values() for stage in client.serves}
        delays = delays_of(self.pipeline)
        for stage in self.stages:
            if stage not in served and stage not in delays:
                hint = f"add it to `serves` of a client; they serve {', '.join(sorted(served))}"
                yield ("pipeline",), Problem(f"no client serves the stage {stage!r}", hint=hint)
        if DECODE in self.stages and PREFILL not in self.stages:
            yield ("pipeline",), Problem("decode needs a prefill before it", hint="such as [prefill, decode]")
        for stage in file.routing:
            if stage in delays:
                message = f"the stage {stage!r} is a delay, which no client serves"
                yield ("routing", stage), Problem(message, hint="leave it out")
            elif stage and stage not in self.stages:
                message = f"the pipeline has no stage {stage!r}"
                yield ("routing", stage), Problem(message, hint=nearest(stage, self.stages))
        for name, serves in ((name, client.serves) for name, client in self.clients.items()):
            yield from self._unknown_stages(name, serves)
        for name, client in self.pools.items():
            yield from self._client_conflicts(name, client)
            for at, found in misfits(client.kv_cache.tiers, self.memories):
                yield ("clients", name, "kv_cache", "tiers", *at), found
        yield from self._memory_conflicts()
        yield from self._same_names()
        if self.window_s is not None and self.warmup_s > self.window_s[0]:
            message = f"the warm-up of {self.warmup_s:g} s ends after the window begins"
            yield ("window_s",), Problem(message, hint="let the window begin later, or leave warmup_s out")

    def _same_names(self) -> Iterator[Located]:
        """Pools of which replicas would be called the same: gpu-0 of a pool gpu, and a pool gpu-0."""
        owner: dict[str, str] = {}
        for pool, client in self.clients.items():
            for name in numbered(pool, client.count):
                if owner.setdefault(name, pool) != pool:
                    message = f"{owner[name]} has a replica {name!r} already"
                    yield ("clients", pool), Problem(message, hint="call the pool otherwise")
                    break

    def _unknown_stages(self, name: str, serves: Iterable[str]) -> Iterator[Located]:
        known, delays = {PREFILL, DECODE, *self.stages}, delays_of(self.pipeline)
        for index, stage in enumerate(serves):
            if stage in delays:
                message = f"the stage {stage!r} is a delay, which no client serves"
                yield ("clients", name, "serves", index), Problem(message, hint="leave it out")
            elif stage not in known:
                message = f"there is no stage {stage!r}"
                yield ("clients", name, "serves", index), Problem(message, hint=nearest(stage, known))

    def _client_conflicts(self, name: str, client: Pool) -> Iterator[Located]:
        if client.model.is_encoder and DECODE in self.stages and DECODE in client.serves:
            message = f"{client.model.name} is an encoder: it decodes nothing"
            yield ("clients", name, "model"), Problem(message, hint="take a decoder, or pipeline: [prefill]")
        if client.hands_over(self.stages):
            yield from self._hand_over_conflicts(name, client)

    def _memory_conflicts(self) -> Iterator[Located]:
        """Memories that nobody has a place for, and KV stores of what can't be exchanged."""
        for name, memory in self.memories.items():
            if memory.per in ("node", "rack") and not self.network.has_nodes:
                message = f"per: {memory.per}, and the network has no {memory.per}s"
                hint = "give network a preset or nodes, or take per: client, per: cluster or shared_by: N"
                yield ("memories", name, "per"), Problem(message, hint=hint)
        yield from forks(self.pools, self.memories, self.placement)
        for name, store in self.stores.items():
            if store.memory not in self.memories and store.memory.lower() not in catalogue.aliases("memories"):
                known = [*self.memories, *catalogue.names("memories")]
                message = f"there is no memory {store.memory!r}"
                yield ("clients", name, "memory"), Problem(message, hint=nearest(store.memory, known))
            elif self.memory_of(store).write == BACK:
                message = f"{store.memory} is written back, and a KV store is told what was computed"
                yield ("clients", name, "memory"), Problem(message, hint="let it be write: through")
        layouts: dict[tuple[Any, ...], str] = {}
        for name, pool in self.store_users.items():
            if layouts.setdefault(pool.kv_layout, name) != next(iter(layouts.values())):
                first = next(iter(layouts.values()))
                message = f"a KV store is of one model and kv_dtype, and {name} has others than {first}"
                yield ("clients", name, "model"), Problem(message, hint="give both the same, or use tiers")

    def _hand_over_conflicts(self, name: str, client: Pool) -> Iterator[Located]:
        """What keeps the KV caches of this client from being decoded elsewhere."""
        for other_name, other in self.pools.items():
            if DECODE not in other.serves:
                continue
            if other.model.layers != client.model.layers:
                message = f"{name} hands KV caches of {client.model.name} over to {other_name}, which has another model"
                yield ("clients", other_name, "model"), Problem(message, hint="give both the same model")
            if other.batching.name == "static":
                message = f"{other_name} takes decodes over from {name} one by one, which no static batch can"
                yield ("clients", other_name, "batching"), Problem(message, hint="take chunked or continuous")

    def _resolved_workload(self) -> dict[str, Any]:
        plain = {"format" if key == "columns" else key: value for key, value in _plain(self.workload).items()}
        trace = self.workload.trace
        if trace is not None and (self.folder / trace).is_file():
            plain["trace"] = str((self.folder / trace).resolve())
        return plain

    def _resolved_network(self) -> dict[str, Any]:
        """With the nodes that there are and who is on them; a host's device is written as the user did."""
        plain: dict[str, Any] = _plain(self.network)
        pools = {each.device.name: name for name, each in self.clients.items() if each.device}
        for group, node in plain.get("nodes", {}).items():
            if host := node.get("host"):
                path: KeyPath = ("network", "nodes", group, "host")
                made = self.source.data().get("network", {}).get("nodes") is None
                path = ("clients", pools[host.name], "device") if made else path
                node["host"] = catalogue.read("devices", self.source.at(path), self.folder)[1]
        return plain

    def _resolved_memory(self, name: str) -> dict[str, Any]:
        plain: dict[str, Any] = _plain(self.memories[name])
        if "memory" in plain:
            plain["memory"] = catalogue.read("memories", self.source.at(("memories", name, "memory")), self.folder)[1]
        if "hit_rate" in plain:  # which nothing that is written goes with
            plain = {key: value for key, value in plain.items() if key not in ("eviction", "write")}
        return plain

    def _resolved_client(self, name: str) -> dict[str, Any]:
        plain: dict[str, Any] = _plain(self.clients[name])
        for key in plain.keys() & {"device", "model", "engine"}:
            try:
                given = self.source.at(("clients", name, key))
            except KeyError:
                given = self.pools[name].engine.name  # the only one of them that may be left out
            plain[key] = catalogue.read(f"{key}s", given, self.folder)[1]
        if "draft_model" in (speculation := plain.get("speculation", {})):
            given = self.source.at(("clients", name, "speculation", "draft_model"))
            speculation["draft_model"] = catalogue.read("models", given, self.folder)[1]
        if isinstance(speculation.get("acceptance"), AcceptedLengths):
            given = self.source.at(("clients", name, "speculation", "acceptance"))
            speculation["acceptance"] = catalogue.read("acceptance", given, self.folder)[1]
        return plain


def load(scenario: str | Path | Mapping[str, Any] | Scenario, sets: Iterable[str] = (), **overrides: Any) -> Scenario:
    """The scenario in a YAML file (or a mapping) with `sets` ("path=value") and then `overrides` applied.

    An override's name is a dotted path, such as seed=3 or **{"clients.gpu.tp": 2}. Raises ScenarioError with all
    problems found.
    """
    if isinstance(scenario, Scenario):
        source = scenario.source
    elif isinstance(scenario, Mapping):
        source = read_mapping(scenario)
    elif isinstance(scenario, str | Path):
        source = read_file(scenario)
    else:
        given = f"a scenario can't be {scenario!r:.60}"
        raise ScenarioError(Problem(given, hint="give the path of a YAML file, a mapping, or a Scenario"))
    source = override(source, sets)
    for dotted, value in overrides.items():
        source = source.with_value(key_path(dotted), value, f"{dotted}={value}")
    return Scenario.from_source(source)


def to_yaml(resolved: Mapping[str, Any]) -> str:
    """A resolved scenario as YAML that reads back as the same values."""
    text: str = yaml.dump(
        dict(resolved), Dumper=_Dumper, sort_keys=False, default_flow_style=None, allow_unicode=True, width=100
    )
    return text


class _Dumper(yaml.SafeDumper):
    """Quotes the texts that would read back as something else."""


def _represent_text(dumper: _Dumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, None if is_text(text) else "'")


_Dumper.add_representer(str, _represent_text)


def _problems(error: ValidationError, source: Source) -> list[Problem]:
    """The problems of a validation at their places; those found in other files have one already."""
    found = []
    for each in error.errors():
        context = each["ctx"]
        if context["place"]:
            file, line, column = context["place"]
            found.append(Problem(context["message"], file, line, column, context["hint"]))
            continue
        found.append(_placed(source, each["loc"], context["message"], context["hint"], key=context["key"]))
    return sorted(dict.fromkeys(found), key=lambda p: (p.file, p.line, p.column))


def _placed(source: Source, loc: KeyPath, message: str, hint: str, *, key: bool = False) -> Problem:
    """A problem at what was written at `loc`; its message begins with the path, unless its place is an option's."""
    path = tuple(part for part in loc if part != "" and not str(part).startswith("["))
    where = ".".join(map(str, path))
    placed = source.problem(path, message, hint, key=key or "[key]" in loc)
    option = placed.file.removeprefix("--set ").partition("=")[0]
    return placed if where in ("", option) else replace(placed, message=f"{where}: {message}")


def _with_perf(client: AnyClient, perf: list[Spec]) -> AnyClient:
    return client if isinstance(client, StorePool) or client.perf else client.model_copy(update={"perf": perf})


def delays_of(pipeline: Spec) -> tuple[str, ...]:
    """The stage kinds of a pipeline that are delays."""
    return tuple(getattr(pipeline.build(), "delays", ()))


def _window(file: ScenarioFile) -> tuple[float, float] | None:
    if file.window_s is None:
        return None
    start, end = file.window_s
    return (file.warmup_s, file.warmup_s + end) if start is None else (start, end)


def _plain(value: Any) -> Any:
    """A section as plain data, without what was left out and without values of catalogues."""
    if isinstance(value, Spec):
        return value.plain()
    if isinstance(value, Section):
        return _without_none({key: _plain(getattr(value, key)) for key in type(value).model_fields})
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _without_none(mapping: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if value is not None}
