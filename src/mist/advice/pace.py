"""What the steps of a client spent their time on, and what kept those who waited meanwhile from coming in.

From the step table of a run, step by step; an interval of somebody's wait or service is then a difference of running
sums. It knows nothing of requests, and never asks a performance model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mist.engine import EngineProfile
from mist.metrics.distribution import FloatColumn
from mist.metrics.window import Columns
from mist.records import IntColumn

#: of a step's time, by what whoever waited beside it waited for: the token budget, a place among max_num_seqs, the step
#: itself, KV blocks, KV blocks of prompts under way to a decode client; and all of these but KV's while the host worked
TOKENS, SLOTS, STEP, BLOCKS, SENDING, HOST_WAIT = range(6)
#: of a step's time, by what whoever was served in it could do without: the host's, and prompts beside decodes
HOST_SERVE, PROMPTS = 6, 7
#: of the time between steps, when prompts under way to a decode client held so many blocks that nothing could begin
STALLED = 8
NUM_PARTS = 9


@dataclass(frozen=True, slots=True)
class Limits:
    """What a client's steps are bounded by; 0 where nothing is.

    `largest_prompt`: tokens of the longest in the run, for which there must be room; `overlapped` and the times are the
    engine's, ns.
    """

    engine: EngineProfile
    max_num_batched_tokens: int = 0
    max_num_seqs: int = 0
    kv_blocks: int = 0
    block_size: int = 0
    largest_prompt: int = 0
    tokens_per_decode: int = 1
    watermark: float = 0.0


@dataclass(frozen=True, slots=True)
class Pace:
    """One client's time in turns, a step and what is between it and the next: where they start and end in ns.

    `sums`: of their parts up to each, float64[turns + 1, NUM_PARTS].
    """

    start: IntColumn
    end: IntColumn
    sums: FloatColumn

    def between(self, since: IntColumn, until: IntColumn) -> FloatColumn:
        """ns of each part in each of the intervals, float64[intervals, NUM_PARTS]."""
        return self._up_to(until) - self._up_to(since)

    def next_start(self, times: IntColumn) -> IntColumn:
        """When the first step at or after each instant starts; 2**62 where none does."""
        steps = self.start[::2]
        return np.append(steps, 1 << 62)[np.searchsorted(steps, times)]

    def _up_to(self, times: IntColumn) -> FloatColumn:
        if not len(self.start):
            return np.zeros((len(times), NUM_PARTS))
        at = np.searchsorted(self.start, times, side="right") - 1
        step = np.maximum(at, 0)
        done = np.clip((times - self.start[step]) / np.maximum(self.end[step] - self.start[step], 1), 0, 1)
        within = (self.sums[step + 1] - self.sums[step]) * done[:, None]
        return np.where((at >= 0)[:, None], self.sums[step] + within, 0.0)


def pace_of(
    steps: Columns, sampled: IntColumn, sending_blocks: FloatColumn, sending_after: FloatColumn, limits: Limits
) -> Pace:
    """The pace of the client that `steps` are of, in order of time.

    `sampled`: prompts that end in each; `sending_blocks` and `sending_after`: KV blocks of prompts that are under way
    from here as it starts, and as it ends.
    """
    took = (steps["end_ns"] - steps["start_ns"]).astype(float)
    host = host_time(steps, sampled, took, limits)
    parts = np.zeros((len(took), NUM_PARTS))
    bound = what_bounds(steps, limits)
    held = np.clip(sending_blocks / np.maximum(steps["kv_blocks"], 1), 0, 1)
    for part in (TOKENS, SLOTS, STEP):
        parts[:, part] = np.where(bound == part, took - host, 0)
    parts[:, BLOCKS] = np.where(bound == BLOCKS, took * (1 - held), 0)
    parts[:, SENDING] = np.where(bound == BLOCKS, took * held, 0)
    parts[:, HOST_WAIT] = np.where(bound == BLOCKS, 0, host)
    parts[:, HOST_SERVE] = host
    parts[:, PROMPTS] = _beyond_decodes(steps, took - host)
    after = np.append(steps["start_ns"][1:], steps["end_ns"][-1:])
    turns = np.zeros((2 * len(took), NUM_PARTS))
    turns[::2] = parts
    needed = min(limits.largest_prompt, limits.max_num_batched_tokens) / max(1, limits.block_size)
    no_blocks = (needed > limits.kv_blocks * (1 - limits.watermark) - sending_after) & (sending_after > 0)
    turns[1::2, STALLED] = np.where(no_blocks, after - steps["end_ns"], 0)
    sums = np.concatenate([np.zeros((1, NUM_PARTS)), np.cumsum(turns, axis=0)])
    starts, ends = ((steps["start_ns"], steps["end_ns"]), (steps["end_ns"], after))
    return Pace(np.stack(starts, 1).reshape(-1), np.stack(ends, 1).reshape(-1), sums)


def host_time(steps: Columns, sampled: IntColumn, took: FloatColumn, limits: Limits) -> FloatColumn:
    """ns of each step in which the devices had nothing to do but wait for the engine's host.

    Where an engine overlaps both, all of a step that lasts as long as the host needs, and nothing of the others.
    """
    engine = limits.engine
    tokens = steps["num_decodes"] * limits.tokens_per_decode + np.minimum(sampled, steps["num_prefills"])
    host = engine.step_overhead_ns + engine.token_overhead_ns * tokens.astype(float)
    host = np.minimum(host + engine.prefill_overhead_ns * (steps["num_prefills"] > 0), took)
    return np.where(took <= host, took, 0.0) if engine.overlapped else host


def what_bounds(steps: Columns, limits: Limits) -> IntColumn:
    """What kept whoever waited out of each step: the token budget, max_num_seqs, KV blocks, or nothing but the step.

    Blocks where neither of the former was used up and there was no room for the longest prompt, or what the budget
    left of it.
    """
    decoded = steps["num_decodes"] * limits.tokens_per_decode
    left = limits.max_num_batched_tokens - steps["num_prefill_tokens"] - decoded
    no_tokens = (left <= 0) & (limits.max_num_batched_tokens > 0)
    no_slots = (steps["num_prefills"] + steps["num_decodes"] >= limits.max_num_seqs) & (limits.max_num_seqs > 0)
    needed = np.minimum(left, limits.largest_prompt) / max(1, limits.block_size)
    room = limits.kv_blocks * (1 - limits.watermark) - steps["kv_blocks"]
    no_blocks = (needed > room) | limits.engine.reserves_output
    no_blocks &= (limits.kv_blocks > 0) & (steps["num_waiting"] > 0)
    return np.select([no_tokens, no_slots, no_blocks], [TOKENS, SLOTS, BLOCKS], STEP)


def _beyond_decodes(steps: Columns, device: FloatColumn) -> FloatColumn:
    """By how much each step with prompts beside decodes took the devices longer than the median of those without."""
    alone = (steps["num_prefills"] == 0) & (steps["num_decodes"] > 0)
    mixed = (steps["num_prefills"] > 0) & (steps["num_decodes"] > 0)
    if not alone.any():
        return np.zeros(len(device))
    return np.where(mixed, np.maximum(device - np.median(device[alone]), 0), 0)
