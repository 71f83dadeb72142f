"""Bills: what has to be in them, what their parts add up to, and that other prices need no other run."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mist
from mist.cost import ClientPrice, DevicePrice, PriceList, Tariff, cost
from mist.errors import ScenarioError
from mist.report.html import report_html

WORKLOAD = {
    "arrivals": {"poisson": {"rate_per_s": 20}}, "num_requests": 60, "input_tokens": 300, "output_tokens": 40
}  # fmt: skip
GPU = {"device": "h100-sxm", "model": "meta-llama/Llama-3.1-8B-Instruct", "perf": "roofline"}
TEXT = {"device": "epyc-9554", "serves": ["tokenize"], "perf": "cpu_text"}


def scenario(**sections: Any) -> mist.Scenario:
    return mist.Scenario(**{"workload": WORKLOAD, "clients": {"gpu": GPU}, "seed": 3, **sections})


@cache
def mixed() -> Any:
    """Two tenants on pools of several kinds: two devices each, apart, on CPUs."""
    other = {**WORKLOAD, "num_requests": 30, "input_tokens": 900}
    stages = ["tokenize", "prefill", "decode"]
    return scenario(
        workload=None,
        tenants={"a": {"workload": WORKLOAD, "pipeline": stages}, "b": {"workload": other}},
        clients={
            "prefill": {**GPU, "tp": 2, "count": 2, "serves": ["prefill"]},
            "decode": {**GPU, "device": "a100-sxm-80gb", "serves": ["decode"]},
            "text": {**TEXT, "count": 2},
        },
    ).run()


def hourly(result: Any, prices: Any = None) -> float:
    return float(result.cost(prices)["usd_per_hour"])


def test_twice_the_price_is_twice_the_cost_of_everything() -> None:
    once, twice = (mixed().cost({"scale": scale}) for scale in (1.0, 2.0))
    for key in ("usd", "usd_per_hour", "usd_per_million_output_tokens", "usd_per_million_total_tokens",
                "usd_per_thousand_requests"):  # fmt: skip
        assert twice[key] == 2 * once[key]
    assert twice["output_tokens_per_usd"] == once["output_tokens_per_usd"] / 2
    assert twice["stages"] == {stage: 2 * usd for stage, usd in once["stages"].items()}
    doubled = {"h100-sxm": 2 * 2.95, "a100-sxm-80gb": 2 * 1.4, "epyc-9554": 2 * 3.1744}
    assert hourly(mixed(), doubled) == pytest.approx(2 * hourly(mixed()), rel=1e-15)


@pytest.mark.parametrize("key", ["tp", "pp", "count"])
def test_two_devices_cost_twice_one(key: str) -> None:
    result = scenario(clients={"gpu": {**GPU, key: 2}}).run()
    assert hourly(result, {"h100-sxm": 3.0}) == pytest.approx(6.0, rel=1e-12)


def test_every_pool_is_in_the_sum() -> None:
    result = mixed()
    assert hourly(result) == pytest.approx(4 * 2.95 + 1.4 + 2 * 3.1744, rel=1e-12)
    bill = result.cost()
    assert set(bill["pools"]) == {"prefill", "decode", "text"}
    for device, num in (("h100-sxm", 4), ("a100-sxm-80gb", 1), ("epyc-9554", 2)):
        assert hourly(result, {device: 100.0}) - hourly(result, {device: 99.0}) == pytest.approx(num, rel=1e-9)


def test_parts_add_up_to_the_whole() -> None:
    bill = mixed().cost()
    assert sum([*bill["pools"].values(), *bill["hosts"].values(), *bill["memories"].values()]) == bill["usd"]
    assert sum(bill["stages"].values()) == pytest.approx(bill["usd"], rel=1e-12)
    assert sum(tenant["usd"] for tenant in bill["tenants"].values()) == pytest.approx(bill["usd"], rel=1e-12)
    assert set(bill["stages"]) == {"tokenize", "prefill", "decode"}
    energy = mixed().summary()["energy"]
    assert sum(energy["stages"].values()) == pytest.approx(energy["joules"], rel=1e-12)
    assert sum(tenant["joules"] for tenant in energy["tenants"].values()) == pytest.approx(energy["joules"], rel=1e-12)


def test_a_stage_pays_for_whom_it_is_alone_on() -> None:
    bill = mixed().cost()
    assert bill["stages"]["tokenize"] == pytest.approx(bill["pools"]["text"], rel=1e-12)
    assert bill["stages"]["prefill"] == pytest.approx(bill["pools"]["prefill"], rel=1e-12)
    # only one of the tenants has texts to work on
    assert bill["tenants"]["a"]["usd"] > bill["pools"]["text"]


def test_busy_time_goes_to_tokens() -> None:
    """Of two tenants alike, each pays half; with twice the requests, twice as much."""
    closed = {"concurrency": 1, "input_tokens": 500, "output_tokens": 50}
    tenants = {name: {"workload": {**closed, "num_requests": n}} for name, n in (("a", 20), ("b", 20), ("c", 40))}
    one_by_one = {**GPU, "batching": {"static": {"max_num_seqs": 1}}}
    result = scenario(workload=None, tenants=tenants, clients={"gpu": one_by_one}).run()
    usd = {name: tenant["usd"] for name, tenant in result.cost()["tenants"].items()}
    assert usd["a"] == pytest.approx(usd["b"], rel=1e-3)
    assert usd["c"] == pytest.approx(2 * usd["a"], rel=1e-3)


def test_shares_are_the_busy_time() -> None:
    usage = mixed().summary()["usage"]
    for machine in usage["machines"]:
        mine = sum(share["busy_s"] for share in usage["shares"] if share["pool"] == machine["name"])
        assert mine == pytest.approx(machine["busy_s"], rel=1e-9)
        assert machine["busy_s"] <= machine["device_s"] * (1 + 1e-12)


def test_purchases_are_the_catalogues() -> None:
    result = scenario().run()
    rates = {p: hourly(result, {"catalogue": "reference", "purchase": p}) for p in ("on_demand", "spot", "reserved")}
    assert rates == pytest.approx({"on_demand": 2.95, "spot": 1.25, "reserved": 1.3}, rel=1e-12)
    assert result.cost({"purchase": "spot"})["output_tokens_per_usd"] > result.cost()["output_tokens_per_usd"]


def test_owned_is_capital_and_power() -> None:
    result = scenario().run()
    energy_kwh = result.summary()["energy"]["joules"] / 3.6e6
    prices = {"devices": {"h100-sxm": {"capital_usd": 35_064.0}}, "purchase": "owned"}
    bill = result.cost(prices)  # four years of 8,766 hours: 1 $/h
    span_h = result.summary()["usage"]["span_s"] / 3600
    assert bill["usd"] == pytest.approx(span_h + energy_kwh * 1.3 * 0.1, rel=1e-12)


def test_tokens_per_dollar_are_the_throughput_over_the_price() -> None:
    summary = scenario().run().summary()
    bill, per_s = summary["cost"], summary["throughput"]["output_tokens_per_s"]
    assert bill["output_tokens_per_usd"] == pytest.approx(per_s * 3600 / 2.95, rel=1e-12)
    assert bill["output_tokens_per_s_per_usd_per_hour"] == pytest.approx(per_s / 2.95, rel=1e-12)
    assert bill["usd_per_million_output_tokens"] == pytest.approx(1e6 / bill["output_tokens_per_usd"], rel=1e-12)


def test_replicas_that_are_not_there_are_not_paid_for_by_the_hour() -> None:
    schedule = {"schedule": [{"at_s": 1.0, "count": 2}], "start_up_s": 0.5}
    result = scenario(clients={"gpu": {**GPU, "count": 2, "scaling": schedule}}).run()
    replica_s = result.summary()["clients"]["gpu"]["replica_s"]
    usage = result.summary()["usage"]
    assert replica_s < 2 * usage["span_s"]
    assert result.cost({"h100-sxm": 3.6})["usd"] == pytest.approx(replica_s * 1e-3, rel=1e-12)
    # a term is paid for, whoever is there
    kept = result.cost({"devices": {"h100-sxm": 3.6}, "purchase": "reserved"})
    assert kept["usd"] == pytest.approx(2 * usage["span_s"] * 1e-3, rel=1e-12)


def test_a_device_without_a_price_makes_no_cost_and_says_what_to_add() -> None:
    bill = mixed().cost({"catalogue": "hyperstack"})
    assert bill["usd"] is None
    assert bill["usd_per_million_output_tokens"] is None
    assert bill["output_tokens_per_usd"] is None
    assert bill["pools"]["text"] is None
    assert bill["pools"]["decode"] is not None
    assert bill["stages"] == {}
    assert bill["tenants"]["a"]["usd"] is None
    (remark,) = bill["remarks"]
    assert "hyperstack has no price of epyc-9554" in remark
    assert "prices: {devices: {epyc-9554:" in remark
    whole = mixed().cost({"catalogue": "hyperstack", "devices": {"epyc-9554": 1.0}})
    assert whole["usd"] is not None
    assert whole["remarks"] == []


def test_a_purchase_that_is_not_offered_is_said() -> None:
    bill = mixed().cost({"catalogue": "nebius", "purchase": "spot"})
    assert any("nebius has no spot price of epyc-9554, but on_demand" in remark for remark in bill["remarks"])


def nodes(**host: Any) -> dict[str, Any]:
    return {"preset": "h100-nvl8", "nodes": {"box": {"devices": 8, **host}, "cpus": {"host": "epyc-9554"}},
            "placement": {"text": ["cpus"], "more": ["cpus"], "gpu": ["box"]}}  # fmt: skip


STAGES = ["tokenize", "regex_guard", "prefill", "decode"]


def test_a_shared_host_is_counted_once() -> None:
    clients = {"gpu": GPU, "text": {**TEXT, "cores": 8}, "more": {**TEXT, "cores": 8, "serves": ["regex_guard"]}}
    result = scenario(clients=clients, pipeline=STAGES, network=nodes()).run()
    bill = result.cost()
    assert bill["usd_per_hour"] == pytest.approx(2.95 + 3.1744, rel=1e-12)
    assert bill["hosts"] == pytest.approx({"box": 0.0, "cpus": bill["usd"] - bill["pools"]["gpu"]})
    assert bill["quotes"]["box"]["origin"] == "gpu"
    assert any("7 accelerators of the nodes have no client and are not" in remark for remark in bill["remarks"])
    # without nodes each has a CPU of its own, and that it doesn't use all of it is said
    apart = scenario(clients=clients, pipeline=STAGES).run().cost()
    assert apart["usd_per_hour"] == pytest.approx(2.95 + 2 * 3.1744, rel=1e-12)
    assert any("pays for all 64 cores" in remark for remark in apart["remarks"])


def test_hosts_alike_are_one_line_for_all() -> None:
    text = {**TEXT, "count": 3}
    network = {"preset": "h100-nvl8", "nodes": {"box": {"devices": 8}, "cpus": {"host": "epyc-9554", "count": 3}}}
    result = scenario(
        clients={"gpu": GPU, "text": text}, pipeline=["tokenize", "prefill", "decode"], network=network
    ).run()
    hosts = [machine for machine in result.summary()["usage"]["machines"] if machine["kind"] == "host"]
    assert {host["name"]: host["num_devices"] for host in hosts} == {"box": 1, "cpus-0": 3}
    assert hourly(result) == pytest.approx(2.95 + 3 * 3.1744, rel=1e-12)
    assert result.cost()["hosts"].keys() == {"box", "cpus-0"}


def test_hosts_of_devices_that_are_priced_alone_are_paid_for() -> None:
    alone = {"name": "alone", "includes_host": False, "devices": {"h100-sxm": 2.0, "epyc-9554": 0.5}}
    clients = {"gpu": GPU, "text": TEXT, "more": {**TEXT, "serves": ["regex_guard"]}}
    known = scenario(
        clients=clients, pipeline=STAGES, network=nodes(host="epyc-9554"), prices={"catalogue": alone}
    ).run()
    assert hourly(known) == pytest.approx(2.0 + 2 * 0.5, rel=1e-12)
    unknown = scenario(clients=clients, pipeline=STAGES, network=nodes(), prices={"catalogue": alone}).run()
    assert unknown.cost()["usd"] is None
    assert any("No cost of box: its host is not known" in remark for remark in unknown.cost()["remarks"])


def test_memories_are_priced_by_the_month_or_it_is_said_that_they_are_not() -> None:
    workload = {**WORKLOAD, "cached_tokens": 100}
    sections = {
        "workload": workload,
        "clients": {"gpu": {**GPU, "kv_cache": {"tiers": ["ram"]}}},
        "memories": {"ram": {"memory": "ddr5", "capacity": "1 TB", "hit_rate": 0.5}},
    }
    result = scenario(**sections).run()
    assert any("ram has no price per GB-month" in remark for remark in result.cost()["remarks"])
    for name in ("ram", "ddr5"):
        priced = result.cost({"memories": {name: 7.305}})  # 0.01 $/h per GB, and there are 1,000
        assert priced["usd_per_hour"] == pytest.approx(2.95 + 10.0, rel=1e-9)
        assert priced["memories"]["ram"] > 0


def test_a_store_is_its_memory_and_the_cpu_that_it_is_on() -> None:
    sections = {
        "workload": {**WORKLOAD, "cached_tokens": 100},
        "pipeline": ["kv_retrieve", "prefill", "decode"],
        "memories": {"ssd": {"capacity": "1 TB", "bandwidth": "8 GB/s", "latency": "80 us", "hit_rate": 0.5}},
        "prices": {"memories": {"ssd": 0.7305}},
    }
    store = {"memory": "ssd", "serves": ["kv_retrieve"]}
    result = scenario(**sections, clients={"gpu": GPU, "store": store}).run()
    assert hourly(result) == pytest.approx(2.95 + 1.0, rel=1e-9)
    on_a_host = scenario(**sections, clients={"gpu": GPU, "store": {**store, "device": "epyc-9554"}}).run()
    assert hourly(on_a_host) == pytest.approx(2.95 + 1.0 + 3.1744, rel=1e-9)


def test_a_client_has_a_price_of_its_own() -> None:
    clients = {"gpu": {**GPU, "price": 1.0}, "other": {**GPU, "price": {"purchase": "spot"}}}
    result = scenario(clients={**clients, "third": {**GPU, "price": "lambda"}}).run()
    assert hourly(result) == pytest.approx(1.0 + 1.25 + 3.99, rel=1e-12)
    # and keeps it whatever the others pay
    assert hourly(result, {"h100-sxm": 10.0}) == pytest.approx(1.0 + 10.0 + 3.99, rel=1e-12)


@pytest.mark.parametrize(
    ("price", "prices", "told"),
    [
        (1.0, None, "(own prices)"),
        ("lambda", None, "(lambda, on demand)"),
        ({"catalogue": "semianalysis-rental", "purchase": "reserved"}, None, "(semianalysis-rental, reserved)"),
        ({"purchase": "spot"}, {"h100-sxm": {"spot": 1.0}}, "(own prices, spot)"),
        (None, {"h100-sxm": 2.0}, "(own prices, on demand)"),
        (None, None, "(reference, on demand)"),
    ],
)
def test_it_is_told_whose_prices_were_paid(price: Any, prices: Any, told: str) -> None:
    gpu = GPU if price is None else {**GPU, "price": price}
    result = scenario(clients={"gpu": gpu}, **({} if prices is None else {"prices": prices})).run()
    assert told in " ".join(str(result).split())


def test_prices_of_several_kinds_are_told_together() -> None:
    two = {"gpu": {**GPU, "price": 1.0}, "other": GPU}
    third = {**GPU, "price": {"catalogue": "lambda", "purchase": "on_demand"}}
    bill = scenario(clients=two).run().cost()
    assert (bill["prices"], bill["purchase"]) == ("own prices and reference", "on_demand")
    result = scenario(clients={**two, "third": third}, prices={"purchase": "spot"}).run()
    page = report_html(result)
    assert result.cost()["prices"] == "several lists"
    assert "<dd>several lists</dd>" in page
    assert "<dd>on demand and spot</dd>" in page


def test_a_bill_needs_only_the_summary_and_prices() -> None:
    result = mixed()
    summary = json.loads(result.to_json())
    tariff = Tariff(PriceList("mine", {d: DevicePrice(2.0) for d in ("h100-sxm", "a100-sxm-80gb", "epyc-9554")}))
    assert cost(summary["usage"], tariff)["usd_per_hour"] == pytest.approx(14.0, rel=1e-12)
    own = Tariff(tariff.prices, clients={"text": ClientPrice(0.0)})
    assert cost(summary["usage"], own)["usd_per_hour"] == pytest.approx(10.0, rel=1e-12)


def test_the_resolved_scenario_gives_the_same_bill() -> None:
    own = {"name": "mine", "devices": {"h100": 2.5}}
    first = scenario(prices={"catalogue": own, "scale": 0.5}, clients={"gpu": {**GPU, "price": {"catalogue": own}}})
    again = mist.Scenario.from_mapping(first.resolved())
    assert again == first
    assert again.run().cost() == first.run().cost()
    assert hourly(first.run()) == pytest.approx(1.25, rel=1e-12)


def test_a_run_without_requests_in_its_window_has_no_ratio() -> None:
    bill = scenario(window_s=[0, 1e-6]).run().cost()
    assert bill["usd_per_million_output_tokens"] is None
    assert bill["usd_per_thousand_requests"] is None
    assert bill["usd_per_hour"] == pytest.approx(2.95)


def test_unknown_devices_in_new_prices_are_refused() -> None:
    with pytest.raises(ScenarioError, match="there is no device 'h100-smx'"):
        mixed().cost({"h100-smx": 2.0})
    with pytest.raises(ScenarioError, match="there is no list of prices 'nebis'"):
        mixed().cost("nebis")


@settings(max_examples=40, deadline=None)
@given(
    gpu=st.floats(0, 1e4), cpu=st.floats(0, 1e4), old=st.floats(0, 1e4), more=st.floats(1e-3, 1e3),
    purchase=st.sampled_from(["on_demand", "reserved"]),
)  # fmt: skip
def test_any_prices_are_shared_out_whole_and_cost_grows_with_each(
    gpu: float, cpu: float, old: float, more: float, purchase: str
) -> None:
    def bill(**raised: float) -> dict[str, Any]:
        prices = {"h100-sxm": gpu, "epyc-9554": cpu, "a100-sxm-80gb": old}
        prices |= {name: prices[name] + extra for name, extra in raised.items()}
        return dict(mixed().cost({"devices": prices, "purchase": purchase}))

    whole = bill()
    assert sum(whole["stages"].values()) == pytest.approx(whole["usd"], rel=1e-9, abs=1e-15)
    assert sum(t["usd"] for t in whole["tenants"].values()) == pytest.approx(whole["usd"], rel=1e-9, abs=1e-15)
    for device in ("h100-sxm", "epyc-9554", "a100-sxm-80gb"):
        assert bill(**{device: more})["usd"] > whole["usd"]
