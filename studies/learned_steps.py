"""How well step times can be learned from public records, and the step profiles that ship, src/mist/data/steps.

Run as `MIST_DATA=FOLDER python studies/learned_steps.py [--write]`, where FOLDER holds `profiles/splitwise_sim` and
`profiles/blis`. It judges by operating points held out as a whole, and with --write regenerates the profiles.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np

from mist.calibration.fit import RegimeFit
from mist.calibration.steps import StepCalibration, calibrate_steps, worst_groups

CATALOGUE = Path(__file__).parents[1] / "src" / "mist" / "data" / "steps"
SPLITWISE = "profiles/splitwise_sim/perf_model_llama2-70b_tp8.csv"
BLIS = "profiles/blis/enriched_steps.parquet"
DATE = "2026-11-21"
MEAN_BAR_PCT, MEDIAN_BAR_PCT, NOISE_BAR = 2.5, 1.0, 1.5

HEADER = """\
# Computed by studies/learned_steps.py from the public measurements named below; no row of them is in here.
"""


def main(arguments: list[str]) -> int:
    """Both bars, and with --write the profiles."""
    root = Path(os.environ.get("MIST_DATA", ""))
    if not (root / SPLITWISE).is_file():
        print("set MIST_DATA to a folder that holds profiles/splitwise_sim and profiles/blis", file=sys.stderr)
        return 2
    found = [_splitwise(root, device, name) for device, name in (("h100-sxm", "h100"), ("a100-sxm-80gb", "a100"))]
    found.append(_vllm(root))
    if "--write" in arguments:
        CATALOGUE.mkdir(exist_ok=True)
        for calibration in found:
            path = CATALOGUE / f"{calibration.profile.name}.yaml"
            path.write_text(HEADER + calibration.to_yaml(), encoding="utf-8")
    return 0


def _splitwise(root: Path, device: str, name: str) -> StepCalibration:
    found = calibrate_steps(
        root / SPLITWISE, device=device, name=f"splitwise-llama-2-70b-{name}-tp8", date=DATE, licence="MIT",
        engine="vLLM fork of 2023 (Splitwise)",
        source="Mutinifni/splitwise-sim, perf_model.csv; Patel et al., Splitwise, ISCA 2024",
    )  # fmt: skip
    print(f"\nSplitwise, Llama-2-70B, TP8, {device}: groups are (batch, prompt)")
    for fit in found.fits:
        inner = [h.error_pct for h in fit.held_out if not _is_outermost(fit, h.sequences, h.new_tokens)]
        _print(fit, f"bar {MEAN_BAR_PCT} % mean, {MEDIAN_BAR_PCT} % median: "
               f"{_met(fit.mean_pct <= MEAN_BAR_PCT and fit.median_pct <= MEDIAN_BAR_PCT)}")  # fmt: skip
        print(f"    without the outermost groups, which are extrapolated: {len(inner)} groups, "
              f"mean {np.mean(inner):.2f} %, median {np.median(inner):.2f} %")  # fmt: skip
    _print_remarks(found)
    return found


def _vllm(root: Path) -> StepCalibration:
    found = calibrate_steps(
        root / BLIS, device="h100-sxm", name="vllm-codellama-34b-h100-tp2", date=DATE, licence="Apache-2.0",
        engine="vLLM v1 (2026)", source="inference-sim, enriched_steps.parquet: one run of 2026-02-18",
    )  # fmt: skip
    print("\nvLLM step records, CodeLlama-34B, TP2, h100-sxm: groups are (decodes, prefills, new tokens)")
    for fit in found.fits:
        assert fit.noise_mean_pct is not None
        assert fit.noise_median_pct is not None
        assert fit.repeated_mean_pct is not None
        ratio, alike = (error / fit.noise_mean_pct for error in (fit.step_mean_pct, fit.repeated_mean_pct))
        _print(fit, f"bar {NOISE_BAR} x repeat noise: mean {ratio:.2f} x {_met(ratio <= NOISE_BAR)}, "
            f"on the repeated steps alone {alike:.2f} x, "
               f"median {fit.step_median_pct / fit.noise_median_pct:.2f} x")  # fmt: skip
    _print_remarks(found)
    return found


def _is_outermost(fit: RegimeFit, sequences: float, new_tokens: float) -> bool:
    """Whether no other group has as few, or as many, new tokens."""
    others = [h.new_tokens for h in fit.held_out if (h.sequences, h.new_tokens) != (sequences, new_tokens)]
    return not others or not min(others) <= new_tokens <= max(others)


def _print(fit: RegimeFit, bar: str) -> None:
    noise = (
        "none"
        if fit.noise_mean_pct is None
        else f"mean {fit.noise_mean_pct:.2f} %, median {fit.noise_median_pct:.2f} %"
    )
    print(f"  {fit.name}: {fit.num_steps} steps, {fit.num_groups} groups held out: mean {fit.mean_pct:.2f} %, "
          f"median {fit.median_pct:.2f} %, P90 {fit.p90_pct:.2f} %; {bar}")  # fmt: skip
    print(f"    single steps: mean {fit.step_mean_pct:.2f} %, median {fit.step_median_pct:.2f} %; "
          f"repeat noise of {fit.num_repeats} times of {fit.num_repeated} distinct steps: {noise}")  # fmt: skip
    for row in worst_groups(fit, 3):
        print("      " + ", ".join(f"{key} {value}" for key, value in row.items() if key != "regime"))


def _print_remarks(found: StepCalibration) -> None:
    for remark in found.remarks:
        print(f"  {remark}")


def _met(is_met: bool) -> str:
    return "met" if is_met else "missed"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
