"""Every column of a point is used, or says why it can't be: devices, links, request lists, loads, trust, engines.

Guards that nothing that a row states is left out in silence, and that results never replace what they came from.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from measured import CLOSED, OFFLINE, OPEN, STATIC, TRACE, invoke, lines, point_file, write_points, write_request_list
from mist.errors import ScenarioError
from mist.validation.engines import engine_profile
from mist.validation.evaluate import Comparison, Evaluated, evaluate
from mist.validation.points import Measured, Point, PointFile, Skip, parse_stages, read_points, sampled
from mist.validation.score import report
from mist.validation.setting import Setting, setting_of
from mist.validation.tables import assumed, covered
from scenarios import sole_table

BASE = {
    "source": "made", "engine": "vllm", "engine_version": "0.10.0", "model": "meta-llama/Llama-3.1-8B",
    "device": "h100-sxm",
}  # fmt: skip
PD = {**BASE, **CLOSED, "topology": "pd", "prefill_pool": "2xTP2", "decode_pool": "1xTP4"}
QUICK = ("--perf", "roofline", "--workers", 1)


def of(columns: dict[str, str], folder: Path = Path(), **changes: str) -> Setting:
    return setting_of(Point("p", {**BASE, **columns, **changes}), folder, perf=["roofline"])


def skip(columns: dict[str, str], folder: Path = Path(), **changes: str) -> str:
    with pytest.raises(Skip) as found:
        of(columns, folder, **changes)
    return str(found.value)


def rows_of(folder: Path, *points: dict[str, str]) -> list[Evaluated]:
    file = read_points(write_points(folder, *points))
    return evaluate(file.points, folder, perf=["roofline"], workers=1)


# trust and configuration by row


def test_each_row_has_its_own_trust(tmp_path: Path) -> None:
    static = {**STATIC, "point": "one", "measured": "batch_e2e_s=1"}
    path = write_points(tmp_path, {**static, "trust": "C"}, {**static, "trust": "A"}, {**static, "trust": "Z"})
    (point,) = read_points(path).points
    (found,) = evaluate([point], tmp_path, perf=["roofline"], workers=1)
    assert [c.trust for c in found.comparisons] == ["C", "A"]
    assert [reason for _, reason in found.skipped] == ["trust is 'Z', not A, B or C"]


def test_saturation_is_judged_by_rows_that_are_not_compared(tmp_path: Path) -> None:
    rate, wait = {**OPEN, "point": "one", "measured": "output_tokens_per_s=10"}, {**OPEN, "point": "one"}
    path = write_points(tmp_path, {**rate, "trust": "B"}, {**wait, "trust": "A", "measured": "ttft_mean_ms=30"})
    file = read_points(path, trusts=["A"])
    (found,) = evaluate(file.points, tmp_path, perf=["roofline"], workers=1)
    assert [(c.metric, c.saturated) for c in found.comparisons] == [("ttft_mean_ms", True)]
    assert file.num_rows == 1


def test_a_row_of_another_configuration_is_a_skip(tmp_path: Path) -> None:
    one = {**STATIC, "point": "one", "measured": "batch_e2e_s=1", "date": "2024", "note": "x"}
    path = write_points(tmp_path, one, {**one, "tp": "2", "isl": "9"}, {**one, "date": "2025", "note": "y"})
    (point,) = read_points(path).points
    assert len(point.measured) == 2
    assert [reason for _, reason in point.skipped] == ["isl, tp: not as in the point's first row"]


# devices


def test_devices_are_those_of_the_setting() -> None:
    assert of(CLOSED, tp="2", dp="3").num_devices == 6
    assert of(PD).num_devices == 8
    assert of(PD, num_devices="8").num_devices == 8


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({**CLOSED, "tp": "2", "dp": "2", "num_devices": "8"}, "8 devices are not tp 2 x pp 1 x attn_dp 1 x dp 2"),
        ({**PD, "num_devices": "6"}, "6 devices are not the 8 of the pools"),
        ({**PD, "decode_pool": "0xTP4"}, "decode_pool is '0xTP4'"),
        ({**PD, "pp": "3"}, "2 devices of a prefill worker are not whole pp 3 x attn_dp 1"),
        ({**PD, "dp": "2"}, "dp is 2, and the pools say how many devices there are"),
        ({**PD, "ep": "3"}, "ep 3 divides the devices of no pool"),
    ],
)
def test_devices_that_contradict_each_other_are_a_skip(columns: dict[str, str], reason: str) -> None:
    assert reason in skip(columns)


def test_rates_per_device_are_over_the_devices_of_the_setting(tmp_path: Path) -> None:
    many = {
        **CLOSED,
        "tp": "2",
        "num_devices": "",
        "measured": "output_tokens_per_s=1 output_tokens_per_s_per_device=1",
    }
    ((whole, each),) = (found.comparisons for found in rows_of(tmp_path, many))
    assert whole.simulated == pytest.approx(2 * each.simulated)


def test_parallelism_is_that_of_both_pools() -> None:
    pools: Any = of(PD, pp="2", ep="2", model="Qwen/Qwen3-30B-A3B").scenario.clients
    assert [(p.tp, p.pp, p.ep, p.count) for p in pools.values()] == [(1, 2, 1, 2), (2, 2, 2, 1)]


# links


def test_a_replica_over_nodes_has_the_rows_link() -> None:
    device = of(CLOSED, tp="16", num_nodes="4", interconnect="roce:200").scenario.clients["gpu"].device
    assert (device.inter_node_bytes_per_s, device.scale_up_domain) == (50e9, 4)
    plain = of(CLOSED, tp="4", dp="2", num_devices="8", num_nodes="2", interconnect="roce:200").scenario.clients["gpu"]
    assert plain.device == of(CLOSED).scenario.clients["gpu"].device
    assert "evenly over 3 nodes" in skip(CLOSED, tp="4", num_nodes="3")


def test_pcie_between_devices_is_their_link() -> None:
    def link(text: str) -> float:
        return of(CLOSED, tp="2", interconnect=text).scenario.clients["gpu"].device.link_bytes_per_s

    host = of(CLOSED).scenario.clients["gpu"].device.host_link_bytes_per_s
    assert (link("pcie:20"), link("pcie"), link("nvlink4:900")) == (20e9, host, link(""))


@pytest.mark.parametrize(("text", "bandwidth"), [("nvlink4:900", 900e9), ("PCIe:32", 32e9), ("nvlink", 450e9)])
def test_links_have_generations_and_names(text: str, bandwidth: float) -> None:
    link = of(PD, interconnect=text).scenario.network.kv_transfer
    assert link is not None
    assert link.bytes_per_s == pytest.approx(0.73 * bandwidth)


def test_pcie_without_a_figure_is_the_link_to_the_host() -> None:
    scenario = of(PD, interconnect="pcie").scenario
    assert scenario.network.kv_transfer is not None
    assert scenario.network.kv_transfer.bytes_per_s == pytest.approx(
        0.73 * scenario.clients["decode"].device.host_link_bytes_per_s
    )


# values that nobody knows


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({**CLOSED, "topology": "ring"}, "topology is 'ring'"),
        ({**CLOSED, "kv_offload": "disk"}, "kv_offload is 'disk', not none or cpu"),
        ({**CLOSED, "chunked_prefill": "maybe"}, "chunked_prefill is 'maybe', not true or false"),
        ({**CLOSED, "arrival": "poisson"}, "a closed loop with arrivals 'poisson'"),
        ({**PD, "interconnect": "pigeon"}, "interconnect is 'pigeon', of which no GB/s are stated"),
        ({**PD, "interconnect": "roce:fast"}, "interconnect is 'roce:fast'"),
        ({**CLOSED, "concurrency": "0"}, "concurrency is 0"),
        ({**OPEN, "rate_per_s": "0"}, "rate_per_s is 0"),
        ({**STATIC, "batch_size": "0"}, "batch_size is 0"),
        ({**OFFLINE, "num_requests": "0"}, "num_requests is 0"),
        ({**CLOSED, "prefix_cached_tokens": "129"}, "prefix_cached_tokens is 129, and a prompt has 128 tokens"),
        ({**STATIC, "workload_file": "list.csv"}, "a static batch with a request list"),
        ({**OPEN, "stages": "nan:3s"}, "stages are 'nan:3s'"),
    ],
)
def test_what_nobody_knows_is_a_skip(columns: dict[str, str], reason: str) -> None:
    assert reason in skip(columns)


def test_values_are_read_as_they_are_meant() -> None:
    assert parse_stages("8:600s;20:30;") == [(8, 600), (20, 30)]
    for text in ("8:infs", "inf:3s", "8:nan", "0:3s", "8:0s", ";"):
        with pytest.raises(Skip, match="stages are"):
            parse_stages(text)
    assert of(CLOSED, spec_decode="None").scenario.clients["gpu"].speculation is None
    drafts = of(CLOSED, spec_decode="EAGLE:3:0.5").scenario.clients["gpu"].speculation
    assert drafts is not None
    assert drafts.method == "eagle"
    assert of(CLOSED, prefix_cached_tokens="128").scenario.tenants[""].workload.cached_tokens is not None


def test_one_value_that_cannot_be_computed_costs_no_other(tmp_path: Path) -> None:
    (found,) = rows_of(tmp_path, {**CLOSED, "measured": "ttft_p999_ms=9 ttft_p99_ms=9 itl_p5_ms=9"})
    assert [c.metric for c in found.comparisons] == ["ttft_p99_ms"]
    assert "there is no metric 'ttft_p999_ms'" in dict(found.skipped).values()


def test_an_answer_of_nothing_has_no_metrics_of_answers(tmp_path: Path) -> None:
    (found,) = rows_of(tmp_path, {**STATIC, "osl": "0", "measured": "batch_prefill_ms=9 tpot_mean_ms=9"})
    assert [c.metric for c in found.comparisons] == ["batch_prefill_ms"]
    assert [reason for _, reason in found.skipped] == ["osl is 0"]


def test_offloading_is_told(tmp_path: Path) -> None:
    path = write_points(tmp_path, {**STATIC, "kv_offload": "cpu", "measured": "batch_e2e_s=1 tpot_mean_ms=1"}, STATIC)
    document = json.loads(invoke("validate", path, "--json", *QUICK).stdout)
    assert document["coverage"]["assumptions"] == {"KV offload to the host is taken to cost nothing": 2}
    assert assumed(document) == ["2 rows: KV offload to the host is taken to cost nothing."]
    assert assumed(document)[0] in invoke("validate", path, *QUICK).stdout


# request lists


def test_what_stands_beside_a_request_list_is_used(tmp_path: Path) -> None:
    listed = write_request_list(tmp_path)
    found = sole_table(of(TRACE, tmp_path, num_requests="3", prefix_cached_tokens="50").scenario)
    assert found.input_tokens.tolist() == [80, 90, 100]
    assert found.cached_tokens is not None
    assert found.cached_tokens.tolist() == [50] * 3
    assert "num_requests is 6, and the request list list.csv has 5" in skip(TRACE, tmp_path, num_requests="6")
    for load in ({**CLOSED, "num_requests": ""}, {**OFFLINE, "num_requests": ""}):
        assert len(sole_table(of(load, tmp_path, workload_file="list.csv").scenario)) == 5
    listed.write_bytes(gzip.compress(listed.read_bytes()))
    assert len(sole_table(of(TRACE, tmp_path).scenario)) == 5


def test_a_trace_needs_all_its_arrivals(tmp_path: Path) -> None:
    listed = write_request_list(tmp_path)
    listed.write_text(listed.read_text().replace("0.5,90", ",90"))
    assert "lacks arrival times" in skip(TRACE, tmp_path)
    assert of(OPEN, tmp_path, workload_file="list.csv", num_requests="").scenario.tenants[""].workload.trace is not None
    listed.write_text("arrival_s,input_tokens,output_tokens\n")
    assert "is empty" in skip(TRACE, tmp_path)


# saturation


def measured(*rows: tuple[str, float], **columns: str) -> Point:
    point = Point("p", {"isl": "300", "osl": "100", "rate_per_s": "10", **columns})
    point.measured = [Measured(str(i), *row) for i, row in enumerate(rows)]
    return point


@pytest.mark.parametrize(
    ("metric", "limit"),
    [("output_tokens_per_s_per_device", 475), ("requests_per_s", 9.5), ("total_tokens_per_s", 3800)],
)
def test_every_throughput_tells_of_saturation(metric: str, limit: float) -> None:
    assert measured((metric, 0.999 * limit)).open_loop_saturated(2)
    assert not measured((metric, 1.001 * limit)).open_loop_saturated(2)


def test_repeats_are_averaged_and_a_traces_own_rate_counts() -> None:
    spans = measured(("makespan_s", 20), ("makespan_s", 24), num_requests="200")
    assert spans.open_loop_saturated()
    output = measured(("output_tokens_per_s", 900), ("ttft_mean_ms", 10), rate_per_s="")
    assert output.open_loop_saturated(1, 10)
    assert not output.open_loop_saturated(1, 9)
    assert not output.open_loop_saturated()


def test_a_trace_is_judged_by_the_arrivals_of_its_list(tmp_path: Path) -> None:
    write_request_list(tmp_path)  # 5 requests in 2 s: 15 tokens/s of 6 each
    trace = {**TRACE, "measured": "output_tokens_per_s=14"}
    found = [rows_of(tmp_path, {**trace, "measured": f"output_tokens_per_s={v}"})[0] for v in (14, 15)]
    assert [c.saturated for each in found for c in each.comparisons] == [True, False]


# engines


def test_an_engine_inside_another_is_found_by_its_date() -> None:
    nim = {"engine": "nim", "engine_version": "1.8", "load": "closed_loop", "date": "2025-02"}
    assert engine_profile(Point("p", nim))["name"] == "trtllm-0.17"


@pytest.mark.parametrize("engine", ["unknown", "", "llamacpp"])
def test_a_harness_is_no_server(engine: str) -> None:
    for load in ("closed_loop", "open_loop", "trace", "offline"):
        with pytest.raises(Skip, match="no profile of a server"):
            engine_profile(Point("p", {"engine": engine, "load": load, "device": "h100-sxm"}))
    assert engine_profile(Point("p", {"engine": engine, "load": "static_batch", "device": "h100-sxm"}))


# files


def test_headers_have_spaces_and_no_column_twice(tmp_path: Path) -> None:
    head, row = lines("a,1,s,ttft_mean_ms,30")
    path = point_file(tmp_path, [head.replace(",", " , "), row])
    assert read_points(path).points[0].name == "a"
    path = point_file(tmp_path, [f"{head},load ", f"{row},offline"])
    with pytest.raises(ScenarioError, match="the column 'load' is there twice"):
        read_points(path)


def test_an_archive_is_known_by_its_bytes(tmp_path: Path) -> None:
    text = "\n".join(lines("a,1,s,ttft_mean_ms,30")).encode()
    for name, content in (("points.csv", gzip.compress(text)), ("points.csv.gz", text)):
        path = tmp_path / name
        path.write_bytes(content)
        assert len(read_points(path).points) == 1


def test_runnable_has_several_words(tmp_path: Path) -> None:
    head, *rows = lines(*(f"{i},{i},s,ttft_mean_ms,30" for i in range(5)))
    words = ("true", "1", "YES", "no", "")
    path = point_file(tmp_path, [f"{head},runnable", *(f"{row},{word}" for row, word in zip(rows, words, strict=True))])
    assert [p.name for p in read_points(path).points] == ["0", "1", "2", "4"]


def test_a_sample_says_what_it_is_of(tmp_path: Path) -> None:
    rows = write_points(tmp_path, *[STATIC] * 4, {**STATIC, "runnable": "no"})
    file = sampled(read_points(rows), 1)
    document = report(file, evaluate(file.points, tmp_path, perf=["roofline"], workers=1))
    assert covered(document) == "1 of 1 sampled rows were compared (100.0 %); the file has 5, of which 4 are runnable."


def test_devices_come_together_whatever_they_are_called() -> None:
    def compared(device: str) -> Comparison:
        return Comparison("i", "p", "s", "ttft_mean_ms", 1, 1, 0, 0, False, "A", device, "vllm", "m", "vllm-0.10")

    done = [Evaluated("p", (compared("h100-sxm"), compared("h100_sxm"), compared("mine")), ())]
    found = report(PointFile(Path("points.csv"), [], 3, []), done)["devices"]
    assert {device: table["ttft_mean_ms"]["n"] for device, table in found.items()} == {"h100-sxm": 2, "mine": 1}


@pytest.mark.parametrize("name", ["comparisons.csv", "journal.jsonl"])
def test_results_never_replace_what_they_came_from(tmp_path: Path, name: str) -> None:
    listed = write_request_list(tmp_path).rename(tmp_path / name)
    whole = listed.read_bytes()
    path = write_points(tmp_path, {**TRACE, "workload_file": name})
    found = invoke("validate", path, "--out", tmp_path, "--overwrite", *QUICK)
    assert found.exit_code == 2
    assert f"would replace {listed}" in " ".join(found.stderr.split())
    assert listed.read_bytes() == whole
    same = write_points(tmp_path, STATIC, name=name)
    assert invoke("validate", same, "--out", tmp_path, "--overwrite", *QUICK).exit_code == 2


def test_points_in_the_folder_of_the_results_stay(tmp_path: Path) -> None:
    path = write_points(tmp_path, STATIC)
    whole = path.read_bytes()
    assert invoke("validate", path, "--out", tmp_path, "--overwrite", *QUICK).exit_code == 0
    assert path.read_bytes() == whole
    assert (tmp_path / "comparisons.csv").is_file()
