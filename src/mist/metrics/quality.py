"""How good the answers were: the mean of input figures, one per model, over the requests that finished.

An expression over the records, beside the latencies. It never judges an answer: the scenario states what one of each
model is worth, on whatever scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mist.metrics.window import Columns
from mist.records import DONE


def summarise_quality(
    quality: Mapping[str, float], requests: Columns, tasks: Columns, kinds: Sequence[str]
) -> dict[str, Any] | None:
    """`mean` quality of the answers to `requests`, and the share `answered_by` each model; None without figures.

    `quality` by stage kind. A request's answer is the last that one of these stages generated for it; requests without
    any count nowhere, and `mean` is None where there is none. `tasks` has a request's rows in order.
    """
    if not quality:
        return None
    generating = [kinds.index(kind) for kind in quality]
    rows = (tasks["how"] == DONE) & (tasks["generated_tokens"] > 0) & np.isin(tasks["kind"], generating)
    by_request = dict(zip(tasks["request"][rows].tolist(), tasks["kind"][rows].tolist(), strict=True))
    answers = [by_request[i] for i in requests["request"].tolist() if i in by_request]
    shares = {kind: answers.count(kinds.index(kind)) / len(answers) if answers else None for kind in quality}
    mean = sum(quality[kinds[answer]] for answer in answers) / len(answers) if answers else None
    return {"mean": mean, "answered_by": shares}
