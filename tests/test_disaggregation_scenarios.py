"""Scenarios with prefill and decode apart: devices, vendors, groups, layers, dtypes and lending, and what is refused.

What a user writes of `hand_over` and `lending`, and what it comes to; the laws are tested on small clusters.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from apart import column
from mist.errors import ScenarioError
from mist.scenario import load
from mist.scenario.result import Result
from mist.scenario.stored import read_result

POOL = {"model": "llama-3.1-8b", "count": 2}
APART: dict[str, Any] = {
    "seed": 2,
    "workload": {"arrivals": {"poisson": {"rate_per_s": 6}}, "num_requests": 60,
                 "input_tokens": {"uniform": {"low": 10, "high": 3000}}, "output_tokens": 20},
    "clients": {"prefill": POOL | {"device": "h100-sxm", "serves": ["prefill"]},
                "decode": POOL | {"device": "h100-sxm", "serves": ["decode"]}},
    "perf": "roofline",
    "network": {"kv_transfer": {"bandwidth": "50 GB/s", "latency": "1 ms"}},
}  # fmt: skip
NODES = {"preset": "h100-nvl8", "nodes": {"gpu": {"count": 2, "devices": 2}}}


def apart(*, hand_over: Any = None, network: Any = None, **changes: Mapping[str, Any]) -> Result:
    """The scenario with `changes` to its pools."""
    clients = {name: {**pool, **changes.get(name, {})} for name, pool in APART["clients"].items()}
    more = {"hand_over": hand_over} if hand_over else {}
    return load(APART | {"clients": clients} | ({"network": network} if network else {}) | more).run(check=True)


def of_client(result: Result, pool: str, name: str) -> list[tuple[int, ...]]:
    mine = [i for i, client in enumerate(result.records.client_names) if client.startswith(pool)]
    columns = getattr(result.records, name).as_columns()
    here = np.isin(columns["client"], mine)
    return list(zip(*(c[here].tolist() for c in columns.values()), strict=True))


def test_another_decode_device_changes_decodes_and_nothing_else() -> None:
    same, other = apart(), apart(decode={"device": "mi300x", "tp": 2})
    for name in ("steps", "tasks"):
        assert of_client(same, "prefill", name) == of_client(other, "prefill", name)
    for key in ("request", "sender", "bytes", "queued_ns", "start_ns", "end_ns"):
        assert sorted(column(same, "transfers", key)) == sorted(column(other, "transfers", key))
    assert of_client(same, "decode", "steps") != of_client(other, "decode", "steps")


def test_swapped_vendors_swap_results() -> None:
    """Requests one at a time: what a prompt takes, and what its decodes take, is its own pool's alone."""

    def took(prefill: str, decode: str) -> tuple[list[int], list[int]]:
        workload = {"arrivals": {"constant": {"rate_per_s": 0.5}}, "num_requests": 10, "input_tokens":
                    {"uniform": {"low": 10, "high": 3000}}, "output_tokens": 20}  # fmt: skip
        clients = {name: {**APART["clients"][name], "device": device, "count": 1}
                   for name, device in (("prefill", prefill), ("decode", decode))}  # fmt: skip
        result = load(APART | {"workload": workload, "clients": clients}).run(check=True)
        return tuple(  # type: ignore[return-value]
            [end - start for _, start, end, *_ in of_client(result, pool, "steps")] for pool in ("prefill", "decode")
        )

    nvidia, amd = took("h100-sxm", "h100-sxm"), took("mi300x", "mi300x")
    assert took("h100-sxm", "mi300x") == (nvidia[0], amd[1])
    assert took("mi300x", "h100-sxm") == (amd[0], nvidia[1])
    assert nvidia[0] != amd[0]


@pytest.mark.parametrize(("within", "network"), [("node", NODES), ("rack", NODES | {"nodes_per_rack": 1})])
def test_within_a_node_or_a_rack(within: str, network: dict[str, Any]) -> None:
    network = network | {"placement": {"prefill": ["gpu-0", "gpu-1"], "decode": ["gpu-0", "gpu-1"]}}
    result = apart(hand_over={"within": within}, network=network)
    ways = set(zip(result.transfers["sender"], result.transfers["receiver"], strict=True))
    assert ways == {("prefill-0", "decode-0"), ("prefill-1", "decode-1")}


def test_groups_of_pools() -> None:
    clients = {f"{stage}-{group}": {**APART["clients"][stage], "count": 1, "group": group}
               for group in "ab" for stage in ("prefill", "decode")}  # fmt: skip
    result = load(APART | {"clients": clients}).run(check=True)
    ways = set(zip(result.transfers["sender"], result.transfers["receiver"], strict=True))
    assert ways == {("prefill-a", "decode-a"), ("prefill-b", "decode-b")}


def test_layers_hide_transfers_and_move_as_many_bytes() -> None:
    early = {"choose_decode": "at_arrival"}
    whole, layered = apart(hand_over=early), apart(hand_over=early | {"layerwise": True})
    assert sum(column(whole, "transfers", "bytes")) == sum(column(layered, "transfers", "bytes"))
    waits = [r.summary()["stages"]["decode"]["transfer_s"]["mean"] for r in (whole, layered)]
    assert 1e-3 < waits[1] < 0.6 * waits[0]
    assert load(layered.scenario) == load(load(layered.scenario).resolved())


