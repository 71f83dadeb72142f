"""The catalogue of memories, the fits behind it, and the sections in which a scenario names them."""

from __future__ import annotations

import csv
import importlib
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter, ValidationError

import mist
from mist.errors import ScenarioError
from mist.memory.eviction.lfu import LFU
from mist.memory.eviction.lru import LRU
from mist.memory.eviction.ttl import TTL
from mist.memory.tier import MemoryTier, Tier
from mist.scenario import catalogue
from mist.scenario.memory import Memory, TierSettings, misfits
from mist.units import GB, GIB, NS_PER_MS, NS_PER_US, TB

CATALOGUE = Path(mist.__file__).parent / "data" / "memories"
STUDIES = Path(__file__).parents[1] / "studies"
NAMES = sorted(path.stem for path in CATALOGUE.glob("*.yaml"))
FITTED = ("ddr4", "nvme")


@pytest.fixture(scope="module")
def study() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(STUDIES))
        return importlib.import_module("memory_tiers")


def memory(name: str) -> MemoryTier:
    value = catalogue.read("memories", name, Path())[0]
    assert isinstance(value, MemoryTier)
    return value


# --- catalogue ---


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_names_its_source(name: str) -> None:
    written = yaml.safe_load((CATALOGUE / f"{name}.yaml").read_text())
    assert written["name"] == memory(name).name == name
    figures = set(written) - {"name", "aliases", "sources"}
    sourced = [key.strip() for keys in written["sources"] for key in keys.split(",")]
    assert sorted(sourced) == sorted(figures)
    assert all(written["sources"].values())


def test_names_and_aliases_are_unique() -> None:
    everything = [name for entry in catalogue.entries("memories") for name in (entry.name, *entry.aliases)]
    assert len(everything) == len({name.lower() for name in everything})
    assert catalogue.names("memories") == NAMES


@pytest.mark.parametrize(
    ("name", "capacity", "rate", "latency", "shared_by", "link_latency", "link"),
    [
        ("lpddr-dedicated", 1, 128, 0.1, 1, 0.5, 128),
        ("platform-dram", 4, 32, 0.1, 4, 1, 16),
        ("rack-ssd", 32, 2, 2, 32, 5, 8),
        ("remote-ssd", 32, 2, 2, 128, 20, 1),
    ],
)
def test_the_cases_of_the_storage_study(
    name: str, capacity: float, rate: float, latency: float, shared_by: int, link_latency: float, link: float
) -> None:
    one = memory(name)
    assert (one.capacity_bytes, one.bytes_per_s, one.latency_ns) == (capacity * TB, rate * GB, latency * NS_PER_MS)
    assert (one.shared_by, one.link_latency_ns, one.link_bytes_per_s) == (
        shared_by,
        link_latency * NS_PER_MS,
        link * GB,
    )
    slower = min(rate, link)
    assert one.fetch_ns(10**9) == round((latency + link_latency + 1000 / slower) * NS_PER_MS)


@pytest.mark.parametrize("name", FITTED)
def test_the_catalogue_has_what_was_fitted(study: ModuleType, name: str) -> None:
    assert study.fitted(name) == (memory(name).latency_ns, memory(name).bytes_per_s)


@pytest.mark.parametrize("name", FITTED)
def test_fitted_reads_are_within_ten_percent(study: ModuleType, name: str) -> None:
    reads = [
        (int(size), time_us * NS_PER_US)
        for size, time_us in zip(study.SIZES, study.MEASURED_US[name], strict=True)
        if size >= study.FITTED_FROM[name]
    ]
    assert len(reads) >= 4
    for size, time_ns in reads:
        assert memory(name).fetch_ns(size) == pytest.approx(time_ns, rel=0.1)


