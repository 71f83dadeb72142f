"""What came out, at a glance: verdict, headline figures, SLOs with the error that is to be expected, and remarks.

The first section of a report. Every figure is the summary's; only the range of an SLO's figure is worked out here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mist.metrics.words import counted
from mist.report.html.figures import BYTES, digits, percent, seconds, shown, slowdown
from mist.report.html.markup import Child, Markup, el, note, section, table
from mist.report.html.view import View
from mist.scenario.result_table import saturation_verdict

LATENCIES = {"ttft_s": "TTFT", "tpot_s": "TPOT", "itl_s": "ITL", "e2e_s": "E2E"}
LONG = {"ttft_s": "time to first token", "tpot_s": "time per output token", "itl_s": "inter-token latency",
        "e2e_s": "end-to-end latency"}  # fmt: skip
_FAIR = {"total_tokens_per_s": "tokens/s", "served_share": "shares served", "slo_attainment": "SLOs met"}
_TRANSFERS = {"kv_transfer": "KV transfers", "prefix_fetch": "prefixes fetched", "hand_off": "hand-offs",
              "kv_write": "KV writes", "kv_swap": "KV swaps"}  # fmt: skip


def headline(view: View) -> Markup:
    summary = view.summary
    judged = saturation_verdict(summary)
    style = {"green": "good", "bold yellow": "fair", "bold red": "bad"}.get(str(judged.style), "") if judged else ""
    told = el("p", judged.plain, class_=f"verdict {style}") if judged else None
    statements = {pool["statement"] for pool in summary.get("expected_error", {}).values()}
    remarks = [el("li", text) for text in summary["notes"] if text not in statements]
    return section(
        "summary", "Summary", None, told,
        el("div", [_tile(*each) for each in _tiles(summary)], class_="tiles"),
        _objectives(summary), _tenants(summary),
        _error(summary),
        el("details", el("summary", counted(len(remarks), "remark")), el("ul", remarks), open=len(remarks) < 6)
        if remarks else None,
    )  # fmt: skip


def _tiles(summary: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Name, figure and what stands beside it."""
    requests, throughput = summary["requests"], summary["throughput"]
    others = [f"{number:,} {status.replace('_', ' ')}" for status, number in requests.items()
              if number and status not in ("arrived", "finished")]  # fmt: skip
    yield "Requests finished", f"{requests['finished']:,}", ", ".join([f"of {requests['arrived']:,} arrived", *others])
    for metric, name in LATENCIES.items():
        if summary[metric]["p99"] is not None:
            beside = f"P50 {seconds(summary[metric]['p50'])} · mean {seconds(summary[metric]['mean'])}"
            yield f"{name} P99", seconds(summary[metric]["p99"]), beside
    if throughput["output_tokens_per_s"] is not None:
        in_all = f"{digits(throughput['total_tokens_per_s'])} tokens/s in all"
        rates = f"{digits(throughput['requests_per_s'])} requests/s · {in_all}"
        yield "Output tokens per second", digits(throughput["output_tokens_per_s"]), rates
    if summary["slo"]:
        slo = summary["slo"]
        yield "Goodput", f"{shown(slo['goodput_requests_per_s'], '1/s')}", f"{percent(slo['attainment'])} met all SLOs"
    busiest = max(summary["clients"].items(), key=lambda each: each[1]["utilisation"] or 0.0, default=None)
    if busiest and busiest[1]["utilisation"] is not None:
        yield "Busiest pool", percent(busiest[1]["utilisation"]), busiest[0]
    if (quality := summary.get("quality")) and quality["mean"] is not None:
        yield "Quality", digits(quality["mean"]), "mean of the answers"
    if (cost := summary.get("cost")) and cost.get("usd_per_hour") is not None:
        yield "Cost per hour", f"${digits(cost['usd_per_hour'])}", _per_million(cost)
    if (energy := summary.get("energy")) and energy.get("mean_w") is not None:
        yield (
            "Mean power",
            f"{digits(energy['mean_w'] / 1e3)} kW",
            f"{digits(energy['joules_per_output_token'])} J per output token",
        )


def _per_million(cost: Mapping[str, Any]) -> str:
    price = cost.get("usd_per_million_output_tokens")
    return "" if price is None else f"${digits(price)} per million output tokens"


def _tile(name: str, value: str, beside: str) -> Markup:
    return el("div", el("span", name), el("strong", value), el("small", beside), class_="tile")


