"""One operating point as a scenario, from its columns alone.

Between the points that were measured and the runs that are compared with them. What the columns leave empty is the
engine's default; what can't be run is a `Skip` with its reason. It never looks at a measured latency or rate, but to
judge what the schema judges by it: whether an open loop was saturated.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mist.engine import EngineProfile
from mist.errors import ScenarioError
from mist.scenario import catalogue
from mist.scenario.value import Scenario
from mist.validation.engines import engine_profile, own_version
from mist.validation.loads import Draft, add_load
from mist.validation.points import Point, Skip

#: context that whole prompts are provided for, as engines are set up where a model allows far more
CUSTOMARY_CONTEXT = 8192
#: links that need no figure: the device's own, or a network of which the default is taken
LINKS = ("ethernet", "ib", "ib-gpudirect", "nvlink", "pcie", "roce")
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

_FREE_OFFLOAD = "KV offload to the host is taken to cost nothing"

Overrides = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Setting:
    """A point made runnable: the scenario, the engine profile's name, and whether the load was beyond the system.

    `num_devices` are those that the scenario has. `warmup_requests` of the first arrivals are left out of latencies
    where a steady state is meant. `assumptions` say what the row states and the simulation takes for granted.
    """

    scenario: Scenario
    engine: str
    saturated: bool
    num_devices: int = 1
    warmup_requests: int = 0
    assumptions: tuple[str, ...] = ()


def setting_of(point: Point, folder: Path, overrides: Overrides | None = None, perf: Any = None) -> Setting:
    """The scenario of `point`; paths of request lists start at `folder`.

    `overrides` change fields of engine profiles by name, or replace devices by `device:NAME` (calibration does both);
    `perf` is the list of performance models.
    Skip says why the point can't be run.
    """
    profile = engine_profile(point)
    changes = overrides or {}
    draft = Draft(point, folder, {**profile, **changes.get(str(profile["name"]), {})})
    if f"device:{point['device']}" in changes:
        draft.pool["device"] = dict(changes[f"device:{point['device']}"])
    add_load(draft)
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
    devices = sum(p.count * p.tp * p.pp * p.attn_dp for p in scenario.pools.values())
    saturated = _saturated(draft, scenario, devices)
    return Setting(scenario, str(profile["name"]), saturated, devices, draft.warmup_requests, _assumptions(point))


def _assumptions(point: Point) -> tuple[str, ...]:
    return (_FREE_OFFLOAD,) if _one_of(point, "kv_offload", "none", "cpu") == "cpu" else ()


def _one_of(point: Point, column: str, *known: str) -> str:
    """The column's value in small letters, the first of `known` where it is empty; Skip where it is another."""
    value = point[column].lower() or known[0]
    if value not in known:
        raise Skip(f"{column} is {point[column]!r}, not {' or '.join(filter(None, known))}")
    return value


# --- the clients ---


def _pools(draft: Draft) -> dict[str, Any]:
    point = draft.point
    if point["spec_decode"].lower() not in ("", "none"):
        draft.pool["speculation"] = _speculation(point["spec_decode"].lower())
    if cap := point.number("power_cap_w"):
        draft.pool["power_cap_w"] = cap
    draft.pool = {"device": _named("devices", point["device"])} | draft.pool
    draft.pool |= {
        "model": _model(draft),
        "engine": draft.profile, "weights_dtype": _weights(point), "kv_dtype": _kv_dtype(point),
        "batching": _batching(draft), "kv_cache": _kv_cache(draft),
    }  # fmt: skip
    if _one_of(point, "topology", "aggregated", "pd") == "pd":
        return _worker_pools(draft)
    tp, pp, attn_dp, dp = (point.count(key, 1) for key in ("tp", "pp", "attn_dp", "dp"))
    if not tp * pp * attn_dp:
        raise Skip(f"tp {tp} x pp {pp} x attn_dp {attn_dp} are no devices")
    devices = point.count("num_devices", tp * pp * attn_dp * dp)
    replicas, rest = divmod(devices, tp * pp * attn_dp)
    if rest or not replicas:
        raise Skip(f"{devices} devices are not whole replicas of tp {tp} x pp {pp} x attn_dp {attn_dp}")
    if point["dp"] and replicas != dp:
        raise Skip(f"{devices} devices are not tp {tp} x pp {pp} x attn_dp {attn_dp} x dp {dp}")
    _between_devices(draft, tp * pp * attn_dp, devices)
    parallel = {"tp": tp, "pp": pp, "attn_dp": attn_dp, "ep": point.count("ep", 1), "count": replicas}
    return {"gpu": draft.pool | parallel}


def _between_devices(draft: Draft, replica: int, devices: int) -> None:
    """The row's own link between the nodes that a replica spans, which a node's devices share."""
    point, (kind, per_node) = draft.point, _interconnect(draft.point)
    nodes = point.positive("num_nodes") or 1
    local, rest = divmod(devices, nodes)
    if rest or not local:
        raise Skip(f"{devices} devices are not spread evenly over {nodes} nodes")
    device, name = catalogue.read("devices", point["device"], Path())
    changes: dict[str, float] = {}
    if nodes > 1 and replica > local and kind not in ("", "nvlink"):
        changes["scale_up_domain"] = min(device.scale_up_domain, local)
        if per_node is not None:
            changes["inter_node_bytes_per_s"] = per_node / local
    elif nodes == 1 and replica > 1 and kind == "pcie":
        # a link that isn't far from that to the host is PCIe as the catalogue has it
        if per_node is None and device.link_bytes_per_s > 2 * device.host_link_bytes_per_s:
            per_node = device.host_link_bytes_per_s
        if per_node is not None:
            changes["link_bytes_per_s"] = per_node
    if changes:
        known = draft.pool["device"]
        draft.pool["device"] = {
            **(known if isinstance(known, Mapping) else catalogue.mapping("devices", name)),
            **changes,
        }


