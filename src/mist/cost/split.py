"""Whose a client's busy time was: every step's time, or energy, shared out to the tasks that were in it, by tokens.

Between the records and the usage of a run, which has the sums per tenant and stage. Decodes are exact, step by step;
of prompts the mean over the steps that they went through is taken. It never says what idle time was for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mist.metrics.window import Columns
from mist.records import IntColumn

FloatColumn = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Split:
    """The steps and the tasks of one client, ready to share out any amounts per step.

    A step's amount goes to the tokens that it computed, one for each decode, and of it those of prompts to the prompts
    in it. Where nothing is counted in tokens, such as searches, tasks count.
    """

    prefill: FloatColumn
    decodes: FloatColumn
    begin: IntColumn
    stop: IntColumn
    computed: FloatColumn
    first_decode: IntColumn
    last_decode: IntColumn

    @classmethod
    def of(cls, steps: Columns, tasks: Columns) -> Split:
        """From rows of one client, steps in the order of time."""
        tokens = steps["num_prefill_tokens"].any()
        prefill = steps["num_prefill_tokens" if tokens else "num_prefills"].astype(np.float64)
        here = (tasks["started_ns"] >= 0) & (tasks["end_ns"] > tasks["started_ns"])
        computed = np.where(here, tasks["computed_tokens"] if tokens else 1, 0).astype(np.float64)
        until = np.where(tasks["joined_ns"] >= 0, tasks["joined_ns"], tasks["end_ns"])
        begin = np.searchsorted(steps["start_ns"], tasks["started_ns"], side="left")
        stop = np.maximum(np.searchsorted(steps["end_ns"], until, side="right"), begin)
        first, last = np.maximum(tasks["join_step"], 0), np.maximum(tasks["last_step"], 0)
        return cls(
            prefill, steps["num_decodes"].astype(np.float64), begin, stop, computed, first, np.maximum(first, last)
        )

    def shares(self, amounts: FloatColumn) -> FloatColumn:
        """Of `amounts` (float64[steps]) what each task has; they add up to those of all steps with tasks known to be in
        them."""
        units = self.prefill + self.decodes
        each = np.divide(amounts, units, out=np.zeros(len(units)), where=units > 0)
        prompts = self._of_prompts(each * self.prefill)
        decoding = _sums(each[self.decodes > 0])
        top = len(decoding) - 1
        answers = decoding[np.minimum(self.last_decode, top)] - decoding[np.minimum(self.first_decode, top)]
        return prompts + _scaled(answers, float((each * self.decodes).sum()))

    def _of_prompts(self, amounts: FloatColumn) -> FloatColumn:
        through, tokens = _sums(amounts), _sums(self.prefill)
        spent, done = (column[self.stop] - column[self.begin] for column in (through, tokens))
        mean = through[-1] / tokens[-1] if tokens[-1] else 0.0
        rates = np.divide(spent, done, out=np.full(len(done), mean), where=done > 0)
        return _scaled(self.computed * rates, float(through[-1]))


def _sums(column: FloatColumn) -> FloatColumn:
    """Running sums from 0 on: one more than there are rows."""
    return np.concatenate(([0.0], np.cumsum(column)))


def _scaled(parts: FloatColumn, whole: float) -> FloatColumn:
    total = float(parts.sum())
    return parts * (whole / total) if total > 0 else parts
