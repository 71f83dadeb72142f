"""Sessions: requests of which each comes a while after the end of the one before, and when sessions begin.

Between a trace or a generator, which tell the turns of each session, and the coordinator, which plays them. It never
knows how long a request takes: that is why these arrivals have no times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from typing import overload

import numpy as np

from mist.units import NS_PER_MS
from mist.workload import ArrivalProcess, IntArray, LengthDistribution, RequestTable


def draw_sessions(
    num_sessions: int,
    arrivals: ArrivalProcess,
    *,
    turns: LengthDistribution,
    input_tokens: LengthDistribution,
    output_tokens: LengthDistribution,
    think_ms: LengthDistribution,
    system_tokens: int = 0,
    hash_block_size: int = 64,
    rng_of: Callable[[str], np.random.Generator],
) -> RequestTable:
    """Sessions of `turns` whose prompts are all that was said: the system prompt, and each turn's input and answer.

    `input_tokens` are those that a turn adds; `system_tokens` stand in front of every session's prompts, the same for
    all. Every purpose has a generator of its own (`rng_of`). ValueError where a number of tokens is out of range.
    """
    if system_tokens < 0 or hash_block_size < 1 or num_sessions < 1:
        raise ValueError("give sessions and tokens per block of at least 1, and system_tokens of at least 0")
    num_turns = turns.sample(num_sessions, rng_of("turns"))
    num = int(num_turns.sum())
    first = np.cumsum(num_turns) - num_turns
    session = np.repeat(np.arange(num_sessions), num_turns)
    opens = np.zeros(num, np.bool_)
    opens[first] = True
    new, output = (d.sample(num, rng_of(name)) for name, d in (("new", input_tokens), ("answers", output_tokens)))
    think_ns = np.where(opens, 0, think_ms.sample(num, rng_of("think")) * NS_PER_MS)
    said = np.cumsum(new + output) - output  # of all sessions so far, this turn's answer left out
    before = (said - new)[first]
    prompt = system_tokens + said - before[session]
    waited = np.cumsum(think_ns)
    begins = arrivals.arrival_ns(num_sessions, rng_of("arrivals"))
    return by_arrival(
        RequestTable(
            arrival_ns=begins[session] + waited - waited[first][session],
            input_tokens=prompt,
            output_tokens=output,
            block_keys=_conversations(prompt, first, num_turns, system_tokens, hash_block_size),
            hash_block_size=hash_block_size,
            sessions=session,
            after=np.where(opens, -1, np.arange(num) - 1),
            think_ns=think_ns,
        )
    )


def _conversations(
    prompt: IntArray, first: IntArray, num_turns: IntArray, system_tokens: int, hash_block_size: int
) -> list[tuple[int, ...]]:
    """The keys of each turn's whole blocks: each session's are the first of those of its last turn."""
    num_common = system_tokens // hash_block_size
    common, num_keys, keys = tuple(range(num_common)), num_common, []
    for begin, turns in zip(first.tolist(), num_turns.tolist(), strict=True):
        lengths = (prompt[begin : begin + turns] // hash_block_size).tolist()
        own = max(0, lengths[-1] - num_common)
        conversation = common + tuple(range(num_keys, num_keys + own))
        num_keys += own
        keys += [conversation[:length] for length in lengths]
    return keys


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


class Stretches(Sequence[tuple[int, ...]]):
    """Prefix keys of prompts that are `stretches` of the numbers below `num_keys`, put together when asked for.

    The prompts of a session have most of theirs in common: written out, those of a trace can take gigabytes.
    """

    def __init__(self, stretches: Sequence[tuple[range, ...]], num_keys: int) -> None:
        self._stretches = stretches
        self._numbers = list(range(num_keys))

    def __len__(self) -> int:
        return len(self._stretches)

    @overload
    def __getitem__(self, place: int) -> tuple[int, ...]: ...
    @overload
    def __getitem__(self, place: slice) -> Stretches: ...
    def __getitem__(self, place: int | slice) -> tuple[int, ...] | Stretches:
        if isinstance(place, slice):
            return self._of(self._stretches[place])
        numbers = self._numbers  # the same objects for all prompts, which dictionaries find faster
        return tuple(chain.from_iterable([numbers[each.start : each.stop] for each in self._stretches[place]]))

    def reordered(self, order: Sequence[int]) -> Stretches:
        """Those at the places of `order`."""
        return self._of([self._stretches[place] for place in order])

    def _of(self, stretches: Sequence[tuple[range, ...]]) -> Stretches:
        part = Stretches(stretches, 0)
        part._numbers = self._numbers
        return part


def _reordered(keys: Sequence[tuple[int, ...]], order: Sequence[int]) -> Sequence[tuple[int, ...]]:
    return keys.reordered(order) if isinstance(keys, Stretches) else [keys[place] for place in order]


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
        block_keys=None if keys is None else _reordered(keys, order.tolist()),
        cached_tokens=None if table.cached_tokens is None else table.cached_tokens[order],
        sizes={name: values[order] for name, values in table.sizes.items()},
        sessions=None if table.sessions is None else table.sessions[order],
        after=None if table.after is None else _places(table.after[order], place),
        think_ns=None if table.think_ns is None else table.think_ns[order],
    )


def _places(after: IntArray, place: IntArray) -> IntArray:
    return np.where(after < 0, after, place[after])
