"""The scenario as a value: validated, complete, with every default in it, and able to point at its own source.

What `build` turns into a run. It is made from a file, a mapping or keywords; all problems are raised at once as a
`ScenarioError`. It never changes, holds no policy instance, and writes itself as a YAML that gives the same run.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError

from mist.errors import Problem, ScenarioError
from mist.request import DECODE, PREFILL
from mist.scenario import catalogue
from mist.scenario.clients import Pool
from mist.scenario.conflicts import conflicts
from mist.scenario.events import EventSection
from mist.scenario.hand_over import HandOver
from mist.scenario.hosts import HostPool
from mist.scenario.memory import Memory
from mist.scenario.named import Located, Section, Spec
from mist.scenario.network import Network, numbered
from mist.scenario.nodes import is_text
from mist.scenario.placement import Placement, place
from mist.scenario.pools import AnyClient
from mist.scenario.prices import Energy, Prices
from mist.scenario.schema import ScenarioFile, Workload
from mist.scenario.source import KeyPath, Source, key_path, override, read_file, read_mapping
from mist.scenario.stores import StorePool
from mist.scenario.tenancy import SOLE, Tenancy, tenancies
from mist.speculation import AcceptedLengths
from mist.workload.trace import find_trace

if TYPE_CHECKING:
    from mist.scenario.result import Result


@dataclass(frozen=True, init=False, eq=False)
class Scenario:
    """A validated scenario; made by `load`, `from_mapping`, or from its sections as keywords.

    `tenants` have all that they were left out of; one without a name, `SOLE`, is the whole workload where the scenario
    names none. `stages` are the kinds that their pipelines may yield; `routing` has a policy for each, but for delays.
    `placement` says where clients are, None where the network has no nodes. `window_s` is (start, end).
    Two scenarios are equal when their resolved forms are.
    """

    name: str
    seed: int
    tenants: Mapping[str, Tenancy]
    clients: Mapping[str, AnyClient]
    memories: Mapping[str, Memory]
    routing: Mapping[str, Spec]
    network: Network
    hand_over: HandOver
    placement: Placement | None
    events: Sequence[EventSection]
    prices: Prices
    energy: Energy
    warmup_s: float
    window_s: tuple[float, float] | None
    max_time_s: float | None
    view_refresh_s: float
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
    def stages(self) -> tuple[str, ...]:
        """The stage kinds that any tenant's requests may go through."""
        return tuple(dict.fromkeys(kind for tenant in self.tenants.values() for kind in tenant.stages))

    def clients_of(self, tenant: str, stage: str | None = None) -> dict[str, AnyClient]:
        """Those that a tenant may use, all or those that serve a stage."""
        wanted = self.tenants[tenant].clients
        return {
            name: client
            for name, client in self.clients.items()
            if (wanted is None or name in wanted) and (stage is None or stage in client.serves)
        }

    def decoders_of(self, name: str) -> dict[str, Pool]:
        """The other pools that decode from the KV caches that the pool `name` computes and hands over."""
        found: dict[str, AnyClient] = {}
        for tenant, section in self.tenants.items():
            if name in self.clients_of(tenant) and self.pools[name].hands_over(section.stages):
                found |= self.clients_of(tenant, DECODE)
        group, in_order = self.pools[name].group, self.pools.items()  # of the file
        return {n: pool for n, pool in in_order if n in found and pool.group == group}

    def users_of(self, store: str) -> dict[str, Pool]:
        """Those that fetch from a KV store and write to it: all that compute prompts of requests that ask it."""
        asking = [n for n in self.tenants if any(store in self.clients_of(n, s) for s in self.tenants[n].stages)]
        found = {name for tenant in asking for name in self.clients_of(tenant, PREFILL)}
        return {name: pool for name, pool in self.pools.items() if name in found and not pool.model.is_encoder}

    def replicas_called(self, name: str) -> list[str]:
        """The replica of that name, or those of the pool; none where nothing is called so."""
        if name in self.clients:
            return numbered(name, self.clients[name].count)
        return [name] if any(name in numbered(pool, each.count) for pool, each in self.clients.items()) else []

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
        return _placed(self.source, path, message, hint)

    def trace_path(self, tenant: str = SOLE) -> Path:
        """A tenant's trace file; ScenarioError where it isn't, or where the workload has none."""
        section = self.tenants[tenant]
        try:
            return find_trace(section.workload.trace or "", self.folder, os.environ)
        except ScenarioError as error:
            place = (*section.place, "workload", "trace")
            raise ScenarioError(self.problem(place, p.message, p.hint) for p in error.problems) from None

    def resolved(self) -> dict[str, Any]:
        """Every value of the scenario, defaults included, as plain data that reads back as this scenario anywhere.

        Names of catalogues stay names, files of devices, models and engines are written in place, and a trace found
        beside the scenario gets its whole path.
        """
        tenants = self._resolved_tenants()
        slo = tenants.pop("slo", None)
        return _without_none(
            {
                "name": self.name,
                "seed": self.seed,
                **tenants,
                "clients": {name: self._resolved_client(name) for name in self.clients},
                "memories": {name: self._resolved_memory(name) for name in self.memories} or None,
                "routing": {stage: spec.plain() for stage, spec in self.routing.items()},
                "network": self._resolved_network() or None,
                "hand_over": _plain(self.hand_over),
                "events": [_plain(each) for each in self.events] or None,
                "slo": slo,
                "prices": _plain(self.prices),
                "energy": _plain(self.energy),
                "warmup_s": self.warmup_s,
                "window_s": self.window_s and list(self.window_s),
                "max_time_s": self.max_time_s,
                "view_refresh_s": self.view_refresh_s or None,
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
        if {"scenario", "space"} <= set(data):
            message = "this is a search space, not a scenario"
            raise ScenarioError(source.problem((), message, "give it to `mist search`, or name the scenario in it"))
        try:
            file = ScenarioFile.model_validate(data, context={"folder": source.folder})
        except ValidationError as error:
            raise ScenarioError(_problems(error, source)) from None
        tenants = tenancies(file)
        stages = dict.fromkeys(kind for tenant in tenants.values() for kind in tenant.stages)
        delays = {kind for tenant in tenants.values() for kind in tenant.delays}
        named = file.routing
        every = named.get("") or Spec("routing", "least_outstanding")
        own = (
            "name",
            "seed",
            "memories",
            "network",
            "hand_over",
            "events",
            "prices",
            "energy",
            "warmup_s",
            "max_time_s",
            "view_refresh_s",
        )
        fields: dict[str, Any] = {key: getattr(file, key) for key in own}
        fields |= {
            "name": file.name or source.name,
            "source": source,
            "tenants": tenants,
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
        found = [_placed(source, loc, p.message, p.hint) for loc, p in [*conflicts(self, file), *misplaced]]
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

    def _resolved_tenants(self) -> dict[str, Any]:
        """A workload with its pipeline and SLO, or several under `tenants`."""
        plain: dict[str, dict[str, Any]] = {
            name: {
                "workload": self._resolved_workload(tenant.workload),
                "pipeline": tenant.pipeline.plain(),
                "slo": {metric: targets for metric, targets in tenant.slo.model_dump().items() if targets},
            }
            for name, tenant in self.tenants.items()
        }
        for name, tenant in self.tenants.items():
            if tenant.admission:
                plain[name]["admission"] = [spec.plain() for spec in tenant.admission]
        if SOLE in plain:
            return plain[SOLE]
        for name, tenant in self.tenants.items():
            plain[name]["priority"] = tenant.priority
            if tenant.clients is not None:
                plain[name]["clients"] = list(tenant.clients)
        return {"tenants": plain}

    def _resolved_workload(self, workload: Workload) -> dict[str, Any]:
        plain = {"format" if key == "columns" else key: value for key, value in _plain(workload).items()}
        trace = workload.trace
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
