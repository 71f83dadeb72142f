"""What a user may write of a client that runs no model: a vector index or text work on the cores of a CPU.

A part of the schema, beside that of clients with a model; which of the two a mapping is follows from its keys. A
validated `HostPool` is complete. It never looks at other sections.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field, model_validator

from mist.engine import EngineProfile
from mist.errors import Problem
from mist.hardware import Device
from mist.perf import HostDeployment, HostModel
from mist.pipeline.parts import EMBED, RERANK
from mist.request import DECODE, PREFILL
from mist.scenario.catalogued import Catalogued, left_out
from mist.scenario.clients import Count, Stages
from mist.scenario.encoders import CUTTING, cuts
from mist.scenario.named import Located, Section, Spec, SpecOf, problems
from mist.scenario.prices import AnyPoolPrice
from mist.scenario.pricing import host_models, runs_without_model
from mist.scenario.unserved import unserved
from mist.units import GIB

#: of clients that run no engine: no host time beside what their models say
NO_ENGINE = EngineProfile("none")
DEFAULT_BATCH = 64
#: stages that are a model's, whoever names them
OF_A_MODEL = (PREFILL, DECODE, EMBED, RERANK)
#: of stages whose input isn't in tokens
ANY_TOKENS = 2**40


class HostPool(Section):
    """`count` equal clients on CPUs, each with a performance model of work that needs no neural network."""

    device: Annotated[Device, Catalogued("devices")]
    """a CPU: a name of `mist list devices`, the path of a YAML file, or a mapping with num_cores"""
    count: Annotated[int, Field(ge=1, le=100_000)] = 1
    """clients"""
    cores: Count = left_out()
    """cores of the CPU that one client may use; left out, all"""
    workers: Annotated[int, Field(ge=1, le=4096)] = 1
    """batches that one client works on at a time, each on its share of the cores, all with one index"""
    serves: Stages
    """stages of the pipeline that run here"""
    perf: Annotated[Spec, SpecOf("perf")]
    """what it does and how long that takes, such as {ivf_pq: {...}} or cpu_text"""
    batching: Annotated[Spec, SpecOf("batching")] = Field(
        default={"continuous": {"max_num_seqs": DEFAULT_BATCH, "max_num_batched_tokens": ANY_TOKENS}},
        validate_default=True,
    )
    """a batching policy, whose max_num_seqs is how many tasks it takes at once"""
    price: AnyPoolPrice | None = None
    """what a CPU costs, in place of the scenario's `prices`: USD per hour, a list, or {purchase: spot}"""

    @model_validator(mode="after")
    def _complete(self) -> HostPool:
        pool = self.model_copy(update={"cores": self.cores or max(1, self.device.num_cores)})
        if found := list(pool._misfits()):
            raise problems(found)
        return pool

    def deployment(self) -> HostDeployment:
        """What step times are asked for."""
        return HostDeployment(self.device, max(1, self.cores // self.workers), self.batching.build().max_num_seqs)

    @property
    def lanes(self) -> int:
        """Clients of the simulation that one replica is: its workers."""
        return self.workers

    def prepared(self) -> HostModel:
        """A fresh performance model, ready for steps."""
        model: HostModel = self.perf.build()
        model.prepare(self.deployment())
        return model

    def __str__(self) -> str:
        kept = self.prepared().memory_bytes()
        keeps = f", {kept / GIB:,.1f} GiB in memory" if kept else ""
        workers = f"{self.workers} workers on " if self.workers > 1 else ""
        return f"{self.count} x {workers}{self.cores} cores of {self.device.name}, {self.perf.name}{keeps}"

    def _misfits(self) -> Iterator[Located]:
        if not runs_without_model(self.perf.name):
            hint = "give the client a `model`, or take one of " + ", ".join(host_models())
            yield ("perf",), Problem(f"{self.perf.name} prices the steps of a model, and there is none", hint=hint)
            return
        if not self.device.num_cores:
            yield ("device",), Problem(f"{self.device.name} is not a CPU", hint="take one, such as epyc-9554")
            return
        yield from unserved(self.batching, self.serves)
        if cuts(self.batching):
            message = f"{self.batching.name} cuts tasks into chunks, and a search or a text is one piece"
            hint = f"take {CUTTING.get(self.batching.name, 'continuous')}"
            yield ("batching", self.batching.name), Problem(message, hint=hint)
        if self.cores > self.device.num_cores:
            message = f"{self.device.name} has {self.device.num_cores} cores, not {self.cores:,}"
            yield ("cores",), Problem(message, hint="lower it, or leave it out for all")
            return
        if self.workers > self.cores:
            message = f"{self.workers:,} workers share {self.cores} cores"
            yield ("workers",), Problem(message, hint="at most one for each core")
        model: HostModel = self.perf.build()
        if reason := model.supports(self.deployment()):
            yield ("perf", self.perf.name), Problem(reason, hint="change its parameters, or take another device")
        for index, stage in enumerate(self.serves):
            if stage in OF_A_MODEL:
                hint = "let a client with a model serve it; placed on one node, the two share the host"
                yield ("serves", index), Problem(f"{stage} runs a model, and there is none", hint=hint)
            if model.kinds is not None and stage not in model.kinds:
                message = f"{self.perf.name} doesn't serve the stage {stage!r}"
                yield ("serves", index), Problem(message, hint=f"it serves {', '.join(model.kinds)}")
