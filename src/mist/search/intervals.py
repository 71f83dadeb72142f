"""What a few seeds, or the requests of one run, say of all others: intervals of means and shares.

Used by capacities and comparisons. Every interval says its level, and is None where there is too little to say.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

#: of every interval
LEVEL = 0.95
#: of a bootstrap
NUM_RESAMPLES = 400
#: told where several seeds gave one and the same
ALIKE = "All seeds gave the same: nothing is drawn at random here, so they say nothing of the spread; take --seeds 1."


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


def paired_blocks(num_pairs: int) -> Iterator[npt.NDArray[np.int64]]:
    """Resamples of the numbers of `num_pairs` pairs in their order: int64[num_pairs] each, in blocks of neighbours.

    The circular block bootstrap (Politis and Romano, 1992), with blocks of the square root of the number of pairs:
    requests that queue together are drawn together. The same resamples every time.
    """
    rng = np.random.default_rng(0)
    size = math.isqrt(num_pairs - 1) + 1
    for _ in range(NUM_RESAMPLES):
        starts = rng.integers(num_pairs, size=-(-num_pairs // size))
        yield ((starts[:, None] + np.arange(size)) % num_pairs).ravel()[:num_pairs]


def interval_of(samples: Sequence[float]) -> tuple[float, float]:
    """The central part of `samples` that holds the share `LEVEL` of them."""
    low, high = np.quantile(samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
