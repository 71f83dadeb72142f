"""Elasticities of a deployment: those that are known in closed form, and signs of the others."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from click.testing import CliRunner

from mist.cli import main
from mist.errors import ScenarioError
from mist.scenario import load
from mist.scenario.value import to_yaml
from mist.search.executors import executor_named
from mist.search.sensitivity import sensitivity

SCENARIO: dict[str, Any] = {
    "name": "one",
    "seed": 5,
    "workload": {
        "arrivals": {"poisson": {"rate_per_s": 1}},
        "num_requests": 40,
        "input_tokens": 4000,
        "output_tokens": 30,
    },
    "clients": {
        "gpu": {"device": "h100-sxm", "model": "llama-3.1-8b", "count": 2, "engine": "ideal", "perf": "roofline"}
    },
}
OBJECTIVES = ("devices", "output_tokens_per_s", "ttft_s.p50", "tpot_s.p50")


def measured(**overrides: Any) -> dict[str, dict[str, dict[str, float | None]]]:
    with executor_named("serial") as executor:
        document = sensitivity(load(SCENARIO, **overrides), executor, objectives=OBJECTIVES, num_seeds=2)
    assert all(row["error"] is None for row in document["parameters"])
    return {row["parameter"]: row["elasticities"] for row in document["parameters"]}


def test_seeds_that_draw_nothing_give_no_interval() -> None:
    regular = {"arrivals": {"constant": {"rate_per_s": 1}}}
    with executor_named("serial") as executor:
        drawn, same = (
            sensitivity(load({**SCENARIO, "workload": SCENARIO["workload"] | each}), executor, num_seeds=2,
                        objectives=["ttft_s.p50"])
            for each in ({"num_requests": 10}, {"num_requests": 10} | regular)
        )  # fmt: skip
    assert drawn["remarks"] == []
    assert any(row["elasticities"]["ttft_s.p50"]["low"] is not None for row in drawn["parameters"])
    assert [remark[:24] for remark in same["remarks"]] == ["All seeds gave the same:"]
    assert all(row["elasticities"]["ttft_s.p50"]["low"] is None for row in same["parameters"])


def test_runs_that_all_failed_are_an_error() -> None:
    late = load({**SCENARIO, "warmup_s": 3600})
    failed = pytest.raises(ScenarioError, match=r"all [0-9]+ runs failed(.|\n)*with .*no request arrives")
    with executor_named("serial") as executor, failed:
        sensitivity(late, executor, num_seeds=2, objectives=["ttft_s.p50"])


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, dict[str, float | None]]]:
    return measured()


def test_elasticities_obey_the_roofline(found: dict[str, dict[str, dict[str, Any]]]) -> None:
    means = {name: {key: each["mean"] for key, each in row.items()} for name, row in found.items()}
    compute, memory = means["gpu: FLOP/s"], means["gpu: HBM bandwidth"]
    # a time that is all FLOP and bytes is 1 % shorter where both rates are 1 % higher; launches are neither
    for latency in ("ttft_s.p50", "tpot_s.p50"):
        assert -1.02 < compute[latency] + memory[latency] < -0.8
    assert compute["ttft_s.p50"] < -0.8, "prompts are bound by compute"
    assert memory["tpot_s.p50"] < -0.6, "decodes read weights"
    assert 0.8 < means["workload: load"]["output_tokens_per_s"] < 1.1
    for idle in ("gpu: link bandwidth", "gpu: host link bandwidth", "gpu: KV capacity"):
        assert set(means[idle].values()) == {0.0}, idle
    assert {name: row["devices"] for name, row in means.items() if row["devices"]} == {
        "gpu: replicas": pytest.approx(1)
    }


def test_intervals_are_over_seeds_under_the_same_requests(found: dict[str, dict[str, dict[str, Any]]]) -> None:
    each = found["workload: load"]["output_tokens_per_s"]
    assert each["low"] < each["mean"] < each["high"]
    assert measured() == found


def test_links_matter_to_tensor_parallelism() -> None:
    found = measured(**{"clients.gpu.tp": 4, "clients.gpu.count": 1})
    assert found["gpu: link bandwidth"]["ttft_s.p50"]["mean"] < -0.05  # type: ignore[operator]


def test_what_can_not_move_is_told(tmp_path: Any) -> None:
    path = tmp_path / "one.yaml"
    path.write_text(to_yaml({**SCENARIO, "clients": {"gpu": {**SCENARIO["clients"]["gpu"], "batching": {
        "chunked": {"max_num_batched_tokens": 64, "max_num_seqs": 64}}}}}))  # fmt: skip
    arguments = ["sensitivity", str(path), "--seeds", "1", "--executor", "serial", "--objective", "ttft_s.p99"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert "max_num_seqs" in next(
        line for line in lines if line.startswith("No figures of gpu: max_num_batched_tokens")
    )
    cells = {row[0]: row[1:3] for line in lines if len(row := re.split("  +", line)) > 3}
    assert cells["parameter"] == ["from", "to"]
    assert cells["gpu: max_num_seqs"] == ["58", "70"]
    # devices, prices and the load move by factors of what they are
    factors = {name for name, moved in cells.items() if moved == ["x0.909", "x1.1"]}
    assert factors == {"workload: load", "prices", "gpu: FLOP/s", "gpu: HBM bandwidth", "gpu: link bandwidth",
                       "gpu: host link bandwidth"}  # fmt: skip
    document = json.loads(CliRunner().invoke(main, [*arguments, "--json"]).stdout)
    assert document["seeds"] == [5]
    with pytest.raises(ScenarioError, match=r"did you mean 'ttft_s\.p99'"), executor_named("serial") as executor:
        sensitivity(load(SCENARIO), executor, objectives=["ttft_s.p98"])


def test_hardware_that_moves_under_other_step_times_is_told() -> None:
    """The rows of devices are of the roofline, whatever prices the scenario's own steps."""
    scenario = load(SCENARIO, **{"workload.num_requests": 3, "clients.gpu.perf": ["kernels", "roofline"]})
    with executor_named("serial") as executor:
        document = sensitivity(scenario, executor, objectives=["ttft_s.p50"], num_seeds=1)
    (remark,) = document["remarks"]
    assert remark.startswith("FLOP/s, HBM bandwidth, ")
    assert "under the roofline" in remark


def test_prices_move_dollars_in_proportion_and_nothing_else() -> None:
    objectives = ("usd_per_hour", "output_tokens_per_usd", "usd_per_million_output_tokens", "ttft_s.p99", "mean_w")
    with executor_named("serial") as executor:
        document = sensitivity(load(SCENARIO), executor, objectives=objectives, num_seeds=2)
    (prices,) = (row for row in document["parameters"] if row["parameter"] == "prices")
    means = {name: each["mean"] for name, each in prices["elasticities"].items()}
    assert means == {
        "usd_per_hour": pytest.approx(1),
        "output_tokens_per_usd": pytest.approx(-1),
        "usd_per_million_output_tokens": pytest.approx(1),
        "ttft_s.p99": 0.0,
        "mean_w": 0.0,
    }
