"""Whether the offered load was more than the deployment could serve, judged from how backlogs grew while load arrived.

It reads the intervals in which tasks waited and requests lived, pool by pool; `docs/metrics.md` derives the rule and
its error rates. It never calls a busy client saturated: only a backlog that keeps growing is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np

from mist.metrics.clients import Activity, ClientInfo, pools
from mist.metrics.distribution import FloatColumn
from mist.metrics.load import mean_number
from mist.metrics.window import Columns, Window
from mist.records import FINISHED, IntColumn
from mist.units import NS_PER_S

#: stretches of equal length into which the arrival period is cut
NUM_STRETCHES = 20
#: below this share of the arrivals, pile-up is never called saturation
MIN_SHARE = 0.05
#: a critically loaded queue wanders by about sqrt(2 n) over n arrivals; twice that is beyond chance
CHANCE = 3.0
#: how much of the backlog's variation a straight line must explain
MIN_R_SQUARED = 0.6
#: late arrivals must take this many times as long as early ones where requests pile up without waiting
MIN_STRETCH = 2.0


@dataclass(frozen=True, slots=True)
class Growth:
    """A straight line through a backlog: its mean `at_start` and `at_end` of the arrival period, per `arrivals`."""

    at_start: float
    at_end: float
    arrivals: int
    r_squared: float

    @property
    def share(self) -> float:
        """Part of the arrivals that piled up; 1 - 1/load for a queue fed at `load` times its capacity."""
        return (self.at_end - self.at_start) / self.arrivals

    @property
    def is_saturation(self) -> bool:
        return self.share > max(MIN_SHARE, CHANCE / sqrt(self.arrivals)) and self.r_squared > MIN_R_SQUARED


def saturation_reason(
    requests: Columns, tasks: Columns, clients: Sequence[ClientInfo], sums: Activity, window: Window
) -> str | None:
    """One clause with figures if the open-loop load outran the deployment, else None.

    `tasks` has a request's rows together and in order; all requests of the run count, whatever the window, which is
    only quoted from. The pool whose queue grows fastest is named.
    """
    arrivals = requests["arrival_ns"]
    if not len(arrivals) or arrivals.max() <= arrivals.min():
        return None
    edges = np.linspace(float(arrivals.min()), float(arrivals.max()), NUM_STRETCHES + 1)
    worst: tuple[Growth, str, list[int]] | None = None
    for pool, members in pools(clients).items():
        growth = _queue_growth(tasks, members, len(clients), edges)
        if growth is not None and growth.is_saturation and (worst is None or growth.share > worst[0].share):
            worst = growth, pool, members
    if worst is not None:
        return _queue_sentence(*worst, clients, sums, window)
    return _crowding_sentence(requests, edges, window)


def _queue_growth(tasks: Columns, members: list[int], num_clients: int, edges: FloatColumn) -> Growth | None:
    """How the number waiting in a pool grew."""
    in_pool = np.zeros(num_clients, np.bool_)
    in_pool[members] = True
    rows = in_pool[tasks["client"]] & (tasks["queued_ns"] <= edges[-1])
    request, queued, ended = (tasks[name][rows] for name in ("request", "queued_ns", "end_ns"))
    if not len(request):
        return None
    started = np.where(tasks["started_ns"][rows] >= 0, tasks["started_ns"][rows], ended)
    num_requests = 1 + int(np.count_nonzero(request[1:] != request[:-1]))
    return _growth(queued, started, num_requests, edges)


def _growth(starts: IntColumn, ends: IntColumn, arrivals: int, edges: FloatColumn) -> Growth:
    number = mean_number(starts, ends, edges)
    # the stretches' middles, as a share of the arrival period from its middle: -0.475 .. 0.475
    place = (np.arange(NUM_STRETCHES) + 0.5) / NUM_STRETCHES - 0.5
    deviation = number - number.mean()
    slope = float(place @ deviation / (place @ place))
    variation = float(deviation @ deviation)
    explained = slope**2 * float(place @ place) / variation if variation else 0.0
    middle = float(number.mean())
    return Growth(max(0.0, middle - slope / 2), middle + slope / 2, arrivals, explained)


def _crowding_sentence(requests: Columns, edges: FloatColumn, window: Window) -> str | None:
    """Saturation without a queue: nothing limits the batch, so ever more requests share it, ever more slowly.

    A ramp to a steady state looks alike at first; it is told apart by how long requests take, early and late.
    """
    arrivals = requests["arrival_ns"]
    lived = requests["end_ns"] >= arrivals
    ends = np.where(lived, requests["end_ns"], window.last_ns)
    growth = _growth(arrivals, ends, len(arrivals), edges)
    sojourn_s = (ends - arrivals) / NS_PER_S
    third = (edges[-1] - edges[0]) / 3
    finished = requests["status"] == FINISHED
    early = sojourn_s[finished & (arrivals < edges[0] + third)]
    late = sojourn_s[arrivals > edges[-1] - third]
    if not growth.is_saturation or not len(early) or not len(late):
        return None
    before, after = float(np.median(early)), float(np.median(late))
    if after < MIN_STRETCH * before or 3 * before > (edges[-1] - edges[0]) / NS_PER_S:
        return None
    return (
        f"requests in the system grew from about {growth.at_start:,.0f} to {growth.at_end:,.0f} while "
        f"{growth.arrivals:,} arrived ({growth.share:.0%} of them piled up), "
        f"and the median E2E from {before:.3g} s to {after:.3g} s"
    )


def _queue_sentence(
    growth: Growth, pool: str, members: list[int], clients: Sequence[ClientInfo], sums: Activity, window: Window
) -> str:
    busy_ns = int(sums.busy_ns[members].sum())
    facts = []
    if window.span_ns:
        facts.append(f"busy {busy_ns / (window.span_ns * len(members)):.0%} of the time")
    if busy_ns:
        slots = max(clients[m].max_num_seqs for m in members)
        limit = f" of at most {slots}" if slots else ""
        facts.append(f"mean batch {sums.sequence_time[members].sum() / busy_ns:.1f}{limit}")
    filling = [sums.kv_blocks_peak[m] / clients[m].kv_blocks for m in members if clients[m].kv_blocks]
    if filling:
        facts.append(f"KV cache {max(filling):.0%} full at its peak")
    return (
        f"the queue of {pool} grew from about {growth.at_start:,.0f} to {growth.at_end:,.0f} waiting requests while "
        f"{growth.arrivals:,} came to it: {growth.share:.0%} of them piled up"
        + (f" ({pool}: {', '.join(facts)})" if facts else "")
    )
