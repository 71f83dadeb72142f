"""What a user may write of a client that is a KV store: a memory that is asked for prefixes, in a stage of its own.

A part of the schema, beside pools of devices and of hosts; `pools` says which of them a client is. It never looks at
other sections: the memory that it names is looked up elsewhere.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mist.errors import Problem
from mist.hardware import Device
from mist.scenario.catalogued import Catalogued
from mist.scenario.clients import Name, Stages
from mist.scenario.named import Section, problems
from mist.scenario.prices import AnyPoolPrice
from mist.scenario.quantities import Latency
from mist.units import parse_time_ns


class StorePool(Section):
    """`count` equal KV stores, each with a memory of its own that all clients of the model read and write."""

    memory: Name
    """what it keeps KV caches in: a name of the scenario's `memories`, else of `mist list memories`"""
    serves: Stages
    """the stage in which it is asked, such as kv_retrieve"""
    count: Annotated[int, Field(ge=1, le=100_000)] = 1
    """stores"""
    lookup: Latency = "0 s"
    """time of one look-up, such as 0.1 ms; look-ups of a store come one after another"""
    fetch: Literal["estimate", "always"] = "estimate"
    """whether what it has is fetched: where that is estimated to be sooner than computing it, or always"""
    device: Annotated[Device, Catalogued("devices")] | None = None
    """the CPU whose host it is on, in a network with nodes; left out, there must be none"""
    price: AnyPoolPrice | None = None
    """what that CPU costs, in place of the scenario's `prices`: USD per hour, a list, or {purchase: spot}"""

    @property
    def lookup_ns(self) -> int:
        """Time of one look-up."""
        return parse_time_ns(self.lookup)

    @model_validator(mode="after")
    def _is_on_a_host(self) -> StorePool:
        if self.device is not None and not self.device.num_cores:
            found = Problem(f"{self.device.name} is not a CPU", hint="take one, such as epyc-9554")
            raise problems([(("device",), found)])
        return self

    def __str__(self) -> str:
        return f"{self.count} x KV store in {self.memory}, {self.lookup} per look-up"
