"""A span of decode steps: those that a client runs one after another with nobody to ask and nothing to tell.

Inside `Client.start_step`: most steps of most runs only give every sequence its next token. Here they are a loop of a
few sums, the same as one step after another to the last bit. It never ends a task, evicts or preempts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mist.client import Client


def run_span(client: Client, now: int) -> int:
    """Run decode steps from `now` on; the instant at which the next step starts, or -1 where one is in flight.

    It ends before a step that ends a task, shows a first token or needs more than the free blocks, and with one that
    reaches what could reach the client.
    """
    residents, step = client.residents, client.step
    cohort, kv = residents.cohort, residents.kv
    count, number, context = cohort.count, cohort.step, cohort.sum_context
    boundary, size, free, used = cohort.boundary, cohort.block_size, kv.free, kv.used
    calendar, shown_at, horizon = cohort.calendar, client.progress.shown_at, client.kernel.horizon()
    time, index = client.decode_time(count), client.index
    rows: list[int] = []
    num_waiting = len(residents.waiting)
    step.num_decodes = step.num_sampled = count
    step.num_prefill_tokens = 0
    if step.chunks:
        step.chunks = []
    host, overlapped = client.host_ns(step), client.engine.overlapped
    is_in_flight = False
    while number + 1 not in calendar and number + 1 not in shown_at:
        needed = boundary[-number % size]
        if needed > free:
            break
        free -= needed
        used += needed
        attended = context + count
        device = time(attended)
        took = (host if host > device else device) if overlapped else host + device
        end = now + (took if took > 1 else 1)
        if end >= horizon:
            is_in_flight = True
            break
        rows += (index, now, end, 0, 0, count, attended, used, num_waiting)
        number, context, now = number + 1, attended, end
    if rows:
        client.append_steps(rows)
    cohort.step, cohort.sum_context, kv.free = number, context, free
    if not is_in_flight:
        return now
    step.decode_context = attended
    client.begun(now, used)
    client.kernel.step_ends(client, end)
    return -1
