"""How much clients were lent to prompts: how often, for which part of the run, and for how many prompts.

Expressions over the table of loans of a whole run, beside the other figures of a summary. It never says who is lent.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mist.metrics.clients import ratio
from mist.metrics.window import Window
from mist.records import Records


def summarise_lending(records: Records, num_lenders: int, num_prompts: int, whole: Window) -> dict[str, Any] | None:
    """`loans`, the `share_of_time` of all clients that may be lent, and `prompts` they took; None if nobody may be.

    A loan that has not ended lasts to the run's last event.
    """
    if not num_lenders:
        return None
    loans = records.loans.as_columns()
    ends = np.where(loans["end_ns"] >= 0, loans["end_ns"], whole.last_ns)
    lent_ns = int((ends - loans["start_ns"]).sum())
    return {
        "loans": len(ends),
        "share_of_time": ratio(lent_ns, num_lenders * (whole.last_ns - whole.first_ns)),
        "prompts": num_prompts,
    }
