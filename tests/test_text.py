"""Text work on the cores of a host: times by hand, what a step asks of its host, and how rates are written.

Guards the model `cpu_text` as any `HostModel` must be: whole nanoseconds, never below the floor, more work never
sooner, parts that sum to the whole. Never runs a simulation.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from mist.hardware import Device
from mist.perf import ORIGINS, HostDeployment, HostModel
from mist.perf.text import BYTES_PER_TOKEN, CpuText
from mist.request import Step
from mist.scenario import catalogue
from mist.scenario.named import SpecOf
from mist.testing.contracts import small_deployment


def device(name: str = "genoa") -> Device:
    value, _ = catalogue.read("devices", name, Path())
    assert isinstance(value, Device)
    return value


def text(num_cores: int = 4, max_num_seqs: int = 64, **rates: Any) -> CpuText:
    model = CpuText(**rates)
    deployment = HostDeployment(device(), num_cores, max_num_seqs)
    assert model.supports(deployment) is None
    model.prepare(deployment)
    return model


def step(*tasks: tuple[str, int]) -> Step:
    chunks = [(tokens, 0) for _, tokens in tasks]
    return Step(chunks=chunks, num_prefill_tokens=sum(c for c, _ in chunks), kinds=[kind for kind, _ in tasks])


def any_step(rng: random.Random, kinds: tuple[str, ...]) -> Step:
    return step(*[(rng.choice(kinds), rng.choice([0, 1, 7, 300, 20_000])) for _ in range(rng.randint(1, 12))])


SIMPLE: dict[str, Any] = {
    "tokenize": {"ns_per_token": 100, "ns_per_request": 1_000}, "detokenize": {"ns_per_token": 10},
    "regex_guard": {"ns_per_request": 5_000},
}  # fmt: skip


@pytest.mark.parametrize(
    ("num_cores", "tasks", "expected"),
    [
        (4, [("tokenize", 50)], 6_000),  # 1,000 + 50 x 100, on one core whatever there are
        (4, [("tokenize", 50)] * 4, 6_000),
        (4, [("tokenize", 50)] * 5, 7_500),  # 30,000 / 4
        (1, [("tokenize", 50)] * 5, 30_000),
        (4, [("tokenize", 500), ("detokenize", 100)], 51_000),  # the longest bounds
        (2, [("regex_guard", 10_000), ("detokenize", 150), ("detokenize", 150)], 5_000),
        (2, [("regex_guard", 10_000), ("detokenize", 350), ("detokenize", 351)], 6_005),  # (5,000 + 3,500 + 3,510) / 2
        (3, [("tokenize", 0), ("tokenize", 0), ("tokenize", 0), ("tokenize", 1)], 1_367),  # 4,100 / 3, rounded up
    ],
)  # fmt: skip
def test_times_by_hand(num_cores: int, tasks: list[tuple[str, int]], expected: int) -> None:
    assert text(num_cores, **SIMPLE).step_time(step(*tasks)) == expected


def test_a_stage_of_another_name_has_its_own_rate() -> None:
    model = text(2, stages={"strip_markup": {"ns_per_token": 3}}, **SIMPLE)
    assert model.kinds == ("tokenize", "detokenize", "regex_guard", "strip_markup")
    assert model.step_time(step(("strip_markup", 1_000))) == 3_000


def test_the_defaults_are_what_the_literature_says_of_them() -> None:
    """A guard of regular expressions takes below 1 ms, and reading a prompt far less than any prefill of it."""
    model = text()
    assert model.kinds == ("tokenize", "detokenize", "regex_guard")
    assert model.step_time(step(("regex_guard", 500))) < 1_000_000
    assert 100_000 < model.step_time(step(("tokenize", 1_000))) < 3_000_000
    assert model.step_time(step(("detokenize", 1_000))) < model.step_time(step(("tokenize", 1_000)))


@pytest.mark.parametrize("seed", range(20))
def test_more_work_never_takes_less_time_and_more_cores_never_longer(seed: int) -> None:
    rng = random.Random(seed)
    few, many = text(2), text(7)
    for _ in range(50):
        some = any_step(rng, few.kinds)
        more = step(*zip(some.kinds, [c for c, _ in some.chunks], strict=True), (rng.choice(few.kinds), 40))
        assert few.step_time(some) <= few.step_time(more)
        assert many.step_time(some) <= few.step_time(some)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("rates", [{}, {"tokenize": {}, "detokenize": {}, "regex_guard": {}}, SIMPLE])
def test_a_step_is_whole_above_its_floor_and_explained(seed: int, rates: dict[str, Any]) -> None:
    """With free stages too: memory still bounds what they read."""
    rng = random.Random(seed)
    model = text(rng.randint(1, 9), **rates)
    for _ in range(50):
        one = any_step(rng, model.kinds)
        time_ns, floor = model.step_time(one), model.floor_time(one)
        assert isinstance(time_ns, int)
        assert 0 <= floor <= time_ns
        assert time_ns >= 1
        parts = model.explain(one)
        assert sum(part.time_ns for part in parts) == pytest.approx(time_ns, abs=1)
        assert sum(part.count for part in parts) == len(one.chunks)
        assert {part.origin for part in parts} <= set(ORIGINS)
        assert sum(part.floor_ns for part in parts) == pytest.approx(floor, abs=1)
        asked = model.demand(one)
        assert asked.dram_bytes == BYTES_PER_TOKEN * one.num_prefill_tokens
        assert asked.core_ns <= time_ns * min(model._num_cores, len(one.chunks))
        assert sum(part.bytes for part in parts) == asked.dram_bytes


def test_one_task_keeps_one_core_busy() -> None:
    asked = text(4, **SIMPLE).demand(step(("tokenize", 50)))
    assert (asked.core_ns, asked.dram_bytes) == (6_000, 400)


def test_it_is_a_host_model_without_an_index() -> None:
    model: HostModel = text()
    assert model.memory_bytes() == 0
    assert model.provenance() == {"extrapolated": 1.0}


def test_an_accelerator_has_no_cores() -> None:
    reason = CpuText().supports(HostDeployment(device("h100-sxm"), 0, 8))
    assert reason is not None
    assert "h100-sxm has no cores" in reason


def test_steps_of_a_model_are_not_its_business() -> None:
    assert "not the steps of a model" in str(CpuText().supports(small_deployment()))  # type: ignore[arg-type]


def test_rates_are_written_by_stage() -> None:
    spec = SpecOf("perf").read({"cpu_text": {"tokenize": {"ns_per_token": 250}, "stages": {"clean": {}}}})
    model = spec.build()
    assert model.kinds == ("tokenize", "detokenize", "regex_guard", "clean")
    assert model.tokenize == {"ns_per_token": 250}
    assert SpecOf("perf").read(spec.plain()).plain() == spec.plain()
    assert spec.plain()["cpu_text"]["detokenize"] == {"ns_per_token": 800.0, "ns_per_request": 2000.0}
    assert SpecOf("perf").read("cpu_text").build().kinds == ("tokenize", "detokenize", "regex_guard")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"tokenize": {"ns_per_tokens": 5}}, "'ns_per_tokens'"),
        ({"regex_guard": {"ns_per_token": -1}}, "regex_guard has ns_per_token: -1"),
        ({"stages": {"clean": {"ns_per_request": 1e13}}}, "clean has ns_per_request"),
        ({"stages": {"tokenize": {}}}, "stages has tokenize"),
        ({"tokenise": {}}, "'tokenise'"),
        ({"tokenize": {"ns_per_token": "fast"}}, "must be a number"),
    ],
)  # fmt: skip
def test_mistaken_rates_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        SpecOf("perf").read({"cpu_text": given})
    assert words in str(caught.value)


def test_the_defaults_of_one_model_are_its_own() -> None:
    one, other = CpuText(), CpuText()
    assert one.tokenize == other.tokenize
    assert one.tokenize is not other.tokenize
