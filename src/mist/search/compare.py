"""Comparison of deployments under one workload, request by request: what the second does to each request of the first.

Runs come in, differences with their confidence go out. Runs of other requests are refused, with what differs. It runs
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mist.errors import InvariantError, Problem, ScenarioError
from mist.metrics.distribution import FloatColumn
from mist.scenario.value import Scenario
from mist.search.evaluate import Executor, Job
from mist.search.executors.serial import Serial
from mist.search.intervals import LEVEL, interval_of, mean_interval, paired_blocks
from mist.search.runs import METRICS, Run, measured, read_run

SCHEMA_VERSION = 1
STATISTICS = ("mean", "p50", "p99")
#: figures of whole runs that are compared where both have them, as paths in a summary
FIGURES = (
    ("throughput", "requests_per_s"),
    ("throughput", "output_tokens_per_s"),
    ("slo", "attainment"),
    ("slo", "goodput_requests_per_s"),
    ("cost", "usd_per_hour"),
    ("cost", "usd_per_million_output_tokens"),
    ("cost", "usd_per_thousand_requests"),
    ("energy", "joules_per_output_token"),
)
#: pairs that an interval within one run needs
_MIN_PAIRS = 30
#: values of two workloads that differ and are told one by one
_MOST_TOLD = 8


@dataclass(frozen=True, eq=False)
class Deployment:
    """One side of a comparison: runs of one deployment, one per seed; of `num_alike` seeds that gave the same, one."""

    label: str
    runs: Sequence[Run]
    num_alike: int = 1


def deployments_of(
    given: Sequence[Path],
    *,
    seeds: int = 1,
    executor: Executor | None = None,
    load: Callable[[Path], Scenario] | None = None,
    **overrides: Any,
) -> list[Deployment]:
    """Scenario files, run with `seeds` seeds from their own on and with `overrides`, and folders of earlier runs.

    `load` reads a file and changes it. Raises ScenarioError where one can't be run or read.
    """
    folders = {path: read_run(path) for path in given if path.is_dir()}
    if folders and (seeds > 1 or overrides or load is not None):
        what = "seeds" if seeds > 1 else "changes"
        raise ScenarioError(Problem(f"{next(iter(folders))} was run already, without these {what}", hint="give files"))
    jobs: list[Job] = []
    for i, path in enumerate(given):
        if path not in folders:
            scenario = Job("", load(path).source if load else path, overrides).scenario()
            jobs += [
                Job(f"{i} {scenario.seed + n}", scenario.source, {"seed": scenario.seed + n}, measure=measured)
                for n in range(seeds)
            ]
    found = {outcome.key: outcome for outcome in (executor or Serial()).run(jobs)}
    for job in jobs:
        if (outcome := found[job.key]).summary is None:
            path = given[int(job.key.split()[0])]
            raise (InvariantError if outcome.is_bug else ScenarioError)(f"{path}: {outcome.error}")
    made: list[Deployment] = []
    for i, path in enumerate(given):
        own = [found[job.key].summary or {} for job in jobs if job.key.startswith(f"{i} ")]
        runs = [folders[path]] if path in folders else [Run(str(path), **each) for each in own]
        made.append(Deployment(str(path), runs))
    if seeds > 1 and all(_alike(each.runs) for each in made):  # as many intervals of no width would say nothing
        return [Deployment(each.label, each.runs[:1], seeds) for each in made]
    return made


def _alike(runs: Sequence[Run]) -> bool:
    """Whether every request of each run took what it took in the first: nothing was drawn at random."""
    first, *others = (run.requests for run in runs)
    return all(
        np.array_equal(first[name], other[name], equal_nan=name != "status") for other in others for name in first
    )


def compare(deployments: Sequence[Deployment]) -> dict[str, Any]:
    """Each deployment against the first one, as a document.

    Of requests that finished in both, having arrived in the measured window: every statistic in both, and the
    difference (the other minus the first, s) with an interval. From one run each, that is by a bootstrap of blocks of
    neighbouring requests (`paired_blocks`), and says what other requests of the same load would have given; from runs
    of several seeds, by Student's t over these. ScenarioError where the requests aren't the same.
    """
    first, *others = deployments
    for other in others:
        for a, b in zip(first.runs, other.runs, strict=True):
            _check_same(a, b)
    return {
        "schema_version": SCHEMA_VERSION,
        "baseline": first.label,
        "num_seeds": len(first.runs),
        "interval": {"level": LEVEL, "by": "seeds" if len(first.runs) > 1 else "blocks of requests"},
        "deployments": [_served(each) for each in deployments],
        "against": [_against(first, other) for other in others],
        "notes": list(_notes(deployments)),
    }


def _served(deployment: Deployment) -> dict[str, Any]:
    """What became of a deployment's requests, summed over its runs, and in how many of these the load was too much."""
    counts = [run.summary.get("requests") or {} for run in deployment.runs]
    lost = ("cancelled", "timed_out", "unfinished")
    total = {key: sum(each.get(key, 0) for each in counts) for key in ("arrived", "finished", "rejected", "refused")}
    return {
        "label": deployment.label,
        "num_runs": len(deployment.runs),
        "arrived": total["arrived"],
        "finished": total["finished"],
        "rejected": total["rejected"] + total["refused"],
        "lost": sum(each.get(key, 0) for each in counts for key in lost),
        "num_saturated": sum(bool(run.summary.get("saturated")) for run in deployment.runs),
        "num_near_capacity": sum(bool(run.summary.get("near_capacity")) for run in deployment.runs),
        "num_slo_met": _num_slo_met(deployment),
    }


