"""What a point's columns say of power caps, drafts and hand-over links, and what a run says of transfers.

Guards that each becomes the scenario's key, and that values which can't be run are skips with a reason.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mist import run
from mist.validation.outcome import Outcome
from mist.validation.points import Point, Skip
from mist.validation.setting import Setting, setting_of

PLAIN = {
    "engine": "vllm", "model": "Qwen/Qwen3-8B", "device": "h100-sxm", "tp": "1", "num_devices": "1",
    "load": "closed_loop", "concurrency": "1", "num_requests": "4", "isl": "2048", "osl": "8",
    "weights_dtype": "bf16", "kv_dtype": "bf16",
}  # fmt: skip
APART = {**PLAIN, "tp": "", "num_devices": "2", "topology": "pd", "prefill_pool": "1xTP1", "decode_pool": "1xTP1"}


def of(columns: dict[str, str], **changes: str) -> Setting:
    return setting_of(Point("p", columns | changes), Path(), perf="roofline")


def pool(**changes: str) -> Any:
    return of(PLAIN, **changes).scenario.clients["gpu"]


def test_a_power_cap_is_the_pools() -> None:
    assert pool().power_cap_w is None
    assert pool(power_cap_w="500").power_cap_w == 500
    for cap, reason in (("unknown", "not a number"), ("900", "900 W"), ("50", "50 W")):
        with pytest.raises(Skip, match=reason):
            pool(power_cap_w=cap)


@pytest.mark.parametrize(
    ("given", "method"),
    [("eagle3:3:0.6", "eagle"), ("eagle:3:0.6", "eagle"), ("medusa:3:0.6", "eagle"), ("mtp:1:0.8", "mtp"),
     ("nextn:1:0.8", "mtp"), ("ngram:4:0.2", "ngram")],
)  # fmt: skip
def test_ways_to_draft_have_several_names(given: str, method: str) -> None:
    found = pool(spec_decode=given).speculation
    assert found.method == method
    assert f":{found.num_draft_tokens}:{found.acceptance:g}" in given


@pytest.mark.parametrize("given", ["draft:3:0.6", "telepathy:3:0.6", "eagle3:3", "eagle3"])
def test_drafts_that_no_one_can_price_are_skips(given: str) -> None:
    with pytest.raises(Skip):
        pool(spec_decode=given)


@pytest.mark.parametrize(
    ("nodes", "interconnect", "bandwidth"),
    [("2", "roce:200", 200), ("1", "", 450), ("", "", 450), ("2", "", 50), ("2", "ib", 50), ("1", "pcie:32", 32)],
)
def test_the_link_is_the_rows_or_the_devices(nodes: str, interconnect: str, bandwidth: float) -> None:
    link = of(APART, num_nodes=nodes, interconnect=interconnect).scenario.network.kv_transfer
    assert link is not None
    assert link.bytes_per_s == pytest.approx(0.73 * bandwidth * 1e9)
    assert link.latency_ns == 394_000


def test_transfers_are_measured_from_start_to_end() -> None:
    point = Point("p", APART | {"num_nodes": "2", "interconnect": "roce:200"})
    setting = setting_of(point, Path(), perf="roofline")
    outcome = Outcome(point, setting, run(setting.scenario))
    num_bytes = 2048 * 2 * 36 * 8 * 128 * 2
    ms = 1e3 * num_bytes / (0.73 * 200e9) + 0.394
    assert outcome.value("kv_transfer_ms") == pytest.approx(ms)
    assert outcome.value("kv_transfer_gb_per_s") == pytest.approx(num_bytes / 1e6 / ms)
    alone = setting_of(Point("q", PLAIN), Path(), perf="roofline")
    with pytest.raises(Skip, match="no kv_transfer_ms"):
        Outcome(Point("q", PLAIN), alone, run(alone.scenario)).value("kv_transfer_ms")
