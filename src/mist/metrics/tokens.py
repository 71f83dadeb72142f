"""When tokens came out, read off the step table: gaps between a request's tokens and tokens per client, exactly.

Decode segments name a range of their client's decode steps, so one difference array over those steps says how many
sequences waited through each gap; nothing is ever expanded to one row per token. It never looks at request statuses:
callers choose the segments.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np

from mist.metrics.window import BoolColumn, Columns, Window
from mist.records import IntColumn


@dataclass(frozen=True, slots=True)
class DecodeSteps:
    """The ends of every client's decode steps, client after client.

    `end_ns`: int64[decode steps]; client c's k-th decode step, k from 1, is at `first[c]` + k - 1; `first` has one
    entry more than there are clients.
    """

    end_ns: IntColumn
    first: IntColumn

    @classmethod
    def of(cls, steps: Columns, num_clients: int) -> DecodeSteps:
        decodes = steps["num_decodes"] > 0
        end_ns, client = steps["end_ns"][decodes], steps["client"][decodes]
        first = np.zeros(num_clients + 1, np.int64)
        np.cumsum(np.bincount(client, minlength=num_clients), out=first[1:])
        if num_clients > 1:  # of 16 bits, where they do, numpy sorts in linear time
            end_ns = end_ns[np.argsort(client.astype(np.int16 if num_clients < 2**15 else np.int32), kind="stable")]
        return cls(end_ns, first)


@dataclass(frozen=True, slots=True)
class Segments:
    """The stretches in which a request generated: one row each, a request's rows together and in order.

    Row i emitted a token at `joined_ns`, unless it `continues` what another client began, then `tokens` evenly at the
    ends of the decode steps `begin` .. `stop` - 1 (without speculation one each), which are places in
    `DecodeSteps.end_ns`; `last_ns` is its last token's time.
    """

    request: IntColumn
    client: IntColumn
    joined_ns: IntColumn
    begin: IntColumn
    stop: IntColumn
    last_ns: IntColumn
    tokens: IntColumn
    continues: BoolColumn

    @classmethod
    def of(cls, tasks: Columns, decode_steps: DecodeSteps) -> Segments:
        """From task rows in which a request's rows are together and in order."""
        continues = (tasks["joined_ns"] < 0) & (tasks["last_step"] > tasks["join_step"])
        emitted = (tasks["joined_ns"] >= 0) | continues
        names = ("request", "client", "joined_ns", "join_step", "last_step", "generated_tokens")
        rows = {name: tasks[name][emitted] for name in names}
        joined = np.where(continues, tasks["started_ns"], tasks["joined_ns"])[emitted]
        offset = decode_steps.first[rows["client"]]
        begin = offset + np.maximum(rows["join_step"], 0)
        stop = np.maximum(offset + rows["last_step"], begin)
        last = joined.copy()
        more = stop > begin
        last[more] = decode_steps.end_ns[stop[more] - 1]
        tokens = rows["generated_tokens"] - (rows["joined_ns"] >= 0)
        return cls(rows["request"], rows["client"], joined, begin, stop, last, tokens, continues[emitted])

    @property
    def resumes(self) -> BoolColumn:
        """Whether the row before is the same request's, and its first token came at the join."""
        resumes = np.zeros(len(self.request), np.bool_)
        resumes[1:] = self.request[1:] == self.request[:-1]
        return resumes & ~self.continues

    def since(self, first_token_ns: IntColumn, decode_steps: DecodeSteps) -> Segments:
        """The segments from a request's first visible token on; `first_token_ns` by request number, -1: leave out.

        A segment that generates this token after hidden ones begins with it.
        """
        first = first_token_ns[self.request]
        changing = ("begin", "joined_ns", "tokens", "continues")
        clipped = replace(self, **{name: getattr(self, name).copy() for name in changing})
        begin, joined, tokens = clipped.begin, clipped.joined_ns, clipped.tokens
        for row in np.flatnonzero((joined < first) & (first <= self.last_ns)).tolist():
            ends = decode_steps.end_ns[begin[row] : self.stop[row]]
            at = int(np.searchsorted(ends, first[row]))
            if ends[at] == first[row]:
                joined[row], begin[row], clipped.continues[row] = first[row], begin[row] + at + 1, False
                tokens[row] -= -(-tokens[row] * (at + 1) // len(ends))
        rows = (first >= 0) & (joined >= first)
        return Segments(*(getattr(clipped, column.name)[rows] for column in fields(self)))


def token_gaps(segments: Segments, decode_steps: DecodeSteps) -> tuple[IntColumn, IntColumn]:
    """Every gap between consecutive output tokens of each request, as (gaps in ns, how often each occurs).

    Tokens that come out together, of one verified draft, have no gap between them.
    """
    ends = decode_steps.end_ns
    entry, resume = _entry_gaps(segments, decode_steps)
    if not len(ends):
        return resume, np.ones(len(resume), np.int64)
    more = segments.stop > segments.begin
    weights = np.bincount(segments.begin[more] + 1, minlength=len(ends) + 1)
    weights -= np.bincount(segments.stop[more], minlength=len(ends) + 1)
    between = np.diff(ends, prepend=ends[:1])
    single = np.concatenate((entry, resume))
    return np.concatenate((between, single)), np.concatenate(
        (np.cumsum(weights)[: len(ends)], np.ones(len(single), np.int64))
    )


def longest_gaps(segments: Segments, decode_steps: DecodeSteps, num_requests: int) -> IntColumn:
    """Each request's longest gap in ns, int64[num_requests] by request number; -1 where it had none."""
    longest = np.full(num_requests, -1, np.int64)
    entry, resume = _entry_gaps(segments, decode_steps)
    more = segments.stop > segments.begin
    np.maximum.at(longest, segments.request[more], entry)
    np.maximum.at(longest, segments.request[segments.resumes], resume)
    between = np.diff(decode_steps.end_ns, prepend=decode_steps.end_ns[:1])
    rows = np.flatnonzero(segments.stop > segments.begin + 1)
    if len(rows):
        # in order of their begin, so that what lies between two ranges is walked once at most
        rows = rows[np.argsort(segments.begin[rows])]
        bounds = np.column_stack((segments.begin[rows] + 1, segments.stop[rows])).ravel()
        # reduceat wants every bound inside the column
        maxima = np.maximum.reduceat(np.append(between, -1), bounds)[::2]
        np.maximum.at(longest, segments.request[rows], maxima)
    return longest


def tokens_by_client(segments: Segments, decode_steps: DecodeSteps, window: Window) -> IntColumn:
    """Output tokens that each client emitted in the window, int64[clients]."""
    num_clients = len(decode_steps.first) - 1
    low, high = np.empty(num_clients, np.int64), np.empty(num_clients, np.int64)
    for client in range(num_clients):
        first, stop = decode_steps.first[client], decode_steps.first[client + 1]
        inside = np.searchsorted(decode_steps.end_ns[first:stop], (window.start_ns, window.stop_ns))
        low[client], high[client] = first + inside
    num_steps = np.maximum(segments.stop - segments.begin, 1)
    before, until = (
        segments.tokens * np.clip(bound[segments.client] - segments.begin, 0, num_steps) // num_steps
        for bound in (low, high)
    )
    emitted = np.zeros(num_clients, np.int64)
    at_join = window.holds(segments.joined_ns) & ~segments.continues
    np.add.at(emitted, segments.client, until - before + at_join)
    return emitted


def _entry_gaps(segments: Segments, decode_steps: DecodeSteps) -> tuple[IntColumn, IntColumn]:
    """Gaps that aren't between two steps of one segment: to its first step, and from the segment before."""
    more = segments.stop > segments.begin
    before = np.where(segments.continues, np.roll(segments.last_ns, 1), segments.joined_ns)
    entry = decode_steps.end_ns[segments.begin[more]] - before[more]
    after = np.flatnonzero(segments.resumes)
    return entry, segments.joined_ns[after] - segments.last_ns[after - 1]
