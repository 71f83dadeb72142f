"""Tenants: several workloads on one cluster, each with its pipeline, clients, SLOs and figures."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from mist.cli import main
from mist.coordinator import Coordinator
from mist.errors import InvariantError, ScenarioError
from mist.metrics.tenants import jain
from mist.records import FINISHED
from mist.scenario import Scenario, load
from mist.scenario.build import run
from mist.scenario.interference import interference
from mist.scenario.result import Result
from mist.scenario.tables import build_tables
from mist.testing.cluster import record_bytes

GPU: dict[str, Any] = {"device": "h100-sxm", "model": "llama-3.1-8b", "engine": "vllm-0.10", "perf": "roofline"}
CHAT: dict[str, Any] = {
    "workload": {
        "arrivals": {"poisson": {"rate_per_s": 8}}, "num_requests": 60,
        "input_tokens": {"lognormal": {"mean": 900, "cv": 1}}, "output_tokens": {"uniform": {"low": 1, "high": 80}},
    },
    "slo": {"ttft_s": {"p99": 0.5}},
}  # fmt: skip
BATCH: dict[str, Any] = {
    "workload": {"concurrency": 12, "num_requests": 40, "input_tokens": 4000, "output_tokens": 60},
    "priority": 3,
}
AGENTS: dict[str, Any] = {
    "workload": {
        "sessions": {"num_sessions": 8, "turns": 4, "think_ms": 200, "system_tokens": 512, "hash_block_size": 32},
        "arrivals": {"poisson": {"rate_per_s": 4}}, "input_tokens": 300, "output_tokens": 50,
    },
}  # fmt: skip


def scenario(**sections: Any) -> dict[str, Any]:
    whole = {"seed": 5, "tenants": {"chat": CHAT, "batch": BATCH, "agents": AGENTS}, "clients": {"gpu": GPU}}
    return copy.deepcopy({**whole, **sections})


def of(result: Result, tenant: str) -> dict[str, np.ndarray[Any, Any]]:
    rows = result.requests
    return {name: column[rows["tenant"] == tenant] for name, column in rows.items()}


def problems(mapping: dict[str, Any]) -> str:
    with pytest.raises(ScenarioError) as caught:
        load(mapping)
    return "\n".join(map(str, caught.value.problems))


# --- laws ---


def test_all_requests_of_all_tenants_are_served_and_counted() -> None:
    result = load(scenario()).run(check=True)
    tenants = result.metrics["tenants"]
    assert {name: each["requests"]["finished"] for name, each in tenants.items()} == {
        "chat": 60, "batch": 40, "agents": 32
    }  # fmt: skip
    assert result.metrics["requests"]["finished"] == 132
    for rate in ("requests_per_s", "total_tokens_per_s"):
        total = sum(each["throughput"][rate] for each in tenants.values())
        assert total == pytest.approx(result.metrics["throughput"][rate], rel=1e-12)
    assert not result.metrics["open_loop"]
    assert tenants["chat"]["offered"] is not None
    assert tenants["batch"]["offered"] is tenants["agents"]["offered"] is None


def test_a_tenants_figures_are_those_of_its_own_requests() -> None:
    result = load(scenario()).run()
    for name, figures in result.metrics["tenants"].items():
        mine = of(result, name)
        for metric in ("ttft_s", "tpot_s", "e2e_s"):
            known = mine[metric][~np.isnan(mine[metric])]
            assert figures[metric]["p50"] == pytest.approx(np.percentile(known, 50), rel=1e-9)
        spent = sum(figures["stages"][kind][part]["mean"] for kind in figures["stages"] for part in
                    ("wait_s", "serve_s", "transfer_s"))  # fmt: skip
        assert spent == pytest.approx(figures["e2e_s"]["mean"], rel=1e-9)


def test_tenants_with_clients_of_their_own_are_as_if_alone() -> None:
    mapping = scenario(clients={name: {**GPU, "count": 2} for name in ("a", "b", "c")})
    for pool, tenant in zip("abc", mapping["tenants"].values(), strict=True):
        tenant["clients"] = [pool]
    made = load(mapping)
    together = run(made, check=True)
    for name in made.tenants:
        alone, shared = run(made, check=True, only=name).requests, of(together, name)
        assert len(alone["request"]) == len(shared["request"])
        for column in ("request", "ttft_s", "tpot_s", "e2e_s", "output_tokens", "cached_tokens"):
            np.testing.assert_array_equal(alone[column], shared[column])


def test_one_tenant_is_the_workload_itself(tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_text("at_s,prompt,answer\n0,1000,50\n0.01,1500,60\n0.02,3000,7\n")
    workload = {"trace": str(tmp_path / "trace.csv"),
                "columns": {"arrival": "at_s", "input_tokens": "prompt", "output_tokens": "answer",
                            "time_unit": "s"}}  # fmt: skip
    named = load({"tenants": {"only": {"workload": workload}}, "clients": {"gpu": GPU}}).run(check=True)
    plain = load({"workload": workload, "clients": {"gpu": GPU}}).run(check=True)
    assert record_bytes(named.records) == record_bytes(plain.records)
    assert named.metrics["tenants"]["only"]["ttft_s"] == plain.metrics["ttft_s"]
    assert plain.metrics["tenants"] == {}
    assert plain.metrics["fairness"] is None


def test_what_a_tenant_draws_does_not_depend_on_the_others() -> None:
    every, fewer = scenario(), scenario()
    del fewer["tenants"]["batch"]
    both, one = build_tables(load(every)), build_tables(load(fewer))
    for name in one:
        for column in ("arrival_ns", "input_tokens", "output_tokens"):
            np.testing.assert_array_equal(getattr(both[name], column), getattr(one[name], column))


def test_tenants_never_find_each_others_prefixes() -> None:
    same = {"workload": {**AGENTS["workload"], "arrivals": "all_at_once"}}
    made = load(scenario(tenants={"one": same, "two": same}))
    tables = build_tables(made)
    keys = [{key for each in table.block_keys or () for key in each} for table in tables.values()]
    assert all(keys)
    assert not keys[0] & keys[1]
    one, two = tables.values()
    assert one.sessions is not None
    sessions = made.run(check=True)
    assert sessions.metrics["requests"]["finished"] == len(one) + len(two)


def test_prefixes_are_told_apart_by_the_least_common_number_of_tokens() -> None:
    finer, coarser = copy.deepcopy(AGENTS), copy.deepcopy(AGENTS)
    coarser["workload"]["sessions"]["hash_block_size"] = 48
    made = load(scenario(tenants={"finer": finer, "coarser": coarser}))
    tables = build_tables(made)
    assert {table.hash_block_size for table in tables.values()} == {96}
    for name, size in (("finer", 32), ("coarser", 48)):
        alone = build_tables(load(scenario(tenants={name: {"finer": finer, "coarser": coarser}[name]})))[name]
        assert alone.hash_block_size == size
        assert alone.block_keys is not None
        assert tables[name].block_keys is not None
        for whole, units in zip(alone.block_keys, tables[name].block_keys or (), strict=True):
            assert len(units) == len(whole) * size // 96
        # two prompts have as many units in common as they have whole ones of the finer kind
        first, second = alone.block_keys[0], alone.block_keys[-1]
        shared = sum(a == b for a, b in zip(first, second, strict=False))
        keys = tables[name].block_keys or []
        assert sum(a == b for a, b in zip(keys[0], keys[-1], strict=False)) == shared * size // 96
    notes = made.run(check=True).metrics["notes"]
    assert any("told apart by 96 tokens" in note for note in notes)


def test_routes_of_tenants_keep_to_their_clients() -> None:
    mapping = scenario(clients={"own": GPU, "shared": {**GPU, "count": 2}}, routing="round_robin")
    mapping["tenants"]["chat"]["clients"] = ["own"]
    mapping["tenants"]["batch"]["clients"] = ["shared"]
    result = load(mapping).run(check=True)
    requests, tasks = result.requests, result.tasks
    whose = dict(zip(requests["request"].tolist(), requests["tenant"].tolist(), strict=True))
    used: dict[str, set[str]] = {}
    for request, client in zip(tasks["request"].tolist(), tasks["client"].tolist(), strict=True):
        used.setdefault(whose[request], set()).add(client)
    assert used == {"chat": {"own"}, "batch": {"shared-0", "shared-1"}, "agents": {"own", "shared-0", "shared-1"}}


def test_a_task_on_a_client_that_is_not_its_tenants_breaks_a_law(monkeypatch: pytest.MonkeyPatch) -> None:
    mapping = scenario(clients={"own": GPU, "shared": GPU})
    mapping["tenants"]["chat"]["clients"] = ["own"]
    choose = Coordinator._choose

    def astray(self: Coordinator, task: Any, now: int) -> Any:
        return self.clients[1] if task.request.tenant == 0 else choose(self, task, now)

    monkeypatch.setattr(Coordinator, "_choose", astray)
    with pytest.raises(InvariantError, match="aren't its own"):
        load(mapping).run(check=True)


def test_two_runs_give_equal_bytes_and_the_resolved_scenario_is_the_same() -> None:
    made = load(scenario())
    again = load(json.loads(json.dumps(made.resolved())))
    assert again == made
    assert record_bytes(again.run().records) == record_bytes(made.run().records)


def test_a_cut_run_counts_who_is_left() -> None:
    result = load(scenario(max_time_s=2.0)).run(check=True)
    tenants = result.metrics["tenants"]
    assert sum(each["requests"]["unfinished"] for each in tenants.values()) > 0
    assert sum(each["requests"]["arrived"] for each in tenants.values()) == result.metrics["requests"]["arrived"]


# --- pipelines, memories and models of their own ---


def test_tenants_have_pipelines_and_models_of_their_own() -> None:
    mapping = scenario(
        tenants={
            "chat": {**CHAT, "clients": ["small"]},
            "routed": {**CHAT, "pipeline": {"model_router": {"probability": {"small": 0.5},
                                                               "quality": {"small": 0.5, "large": 0.9}}}},
        },
        clients={"small": {**GPU, "serves": ["prefill", "decode", "small"]}, "large": {**GPU, "serves": ["large"]}},
    )  # fmt: skip
    result = load(mapping).run(check=True)
    chat, routed = result.metrics["tenants"].values()
    assert list(chat["stages"]) == ["prefill", "decode"]
    assert list(routed["stages"]) == ["small", "large"]
    assert chat["quality"] is None
    assert 0.5 < routed["quality"]["mean"] < 0.9
    assert result.metrics["quality"] is None


def test_a_kv_store_is_of_the_tenants_that_ask_it() -> None:
    mapping = scenario(
        tenants={
            "reuse": {"workload": {**CHAT["workload"], "cached_tokens": 200}, "pipeline": {"kv_reuse": {}},
                      "clients": ["gpu", "store"]},
            "other": {**CHAT, "clients": ["big"]},
        },
        clients={"gpu": GPU, "big": {**GPU, "model": "qwen3-14b"},
                 "store": {"memory": "ddr5", "serves": ["kv_retrieve"]}},
    )  # fmt: skip
    made = load(mapping)
    assert list(made.users_of("store")) == ["gpu"]
    assert made.run(check=True).metrics["requests"]["finished"] == 120
    mapping["tenants"]["other"]["pipeline"] = {"kv_reuse": {}}
    del mapping["tenants"]["other"]["clients"], mapping["tenants"]["reuse"]["clients"]
    assert "a KV store is of one model" in problems(mapping)


def test_one_of_several_models_by_chance_is_remarked_upon() -> None:
    mapping = scenario(clients={"small": GPU, "large": {**GPU, "model": "qwen3-14b"}})
    notes = load(mapping).run().metrics["notes"]
    assert any(note.startswith("chat: prefill goes to one of several models") for note in notes)


# --- fairness, levels, interference ---


def test_jains_index() -> None:
    assert jain([3.0, 3.0, 3.0]) == pytest.approx(1)
    assert jain([1.0, 0.0, 0.0, 0.0]) == pytest.approx(1 / 4)
    assert jain([1.0, 2.0]) == pytest.approx(9 / 10)
    assert jain([1.0, None, 2.0]) == pytest.approx(9 / 10)
    assert jain([]) is jain([None]) is jain([0.0]) is None


def test_levels_of_all_tenants_are_told_together() -> None:
    mapping = scenario()
    mapping["tenants"]["batch"]["slo"] = {"e2e_s": {"p50": 0.001}}
    metrics = load(mapping).run().metrics
    slo, tenants = metrics["slo"], metrics["tenants"]
    assert [(each["tenant"], each["metric"]) for each in slo["targets"]] == [("chat", "ttft_s"), ("batch", "e2e_s")]
    assert slo["met"] is False
    assert tenants["agents"]["slo"] is None
    met = [tenants[name]["slo"]["attainment"] * n for name, n in (("chat", 60), ("batch", 40))]
    assert slo["attainment"] == pytest.approx(sum(met) / 100)
    attained = [tenants[name]["slo"]["attainment"] for name in ("chat", "batch")]
    assert metrics["fairness"]["slo_attainment"] == pytest.approx(jain(attained))


def test_the_scenarios_slo_is_that_of_tenants_without_one() -> None:
    made = load(scenario(slo={"tpot_s": {"p50": 0.05}}))
    assert made.tenants["batch"].slo.tpot_s == made.tenants["agents"].slo.tpot_s == {"p50": 0.05}
    assert made.tenants["chat"].slo.tpot_s == {}


def test_interference_compares_the_same_requests() -> None:
    made = load(scenario())
    found = interference(made, check=True)
    document = found.as_json()
    for name, tenant in document["tenants"].items():
        assert tenant["num_compared"] == tenant["alone"]["requests"]["finished"] > 0
        alone, together = of(found.alone[name], name), of(found.together, name)
        np.testing.assert_array_equal(alone["output_tokens"], together["output_tokens"])
        ratios = together["e2e_s"] / alone["e2e_s"]
        assert tenant["slowdown"]["mean"] == pytest.approx(ratios.mean(), rel=1e-6)
        assert tenant["slowdown"]["mean"] > 1
        assert len(of(found.alone[name], name)["request"]) == len(found.alone[name].requests["request"])
    assert 0 < document["jain_speed"] <= 1
    with pytest.raises(ScenarioError, match="no tenants"):
        interference(load({"workload": CHAT["workload"], "clients": {"gpu": GPU}}))


# --- what a user writes ---


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"workload": CHAT["workload"]}, "workload and tenants are both given"),
        ({"tenants": {}}, "tenants: must be a list or mapping with something in it"),
        ({"tenants": None}, "the key 'workload' is missing"),
        ({"tenants": {"a b": CHAT}}, "can't name a tenant"),
        ({"tenants": {"chat": {**CHAT, "clients": ["gpus"]}}}, "tenants.chat.clients.0: there is no client 'gpus'"),
        ({"tenants": {"chat": {**CHAT, "clients": []}}}, "must be a list or mapping with something in it"),
        ({"tenants": {"chat": {"slo": {}}}}, "tenants.chat.workload: the key 'workload' is missing"),
        ({"tenants": {"chat": {**CHAT, "pipeline": ["embed"]}}}, "no client serves the stage 'embed'"),
        ({"routing": {"embed": "round_robin"}}, "no pipeline has a stage 'embed'"),
        ({"tenants": {"chat": {**CHAT, "priority": "high"}}}, "must be a whole number"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_told(change: dict[str, Any], told: str) -> None:
    mapping = scenario(**change)
    assert told in problems({key: value for key, value in mapping.items() if value is not None})


def test_a_stage_that_none_of_its_clients_serves_is_told() -> None:
    mapping = scenario(clients={"gpu": GPU, "encoder": {"device": "l4", "model": "bge-m3", "serves": ["embed"]}})
    mapping["tenants"]["chat"] |= {"clients": ["gpu"], "pipeline": ["embed", "prefill", "decode"]}
    assert "tenants.chat.pipeline: none of its clients serves the stage 'embed'" in problems(mapping)


def test_options_are_of_every_tenant(tmp_path: Path) -> None:
    path = tmp_path / "scenario.yaml"
    path.write_text(json.dumps(scenario()))
    ran = CliRunner().invoke(main, ["run", str(path), "--limit", "7", "--json"])
    tenants = json.loads(ran.stdout)["tenants"]
    assert {name: each["requests"]["arrived"] for name, each in tenants.items()} == dict.fromkeys(tenants, 7)
    compared = CliRunner().invoke(main, ["interference", str(path), "--limit", "9", "--json"])
    assert list(json.loads(compared.stdout)["tenants"]) == ["chat", "batch", "agents"]
    table = CliRunner().invoke(main, ["interference", str(path), "--limit", "9"]).stdout
    assert "chat" in table
    assert "Jain's fairness index" in table


def test_the_printed_form_has_a_line_for_each_tenant() -> None:
    made: Scenario = load(scenario())
    text = str(made.run())
    for name in made.tenants:
        assert any(line.startswith(name) and "of" in line for line in text.splitlines())
    assert "chat: TTFT P99" in text
    assert (made.run().records.requests.as_columns()["status"] == FINISHED).all()


def test_lost_requests_count_in_the_verdict() -> None:
    mapping = scenario()
    mapping["tenants"]["chat"]["workload"]["timeout_s"] = 0.4
    slo = load(mapping).run(check=True).metrics["tenants"]["chat"]["slo"]
    (target,) = slo["targets"]
    assert target["num_lost"] > 0
    assert target["actual_s"] is None or target["actual_s"] <= target["target_s"]
    assert target["met"] is False


def test_saturation_is_judged_by_the_tenants_whose_load_does_not_wait() -> None:
    mapping = scenario()
    mapping["tenants"]["chat"]["workload"] |= {"arrivals": {"poisson": {"rate_per_s": 60}}, "num_requests": 600}
    mapping["clients"]["gpu"]["batching"] = {"chunked": {"max_num_seqs": 8, "max_num_batched_tokens": 512}}
    metrics = load(mapping).run().metrics
    assert metrics["saturated"]
    assert any("judged by the tenants whose load doesn't wait for the system: chat" in n for n in metrics["notes"])


def test_an_interference_measures_the_same_window() -> None:
    made = load(scenario(warmup_s=1.0))
    together = run(made)
    for name in made.tenants:
        alone = run(made, only=name)
        assert alone.metrics["window"]["start_s"] == together.metrics["window"]["start_s"]
        assert len(alone.metrics["tenants"]) == 1


def test_priorities_that_nobody_goes_by_are_remarked_upon() -> None:
    assert any("Priorities of tenants change nothing" in note for note in load(scenario()).run().metrics["notes"])
    ordered = scenario(clients={"gpu": {**GPU, "batching": {"chunked": {"order": "priority"}}}})
    assert not any("Priorities of tenants" in note for note in load(ordered).run().metrics["notes"])


def test_a_link_that_is_cut_for_good_leaves_requests_unfinished() -> None:
    pools = {"first": {**GPU, "serves": ["prefill"]}, "then": {**GPU, "serves": ["decode"]}}
    made = load(
        {
            "workload": CHAT["workload"],
            "clients": pools,
            "network": {"kv_transfer": {"bandwidth": "10 GB/s"}},
            "events": [{"at_s": 2, "link": "first.out", "factor": 0}],
        }
    )
    metrics = made.run(check=True).metrics
    assert metrics["requests"]["unfinished"] > 0
    assert any("cut for good" in note for note in metrics["notes"])
