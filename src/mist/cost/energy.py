"""The energy of a run: joules by pool and host, per token and request, per tenant and stage, and what that emits.

A function of a run's usage and of the site's figures. What draws an unknown power makes the whole None, with a remark;
it never counts as nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mist.cost.shares import counted, over, shared_out, sums

Json = dict[str, Any]
JOULES_PER_WH = 3600.0
WH_PER_KWH = 1000.0


@dataclass(frozen=True, slots=True)
class EnergySettings:
    """What a site adds: `pue`, facility power over that of the machines; grams of CO2 equivalents per kWh, if known.

    `host_w_per_device` and `network_w_per_device`: what servers draw beside each accelerator whose host isn't known,
    and its share of NICs and switches.
    """

    pue: float = 1.0
    carbon_g_per_kwh: float | None = None
    host_w_per_device: float = 0.0
    network_w_per_device: float = 0.0


def energy(usage: Mapping[str, Any], settings: EnergySettings | None = None) -> Json:
    """What the run of `usage` drew, in J over its span; docs/cost.md has every figure.

    `pools`, `hosts` and `beside` (settings per device) add up to `machines_j`, and this times the PUE is `joules`, to
    which `stages` and the `joules` of `tenants` add up.
    """
    site = settings or EnergySettings()
    span_s = usage["span_s"]
    # the host of a node that the scenario doesn't know is left out
    machines = [machine for machine in usage["machines"] if machine["device"] is not None]
    unknown = [machine for machine in machines if machine["energy_j"] is None]
    known = [machine for machine in machines if machine["energy_j"] is not None]
    beside = [_beside(machine, machines, site) for machine in known]
    drawn = [machine["energy_j"] + more for machine, more in zip(known, beside, strict=True)]
    total = None if unknown else sum(drawn)
    whole = None if total is None else total * site.pue
    amounts = [(m["pools"] or m["beside"], joules * site.pue) for m, joules in zip(known, drawn, strict=True)]
    parts = shared_out(usage, amounts, "energy_j") if whole is not None else None
    by_tenant = sums(parts, 0)
    return {
        "joules": whole,
        "machines_j": total,
        "mean_w": over(whole, span_s),
        **_ratios(whole, usage, span_s),
        "carbon_g": _carbon_g(whole, site),
        "pools": {machine["name"]: machine["energy_j"] for machine in machines if machine["kind"] == "devices"},
        "hosts": {machine["name"]: machine["energy_j"] for machine in machines if machine["kind"] == "host"},
        "beside": sum(beside),
        "stages": sums(parts, 1),
        "tenants": {
            name: {"joules": by_tenant.get(name, 0.0 if parts else None), **_ratios(by_tenant.get(name), rates, span_s)}
            for name, rates in usage["tenants"].items()
        },
        "remarks": [_unknown(machine) for machine in unknown],
    }


def _ratios(joules: float | None, rates: Mapping[str, Any], span_s: float) -> Json:
    output, total, requests = counted(rates, span_s)
    return {
        "joules_per_output_token": over(joules, output),
        "joules_per_total_token": over(joules, total),
        "wh_per_request": over(joules, requests * JOULES_PER_WH),
    }


def _carbon_g(joules: float | None, site: EnergySettings) -> float | None:
    if joules is None or site.carbon_g_per_kwh is None:
        return None
    return joules / JOULES_PER_WH / WH_PER_KWH * site.carbon_g_per_kwh


def _beside(machine: Mapping[str, Any], machines: Sequence[Mapping[str, Any]], site: EnergySettings) -> float:
    """Joules of what is beside a pool's accelerators: of hosts only where nodes don't say what they are."""
    if machine["is_cpu"]:
        return 0.0
    has_host = any(machine["name"] in m["beside"] for m in machines if m["kind"] == "host")
    watts = site.network_w_per_device + (0.0 if has_host else site.host_w_per_device)
    return float(machine["device_s"] * watts)


def _unknown(machine: Mapping[str, Any]) -> str:
    return f"No energy: no TDP is known of {machine['device']}; a device of your own has tdp_w."
