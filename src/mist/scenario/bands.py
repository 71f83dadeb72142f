"""The expected error of a result: how far off the checked points of its engine on its device were.

Beside the remarks, which say it, and the summary, which carries it. The bands are in `mist/data/bands.yaml`, made by
`make validate`; where there is none, that is said. It never guesses from other engines or devices.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from mist.errors import ScenarioError
from mist.metrics.words import counted
from mist.scenario import catalogue
from mist.scenario.clients import Pool

#: kinds of metrics that have a band, as a reader calls them
KINDS = {"ttft": "TTFT", "tpot": "TPOT", "e2e": "E2E", "throughput": "throughput"}

#: what is expected of one pool, as JSON values
Expected = dict[str, Any]


def expected_error(pool: Pool, perf: str = "") -> Expected:
    """The band of `pool`, whose step times are by the performance model `perf` ("": not known yet).

    `errors` by kind, in percent, is empty where nothing was checked; `statement` says it in a sentence or two.
    """
    engine, device = pool.engine.name, pool.device.name
    band = _bands().get(engine, {}).get(device)
    found: Expected = {"engine": engine, "device": device, "perf": perf or None}
    changed = [name for kind, name, value in (("engines", engine, pool.engine), ("devices", device, pool.device))
               if not _is_shipped(kind, name, value)]  # fmt: skip
    if changed or band is None:
        why = f"{changed[0]} is not as it ships" if changed else f"no checked point of {engine} on {device}"
        return found | {"points": 0, "errors": {}, "statement": f"Expected error: not validated here: {why}."}
    errors = {kind: band[kind] for kind in KINDS if kind in band}
    sentences = [_sentence(engine, device, band, errors), *_differences(pool, perf, band)]
    return found | {"points": band["points"], "errors": errors, "statement": " ".join(sentences)}


def _sentence(engine: str, device: str, band: Mapping[str, Any], errors: Mapping[str, Any]) -> str:
    medians = ", ".join(f"{KINDS[kind]} ±{figures['median_ape']:g} %" for kind, figures in errors.items())
    return (
        f"Expected error ({engine} on {device}, {counted(band['points'], 'checked point')}): {medians}, in the median."
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
    return yaml.safe_load(text)["bands"] or {}
