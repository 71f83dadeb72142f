"""The offered load: what arrived per second, whatever the deployment made of it.

Beside the throughput, which it is compared with. Only the share of it that was served looks at what became of requests;
it has no value where arrivals wait for the system.
"""

from __future__ import annotations

import numpy as np

from mist.metrics.clients import ratio
from mist.metrics.window import BoolColumn, Columns
from mist.records import FINISHED, IntColumn
from mist.units import NS_PER_S


def offered_load(
    requests: Columns, chosen: BoolColumn, output_tokens: IntColumn | None = None, first_request: int = 0
) -> dict[str, float | None]:
    """Requests and output tokens asked for per second, over the time from the first chosen arrival to the last.

    n arrivals span n - 1 gaps: the rate is (n - 1) / span. Tokens are that rate times the mean output; `output_tokens`
    by request number from `first_request` on, the generated ones where None. `served_share` is that of these tokens
    which requests that finished asked for. None each where fewer than two instants are known.
    """
    arrivals = requests["arrival_ns"][chosen]
    span_ns = int(np.ptp(arrivals)) if len(arrivals) else 0
    if not span_ns:
        return {"requests_per_s": None, "output_tokens_per_s": None, "served_share": None, "span_s": None}
    asked = requests["output_tokens"] if output_tokens is None else output_tokens[requests["request"] - first_request]
    served = int(asked[chosen & (requests["status"] == FINISHED)].sum())
    per_s = (len(arrivals) - 1) * NS_PER_S / span_ns
    return {
        "requests_per_s": per_s,
        "output_tokens_per_s": per_s * float(asked[chosen].mean()),
        "served_share": ratio(served, int(asked[chosen].sum())),
        "span_s": span_ns / NS_PER_S,
    }
