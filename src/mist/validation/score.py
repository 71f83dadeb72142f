"""Error statistics of comparisons: by source, device, engine and model, each metric for itself; and what was covered.

The last part of a validation. Errors are absolute percentage errors; the main tables hold what is trusted (A and B) and
not saturated, everything else stands apart. It never leaves out a comparison because of its error.
"""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mist.errors import ScenarioError
from mist.scenario import catalogue
from mist.validation.evaluate import Comparison, Evaluated
from mist.validation.points import TRUSTS, PointFile

SCHEMA_VERSION = 1
#: trust that is enough to judge by
TRUSTED = ("A", "B")

Statistics = dict[str, Any]
Tables = dict[str, dict[str, Statistics]]


def report(file: PointFile, evaluated: Sequence[Evaluated]) -> dict[str, Any]:
    """The whole outcome as one JSON document; errors in percent."""
    comparisons = [c for each in evaluated for c in each.comparisons]
    trusted = [c for c in comparisons if c.trust in TRUSTED]
    judged = [c for c in trusted if not c.saturated]
    by_trust = {
        trust: grouped([c for c in comparisons if c.trust == trust and not c.saturated], source_of) for trust in TRUSTS
    }
    return {
        "schema_version": SCHEMA_VERSION,
        "points_file": file.path.name,
        "sources": grouped(judged, source_of),
        "saturated": grouped([c for c in trusted if c.saturated], source_of),
        "trust": by_trust,
        "devices": grouped(judged, lambda c: named("devices", c.device)),
        "engines": grouped(judged, lambda c: c.engine),
        "profiles": grouped(judged, lambda c: c.profile),
        "models": grouped(judged, lambda c: c.model),
        "families": families(judged),
        "points": [_plain(c) for c in comparisons],
        "coverage": coverage(file, evaluated),
    }


def source_of(comparison: Comparison) -> str:
    """The data set."""
    return comparison.source


@functools.cache
def named(kind: str, given: str) -> str:
    """The catalogue's own name for what a row names, so that aliases of one thing come together."""
    try:
        return str(catalogue.read(kind, given, Path())[1])
    except ScenarioError:
        return given


def family_of(source: str) -> str:
    """Data sets of one origin count as one: `blis_training_vllm` and `blis_sim2real_vllm` are both of `blis`."""
    for family in ("llm_inference_bench", "blis", "dstack", "trtllm", "silicon"):
        if source.startswith(family):
            return family
    return source


def kind_of(metric: str) -> str:
    """What a metric measures, whatever the statistic: TTFT, TPOT, ITL, E2E, makespan, throughput, KV transfer."""
    for prefix, kind in _KINDS:
        if metric.startswith(prefix):
            return kind
    return "throughput"


_KINDS = (
    ("ttft_p9", "ttft_tail"), ("ttft", "ttft"), ("batch_prefill", "ttft"), ("tpot_p9", "tpot_tail"), ("tpot", "tpot"),
    ("itl", "itl"), ("e2e_p9", "e2e_tail"), ("e2e", "e2e"), ("batch_e2e", "e2e"), ("makespan", "makespan"),
    ("kv_transfer", "kv_transfer"),
)  # fmt: skip


def grouped(
    comparisons: Iterable[Comparison],
    by: Callable[[Comparison], str],
    of: Callable[[Comparison], str] = lambda c: c.metric,
) -> Tables:
    """{group: {metric (or what `of` says): statistics}}, sorted."""
    groups: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for c in comparisons:
        groups[by(c)][of(c)].append(c.error)
    return {
        group: {metric: statistics(errors) for metric, errors in sorted(metrics.items())}
        for group, metrics in sorted(groups.items())
    }


def statistics(errors: Sequence[float]) -> Statistics:
    """Of signed errors in percent: n, median, mean and P90 of their size, and their mean with sign (bias)."""
    signed = np.array(errors)
    size = np.abs(signed)
    return {
        "n": len(errors),
        "median_ape": round(float(np.median(size)), 3),
        "mean_ape": round(float(size.mean()), 3),
        "p90_ape": round(float(np.percentile(size, 90)), 3),
        "bias": round(float(signed.mean()), 3),
    }


def families(comparisons: Iterable[Comparison]) -> dict[str, Any]:
    """By family of sources and kind of metric; and per kind the mean of the families' medians, each counted once."""
    tables = grouped(comparisons, lambda c: family_of(c.source), lambda c: kind_of(c.metric))
    kinds = sorted({kind for table in tables.values() for kind in table})
    means = {}
    for kind in kinds:
        medians = [table[kind]["median_ape"] for table in tables.values() if kind in table]
        means[kind] = {"families": len(medians), "mean_of_medians": round(float(np.mean(medians)), 3)}
    return {"by_family": tables, "over_families": means}


def coverage(file: PointFile, evaluated: Sequence[Evaluated]) -> dict[str, Any]:
    """Rows in the file, those that define a run, those compared, and each other one with its reason.

    `sampled` are the rows that were to be compared where points were sampled, else null; `assumptions` say what was
    taken for granted, and of how many compared rows.
    """
    assumed = Counter[str]()
    for each in evaluated:
        assumed.update(dict.fromkeys(each.assumptions, len(each.comparisons)))
    skipped = [row for each in evaluated for row in each.skipped]
    compared = sum(len(each.comparisons) for each in evaluated)
    return {
        "rows": file.num_rows,
        "runnable": file.num_rows - len(file.not_runnable),
        "sampled": file.num_sampled,
        "run": compared,
        "assumptions": {what: number for what, number in assumed.most_common() if number},
        "skipped": [{"id": i, "reason": reason} for i, reason in [*file.not_runnable, *skipped]],
    }


def reasons(skipped: Iterable[Mapping[str, str]]) -> list[tuple[str, int]]:
    """Reasons of skips, the most frequent first."""
    return Counter(row["reason"] for row in skipped).most_common()


def _plain(comparison: Comparison) -> dict[str, Any]:
    row = asdict(comparison)
    for key in ("measured", "simulated"):
        row[key] = float(f"{row[key]:.8g}")
    for key in ("ape", "error"):
        row[key] = round(row[key], 3)
    return row
