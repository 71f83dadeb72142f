"""The catalogue of devices: a source beside every figure, names that never clash, and agreement with published tables.

Guards units (GiB against GB, dense against sparse peaks, one direction against two) in data that nothing computes.
Never runs a simulation.
"""

from __future__ import annotations

import csv
import importlib.util
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from mist.hardware import Device
from mist.scenario import catalogue
from mist.units import GIB

ENTRIES = {entry.name: entry for entry in catalogue.entries("devices")}
DATA: dict[str, dict[str, Any]] = {name: entry.source.data() for name, entry in ENTRIES.items()}

#: Ids that published measurements use.
DEVICE_IDS = [
    "h100-sxm", "h200-sxm", "h800-sxm", "h20", "gh200-96", "a100-sxm-40gb", "a100-sxm-80gb", "a100-pcie-80gb",
    "rtx-pro-6000", "mi250", "mi300x", "gaudi2", "sn40l", "epyc-9554", "a10", "arc-pro-b60-dual", "b200-sxm", "gaudi3",
    "gb200", "gb300", "gh200-144", "h100-nvl", "h100-pcie", "h20-3e", "h200-nvl", "jetson-agx-orin-64gb", "l40s",
    "mi325x", "mi355x", "rtx-4090", "tpu-v6e", "tpu-v5e", "tpu-v5p", "tpu-v7", "b300-sxm", "l4", "a30",
]  # fmt: skip
SHORT_NAMES = {"h100": "h100-sxm", "h200": "h200-sxm", "a100": "a100-sxm-80gb", "b200": "b200-sxm", "B200": "b200-sxm",
               "h800": "h800-sxm", "gh200": "gh200-96", "MI300X": "mi300x"}  # fmt: skip

#: Figures for which a device may leave its generic default and then needs no source of its own.
OPTIONAL = {"tdp_w", "link_bytes_per_s", "link_latency_ns", "inter_node_bytes_per_s", "inter_node_latency_ns"}


def device(name: str) -> Device:
    value, _ = catalogue.read("devices", name, Path())
    assert isinstance(value, Device)
    return value


def sourced(sources: dict[str, str]) -> set[str]:
    """The figures that have a source; one line may be the source of several, separated by commas."""
    return {figure.strip() for key, text in sources.items() if text for figure in key.split(",")}


@pytest.mark.parametrize("name", sorted(ENTRIES))
def test_every_figure_has_a_source(name: str) -> None:
    data = DATA[name]
    assert set(data) - {"name", "vendor", "aliases", "sources"} <= sourced(data["sources"])
    assert {"peak_tflops", "memory_bytes", "memory_bytes_per_s", "efficiency"} <= sourced(data["sources"])
    for figure in sourced(data["sources"]) - OPTIONAL:
        key, _, part = figure.partition(".")
        assert not part or part in data.get(key, {}) or key == "efficiency", f"{figure} has a source but no value"


@pytest.mark.parametrize("name", sorted(ENTRIES))
def test_figures_have_plausible_units(name: str) -> None:
    one = device(name)
    assert one.name == name
    assert 8 * GIB < one.memory_bytes < 1024 * GIB
    assert 0.1e12 < one.memory_bytes_per_s < 10e12
    assert 10e9 < one.link_bytes_per_s <= 900e9
    assert (0.05e12 * one.num_cores or 5e12) < one.peak("bf16") < 2.6e15
    assert one.peak("fp8") < 2.03 * one.peak("bf16")
    assert one.tdp_w is None or 50 < one.tdp_w < 2000


@pytest.mark.parametrize("name", sorted(ENTRIES))
def test_memory_and_arithmetic_balance(name: str) -> None:
    """FLOP per byte: tens to hundreds, fewer on a machine's share of a socket; a slip of a thousand shows here."""
    one = device(name)
    assert (3 if one.num_cores else 10) < one.peak("bf16") / one.memory_bytes_per_s < 600


def test_names_are_unique_in_any_case() -> None:
    names = Counter(n.lower() for entry in ENTRIES.values() for n in (entry.name, *entry.aliases))
    assert [name for name, count in names.items() if count > 1] == []


@pytest.mark.parametrize("name", DEVICE_IDS)
def test_ids_of_measurements_resolve(name: str) -> None:
    assert device(name).name == name


