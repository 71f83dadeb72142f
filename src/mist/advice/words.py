"""Advice in words: a line for each reason, with what was seen there, and one for each what-if, with its delta.

The last station: every figure comes in, and is only rounded here. JSON has them in full.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mist.advice import Advice
from mist.advice.reasons import (
    BATCH,
    HEALTHY,
    HOST,
    IDLE,
    INTERFERENCE,
    KV,
    LINK,
    NONE,
    QUEUEING,
    RETRIEVAL,
    STAGE,
    Reason,
    WhatIf,
)
from mist.metrics.words import counted, share

LATENCIES = {"ttft_s": "P99 TTFT", "tpot_s": "P99 TPOT", "e2e_s": "P99 E2E"}
COSTS = {
    "usd_per_million_output_tokens": "per million output tokens",
    "usd_per_million_total_tokens": "per million tokens",
}
#: overrides that are longer are only in the JSON
LONGEST_SET = 90

Facts = Mapping[str, Any]


def lines(advice: Advice) -> Iterator[str]:
    """The whole, line by line."""
    yield f"{advice.name}: {'saturated; ' if advice.saturation else ''}{_verdict(advice)}"
    if advice.saturation:
        yield (
            f"Saturated: {advice.saturation}. Waits grow for as long as requests arrive, so latencies and their "
            "reasons say how long this run is too: first look for what lets it keep up."
        )
    told = [f"{name} {_value(key, advice.figures[key])}" for key, name in LATENCIES.items()]
    yield "; ".join([*told, *(_value(key, advice.figures[key]) for key in list(COSTS)[:1])])
    for metric, number in advice.requests.items():
        yield f"Looked at for {LATENCIES[metric]}: the {counted(number, 'request')} around it."
    priced = any(advice.figures[key] is not None for key in COSTS)
    for title, reasons, known in (("Latency", advice.latency, bool(advice.requests)), ("Cost", advice.cost, priced)):
        yield ""
        own = "nothing but the requests' own work" if known else "nothing to explain"
        yield f"{title}: {'the largest reasons' if reasons else own}"
        for number, reason in enumerate(reasons, 1):
            yield f"{number}. {sentence(reason, advice)}"
            for what_if in reason.what_ifs:
                yield from (f"   {line}" for line in _what_if(what_if, reason, advice))
    if advice.remarks:
        yield ""
    yield from advice.remarks


def sentence(reason: Reason, advice: Advice) -> str:
    """Such as "62% of P99 TTFT (0.50 s) is queueing at gpu: prefill-bound at 93% of its token budget"."""
    whole = LATENCIES.get(reason.figure) or f"the cost {COSTS.get(reason.figure, '')}".strip()
    amount = _value(reason.figure, reason.amount, short=True)
    return f"{share(reason.share)} of {whole} ({amount}) is {_WHAT[reason.code](reason.at, reason.facts)}."


def _verdict(advice: Advice) -> str:
    if not advice.requests:
        return "no bottleneck can be told: no request has the latencies that are asked for."
    if advice.bottleneck == NONE:
        return f"no bottleneck: no reason explains more than {share(HEALTHY)} of a latency."
    return f"the bottleneck is {_NAMES[advice.bottleneck]} at {advice.latency[0].at}."


def _queueing(at: str, facts: Facts) -> str:
    bounds = {
        "tokens": f"prefill-bound at {_share(facts['token_budget'])} of its token budget",
        "slots": f"bound by max_num_seqs at {_share(facts['sequences'])} of it",
        "step": "until the step under way ended",
    }
    return f"queueing at {at}: {bounds[facts['bound']]}, busy {_share(facts['utilisation'])} of the time"


def _kv(at: str, facts: Facts) -> str:
    filled = f"{_share(facts['kv_mean'])} full on average, {_share(facts['kv_peak'])} at its peak"
    seen = f"{filled}, {counted(facts['preemptions'], 'preemption')}"
    return f"waiting for room in the KV cache at {at}, or computing again: {seen}"


def _link(at: str, facts: Facts) -> str:
    if not facts["transfers"]:
        return f"on the link {at}"
    mean = _value("ttft_s", facts["mean_s"])
    sent = f"{counted(facts['transfers'], 'transfer')} of {facts['mean_bytes'] / 1e6:,.1f} MB"
    return f"on the link {at}: {sent}, {mean} each on average"


def _retrieval(at: str, facts: Facts) -> str:
    return (
        f"retrieval at {at}: {_share(facts['waiting'])} of it waiting, busy {_share(facts['utilisation'])} of the time"
    )


def _host(at: str, facts: Facts) -> str:
    return f"the engine's host at {at}: {_share(facts['of_steps'])} of the time of its steps ({facts['engine']})"


def _interference(at: str, facts: Facts) -> str:
    means = (_value("tpot_s", facts[key]) for key in ("with_prompts_s", "without_s"))
    return "decodes slowed by prompts beside them at {}: steps take {} with and {} without".format(at, *means)


def _batch(at: str, facts: Facts) -> str:
    batch = f"a mean batch of {facts['mean_batch']:,.1f} of at most {facts['max_num_seqs']:,}"
    return f"decode steps of few sequences at {at}: {batch}"


_WHAT: dict[str, Callable[[str, Facts], str]] = {
    QUEUEING: _queueing,
    KV: _kv,
    LINK: _link,
    RETRIEVAL: _retrieval,
    STAGE: lambda at, facts: f"the work of {at}: busy {_share(facts['utilisation'])} of the time",
    HOST: _host,
    INTERFERENCE: _interference,
    IDLE: lambda at, facts: f"{at} without work: busy {_share(facts['utilisation'])} of the time",
    BATCH: _batch,
}
_NAMES = {
    QUEUEING: "queueing", KV: "the KV cache", LINK: "the link", RETRIEVAL: "retrieval", STAGE: "the stage",
    HOST: "the engine's host", INTERFERENCE: "prompts beside decodes",
}  # fmt: skip


def _what_if(what_if: WhatIf, reason: Reason, advice: Advice) -> Iterator[str]:
    """Its delta, and how to have it."""
    figures = [reason.figure, *(key for key in (*LATENCIES, *COSTS) if key != reason.figure and _matters(key, reason))]
    deltas = [_delta(key, advice.figures[key], what_if.figures[key]) for key in figures]
    deltas.append(_attainment(advice, what_if))
    help_or_not = "" if what_if.helps else "it doesn't pay: " if reason.figure in COSTS else "it doesn't help: "
    yield f"What if {what_if.change.words}? {help_or_not}{'; '.join(filter(None, deltas))}"
    text = " ".join(f"--set {path}={_yaml(value)}" for path, value in what_if.change.overrides.items())
    if len(text) <= LONGEST_SET:
        yield f"  {text}"


def _matters(key: str, reason: Reason) -> bool:
    """A latency is told with the cost, a cost with the latencies."""
    return key == "usd_per_million_output_tokens" or (reason.figure in COSTS and key in ("ttft_s", "tpot_s"))


def _attainment(advice: Advice, what_if: WhatIf) -> str:
    """What becomes of the service levels, where that changes."""
    before, after = (figures["slo_attainment"] for figures in (advice.figures, what_if.figures))
    if before == after or before is None or after is None:
        return ""
    met = [figures["slo_met"] for figures in (advice.figures, what_if.figures)]
    turned = "" if met[0] == met[1] else ", so that the SLO is met" if met[1] else ", so that the SLO is missed"
    return f"SLOs met by {share(before)} -> {share(after)} of requests{turned}"


def _delta(key: str, before: float | None, after: float | None) -> str:
    if before is None or after is None:
        return ""
    name = f"{LATENCIES[key]} " if key in LATENCIES else ""
    change = round(100 * (after - before) / before) if before else 0
    told = f"{change:+,}%" if change else "as before"
    return f"{name}{_value(key, before, short=True)} -> {_value(key, after)} ({told})"


def _value(key: str, value: float | None, *, short: bool = False) -> str:
    """A time in the unit that suits it, or dollars per million tokens."""
    if key in COSTS:
        return "no price" if value is None else f"${value:,.3g}" + ("" if short else f" {COSTS[key]}")
    if value is None:
        return "-"
    return f"{value:,.3g} s" if value >= 1 else f"{value * 1e3:,.3g} ms"


def _share(value: float | None) -> str:
    return "-" if value is None else share(value)


def _yaml(value: Any) -> str:
    text = json.dumps(value)
    return f"'{value}'" if isinstance(value, str) and " " in value else text.strip('"')
