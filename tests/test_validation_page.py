"""The page that a validation makes: bars and verdicts, what the hand wrote, ratios, pictures, and the script."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import yaml

from measured import CLOSED, OFFLINE, STATIC, write_points
from mist.validation.evaluate import Comparison, Evaluated
from mist.validation.page import Judged, page, plotted, texts_of
from mist.validation.plot import scatter
from mist.validation.points import Point
from mist.validation.ratios import ratio_errors

ROOT = Path(__file__).parent.parent


def compared(error: float, metric: str = "tpot_mean_ms", **values: Any) -> Comparison:
    fields: dict[str, Any] = {"id": "i", "point": "p", "source": "apex_plus", "trust": "A", "saturated": False,
                              "device": "h100-sxm", "measured": 100.0, "profile": "vllm-0.6", "perf": "kernels",
                              "engine": "vllm", "model": "m"} | values  # fmt: skip
    simulated = fields["measured"] * (1 + error / 100)
    return Comparison(metric=metric, simulated=simulated, ape=abs(error), error=error, **fields)


def of(*comparisons: Comparison, **values: Any) -> Judged:
    found: dict[str, Any] = {
        "inputs": ["points.csv"], "date": "2026-01-02", "version": "1",
        "coverage": {"rows": 9, "runnable": 8, "run": 7, "skipped": [{"id": "x", "reason": "a | b"}]},
        "everything": comparisons, "checking": comparisons, "ablation": {"as it ships": comparisons}, "ratios": {},
    }  # fmt: skip
    return Judged(**found | values)


def row(text: str, *cells: str) -> list[str]:
    """The first table row that begins with these cells."""
    start = "| " + " | ".join(cells) + " |"
    return next(line for line in text.splitlines() if line.startswith(start)).strip("| ").split(" | ")


@pytest.mark.parametrize(
    ("comparisons", "cells"),
    [
        ([compared(5, point=str(i)) for i in range(5)], ["6 %", "met"]),
        ([compared(7, point=str(i)) for i in range(5)], ["6 %", "**missed**"]),
        ([compared(5, point=str(i)) for i in range(4)], ["6 %", "too few points (4)"]),
        ([compared(12, "ttft_mean_ms", point=str(i)) for i in range(5)], ["10 % or 5 ms", "**missed**"]),
        ([compared(12, "ttft_mean_ms", point=str(i), measured=40.0) for i in range(5)], ["10 % or 5 ms", "met"]),
    ],
)
def test_bars(comparisons: list[Comparison], cells: list[str]) -> None:
    found = row(page(of(*comparisons), {}, {}), "apex_plus")
    assert found[-2:] == cells


def test_families_that_nothing_was_fitted_to_have_no_bar() -> None:
    text = page(of(*(compared(50, point=str(i), source="mooncake_pd") for i in range(9))), {}, {})
    assert "**missed**" not in text


def test_what_is_not_judged_stands_apart() -> None:
    text = page(of(compared(5), compared(90, saturated=True), compared(80, trust="C")), {}, {})
    assert row(text, "apex_plus", "tpot")[2:4] == ["1", "5.0"]
    assert row(text.split("## Saturated")[1], "apex_plus")[3] == "90.0"
    assert "80.0" not in text
    assert "Of 9 rows, 8 define a run, and 7 of these (87.5 %) were compared." in text
    assert "| 1 | a / b |" in text


def test_a_device_without_its_own_constants_has_a_bar() -> None:
    judged = of(compared(5), left_out={"h100-sxm": [compared(11), compared(14)]})
    assert row(page(judged, {}, {}), "h100-sxm")[-3:] == ["12.5", "12 %", "**missed**"]
    judged = of(compared(5, perf="roofline"), left_out={"h100-sxm": [compared(19)]})
    assert row(page(judged, {}, {}), "h100-sxm", "roofline")[-3:] == ["19.0", "20 %", "met"]


def test_what_the_hand_wrote_is_kept() -> None:
    judged = of(compared(5))
    empty = page(judged, {}, {})
    names = set(texts_of(empty))
    assert names == {"families", "devices", "ablation", "misses"}
    old = empty.replace("<!-- text: misses -->\n", "<!-- text: misses -->\nTTFT, for *reasons*:\n\n- one\n")
    again = page(of(compared(6)), texts_of(old), {})
    assert "TTFT, for *reasons*:\n\n- one\n<!-- end -->" in again
    assert page(of(compared(6)), texts_of(again), {}) == again


# ratios


def pair(*columns: dict[str, str], simulated: tuple[float, float] = (120.0, 330.0)) -> dict[str, Any]:
    """Ratio errors of two points, measured as 100 and 300."""
    points = [Point(str(i), {"source": "s", "isl": "9", "note": str(i), **c}) for i, c in enumerate(columns)]
    compared_to = [compared(100 * (s / m - 1), measured=m) for s, m in zip(simulated, (100.0, 300.0), strict=True)]
    return ratio_errors(points, [Evaluated(str(i), (c,), ()) for i, c in enumerate(compared_to)])


def test_common_errors_cancel_in_ratios() -> None:
    found = pair({"tp": "1", "num_devices": "1"}, {"tp": "2", "num_devices": "2"})
    assert found.keys() == {"tensor parallelism"}
    assert found["tensor parallelism"]["tpot"]["n"] == 1
    assert found["tensor parallelism"]["tpot"]["bias"] == pytest.approx(100 * (1.1 / 1.2 - 1), abs=1e-3)
    assert pair({"device": "a"}, {"device": "b"}, simulated=(120, 360))["device"]["tpot"]["median_ape"] == 0


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"tp": "1"}, {"tp": "1"}),
        ({"tp": "1", "isl": "5"}, {"tp": "2", "isl": "6"}),
        ({"tp": "1", "source": "t"}, {"tp": "2"}),
    ],
)
def test_only_pairs_that_differ_in_one_thing_count(first: dict[str, str], second: dict[str, str]) -> None:
    assert pair(first, second) == {}


# pictures


def test_a_right_value_is_on_the_diagonal_and_everything_in_the_frame() -> None:
    series = {"ttft": [(0.02, 0.02), (3.0, 2.9)], "a < b": [(1.0, 100.0)]}
    root = ET.fromstring(scatter("x & y", series, "s"))
    name = "{http://www.w3.org/2000/svg}"
    line = root.find(f"{name}line")
    dots = [dot for dot in root.iter(f"{name}circle") if dot.get("r") == "2.5"]
    assert line is not None
    assert len(dots) == 3
    x0, y0, x1, y1 = (float(line.get(key, "")) for key in ("x1", "y1", "x2", "y2"))
    x, y = (float(dots[0].get(key, "")) for key in ("cx", "cy"))
    assert (x - x0) / (x1 - x0) == pytest.approx((y - y0) / (y1 - y0), abs=1e-3)
    assert all(x0 <= float(dot.get("cx", "")) <= x1 and y1 <= float(dot.get("cy", "")) <= y0 for dot in dots)
    assert [text.text for text in root.iter(f"{name}text")][-2:] == ["ttft (2)", "a < b (1)"]
    ET.fromstring(scatter("none", {}, "s"))


def test_pictures_are_of_what_is_judged_in_seconds() -> None:
    found = plotted(of(compared(10), compared(10, saturated=True), compared(0, "makespan_s", measured=3.0)))
    assert found == {"apex_plus": {"tpot": [(0.1, pytest.approx(0.11))], "makespan": [(3.0, 3.0)]}}


# the script


def run_script(folder: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    plain = {key: value for key, value in os.environ.items() if key not in ("MIST_DATA", "MIST_KERNEL_TABLES")}
    command = [sys.executable, str(ROOT / "benchmarks" / "validate.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env={**plain, "PYTHONPATH": str(ROOT / "src"), **environment},
                          capture_output=True, text=True, check=False)  # fmt: skip


def test_the_script_makes_page_pictures_and_bands(tmp_path: Path) -> None:
    loads = [
        {**STATIC, "point": "a"},
        {**CLOSED, "point": "b", "measured": "ttft_mean_ms=30 tpot_mean_ms=9"},
        {**OFFLINE, "point": "c"},
        {**CLOSED, "point": "d", "device": "l40s", "measured": "tpot_mean_ms=20"},
    ]
    points = write_points(tmp_path, *loads)
    left_out = tmp_path / "left_out.yaml"
    left_out.write_text(yaml.safe_dump({"l40s": {"vllm-0.10": {"step_overhead_ns": 90_000_000, "overlapped": False}}}))
    arguments = (points, "--docs", tmp_path / "docs", "--workers", 1, "--left-out", left_out)
    done = run_script(tmp_path, *arguments, MIST_KERNEL_TABLES=str(tmp_path / "none"))
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "docs" / "validation.md").read_text()
    assert "Of 5 rows, 5 define a run, and 5 of these (100.0 %) were compared." in text
    device = row(text, "l40s", "roofline")
    assert float(device[-3]) > 300
    assert len(re.findall(r"^\| (roofline|\+ )", text, re.MULTILINE)) == 4
    assert [file.name for file in (tmp_path / "docs" / "validation").iterdir()] == ["made.svg"]
    bands = yaml.safe_load((tmp_path / "docs" / "bands.yaml").read_text())["bands"]
    assert bands["vllm-0.10"].keys() == {"h100-sxm", "l40s"}
    assert bands["vllm-0.10"]["h100-sxm"]["points"] == 1


def test_the_script_says_what_it_lacks(tmp_path: Path) -> None:
    done = run_script(tmp_path, MIST_DATA=str(tmp_path))
    assert done.returncode == 1
    assert "set MIST_DATA to the folder that has validation/points.csv" in done.stderr
