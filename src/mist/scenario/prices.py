"""What a user may write of prices and of energy, and the tariff and the site that it means.

A part of the schema: `prices` and `energy` of a scenario, and `price` of its clients. A list of prices stays a name or
a mapping here, so that it can be written anywhere. It bills nobody.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
)

from mist.cost import ClientPrice, DevicePrice, EnergySettings, PriceList, Tariff, cost
from mist.errors import Problem, ScenarioError, nearest
from mist.scenario import catalogue
from mist.scenario.named import Located, Section, problem, problems, short

if TYPE_CHECKING:
    from mist.scenario.value import Scenario

#: whose prices are taken where a scenario names none
DEFAULT_PRICES = "reference"

#: how alike an unknown key of `prices` is to a known one to be taken for it, and for no device
MISSPELT = 0.8

Usd = Annotated[float, Field(ge=0, le=1e12)]
Purchase = Literal["on_demand", "spot", "reserved", "owned"]


def _read_list(given: Any, info: ValidationInfo) -> Any:
    """A list of prices by the catalogue's name or in place, so that it means the same wherever the scenario goes."""
    if not isinstance(given, str | dict):
        known = f"known: {', '.join(catalogue.names('prices'))}"
        raise problem(f"must be a name, the path of a file or a mapping, not {short(given)}", known)
    try:
        return catalogue.read("prices", given, (info.context or {}).get("folder", Path()))[1]
    except ScenarioError as error:
        raise problems(_inside(given, each) for each in error.problems) from None


def _inside(given: Any, found: Problem) -> Located:
    path, message = catalogue.key_of(found.message, given)
    return path, Problem(message, found.file, found.line, found.column, found.hint)


_LIST_SCHEMA = WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "object"}]})
ListOfPrices = Annotated[Any, AfterValidator(_read_list), _LIST_SCHEMA]


def _flat(value: Any) -> Any:
    """A bare number as the price per hour."""
    return {"usd_per_hour": value} if isinstance(value, int | float) and not isinstance(value, bool) else value


def _rates(value: Any) -> Any:
    """The rates of a device; a bare number is the price per hour."""
    if isinstance(value, dict | DeviceRates | int | float) and not isinstance(value, bool):
        return _flat(value)
    raise problem(f"must be a number, USD per device-hour, not {short(value)}", "or by purchase, such as {spot: 1.2}")


class DeviceRates(Section):
    """What a device costs, in USD per device-hour: whatever the purchase, or by purchase."""

    usd_per_hour: Usd | None = None
    """by any purchase that has no price of its own"""
    on_demand: Usd | None = None
    """by the hour"""
    spot: Usd | None = None
    """by the hour, until somebody else wants it"""
    reserved: Usd | None = None
    """for a term, per hour of it"""
    capital_usd: Usd | None = None
    """what buying one costs, in USD, for purchase: owned"""


class Prices(Section):
    """What devices and memories cost: a list of the catalogue, and prices of one's own over it."""

    catalogue: ListOfPrices = Field(default=DEFAULT_PRICES, validate_default=True)
    """a list: a name of `mist list prices`, the path of a YAML file, or a mapping"""
    purchase: Purchase = "on_demand"
    """how devices are paid for: by the hour while they are there, or reserved and owned ones all the time"""
    devices: dict[str, Annotated[DeviceRates, BeforeValidator(_rates)]] = {}  # noqa: RUF012
    """prices by device, in place of the list's: USD per device-hour, or by purchase such as {spot: 1.2}"""
    memories: dict[str, Usd] = {}  # noqa: RUF012
    """USD per GB-month of memories, by the scenario's or the catalogue's names"""
    scale: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    """what all prices are multiplied by, such as 0.8 for a discount"""


class PoolPrice(Section):
    """What the devices of one client cost, in place of the scenario's prices."""

    usd_per_hour: Usd | None = None
    """USD per device-hour"""
    catalogue: ListOfPrices | None = None
    """a list: a name of `mist list prices`, the path of a YAML file, or a mapping"""
    purchase: Purchase | None = None
    """how they are paid for; left out, as the scenario says"""


class Energy(Section):
    """What a site adds to the energy of its devices."""

    pue: Annotated[float, Field(ge=1, le=10)] = 1.0
    """power usage effectiveness: the facility's power over that of its machines"""
    carbon_g_per_kwh: Annotated[float, Field(ge=0, le=1e5)] | None = None
    """grams of CO2 equivalents per kWh of its power"""
    host_w_per_device: Annotated[float, Field(ge=0, le=1e5)] = 0.0
    """what a server draws beside each accelerator, W, where network.nodes has no host for it"""
    network_w_per_device: Annotated[float, Field(ge=0, le=1e5)] = 0.0
    """an accelerator's share of NICs and switches, W"""

    def settings(self) -> EnergySettings:
        """As a value."""
        return EnergySettings(**self.model_dump())


