"""Per-request latencies from the request table: TTFT, TPOT, E2E. Definitions are in `docs/metrics.md`.

Columns of the request table come in, one value per row goes out, so that summaries, tables and SLOs all read the same
numbers. Requests that didn't finish have no latency here: they are counted, never averaged in.
"""

from __future__ import annotations

import numpy as np

from mist.metrics.distribution import FloatColumn
from mist.metrics.window import Columns
from mist.records import FINISHED, IntColumn


def ttft_ns(requests: Columns) -> IntColumn:
    """Arrival to first visible token, in ns; -1 for requests that didn't finish or had no output."""
    known = (requests["status"] == FINISHED) & (requests["first_token_ns"] >= 0)
    return np.where(known, requests["first_token_ns"] - requests["arrival_ns"], -1)


def e2e_ns(requests: Columns) -> IntColumn:
    """Arrival to the end of the last stage, in ns; -1 for requests that didn't finish."""
    return np.where(requests["status"] == FINISHED, requests["end_ns"] - requests["arrival_ns"], -1)


def tpot_ns(requests: Columns) -> FloatColumn:
    """(E2E - TTFT) / (output tokens - 1), in ns; -1 for requests that didn't finish or had fewer than two tokens."""
    tokens = requests["output_tokens"]
    known = (requests["status"] == FINISHED) & (requests["first_token_ns"] >= 0) & (tokens > 1)
    return np.where(known, (requests["end_ns"] - requests["first_token_ns"]) / np.maximum(tokens - 1, 1), -1.0)
