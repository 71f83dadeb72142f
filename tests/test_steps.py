"""Learned step times: the contract of a performance model, the floor, what is refused, and profiles in scenarios.

Profiles here are made up, so that each answer is known; how they are fitted is tested elsewhere.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mist.errors import ScenarioError
from mist.hardware import Platform
from mist.perf import PerfModel
from mist.perf.floor import StepFloor
from mist.perf.roofline import Roofline
from mist.perf.step_profile import StepProfile
from mist.perf.steps import Steps
from mist.request import Step
from mist.scenario import catalogue, load
from mist.scenario.explain import explain_step, parse_step
from mist.testing import PerfModelContract, small_deployment
from mist.units import NS_PER_MS
from test_operators import CASES, prepared, steps

WIDE = {"new_tokens": [1, 2000], "sequences": [1, 100], "context": [0, 1_000_000], "attention": [0.5, 1e8]}
DECODE = {"knots": [1, 64], "knot_ns": [1e6, 2e6], "context_ns": 10.0, "ranges": WIDE}
PREFILL = {"knots": [16, 512], "knot_ns": [2e6, 9e6], "sequence_ns": 1e4, "attention_ns": 2.0, "ranges": WIDE}
MIXED = {"knots": [16, 512], "knot_ns": [2.5e6, 1e7], "context_ns": 12.0, "attention_ns": 2.0, "ranges": WIDE}


def profile(tp: int = 1, **changes: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "name": "made-up", "model": "test model", "device": "test device", "tp": tp, "weights_dtype": "bf16",
        "kv_dtype": "bf16", "regimes": {"prefill": PREFILL, "decode": DECODE, "mixed": MIXED},
    }  # fmt: skip
    return given | changes


def learned(fallback: PerfModel | None = None, **changes: Any) -> Steps:
    model = Steps(profile(**changes), fallback)
    assert model.supports(small_deployment()) is None
    model.prepare(small_deployment())
    return model


class TestLearnedSteps(PerfModelContract):
    regimes: tuple[str, ...] = ("prefill", "decode", "mixed")

    def model(self) -> PerfModel:
        every = {"prefill": PREFILL, "decode": DECODE, "mixed": MIXED}
        return Steps(profile(regimes={name: every[name] for name in self.regimes}), Roofline())

    def deployments(self) -> list[Any]:
        return [small_deployment()]


class TestWithoutMixedSteps(TestLearnedSteps):
    regimes = ("prefill", "decode")


class TestMixedStepsAlone(TestLearnedSteps):
    regimes = ("mixed",)


class TestNearTheFloor(TestLearnedSteps):
    def model(self) -> PerfModel:
        fast = {"knots": [1], "knot_ns": [1.0], "ranges": WIDE}
        return Steps(profile(regimes=dict.fromkeys(("prefill", "decode", "mixed"), fast)))


def test_the_features_of_a_step_make_its_time() -> None:
    model = learned()
    assert model.step_time(Step(64, 6464, [], 0, 64)) == 2_000_000 + 10 * 6400 + 1
    chunk = Step(0, 0, [(512, 100)], 512, 1)
    assert model.step_time(chunk) == 9_000_000 + 10_000 + 2 * 512 * (100 + 256) + 1
    mixed = Step(2, 202, [(510, 0)], 510, 3)
    assert model.step_time(mixed) == 10_000_000 + 12 * 200 + 2 * (510 * 255 + 202) + 1
    assert model.provenance()["interpolated"] == 1.0


def test_what_was_not_profiled_is_extrapolated() -> None:
    beyond = Step(0, 0, [(3000, 0)], 3000, 1)
    model = learned()
    slope = (9e6 - 2e6) / (512 - 16)
    expected = 9e6 + slope * (3000 - 512) + 1e4 + 2 * 3000 * 1500
    assert model.step_time(beyond) == pytest.approx(expected, abs=2)
    assert model.provenance()["extrapolated"] == 1.0
    slow = Roofline(eager_launch_ns=1e9)
    eager = replace(small_deployment(), cuda_graph=False)
    with_fallback = Steps(profile(), slow)
    with_fallback.prepare(eager)
    assert with_fallback.step_time(beyond) >= slow.step_time(beyond) > 2 * expected
    inside = Step(0, 0, [(500, 0)], 500, 1)
    assert with_fallback.step_time(inside) == model.step_time(inside)


def test_a_profile_that_beats_the_floor_is_clamped_and_counted() -> None:
    fast = {"knots": [1], "knot_ns": [1.0], "ranges": WIDE}
    model = learned(regimes={"prefill": fast, "decode": fast})
    step = Step(0, 0, [(500, 0)], 500, 1)
    assert model.floor_time(step) <= model.step_time(step) <= model.floor_time(step) + 1
    assert model.num_clamped == 1
    assert model.provenance()["clamped"] == 1.0
    assert model.explain(step)[0].origin == "clamped"


@cache
def floor_of(case: int) -> tuple[StepFloor, Roofline]:
    roofline = prepared(CASES[case])
    return StepFloor(roofline._deployment), roofline


@given(st.sampled_from(range(len(CASES))), steps())
def test_the_floor_is_that_of_the_roofline(case: int, step: Step) -> None:
    floor, roofline = floor_of(case)
    assert floor.time(step) == pytest.approx(roofline.floor_time(step), rel=1e-9, abs=1.001)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": "another"}, "model another, not test model"),
        ({"device": "another"}, "device another, not test device"),
        ({"tp": 2}, "tp 2, not 1"),
        ({"weights_dtype": "fp8"}, "weights_dtype fp8, not bf16"),
        ({"kv_dtype": "fp8"}, "kv_dtype fp8, not bf16"),
        ({"regimes": {"decode": DECODE}}, "no steps with prefills"),
        ({"regimes": {"prefill": PREFILL}}, "no steps with decodes"),
    ],
)
def test_a_profile_of_something_else_is_refused(changes: dict[str, Any], says: str) -> None:
    assert says in (Steps(profile(**changes)).supports(small_deployment()) or "")


def test_other_parallelism_and_names_that_nobody_read_are_refused() -> None:
    deployment = small_deployment()
    staged = replace(deployment, platform=Platform(deployment.platform.device, pp=2))
    assert "pp 1, not 2" in (Steps(profile()).supports(staged) or "")
    assert "was not read" in (Steps("made-up").supports(deployment) or "")
    assert Steps(profile(weights_dtype="fp16")).supports(deployment) is None


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tp": 0}, "tp must be a whole number of at least 1"),
        ({"modell": 1}, "did you mean 'model'?"),
        ({"regimes": {"decodes": DECODE}}, "did you mean 'decode'?"),
        ({"regimes": {"decode": DECODE | {"knots": [4, 2]}}}, "regimes.decode.knots must rise"),
        ({"regimes": {"decode": DECODE | {"knot_ns": [4, 2]}}}, "regimes.decode.knot_ns must not fall"),
        ({"regimes": {"decode": DECODE | {"knot_ns": [4]}}}, "has 1 values for 2 knots"),
        ({"regimes": {"decode": DECODE | {"context_ns": -1}}}, "context_ns must be a number of at least 0"),
        ({"regimes": {"decode": DECODE | {"ranges": {"tokens": [1, 2]}}}}, "has no feature 'tokens'"),
        ({"regimes": {"decode": DECODE | {"knots": [1, float("nan")]}}}, "must be a list of numbers above 0"),
        ({"includes_host": "no"}, "includes_host must be true or false"),
    ],
)
def test_bad_profiles_are_told(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ScenarioError) as caught:
        StepProfile.from_mapping(profile(**changes))
    assert says in str(caught.value)


def test_profiles_read_back_as_themselves() -> None:
    read = StepProfile.from_mapping(profile(notes=["one"], licence="MIT"))
    assert StepProfile.from_mapping(read.as_mapping()) == read


SCENARIO = {
    "workload": {"arrivals": {"poisson": {"rate_per_s": 2}}, "num_requests": 20, "input_tokens": 64,
                 "output_tokens": 8},
    "clients": {"gpu": {"device": "h100-sxm", "tp": 2, "model": "codellama-34b", "engine": "vllm-0.5"}},
}  # fmt: skip


def test_scenarios_name_a_shipped_profile_or_a_file(tmp_path: Path) -> None:
    shipped = "vllm-codellama-34b-h100-tp2"
    assert shipped in catalogue.names("steps")
    by_name = load(SCENARIO, perf={"steps": shipped})
    assert by_name.resolved()["clients"]["gpu"]["perf"] == [{"steps": {"profile": shipped}}]
    path = tmp_path / "mine.yaml"
    source = Path(catalogue.__file__).parents[1] / "data" / "steps" / f"{shipped}.yaml"
    path.write_text(source.read_text())
    by_path = load(SCENARIO, perf={"steps": {"profile": str(path)}})
    inside = by_path.resolved()["clients"]["gpu"]["perf"][0]["steps"]["profile"]
    assert inside["model"] == "codellama/CodeLlama-34b-Instruct-hf"
    assert load(by_path.resolved()).resolved() == by_path.resolved()
    assert by_name.run(check=True).metrics == by_path.run(check=True).metrics


def test_times_from_step_to_step_hold_the_host_time_already() -> None:
    name = "vllm-codellama-34b-h100-tp2"
    sum_of = {}
    for includes_host in (True, False):
        given = catalogue.mapping("steps", name) | {"includes_host": includes_host}
        result = load(SCENARIO, perf={"steps": {"profile": given}}).run()
        steps_of = result.records.steps.as_columns()
        sum_of[includes_host] = int((steps_of["end_ns"] - steps_of["start_ns"]).min())
    assert sum_of[False] - sum_of[True] >= 4.5 * NS_PER_MS  # vllm-0.5's per step


def test_mistakes_have_places(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nmodel: m\ndevice: d\ntp: 1\nweights_dtype: bf16\nkv_dtype: bf16\n"
                    "regimes:\n  decode: {knots: [2, 1], knot_ns: [1, 2]}\n")  # fmt: skip
    scenario = tmp_path / "scenario.yaml"
    scenario.write_text(
        "workload: {arrivals: {poisson: {rate_per_s: 2}}, num_requests: 2, input_tokens: 64, output_tokens: 8}\n"
        "clients:\n  gpu: {device: h100-sxm, model: llama-3.1-8b, perf: {steps: FILE}}\n"
    )
    text = scenario.read_text()
    for name, place in (("mine.yaml", f"{path}:8:12: "), ("none.yaml", f"{scenario}:3:")):
        scenario.write_text(text.replace("FILE", name))
        with pytest.raises(ScenarioError) as caught:
            load(scenario)
        assert place in str(caught.value)
    scenario.write_text(text.replace("{steps: FILE}", "steps"))
    with pytest.raises(ScenarioError, match="no step profile is named"):
        load(scenario)


def test_explain_step_takes_a_profile() -> None:
    step = parse_step("64x600")
    found = explain_step("codellama-34b", "h100", step, tp=2, perf="steps: vllm-codellama-34b-h100-tp2")
    assert [o.name for o in found.operators] == ["decode_step"]
    assert found.host_ns == 0
    for perf, says in (("steps: none", "no step profile 'none'"), ("stepps", "no performance model 'stepps'")):
        with pytest.raises(ScenarioError, match=says):
            explain_step("codellama-34b", "h100", step, tp=2, perf=perf)
    with pytest.raises(ScenarioError, match="of tp 2, not 4"):
        explain_step("codellama-34b", "h100", step, tp=4, perf="steps: vllm-codellama-34b-h100-tp2")
