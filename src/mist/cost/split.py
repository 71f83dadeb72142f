"""Whose a client's busy time was: every step's time, or energy, shared out to the tasks that were in it, by tokens.

Between the records and the usage of a run, which has the sums per tenant and stage. Decodes are exact, step by step;
of prompts the mean over the steps that they went through is taken. It never says what idle time was for.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mist.metrics.window import Columns
from mist.records import IntColumn

FloatColumn = npt.NDArray[np.float64]


class Split:
    """Amounts of a client's steps, such as their time and their energy, shared out to keys of tasks, block by block.

    A step's amount goes to the tokens that it computed, one for each decode, and of it those of prompts to the prompts
    in it. Where nothing is counted in tokens, such as searches, tasks count.
    """

    def __init__(self, num_keys: int, num_amounts: int) -> None:
        shape = (num_amounts, num_keys)
        self._of_prompts, self._of_answers = np.zeros(num_amounts), np.zeros(num_amounts)
        self._prompts, self._answers = np.zeros(shape), np.zeros(shape)
        #: tokens of prompts that no step is known of, by key; and those of all steps
        self._unseen, self._num_tokens = np.zeros(num_keys), 0.0
        self._in_tokens = False

    def add(self, steps: Columns, tasks: Columns, keys: IntColumn, amounts: FloatColumn, num_before: int = 0) -> None:
        """Rows of one client, steps in the order of time; the first `num_before` of them were in blocks before.

        `keys`: one per task; `amounts`: float64[amounts, steps]. `join_step` and `last_step` count from the first step.
        """
        self._in_tokens |= bool(steps["num_prefill_tokens"].any() or not steps["num_prefills"].any())
        prefill = steps["num_prefill_tokens" if self._in_tokens else "num_prefills"].astype(np.float64)
        here = (tasks["started_ns"] >= 0) & (tasks["end_ns"] > tasks["started_ns"])
        computed = np.where(here, tasks["computed_tokens"] if self._in_tokens else 1, 0).astype(np.float64)
        until = np.where(tasks["joined_ns"] >= 0, tasks["joined_ns"], tasks["end_ns"])
        begin = np.searchsorted(steps["start_ns"], tasks["started_ns"], side="left")
        stop = np.maximum(np.searchsorted(steps["end_ns"], until, side="right"), begin)
        tokens, decodes = _sums(prefill), steps["num_decodes"].astype(np.float64)
        done = tokens[stop] - tokens[begin]
        self._num_tokens += float(prefill[num_before:].sum())
        self._unseen += self._by_key(keys, np.where(done > 0, 0.0, computed))
        first, last = np.maximum(tasks["join_step"], 0), np.maximum(tasks["last_step"], 0)
        units = prefill + decodes
        for at, amount in enumerate(amounts):
            each = np.divide(amount, units, out=np.zeros(len(units)), where=units > 0)
            through, decoding = _sums(each * prefill), _sums(each[decodes > 0])
            spent, top = through[stop] - through[begin], len(decoding) - 1
            rates = np.divide(spent, done, out=np.zeros(len(done)), where=done > 0)
            self._prompts[at] += self._by_key(keys, computed * rates)
            answers = decoding[np.minimum(np.maximum(first, last), top)] - decoding[np.minimum(first, top)]
            self._answers[at] += self._by_key(keys, answers)
            self._of_prompts[at] += float((each * prefill)[num_before:].sum())
            self._of_answers[at] += float((each * decodes)[num_before:].sum())

    def shares(self, at: int) -> FloatColumn:
        """Of the `at`-th amounts what each key has, float64[keys]; they add up to those of all steps with tasks known
        to be in them."""
        whole = float(self._of_prompts[at])
        mean = whole / self._num_tokens if self._num_tokens else 0.0
        prompts = _scaled(self._prompts[at] + mean * self._unseen, whole)
        return prompts + _scaled(self._answers[at], float(self._of_answers[at]))

    def _by_key(self, keys: IntColumn, parts: FloatColumn) -> FloatColumn:
        sums: FloatColumn = np.bincount(keys, parts, len(self._unseen)).astype(np.float64)
        return sums


def _sums(column: FloatColumn) -> FloatColumn:
    """Running sums from 0 on: one more than there are rows."""
    return np.concatenate(([0.0], np.cumsum(column)))


def _scaled(parts: FloatColumn, whole: float) -> FloatColumn:
    total = float(parts.sum())
    return parts * (whole / total) if total > 0 else parts