def _num_slo_met(deployment: Deployment) -> int | None:
    """In how many runs every target of the SLO was met; None where there is no SLO."""
    levels = [run.summary.get("slo") for run in deployment.runs]
    return sum(level["met"] is True for level in levels if level) if any(levels) else None


def _notes(deployments: Sequence[Deployment]) -> Iterator[str]:
    """What isn't compared, and why."""
    if (num_alike := deployments[0].num_alike) > 1:
        yield (
            f"All {num_alike} seeds gave the same, as nothing is drawn at random here: they say nothing of the spread, "
            "and one of them is compared."
        )
    with_slo = [each.label for each in deployments if all(run.summary.get("slo") for run in each.runs)]
    without = [each.label for each in deployments if each.label not in with_slo]
    if with_slo and without:
        yield (
            f"Attainment and goodput aren't compared with {', '.join(without)}, which {_has(without)} no SLO: "
            f"give all the same, such as by --set slo.ttft_s.p99=1."
        )
    targets = [_targets(each.runs[0]) for each in deployments if each.label in with_slo]
    if any(each != targets[0] for each in targets):
        yield "The SLOs differ, so attainment and goodput are each by their own."


def _has(names: Sequence[str]) -> str:
    return "has" if len(names) == 1 else "have"


def _targets(run: Run) -> list[tuple[Any, ...]]:
    targets = (run.summary["slo"] or {}).get("targets", ())
    return [
        tuple(target.get(key) for key in ("tenant", "metric", "statistic", "target_s", "target_slowdown"))
        for target in targets
    ]


def _against(first: Deployment, other: Deployment) -> dict[str, Any]:
    pairs = [_pairs(a, b) for a, b in zip(first.runs, other.runs, strict=True)]
    return {
        "label": other.label,
        "num_pairs": sum(len(a) for a, _ in (each["e2e_s"] for each in pairs)),
        "num_finished": [sum(int(run.counted().sum()) for run in side.runs) for side in (first, other)],
        "requests": {metric: _compared([each[metric] for each in pairs]) for metric in METRICS},
        "runs": dict(_figures(first, other)),
    }


def paired(first: Deployment, other: Deployment) -> dict[str, tuple[FloatColumn, FloatColumn]]:
    """What `compare` takes the statistics of, the pairs of all seeds one behind the other: float64[n], s, of either."""
    pairs = [_pairs(a, b) for a, b in zip(first.runs, other.runs, strict=True)]
    return {
        metric: (np.concatenate([p[metric][0] for p in pairs]), np.concatenate([p[metric][1] for p in pairs]))
        for metric in METRICS
    }


def _pairs(a: Run, b: Run) -> dict[str, tuple[FloatColumn, FloatColumn]]:
    """Each metric of the requests that were counted in both and have it, in the order of their numbers."""
    numbers = np.intersect1d(a.requests["request"][a.counted()], b.requests["request"][b.counted()])
    rows = [np.searchsorted(run.requests["request"], numbers) for run in (a, b)]
    found = {}
    for metric in METRICS:
        one, two = (run.requests[metric][row] for run, row in zip((a, b), rows, strict=True))
        known = ~(np.isnan(one) | np.isnan(two))
        found[metric] = (one[known], two[known])
    return found


