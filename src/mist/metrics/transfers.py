"""How long KV caches were under way: from prefill to decode clients, and from host memory to a device.

An expression over the transfer table for `summarise`. Only transfers that ended count, of the requests that are
measured; it never tells where in a network time went.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mist.metrics.distribution import distribution
from mist.metrics.window import BoolColumn, Columns


def summarise_transfers(
    transfers: Columns, requests: Columns, chosen: BoolColumn, percentiles: Sequence[float]
) -> dict[str, dict[str, Any] | None]:
    """`kv_transfer` (between clients) and `prefix_fetch` (from host memory): None each where there was none.

    `wait_s` is the time for the link to be free, `time_s` that of the transfer itself, latency included.
    """
    counted = (transfers["end_ns"] >= 0) & np.isin(transfers["request"], requests["request"][chosen])
    from_client = transfers["sender"] >= 0
    return {
        "kv_transfer": _figures(transfers, counted & from_client, percentiles),
        "prefix_fetch": _figures(transfers, counted & ~from_client, percentiles),
    }


def _figures(transfers: Columns, rows: BoolColumn, percentiles: Sequence[float]) -> dict[str, Any] | None:
    if not rows.any():
        return None
    num_bytes, queued, start, end = (transfers[name][rows] for name in ("bytes", "queued_ns", "start_ns", "end_ns"))
    return {
        "transfers": int(np.count_nonzero(rows)),
        "mean_bytes": float(num_bytes.mean()),
        "wait_s": distribution(start - queued, percentiles),
        "time_s": distribution(end - start, percentiles),
    }
