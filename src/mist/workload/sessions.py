"""Sessions: requests of which each comes a while after the end of the one before, and when sessions begin.

Between a trace or a generator, which tell the turns of each session, and the coordinator, which plays them. It never
knows how long a request takes: that is why these arrivals have no times.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mist.workload import ArrivalProcess, IntArray, RequestTable


def begin_sessions(table: RequestTable, arrivals: ArrivalProcess, rng: np.random.Generator) -> RequestTable:
    """The same sessions, begun by an arrival process in the order of their first requests; times within them are kept.

    ValueError for a closed loop: how many sessions there are at once follows from when they begin and end.
    """
    assert table.sessions is not None
    if getattr(arrivals, "concurrency", None) is not None:
        raise ValueError("sessions are a closed loop each: give a process with times of its own, such as poisson")
    _, first, session = np.unique(table.sessions, return_index=True, return_inverse=True)
    begins = table.arrival_ns[first]
    order = np.argsort(begins, kind="stable")
    shift = np.empty_like(begins)
    shift[order] = arrivals.arrival_ns(len(first), rng) - begins[order]
    return by_arrival(replace(table, arrival_ns=table.arrival_ns + shift[session]))


def by_arrival(table: RequestTable) -> RequestTable:
    """The same requests sorted by arrival, in their order where that is equal."""
    order = np.argsort(table.arrival_ns, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    keys = table.block_keys
    return replace(
        table,
        arrival_ns=table.arrival_ns[order],
        input_tokens=table.input_tokens[order],
        output_tokens=table.output_tokens[order],
        block_keys=None if keys is None else [keys[i] for i in order.tolist()],
        cached_tokens=None if table.cached_tokens is None else table.cached_tokens[order],
        sizes={name: values[order] for name, values in table.sizes.items()},
        sessions=None if table.sessions is None else table.sessions[order],
        after=None if table.after is None else _places(table.after[order], place),
        think_ns=None if table.think_ns is None else table.think_ns[order],
    )


def _places(after: IntArray, place: IntArray) -> IntArray:
    return np.where(after < 0, after, place[after])
