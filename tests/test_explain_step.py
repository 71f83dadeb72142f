"""`mist explain-step`: steps written as text, the table and the JSON of a step's operators, and errors with remedies.

Guards the command's contract: names and aliases, sums, units, exit codes. Never runs a simulation.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from mist.cli import main
from mist.errors import ScenarioError
from mist.request import Step
from mist.scenario import catalogue
from mist.scenario.explain import explain_step, parse_step


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["explain-step", *arguments])


def as_json(*arguments: str) -> Any:
    result = run(*arguments, "--perf", "roofline", "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize(
    ("text", "step"),
    [
        ("2048", Step(0, 0, [(2048, 0)], 2048, 1)),
        ("512@1024", Step(0, 0, [(512, 1024)], 512, 1)),
        ("32x2048", Step(32, 65536, [], 0, 32)),
        ("512@0 + 64x2048", Step(64, 131072, [(512, 0)], 512, 65)),
        ("1x5+2x7+3+4@5", Step(3, 19, [(3, 0), (4, 5)], 7, 5)),
    ],
)
def test_steps_are_read(text: str, step: Step) -> None:
    assert parse_step(text) == step


@pytest.mark.parametrize("text", ["", "x", "512@", "32x", "-1", "1.5", "512@1x2", "0", "0x5", "5x0", "9" * 20, "５"])
def test_what_is_no_step_is_an_error(text: str) -> None:
    with pytest.raises(ScenarioError):
        parse_step(text)


def test_json_has_the_sums_in_ms() -> None:
    found = as_json("llama-3.1-70b", "h100-sxm", "--tp", "4", "--decode", "32x2048")
    assert found["total_ms"] == pytest.approx(18.4, rel=0.1)
    assert found["floor_ms"] < found["total_ms"]
    assert found["host_ms"] > 0
    assert sum(o["time_ms"] for o in found["operators"]) == pytest.approx(found["total_ms"], abs=2e-6)
    assert found["parallelism"] == {"tp": 4, "pp": 1, "ep": 1, "attn_dp": 1}
    assert found["origins"] == {"roofline": pytest.approx(1)}
    gate_up = next(o for o in found["operators"] if o["name"] == "gate_up")
    assert gate_up["count"] == 80
    assert gate_up["flop"] == 80 * 2 * 32 * 8192 * 2 * 28672 / 4
    assert gate_up["bound_by"] == "memory"
    assert 0 < gate_up["efficiency"] < 1
    assert found["remarks"] == []


def test_the_table_has_a_row_for_each_operator_and_their_sum() -> None:
    result = run("llama-3.1-8b", "h100", "--prefill", "512", "--decode", "8x100", "--perf", "roofline")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert "1 x h100-sxm" in lines[0]
    assert lines[2].split()[:3] == ["operator", "launches", "GFLOP"]
    assert lines[-1].split()[0] == "total"
    assert {"attention_prefill", "attention_decode", "lm_head"} <= {line.split()[0] for line in lines[3:]}


def test_every_model_and_alias_is_explained() -> None:
    for entry in catalogue.entries("models"):
        for name in (entry.name, *entry.aliases):
            found = explain_step(name, "h200", parse_step("64"), perf="roofline")
            assert found.deployment.model.name == entry.name
            assert found.total_ns >= found.floor_ns > 0


def test_every_device_is_explained() -> None:
    for entry in catalogue.entries("devices"):
        for name in (entry.name, *entry.aliases):
            assert explain_step("llama-3.1-8b", name, parse_step("1x100"), perf="roofline").total_ns > 0


def test_weights_are_in_the_dtype_of_the_checkpoint_unless_told(tmp_path: Path) -> None:
    config = {"name": "mine", "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 256,
              "num_attention_heads": 4, "intermediate_size": 512, "vocab_size": 1000, "max_position_embeddings": 4096,
              "quantization_config": {"quant_method": "fp8"}}  # fmt: skip
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    assert as_json(str(path), "h100-sxm", "--decode", "1x10")["weights_dtype"] == "fp8"
    told = as_json(str(path), "h100-sxm", "--decode", "1x10", "--weights-dtype", "bf16")
    assert told["weights_dtype"] == "bf16"
    assert told["kv_dtype"] == "bf16"


def test_experts_stages_and_attention_groups() -> None:
    arguments = ("deepseek-v3", "h200-sxm", "--attn-dp", "8", "--ep", "8", "--pp", "2", "--decode", "32x2048")
    found = as_json(*arguments, "--weights-dtype", "fp8", "--kv-dtype", "fp8")
    names = {o["name"] for o in found["operators"]}
    assert {"dispatch", "combine", "stage_message", "experts_gate_up", "q_absorb"} <= names
    bounds = {o["name"]: o["bound_by"] for o in found["operators"]}
    assert bounds["experts_gate_up"] == "memory"


def test_what_does_not_fit_is_explained_with_a_remark() -> None:
    result = run("llama-3.1-70b", "h100-sxm", "--decode", "1x10", "--perf", "roofline")
    assert result.exit_code == 0
    assert "does not fit" in result.stderr
    assert "GiB are missing" in as_json("llama-3.1-70b", "h100-sxm", "--decode", "1x10")["remarks"][0]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("llama-3.1-8", "h100-sxm", "--decode", "1x10"), "did you mean"),
        (("llama-3.1-8b", "h1000", "--decode", "1x10"), "h100"),
        (("llama-3.1-8b", "h100-sxm", "--decode", "1x10", "--engine", "vlm"), "vllm"),
        (("llama-3.1-8b", "h100-sxm", "--decode", "1*10"), "terms joined by +"),
        (("llama-3.1-8b", "h100-sxm", "--decode", "1x10", "--tp", "3"), "attention heads"),
        (("llama-3.1-8b", "h100-sxm", "--decode", "1x10", "--tp", "12"), "whole groups"),
        (("llama-3.1-8b", "h100-sxm", "--decode", "1x10", "--ep", "2"), "no experts"),
        (("llama-3.1-8b", "h100-sxm", "--decode", "1x10", "--weights-dtype", "fp9"), "fp8"),
        (("llama-3.1-8b", "h100-sxm", "--decode", "1x10", "--perf", "rooflin"), "roofline"),
        (("bge-m3", "l40s", "--decode", "1x10"), "encoder"),
        (("llama-3.1-8b", "h100-sxm"), "give a step"),
    ],
)
def test_errors_say_what_would_do(arguments: tuple[str, ...], says: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert says in result.output
    assert "Traceback" not in result.output


def test_all_unreadable_names_come_at_once() -> None:
    result = run("nomodel", "nodevice", "--decode", "1x10", "--engine", "noengine")
    assert result.exit_code == 2
    assert all(name in result.output for name in ("nomodel", "nodevice", "noengine"))


@pytest.mark.parametrize(
    ("option", "text"), [("--decode", "5"), ("--prefill", "8x512"), ("--prefill", "512@99999999999999")]
)
def test_each_option_takes_its_own_kind_of_work(option: str, text: str) -> None:
    result = CliRunner().invoke(main, ["explain-step", "llama-3.1-8b", "h100-sxm", option, text])
    assert result.exit_code == 2, result.output
    assert repr(text) in result.stderr


def test_a_step_that_memory_or_the_model_forbids_is_remarked() -> None:
    remarks = explain_step("llama-3.1-8b", "h100-sxm", parse_step("4000x128000")).remarks
    assert any("the KV cache holds" in remark for remark in remarks)
    remarks = explain_step("llama-2-7b", "h100-sxm", parse_step("5000")).remarks
    assert any("has a context of 4,096 tokens, not 5,000" in remark for remark in remarks)
