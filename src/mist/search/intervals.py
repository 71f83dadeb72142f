"""What a few seeds, or the requests of one run, say of all others: intervals of means and shares.

Used by capacities and comparisons. Every interval says its level, and is None where there is too little to say.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

#: of every interval
LEVEL = 0.95


def mean_interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """(mean, low, high): Student's t over independent values; no interval of one."""
    from scipy.special import stdtrit

    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, None, None
    half = float(stdtrit(len(values) - 1, (1 + LEVEL) / 2)) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def share_at_least(successes: int, trials: int) -> float:
    """The one-sided lower bound of a probability (Clopper and Pearson, Biometrika 26, 1934)."""
    from scipy.special import betaincinv

    return float(betaincinv(successes, trials - successes + 1, 1 - LEVEL)) if successes else 0.0
