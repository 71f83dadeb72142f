"""The line that a run has in the table: headline figures of its summary, as texts.

From the document of a run to the page. Every figure is the summary's, and nothing is computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mist.report.html.figures import NOTHING, digits, seconds, slowdown

LATENCIES = {"ttft_s": "TTFT", "tpot_s": "TPOT", "e2e_s": "E2E"}


def headline(summary: Mapping[str, Any]) -> dict[str, Any]:
    """`cells` by column, `load` ("", "near capacity", "saturated"), `requests`, and the `slo` with what was missed."""
    requests, throughput, cost = summary["requests"], summary["throughput"], summary.get("cost") or {}
    latencies = {
        f"{name} {statistic.upper()}": seconds(summary[metric][statistic])
        for metric, name in LATENCIES.items()
        for statistic in ("p50", "p99")
    }
    finished, arrived = (f"{requests[key]:,}" for key in ("finished", "arrived"))
    price = cost.get("usd_per_million_output_tokens")
    return {
        "cells": {
            **latencies,
            "requests/s": digits(throughput["requests_per_s"]),
            "output tokens/s": digits(throughput["output_tokens_per_s"]),
            "$/M output tokens": NOTHING if price is None else digits(price),
        },
        "load": "saturated" if summary["saturated"] else "near capacity" if summary["near_capacity"] else "",
        "requests": f"{finished} of {arrived} requests" if finished != arrived else f"{arrived} requests",
        "slo": _slo(summary["slo"]),
    }


def _slo(slo: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if not slo:
        return None
    targets = slo["targets"]
    missed = [_target(each) for each in targets if not each["met"]]
    return {"met": len(targets) - len(missed), "of": len(targets), "missed": missed}


def _target(target: Mapping[str, Any]) -> str:
    whose = f"{target['tenant']}: " if target.get("tenant") else ""
    name, statistic = target["metric"].partition("_")[0].upper(), target["statistic"].upper()
    if "target_slowdown" in target:
        actual, bound = slowdown(target["actual_slowdown"]), slowdown(target["target_slowdown"])
        return f"{whose}{name} slowdown {statistic} {actual} > {bound}"
    return f"{whose}{name} {statistic} {seconds(target['actual_s'])} > {seconds(target['target_s'])}"