@pytest.mark.parametrize("convert", ["before", "after"])
def test_another_dtype_costs_a_read_and_a_write(convert: str) -> None:
    plain, narrow = apart(), apart(decode={"kv_dtype": "fp8"}, hand_over={"convert": convert})
    bytes_per_token = 131_072
    assert sum(column(narrow, "transfers", "bytes")) * (2 if convert == "before" else 1) == sum(
        column(plain, "transfers", "bytes")
    )
    first = column(plain, "transfers", "request").index(0)
    tokens = column(plain, "transfers", "bytes")[first] // bytes_per_token
    took = round(tokens * 1.5 * bytes_per_token / 3352e9 * 1e9)
    start = column(narrow, "transfers", "start_ns")[first] - column(plain, "transfers", "start_ns")[first]
    assert start == pytest.approx(took if convert == "before" else 0, rel=0.01)
    notes = [note for note in narrow.metrics["notes"] if "converted from bf16 to fp8" in note]
    assert notes == [f"prefill, decode: KV caches are converted from bf16 to fp8 on "
                     f"{'prefill' if convert == 'before' else 'decode'}, at its memory bandwidth."]  # fmt: skip


def test_a_lending_pool_of_a_scenario(tmp_path: Path) -> None:
    crowd = {"arrivals": {"poisson": {"rate_per_s": 80}}, "num_requests": 300, "input_tokens": 3000,
             "output_tokens": 20}  # fmt: skip
    clients = {**APART["clients"], "decode": {**APART["clients"]["decode"], "lending": {"threshold_tokens": 6000}}}
    result = load(APART | {"workload": crowd, "clients": clients}).run(check=True)
    assert len(result.records.loans) > 0
    assert min(column(result, "loans", "end_ns")) > 0
    tasks = result.records.tasks.as_columns()
    lent = (tasks["kind"] == 0) & (tasks["client"] >= 2)
    assert lent.sum() > 0
    told, loans = result.metrics["lending"], result.loans
    span_s = result.metrics["duration_s"] * sum(info.startswith("decode") for info in result.records.client_names)
    assert told["prompts"] == len(np.unique(tasks["request"][lent]))
    assert told["loans"] == len(loans["client"])
    assert told["share_of_time"] == pytest.approx((loans["end_s"] - loans["start_s"]).sum() / span_s)
    assert f"Lending     {told['loans']} loan" in str(result)
    assert load(APART).run().metrics["lending"] is None
    assert "Lending" not in str(load(APART).run())
    stored = read_result(result.write(tmp_path / "out"))
    assert pq.read_table(tmp_path / "out" / "loans.parquet").column_names == ["client", "start_s", "end_s"]
    assert {name: column.tolist() for name, column in stored.loans.items()} == {
        name: column.tolist() for name, column in loans.items()
    }
    (tmp_path / "out" / "loans.parquet").unlink()  # as an earlier version left it
    assert len(read_result(tmp_path / "out").loans["client"]) == 0


def test_each_tenant_has_somebody_within_reach() -> None:
    clients = {f"{stage}-{group}": {**APART["clients"][stage], "count": 1, "group": group}
               for group in "ab" for stage in ("prefill", "decode")}  # fmt: skip
    own = {"workload": APART["workload"], "clients": ["prefill-a", "decode-b"]}
    rest = {key: value for key, value in APART.items() if key != "workload"}
    with pytest.raises(ScenarioError, match="nobody decodes what prefill-a computes"):
        load(rest | {"clients": clients, "tenants": {"one": own, "two": {"workload": APART["workload"]}}})


def test_each_tenant_has_somebody_who_takes_prompts_while_nobody_is_lent() -> None:
    mixed = APART["clients"]["decode"] | {"serves": ["prefill", "decode"], "lending": {}}
    clients = {"prefill": APART["clients"]["prefill"], "mixed": mixed}
    rest = {key: value for key, value in APART.items() if key != "workload"}
    tenants = {name: {"workload": APART["workload"], "clients": ["mixed", *more]} for name, more in
               (("one", ["prefill"]), ("two", []))}  # fmt: skip
    with pytest.raises(ScenarioError, match="nobody takes prompts of two as long as nobody is lent"):
        load(rest | {"clients": clients, "tenants": tenants})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hand_over": {"layerwise": True}}, "layers are sent before the prefill ends"),
        ({"hand_over": {"layerwise": True, "choose_decode": "at_prefill_end"}}, "to a client that has room"),
        ({"hand_over": {"within": "node"}}, "the network has no nodes"),
        ({"hand_over": {"within": "node"}, "network": NODES}, "prefill-0 has no decode client in its node"),
        ({"hand_over": {"within": "rack"}, "network": NODES | {"nodes_per_rack": 1}}, "no decode client in its rack"),
        ({"decode": {"group": "a"}}, "nobody decodes what prefill computes"),
        ({"prefill": {"lending": {}}}, "decodes what it computes"),
        ({"decode": {"batching": "decode_only", "lending": {}}}, "decode_only computes none"),
        ({"prefill": {"serves": ["prefill", "decode"], "lending": {}}}, "nobody takes prompts"),
        ({"hand_over": {"layerwise": True, "choose_decode": "at_arrival", "convert": "before"},
          "decode": {"kv_dtype": "fp8"}}, "converted where it arrives"),
    ],
)  # fmt: skip
def test_terms_that_do_not_go_together_are_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ScenarioError, match=says):
        apart(**change)