@pytest.mark.parametrize(("alias", "name"), SHORT_NAMES.items())
def test_short_names_resolve_in_any_case(alias: str, name: str) -> None:
    assert device(alias).name == name


def test_every_device_is_in_the_documentation() -> None:
    page = (Path(__file__).parent.parent / "docs" / "devices.md").read_text(encoding="utf-8")
    missing = [name for name in ENTRIES if f"`{name}`" not in page]
    assert missing == []


def test_each_file_is_parsed_once(parsed_files: Counter[str]) -> None:
    for name in (*DEVICE_IDS, *SHORT_NAMES, *ENTRIES):
        device(name)
    assert len(parsed_files) == len(ENTRIES)
    assert set(parsed_files.values()) == {1}


def test_devices_of_the_measured_points_resolve() -> None:
    for row in rows("validation/points.csv"):
        device(row["device"])


def test_figures_agree_with_the_table_of_specifications() -> None:
    """`hardware_specs.csv` gives scale-up links in one direction; InferSim's H800 alone counts both."""
    names = {n.lower(): name for name, entry in ENTRIES.items() for n in (entry.name, *entry.aliases)}
    num_compared = 0
    for row in rows("hw/hardware_specs.csv"):
        name = names.get(row["name"].lower())
        if name is None:
            continue
        one, num_compared = device(name), num_compared + 1
        pairs = [
            (row["bf16_dense_tflops"], one.peak("bf16") / 1e12), (row["fp8_dense_tflops"], one.peak("fp8") / 1e12),
            (row["fp4_dense_tflops"], one.peak("fp4") / 1e12), (row["hbm_tb_s"], one.memory_bytes_per_s / 1e12),
            (row["mem_gb"], one.memory_bytes / GIB), (row["tdp_w"], one.tdp_w or 0),
        ]  # fmt: skip
        for given, ours in pairs:
            assert not given or ours == pytest.approx(float(given), rel=0.04), (name, given, ours)
        if row["scaleup_gb_s_unidirectional"] and name != "h800-sxm":
            link = float(row["scaleup_gb_s_unidirectional"])
            assert one.link_bytes_per_s / 1e9 == pytest.approx(link, rel=0.07), name
    assert num_compared >= 10


def test_figures_agree_with_the_operator_package() -> None:
    found = importlib.util.find_spec("aiconfigurator_core")
    if found is None or found.origin is None:
        pytest.skip("aiconfigurator-core isn't installed")
    for system, name in SYSTEMS.items():
        given = yaml.safe_load((Path(found.origin).parent / "systems" / f"{system}.yaml").read_text(encoding="utf-8"))
        gpu, node, one = given["gpu"], given["node"], device(name)
        pairs = [
            (gpu["bfloat16_tc_flops"], one.peak("bf16")), (gpu["mem_capacity"], one.memory_bytes),
            (gpu["mem_bw"], one.memory_bytes_per_s), (gpu["power"], one.tdp_w),
            (node["intra_node_bw"], one.link_bytes_per_s), (gpu["int8_tc_flops"], one.peak("int8")),
        ]  # fmt: skip
        pairs += [(gpu[f"{dtype}_tc_flops"], one.peak(dtype)) for dtype in ("fp8", "fp4") if f"{dtype}_tc_flops" in gpu]
        for theirs, ours in pairs:
            assert ours == pytest.approx(theirs, rel=0.04), (name, theirs, ours)


SYSTEMS = {
    "a100_pcie": "a100-pcie-80gb", "a100_sxm": "a100-sxm-80gb", "a30": "a30", "b200_sxm": "b200-sxm",
    "b300_sxm": "b300-sxm", "b60": "arc-pro-b60", "gb200": "gb200", "gb300": "gb300", "h100_pcie": "h100-pcie",
    "h100_sxm": "h100-sxm", "h200_sxm": "h200-sxm", "l4": "l4", "l40s": "l40s", "rtx_pro_6000_server": "rtx-pro-6000",
}  # fmt: skip


def rows(name: str) -> list[dict[str, str]]:
    roots = [Path(p) for p in os.environ.get("MIST_DATA", "").split(os.pathsep) if p]
    found = [root / name for root in roots if (root / name).is_file()]
    if not found:
        pytest.skip(f"{name} is in no folder of MIST_DATA")
    with found[0].open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
