"""What a scenario may say: validation with places and remedies, cross-checks, defaults and round trips."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from mist import registry
from mist.errors import ScenarioError
from mist.scenario import Scenario, load
from mist.scenario.named import parameters
from mist.scenario.schema import json_schema
from scenarios import LARGE, SMALL, TRACED, places, problems, read

# what a valid scenario becomes


def test_defaults_are_filled_in(folder: Path) -> None:
    scenario = read(folder, SMALL)
    client = scenario.clients["gpu"]
    assert scenario.stages == ("prefill", "decode")
    assert {stage: spec.name for stage, spec in scenario.routing.items()} == dict.fromkeys(
        ("prefill", "decode"), "least_outstanding"
    )
    assert client.model.name == "meta-llama/Llama-3.1-8B"
    assert client.max_model_len == client.model.max_context
    assert client.kv_dtype == "bf16"
    assert client.batching.name == client.engine.batching
    assert client.kv_cache.block_size == client.engine.block_size
    assert [spec.name for spec in client.perf] == ["kernels", "roofline"]
    assert client.kv_capacity().num_tokens > 100_000


def test_short_and_long_forms_mean_the_same(folder: Path) -> None:
    short = read(folder, SMALL + "routing: round_robin\nperf: roofline\n")
    long = read(
        folder,
        SMALL.replace("lengths:", "rate_scale: 1\n  lengths:")
        + "pipeline: {stages: {kinds: [prefill, decode]}}\nperf: [{roofline: {}}]\n"
        + "routing: {prefill: {round_robin: }, decode: round_robin}\n",
    )
    assert short == long
    loop = "{closed_loop: {concurrency: 16}}"
    whole = read(folder, LARGE).tenants[""].workload
    process = read(folder, LARGE.replace("concurrency: 16", f"arrivals: {loop}")).tenants[""].workload.arrival_process
    assert whole.arrival_process.build() == process.build()  # type: ignore[union-attr]
    fixed = read(folder, LARGE.replace("output_tokens: 128", "output_tokens: {fixed: 128}"))
    assert whole.output_tokens == fixed.tenants[""].workload.output_tokens


def test_engine_limits_hold_for_its_own_policy_only(folder: Path) -> None:
    engine = "kv_cache: {num_blocks: 10}, engine: {name: e, max_num_seqs: 100, max_num_batched_tokens: 1000}"
    base = SMALL.replace("model: llama", f"{engine}, BATCHING model: llama")

    def limits(batching: str) -> tuple[int, int]:
        params = read(folder, base.replace("BATCHING", batching)).clients["gpu"].batching.params
        return params["max_num_seqs"], params["max_num_batched_tokens"]

    assert limits("") == (100, 1000)
    assert limits("batching: chunked,") == (100, 1000)
    assert limits("batching: {chunked: {max_num_seqs: 7}},") == (7, 1000)
    assert limits("batching: {chunked: {max_num_batched_tokens: 64}},") == (64, 64)
    static = parameters("batching", "static")()
    assert limits("batching: static,") == (static.max_num_seqs, static.max_num_batched_tokens)  # type: ignore[attr-defined]


def test_window_forms(folder: Path) -> None:
    for written, meant in (("10:60", (10, 60)), ("[10, 60]", (10, 60)), ("45", (5, 50)), ("null", None)):
        assert read(folder, LARGE.replace("window_s: 10:60", f"window_s: {written}")).window_s == meant


def test_a_spec_builds_fresh_instances(folder: Path) -> None:
    spec = read(folder, SMALL + "routing: round_robin\n").routing["prefill"]
    assert spec.build() is not spec.build()


@pytest.mark.parametrize("text", [SMALL, LARGE, TRACED], ids=["small", "large", "traced"])
def test_resolved_scenarios_read_back_anywhere(folder: Path, text: str) -> None:
    scenario = read(folder, text)
    other = folder / "out" / "deep"
    other.mkdir(parents=True)
    path = other / "scenario.yaml"
    path.write_text(scenario.to_yaml())
    again = load(path)
    assert again == scenario
    assert again.to_yaml() == scenario.to_yaml()
    assert yaml.safe_load(scenario.to_yaml()) == json.loads(json.dumps(scenario.resolved()))
    assert Scenario.from_mapping(scenario.resolved()) == scenario


def test_resolved_text_stays_text(folder: Path) -> None:
    scenario = read(folder, SMALL.replace("name: small", "name: '1e9'"))
    (folder / "again.yaml").write_text(scenario.to_yaml())
    assert load(folder / "again.yaml").name == "1e9"


def test_names_come_from_the_file_where_there_is_none(folder: Path) -> None:
    assert read(folder, TRACED).name == "case"


def test_from_python() -> None:
    sections = yaml.safe_load(SMALL)
    scenario = Scenario(**sections)
    assert scenario == load(sections) == Scenario.from_mapping(sections)
    changed = load(scenario, **{"clients.gpu.tp": 2, "seed": 9})
    assert (changed.clients["gpu"].tp, changed.seed, scenario.clients["gpu"].tp) == (2, 9, 1)
    assert changed != scenario
    with pytest.raises(ScenarioError, match=r"clients\.gpu\.tp=0"):
        load(scenario, **{"clients.gpu.tp": 0})


# what is wrong is told, all of it, where it is, with a remedy


def test_all_problems_at_once_at_their_places(folder: Path) -> None:
    text = """\
