"""Prices as values: what a device costs by the hour, lists of providers, and the tariff by which a run is billed.

Catalogues and users' own lists arrive as mappings. Nothing here knows what a run used or opens a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from mist.errors import nearest
from mist.hardware import MappingReader

#: ways to come by a device: by the hour, by the hour until somebody else wants it, for a term, or bought
PURCHASES = ("on_demand", "spot", "reserved", "owned")
HOURS_PER_YEAR = 8_766.0
HOURS_PER_MONTH = 730.5

_RATES = ("on_demand", "spot", "reserved", "capital_usd")


@dataclass(frozen=True, slots=True)
class DevicePrice:
    """$ per device-hour by purchase, None where there is no such offer; `capital_usd` is what buying one costs."""

    on_demand: float | None = None
    spot: float | None = None
    reserved: float | None = None
    capital_usd: float | None = None

    def offers(self) -> list[str]:
        """The purchases that it has a price for."""
        return [p for p in PURCHASES if getattr(self, "capital_usd" if p == "owned" else p) is not None]


@dataclass(frozen=True, slots=True)
class PriceList:
    """What one provider asks for: $ per device-hour by device, $ per GB-month by memory, whence and when.

    `includes_host`: the host of a node is in the price of its accelerators. What is owned costs by the hour
    capital / (`amortisation_years` x 8,766 x `capital_utilisation`), the last the share of its life in which it serves,
    and the energy that it draws, times `pue`, at `power_usd_per_kwh`.
    """

    name: str
    devices: Mapping[str, DevicePrice]
    aliases: tuple[str, ...] = ()
    provider: str = ""
    region: str = ""
    date: str = ""
    includes_host: bool = True
    amortisation_years: float = 4.0
    capital_utilisation: float = 1.0
    power_usd_per_kwh: float = 0.1
    pue: float = 1.3
    memories: Mapping[str, float] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any]) -> PriceList:
        """A list from a catalogue file or a user's YAML; `devices: {h100-sxm: 2.95, l40s: {spot: 0.7}}` suffices.

        A bare number is the price on demand. ScenarioError lists every key that is unknown, missing or out of range.
        """
        reader = MappingReader(data, {f.name for f in fields(cls)}, required=("name", "devices"))
        values: dict[str, Any] = {key: str(data.get(key) or "") for key in ("name", "provider", "region", "date")}
        for key, (low, high) in _BOUNDS.items():
            if key in data and (number := _number(reader, key, data[key], low, high)) is not None:
                values[key] = number
        if not isinstance(data.get("includes_host", True), bool):
            reader.problem("includes_host", f"must be true or false, not {data['includes_host']!r}")
        values["includes_host"] = data.get("includes_host", True)
        values["devices"] = _devices(reader, data.get("devices") or {})
        values["memories"] = _memories(reader, data.get("memories") or {})
        values["aliases"] = tuple(str(alias) for alias in data.get("aliases") or ())
        values["sources"] = {str(k): str(v) for k, v in (data.get("sources") or {}).items()}
        reader.finish()
        return cls(**values)

    def capital_usd_per_hour(self, capital_usd: float) -> float:
        """What an hour of an owned device costs without its power."""
        return capital_usd / (self.amortisation_years * HOURS_PER_YEAR * self.capital_utilisation)


@dataclass(frozen=True, slots=True)
class ClientPrice:
    """What one pool pays in place of the tariff's: a price of its own per device-hour, a list, a purchase."""

    usd_per_hour: float | None = None
    prices: PriceList | None = None
    purchase: str | None = None


@dataclass(frozen=True, slots=True)
class Quote:
    """What a device of a pool costs: $ per hour, without power if it is `owned`, and who says so.

    `reason`: why `usd_per_hour` is None.
    """

    usd_per_hour: float | None
    prices: PriceList
    purchase: str
    origin: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Tariff:
    """How a run is billed: a list, of which `devices` and `clients` (by pool) override prices, all times `scale`."""

    prices: PriceList
    purchase: str = "on_demand"
    devices: Mapping[str, DevicePrice] = field(default_factory=dict)
    memories: Mapping[str, float] = field(default_factory=dict)
    clients: Mapping[str, ClientPrice] = field(default_factory=dict)
    scale: float = 1.0

    def quote(self, device: str, pool: str = "") -> Quote:
        """The price of `device` for `pool`: the pool's own, else the scenario's, else that of its list."""
        own = self.clients.get(pool, ClientPrice())
        prices, purchase = own.prices or self.prices, own.purchase or self.purchase
        if own.usd_per_hour is not None:
            return Quote(own.usd_per_hour * self.scale, prices, "flat", f"price of {pool}")
        chosen = None if own.prices else self.devices.get(device)
        price, origin = (chosen, "the scenario") if chosen else (prices.devices.get(device), prices.name)
        if price is None:
            near = nearest(device, prices.devices)
            reason = f"{prices.name} has no price of {device}" + (f" ({near})" if near.startswith("did") else "")
            return Quote(None, prices, purchase, origin, reason)
        if purchase == "owned" and price.capital_usd is not None:
            return Quote(prices.capital_usd_per_hour(price.capital_usd) * self.scale, prices, purchase, origin)
        rate = None if purchase == "owned" else getattr(price, purchase)
        if rate is not None:
            return Quote(rate * self.scale, prices, purchase, origin)
        offers = ", ".join(price.offers()) or "nothing"
        return Quote(None, prices, purchase, origin, f"{origin} has no {purchase} price of {device}, but {offers}")

    def memory_usd_per_gb_month(self, *names: str) -> float | None:
        """The price of the first of these names of a memory that has one."""
        for name in names:
            for table in (self.memories, self.prices.memories):
                if name in table:
                    return table[name] * self.scale
        return None


_BOUNDS = {
    "amortisation_years": (0.01, 100.0), "capital_utilisation": (0.001, 1.0), "power_usd_per_kwh": (0.0, 1e6),
    "pue": (1.0, 10.0),
}  # fmt: skip


def _number(reader: MappingReader, key: str, value: Any, low: float = 0.0, high: float = 1e12) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        reader.problem(key, f"must be a number from {low:g} to {high:g}, not {value!r}")
        return None
    return float(value)


def _devices(reader: MappingReader, given: Any) -> dict[str, DevicePrice]:
    if not isinstance(given, Mapping):
        reader.problem("devices", f"must be a mapping, not {given!r}")
        return {}
    found = {}
    for device, price in given.items():
        rates = price if isinstance(price, Mapping) else {"on_demand": price}
        for key in rates:
            if key not in _RATES:
                reader.problem(f"devices.{device}.{key}", "is not a known key", nearest(str(key), _RATES))
        place = f"devices.{device}"
        at = {key: f"{place}.{key}" if rates is price else place for key in rates}
        found[str(device)] = DevicePrice(**{k: _number(reader, at[k], v) for k, v in rates.items() if k in _RATES})
    return found


def _memories(reader: MappingReader, given: Any) -> dict[str, float]:
    if not isinstance(given, Mapping):
        reader.problem("memories", f"must be a mapping, not {given!r}")
        return {}
    numbers = {str(name): _number(reader, f"memories.{name}", value) for name, value in given.items()}
    return {name: number for name, number in numbers.items() if number is not None}
