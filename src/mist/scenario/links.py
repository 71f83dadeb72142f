"""How busy what clients share was over a run: ports, NICs, uplinks, PCIe and memory channels in bytes, and cores.

Read off the channels of a network once its run is over; what a flow that was cut has carried counts up to there. It
changes nothing, and has nothing to say of channels that limit nobody.
"""

from __future__ import annotations

from math import isfinite
from typing import Any

from mist.fabric import Fabric
from mist.network import Network
from mist.sharing import Channel
from mist.units import NS_PER_S


def shared(network: Network, start_ns: int, end_ns: int) -> dict[str, list[dict[str, Any]]]:
    """`links` and `cores` of a run from `start_ns` to `end_ns`, by name; without nodes, the channels of memories alone.

    Utilisation is the mean: carried / (capacity x time).
    """
    found: dict[str, list[dict[str, Any]]] = {"links": [], "cores": []}
    channels = [channel for path in network.memory_paths.values() for channel in path.channels]
    if isinstance(network.paths, Fabric):
        channels += network.paths.channels.values()
    carried: dict[Channel, float] = {channel: channel.carried for channel in channels}
    for flow in network.sharing.flows:
        for channel in carried.keys() & flow.channels:
            carried[channel] += flow.size - flow.remaining(end_ns)
    for channel in sorted(carried, key=lambda channel: channel.name):
        name, capacity, amount = channel.name, channel.capacity_per_s, carried[channel]
        if not isfinite(capacity):
            continue
        span = capacity * (end_ns - start_ns) / NS_PER_S
        busy = {"utilisation": min(1.0, amount / span) if span else None}
        if name.endswith(".cores"):
            cores = {"num_cores": round(capacity / NS_PER_S), "core_s": amount / NS_PER_S}
            found["cores"].append({"name": name} | cores | busy)
        else:
            link = {"capacity_bytes_per_s": capacity, "carried_bytes": round(amount)}
            found["links"].append({"name": name} | link | busy)
    return found
