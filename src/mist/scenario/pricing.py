"""Which performance model prices a deployment: the first of a list that supports it.

Used where a run is built and where a step is explained; a `HostModel` prices clients without a model. One with a field
`fallback` gets the one behind it in the list, so that what it doesn't know is priced there; implementations never
import each other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from mist import registry
from mist.engine import EngineProfile
from mist.perf import Deployment, PerfModel
from mist.scenario import catalogue
from mist.scenario.named import Spec

#: performance models that are asked where none is named, in order
PREFERRED = ("kernels", "roofline")


@dataclass(frozen=True, slots=True)
class Priced:
    """The answer: a prepared model and its name, None if none supports the deployment; and who refused it, and why."""

    name: str
    model: PerfModel | None
    refusals: tuple[str, ...]


def runs_without_model(perf: str) -> bool:
    """Whether the performance model of this name is a `HostModel`."""
    return hasattr(registry.lookup("perf", perf), "demand")


def host_models() -> list[str]:
    """Names of all registered `HostModel`s."""
    return [name for name in registry.names("perf") if runs_without_model(name)]


def price(specs: Sequence[Spec], deployment: Deployment) -> Priced:
    """The first of `specs` that supports `deployment`, prepared for it."""
    refusals: list[str] = []
    for spec, model in zip(specs, _built(specs), strict=True):
        reason = model.supports(deployment)
        if reason is None:
            model.prepare(deployment)
            return Priced(spec.name, model, tuple(refusals))
        refusals.append(f"not by {spec.name}: {reason}")
    return Priced("", None, tuple(refusals))


def host_beside(engine: EngineProfile, model: PerfModel, num_layers: int) -> EngineProfile:
    """`engine` as it runs a model of so many layers beside `model`: its host time of a prefill is that of all layers.

    None per step where the model's times hold it already.
    """
    if getattr(model, "includes_host", False):
        return dataclasses.replace(
            engine, step_overhead_ns=0, token_overhead_ns=0, prefill_overhead_ns=0, prefill_layer_overhead_ns=0
        )
    whole = engine.prefill_overhead_ns + num_layers * engine.prefill_layer_overhead_ns
    return dataclasses.replace(engine, prefill_overhead_ns=whole, prefill_layer_overhead_ns=0)


def _built(specs: Sequence[Spec]) -> list[PerfModel]:
    """A fresh model of each spec, with those behind it as fallbacks: the roofline behind the last."""
    behind: PerfModel | None = None
    built: list[PerfModel] = []
    for spec in reversed(specs):
        implementation = registry.lookup("perf", spec.name)
        if spec.name == "steps":
            read = {"profile": catalogue.mapping("steps", spec.params["profile"])}
            spec = dataclasses.replace(spec, params={**spec.params, **read})
        if "fallback" in {f.name for f in dataclasses.fields(implementation) if f.init}:
            fallback = behind or registry.lookup("perf", "roofline")()
            behind = implementation(**{**spec.params, "fallback": fallback})
        else:
            behind = spec.build()
        assert behind is not None
        built.append(behind)
    return built[::-1]


def refusals_of(specs: Sequence[Spec], deployment: Deployment) -> tuple[str, ...]:
    """Why none of `specs` prices `deployment`, one reason each; nothing where one does. No model is prepared."""
    found = []
    for spec, model in zip(specs, _built(specs), strict=True):
        if (reason := model.supports(deployment)) is None:
            return ()
        found.append(f"{spec.name}: {reason}")
    return tuple(found)
