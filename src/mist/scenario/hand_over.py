"""What a user may write of how KV caches get from prefill to decode clients, and what that comes to in a run.

A part of the schema, and the step from it to the `Terms` of a run. What lies between the clients is the network's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from mist.client import Client
from mist.errors import Problem
from mist.hand_over import Conversion, Terms
from mist.metrics import ClientInfo
from mist.request import DECODE, PREFILL
from mist.scenario.named import Located, Section
from mist.scenario.unserved import unserved
from mist.streams import Streaming
from mist.units import NS_PER_S

if TYPE_CHECKING:
    from mist.scenario.clients import Pool
    from mist.scenario.value import Scenario

AT_ARRIVAL, BEFORE = "at_arrival", "before"


class HandOver(Section):
    """How KV caches get from prefill to decode clients."""

    within: Literal["node", "rack"] | None = None
    """decode only in the node, or rack, of the prefill; left out, anywhere, or where the pool's `group` is the same"""
    choose_decode: Literal["at_prefill_end", "at_arrival"] = "at_prefill_end"
    """when the decode client is chosen"""
    reserve: Literal["at_choice", "at_transfer"] = "at_choice"
    """when it reserves blocks: as it is chosen, and the prompt waits for that, or just before the transfer"""
    layerwise: bool = False
    """send the layers that are computed while the others are; needs choose_decode: at_arrival"""
    convert: Literal["before", "after"] = "after"
    """where kv_dtype differs: on the prefill client before the transfer, or on the decode client after it"""

    @classmethod
    def conflicts(cls, given: Set[str]) -> Iterator[Located]:
        """What is sent early needs a receiver early."""
        if "layerwise" in given and "choose_decode" not in given:
            message = "layers are sent before the prefill ends, and the decode client is chosen then"
            yield ("layerwise",), Problem(message, hint="add choose_decode: at_arrival, or leave layerwise out")


class Lending(Section):
    """Clients that take prompts while those of the prefill pools have too many waiting."""

    threshold_tokens: Annotated[int, Field(ge=0, le=2**40)] = 8192
    """prompt tokens that wait at a prefill client, from which on the next prompt goes to a client that is lent"""


def terms_of(scenario: Scenario, clients: Sequence[Client], infos: Sequence[ClientInfo]) -> Terms:
    """The terms of a run; prefill clients that send layer by layer are watched from now on."""
    given = scenario.hand_over
    pools = scenario.pools
    senders = {name: pools_of for name in pools if (pools_of := scenario.decoders_of(name))}
    by_pool: dict[str, list[int]] = {}
    for client, info in zip(clients, infos, strict=True):
        by_pool.setdefault(info.pool, []).append(client.index)
    places = _places(scenario, given.within)
    reach: dict[int, frozenset[int]] = {}
    conversions: dict[tuple[int, int], Conversion] = {}
    for name, decoders in senders.items():
        for here in by_pool[name]:
            if given.within is not None or len({pool.group for pool in pools.values()}) > 1:
                reach[here] = frozenset(
                    there
                    for other in decoders
                    for there in by_pool[other]
                    if places is None or places[here] & places[there]
                )
            for other, pool in decoders.items():
                if pool.kv_dtype != pools[name].kv_dtype:
                    conversion = _conversion(pools[name], pool, given.convert == BEFORE)
                    conversions |= {(here, there): conversion for there in by_pool[other]}
            if given.layerwise:
                clients[here].watcher = Streaming(pools[name].model.num_layers)
    return Terms(given.choose_decode == AT_ARRIVAL, given.reserve == "at_choice", given.layerwise, reach, conversions)


def _places(scenario: Scenario, within: str | None) -> list[frozenset[int]] | None:
    """By client, the nodes or racks that it is in."""
    placement = scenario.placement
    if within is None or placement is None:
        return None
    found: list[frozenset[int]] = []
    for name, pool in scenario.clients.items():
        for place in placement.places[name]:
            nodes = place.nodes if within == "node" else [placement.topology.nodes[i].rack for i in place.nodes]
            found += [frozenset(nodes)] * getattr(pool, "lanes", 1)
    return found


