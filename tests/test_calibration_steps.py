"""Calibration from profiled steps: known coefficients are recovered, groups are held out, and bad files are told.

The published records are read where MIST_DATA names their folder; nothing here judges by rows that were fitted.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from mist.calibration.fit import fit, held_out, nnls, repeat_noise
from mist.calibration.steps import StepCalibration, calibrate_steps, worst_groups, write_profile
from mist.cli import main
from mist.errors import ScenarioError
from mist.perf.step_profile import Regime, StepProfile
from mist.scenario import load

DATA = Path(os.environ.get("MIST_DATA", "/nowhere")) / "profiles"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="MIST_DATA names no folder with profiles/")

HEADER = "num_decodes,decode_context,num_prefills,prefill_tokens,prefill_context,time_us"


def decode_us(n: int, context: int) -> float:
    return 8000 + 25 * n + 0.02 * (context - n)


def prefill_us(c: int, s: int) -> float:
    return 9000 + 40 * c + 0.003 * c * (s + c / 2)


def mixed_us(n: int, context: int, c: int, s: int) -> float:
    return 9500 + 40 * (c + n) + 0.02 * (context - n + s)


def steps_file(folder: Path, noise: float = 0.0) -> Path:
    rng = np.random.default_rng(1)
    rows = []
    for n in (1, 2, 4, 8, 16, 32):
        for per_sequence in (100, 700, 3000):
            context = n * per_sequence
            rows += [(n, context, 0, 0, 0, decode_us(n, context))] * 2
            c, s = 16 * n, 1000 - 3 * per_sequence // 10
            rows.append((n, context, 1, c, s, mixed_us(n, context, c, s)))
    for c in (64, 128, 256, 512, 1024):
        for s in (0, 500, 2000):
            rows.append((0, 0, 1, c, s, prefill_us(c, s)))
    texts = [",".join(map(str, (*row[:-1], row[-1] * (1 + noise * rng.standard_normal())))) for row in rows]
    path = folder / "steps.csv"
    path.write_text("\n".join([HEADER, *texts]) + "\n")
    return path


def calibrated(path: Path, **options: str) -> StepCalibration:
    return calibrate_steps(path, model="llama-3.1-8b", device="h100", **options)  # type: ignore[arg-type]


def test_known_coefficients_are_recovered(tmp_path: Path) -> None:
    found = calibrated(steps_file(tmp_path))
    regimes = found.profile.regimes
    assert set(regimes) == {"prefill", "decode", "mixed"}
    assert regimes["decode"].context_ns == pytest.approx(20, rel=1e-6)
    assert regimes["decode"].knot_ns[0] == pytest.approx(8.025e6, rel=1e-6)
    assert regimes["decode"].knot_ns[-1] == pytest.approx(8.8e6, rel=1e-6)
    assert regimes["prefill"].attention_ns == pytest.approx(3, rel=1e-6)
    assert regimes["prefill"].last_slope_ns == pytest.approx(40e3, rel=1e-6)
    assert regimes["mixed"].context_ns == pytest.approx(20, rel=1e-5)
    for row in found.rows():
        assert row["noise mean %"] in (0.0, None)
    for f in found.fits:  # below the least tokens that are left a step takes no less
        least = min(h.new_tokens for h in f.held_out)
        assert all(h.error_pct < 1e-3 for h in f.held_out if h.new_tokens > least)


def test_noise_and_held_out_errors_are_of_the_size_put_in(tmp_path: Path) -> None:
    found = calibrated(steps_file(tmp_path, noise=0.02))
    decode = next(f for f in found.fits if f.name == "decode")
    assert decode.num_repeats == 36
    assert decode.noise_mean_pct is not None
    assert 0.8 < decode.noise_mean_pct < 2.4  # mean |normal| is 0.8 sigma
    assert 0.5 < decode.step_mean_pct < 4
    assert len(worst_groups(decode)) == 5


def test_groups_are_held_out_as_a_whole() -> None:
    features = np.array([[n, n, 100.0, 0.0] for n in (1.0, 1.0, 2.0, 2.0, 4.0, 4.0)])
    groups = np.array([0, 0, 1, 1, 2, 2])
    seen: list[set[float]] = []

    def learn(x: np.typing.NDArray[np.float64], y: np.typing.NDArray[np.float64]) -> Regime:
        seen.append(set(x[:, 0].tolist()))
        return Regime((1.0,), (1.0,))

    held_out(features, np.ones(6), groups, learn)
    assert seen == [{2.0, 4.0}, {1.0, 4.0}, {1.0, 2.0}]


def test_repeat_noise_of_two_is_their_distance_over_the_root_of_two() -> None:
    noise = repeat_noise(np.array([99.0, 101.0, 50.0]), np.array([0, 0, 1]))
    assert noise == pytest.approx([np.sqrt(2), np.sqrt(2)])


@given(st.integers(0, 10**6))
def test_least_squares_are_bounded_and_optimal(seed: int) -> None:
    rng = np.random.default_rng(seed)
    columns = rng.random((12, 5)) * 10.0 ** rng.integers(-6, 6, 5)
    target = rng.normal(size=12)
    x = nnls(columns, target)
    scale = np.linalg.norm(columns, axis=0)
    gradient = columns.T @ (target - columns @ x) / scale
    assert (x >= 0).all()
    assert (gradient <= 1e-6).all()
    assert np.abs(gradient[x > 0]).max(initial=0) < 1e-6


def test_features_that_cannot_be_told_apart_are_named() -> None:
    n = np.repeat([1.0, 2, 4, 8, 16, 32], 2)
    context = 100 * n + np.tile([1.0, -1], 6)
    features = np.stack([n, n, context, context + n], axis=1)
    _, warnings = fit("decode", features, 1e6 + 1e4 * n + 5 * context)
    assert warnings == ["decode: new_tokens and context can't be told apart (correlation 1.000)"]
    features = np.stack([100 * n, n, 0 * n, 5000 * n], axis=1)
    _, warnings = fit("prefill", features, 1e6 + 1e4 * n)
    assert any("follows from other features" in warning for warning in warnings)


@pytest.mark.parametrize(
    ("header", "row", "says"),
    [
        (HEADER, "1,5,0,0,0,fast", "steps.csv:2:11: time_us can't be 'fast'"),
        (HEADER, "1,5,0,0,0,-1", "steps.csv:2:11: time_us can't be '-1'"),
        (HEADER, "1,5,0,0,0,nan", "steps.csv:2:11: time_us can't be 'nan'"),
        (HEADER, "2,1,0,0,0,9", "steps.csv:2:3: fewer tokens of context than decodes"),
        (HEADER, "0,0,2,1,0,9", "steps.csv:2:7: fewer tokens than prefills"),
        (HEADER, "0,0,0,0,0,9", "steps.csv:2: a step without any work"),
        (HEADER, "1,5,0,0,0", "steps.csv:2: 5 fields where the header has 6"),
        ("num_decode,decode_context,time_us", "1,5,9", "did you mean 'num_decodes'"),
        ("num_decodes,decode_context", "1,5", "steps.csv:1: the file has no time"),
        ("num_decodes,decode_context,time_us,time_ms", "1,5,9,9", "the file has time_us and time_ms"),
        (HEADER, "1,5,0,0,0,9", "only 1 operating points, at least 3 are needed"),
    ],
)
def test_bad_files_are_told_by_their_place(tmp_path: Path, header: str, row: str, says: str) -> None:
    path = tmp_path / "steps.csv"
    path.write_text(f"{header}\n{row}\n")
    with pytest.raises(ScenarioError) as caught:
        calibrated(path)
    assert says in str(caught.value)


def test_files_that_are_not_there_or_say_too_little(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match="no such file"):
        calibrated(tmp_path / "none.csv")
    path = steps_file(tmp_path)
    with pytest.raises(ScenarioError, match="doesn't tell the model"):
        calibrate_steps(path)
    with pytest.raises(ScenarioError, match=r"llama-3\.1-9b"):
        calibrate_steps(path, model="llama-3.1-9b", device="h100")
    with pytest.raises(ScenarioError, match=r"column 'step\.id' is missing"):
        calibrated(path, file_format="blis")


def test_the_command_writes_a_profile_that_scenarios_run(tmp_path: Path) -> None:
    path, out = steps_file(tmp_path), tmp_path / "profile.yaml"
    arguments = ["calibrate", "steps", str(path), "--model", "llama-3.1-8b", "--device", "h100", "--out", str(out)]
    result = CliRunner().invoke(main, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert [row["regime"] for row in document["errors"]] == ["prefill", "decode", "mixed"]
    assert StepProfile.from_mapping(document["profile"]).tp == 1
    again = CliRunner().invoke(main, arguments)
    assert again.exit_code == 2
    assert "is there already" in again.stderr
    lost = CliRunner().invoke(main, [*arguments, "--out", str(path), "--overwrite"])
    assert lost.exit_code == 2
    assert "would be written over, and this run reads it" in lost.stderr
    table = CliRunner().invoke(main, [*arguments, "--overwrite"])
    assert table.stdout.splitlines()[1].startswith("prefill")
    scenario = {
        "workload": {"arrivals": {"poisson": {"rate_per_s": 2}}, "num_requests": 9, "input_tokens": 64,
                     "output_tokens": 8},
        "clients": {"gpu": {"device": "h100-sxm", "model": "llama-3.1-8b", "perf": {"steps": str(out)}}},
    }  # fmt: skip
    shares = load(scenario).run(check=True).metrics["provenance"]
    assert shares["interpolated"] + shares["extrapolated"] == pytest.approx(1)


def test_a_profile_is_the_same_each_time_and_not_written_where_it_can_not_be(tmp_path: Path) -> None:
    path = steps_file(tmp_path, noise=0.01)
    one, other = (calibrated(path, date="2026-01-01") for _ in range(2))
    assert one.to_yaml() == other.to_yaml()
    with pytest.raises(ScenarioError, match="no folder"):
        write_profile(one, tmp_path / "none" / "profile.yaml")


def test_a_published_table_by_name(tmp_path: Path) -> None:
    names = "model,hardware,prompt_size,batch_size,token_size,prompt_time,token_time,tensor_parallel"
    rows = [f"llama2-70b,{hardware},{prompt},{batch},128,{prompt * batch / 10 + 20},{30 + batch},8"
            for hardware in ("h100-80gb", "a100-80gb")
            for prompt, batch in ((128, 1), (512, 1), (512, 1), (1024, 1), (512, 2), (512, 4), (512, 8))]  # fmt: skip
    path = tmp_path / "table.csv"
    path.write_text("\n".join([names, *rows]) + "\n")
    found = calibrate_steps(path, device="h100")
    assert found.profile.model == "meta-llama/Llama-2-70b-hf"
    assert (found.profile.device, found.profile.tp) == ("h100-sxm", 8)
    assert {f.name: (f.num_steps, f.num_groups) for f in found.fits} == {"prefill": (6, 6), "decode": (6, 6)}
    with pytest.raises(ScenarioError, match="--device a100-sxm-80gb --tp 8"):
        calibrate_steps(path)


@needs_data
def test_learned_vllm_steps_are_as_good_as_their_repeats() -> None:
    found = calibrate_steps(DATA / "blis" / "enriched_steps.parquet", device="h100")
    assert found.profile.tp == 2
    for f in found.fits:
        assert f.noise_mean_pct is not None
        assert f.step_mean_pct <= 1.5 * f.noise_mean_pct, f


@needs_data
@pytest.mark.parametrize("device", ["h100-sxm", "a100-sxm-80gb"])
def test_learned_splitwise_steps_do_not_get_worse(device: str) -> None:
    found = calibrate_steps(DATA / "splitwise_sim" / "perf_model_llama2-70b_tp8.csv", device=device)
    reached = {"h100-sxm": (4.5, 2.5), "a100-sxm-80gb": (9.5, 4.0)}[device]
    assert tuple(f.num_groups for f in found.fits) == (13, 13)
    assert [f.mean_pct <= most for f, most in zip(found.fits, reached, strict=True)] == [True, True]
