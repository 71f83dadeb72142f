"""What would change a deployment's results, and by how much: elasticities of its knobs, its load and its hardware.

Beside searches, around one scenario. Each parameter is moved up and down alone, under the same requests, for every
seed. It says what a small step would do, and nothing of a large one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mist.errors import Problem, ScenarioError
from mist.scenario import ScenarioFile, catalogue, load
from mist.scenario.clients import Pool
from mist.scenario.tenancy import SOLE
from mist.scenario.value import Scenario
from mist.search.evaluate import Executor, Job, raise_failures
from mist.search.intervals import ALIKE
from mist.search.legal import accelerators
from mist.search.objectives import excerpt, objective, unknown
from mist.search.outcome import interval

Overrides = dict[str, Any]
#: called with the runs that are done and all that there are
Progress = Callable[[int, int], None]

DEFAULT_OBJECTIVES = ("output_tokens_per_s", "output_tokens_per_usd", "ttft_s.p99", "tpot_s.p99")
#: figures of a device that are moved, by the keys of its catalogue file
_HARDWARE = {
    "FLOP/s": ("peak_tflops",),
    "HBM bandwidth": ("memory_bytes_per_s",),
    "link bandwidth": ("link_bytes_per_s", "inter_node_bytes_per_s"),
    "host link bandwidth": ("host_link_bytes_per_s",),
}
_LIMITS = ("max_num_batched_tokens", "max_num_seqs")


@dataclass(frozen=True, slots=True)
class Parameter:
    """Something to move: `changed[i]` sets it to `values[i]` or, where `is_factor`, to so many times what it is.

    Hardware is moved under the roofline, since what was measured is measured on the devices as they are.
    """

    name: str
    values: tuple[float, float]
    changed: tuple[Overrides, Overrides]
    is_factor: bool = False


def parameters(scenario: Scenario, step: float) -> Iterator[Parameter]:
    """What can be moved: load, price, and for each pool limits, KV capacity, replicas and its devices' figures."""
    factors = (1 / (1 + step), 1 + step)
    for name, tenant in scenario.tenants.items():
        place = "workload" if name == SOLE else f"tenants.{name}.workload"
        if tenant.workload.arrival_process is None or tenant.workload.arrival_process.name != "closed_loop":
            low, high = ({f"{place}.rate_scale": tenant.workload.rate_scale * f} for f in factors)
            yield Parameter(f"{place}: load", factors, (low, high), is_factor=True)
    if "prices" in ScenarioFile.model_fields:
        low, high = ({"prices.scale": scenario.prices.scale * f} for f in factors)
        yield Parameter("prices", factors, (low, high), is_factor=True)
    for name, pool in scenario.pools.items():
        yield from _of_pool(name, pool, factors)


def _of_pool(name: str, pool: Pool, factors: Sequence[float]) -> Iterator[Parameter]:
    at = f"clients.{name}"
    given = pool.batching.params
    for key in _LIMITS:
        if isinstance(given.get(key), int):
            values = [max(1, round(given[key] * f)) for f in factors]
            yield _of(f"{name}: {key}", f"{at}.batching.{pool.batching.name}.{key}", values)
    blocks = pool.kv_cache.num_blocks or pool.kv_capacity().num_blocks
    if not pool.model.is_encoder:
        yield _of(f"{name}: KV capacity", f"{at}.kv_cache.num_blocks", [round(blocks * f) for f in factors])
    if pool.scaling is None:
        yield _of(f"{name}: replicas", f"{at}.count", [max(1, pool.count - 1), pool.count + 1])
    if pool.device.num_cores == 0:
        yield from _of_device(name, pool, factors)


def _of_device(name: str, pool: Pool, factors: Sequence[float]) -> Iterator[Parameter]:
    figures = catalogue.mapping("devices", pool.device.name) if _is_known(pool) else None
    if figures is None:
        return
    low, high = factors
    for what, keys in _HARDWARE.items():
        changed = [
            {f"clients.{name}.device": figures | _moved(pool, keys, f), f"clients.{name}.perf": "roofline"}
            for f in (low, high)
        ]
        yield Parameter(f"{name}: {what}", (low, high), (changed[0], changed[1]), is_factor=True)


def _is_known(pool: Pool) -> bool:
    return pool.device.name in catalogue.names("devices")