def _conversion(sender: Pool, receiver: Pool, is_before: bool) -> Conversion:
    """Each device reads its share of the KV cache in one dtype and writes it in the other, at memory bandwidth."""
    on = sender if is_before else receiver
    num_bytes = sum(
        on.model.kv_bytes_per_token_per_device(dtype, on.tp, on.pp) for dtype in (sender.kv_dtype, receiver.kv_dtype)
    )
    return Conversion(num_bytes * NS_PER_S / on.device.memory_bytes_per_s, is_before)


def lending_conflicts(scenario: Scenario) -> Iterator[Located]:
    """Pools that are lent and can't be, and prompts that nobody takes at first."""
    for name, pool in scenario.pools.items():
        if pool.lending is None:
            continue
        if DECODE not in pool.serves:
            message = f"{name} takes prompts while it is lent, and decodes what it computes"
            yield ("clients", name, "lending"), Problem(message, hint="add decode to serves, or leave lending out")
        elif any(unserved(pool.batching, [PREFILL])):
            message = f"{name} computes prompts while it is lent, and {pool.batching.name} computes none"
            yield ("clients", name, "batching"), Problem(message, hint="take chunked or mixed, or leave lending out")
    for tenant, section in scenario.tenants.items():
        takers = scenario.clients_of(tenant, PREFILL) if PREFILL in section.stages else {}
        lent = [name for name in takers if name in scenario.pools and scenario.pools[name].lending is not None]
        if lent and len(lent) == len(takers):
            message = f"nobody takes prompts{f' of {tenant}' if tenant else ''} as long as nobody is lent"
            yield ("clients", lent[0], "lending"), Problem(message, hint="let another client serve prefill")


def hand_over_conflicts(scenario: Scenario) -> Iterator[Located]:
    """Prefill clients that have nobody within reach, and terms that go with nothing."""
    given, placement = scenario.hand_over, scenario.placement
    if given.layerwise and given.convert == BEFORE and any(_converts(scenario)):
        message = "what is sent layer by layer is converted where it arrives"
        yield ("hand_over", "convert"), Problem(message, hint="leave convert out, or layerwise")
    if given.layerwise and (given.choose_decode != AT_ARRIVAL or given.reserve != "at_choice"):
        message = "layers are sent before the prefill ends, to a client that has room for them"
        hint = "choose_decode: at_arrival, and leave reserve out"
        yield ("hand_over", "layerwise"), Problem(message, hint=hint)
    if given.within is not None and placement is None:
        message = f"within: {given.within}, and the network has no {given.within}s"
        yield ("hand_over", "within"), Problem(message, hint="give network a preset or nodes, or give pools a group")
    for name, decoders in _senders(scenario):
        if not decoders:
            message = f"nobody decodes what {name} computes: no decode client of its tenant is in its group"
            yield ("clients", name, "group"), Problem(message, hint="give a decode pool the same group")
        elif given.within is not None and placement is not None:
            yield from _alone(scenario, name, decoders, given.within)


def _alone(scenario: Scenario, name: str, decoders: Mapping[str, Pool], within: str) -> Iterator[Located]:
    placement = scenario.placement
    assert placement is not None

    def where(nodes: Sequence[int]) -> set[int]:
        return set(nodes) if within == "node" else {placement.topology.nodes[i].rack for i in nodes}

    decoding = {each for other in decoders for place in placement.places[other] for each in where(place.nodes)}
    for place in placement.places[name]:
        if not where(place.nodes) & decoding:
            message = f"{place.name} has no decode client in its {within}"
            hint = "place one there, with network.placement"
            yield ("hand_over", "within"), Problem(message, hint=hint)
            return


def _senders(scenario: Scenario) -> Iterator[tuple[str, Mapping[str, Pool]]]:
    """The pools that hand over, once for each tenant, with those that may decode for it."""
    for tenant, section in scenario.tenants.items():
        served = scenario.clients_of(tenant, DECODE)
        for name in scenario.clients_of(tenant):
            if name in scenario.pools and scenario.pools[name].hands_over(section.stages):
                others = scenario.decoders_of(name)
                yield name, {other: pool for other, pool in others.items() if other in served}


def _converts(scenario: Scenario) -> Iterator[bool]:
    for name, pool in scenario.pools.items():
        yield from (other.kv_dtype != pool.kv_dtype for other in scenario.decoders_of(name).values())