sede: 1
workload:
  arrivals: {poisson: {rate_per_s: -4}}
  num_requests: 1.5
  lengths: azure-conversatoin
  input_tokens: {lognorml: {mean: 3}}
clients:
  gpu:
    device: h100-smx
    model: llama-3.1-8b
    tp: two
    batching: {chunked: {max_num_seq: 3}}
  cpu: {device: {name: x, peak_tflops: {bf16: 3}, memory_bytes: 3 PB, memory_bytes_per_s: 1 TB/s}, model: phi-4}
routing: {prefill: round_robbin}
slo: {ttft_s: {p999: 1}}
window_s: 30:10
"""
    found = problems(folder, text)
    assert places(found) == [
        (1, 1), (3, 36), (4, 17), (5, 12), (6, 18), (9, 13), (11, 9), (12, 26), (13, 65), (14, 20), (15, 16), (16, 11),
    ]  # fmt: skip
    hints = "\n".join(p.hint for p in found)
    for nearest in ("'seed'", "'lognormal'", "'h100-sxm'", "'max_num_seqs'", "'round_robin'"):
        assert nearest in hints
    assert all(p.file == str(folder / "case.yaml") and p.hint for p in found)


def test_problems_do_not_hide_one_another(folder: Path) -> None:
    text = """\
workload:
  trace: nope.csv
  arrivals: all_at_once
  lengths: azure-convrsation
  bogus: 3
clients:
  g:
    device: h1000
    model: llama-3.1-8b
    tp: -1
    batching: {chunked: {max_num_seqs: -4, foo: 2}}
  h: {device: h100-sxm, model: llama-3.1-8b, tp: 3, bar: 1}