def _interconnect(point: Point) -> tuple[str, float | None]:
    """(kind without its generation, bytes per second and node or None) of `kind:GB/s`; Skip for anything else."""
    text = point["interconnect"].lower()
    match = re.fullmatch(r"([a-z][a-z-]*)[\d.]*(?::(\d+(?:\.\d+)?))?", text)
    if text and (match is None or (match[2] and not float(match[2]))):
        raise Skip(f"interconnect is {point['interconnect']!r}, not as roce:200")
    if match and not match[2] and match[1] not in LINKS:
        raise Skip(f"interconnect is {point['interconnect']!r}, of which no GB/s are stated")
    return (match[1], float(match[2]) * 1e9 if match[2] else None) if match else ("", None)


def _worker_pools(draft: Draft) -> dict[str, Any]:
    point = draft.point
    pp, attn_dp, ep = (point.positive(key) or 1 for key in ("pp", "attn_dp", "ep"))
    pools, devices = {}, 0
    for stage in ("prefill", "decode"):
        count, workers = _workers(point, f"{stage}_pool")
        tp, rest = divmod(workers, pp * attn_dp)
        if rest or not tp:
            raise Skip(f"{workers} devices of a {stage} worker are not whole pp {pp} x attn_dp {attn_dp}")
        parallel = {"tp": tp, "pp": pp, "attn_dp": attn_dp, "ep": 1 if tp * attn_dp % ep else ep, "count": count}
        pools[stage] = draft.pool | parallel | {"serves": [stage]}
        devices += count * workers
    for column in ("tp", "dp"):  # pools say it, and each may say another
        if point.count(column, 1) > 1:
            raise Skip(f"{column} is {point[column]}, and the pools say how many devices there are")
    if ep > 1 and all(pool["ep"] == 1 for pool in pools.values()):
        raise Skip(f"ep {ep} divides the devices of no pool")
    if devices != point.count("num_devices", devices):
        raise Skip(f"{point['num_devices']} devices are not the {devices} of the pools")
    pools["prefill"]["engine"] = _through_a_proxy(draft.profile)
    return pools


def _workers(point: Point, column: str) -> tuple[int, int]:
    """Workers, and devices of each, of a pool such as 2xTP4."""
    match = re.fullmatch(r"(\d+)xTP(\d+)", point[column])
    if match is None or not int(match[1]) * int(match[2]):
        raise Skip(f"{column} is {point[column]!r}, not as 2xTP4")
    return int(match[1]), int(match[2])


def _through_a_proxy(profile: Mapping[str, Any]) -> dict[str, Any]:
    """The profile of workers behind a proxy, which passes each request to both kinds."""
    keys = {"request_overhead_ns": PROXY_REQUEST_NS, "prompt_token_overhead_ns": PROXY_PROMPT_TOKEN_NS}
    return {**profile, **{key: _quantity(profile, key) + more for key, more in keys.items()}}


def _hand_off(draft: Draft) -> dict[str, Any]:
    point = draft.point
    if _one_of(point, "topology", "aggregated", "pd") != "pd":
        return {}
    link: dict[str, Any] = dict(HAND_OFF)
    device, _ = catalogue.read("devices", _named("devices", point["device"]), Path())
    kind, bytes_per_s = _interconnect(point)
    if bytes_per_s is None and kind == "pcie":
        bytes_per_s = device.host_link_bytes_per_s
    elif bytes_per_s is None and (kind == "nvlink" or (not kind and (point.positive("num_nodes") or 1) == 1)):
        bytes_per_s = device.link_bytes_per_s
    if bytes_per_s is not None:
        link["bandwidth"] = f"{bytes_per_s / 1e9:g} GB/s"
    return {"network": {"kv_transfer": link}}


def _named(kind: str, name: str) -> str:
    try:
        catalogue.read(kind, name, Path("/nonexistent"))
    except ScenarioError as error:
        raise Skip(error.problems[0].message) from None
    return name


def _model(draft: Draft) -> Any:
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


def _batching(draft: Draft) -> Any:
    """The engine's policy with the limits of the row; chunked prefill turned on or off changes the policy."""
    point, profile = draft.point, draft.profile
    name = str(profile.get("batching", "chunked"))
    chunked = _one_of(point, "chunked_prefill", "", "true", "false")
    if chunked == "true":
        name = "chunked"
    elif chunked == "false" and name == "chunked" and own_version(point) < (0, 8):
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


def _complete_limits(draft: Draft, name: str, limits: dict[str, int]) -> Any:
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


def _kv_cache(draft: Draft) -> dict[str, Any]:
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


def _saturated(draft: Draft, scenario: Scenario, num_devices: int) -> bool:
    """The rule of the schema: by what was offered and measured, of closed loops by the documented KV capacity."""
    point, load = draft.point, draft.point["load"]
    if load in ("open_loop", "trace"):
        return point.open_loop_saturated(num_devices, draft.trace_rate_per_s if load == "trace" else None)
    if load == "closed_loop":
        tokens = sum(_kv_tokens(pool) for pool in scenario.pools.values() if "decode" in pool.serves)
        in_flight = point.count("concurrency") * ((point.number("isl") or 0) + (point.number("osl") or 0))
        return in_flight > tokens
    return load == "offline"


def _kv_tokens(pool: Any) -> float:
    capacity = pool.kv_capacity()
    return float(capacity.num_tokens * pool.attn_dp * pool.count)
