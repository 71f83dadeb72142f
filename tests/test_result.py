"""What a result prints, tabulates and writes."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from rich.console import Console

from handmade import Story, random_story
from mist.errors import ScenarioError
from mist.metrics import ClientInfo, summarise
from mist.records import FINISHED, Records
from mist.scenario.result import PLAIN_WIDTH, RESULT_FILES, Result, check_output_folder
from mist.scenario.result_table import _rate, _size

FILES = sorted(RESULT_FILES)


def make(story: Story, *, run_s: float = 0.5, **options) -> Result:
    return Result(
        name="news search on mixed hardware",
        scenario={"name": "news search on mixed hardware", "seed": 7, "clients": {"gpu": {"count": 2}}},
        records=story.records,
        metrics=summarise(story.records, clients=story.clients, **options),
        simulator={"version": "0.1.0", "events": 1234, "steps": len(story.records.steps)},
        timing={"startup_s": 0.1, "run_s": run_s, "wall_s": 0.1 + run_s},
    )


@pytest.fixture
def result() -> Result:
    return make(random_story(2, num_clients=3, disaggregated=True, cut=150_000_000))


# --- columns ---


def test_request_columns_are_in_order_and_in_seconds(result):
    columns = result.requests
    assert columns["request"].tolist() == sorted(columns["request"].tolist())
    rows = result.records.requests.as_columns()
    for i, request in enumerate(columns["request"].tolist()):
        row = int(np.flatnonzero(rows["request"] == request)[0])
        assert columns["arrival_s"][i] == rows["arrival_ns"][row] / 1e9
        finished = rows["status"][row] == FINISHED
        assert (columns["status"][i] == "finished") == finished
        assert np.isnan(columns["e2e_s"][i]) == (not finished)
        if finished:
            parts = sum(columns[name][i] for name in ("wait_s", "serve_s", "transfer_s"))
            assert parts == pytest.approx(columns["e2e_s"][i])


def test_columns_agree_with_the_summary(result):
    summary, columns = result.summary(), result.requests
    for metric in ("ttft_s", "tpot_s", "e2e_s"):
        known = columns[metric][~np.isnan(columns[metric])]
        assert summary[metric]["p90"] == pytest.approx(np.percentile(known, 90))
    for kind in ("wait_s", "serve_s", "transfer_s"):
        means = [parts[kind]["mean"] for parts in summary["stages"].values()]
        assert sum(means) == pytest.approx(np.nanmean(columns[kind]))


def test_rejected_requests_name_the_reason(result):
    columns = result.requests
    rejected = columns["status"] == "rejected"
    assert set(columns["reason"][rejected]) == {"too long"}
    assert set(columns["reason"][~rejected]) == {None}


def test_step_columns_are_in_order_of_time(result):
    columns = result.steps
    assert (np.diff(columns["start_s"]) >= 0).all()
    assert set(columns["client"]) == {"gpu-0", "gpu-1", "gpu-2"}
    assert columns["duration_s"] == pytest.approx(columns["end_s"] - columns["start_s"])


def test_task_columns_follow_each_request(result):
    columns = result.tasks
    assert set(columns["stage"]) == {"prefill", "decode"}
    assert {"done", "preempted"} <= set(columns["how"])
    same = columns["request"][1:] == columns["request"][:-1]
    assert (columns["queued_s"][1:][same] >= columns["end_s"][:-1][same]).all()


# --- printed ---


def test_the_printed_form_says_all_there_is_to_say():
    slo = {"ttft_s": {"p99": 1e-6}, "tpot_s": {"p50": 1.0}}
    result = make(random_story(2, num_clients=3, disaggregated=True), slo=slo, window=(20_000_000, None))
    page = str(result)
    for words in ("news search on mixed hardware", "arrived", "requests/s", "mean", "P50", "P99", "TTFT", "TPOT",
                  "ITL", "E2E", "2 x decode", "busy", "Offered", "KV tokens", "preemptions", "wait", "serve",
                  "transfer", "≤", "missed", "met", "Goodput", "Not saturated", "that arrived from",
                  "MIST 0.1.0"):  # fmt: skip
        assert words in page
    assert "nan" not in page.lower()
    assert "None" not in page


def test_the_printed_form_is_plain_narrow_and_repeatable(result):
    page = str(result)
    assert "\x1b" not in page
    assert max(len(line) for line in page.splitlines()) <= PLAIN_WIDTH
    assert not any(line.endswith(" ") for line in page.splitlines())
    again = make(random_story(2, num_clients=3, disaggregated=True, cut=150_000_000), run_s=99.0)
    assert str(again) == page


def test_numbers_of_a_table_stand_under_each_other(result):
    lines = str(result).splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("Latency"))
    ends = [[match.end() for match in re.finditer(r"\S+", line)] for line in lines[first : first + 5]]
    assert all(row[1:5] == ends[0][1:5] for row in ends)


def test_a_terminal_gets_colours(result):
    console = Console(force_terminal=True, color_system="standard", width=120, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.capture() as capture:
        console.print(result)
    assert "\x1b[" in capture.get()


def test_long_names_and_large_numbers_leave_figures_whole():
    records = Records(client_names=["a-rather-long-name-of-a-pool-of-clients-0"], stage_kinds=["prefill"])
    records.requests.append((0, 0, 10**12, 2 * 10**12, FINISHED, -1, 8, 2, 0, 0))
    records.steps.append((0, 0, 10**12, 1, 8, 0, 0, 99, 0))
    clients = [ClientInfo(records.client_names[0], "a-rather-long-name-of-a-pool-of-clients", 1_000_000, 16, 256)]
    page = str(Result("big", {}, records, summarise(records, clients=clients)))
    assert "16,000,000" in page
    assert "1,000.0" in page
    assert "…" not in page


def at_width(result: Result, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    with console.capture() as capture:
        console.print(result)
    return capture.get()


def tables(page: str) -> list[str]:
    """What the tables of a page say, word by word."""
    lines = page.splitlines()
    first = next(i for i, line in enumerate(lines) if line.split()[:1] == ["Latency"])
    last = next(i for i, line in enumerate(lines) if line.startswith("Goodput"))
    return sorted(set(" ".join(lines[first:last]).split()))


@pytest.mark.parametrize("width", [24, 40, 50, 60, 80, 100])
def test_no_width_cuts_a_figure_a_name_or_a_unit(width):
    story = random_story(2, num_clients=3, disaggregated=True)
    pool = {"prefill": "a-pool-of-length-23-abc", "decode": "decode"}
    clients = [ClientInfo(c.name, pool.get(c.pool, c.pool), 1_000_000, 16, 256) for c in story.clients]
    slo = {"ttft_s": {"p99": 1e-6, "p99.9": 0.25}}
    result = Result("wide", {}, story.records, summarise(story.records, clients=clients, slo=slo))
    result.metrics["clients"]["decode"].update(preemptions=12_345_678, prefix_hit_rate=0.123)
    page = at_width(result, width)
    assert tables(page) == tables(at_width(result, 300))
    assert max(len(line) for line in page.splitlines()) <= width
    assert "12,345,678" in page
    assert "32,000,000" in page
    assert "…" not in page


def test_a_narrow_page_lists_figures_with_their_units(result):
    page = at_width(result, 24)
    lines = [line.rstrip() for line in page.splitlines()]
    first = lines.index("TTFT")
    assert re.fullmatch(r"  mean [0-9.]+ (s|ms|µs)", lines[first + 1])
    for share in ("share of E2E", "share of TTFT"):
        assert re.fullmatch(rf"  {share} [0-9.]+%", next(line for line in lines if share in line))


def test_each_stage_has_a_unit_and_shares_that_sum_to_all():
    result = make(random_story(2))
    stages = result.metrics["stages"]
    total = {"e2e_s": 10.0, "ttft_s": 0.004}
    for metric, mean in total.items():
        result.metrics[metric]["mean"] = mean
    for kind, (served, before) in {"prefill": (3e-3, 3e-3), "decode": (9.997, 1e-3)}.items():
        stages[kind] = {part: {"mean": 0.0} for part in ("wait_s", "transfer_s")}
        stages[kind] |= {"serve_s": {"mean": served}, "ttft_s": {"mean": before}}
    rows = {line.split()[0]: line.split()[1:] for line in at_width(result, 120).splitlines() if line.strip()}
    assert rows["prefill"] == ["-", "3.00", "-", "ms", "<0.1%", "75%"]
    assert rows["decode"] == ["-", "10.00", "-", "s", ">99.9%", "25%"]


def test_rates_have_three_digits():
    rates = [0.0, 0.00123, 0.5, 1.0, 9.996, 12.0, 12.1, 20.98, 99.96, 1234.5]
    assert [_rate(rate) for rate in rates] == [
        "0", "0.00123", "0.5", "1.00", "10.0", "12.0", "12.1", "21.0", "100", "1,234",
    ]  # fmt: skip


def test_sizes_have_the_unit_that_suits_them():
    sizes = [0, 17, 2_000, 999_400, 999_500, 1.234e9, 9.9996e11, 1.132e13, 1.2345e15]
    assert [_size(int(size)) for size in sizes] == [
        "-", "17 B", "2.00 kB", "999 kB", "1.00 MB", "1.23 GB", "1.00 TB", "11.3 TB", "1,234 TB",
    ]  # fmt: skip


def test_targets_are_printed_as_they_were_given():
    story = random_story(2)
    result = make(story, slo={"ttft_s": {"p99": 0.25}, "e2e_s": {"p50": 1.125, "mean": 90}})
    result.metrics["slo"]["targets"][0]["actual_s"] = 123.4
    page = str(result)
    for words in ("≤ 250 ms", "123.4 s", "≤ 1.125 s", "≤ 90 s"):
        assert words in page


def test_almost_all_is_not_all():
    result = make(random_story(2), slo={"ttft_s": {"p99": 1.0}})
    result.metrics["slo"]["attainment"] = 0.9999
    for pool in result.metrics["clients"].values():
        pool["utilisation"] = 0.996
    page = str(result)
    assert ">99.9% of requests met all" in page
    assert "99.6%" in page


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "Not saturated: at most 7 requests waited for gpu while load arrived, 0 on average in its first tenth and "
             "0.3 in its last."),
        ({"backlog": {"pool": "gpu", "waiting_first": 0.0, "waiting_last": 0.0, "waiting_peak": 1}},
         "Not saturated: at most 1 request waited for gpu"),
        ({"backlog": {"pool": "gpu", "waiting_first": 0.0, "waiting_last": 0.0, "waiting_peak": 0}},
         "Not saturated: no request waited."),
        ({"near_capacity": True, "backlog": {"pool": "gpu", "waiting_first": 1.2, "waiting_last": 231.4,
                                             "waiting_peak": 250}},
         "Near capacity: the queue of gpu grew from 1.2 to 231 waiting over the run; a longer run would tell"),
        ({"saturated": True, "saturation_reason": "the queue grew"}, "Saturated: the queue grew."),
        ({"requests": {"arrived": 5, "finished": 0, "rejected": 5}}, "Nothing was served: no request finished."),
    ],
)  # fmt: skip
def test_the_verdict_says_what_was_seen(changes, words):
    result = make(random_story(2))
    result.metrics["backlog"] = {"pool": "gpu", "waiting_first": 0.0, "waiting_last": 0.31, "waiting_peak": 7}
    result.metrics.update({"saturated": False, "near_capacity": False, **changes})
    page = " ".join(str(result).split())
    assert words in page
    assert ("Not saturated" in page) == words.startswith("Not saturated")


def test_markup_in_names_is_printed_as_it_is():
    story = random_story(1, num_clients=1)
    clients = [ClientInfo("[red]-0", "[red]", 100, 16)]
    assert "[red]" in str(Result("[bold]", {}, story.records, summarise(story.records, clients=clients)))


def test_nothing_happened_prints_too():
    records = Records(client_names=["gpu"], stage_kinds=["prefill", "decode"])
    page = str(Result("empty", {}, records, summarise(records, clients=[ClientInfo("gpu", "gpu")])))
    assert "0 arrived" in page
    assert "nan" not in page


# --- JSON and files ---


def test_the_json_document_has_timing_in_one_place(result):
    document = json.loads(result.to_json())
    assert document == result.summary()
    assert document["simulator"] == {
        "version": "0.1.0", "events": 1234, "steps": len(result.records.steps),
        "timing": {"startup_s": 0.1, "run_s": 0.5, "wall_s": 0.6},
    }  # fmt: skip
    assert document["schema_version"] == 1


def test_written_files_are_readable_by_others(result, tmp_path):
    folder = result.write(tmp_path / "out")
    assert sorted(p.name for p in folder.iterdir()) == FILES
    assert json.loads((folder / "summary.json").read_text()) == result.summary()
    assert yaml.safe_load((folder / "scenario.yaml").read_text()) == result.scenario
    requests = pq.read_table(folder / "requests.parquet")
    assert requests.column_names == list(result.requests)
    unfinished = sum(status != "finished" for status in requests["status"].to_pylist())
    assert requests["e2e_s"].null_count == unfinished > 0
    steps = pq.read_table(folder / "steps.parquet")
    assert steps.num_rows == len(result.records.steps)
    assert steps["client"].to_pylist() == result.steps["client"].tolist()
    assert steps["num_decodes"].to_pylist() == result.steps["num_decodes"].tolist()


def test_equal_runs_write_equal_bytes_but_for_timing(tmp_path):
    first = make(random_story(4)).write(tmp_path / "first")
    second = make(random_story(4), run_s=1.25).write(tmp_path / "second")
    for name in FILES[:3]:
        assert (first / name).read_bytes() == (second / name).read_bytes()
    documents = [json.loads((folder / "summary.json").read_text()) for folder in (first, second)]
    assert documents[0] != documents[1]
    for document in documents:
        del document["simulator"]["timing"]
    assert json.dumps(documents[0]) == json.dumps(documents[1])


def test_bytes_do_not_depend_on_the_hash_seed(tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from test_result import make; "
        "from handmade import random_story; make(random_story(4)).write(sys.argv[2])"
    )
    for seed in ("1", "2"):
        subprocess.run(
            [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path / seed)],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)}, check=True,
        )  # fmt: skip
    for name in FILES:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_a_folder_in_use_is_refused_and_left_alone(result, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ScenarioError, match="isn't empty") as error:
        result.write(tmp_path / "out")
    assert "--overwrite" in str(error.value)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["notes.txt"]


def test_overwriting_replaces_results_and_keeps_the_rest(result, tmp_path):
    folder = result.write(tmp_path / "out")
    (folder / "notes.txt").write_text("mine")
    (folder / "summary.json").write_text("old")
    result.write(folder, overwrite=True)
    assert sorted(p.name for p in folder.iterdir()) == sorted([*FILES, "notes.txt"])
    assert (folder / "notes.txt").read_text() == "mine"
    assert json.loads((folder / "summary.json").read_text()) == result.summary()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_is_fine(result, tmp_path):
    (tmp_path / "out").mkdir()
    result.write(tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == FILES


@pytest.mark.parametrize("failing", ["_write_parquet", "_take_place"])
def test_a_crash_leaves_earlier_results_whole(result, tmp_path, monkeypatch, failing):
    folder = result.write(tmp_path / "out")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"mist.scenario.result.{failing}", crash)
    with pytest.raises(KeyboardInterrupt):
        make(random_story(9)).write(folder, overwrite=True)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_file_or_the_working_folder_cannot_hold_results(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ScenarioError, match="is a file"):
        check_output_folder(tmp_path / "file")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ScenarioError, match="the folder we are in"):
        check_output_folder(".", overwrite=True)
    check_output_folder("out")
