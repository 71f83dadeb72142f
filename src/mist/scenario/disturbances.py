"""What happens in a run, built from a scenario: replicas with their events, pools that scale, users who give up.

Beside the fleet and its network, which it disturbs, and after the coordinator, whose routes it keeps. It decides
nothing that the scenario doesn't say.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from mist.availability.events import Down, Event, Events, LinkChange, Up
from mist.availability.outages import RETRY, Outages, Replica
from mist.availability.scaling import Pool as Elastic
from mist.availability.scaling import Rule, Scaling
from mist.coordinator import Coordinator
from mist.errors import ScenarioError, nearest
from mist.fabric import Fabric, PlainLinks
from mist.kernel import FOREVER, Kernel
from mist.metrics import Tally
from mist.metrics.availability import state_changes
from mist.metrics.words import counted
from mist.network import HOST, Network
from mist.records import CANCELLED, TIMED_OUT, Records
from mist.request import NO_DEADLINE
from mist.scenario.clients import Pool
from mist.scenario.events import EventSection
from mist.scenario.fleet import Fleet, build_fleet, give_swap_spaces, network_of
from mist.scenario.memories import add_memories
from mist.scenario.network import numbered
from mist.scenario.scaling import MEASURES, RuleSection
from mist.scenario.seeds import random_of
from mist.scenario.tenancy import Tenancy
from mist.scenario.value import Scenario
from mist.sharing import Channel
from mist.tenant import Patience
from mist.units import NS_PER_MS, NS_PER_S, seconds_to_ns

#: events that came too late which a note names, at most
MAX_LATE = 3


def add_disturbances(scenario: Scenario, fleet: Fleet, coordinator: Coordinator, num_requests: int) -> None:
    """Post the events of the scenario, and let its pools scale; nothing where it has none of them."""
    scaled = {name: pool for name, pool in scenario.pools.items() if pool.scaling is not None}
    if not (scenario.events or scaled):
        return
    replicas = _replicas(fleet)
    outages = Outages(coordinator, coordinator.records, replicas)
    events = list(_events(scenario, fleet, coordinator.network, replicas))
    Events(coordinator.kernel, outages, coordinator.network.sharing).post(events)
    pools = [_elastic(pool, [replicas[each] for each in numbered(name, pool.count)]) for name, pool in scaled.items()]
    Scaling(outages, pools, lambda: coordinator.num_left == num_requests).start()


def check_links(scenario: Scenario) -> None:
    """ScenarioError where an event changes a link that there isn't; without a workload, and only where one does."""
    if not any(each.link for each in scenario.events):
        return
    kernel, records = Kernel(), Records(stage_kinds=list(scenario.stages))
    fleet = build_fleet(scenario, 0, kernel, records)
    network = network_of(scenario, fleet, kernel, records)
    give_swap_spaces(scenario, fleet, network)
    add_memories(scenario, fleet, 0, network, records)
    list(_events(scenario, fleet, network, _replicas(fleet)))


def patience(scenario: Scenario, tenant: Tenancy, num_requests: int) -> Patience | None:
    """When the users of a tenant's requests give up; None where they never do."""
    workload = tenant.workload
    given = workload.cancellation
    if given is None and workload.timeout_s is None:
        return None
    after = np.full(num_requests, NO_DEADLINE, np.int64)
    if given is not None:
        rng = random_of(scenario.seed, tenant.purpose("cancellation"))
        leaves = rng.random(num_requests) < given.probability
        delays = given.after_ms.build().sample(num_requests, rng).astype(np.int64) * NS_PER_MS
        after[leaves] = np.maximum(1, delays[leaves])
    timeout = NO_DEADLINE if workload.timeout_s is None else max(1, seconds_to_ns(workload.timeout_s))
    statuses = np.where(after < timeout, CANCELLED, TIMED_OUT)
    return Patience(np.minimum(after, timeout).tolist(), statuses.tolist())


