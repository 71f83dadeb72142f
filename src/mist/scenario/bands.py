"""The expected error of a result: how far off the checked points of its engine on its device were.

Beside the remarks, which say it, and the summary, which carries it. The bands are in `mist/data/bands.yaml`, made by
`make validate`; where there is none, that is said. It never guesses from other engines or devices.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from mist.errors import ScenarioError
from mist.metrics.words import counted
from mist.request import DECODE, PREFILL
from mist.scenario import catalogue
from mist.scenario.clients import Pool
from mist.scenario.value import Scenario

#: kinds of metrics that have a band, as a reader calls them
KINDS = {"ttft": "TTFT", "tpot": "TPOT", "e2e": "E2E", "throughput": "throughput"}

#: what is expected of one pool, as JSON values
Expected = dict[str, Any]


def expected_error(scenario: Scenario, name: str, perf: str = "", *, saturated: bool = False) -> Expected:
    """The band of the pool `name`, whose step times are by the performance model `perf` ("": not known yet).

    `saturated`: the run was, and the checked ones weren't. `errors` by kind, in percent, is empty where nothing was
    checked; `statement` says it in a sentence or two.
    """
    pool = scenario.pools[name]
    engine, device = pool.engine.name, pool.device.name
    band = _bands().get(engine, {}).get(device)
    found: Expected = {"engine": engine, "device": device, "perf": perf or None}
    why = _unvalidated(scenario, name, band)
    if saturated and not why:
        why = "this run is saturated, and what was checked isn't"
    if why or band is None:
        return found | {"points": 0, "errors": {}, "statement": f"Expected error: not validated here: {why}."}
    errors = {kind: band[kind] for kind in KINDS if kind in band}
    sentences = [_sentence(engine, device, band, errors), *_differences(pool, perf, band)]
    return found | {"points": band["points"], "errors": errors, "statement": " ".join(sentences)}


def _unvalidated(scenario: Scenario, pool_name: str, band: Mapping[str, Any] | None) -> str:
    """Why no band is of this pool; "" where one is."""
    pool = scenario.pools[pool_name]
    engine, device = pool.engine.name, pool.device.name
    for kind, name, value in (("engines", engine, pool.engine), ("devices", device, pool.device)):
        if not _is_shipped(kind, name, value):
            return f"{name} is not as it ships"
    if band is None:
        return f"no checked point of {engine} on {device}"
    beyond = [*_beyond(pool), *_around(scenario, pool_name)]
    return f"there is no band for {', '.join(beyond)}" if beyond else ""


def _beyond(pool: Pool) -> Iterator[str]:
    """What changes step times or waits and has too few checked points, or none, to make a band of."""
    if pool.speculation is not None:
        yield "speculative decoding"
    if pool.power_cap_w is not None:
        yield "a power cap"
    for key in ("pp", "attn_dp"):
        if (degree := getattr(pool, key)) > 1:
            yield f"{key} {degree}"
    if pool.kv_cache.prefix_tier == "cpu":
        yield "prefixes in host memory"
    if pool.kv_cache.tiers:
        yield "memory tiers"
    if not {PREFILL, DECODE} <= set(pool.serves):
        yield f"a pool for {' and '.join(pool.serves)} only"


def _around(scenario: Scenario, name: str) -> Iterator[str]:
    """What the requests that come to the pool `name` go through beside prefill and decode."""
    tenants = [tenant for tenant in scenario.tenants.values() if name in scenario.clients_of(tenant.name)]
    asked = {stage for store in scenario.stores.values() for stage in store.serves}
    stages = dict.fromkeys(stage for tenant in tenants for stage in tenant.stages)
    if others := [stage for stage in stages if stage not in (PREFILL, DECODE) and stage not in asked]:
        yield f"pipelines with {', '.join(others)}"
    if asked & stages.keys():
        yield "prefixes from a KV store"


def _sentence(engine: str, device: str, band: Mapping[str, Any], errors: Mapping[str, Any]) -> str:
    figures = ", ".join(
        f"{KINDS[kind]} ±{error['median_ape']:g} % (P90 {error['p90_ape']:g} %)" for kind, error in errors.items()
    )
    return (
        f"Expected error ({engine} on {device}, {counted(band['points'], 'checked point')}): {figures}, in the median."
    )


def _differences(pool: Pool, perf: str, band: Mapping[str, Any]) -> list[str]:
    """What sets this pool apart from what was checked."""
    found = []
    if perf and perf != band["perf"]:
        found.append(f"These were priced by {band['perf']}, and this run by {perf}: not validated.")
    if pool.model.name not in band["models"]:
        found.append(f"Checked with {', '.join(band['models'])} only.")
    return found


def _is_shipped(kind: str, name: str, value: object) -> bool:
    try:
        return bool(catalogue.read(kind, name, Path())[0] == value)
    except ScenarioError:
        return False


@functools.cache
def _bands() -> Mapping[str, Mapping[str, Any]]:
    """{engine profile: {device: band}}."""
    text = (files("mist") / "data" / "bands.yaml").read_text(encoding="utf-8")
    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where it was built
    return yaml.load(text, Loader=loader)["bands"] or {}