def test_arrays_of_drives_read_and_write_as_measured() -> None:
    folders = [Path(p) / "validation/nonllm_points.csv" for p in os.environ.get("MIST_DATA", "").split(os.pathsep) if p]
    file = next((path for path in folders if path.is_file()), None)
    if file is None:
        pytest.skip("needs the measured points: MIST_DATA=FOLDER with validation/nonllm_points.csv")
    with file.open(newline="") as lines:
        points = {
            (row["device"], row["operation"]): float(row["value"]) * GB
            for row in csv.DictReader(lines)
            if row["stage"] == "storage_bandwidth" and row["block_bytes"] == "1048576"
        }
    for device, name in (("a100-sxm-80gb", "nvme-8x-azure-a100"), ("h100-sxm", "nvme-8x-azure-h100")):
        assert memory(name).bytes_per_s == points[device, "sequential_read"]
        assert memory(name).write_bytes_per_s == points[device, "sequential_write"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"capacity_bytes": None}, "capacity_bytes is missing"),
        ({"bytes_per_s": "fast"}, "bytes_per_s can't be 'fast'"),
        ({"bytes_per_s": 0}, "bytes_per_s must be a number of at least 1"),
        ({"shared_by": 0}, "shared_by must be a number of at least 1"),
        ({"latency_ns": "-1 ms"}, "latency_ns can't be '-1 ms'"),
        ({"hit_rate": 0.5}, "hit_rate is not a known key"),
    ],
)
def test_memories_that_make_no_sense_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ScenarioError, match=message):
        MemoryTier.from_mapping({"name": "m", "capacity_bytes": "1 TB", "bytes_per_s": "1 GB/s", **change})


# --- sections ---


def read(**written: Any) -> MemoryTier:
    return Memory.model_validate(written).tier("host")


def complaints(section: Any, **written: Any) -> list[tuple[tuple[str | int, ...], str]]:
    with pytest.raises(ValidationError) as caught:
        section.model_validate(written)
    return [(e["loc"], e["ctx"]["message"]) for e in caught.value.errors()]


def test_a_memory_is_an_entry_figures_or_both() -> None:
    entry = read(memory="rack-ssd")
    assert (entry.name, entry.capacity_bytes, entry.shared_by, entry.link_bytes_per_s) == ("host", 32 * TB, 32, 8 * GB)
    assert (entry.hit_rate, entry.compression, entry.chunk_tokens, entry.write) == (None, 1.0, 0, "through")
    both = read(memory="ddr5", capacity="256 GiB", shared_by=8)
    assert (both.capacity_bytes, both.bytes_per_s, both.shared_by) == (256 * GIB, 307.2 * GB, 8)
    own = read(capacity="1 TB", bandwidth="20 GB/s", latency="5 us", write_bandwidth="10 GB/s")
    assert (own.capacity_bytes, own.bytes_per_s, own.write_bytes_per_s, own.latency_ns) == (TB, 20 * GB, 10 * GB, 5_000)
    inline = read(memory={"capacity_bytes": "1 TB", "bytes_per_s": "1 GB/s"})
    assert (inline.capacity_bytes, inline.latency_ns) == (TB, 0)


@pytest.mark.parametrize(("written", "policy"), [("lru", LRU), ("lfu", LFU), ({"ttl": {"ttl_s": 600}}, TTL)])
def test_each_instance_has_an_eviction_policy_of_its_own(written: Any, policy: type) -> None:
    spec = read(memory="ddr5", eviction=written)
    one, two = spec.eviction(), spec.eviction()
    assert type(one) is policy
    assert one is not two
    assert Tier(spec, 16).insert((1,), 1, 1, 0) == 16


def test_how_a_memory_is_used() -> None:
    spec = read(memory="nvme", compression=3.5, decode_bandwidth="40 GB/s", chunk_tokens=256, write="back")
    assert (spec.compression, spec.decode_bytes_per_s, spec.chunk_tokens, spec.write) == (3.5, 40 * GB, 256, "back")
    assert read(memory="nvme", hit_rate=0.25).hit_rate == 0.25


