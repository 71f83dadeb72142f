"""What single links carried over time: the transfers of a run laid over the network of its scenario, built anew.

Beside the anatomy of steps, for reports. Each transfer is spread evenly over its time; a link that its transfers don't
account for is left out. It runs nothing.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from mist.errors import ScenarioError
from mist.metrics.distribution import FloatColumn
from mist.records import IntColumn
from mist.scenario import load
from mist.scenario.fleet import fabric_of
from mist.scenario.result import Result
from mist.units import NS_PER_S

#: how much of what a link carried may be from elsewhere, such as host memory that a search reads
_UNACCOUNTED = 0.01


@dataclass(frozen=True, slots=True, eq=False)
class LinkUse:
    """The transfers over a link, and the share of its bandwidth that each took of its time: [n] each."""

    name: str
    starts_ns: IntColumn
    ends_ns: IntColumn
    shares: FloatColumn


def link_uses(result: Result) -> list[LinkUse]:
    """Of each link, the busiest first; nothing without nodes, or where the scenario can't be read any more."""
    rows = result.records.transfers.as_columns()
    took = np.flatnonzero((rows["start_ns"] >= 0) & (rows["end_ns"] > rows["start_ns"]))
    over = _by_link(result, rows["sender"][took], rows["receiver"][took])
    found = []
    for link in sorted(result.metrics.get("links", ()), key=lambda link: -(link["utilisation"] or 0.0)):
        mine = took[over.get(link["name"], [])]
        start, end, num_bytes = (rows[name][mine] for name in ("start_ns", "end_ns", "bytes"))
        unaccounted = abs(link["carried_bytes"] - int(num_bytes.sum()))
        if len(mine) and unaccounted <= _UNACCOUNTED * link["carried_bytes"]:
            shares = num_bytes / (end - start) * NS_PER_S / link["capacity_bytes_per_s"]
            found.append(LinkUse(link["name"], start, end, shares))
    return found


def _by_link(result: Result, senders: IntColumn, receivers: IntColumn) -> dict[str, IntColumn]:
    """Which transfers go over each link; those of memories that are no host's take ways of their own."""
    try:
        fabric = fabric_of(load(result.scenario))
    except ScenarioError:
        fabric = None
    if fabric is None:
        return {}
    found: dict[str, list[IntColumn]] = defaultdict(list)
    for sender, receiver in np.unique(np.column_stack((senders, receivers)), axis=0).tolist():
        if min(sender, receiver) >= -1 and max(sender, receiver) >= 0:
            mine = np.flatnonzero((senders == sender) & (receivers == receiver))
            for channel in fabric.path(sender, receiver).channels:
                found[channel.name].append(mine)
    return {name: np.sort(np.concatenate(places)) for name, places in found.items()}
