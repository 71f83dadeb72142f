"""Why tokens cost what they cost: the bill of a run, split by what the devices that are paid for did meanwhile.

From the bill, the utilisation of pools and the pace of their clients. It proposes no change, and prices nothing anew.
"""

from __future__ import annotations

import numpy as np

from mist.advice.evidence import Evidence
from mist.advice.pace import host_time
from mist.advice.reasons import BATCH, HOST, IDLE, KV
from mist.metrics.window import Columns

#: (reason, pool)
Cause = tuple[str, str]


def spending(evidence: Evidence) -> dict[Cause, float]:
    """Shares of the bill by reason and pool, largest first; what is left is prompts and full batches of decodes.

    Nothing where something has no price. Idle is what a pool isn't busy; of what it is busy, the host's time, prompts
    computed again after preemption, and steps of decodes alone by the part of their sequences' places that is empty.
    """
    bill = evidence.summary["cost"]
    if not bill["usd"]:
        return {}
    found: dict[Cause, float] = {}
    for pool, usd in bill["pools"].items():
        busy = evidence.summary["clients"].get(pool, {}).get("utilisation")
        if not usd or busy is None:
            continue
        of_bill = usd / bill["usd"]
        found[IDLE, pool] = of_bill * max(0.0, 1 - busy)
        if not evidence.busy_ns(pool):
            continue
        host = evidence.host_share(pool)
        found[HOST, pool] = of_bill * busy * host
        again, thin = _recomputed(evidence, pool), _half_empty(evidence, pool)
        found[KV, pool] = of_bill * busy * (1 - host) * again
        found[BATCH, pool] = of_bill * busy * (1 - host) * thin
    return dict(sorted(((c, s) for c, s in found.items() if s > 0), key=lambda item: -item[1]))


def _recomputed(evidence: Evidence, pool: str) -> float:
    """Of the time of a pool's steps, that of tokens which preempted tasks had computed before, by their number."""
    steps, tasks = evidence.steps_of(pool), evidence.tasks
    tokens = int((steps["num_prefill_tokens"] + steps["num_decodes"]).sum())
    again = evidence.is_resumed & np.isin(
        tasks["client"], [c for c, name in enumerate(evidence.pool_of) if name == pool]
    )
    return float(tasks["computed_tokens"][again].sum()) / tokens if tokens else 0.0


def _half_empty(evidence: Evidence, pool: str) -> float:
    """Of the devices' time, that of decodes alone, by the share of the places of their batches that was empty."""
    steps, limits = evidence.steps_of(pool), evidence.limits[pool]
    if not limits.max_num_seqs:
        return 0.0
    took = _device_time(evidence, pool, steps)
    alone = (steps["num_prefills"] == 0) & (steps["num_decodes"] > 0)
    empty = 1 - np.minimum(steps["num_decodes"] / limits.max_num_seqs, 1)
    whole = float(took.sum())
    return float((took * empty)[alone].sum()) / whole if whole else 0.0


def _device_time(evidence: Evidence, pool: str, steps: Columns) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    took = (steps["end_ns"] - steps["start_ns"]).astype(float)
    return took - host_time(steps, steps["num_prefills"], took, evidence.limits[pool])
