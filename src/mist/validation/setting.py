"""One operating point as a scenario, from its columns alone.

Between the points that were measured and the runs that are compared with them. What the columns leave empty is the
engine's default; what can't be run is a `Skip` with its reason. It never looks at a measured latency or rate, but to
judge what the schema judges by it: whether an open loop was saturated.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mist.engine import EngineProfile
from mist.errors import ScenarioError
from mist.scenario import catalogue
from mist.scenario.value import Scenario
from mist.validation.engines import engine_profile, version_of
from mist.validation.points import Point, Skip, parse_stages

#: requests of a steady state, where the point doesn't say how many were sent: rounds of the concurrency, and the least
STEADY_ROUNDS = 6
STEADY_REQUESTS = 400
#: coefficient of variation of lengths of which only the mean is known; saturated throughput hangs on it
MEAN_ONLY_CV = 0.5
#: context that whole prompts are provided for, as engines are set up where a model allows far more
CUSTOMARY_CONTEXT = 8192
#: weight formats that a dtype of the schema stands for
WEIGHT_ALIASES = {"q4": "q4_0", "q5": "q5_0", "q6": "q6_k", "q8": "q8_0"}
#: what others call the ways to draft; heads that guess several tokens at once (Medusa) cost about what EAGLE's does
DRAFT_ALIASES = {
    "eagle2": "eagle", "eagle3": "eagle", "medusa": "eagle", "nextn": "mtp", "draft": "draft_model",
    "prompt_lookup": "ngram",
}  # fmt: skip
#: a link between prefill and decode workers: bytes per second where the row names none, and what transfers reach of it
#: and take besides. Least squares of relative errors to the nine mean transfer times of mooncake_pd (Mooncake over RoCE
#: at 200 GB/s, 19 MB to 4.8 GB): 0.730 and 394 us, off by 3.1 % in the median and 7 % at most
HAND_OFF = {"bandwidth": "50 GB/s", "efficiency": 0.73, "latency": "394 us"}

#: what the proxy before prefill and decode workers adds per request and prompt token, ns: read off the same nine rows,
#: checking part and all, so that mooncake_pd checks nothing of a hand-over
PROXY_REQUEST_NS = 20_000_000
PROXY_PROMPT_TOKEN_NS = 5_400

Overrides = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Setting:
    """A point made runnable: the scenario, the engine profile's name, and whether the load was beyond the system.

    `warmup_requests` of the first arrivals are left out of latencies where a steady state is meant.
    """

    scenario: Scenario
    engine: str
    saturated: bool
    warmup_requests: int = 0
    notes: tuple[str, ...] = ()


@dataclass(slots=True)
class _Draft:
    """What is known of a point before it becomes a scenario."""

    point: Point
    folder: Path
    profile: dict[str, Any]
    pool: dict[str, Any] = field(default_factory=dict)
    workload: dict[str, Any] = field(default_factory=dict)
    warmup_requests: int = 0
    #: tokens of the longest request, its answer included
    longest: int = 0


def setting_of(point: Point, folder: Path, overrides: Overrides | None = None, perf: Any = None) -> Setting:
    """The scenario of `point`; paths of request lists start at `folder`.

    `overrides` change fields of engine profiles by name, or replace devices by `device:NAME` (calibration does both);
    `perf` is the list of performance models.
    Skip says why the point can't be run.
    """
    profile = engine_profile(point)
    changes = overrides or {}
    draft = _Draft(point, folder, {**profile, **changes.get(str(profile["name"]), {})})
    if f"device:{point['device']}" in changes:
        draft.pool["device"] = dict(changes[f"device:{point['device']}"])
    _LOADS.get(point["load"], _unknown_load)(draft)
    pools = _pools(draft)
    mapping: dict[str, Any] = {
        "name": point.name, "workload": draft.workload, "pipeline": ["prefill", "decode"], "clients": pools,
        **_hand_off(draft),
    }  # fmt: skip
    if perf is not None:
        mapping["perf"] = perf
    try:
        scenario = Scenario.from_mapping(mapping, folder=folder)
    except ScenarioError as error:
        raise Skip("; ".join(problem.message for problem in error.problems)) from None
    return Setting(scenario, str(profile["name"]), _saturated(point, scenario), draft.warmup_requests)


# --- the load ---


def _static_batch(draft: _Draft) -> None:
    size = draft.point.count("batch_size")
    if not size:
        raise Skip("batch_size is empty")
    draft.workload |= {"arrivals": "all_at_once", "num_requests": size}
    draft.profile["max_num_seqs"] = max(size, int(draft.profile.get("max_num_seqs", 256)))
    draft.profile["large_device_max_num_seqs"] = max(size, int(draft.profile.get("large_device_max_num_seqs", 0)))
    _lengths(draft)


def _offline(draft: _Draft) -> None:
    draft.workload |= {"arrivals": "all_at_once", "num_requests": draft.point.count("num_requests", 1000)}
    _lengths(draft)


def _closed_loop(draft: _Draft) -> None:
    concurrency = draft.point.count("concurrency")
    if not concurrency:
        raise Skip("concurrency is empty")
    num_requests = draft.point.count("num_requests")
    if not num_requests:
        draft.warmup_requests = concurrency
        num_requests = concurrency + max(STEADY_ROUNDS * concurrency, min(STEADY_REQUESTS, 20 * concurrency))
    draft.workload |= {"concurrency": concurrency, "num_requests": num_requests}
    _lengths(draft)


def _open_loop(draft: _Draft) -> None:
    point = draft.point
    process = {"": "poisson", "poisson": "poisson", "constant": "constant"}.get(point["arrival"])
    if process is None:
        raise Skip(f"an open loop with arrivals {point['arrival']!r}")
    if point["workload_file"]:
        _from_file(draft)
    if point["stages"]:
        stages = parse_stages(point["stages"])
        draft.workload["arrivals"] = {"staged": {"stages": [list(s) for s in stages], "process": process}}
        sent = round(sum(rate * seconds for rate, seconds in stages))
    else:
        rate = point.number("rate_per_s")
        if not rate:
            raise Skip("rate_per_s and stages are empty")
        draft.workload["arrivals"] = {process: {"rate_per_s": rate}}
        sent = STEADY_REQUESTS * 2
    if "trace" not in draft.workload:
        draft.workload["num_requests"] = point.count("num_requests") or sent
        _lengths(draft)


def _trace(draft: _Draft) -> None:
    if not draft.point["workload_file"]:
        raise Skip("workload_file is empty")
    _from_file(draft)


def _unknown_load(draft: _Draft) -> None:
    raise Skip(f"the load is {draft.point['load']!r}")


_LOADS: dict[str, Callable[[_Draft], None]] = {
    "static_batch": _static_batch, "offline": _offline, "closed_loop": _closed_loop, "open_loop": _open_loop,
    "trace": _trace,
}  # fmt: skip


def _from_file(draft: _Draft) -> None:
    path = Path("workloads") / draft.point["workload_file"]
    if not (draft.folder / path).is_file():
        path = Path(draft.point["workload_file"])
    if not (draft.folder / path).is_file():
        raise Skip(f"there is no request list {draft.point['workload_file']}")
    lists = _columns(draft.folder / path)
    draft.longest = max(map(sum, zip(lists["input_tokens"], lists["output_tokens"], strict=True)), default=0)
    columns: dict[str, str | None] = {key: key for key in ("input_tokens", "output_tokens")}
    timed = all(lists["arrival_s"])
    columns |= {"arrival": "arrival_s", "time_unit": "s"} if timed else {"arrival": None}
    draft.workload |= {"trace": str(path), "columns": columns}


def _columns(path: Path) -> dict[str, list[int]]:
    """Tokens of a request list, and for each request whether it has an arrival time."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        found = {key: [int(row[key]) for row in rows] for key in ("input_tokens", "output_tokens")}
        return found | {"arrival_s": [int(bool(row.get("arrival_s"))) for row in rows]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Skip(f"the request list {path.name} can't be used: {error}") from None


def _lengths(draft: _Draft) -> None:
    point = draft.point
    for side, key in (("isl", "input_tokens"), ("osl", "output_tokens")):
        draft.workload[key] = _length(point, side)
        draft.longest += _longest(draft.workload[key])
    cached = point.count("prefix_cached_tokens")
    if cached:
        draft.workload["cached_tokens"] = cached


def _longest(length: Any) -> int:
    return (
        length if isinstance(length, int) else int(next(iter(length.values())).get("max") or length["uniform"]["high"])
    )


def _length(point: Point, side: str) -> Any:
    mean = point.number(side)
    if mean is None:
        raise Skip(f"{side} is empty")
    kind = point[f"{side}_dist"] or "fixed"
    if kind.startswith("uniform:"):
        try:
            low, high = (int(float(part)) for part in kind.split(":")[1:])
        except ValueError:
            raise Skip(f"{side}_dist is {kind!r}") from None
        return {"uniform": {"low": low, "high": high}}
    # a prompt with a given cached part has but its few own tokens to vary
    if kind == "mean" and mean > 1 and not point["prefix_cached_tokens"].strip("0"):
        return {"lognormal": {"mean": mean, "cv": MEAN_ONLY_CV, "max": round(8 * mean)}}
    if kind in ("fixed", "mean", "file"):
        return max(1, round(mean))
    raise Skip(f"{side}_dist is {kind!r}")


# --- the clients ---


def _pools(draft: _Draft) -> dict[str, Any]:
    point = draft.point
    if point["spec_decode"] not in ("", "none"):
        draft.pool["speculation"] = _speculation(point["spec_decode"])
    if cap := point.number("power_cap_w"):
        draft.pool["power_cap_w"] = cap
    draft.pool = {"device": _named("devices", point["device"])} | draft.pool
    draft.pool |= {
        "model": _model(draft),
        "engine": draft.profile, "weights_dtype": _weights(point), "kv_dtype": _kv_dtype(point),
        "batching": _batching(draft), "kv_cache": _kv_cache(draft),
    }  # fmt: skip
    if point["topology"] == "pd":
        return _worker_pools(draft)
    tp, pp, attn_dp, dp = (point.count(key, 1) for key in ("tp", "pp", "attn_dp", "dp"))
    if not tp * pp * attn_dp:
        raise Skip(f"tp {tp} x pp {pp} x attn_dp {attn_dp} are no devices")
    devices = point.count("num_devices", tp * pp * attn_dp * dp)
    replicas, rest = divmod(devices, tp * pp * attn_dp)
    if rest or not replicas:
        raise Skip(f"{devices} devices are not whole replicas of tp {tp} x pp {pp} x attn_dp {attn_dp}")
    parallel = {"tp": tp, "pp": pp, "attn_dp": attn_dp, "ep": point.count("ep", 1), "count": replicas}
    return {"gpu": draft.pool | parallel}


def _worker_pools(draft: _Draft) -> dict[str, Any]:
    pools = {}
    for stage in ("prefill", "decode"):
        match = re.fullmatch(r"(\d+)xTP(\d+)", draft.point[f"{stage}_pool"])
        if match is None:
            raise Skip(f"{stage}_pool is {draft.point[f'{stage}_pool']!r}, not as 2xTP4")
        count, tp = (int(part) for part in match.groups())
        pools[stage] = draft.pool | {"serves": [stage], "count": count, "tp": tp, "ep": draft.point.count("ep", 1)}
    pools["prefill"]["engine"] = _through_a_proxy(draft.profile)
    return pools


def _through_a_proxy(profile: Mapping[str, Any]) -> dict[str, Any]:
    """The profile of workers behind a proxy, which passes each request to both kinds."""
    keys = {"request_overhead_ns": PROXY_REQUEST_NS, "prompt_token_overhead_ns": PROXY_PROMPT_TOKEN_NS}
    return {**profile, **{key: _quantity(profile, key) + more for key, more in keys.items()}}


def _hand_off(draft: _Draft) -> dict[str, Any]:
    if draft.point["topology"] != "pd":
        return {}
    link: dict[str, Any] = dict(HAND_OFF)
    if match := re.fullmatch(r"[a-z-]+:([\d.]+)", draft.point["interconnect"]):
        link["bandwidth"] = f"{match.group(1)} GB/s"
    elif draft.point.count("num_nodes", 1) == 1 and not draft.point["interconnect"]:
        device, _ = catalogue.read("devices", _named("devices", draft.point["device"]), Path())
        link["bandwidth"] = f"{device.link_bytes_per_s / 1e9:g} GB/s"
    return {"network": {"kv_transfer": link}}


def _named(kind: str, name: str) -> str:
    try:
        catalogue.read(kind, name, Path("/nonexistent"))
    except ScenarioError as error:
        raise Skip(error.problems[0].message) from None
    return name


def _model(draft: _Draft) -> Any:
    """The catalogue's model; with a longer context where the point's requests are longer than it is said to allow."""
    name = _named("models", draft.point["model"])
    model, _ = catalogue.read("models", name, Path())
    if draft.longest <= model.max_context:
        return name
    entry = next(e for e in catalogue.entries("models") if e.name == catalogue.read("models", name, Path())[1])
    data = dict(entry.source.data())
    data["config"] = {**data["config"], "max_position_embeddings": draft.longest}
    return data


def _weights(point: Point) -> str:
    dtype = WEIGHT_ALIASES.get(point["weights_dtype"], point["weights_dtype"])
    return dtype or "auto"


def _kv_dtype(point: Point) -> str:
    if (point["kv_dtype"] or "auto") == "auto":
        return "fp16" if point["weights_dtype"] == "fp16" else "bf16"
    return point["kv_dtype"]


def _batching(draft: _Draft) -> Any:
    """The engine's policy with the limits of the row; chunked prefill turned on or off changes the policy."""
    point, profile = draft.point, draft.profile
    name = str(profile.get("batching", "chunked"))
    chunked = point["chunked_prefill"].lower()
    if chunked == "true":
        name = "chunked"
    elif chunked == "false" and name == "chunked" and version_of(point["engine_version"]) < (0, 8):
        name = "continuous"
    profile["batching"] = name
    steps = point.count("num_scheduler_steps", 1)
    if steps > 1:  # the host schedules once for several steps
        for key in ("step_overhead_ns", "token_overhead_ns"):
            profile[key] = _quantity(profile, key) / steps
    limits: dict[str, int] = {}
    if seqs := point.count("max_num_seqs"):
        limits["max_num_seqs"] = seqs
    if tokens := point.count("max_num_batched_tokens"):
        limits["max_num_batched_tokens"] = tokens
    elif seqs:
        limits["max_num_batched_tokens"] = 0  # replaced below
    return _complete_limits(draft, name, limits)


def _complete_limits(draft: _Draft, name: str, limits: dict[str, int]) -> Any:
    device, _ = catalogue.read("devices", _named("devices", draft.point["device"]), Path())
    model, _ = catalogue.read("models", _named("models", draft.point["model"]), Path())
    seqs, tokens = EngineProfile.from_mapping({**draft.profile}).limits_for(device, model)
    limits.setdefault("max_num_seqs", seqs)
    limits["max_num_batched_tokens"] = limits.get("max_num_batched_tokens") or tokens
    if name in ("continuous", "static"):  # whole prompts, of a static batch all of them
        size = draft.point.count("batch_size", 1) if name == "static" else 1
        least = max(draft.longest, size * round(draft.point.number("isl") or 0))
        limits["max_num_batched_tokens"] = max(min(limits["max_num_batched_tokens"], CUSTOMARY_CONTEXT), least)
    if draft.point["load"] != "static_batch":
        limits["max_num_seqs"] = min(limits["max_num_seqs"], limits["max_num_batched_tokens"])
    limits["max_num_batched_tokens"] = max(limits["max_num_batched_tokens"], limits["max_num_seqs"])
    return {name: limits}


def _kv_cache(draft: _Draft) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    if share := draft.point.number("gpu_memory_utilization"):
        settings["gpu_memory_utilization"] = share
    if draft.point["prefix_tier"] == "cpu":
        settings["prefix_tier"] = "cpu"
    elif draft.point["prefix_tier"] not in ("", "hbm"):
        raise Skip(f"a prefix cache in {draft.point['prefix_tier']!r}")
    return settings


def _speculation(text: str) -> dict[str, Any]:
    """`method:draft_tokens[:accepted/drafted]`."""
    parts = text.split(":")
    try:
        method = DRAFT_ALIASES.get(parts[0], parts[0])
        return {"method": method, "num_draft_tokens": int(parts[1]), "acceptance": float(parts[2])}
    except (IndexError, ValueError):
        raise Skip(f"spec_decode is {text!r}: no acceptance is stated") from None


def _quantity(profile: Mapping[str, Any], key: str) -> float:
    value = getattr(EngineProfile.from_mapping(dict(profile)), key)
    return float(value)


# --- saturation ---


def _saturated(point: Point, scenario: Scenario) -> bool:
    """The rule of the schema: by what was offered and measured, of closed loops by the documented KV capacity."""
    load = point["load"]
    if load in ("open_loop", "trace"):
        return point.open_loop_saturated()
    if load == "closed_loop":
        tokens = sum(_kv_tokens(pool) for pool in scenario.clients.values() if "decode" in pool.serves)
        in_flight = point.count("concurrency") * ((point.number("isl") or 0) + (point.number("osl") or 0))
        return in_flight > tokens
    return load == "offline"


def _kv_tokens(pool: Any) -> float:
    capacity = pool.kv_capacity()
    return float(capacity.num_tokens * pool.attn_dp * pool.count)
