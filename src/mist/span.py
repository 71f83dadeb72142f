"""A span of decode steps: those that a client runs one after another with nobody to ask and nothing to tell.

Inside `Client.start_step`: most steps of most runs only give every sequence its next token. Here they are sums over
whole stretches of steps, the same as one step after another to the last bit. It never evicts or preempts.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from mist.client import Client


#: steps that are planned at once, at most: whoever comes meanwhile makes those after it void
_PLANNED = 64


class Plan(NamedTuple):
    """Steps of `num_decodes` that follow each other, with nothing of them done yet.

    `context`: tokens in the KV caches in the first of them. `instants`: when it starts, and when each of them ends.
    `blocks`: KV blocks in use before them, and during each.
    """

    num_decodes: int
    context: int
    instants: list[int]
    blocks: list[int]


def run_span(client: Client, now: int, horizon: int) -> int:
    """Run decode steps from `now` on; the instant at which the next step starts, or -1 where one is in flight.

    It ends before a step that needs more than the free blocks, behind one that ends tasks where others may run then,
    and with one that reaches what could reach the client, at `horizon`, or whose end reaches others. A client that
    `plans` doesn't stop at the `horizon`, since most that happens doesn't reach it: it plans the steps up to the next
    end that has to be told, and what does reach it cuts the plan.
    """
    residents, step = client.residents, client.step
    cohort, kv, shown_at = residents.cohort, residents.kv, client.progress.shown_at
    step.num_prefill_tokens = 0
    if step.chunks:
        step.chunks = []
    client.idle, client.chunks = False, []
    while True:
        count, number, context = cohort.count, cohort.step, cohort.sum_context + cohort.count
        step.num_decodes = step.num_sampled = count
        # the next step whose end has to be told: tasks end, or show their first tokens
        told = cohort.ends[0] if not shown_at else min(cohort.ends[0], *shown_at)
        size, place = cohort.block_size, number % cohort.block_size
        num_steps = min(told - number, _PLANNED if client.plans else size)
        needed = cohort.boundary[place : place + num_steps]
        if len(needed) < num_steps:
            needed = ((cohort.boundary[place:] + cohort.boundary[:place]) * (num_steps // size + 1))[:num_steps]
        blocks = list(accumulate(needed, initial=kv.used))
        if blocks[-1] - blocks[0] > kv.free:
            del blocks[bisect_right(blocks, blocks[0] + kv.free) :]
            if len(blocks) == 1:
                return now
        num_steps = len(blocks) - 1
        if not client.plans:
            num_steps = min(num_steps, (horizon - now) // client.took + 2)
        instants = _instants(client, now, context, num_steps)
        last = len(instants) - 1
        reaches = instants[last] >= horizon
        if reaches:
            if client.plans:
                client.now, client.planned = now, Plan(count, context, instants, blocks)
                client.kernel.step_ends(client, instants[last])
                return -1
            last = bisect_left(instants, horizon)
        if client.decoded is not None:
            client.decoded(count, context, last)
        is_told = number + last == told
        in_flight = reaches or (is_told and client.emits)
        num_over = last - in_flight
        if num_over:
            client.append_span(
                client.index, count, context, len(residents.waiting), now,
                instants[1 : num_over + 1], blocks[1 : num_over + 1],
            )  # fmt: skip
        num_silent = last - 1 if is_told else num_over
        cohort.step = number + num_silent
        cohort.sum_context += count * num_silent
        kv.free -= blocks[last] - blocks[0]
        now = instants[last]
        if in_flight:
            client.begun(instants[last - 1], blocks[last])
            client.kernel.step_ends(client, now)
            return -1
        if is_told:
            client.now = instants[last - 1]
            client.decodes_over(now)
            if not client.has_span():
                return now
            horizon = client.kernel.horizon()


def begin_planned(client: Client, num_over: int) -> None:
    """The first `num_over` steps of the client's plan are over, the next one is in flight, and the plan is void."""
    plan, residents = client.planned, client.residents
    assert plan is not None
    client.planned = None
    count, context, instants, blocks = plan
    if num_over:
        client.append_span(
            client.index, count, context, len(residents.waiting), instants[0],
            instants[1 : num_over + 1], blocks[1 : num_over + 1],
        )  # fmt: skip
    if client.decoded is not None:
        client.decoded(count, context, num_over + 1)
    residents.cohort.step += num_over
    residents.cohort.sum_context += count * num_over
    residents.kv.free -= blocks[num_over + 1] - blocks[0]
    client.begun(instants[num_over], blocks[num_over + 1])


def _instants(client: Client, now: int, context: int, num_steps: int) -> list[int]:
    """`now`, and when each of the next steps ends: of `num_steps` at most, at least one."""
    step, times = client.step, None
    host = client.host_ns(step)
    added = 0 if client.engine.overlapped else host
    if client.decode_times is not None:
        times = client.decode_times(step.num_decodes, context, num_steps, added)
    if times is None:
        step.decode_context = context
        times = [max(1, added + client.perf.step_time(step))]
    if times[0] < host:  # the first is the shortest
        times = [max(host, time) for time in times]
    client.took = times[-1]
    return list(accumulate(times, initial=now))