def _objectives(summary: Mapping[str, Any]) -> Child:
    """Targets with their verdicts, and what a measurement may show."""
    if not summary["slo"]:
        return note("The scenario has no SLO: add slo: {ttft_s: {p99: 0.5}} for verdicts and goodput.")
    rows, has_ranges = [], False
    for target in summary["slo"]["targets"]:
        unit = "slowdown" if "target_slowdown" in target else "s"
        metric, actual, bound = target["metric"], target[f"actual_{unit}"], target[f"target_{unit}"]
        low, high = expected_range(summary, metric, actual)  # of a slowdown nothing was checked
        say = seconds if unit == "s" else slowdown
        badge = {True: ("met", "good"), False: ("missed", "bad"), None: ("no data", "fair")}[target["met"]]
        close = low is not None and low <= bound and (high is None or bound <= high)
        has_ranges |= low is not None
        lost = f", {target['num_lost']:,} lost" if target["num_lost"] else ""
        called = LATENCIES[f"{metric.partition('_')[0]}_s"] + ("" if unit == "s" else " slowdown")
        name = f"{called} {target['statistic'].replace('p', 'P')}"
        between = "-" if low is None else f"{seconds(low)} – {'?' if high is None else seconds(high)}"
        rows.append([
            *([target.get("tenant", "all")] if summary["tenants"] else []), el("span", name),
            f"≤ {say(bound)}", say(actual), el("span", between),
            el("span", el("b", badge[0], class_=f"badge {badge[1]}"), lost, " too close to call" if close else None),
        ])  # fmt: skip
    heads = [
        *(["tenant"] if summary["tenants"] else []),
        "SLO",
        "target",
        "simulated",
        "expected when measured",
        "verdict",
    ]
    said = (
        "Expected when measured: where the true value lies if this run is as far off as the median of the checked runs "
        "was. Where the target is in this range, the verdict is too close to call."
    )
    return [table(heads, rows, label="Service level objectives"), note(said) if has_ranges else None]


def _tenants(summary: Mapping[str, Any]) -> Child:
    """A line for each tenant, and how evenly they were served."""
    if not summary["tenants"]:
        return None
    rows = [
        (name, f"{each['requests']['finished']:,} of {each['requests']['arrived']:,}",
         *(seconds(each[metric][at]) for metric, at in (("ttft_s", "p50"), ("ttft_s", "p99"), ("e2e_s", "p99"))),
         digits(each["throughput"]["total_tokens_per_s"]), percent(each["slo"]["attainment"] if each["slo"] else None))
        for name, each in summary["tenants"].items()
    ]  # fmt: skip
    heads = ["tenant", "finished", "TTFT P50", "TTFT P99", "E2E P99", "tokens/s", "requests that met all SLOs"]
    fair = [
        f"{value:.3f} of {_FAIR[key]}"
        for key, value in summary["fairness"].items()
        if key in _FAIR and value is not None
    ]
    return [table(heads, rows, label="Tenants"), note(f"Jain's fairness index: {', '.join(fair)}.") if fair else None]


def expected_range(summary: Mapping[str, Any], metric: str, value: float | None) -> tuple[float | None, float | None]:
    """Where the true value of a latency lies if the simulated one is off by the median error of the checked points.

    Errors are |simulated - measured| / measured, so it is value / (1 + e) to value / (1 - e), None where that has no
    end; (None, None) unless there is a band for every pool.
    """
    errors = [pool["errors"].get(metric.removesuffix("_s")) for pool in summary.get("expected_error", {}).values()]
    if value is None or not errors or None in errors:
        return None, None
    error = max(each["median_ape"] for each in errors) / 100
    return value / (1 + error), value / (1 - error) if error < 1 else None


def _error(summary: Mapping[str, Any]) -> Markup:
    statements = dict.fromkeys(pool["statement"] for pool in summary.get("expected_error", {}).values())
    return el("div", [el("p", text) for text in statements], class_="note")


def transfers_text(summary: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Rows of what was moved: kind, transfers, mean size, P50 and P99 of their times."""
    return [
        (name, f"{moved['transfers']:,}", shown(moved["mean_bytes"], BYTES),
         f"{seconds(moved['time_s']['p50'])} · {seconds(moved['time_s']['p99'])}")
        for key, name in _TRANSFERS.items() if (moved := summary.get(key))
    ]  # fmt: skip
