"""How good the answers were: the mean of input figures, one per model, over the requests that finished.

An expression over the records, beside the latencies. It never judges an answer: the scenario states what one of each
model is worth, on whatever scale.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mist.metrics.window import Columns
from mist.records import DONE


def answers(quality: Mapping[str, float], requests: Columns, tasks: Columns, kinds: Sequence[str]) -> Counter[str]:
    """How many of `requests` each stage kind of `quality` answered.

    A request's answer is the last that one of these stages generated for it; requests without any count nowhere.
    `tasks` has a request's rows in order.
    """
    generating = [kinds.index(kind) for kind in quality]
    rows = (tasks["how"] == DONE) & (tasks["generated_tokens"] > 0) & np.isin(tasks["kind"], generating)
    by_request = dict(zip(tasks["request"][rows].tolist(), tasks["kind"][rows].tolist(), strict=True))
    return Counter(kinds[by_request[i]] for i in requests["request"].tolist() if i in by_request)


def summarise_quality(quality: Mapping[str, float], answered: Mapping[str, int]) -> dict[str, Any] | None:
    """`mean` quality of the answers, and the share `answered_by` each model; None without figures.

    `quality` of an answer and how many were `answered`, by stage kind. `mean` is None where there is none.
    """
    if not quality:
        return None
    total = sum(answered.values())
    mean = sum(quality[kind] * number for kind, number in answered.items()) / total if total else None
    return {"mean": mean, "answered_by": {kind: answered.get(kind, 0) / total if total else None for kind in quality}}
