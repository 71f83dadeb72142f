"""Lists of prices: what ships is whole and sourced, and what a user writes wrongly is told where it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

import mist
from mist.cost import PURCHASES, PriceList
from mist.errors import ScenarioError
from mist.scenario import catalogue
from mist.scenario.remarks import remarks
from mist.scenario.value import load as load_scenario

NAMES = catalogue.names("prices")
FOLDER = Path(mist.__file__).parent / "data" / "prices"
BASE = """
workload: {concurrency: 4, num_requests: 8, input_tokens: 100, output_tokens: 10}
clients: {gpu: {device: h100-sxm, model: llama-3.1-8b, perf: roofline}}
"""


def load(tmp_path: Path, text: str) -> mist.Scenario:
    (tmp_path / "it.yaml").write_text(BASE + text)
    return load_scenario(tmp_path / "it.yaml")


def told(tmp_path: Path, text: str) -> str:
    with pytest.raises(ScenarioError) as error:
        load(tmp_path, text)
    return str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_every_price_has_a_source_and_a_device(name: str) -> None:
    data = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    prices: PriceList = catalogue.read("prices", name, Path())[0]
    sourced = {part.strip() for key in data["sources"] for part in key.split(",")}
    assert set(data["devices"]) <= sourced
    assert set(prices.devices) <= set(catalogue.names("devices"))
    assert prices.provider
    assert prices.date
    for device, price in prices.devices.items():
        assert price.offers(), device
        rates = [rate for rate in (price.on_demand, price.spot, price.reserved) if rate is not None]
        assert all(0.1 < rate < 20 for rate in rates)
        assert price.capital_usd is None or 1_000 < price.capital_usd < 100_000


def test_spot_and_terms_are_cheaper_where_the_catalogue_has_both() -> None:
    for name in NAMES:
        for price in catalogue.read("prices", name, Path())[0].devices.values():
            for cheaper in (price.spot, price.reserved):
                assert cheaper is None or price.on_demand is None or cheaper < price.on_demand


def test_the_default_has_every_purchase_of_the_common_devices() -> None:
    prices = catalogue.read("prices", "reference", Path())[0]
    assert {"h100-sxm", "h200-sxm", "a100-sxm-80gb", "l40s", "mi300x", "epyc-9554"} <= set(prices.devices)
    assert prices.devices["h100-sxm"].offers() == list(PURCHASES)


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("prices: nebis", ["4:9", "no list of prices 'nebis'", "did you mean 'nebius'"]),
        ("prices: {h100-smx: 2}", ["4:10", "no device 'h100-smx'", "'h100-sxm'"]),
        ("prices: {devices: {h100-smx: 2}}", ["4:20", "no device 'h100-smx'", "'h100-sxm'"]),
        ("prices: {devices: {h100-sxm: -1}}", ["must be at least 0, not -1"]),
        ("prices: {h100-sxm: {spots: 1}}", ["no key 'spots'", "'spot'"]),
        ("prices: {h100-sxm: .nan}", ["not a finite number"]),
        ("prices: {catalog: nebius}", ["no key 'catalog'", "'catalogue'"]),
        ("prices: {purchase: spots}", ["one of 'on_demand', 'spot', 'reserved' or 'owned'"]),
        ("prices: {scale: 0}", ["must be greater than 0"]),
        ("prices: {memories: {ddrx: 3}}", ["no memory 'ddrx'", "'ddr5'"]),
        ("prices: {catalogue: {devices: {h100-sxm: -3}}}", ["from 0 to", "not -3"]),
        ("prices: {catalogue: {devices: {h100-sxm: 3}, pue: 0.9}}", ["pue must be a number from 1 to 10"]),
        ("prices: {h100-sxm: cheap}", ["must be a number, USD per device-hour, not 'cheap'"]),
        ("prices: {devices: {h100-sxm: [2]}}", ["must be a number"]),
        ("prices: {scal: 1}", ["no key 'scal'", "'scale'"]),
        ("prices: {devics: {h100-sxm: 2}}", ["no key 'devics'", "'devices'"]),
        ("prices: 5", ["must be a mapping, not 5"]),
        ("energy: {pue: 0.5}", ["must be at least 1"]),
        ("energy: {carbon: 5}", ["no key 'carbon'", "carbon_g_per_kwh"]),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told(tmp_path: Path, text: str, messages: list[str]) -> None:
    message = told(tmp_path, text)
    for part in messages:
        assert part in message, message


def test_a_price_of_a_device_that_nobody_has_is_remarked(tmp_path: Path) -> None:
    told = "prices: nobody has a h200-sxm, so its price changes nothing."
    assert told in remarks(load(tmp_path, "prices: {h200-sxm: 2, H100: 3}"))
    assert not [each for each in remarks(load(tmp_path, "prices: {H100: 3}")) if "changes nothing" in each]
    found = load(tmp_path, "").run()
    assert told in found.cost({"h200-sxm": 2.0})["remarks"]
    assert told not in found.cost({"h100-sxm": 2.0})["remarks"]
    with pytest.raises(ScenarioError, match=r"no key 'scal'.*\n.*'scale'"):
        found.cost({"scal": 1})


def test_a_client_with_a_wrong_price_is_told(tmp_path: Path) -> None:
    text = BASE.replace("perf: roofline", "perf: roofline, price: {usd_per_hour: -2}")
    (tmp_path / "it.yaml").write_text(text)
    with pytest.raises(ScenarioError, match=r"clients.gpu.price.usd_per_hour: must be at least 0, not -2"):
        load_scenario(tmp_path / "it.yaml")


def test_a_list_beside_the_scenario_may_use_any_name_of_a_device(tmp_path: Path) -> None:
    (tmp_path / "ours.yaml").write_text("devices: {H100: {on_demand: 2.2, spot: 1.1}}\nprovider: us\n")
    result = load(tmp_path, "prices: {catalogue: ours.yaml, purchase: spot}").run()
    assert result.cost()["usd_per_hour"] == pytest.approx(1.1)
    assert result.cost()["prices"] == "ours"


def test_a_broken_list_is_told_in_its_own_file(tmp_path: Path) -> None:
    (tmp_path / "ours.yaml").write_text("devices: {h100-sxm: x}\nregio: north\n")
    message = told(tmp_path, "prices: ours.yaml")
    assert "ours.yaml:1:21" in message
    assert "not 'x'" in message
    assert "regio is not a known key" in message
    assert "did you mean 'region'" in message


def from_mapping(**data: Any) -> PriceList:
    return PriceList.from_mapping({"name": "it", "devices": {}, **data})


def test_all_that_is_wrong_with_a_list_is_told_at_once() -> None:
    with pytest.raises(ScenarioError) as error:
        from_mapping(devices={"a": {"spot": True}, "b": []}, memories={"c": -1}, includes_host=1, capital_utilisation=0)
    message = str(error.value)
    for part in ("devices.a.spot", "devices.b", "memories.c", "includes_host", "capital_utilisation"):
        assert part in message