@pytest.mark.parametrize(
    ("written", "where", "message"),
    [
        ({}, (), "bandwidth is missing"),
        ({"capacity": "1 TB", "bandwidth": "1 GB/s"}, (), "latency is missing"),
        ({"memory": "dd5"}, ("memory",), "there is no memory 'dd5' in the catalogue"),
        ({"memory": {"capacity_bytes": "1 TB"}}, ("memory",), "bytes_per_s is missing"),
        ({"memory": "ddr5", "capacity": "much"}, ("capacity",), "'much' is not a number with a unit"),
        ({"memory": "ddr5", "capacity": "0 B"}, ("capacity",), "a size of '0 B' is out of range"),
        ({"memory": "ddr5", "per": "rank"}, ("per",), "must be one of 'client', 'node', 'rack' or 'cluster'"),
        ({"memory": "ddr5", "per": "node", "shared_by": 2}, ("shared_by",), "per and shared_by are both given"),
        ({"memory": "ddr5", "eviction": "lfr"}, ("eviction", "lfr"), "there is no eviction policy 'lfr'"),
        ({"memory": "ddr5", "eviction": {"ttl": 0.0}}, ("eviction", "ttl", "ttl_s"), "ttl_s is 0.0"),
        ({"memory": "ddr5", "hit_rate": 1.5}, ("hit_rate",), "must be at most 1, not 1.5"),
        ({"memory": "ddr5", "hit_rate": 0.5, "write": "back"}, ("write",), "hit_rate says what is found, so write"),
        ({"memory": "ddr5", "decode_bandwidth": "1 GB/s"}, ("decode_bandwidth",), "nothing is compressed"),
        ({"memory": "ddr5", "compression": 0.5}, ("compression",), "must be at least 1"),
        ({"memory": "ddr5", "chunk_tokens": 0}, ("chunk_tokens",), "must be at least 1"),
        ({"memory": "ddr5", "size": 1}, ("size",), "there is no key 'size' here"),
    ],
)
def test_what_is_wrong_with_a_memory_is_told_in_its_place(written: Any, where: Any, message: str) -> None:
    found = complaints(Memory, **written)
    assert any(loc == where and text.startswith(message) for loc, text in found), found


def test_settings_of_tiers_need_tiers() -> None:
    assert TierSettings() == TierSettings(tiers=[])
    assert TierSettings(tiers=["host"], fetch="always", layerwise=True).fetch == "always"
    assert complaints(TierSettings, fetch="always") == [(("fetch",), "fetch is for tiers, and there are none")]
    assert complaints(TierSettings, tiers=["a"], fetch="never")[0][0] == ("fetch",)


def test_tiers_of_a_pool_go_together() -> None:
    memories = TypeAdapter(dict[str, Memory]).validate_python(
        {
            "host": {"memory": "ddr5", "chunk_tokens": 256},
            "rack": {"memory": "rack-ssd", "write": "back"},
            "disk": {"memory": "nvme", "chunk_tokens": 256, "write": "back"},
            "rated": {"memory": "remote-ssd", "hit_rate": 0.5},
        }
    )

    def found(*tiers: str) -> list[tuple[tuple[str | int, ...], str]]:
        return [(loc, problem.message) for loc, problem in misfits(tiers, memories)]

    assert found() == found("host", "disk") == found("rated") == found("rack") == []
    assert found("hots") == [((0,), "there is no memory 'hots'")]
    assert found("host", "host") == [((1,), "host is here twice")]
    assert found("rated", "host") == [((1,), "host has no hit_rate, and other tiers have")]
    assert found("host", "rack") == [((1,), "rack takes what host evicts, in chunks of another size")]


def test_the_schema_describes_every_key() -> None:
    for section in (Memory, TierSettings):
        for key, entry in section.model_json_schema()["properties"].items():
            assert entry.get("description"), key