def happened(scenario: Scenario, tally: Tally) -> Iterator[str]:
    """Sentences on what happened to clients and to tasks that were there, and on what came too late."""
    last_s = tally.window.last_ns / NS_PER_S
    late = [f"events.{i} at {each.at_s:,g} s" for i, each in enumerate(scenario.events) if each.at_s > last_s]
    for name, pool in scenario.pools.items():
        planned = enumerate(pool.scaling.schedule if pool.scaling else ())
        late += [f"clients.{name}.scaling.schedule.{i} at {p.at_s:,g} s" for i, p in planned if p.at_s > last_s]
    if late:
        more = f" and {len(late) - MAX_LATE} more" if len(late) > MAX_LATE else ""
        told = ", ".join(late[:MAX_LATE])
        yield f"Changed nothing, for the run's last event was at {last_s:,.4g} s: {told}{more}."
    if state_changes(tally.records, tally.last_ends):
        yield "Some clients didn't serve all the time: their utilisation is over the time that each did."
    if tally.num_lost_tasks:
        requests = counted(tally.num_lost_requests, "request")
        yield f"{counted(tally.num_lost_tasks, 'task')} of {requests} lost with clients that went down."


def _replicas(fleet: Fleet) -> dict[str, Replica]:
    """Each replica with its lanes, by name."""
    found: dict[str, Replica] = {}
    for client in fleet.clients:
        name = client.name.partition(".")[0]
        clients = [*(found[name].clients if name in found else ()), client]
        found[name] = Replica(name, clients)
    return found


def _elastic(pool: Pool, replicas: list[Replica]) -> Elastic:
    scaling = pool.scaling
    assert scaling is not None
    return Elastic(
        replicas,
        scaling.initial_count,
        scaling.min_count,
        seconds_to_ns(scaling.start_up_s),
        [(seconds_to_ns(each.at_s), each.count) for each in scaling.schedule],
        None if scaling.rule is None else _rule(scaling.rule),
    )


def _rule(section: RuleSection) -> Rule:
    (measure, thresholds), *_ = ((name, got) for name in MEASURES if (got := getattr(section, name)) is not None)
    return Rule(measure, thresholds.above, thresholds.below, seconds_to_ns(section.every_s), section.step)


# --- events ---


def _events(scenario: Scenario, fleet: Fleet, network: Network, replicas: Mapping[str, Replica]) -> Iterator[Event]:
    """What the scenario lists, and the ends of what lasts for some time."""
    channels = _channels(network, fleet) if any(each.link for each in scenario.events) else {}
    for index, each in enumerate(scenario.events):
        at_ns = seconds_to_ns(each.at_s)
        end_ns = None if each.for_s is None else at_ns + max(1, seconds_to_ns(each.for_s))
        if each.link is not None:
            channel = _channel(scenario, index, each, channels)
            yield LinkChange(at_ns, channel, 1.0 if each.factor is None else each.factor)
            if end_ns is not None and not _is_overtaken(scenario.events, index, end_ns):
                yield LinkChange(end_ns, channel, 1.0)
        name = each.client_down or each.client_up
        for replica in () if name is None else scenario.replicas_called(name):
            if each.client_up is not None:
                yield Up(at_ns, replica)
                continue
            yield Down(at_ns, replica, each.on_loss or RETRY, FOREVER if end_ns is None else end_ns)


def _is_overtaken(events: Sequence[EventSection], index: int, end_ns: int) -> bool:
    """Whether another event of the same link comes after that at `index` and by its end, which then ends nothing."""
    ours = events[index]
    others = [(each.at_s, i) for i, each in enumerate(events) if each.link == ours.link]
    return any((ours.at_s, index) < (at_s, i) and seconds_to_ns(at_s) <= end_ns for at_s, i in others)


def _channels(network: Network, fleet: Fleet) -> dict[str, Channel]:
    """All links by name: those of memories, of the network, and the one that each client's KV caches leave by."""
    found = [channel for path in network.memory_paths.values() for channel in path.channels]
    clients = range(len(fleet.clients))
    if isinstance(network.paths, Fabric):
        for here in clients:
            network.path(HOST, here)
            network.path(here, HOST)
            for there in clients:
                network.path(here, there)
        found += network.paths.channels.values()
    named = {channel.name: channel for channel in found}
    if isinstance(network.paths, PlainLinks):
        named |= {f"{fleet.clients[i].name}.out": network.path(i, i).channels[0] for i in clients}
    return {name: channel for name, channel in named.items() if np.isfinite(channel.capacity_per_s)}


def _channel(scenario: Scenario, index: int, event: EventSection, channels: Mapping[str, Channel]) -> Channel:
    assert event.link is not None
    if event.link not in channels:
        hint = nearest(event.link, channels) if channels else "give `network` a preset, nodes or kv_transfer"
        message = f"there is no link {event.link!r} of limited bandwidth"
        raise ScenarioError(scenario.problem(("events", index, "link"), message, hint))
    return channels[event.link]
