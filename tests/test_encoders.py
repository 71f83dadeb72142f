"""Encoders: FLOP by hand, sequences that are never cut, published speeds of embedding servers, and CPU hosts.

Guards the forward pass that embedders, re-rankers and classifiers take, as scenarios run it. Published speeds are in
tokens per second of bge-large-en-v1.5 on an L4 (infinity, docs/docs/benchmarking.md): 1.15 M tokens, 2,560 sequences.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from measured import invoke
from mist.engine import EngineProfile
from mist.hardware import BASE_POWER, Device
from mist.model import ModelSpec
from mist.perf import Deployment
from mist.perf.roofline import Roofline
from mist.request import Step
from mist.scenario import Scenario, catalogue
from mist.scenario.build import run
from mist.scenario.encoders import cut_sequences, default_batching, engine_of
from mist.scenario.named import SpecOf
from scenarios import read

NUM_SEQUENCES, TOKENS = 2560, 449
#: tokens/s as published, and whether the profile holds nothing fitted to it
PUBLISHED = {
    "tei-0.6": (62_192.4, True), "infinity-0.0.25": (58_787.4, True), "infinity-0.0.25-tensorrt": (49_214.7, False),
    "infinity-0.0.25-onnx": (47_038.6, False), "sentence-transformers-2": (19_456.2, False),
}  # fmt: skip
HOSTS = ("sapphire-rapids", "genoa", "grace")

SENTENCES = """\
workload: {{concurrency: {num}, num_requests: {num}, input_tokens: {tokens}, output_tokens: 1}}
pipeline: [prefill]
clients:
  encoder: {{device: {device}, model: {model}, engine: {engine}, serves: [prefill], batching: {batching}}}