def _compared(pairs: Sequence[tuple[FloatColumn, FloatColumn]]) -> dict[str, Any] | None:
    """One metric; None where no pair has it."""
    pairs = [(a, b) for a, b in pairs if len(a)]
    if not pairs:
        return None
    sides = [np.array([_statistics(pair[side]) for pair in pairs]) for side in (0, 1)]
    differences = sides[1] - sides[0]
    intervals = _over_seeds(differences) if len(pairs) > 1 else _over_blocks(*pairs[0])
    faster = [float(np.mean(b < a)) for a, b in pairs]
    return {
        "share_faster": float(np.mean(faster)),
        "share_slower": float(np.mean([float(np.mean(b > a)) for a, b in pairs])),
        **{
            statistic: {
                "baseline_s": float(sides[0][:, i].mean()),
                "value_s": float(sides[1][:, i].mean()),
                "difference_s": float(differences[:, i].mean()),
                "low_s": intervals[i][0],
                "high_s": intervals[i][1],
            }
            for i, statistic in enumerate(STATISTICS)
        },
    }


def _statistics(times: FloatColumn) -> tuple[float, ...]:
    p50, p99 = np.percentile(times, [50, 99])
    return float(times.mean()), float(p50), float(p99)


def _over_seeds(differences: FloatColumn) -> list[tuple[float | None, float | None]]:
    return [mean_interval(column.tolist())[1:] for column in differences.T]


def _over_blocks(a: FloatColumn, b: FloatColumn) -> list[tuple[float | None, float | None]]:
    if len(a) < _MIN_PAIRS:
        return [(None, None)] * len(STATISTICS)
    samples = [np.subtract(_statistics(b[rows]), _statistics(a[rows])) for rows in paired_blocks(len(a))]
    return [interval_of(column.tolist()) for column in np.array(samples).T]


def _figures(first: Deployment, other: Deployment) -> Iterator[tuple[str, dict[str, Any]]]:
    for section, name in FIGURES:
        sides: list[list[Any]] = [
            [(run.summary.get(section) or {}).get(name) for run in side.runs] for side in (first, other)
        ]
        if None in sides[0] + sides[1]:
            continue
        mean, low, high = mean_interval([b - a for a, b in zip(*sides, strict=True)])
        one, two = (sum(side) / len(side) for side in sides)
        yield name, {"baseline": one, "value": two, "difference": mean, "low": low, "high": high}


def _check_same(a: Run, b: Run) -> None:
    """ScenarioError unless both served the same requests: asked for in the same way, and as many tokens each."""
    asked = [dict(_flat(_asked(run.scenario))) for run in (a, b)]
    differing = [key for key in {**asked[0], **asked[1]} if asked[0].get(key) != asked[1].get(key)]
    if differing:
        hint = "give both the same workload and seed, in the files or by --set, --rate-scale, --limit and --seed"
        message = "\n".join([f"{a.label} (A) and {b.label} (B) serve different workloads:", *_told(differing, asked)])
        raise ScenarioError(Problem(message, hint=hint))
    numbers, mine, theirs = np.intersect1d(a.requests["request"], b.requests["request"], return_indices=True)
    sizes = [run.requests["input_tokens"][rows] for run, rows in ((a, mine), (b, theirs))]
    if len(other := np.flatnonzero(sizes[0] != sizes[1])):
        i = int(other[0])
        message = (
            f"{a.label} and {b.label} served different requests: number {int(numbers[i])} has {int(sizes[0][i]):,} "
            f"input tokens in one and {int(sizes[1][i]):,} in the other"
        )
        raise ScenarioError(Problem(message, hint="a trace has changed between the runs: run both again"))


def _told(differing: Sequence[str], asked: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A line for each value that differs, in columns, as far as one reads them."""
    most = _MOST_TOLD if len(differing) > _MOST_TOLD + 1 else len(differing)
    rows = [(key, *(_shown(side.get(key)) for side in asked)) for key in differing[:most]]
    keys, ours = (max(len(row[i]) for row in rows) for i in (0, 1))
    for key, a, b in rows:
        yield f"    {key:<{keys}}  A: {a:<{ours}}  B: {b}"
    if most < len(differing):
        yield f"    and {len(differing) - most} others"


def _asked(scenario: Mapping[str, Any]) -> dict[str, Any]:
    """What the requests follow from."""
    tenants = scenario.get("tenants") or {"": scenario}
    asked = {f"tenants.{name}.workload" if name else "workload": each.get("workload") for name, each in tenants.items()}
    return {"seed": scenario.get("seed"), **asked}


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, scalar); of a trace only its file's name counts, for it may have moved."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{path}.{key}" if path else str(key))
    elif path.endswith("workload.trace"):
        yield path, Path(str(value)).name
    else:
        yield path, value


def _shown(value: Any) -> str:
    return "left out" if value is None else f"{value!r:.60}"