def _prices(value: Any) -> Any:
    """A list by its name, or prices by device, as the whole section."""
    if isinstance(value, str):
        return {"catalogue": value}
    if not isinstance(value, dict) or not value or value.keys() & Prices.model_fields.keys():
        return value
    if any(catalogue.canonical("devices", str(name)) for name in value):
        return {"devices": value}
    is_misspelt = any(get_close_matches(str(key), Prices.model_fields, cutoff=MISSPELT) for key in value)
    has_prices = all(isinstance(price, int | float | dict) for price in value.values())
    return {"devices": value} if has_prices and not is_misspelt else value


def _pool_price(value: Any) -> Any:
    return {"catalogue": value} if isinstance(value, str) else _flat(value)


AnyPrices = Annotated[Prices, BeforeValidator(_prices)]
AnyPoolPrice = Annotated[PoolPrice, BeforeValidator(_pool_price)]


def cost_anew(scenario: Mapping[str, Any], usage: Mapping[str, Any], given: Any) -> dict[str, Any]:
    """The bill of a run by other prices, `given` as a scenario would have them; a client's own `price` stays.

    `scenario`: the resolved one of the run that left `usage`. ScenarioError as in a scenario.
    """
    context = {"folder": Path()}
    try:
        prices: Prices = TypeAdapter(AnyPrices).validate_python(given, context=context)
    except ValidationError as error:
        raise ScenarioError(_told(each) for each in error.errors()) from None
    own = frozenset(machine["device"] for machine in usage["machines"] if machine["device"])
    if found := [each for _, each in _unknown_devices(prices, own)]:
        raise ScenarioError(found)
    of_clients = {name: client["price"] for name, client in scenario["clients"].items() if "price" in client}
    clients = {name: PoolPrice.model_validate(price, context=context) for name, price in of_clients.items()}
    bill = cost(usage, tariff_of(prices, clients))
    bill["remarks"] += unused_prices(prices, own)
    return bill


def _told(error: Any) -> Problem:
    """A validation error as a problem without a place."""
    ctx = error.get("ctx", {})
    where = ".".join(map(str, error["loc"]))
    message = ctx.get("message", error["msg"])
    return Problem(f"prices.{where}: {message}" if where else f"prices: {message}", hint=ctx.get("hint", ""))


def unused_prices(prices: Prices, used: Collection[str]) -> Iterator[str]:
    """A remark on each price of a device that is not among those `used`."""
    for name in prices.devices:
        if _canonical(name) not in used:
            yield f"prices: nobody has a {name}, so its price changes nothing."


def tariff_of(prices: Prices, clients: Mapping[str, PoolPrice | None]) -> Tariff:
    """How the pools of `clients` are billed."""
    return Tariff(
        _list_of(prices.catalogue),
        prices.purchase,
        {_canonical(name): _device_price(price) for name, price in prices.devices.items()},
        prices.memories,
        {name: _client_price(price) for name, price in clients.items() if price is not None},
        prices.scale,
    )


def _client_price(price: PoolPrice) -> ClientPrice:
    prices = None if price.catalogue is None else _list_of(price.catalogue)
    return ClientPrice(price.usd_per_hour, prices, price.purchase)


def _device_price(price: DeviceRates) -> DevicePrice:
    any_hour, rates = price.usd_per_hour, price.model_dump(exclude={"usd_per_hour", "capital_usd"})
    hourly = {purchase: any_hour if rate is None else rate for purchase, rate in rates.items()}
    return DevicePrice(capital_usd=price.capital_usd, **hourly)


def _list_of(form: Any) -> PriceList:
    prices: PriceList = catalogue.read("prices", form, Path())[0]
    return prices


def _canonical(device: str) -> str:
    return catalogue.canonical("devices", device) or device


def price_conflicts(scenario: Scenario) -> Iterator[Located]:
    """Prices of devices and memories that there are none of, and of what isn't for sale."""
    own = frozenset(client.device.name for client in scenario.clients.values() if client.device)
    written = scenario.source.data().get("prices")
    below = ("prices", "devices") if isinstance(written, dict) and "devices" in written else ("prices",)
    for name, found in _unknown_devices(scenario.prices, own):
        yield (*below, name, "[key]"), found
    for name in [each for each in scenario.prices.memories if each not in {*scenario.memories, *scenario.stores}]:
        if name not in (memories := catalogue.names("memories")):
            known = {*scenario.memories, *scenario.stores, *memories}
            found = Problem(f"there is no memory {name!r}", hint=nearest(name, known))
            yield ("prices", "memories", name, "[key]"), found


def _unknown_devices(prices: Prices, own: frozenset[str]) -> Iterator[tuple[str, Problem]]:
    for name in prices.devices:
        if name not in own and catalogue.canonical("devices", name) is None:
            known = {*own, *catalogue.names("devices"), *catalogue.aliases("devices")}
            yield name, Problem(f"there is no device {name!r}", hint=nearest(name, known))
