"""The bill of a run: dollars by pool, host and memory, per token and request, per tenant and stage.

A function of a run's usage and a tariff, and of nothing else: another tariff gives another bill of the same run. What
has no price makes the whole None, with a remark that says what to add; it never counts as nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mist.cost.prices import HOURS_PER_MONTH, Quote, Tariff
from mist.cost.shares import counted, over, shared_out, sums
from mist.units import GB

Json = dict[str, Any]
SECONDS_PER_HOUR = 3600.0
JOULES_PER_KWH = 3.6e6
#: whose prices they are that the scenario or a client gives itself
OWN_PRICES = "own prices"


def cost(usage: Mapping[str, Any], tariff: Tariff) -> Json:
    """What the run of `usage` costs by `tariff`, in USD over its span; docs/cost.md has every figure.

    `pools`, `hosts` and `memories` add up to `usd`, and so do `stages` and the `usd` of `tenants`. All figures that
    something without a price would be in are None, with the reason in `remarks`. `prices` and `purchase` are those that
    devices were paid by, whoever gave them.
    """
    charges = [_of_machine(machine, usage, tariff) for machine in usage["machines"]]
    charges += [_of_memory(memory, usage["span_s"], tariff) for memory in usage["memories"]]
    known = [charge.usd for charge in charges if charge.usd is not None]
    whole = sum(known) if len(known) == len(charges) else None
    amounts = [(charge.pools, charge.usd) for charge in charges if charge.usd is not None]
    parts = shared_out(usage, amounts, "busy_s") if whole is not None else None
    span_s, by_tenant = usage["span_s"], sums(parts, 0)
    return {
        **_whose_prices(charges, tariff),
        "usd": whole,
        "usd_per_hour": over(whole, span_s / SECONDS_PER_HOUR),
        **_ratios(whole, usage, span_s),
        **{kind: {c.name: c.usd for c in charges if c.kind == kind} for kind in ("pools", "hosts", "memories")},
        "stages": sums(parts, 1),
        "tenants": {
            name: {"usd": by_tenant.get(name, 0.0 if parts else None), **_ratios(by_tenant.get(name), rates, span_s)}
            for name, rates in usage["tenants"].items()
        },
        "quotes": {c.name: c.quote for c in charges if c.quote is not None},
        "remarks": [*dict.fromkeys(remark for c in charges for remark in c.remarks), *usage["remarks"]],
    }


@dataclass(frozen=True, slots=True)
class _Charge:
    """One line of the bill: `usd` None where there is no price; `pools` are those that it served."""

    kind: str
    name: str
    usd: float | None
    pools: Sequence[str] = ()
    quote: Json | None = None
    remarks: tuple[str, ...] = ()


def _whose_prices(charges: Sequence[_Charge], tariff: Tariff) -> dict[str, str]:
    """Whose prices were paid and how the devices were bought; the tariff's where nothing has a price."""
    paid = [
        c.quote for c in charges if c.quote is not None and c.quote.get("purchase", "with devices") != "with devices"
    ]
    own = {"the scenario", *(f"price of {pool}" for pool in tariff.clients)}
    names = sorted({OWN_PRICES if quote["origin"] in own else quote["origin"] for quote in paid})
    bought = {quote["purchase"] for quote in paid}
    # a price per hour whatever the purchase says nothing beside one that does
    bought = bought - {"flat"} or bought or {tariff.purchase}
    prices = " and ".join(names) if len(names) < 3 else "several lists"
    return {"prices": prices or tariff.prices.name, "purchase": " and ".join(sorted(bought))}


def _ratios(usd: float | None, rates: Mapping[str, Any], span_s: float) -> Json:
    output, total, requests = counted(rates, span_s)
    return {
        "usd_per_million_output_tokens": over(usd, output / 1e6),
        "usd_per_million_total_tokens": over(usd, total / 1e6),
        "usd_per_thousand_requests": over(usd, requests / 1e3),
        "output_tokens_per_usd": None if usd is None else over(output, usd),
        "total_tokens_per_usd": None if usd is None else over(total, usd),
        "output_tokens_per_s_per_usd_per_hour": None if usd is None else over(output, usd * SECONDS_PER_HOUR),
    }


def _of_machine(machine: Json, usage: Mapping[str, Any], tariff: Tariff) -> _Charge:
    """The devices of a pool, or the host of nodes."""
    name, pools = machine["name"], machine["pools"] or machine["beside"]
    kind = "hosts" if machine["kind"] == "host" else "pools"
    if payer := _includes(machine, usage, tariff):
        told = {"device": machine["device"], "usd_per_hour": 0.0, "purchase": "with devices", "origin": payer}
        return _Charge(kind, name, 0.0, pools, told)
    if machine["device"] is None:
        remark = f"No cost of {name}: its host is not known; network: {{nodes: {{...: {{host: epyc-9554}}}}}} names it."
        return _Charge(kind, name, None, pools, remarks=(remark,))
    # what several pools share has no price of one of them
    quote = tariff.quote(machine["device"], pools[0] if kind == "pools" or len(machine["pools"]) == 1 else "")
    usd, reason = _usd(machine, quote, tariff.scale)
    if usd is None:
        return _Charge(kind, name, None, pools, remarks=(f"No cost of {name}: {reason}.",))
    told = {"device": machine["device"], "usd_per_hour": quote.usd_per_hour, "purchase": quote.purchase}
    return _Charge(kind, name, usd, pools, {**told, "origin": quote.origin})


def _includes(machine: Json, usage: Mapping[str, Any], tariff: Tariff) -> str:
    """The pool whose accelerators' price has this host in it; none if "" is given."""
    devices = {m["name"]: m["device"] for m in usage["machines"] if m["kind"] == "devices"}
    paying = (pool for pool in machine["beside"] if tariff.quote(devices[pool], pool).prices.includes_host)
    return next(paying, "")


def _usd(machine: Json, quote: Quote, scale: float) -> tuple[float | None, str]:
    """What a machine costs; or None, and why. Reserved and owned ones are paid for whether they are wanted or not."""
    if quote.usd_per_hour is None:
        return None, f"{quote.reason}; prices: {{devices: {{{machine['device']}: ...}}}} gives one, USD per hour"
    held_s = machine["whole_device_s" if quote.purchase in ("reserved", "owned") else "device_s"]
    usd = quote.usd_per_hour * held_s / SECONDS_PER_HOUR
    if quote.purchase != "owned":
        return usd, ""
    if machine["energy_j"] is None:
        return None, f"the power of an owned {machine['device']} is not known, which has no tdp_w"
    return usd + _power_usd(machine["energy_j"], quote, scale), ""


def _power_usd(energy_j: float, quote: Quote, scale: float) -> float:
    """The energy of an owned machine at its list's price of power, cooling included."""
    return energy_j / JOULES_PER_KWH * quote.prices.pue * quote.prices.power_usd_per_kwh * scale


def _of_memory(memory: Mapping[str, Any], span_s: float, tariff: Tariff) -> _Charge:
    """A memory without a price costs nothing beside the machine that it is in, and that is said."""
    price = tariff.memory_usd_per_gb_month(memory["name"], memory["kind"])
    if price is None:
        remark = f"{memory['name']} has no price per GB-month and is not in the cost: prices: {{memories: ...}}."
        return _Charge("memories", memory["name"], 0.0, (), None, (remark,))
    months = span_s / SECONDS_PER_HOUR / HOURS_PER_MONTH
    usd = price * memory["instances"] * memory["capacity_bytes"] / GB * months
    return _Charge("memories", memory["name"], usd, memory["pools"], {"usd_per_gb_month": price})
