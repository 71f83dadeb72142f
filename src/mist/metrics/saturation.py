"""Whether the offered load was more than the deployment could serve, judged from how backlogs grew while load arrived.

It reads the intervals in which tasks and KV caches waited and requests lived, pool by pool; `docs/metrics.md` derives
the rule and its error rates. It never calls a busy client saturated: only a backlog that keeps growing is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from typing import Any

import numpy as np

from mist.metrics.clients import Activity, ClientInfo, pools
from mist.metrics.distribution import FloatColumn
from mist.metrics.load import highest_number, mean_number
from mist.metrics.queues import Arrivals, Queues
from mist.metrics.window import Columns, Window
from mist.metrics.words import counted, share
from mist.records import FINISHED, KV_SWAP, KV_WRITE, IntColumn
from mist.units import NS_PER_S

#: stretches of equal length into which the arrival period is cut
NUM_STRETCHES = 20
#: below this share of the arrivals, pile-up is never called saturation
MIN_SHARE = 0.02
#: a critically loaded queue wanders by about sqrt(variability n) over n arrivals; this many times that is beyond chance
CHANCE = 2.2
#: how much of the backlog's variation a straight line must explain
MIN_R_SQUARED = 0.6
#: growth by this many times the wandering by chance, and by so many requests, is told though it proves nothing
VISIBLE = 0.5
MIN_VISIBLE = 10
#: late arrivals must take this many times as long as early ones where requests pile up without waiting
MIN_STRETCH = 2.0
#: and this share of them must pile up
MIN_CROWDING = 0.05


#: how the link of a pool that sends KV caches is called before the pool's name
LINK = "transfers from "

#: how a queue grew, and its mean in the first and last tenth of the arrival period and its peak
Queue = tuple["Growth", tuple[float, float, int]]


@dataclass(frozen=True, slots=True)
class Growth:
    """A straight line through a backlog: its mean `at_start` and `at_end` of the arrival period, per `arrivals`.

    `variability`: by how much the backlog's variance grows with each arrival at a load equal to capacity.
    """

    at_start: float
    at_end: float
    arrivals: int
    r_squared: float
    variability: float

    @property
    def share(self) -> float:
        """Part of the arrivals that piled up; 1 - 1/load for a queue fed at `load` times its capacity."""
        return (self.at_end - self.at_start) / self.arrivals

    @property
    def chance(self) -> float:
        """The share that piles up by chance at a load equal to capacity (one standard deviation)."""
        return sqrt(self.variability / self.arrivals)

    @property
    def is_saturation(self) -> bool:
        return self.share > max(MIN_SHARE, CHANCE * self.chance) and self.r_squared > MIN_R_SQUARED

    def shows(self, rise: float) -> bool:
        """Whether a rise of the number waiting is too large to pass over, though it may be chance."""
        return rise > max(VISIBLE * self.chance * self.arrivals, MIN_VISIBLE)


@dataclass(frozen=True, slots=True)
class Backlog:
    """What was seen of a queue while requests arrived; the means are of the period's first and last tenth.

    `pool`: whose, or the link of one that KV caches waited for, `LINK` before its name.
    """

    pool: str
    waiting_first: float
    waiting_last: float
    waiting_peak: int


def judge(
    requests: Columns, queues: Queues, transfers: Columns, clients: Sequence[ClientInfo], sums: Activity, window: Window
) -> dict[str, Any]:
    """`saturated`, `near_capacity`, `saturation_reason` and `backlog` of a summary, for open-loop load.

    All requests of the run count, whatever the window, which is only quoted from. The reason is one clause with
    figures, None unless saturated; the pool, or the link between pools, whose queue grows fastest is named.
    `near_capacity`: a queue grew, by less than proves saturation. `backlog` None: all came at one instant.
    """
    arrivals = requests["arrival_ns"]
    if not len(arrivals) or arrivals.max() <= arrivals.min():
        return unjudged()
    edges = np.linspace(float(arrivals.min()), float(arrivals.max()), NUM_STRETCHES + 1)
    found = {}
    for pool, members in pools(clients).items():
        if (queue := _queue(queues[pool], edges)) is not None:
            found[pool] = queue
        if (queue := _link_queue(transfers, members, edges, window.last_ns)) is not None:
            found[LINK + pool] = queue
    if not found:
        return unjudged()
    order = sorted(found, key=lambda pool: found[pool][0].share, reverse=True)
    saturated = [pool for pool in order if found[pool][0].is_saturation]
    visible = [pool for pool, (growth, (first, last, _)) in found.items() if growth.shows(last - first)]
    reason = (
        _queue_sentence(found, saturated[0], clients, sums, window)
        if saturated
        else _crowding_sentence(requests, edges, window)
    )
    pool = (saturated or visible or sorted(found, key=lambda pool: -found[pool][1][2]))[0]
    return {
        "saturated": reason is not None,
        "near_capacity": bool(visible) and reason is None,
        "saturation_reason": reason,
        "backlog": asdict(Backlog(pool, *found[pool][1])),
    }


def unjudged() -> dict[str, Any]:
    """What `judge` answers where there is nothing to judge by."""
    return {"saturated": False, "near_capacity": False, "saturation_reason": None, "backlog": None}


def _queue(seen: Arrivals, edges: FloatColumn) -> Queue | None:
    """The tasks that waited in a pool."""
    arrived, service = seen.arrived_ns.whole(), seen.service_ns.whole()
    if not len(arrived):
        return None
    # sorted: the same sums, whatever order they came in
    variability = _variability(arrived, np.sort(service), edges)
    return _waiting(np.sort(seen.queued_ns.whole()), np.sort(seen.started_ns.whole()), len(arrived), variability, edges)


def _link_queue(transfers: Columns, members: list[int], edges: FloatColumn, last_ns: int) -> Queue | None:
    """What is under way from the clients of a pool: all share the links, so a full one shows in ever more of it.

    What is under way at the end of the run is so to `last_ns`.
    """
    rows = np.isin(transfers["sender"], members) & ~np.isin(transfers["kind"], (KV_WRITE, KV_SWAP))
    rows &= transfers["queued_ns"] <= edges[-1]
    queued, end, num_bytes = (transfers[name][rows] for name in ("queued_ns", "end_ns", "bytes"))
    if not len(queued):
        return None
    variability = _variability(queued, num_bytes, edges)
    return _waiting(queued, np.where(end >= 0, end, last_ns), len(queued), variability, edges)


def _waiting(queued: IntColumn, started: IntColumn, arrivals: int, variability: float, edges: FloatColumn) -> Queue:
    number = mean_number(queued, started, edges)
    tenth = NUM_STRETCHES // 10
    peak = highest_number(queued, started, int(edges[-1]))
    growth = _growth(number, arrivals, variability)
    return growth, (float(number[:tenth].mean()), float(number[-tenth:].mean()), peak)


def _variability(queued: IntColumn, service: IntColumn, edges: FloatColumn) -> float:
    """The squared coefficients of variation of arrivals and services, summed: the variance that each arrival adds.

    The diffusion approximation of a queue in heavy traffic (Kingman, 1962; Whitt, 2002). Arrivals count by their gaps
    or by their number per stretch, whichever varies more: bursts show in the numbers, and slow trends in neither, for
    neighbouring stretches are compared.
    """
    times = np.sort(queued)
    per_stretch = np.histogram(queued, edges)[0]
    dispersion = float((np.diff(per_stretch) ** 2).mean() / 2 / per_stretch.mean()) if per_stretch.any() else 0.0
    return max(_squared_cv(times[1:] - times[:-1]), dispersion) + _squared_cv(service)


def _squared_cv(values: IntColumn) -> float:
    mean = float(values.mean()) if len(values) else 0.0
    return float(values.var()) / mean**2 if mean else 0.0


def _growth(number: FloatColumn, arrivals: int, variability: float) -> Growth:
    # the stretches' middles, as a share of the arrival period from its middle: -0.475 .. 0.475
    place = (np.arange(NUM_STRETCHES) + 0.5) / NUM_STRETCHES - 0.5
    deviation = number - number.mean()
    slope = float(place @ deviation / (place @ place))
    variation = float(deviation @ deviation)
    explained = slope**2 * float(place @ place) / variation if variation else 0.0
    middle = float(number.mean())
    return Growth(max(0.0, middle - slope / 2), middle + slope / 2, arrivals, explained, variability)


def _crowding_sentence(requests: Columns, edges: FloatColumn, window: Window) -> str | None:
    """Saturation without a queue: nothing limits the batch, so ever more requests share it, ever more slowly.

    A ramp to a steady state looks alike at first; it is told apart by how long requests take, early and late.
    """
    arrivals = requests["arrival_ns"]
    lived = requests["end_ns"] >= arrivals
    ends = np.where(lived, requests["end_ns"], window.last_ns)
    finished = requests["status"] == FINISHED
    variability = _variability(arrivals, requests["output_tokens"][finished], edges)
    growth = _growth(mean_number(arrivals, ends, edges), len(arrivals), variability)
    sojourn_s = (ends - arrivals) / NS_PER_S
    third = (edges[-1] - edges[0]) / 3
    early = sojourn_s[finished & (arrivals < edges[0] + third)]
    late = sojourn_s[arrivals > edges[-1] - third]
    if not growth.is_saturation or growth.share <= MIN_CROWDING or not len(early) or not len(late):
        return None
    before, after = float(np.median(early)), float(np.median(late))
    if after < MIN_STRETCH * before or 3 * before > (edges[-1] - edges[0]) / NS_PER_S:
        return None
    return (
        f"requests in the system grew from about {growth.at_start:,.0f} to {growth.at_end:,.0f} while "
        f"{growth.arrivals:,} arrived ({share(growth.share)} of them piled up), "
        f"and the median E2E from {before:.3g} s to {after:.3g} s"
    )


def _queue_sentence(
    found: Mapping[str, Queue], pool: str, clients: Sequence[ClientInfo], sums: Activity, window: Window
) -> str:
    growth = found[pool][0]
    members = pools(clients).get(pool, [])  # a link has none
    busy_ns = int(sums.busy_ns[members].sum())
    facts = []
    if window.span_ns and members:
        facts.append(f"busy {share(busy_ns / (window.span_ns * len(members)))} of the time")
    if busy_ns:
        slots = max(clients[m].max_num_seqs for m in members)
        limit = f" of at most {slots}" if slots else ""
        facts.append(f"mean batch {sums.sequence_time[members].sum() / busy_ns:.1f}{limit}")
    filling = [sums.kv_blocks_peak[m] / clients[m].kv_blocks for m in members if clients[m].kv_blocks]
    if filling:
        facts.append(f"KV cache {share(max(filling))} full at its peak")
    sending = found.get(LINK + pool)
    if sending is not None and (under_way := round(sending[1][1])):
        # they keep their blocks until they are there, so that a slow link holds up the pool before it
        facts.append(f"{counted(under_way, 'transfer')} under way")
    return (
        f"the queue of {pool} grew from about {growth.at_start:,.0f} to {counted(round(growth.at_end), 'request')} "
        f"waiting while {growth.arrivals:,} came to it: {share(growth.share)} of them piled up"
        + (f" ({pool}: {', '.join(facts)})" if facts else "")
    )
