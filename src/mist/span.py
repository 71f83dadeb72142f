"""A span of decode steps: those that a client runs one after another with nobody to ask and nothing to tell.

Inside `Client.start_step`: most steps of most runs only give every sequence its next token. Here they are sums over
whole stretches of steps, the same as one step after another to the last bit. It never evicts or preempts.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mist.client import Client


def run_span(client: Client, now: int) -> int:
    """Run decode steps from `now` on; the instant at which the next step starts, or -1 where one is in flight.

    It ends before a step that needs more than the free blocks, behind one that ends tasks where others may run then,
    and with one that reaches what could reach the client or whose end reaches others.
    """
    residents, step, kernel = client.residents, client.step, client.kernel
    cohort, kv, shown_at = residents.cohort, residents.kv, client.progress.shown_at
    step.num_prefill_tokens = 0
    if step.chunks:
        step.chunks = []
    while True:
        count, number, horizon = cohort.count, cohort.step, kernel.horizon()
        step.num_decodes = step.num_sampled = count
        told = cohort.calendar if not shown_at else {**cohort.calendar, **shown_at}
        # the next steps, up to one whose end has to be told: tasks end, or show their first tokens
        place = number % cohort.block_size
        needed = cohort.boundary[place:] + cohort.boundary[:place]
        for ahead, _ in enumerate(needed, number + 1):
            if ahead in told:
                del needed[ahead - number :]
                break
        if any(needed):
            blocks = list(accumulate(needed, initial=kv.used))
            if blocks[-1] - blocks[0] > kv.free:
                del blocks[bisect_right(blocks, blocks[0] + kv.free) :]
                if len(blocks) == 1:
                    return now
        else:
            blocks = [kv.used] * (len(needed) + 1)
        context = cohort.sum_context + count
        instants = _instants(client, now, context, min(len(blocks) - 1, (horizon - now) // client.took + 2))
        last = len(instants) - 1
        reaches = instants[last] >= horizon
        if reaches:
            last = bisect_left(instants, horizon)
        if client.decoded is not None:
            client.decoded(count, context, last)
        is_apart = reaches or number + last in told  # the last of them isn't done here
        num_done = last - is_apart
        if num_done:
            client.append_span(
                client.index, count, context, len(residents.waiting), now,
                instants[1 : num_done + 1], blocks[1 : num_done + 1],
            )  # fmt: skip
            cohort.step = number + num_done
            cohort.sum_context += count * num_done
        kv.free -= blocks[last] - blocks[0]
        now = instants[last]
        if is_apart:
            client.begun(instants[num_done], blocks[last])
            if reaches or (client.emits and number + last in cohort.calendar):
                kernel.step_ends(client, now)
                return -1
            client.finish_step(now)
            if not client.has_span():
                return now


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