def _moved(pool: Pool, keys: Sequence[str], factor: float) -> dict[str, Any]:
    device, found = pool.device, {}
    for key in keys:
        if key == "peak_tflops":
            found[key] = {dtype: flops * factor / 1e12 for dtype, flops in device.peak_flop_per_s.items()}
        else:
            found[key] = getattr(device, key) * factor
    return found


def _of(name: str, path: str, values: Sequence[float]) -> Parameter:
    low, high = values
    return Parameter(name, (low, high), ({path: low}, {path: high}))


def sensitivity(
    scenario: Scenario, executor: Executor, *, objectives: Sequence[str] = DEFAULT_OBJECTIVES, step: float = 0.1,
    num_seeds: int = 5, progress: Progress | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The elasticity of each objective by each parameter: d ln(objective) / d ln(parameter), mean and 95 % interval.

    A central difference over a step of `step` up and down, or of one replica, seed by seed under the same requests; an
    elasticity of -0.5 means that 1 % more of it is 0.5 % less. None where the objective has no value, or is 0. Raises
    ScenarioError where every run failed.
    """
    for name in objectives:
        if (hint := unknown(name)) is not None:
            raise ScenarioError(Problem(f"there is no objective {name!r}", hint=hint))
    # a value that is at its lowest already can't go down
    moved = [p for p in parameters(scenario, step) if p.values[0] < p.values[1]]
    seeds = range(scenario.seed, scenario.seed + num_seeds)
    source = scenario.resolved()
    jobs = {
        f"{i}/{side}/{seed}": Job(f"{i}/{side}/{seed}", source, {**parameter.changed[side], "seed": seed})
        for i, parameter in enumerate(moved)
        for side in (0, 1)
        for seed in seeds
    }
    found: dict[str, dict[str, Any]] = {}
    errors: dict[str, str] = {}
    for done, outcome in enumerate(executor.run(jobs.values()), start=1):
        if outcome.summary is None:
            errors[outcome.key] = outcome.error or ""
        else:
            job = jobs[outcome.key]
            found[outcome.key] = excerpt(outcome.summary, accelerators(load(source, **job.overrides)))
        if progress is not None:
            progress(done, len(jobs))
    if errors and not found:
        raise_failures(list(errors.values()))
    first = {int(key.partition("/")[0]): error.splitlines()[0] for key, error in sorted(errors.items(), reverse=True)}
    rows: list[dict[str, Any]] = []
    for i, parameter in enumerate(moved):
        row: dict[str, Any] = {
            "parameter": parameter.name,
            "values": list(parameter.values),
            "is_factor": parameter.is_factor,
            "error": first.get(i),
        }
        pairs = [] if i in first else [(found[f"{i}/0/{seed}"], found[f"{i}/1/{seed}"]) for seed in seeds]
        width = math.log(parameter.values[1] / parameter.values[0])
        row["elasticities"] = {name: interval([_slope(*pair, name, width) for pair in pairs]) for name in objectives}
        rows.append(row)
    return {
        "schema_version": 1,
        "name": scenario.name,
        "step": step,
        "seeds": list(seeds),
        "parameters": rows,
        "remarks": [*_of_hardware(scenario, moved), *([ALIKE] if num_seeds > 1 and _are_alike(found, seeds) else [])],
    }


def _of_hardware(scenario: Scenario, moved: Sequence[Parameter]) -> Iterator[str]:
    """That its rows have step times of their own, where the scenario's are others."""
    pools = [name for name, pool in scenario.pools.items() if [spec.name for spec in pool.perf] != ["roofline"]]
    if any(parameter.name == f"{name}: {what}" for parameter in moved for name in pools for what in _HARDWARE):
        yield f"{', '.join(_HARDWARE)}: moved under the roofline, all else under the scenario's step times."


def _are_alike(found: Mapping[str, Mapping[str, Any]], seeds: Sequence[int]) -> bool:
    """Whether every run with another seed that there is gave what the same one with the first seed gave."""
    first = {key.rpartition("/")[0]: value for key, value in found.items() if key.endswith(f"/{seeds[0]}")}
    others = [key for key in found if not key.endswith(f"/{seeds[0]}")]
    return bool(others) and all(found[key] == first.get(key.rpartition("/")[0]) for key in others)


def _slope(low: Mapping[str, Any], high: Mapping[str, Any], name: str, width: float) -> float | None:
    a, b = objective(low, name), objective(high, name)
    return math.log(b / a) / width if a and b else None