perf: [roofline]
"""


def sentences(
    folder: Path, engine: str = "tei-0.6", device: str = "l4", model: str = "bge-large", tokens: str = str(TOKENS),
    num: int = NUM_SEQUENCES, batching: str = "continuous",
) -> Scenario:  # fmt: skip
    given = {"engine": engine, "device": device, "model": model, "tokens": tokens, "num": num, "batching": batching}
    return read(folder, SENTENCES.format(**given))


def spec(name: str) -> ModelSpec:
    value, _ = catalogue.read("models", name, Path())
    assert isinstance(value, ModelSpec)
    return value


def device(name: str) -> Device:
    value, _ = catalogue.read("devices", name, Path())
    assert isinstance(value, Device)
    return value


def engine(name: str) -> EngineProfile:
    value, _ = catalogue.read("engines", name, Path())
    assert isinstance(value, EngineProfile)
    return value


def whole(*lengths: int) -> Step:
    """A step of whole sequences."""
    return Step(chunks=[(n, 0) for n in lengths], num_prefill_tokens=sum(lengths), num_sampled=len(lengths))


def roofline(deployment: Deployment) -> Roofline:
    model = Roofline()
    assert model.supports(deployment) is None
    model.prepare(deployment)
    return model


# --- the forward pass ---


def test_flop_of_a_step_by_hand(tmp_path: Path) -> None:
    """24 layers of 12 x 1,024² weights; every token attends to all of its own sequence; the pooler once a sequence."""
    model = roofline(sentences(tmp_path).clients["encoder"].deployment())
    lengths = (449, 100, 7)
    dense = 2 * 24 * 12 * 1024**2 * sum(lengths)
    attention = 24 * 4 * 1024 * sum(n * n for n in lengths)
    pooler = 2 * 1024**2 * len(lengths)
    assert sum(o.flop for o in model.explain(whole(*lengths))) == pytest.approx(dense + attention + pooler)


def test_sequences_of_a_batch_do_not_attend_to_each_other(tmp_path: Path) -> None:
    model = roofline(sentences(tmp_path).clients["encoder"].deployment())

    def attention(*lengths: int) -> float:
        return next(o.flop for o in model.explain(whole(*lengths)) if o.name == "attention_encoder")

    assert attention(256, 256) == 2 * attention(256)
    assert attention(512) == 4 * attention(256)
    assert model.step_time(whole(256, 256)) < model.step_time(whole(512))


def test_padding_costs_what_its_tokens_cost(tmp_path: Path) -> None:
    model = roofline(sentences(tmp_path).clients["encoder"].deployment())
    assert model.step_time(whole(*[512] * 8)) > model.step_time(whole(*[256, 512] * 4))


# --- whole sequences ---


def test_every_sequence_is_computed_in_one_step(tmp_path: Path) -> None:
    scenario = sentences(tmp_path, tokens="{lognormal: {mean: 200, cv: 0.8, max: 512}}", num=500)
    result = run(scenario, check=True)
    starts = set(result.steps["start_s"])
    ends = set(result.steps["end_s"])
    limit = scenario.clients["encoder"].batching.params["max_num_batched_tokens"]
    assert max(result.steps["num_prefill_tokens"]) <= limit
    assert sum(result.steps["num_prefills"]) == len(result.tasks["end_s"]) == 500
    assert set(result.tasks["started_s"]) <= starts
    assert set(result.tasks["end_s"]) <= ends


def test_a_sequence_beyond_the_limit_of_a_step_runs_alone(tmp_path: Path) -> None:
    batching = "{continuous: {max_num_batched_tokens: 300}}"
    result = run(sentences(tmp_path, num=6, batching=batching), check=True)
    assert list(result.steps["num_prefill_tokens"]) == [TOKENS] * 6


def test_an_encoder_that_names_no_engine_gets_one_that_embeds() -> None:
    default = engine("vllm-0.10")
    assert engine_of(spec("bge-large"), default).name == "tei-0.6"
    assert engine_of(spec("llama-3.1-8b"), default) is default
    assert engine_of(spec("bge-large"), default).batching == "continuous"


@pytest.mark.parametrize("entry", [e.name for e in catalogue.entries("engines")])
def test_no_engine_cuts_an_encoder_by_default(entry: str) -> None:
    encoder, decoder, profile = spec("bge-large"), spec("e5-mistral-7b"), engine(entry)
    assert default_batching(profile, encoder) != "chunked"
    assert default_batching(profile, decoder) == profile.batching
    assert not list(cut_sequences(encoder, SpecOf("batching").read(default_batching(profile, encoder))))


def test_chunks_of_an_encoder_are_refused_with_what_would_do() -> None:
    chunked = SpecOf("batching").read({"chunked": {"max_num_batched_tokens": 512}})
    ((where, found),) = cut_sequences(spec("bge-reranker-v2-m3"), chunked)
    assert where == ("batching", "chunked")
    assert "BAAI/bge-reranker-v2-m3 is an encoder" in found.message
    assert "continuous" in found.hint
    assert not list(cut_sequences(spec("qwen3-reranker-0.6b"), chunked))
    assert not list(cut_sequences(spec("bge-large"), SpecOf("batching").read("static")))


# --- published speeds ---


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_speeds_within_15_percent(name: str, tmp_path: Path) -> None:
    result = run(sentences(tmp_path, name, batching=engine(name).batching), check=True)
    tokens_per_s = NUM_SEQUENCES * TOKENS / float(max(result.steps["end_s"]))
    assert tokens_per_s == pytest.approx(PUBLISHED[name][0], rel=0.15)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_profile_says_what_was_fitted_to_the_only_point(name: str) -> None:
    profile, is_prediction = engine(name), PUBLISHED[name][1]
    assert is_prediction == (not profile.time_factors)
    assert is_prediction != ("fitted to one point" in profile.sources.get("time_factors", ""))


def test_the_l4_reaches_what_an_l40s_does_at_the_clock_that_its_power_leaves() -> None:
    l4, l40s = device("l4"), device("l40s")
    assert l4.tdp_w is not None
    assert l40s.tdp_w is not None
    full = l40s.tdp_w * l4.peak("bf16") / l40s.peak("bf16")
    base = BASE_POWER * full
    clock = ((l4.tdp_w - base) / (full - base)) ** (1 / 3)
    for kind in ("gemm", "gemm_fp8", "attention_prefill", "attention_prefill_fp8"):
        assert l4.efficiency[kind] == pytest.approx(clock * l40s.efficiency[kind], abs=0.006)
    for kind in ("gemm_memory", "attention_decode"):
        assert l4.efficiency[kind] == l40s.efficiency[kind]


# --- CPU hosts ---


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("model", ["bge-large", "e5-base-v2", "roberta-base"])
def test_encoders_on_hosts(name: str, model: str, tmp_path: Path) -> None:
    """A query takes what reading the weights takes and a few times that at most; a batch what its FLOP take."""
    deployment = sentences(tmp_path, device=name, model=model).clients["encoder"].deployment()
    priced, host = roofline(deployment), device(name)
    query, batch = whole(20), whole(*[512] * 8)
    assert host.num_cores > 40
    weights_ns = 1e9 * sum(2 * 12 * g.hidden_size**2 * g.num_layers for g in spec(model).layers)
    assert 1 < priced.step_time(query) / (weights_ns / host.memory_bytes_per_s) < 4
    assert 1 < priced.step_time(batch) / priced.floor_time(batch) < 3
    assert priced.step_time(whole(20)) <= priced.step_time(whole(200)) <= priced.step_time(whole(200, 20))


def test_faster_hosts_are_faster(tmp_path: Path) -> None:
    for step in (whole(20), whole(*[512] * 8)):
        times = [
            roofline(sentences(tmp_path, device=name).clients["encoder"].deployment()).step_time(step) for name in HOSTS
        ]
        assert times == sorted(times, reverse=True)


def test_a_small_decoder_on_a_host_is_bound_by_its_memory(tmp_path: Path) -> None:
    scenario = sentences(tmp_path, device="genoa", model="llama-3.2-1b", engine="ideal")
    priced = roofline(scenario.clients["encoder"].deployment())
    decode = Step(num_decodes=1, num_sampled=1, decode_context=500)
    assert 1 < priced.step_time(decode) / priced.floor_time(decode) < 2


def test_an_encoder_shows_no_kv_cache(tmp_path: Path) -> None:
    scenario = sentences(tmp_path, num=4)
    pool = run(scenario, check=True).metrics["clients"]["encoder"]
    assert (pool["kv_tokens_capacity"], pool["kv_peak"], pool["kv_mean"]) == (0, None, None)
    told = invoke("check", tmp_path / "case.yaml").stdout
    assert "no KV cache" in told
    assert "tokens of KV" not in told