slo: {ttft_s: {p101: 1}}
"""
    found = problems(folder, text)
    assert places(found) == [
        (2, 10), (4, 12), (4, 12), (5, 3), (8, 13), (10, 9), (11, 40), (11, 44), (12, 50), (12, 53), (13, 16),
    ]  # fmt: skip


def test_an_unread_parameter_raises_no_doubt_of_the_others(folder: Path) -> None:
    found = problems(folder, SMALL.replace("gpu: {", "gpu: {batching: {chunked: {max_num_seqs: 4096, foo: 1}}, "))
    assert [p.message.rpartition(": ")[2] for p in found] == ["there is no key 'foo' here"]


def test_degrees_that_would_do_are_named(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"num_attention_heads": 28, "num_key_value_heads": 4}
    config |= {"hidden_size": 3584, "intermediate_size": 18944}
    (folder / "config.json").write_text(json.dumps(config))
    text = SMALL.replace("model: llama-3.1-8b", "model: ./config.json, tp: 8")
    (found,) = problems(folder, text)
    assert "28 attention heads" in found.message
    assert "a tp of 1, 2, 4" in found.hint
    for tp in (1, 2, 4):
        read(folder, text, f"clients.gpu.tp={tp}")
    (found,) = problems(folder, SMALL.replace("llama-3.1-8b", "llama-3.1-70b"))
    assert "tp: 2 would do" in found.hint
    read(folder, SMALL.replace("llama-3.1-8b", "llama-3.1-70b, tp: 2"))


@pytest.mark.parametrize(
    ("model", "dtype"),
    [
        ("Qwen/Qwen3-32B", "bf16"),
        ("Qwen/Qwen3-32B-FP8", "fp8"),
        ("qwen/qwen3-32b-awq", "int4"),
        ("openai/gpt-oss-20b", "mxfp4"),
        ("RedHatAI/Meta-Llama-3.1-8B-Instruct-quantized.w8a8", "int8"),
    ],
)
def test_weights_have_the_checkpoints_dtype(folder: Path, model: str, dtype: str) -> None:
    text = SMALL.replace("h100-sxm", "h200-sxm").replace("llama-3.1-8b", model)
    scenario = read(folder, text)
    client = scenario.clients["gpu"]
    assert (client.weights_dtype, client.kv_dtype) == (dtype, "bf16")
    assert scenario.resolved()["clients"]["gpu"]["weights_dtype"] == dtype
    assert read(folder, scenario.to_yaml()).clients["gpu"].weights_dtype == dtype
    assert read(folder, text, "clients.gpu.weights_dtype=bf16").clients["gpu"].weights_dtype == "bf16"


def test_a_configs_quantisation_is_the_dtype_of_its_weights(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    for quantisation, dtype in (({"quant_method": "fp8"}, "fp8"), ({"load_in_4bit": True}, "int4")):
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantisation}))
        assert read(folder, TRACED).clients["a100"].weights_dtype == dtype


CLIENT = "  gpu: {device: h100-sxm, model: llama-3.1-8b}"


@pytest.mark.parametrize(
    ("old", "new", "place", "says"),
    [
        ("num_requests: 100", "limit: 5", (3, 1), "num_requests is missing"),
        ("  arrivals: {poisson: {rate_per_s: 4}}\n", "", (3, 1), "arrivals are missing"),
        ("  lengths: azure-conversation\n", "  input_tokens: 5\n", (3, 1), "output_tokens is missing"),
        ("lengths: azure-conversation", "lengths: azure-conv", (6, 12), "no workload 'azure-conv'"),
        ("num_requests: 100", "num_requests: 100\n  concurrency: 4", (6, 16), "arrivals and concurrency"),
        ("num_requests: 100", "num_requests: 100\n  columns: {arrival: at_s}", (6, 3), "for a trace"),
        ("num_requests: 100", "trace: none.csv", (6, 12), "brings its own lengths"),
        ("rate_per_s: 4", "rate_per_s: 0", (4, 36), "rate_per_s"),
        ("device: h100-sxm", "device: ./nothing.yaml", (8, 17), "no device file"),
        ("device: h100-sxm", "device: 7", (8, 17), "must be a name"),
        ("model: llama-3.1-8b", "model: case.yaml", (1, 1), "is missing"),
        ("model: llama-3.1-8b", "model: llama-3.1-70b", (8, 17), "does not fit on 1 x h100-sxm"),
        ("model: llama-3.1-8b", "model: llama-3.1-8b, tp: 3", (8, 52), "32 attention heads"),
        ("model: llama-3.1-8b", "model: llama-3.1-8b, pp: 33", (8, 52), "32 layers"),
        ("model: llama-3.1-8b", "model: ./mamba.json", (1, 16), "'mamba' is not supported"),
        ("model: llama-3.1-8b", "model: ./cut.json", (3, 16), "not valid JSON"),
        ("model: llama-3.1-8b", "model: llama-3.1-8b, weights_dtype: fp9", (8, 63), "no dtype 'fp9'"),
        ("model: llama-3.1-8b", "model: llama-3.1-8b, serves: [prefill, decod]", (8, 66), "no stage 'decod'"),
        ("model: llama-3.1-8b", "model: llama-3.1-8b, serves: []", (8, 48), "something in it"),
        ("model: llama-3.1-8b", "model: llama-3.1-8b, max_model_len: 1e6", (8, 63), "131,072"),
        ("model: llama-3.1-8b", "model: llama-3.1-8b, kv_cache: {capacity_tokens: 3}", (8, 76), "one block"),
        ("model: llama-3.1-8b", "model: llama-3.1-8b, engine: vlm", (8, 56), "no engine 'vlm'"),
        (
            "model: llama-3.1-8b",
            "model: llama-3.1-8b, batching: {chunked: {max_num_batched_tokens: 8, max_num_seqs: 16}}",
            (8, 93),
            "max_num_batched_tokens 8 is below max_num_seqs 16",
        ),
        (
            "model: llama-3.1-8b",
            "model: llama-3.1-8b, batching: {chunked: {max_num_seqs: 1e8}}",
            (8, 83),
            "no step holds",
        ),
        ("  gpu:", "  'g p':", (8, 3), "can't name a client"),
        (CLIENT, "  gpu:", (8, 3), "must be a mapping"),
        ("seed: 3", "pipeline: [prefill, embed, decode]", (2, 1), "no client serves the stage 'embed'"),
        ("seed: 3", "pipeline: [decode]", (2, 1), "needs a prefill"),
        ("seed: 3", "pipeline: rag", (2, 11), "no pipeline 'rag'"),
        ("seed: 3", "pipeline: []", (2, 1), "at least one stage"),
        ("seed: 3", "pipeline: [decode, prefill]", (2, 1), "needs a prefill before it"),
        ("seed: 3", "pipeline: [prefill, decode, prefill, decode]", (2, 1), "keep one"),
        ("seed: 3", "window_s: [1" + 400 * "0" + ", 3]", (2, 1), "not a window of time"),
        ("rate_per_s: 4", "rate_per_s: 1e-9", (4, 36), "take more than"),
        ("poisson: {rate_per_s: 4}", "gamma: {rate_per_s: 4, cv: 1e300}", (4, 41), "cv is 1e+300"),
        ("lengths:", "input_tokens: {uniform: {low: 1, high: 9223372036854775808}}\n  lengths:", (6, 42), "high is"),
        ("lengths:", "input_tokens: 5\n  output_tokens: 6\n  lengths:", (8, 12), "are all given"),
        ("{poisson: {rate_per_s: 4}}", "[]", (4, 3), "must be an arrival process"),
        ("seed: 3", "routing: {prefil: round_robin}", (2, 19), "no stage 'prefil'"),
        ("seed: 3", "seed: true", (2, 7), "whole number, not true"),
        ("seed: 3", "warmup_s: 10\nwindow_s: 5:20", (3, 11), "ends after the window begins"),
        ("seed: 3", "perf: []", (2, 1), "something in it"),
        ("seed: 3", "network: {preset: h100}", (2, 19), "no network 'h100' in the catalogue"),
        ("seed: 3", "network: {kv_transfer: {}}", (2, 11), "bandwidth' is missing"),
        ("seed: 3", "network: {kv_transfer: {bandwidth: 50}}", (2, 36), "must be text, not 50"),
        ("seed: 3", "network: {kv_transfer: {bandwidth: 50 GB}}", (2, 36), "not a number with a unit"),
        ("seed: 3", "network: {kv_transfer: {bandwidth: 0 GB/s}}", (2, 36), "out of range"),
        ("seed: 3", "network: {kv_transfer: {bandwidth: 1 GB/s, latency: 1}}", (2, 53), "must be text, not 1"),
        ("seed: 3", "network: {kv_transfer: {bandwidth: 1 GB/s, efficiency: 2}}", (2, 56), "at most 1"),
        ("lengths:", "cached_tokens: -1\n  lengths:", (6, 18), "at least 1"),
    ],
)
def test_each_mistake_is_told(folder: Path, old: str, new: str, place: tuple[int, int], says: str) -> None:
    assert old in SMALL
    found = problems(folder, SMALL.replace(old, new))
    matching = [p for p in found if says in p.message]
    assert matching, "\n".join(map(str, found))
    assert (matching[0].line, matching[0].column) == place, str(matching[0])
    assert matching[0].hint


def test_mistakes_in_own_files_are_placed_there(folder: Path) -> None:
    (folder / "card.yaml").write_text("name: card\npeak_tflops: {bf16: 400}\nmemory_byte: 3\nmemory_bytes_per_s: x\n")
    found = problems(folder, SMALL.replace("h100-sxm", "card.yaml").replace("seed: 3", "seed: x"))
    assert ("case.yaml", 2, 7) in {(Path(p.file).name, p.line, p.column) for p in found}
    assert {("card.yaml", 3, 14), ("card.yaml", 4, 21)} <= {(Path(p.file).name, p.line, p.column) for p in found}
    (folder / "config.json").write_text('{"hidden_size": 512,\n "hybrid_override_pattern": "M*"}')
    found = problems(folder, TRACED)
    assert [(Path(p.file).name, p.line) for p in found] == [("config.json", 2)]


def test_a_missing_trace_says_where_copies_are(folder: Path) -> None:
    (folder / "trace.csv").unlink()
    (found,) = problems(folder, TRACED)
    assert (found.line, found.column) == (2, 10)
    assert "AzurePublicDataset" in found.hint


def test_mistakes_in_sets_are_placed_at_them(folder: Path) -> None:
    found = problems(folder, SMALL, "clients.gpu.tp=0", "seed=x", "clients.gpu.tpp=1")
    assert [p.file for p in found] == ["--set clients.gpu.tp=0", "--set clients.gpu.tpp=1", "--set seed=x"]


def test_a_plugin_is_validated_by_its_fields(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.names("routing")
    monkeypatch.setitem(registry._registered, "routing", dict(registry._registered["routing"]))
    (folder / "mine.py").write_text(
        "from dataclasses import dataclass, field\n"
        "from mist.registry import register\n"
        "@register('routing', 'mine_for_test')\n"
        "@dataclass\n"
        "class Mine:\n"
        "    spill: int\n"
        "    shares: tuple[float, ...] = (0.5, 0.5)\n"
        "    turn: int = field(default=0, init=False)\n"
        "    def __post_init__(self):\n"
        "        if self.spill < 1:\n"
        "            raise ValueError(f'spill is {self.spill}: give at least 1')\n"
        "    def choose(self, task, views, now):\n"
        "        return views[0]\n"
    )
    registry.load_plugin_file(folder / "mine.py")
    scenario = read(folder, SMALL + "routing: {mine_for_test: {spill: 3, shares: [1, 2]}}\n")
    assert scenario.routing["prefill"].build().shares == (1, 2)
    assert read(folder, SMALL + "routing: {mine_for_test: 4}\n").routing["prefill"].params["spill"] == 4
    assert places(problems(folder, SMALL + "routing: {mine_for_test: {spill: 0}}\n")) == [(9, 34)]
    assert places(problems(folder, SMALL + "routing: {mine_for_test: {spill: 1, turn: 2}}\n")) == [(9, 37)]
    assert places(problems(folder, SMALL + "routing: mine_for_test\n")) == [(9, 10)]
    assert "mine_for_test" in json.dumps(json_schema())


def test_a_search_space_is_told_to_be_one() -> None:
    with pytest.raises(ScenarioError) as error:
        load({"scenario": "chat.yaml", "space": {"clients.gpu.tp": [1, 2]}, "objectives": ["ttft_s.p99"]})
    (found,) = error.value.problems
    assert found.message == "this is a search space, not a scenario"
    assert "mist search" in found.hint
