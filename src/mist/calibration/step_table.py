"""Profiled engine steps as columns: the features of each, its time, and the operating point that it belongs to.

What readers of measured files return and what the fit takes. It knows no file format and drops no step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from mist.perf.step_profile import DECODE, FEATURES, MIXED, PREFILL

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

#: Contexts and attention work within this share count as equal when repeats are told apart.
EQUAL_SHARE = 0.02


@dataclass(frozen=True, slots=True)
class StepTable:
    """Steps as columns; `group`: the operating point that a step belongs to, held out as a whole.

    `chunk_*` are sums over the prefill chunks (c, s) of a step: their number, Σ c, Σ s and Σ c·(s + c/2).
    `decode_context`: Σ of attended contexts, new tokens included. `facts`: what the file says of model, device, tp.
    """

    num_decodes: FloatArray
    decode_context: FloatArray
    num_chunks: FloatArray
    chunk_tokens: FloatArray
    chunk_context: FloatArray
    chunk_attention: FloatArray
    time_ns: FloatArray
    group: IntArray | None = None
    facts: Mapping[str, str | int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.time_ns)

    def features(self) -> FloatArray:
        """[steps, 4] in the order of `FEATURES`."""
        columns = {
            "new_tokens": self.chunk_tokens + self.num_decodes,
            "sequences": self.num_chunks + self.num_decodes,
            "context": self.chunk_context + self.decode_context - self.num_decodes,
            "attention": self.chunk_attention + self.decode_context,
        }
        return np.stack([columns[name] for name in FEATURES], axis=1)

    def regime(self, name: str) -> npt.NDArray[np.bool_]:
        """Which steps are of the regime `name`."""
        has_chunks, has_decodes = self.num_chunks > 0, self.num_decodes > 0
        chosen: npt.NDArray[np.bool_] = {
            PREFILL: has_chunks & ~has_decodes, DECODE: ~has_chunks & has_decodes, MIXED: has_chunks & has_decodes,
        }[name]  # fmt: skip
        return chosen

    def repeats(self) -> IntArray:
        """A number for each step, the same for steps whose features are equal, sums of contexts within 2 %."""
        counts = np.stack([self.num_decodes, self.num_chunks, self.chunk_tokens], axis=1)
        sums = np.stack([self.decode_context, self.chunk_context, self.chunk_attention], axis=1)
        return _numbered(np.concatenate([counts, np.round(np.log1p(sums) / EQUAL_SHARE)], axis=1))

    def groups(self) -> IntArray:
        """The group of each step; unless the file names them, steps with the same sequences and new tokens."""
        if self.group is not None:
            return self.group
        return _numbered(np.stack([self.num_decodes, self.num_chunks, self.chunk_tokens], axis=1))


def _numbered(keys: FloatArray) -> IntArray:
    found: IntArray = np.unique(keys, axis=0, return_inverse=True)[1].reshape(-1).astype(np.int64)
    return found
