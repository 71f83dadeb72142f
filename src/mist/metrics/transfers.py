"""How long bytes were under way: KV caches between clients and memories, and what stages hand on.

An expression over the transfer table for `summarise`. Only transfers that ended count, of the requests that are
measured; it never tells where in a network time went.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mist.metrics.distribution import distribution
from mist.metrics.window import BoolColumn, Columns
from mist.records import TRANSFER_KINDS


def summarise_transfers(
    transfers: Columns, requests: Columns, chosen: BoolColumn, percentiles: Sequence[float]
) -> dict[str, dict[str, Any] | None]:
    """Figures of each of `TRANSFER_KINDS`, None where there was none.

    `time_s` is from the first byte's leaving to the last one's arrival: links are shared, so nothing waits for them.
    """
    counted = (transfers["end_ns"] >= 0) & np.isin(transfers["request"], requests["request"][chosen])
    return {
        name: _figures(transfers, counted & (transfers["kind"] == kind), percentiles)
        for kind, name in enumerate(TRANSFER_KINDS)
    }


def _figures(transfers: Columns, rows: BoolColumn, percentiles: Sequence[float]) -> dict[str, Any] | None:
    if not rows.any():
        return None
    num_bytes, start, end = (transfers[name][rows] for name in ("bytes", "start_ns", "end_ns"))
    return {
        "transfers": int(np.count_nonzero(rows)),
        "mean_bytes": float(num_bytes.mean()),
        "time_s": distribution(end - start, percentiles),
    }
