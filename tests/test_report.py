"""The report of a run: well-formed, whole without a network, its figures the summary's, and no run that breaks it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import mist
from handmade import random_story
from mist.cli import main
from mist.metrics import ClientInfo, summarise
from mist.records import FINISHED, REJECTED, Records
from mist.report.anatomy import PARTS, anatomies
from mist.report.html import SECTIONS, report_html, write_report
from mist.report.html.figures import percent, seconds, slowdown
from mist.report.html.sections import cluster, stages
from mist.report.html.sections.headline import expected_range
from mist.report.html.sections.slowest import slowest
from mist.report.html.view import View
from mist.scenario.result import Result
from mist.scenario.stored import read_result
from test_result import make

VOID = {"meta", "br"}


class Page(HTMLParser):
    """A page read strictly: every element is closed in order, no id is there twice."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.names: set[str] = set()
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open
        assert len(self.ids) == len(set(self.ids))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.names.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        self.ids += [values["id"]] if values.get("id") else []
        self.links += [str(values[key]) for key in ("href", "src", "action", "srcset", "data") if key in values]
        assert not [name for name in values if name.startswith("on")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.texts.append(data)


def small(**changes: Any) -> Result:
    data: dict[str, Any] = {
        "name": "small", "seed": 5,
        "workload": {"arrivals": {"poisson": {"rate_per_s": 8}}, "num_requests": 60, "input_tokens": 400,
                     "output_tokens": {"uniform": {"low": 1, "high": 60}}},
        "clients": {"gpu": {"device": "h100-sxm", "count": 2, "model": "llama-3.1-8b", "perf": "roofline"}},
        "slo": {"ttft_s": {"p99": 0.5}, "e2e_s": {"p90": 0.001}},
    }  # fmt: skip
    return mist.run(data | changes)


@pytest.fixture(scope="module")
def result() -> Result:
    return small()


# --- the page ---


def check(text: str) -> Page:
    page = Page(text)
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert not {"iframe", "img", "object", "embed", "link", "base", "form"} & page.names
    assert "@import" not in text
    assert "url(" not in text
    anchors = [link[1:] for link in page.links if link.startswith("#")]
    assert set(anchors) <= set(page.ids)
    assert "default-src 'none'" in text
    # a screen reader names every column, and tells a section from the tables in it
    assert not re.search(r"<th( [^>]*)?></th>", text)
    titles, regions = re.findall(r"<h2[^>]*>(.*?)</h2>", text), re.findall(r'role="region" aria-label="(.*?)"', text)
    assert not set(titles) & set(regions)
    return page


def test_the_page_is_well_formed_and_asks_for_nothing(result):
    page = check(report_html(result))
    sections = {"summary", "latency", "stages", "time", "steps", "cluster", "slowest", "provenance", "scenario"}
    assert sections <= set(page.ids)
    assert report_html(result) == report_html(result)


@pytest.mark.parametrize("seed", range(6))
def test_any_records_make_a_page(seed):
    check(report_html(make(random_story(seed, num_clients=3, disaggregated=seed % 2 == 1, cut=120_000_000))))


def test_its_figures_are_the_summarys(result):
    page, summary = check(report_html(result)), result.summary()
    for metric in ("ttft_s", "tpot_s", "itl_s", "e2e_s"):
        for statistic in ("mean", "p50", "p90", "p99"):
            assert seconds(summary[metric][statistic]) in page.texts
    assert f"{summary['requests']['finished']:,}" in page.texts
    for replica in summary["clients"]["gpu"]["replicas"]:
        assert percent(replica["utilisation"]) in page.texts
    for target in summary["slo"]["targets"]:
        assert f"≤ {seconds(target['target_s'])}" in page.texts
    assert page.texts.count("met") == 1
    assert page.texts.count("missed") == 1


def test_names_cannot_become_markup():
    evil = "</script><script>alert(1)</script>"
    story = random_story(3, num_clients=2)
    names = [f"{evil}-0", f"{evil}-1"]
    story.records.client_names[:], story.records.stage_kinds[:] = names, [evil, "a<b>&"]
    clients = [ClientInfo(name, evil, 100, 16, 3) for name in names]
    metrics = summarise(story.records, clients=clients) | {"notes": [evil]}
    text = report_html(Result(evil, {"name": evil, "clients": {evil: {"device": evil}}}, story.records, metrics))
    page = check(text)
    assert "<script>alert" not in text
    assert {evil, names[0], "a<b>&"} <= set(page.texts)
    honest = report_html(make(random_story(3, num_clients=2)))
    assert (text.count("<script"), text.count("</script>")) == (honest.count("<script"), honest.count("</script>"))


def test_sections_that_have_nothing_to_say_are_left_out():
    found = mist.run({
        "workload": {"concurrency": 1, "num_requests": 3, "input_tokens": 900_000, "output_tokens": 5},
        "clients": {"gpu": {"device": "h100-sxm", "model": "llama-3.1-8b", "perf": "roofline"}},
    })  # fmt: skip
    assert found.summary()["requests"]["rejected"] == 3
    page = check(report_html(found))
    assert {"summary", "provenance", "scenario"} <= set(page.ids)
    assert not {"latency", "stages"} & set(page.ids)
    assert "No request finished, so there are no latencies: 3 rejected." in page.texts


def test_who_was_there_and_why_that_changed(tmp_path: Path):
    pool = {"device": "h100-sxm", "model": "llama-3.1-8b", "perf": "roofline", "count": 2}
    workload = {"arrivals": {"poisson": {"rate_per_s": 9}}, "num_requests": 90, "input_tokens": 99, "output_tokens": 9}
    quiet = {"workload": workload, "clients": {"gpu": pool}}
    events = [{"at_s": 3, "client_down": "gpu-1", "for_s": 2}]
    found = mist.run({**quiet, "events": events})
    text = report_html(found)
    page = check(text)
    assert "availability" in page.ids
    assert {"Replicas up, by pool", "gpu-1 goes down for 2 s", "3 s", "5 s", "down", "up", "event"} <= set(page.texts)
    data = re.search(r'type="application/json"[^>]*>(.*?)</script>', text[text.index("<strong>Replicas up, by pool") :])
    (up,) = json.loads(data[1])["series"] if data else [{}]
    assert set(up["lo"]) | set(up["hi"]) == {1, 2}
    down = [x for x, high in zip(up["x"], up["hi"], strict=True) if high == 1]
    first_s = found.requests["arrival_s"].min()
    assert 3 < first_s + min(down) < first_s + max(down) < 5
    assert report_html(read_result(found.write(tmp_path / "out"))) == text
    assert 'id="availability"' not in report_html(mist.run(quiet))


def test_one_request_and_none_make_a_page():
    check(report_html(small(workload={"concurrency": 1, "num_requests": 1, "input_tokens": 9, "output_tokens": 1})))
    records = Records(client_names=["gpu"], stage_kinds=["prefill"])
    metrics = summarise(records, clients=[ClientInfo("gpu", "gpu", 10, 16, 4)])
    check(report_html(Result("nothing", {}, records, metrics)))


def many(num: int) -> Result:
    """A run of `num` requests of one step each on two clients; every tenth of them is rejected."""
    rng = np.random.default_rng(num)
    arrival = np.cumsum(rng.integers(1, 2_000_000, num))
    ends = arrival + rng.integers(1_000_000, 90_000_000, num)
    number, zero, one = np.arange(num), np.zeros(num, np.int64), np.ones(num, np.int64)
    status = np.where(number % 10 == 9, REJECTED, FINISHED)
    records = Records(client_names=["gpu-0", "gpu-1"], stage_kinds=["prefill"], reasons=["too long"])
    served = status == FINISHED
    reason = np.where(served, -1, 0)
    tables = (
        (records.requests, [number, arrival, ends, ends, status, reason, one, one, zero, zero], one > 0),
        (records.tasks, [number, zero, zero, number % 2, arrival, arrival + 1, ends, ends, zero, one, zero, -one,
                         -one, one], served),
        (records.steps, [number % 2, arrival + 1, ends, one, one, zero, zero, zero, zero], served),
    )  # fmt: skip
    for each, columns, rows in tables:
        each.write(np.ascontiguousarray(np.column_stack(columns)[rows]).tobytes())
    clients = [ClientInfo(name, "gpu", 0, 0, 4) for name in records.client_names]
    return Result("many", {"name": "many"}, records, summarise(records, clients=clients))


def test_many_requests_make_no_longer_a_page():
    few, more = (len(report_html(many(num))) for num in (5_000, 100_000))
    assert more < 500_000
    assert more < 1.2 * few
    assert "Curves of more than 400 values" in report_html(many(5_000))


# --- sections ---


@pytest.mark.parametrize("seed", range(4))
def test_bars_add_up_to_the_records(seed, monkeypatch):
    view, drawn = View(make(random_story(seed, disaggregated=True, num_clients=3))), []
    monkeypatch.setattr(stages, "bar_chart", lambda title, parts, rows, *_, **__: drawn.append((title, rows)) or "")
    stages.stages(view)
    requests = view.finished
    whole = {"End-to-end latency by stage": requests["end_ns"] - requests["arrival_ns"]}
    spoken = requests["first_token_ns"] >= 0
    whole["Time to first token by stage"] = (requests["first_token_ns"] - requests["arrival_ns"])[spoken]
    assert {title for title, _ in drawn} == set(whole)
    for title, rows in drawn:
        *bands, every = rows
        count = [int(row.remark.split()[0].replace(",", "")) for row in bands]
        assert sum(count) == len(whole[title])
        total_s = sum(sum(row.amounts) * n for row, n in zip(bands, count, strict=True))
        assert total_s == pytest.approx(whole[title].sum() / 1e9, rel=1e-12)
        assert sum(every.amounts) == pytest.approx(whole[title].mean() / 1e9, rel=1e-12)
        lengths = [sum(row.amounts) for row in bands]
        assert lengths == sorted(lengths)


def test_flows_are_the_ways_of_requests_and_bytes():
    found = mist.run({
        "workload": {"arrivals": {"poisson": {"rate_per_s": 8}}, "num_requests": 40, "input_tokens": 300,
                     "output_tokens": 5},
        "clients": {
            name: {"device": "h100-sxm", "model": "llama-3.1-8b", "serves": [name], "perf": "roofline"}
            for name in ("prefill", "decode")
        },
        "network": {"kv_transfer": {"bandwidth": "50 GB/s"}},
    })  # fmt: skip
    flows = {(f.sender, f.receiver): (f.requests, f.bytes) for f in cluster.flows(View(found))}
    moved = int(found.transfers["bytes"].sum())
    assert moved
    assert flows == {
        ("requests", "prefill"): (40, 0), ("prefill", "decode"): (40, moved), ("decode", "answers"): (40, 0),
    }  # fmt: skip


def test_ways_back_are_flows_and_what_stays_is_none():
    records = Records(client_names=["a-0", "a-1", "b"], stage_kinds=["one", "two"])
    for request, client, queued in ((0, 0, 1), (1, 1, 2), (0, 2, 20), (0, 1, 40), (0, 0, 60), (1, 2, 70)):
        row = dict.fromkeys(records.tasks.columns, 0) | {"request": request, "client": client, "queued_ns": queued}
        records.tasks.append(list((row | {"started_ns": queued, "end_ns": queued + 9, "joined_ns": -1}).values()))
    for request, end in ((0, 69), (1, 79)):
        records.requests.append([request, 0, end, end, FINISHED, -1, 1, 1, 0, 0])
    clients = [ClientInfo(name, name[0], 0, 0, 4) for name in records.client_names]
    view = View(Result("back", {}, records, summarise(records, clients=clients)))
    assert {(f.sender, f.receiver): f.requests for f in cluster.flows(view)} == {
        ("requests", "a"): 2, ("a", "b"): 2, ("b", "a"): 1, ("a", "answers"): 1, ("b", "answers"): 1,
    }  # fmt: skip


def test_what_records_do_not_tell_of_a_step_is_a_part_of_its_own():
    long = small(
        workload={"concurrency": 1, "num_requests": 2, "input_tokens": 60_000, "output_tokens": 2},
        clients={"gpu": {"device": "h100-sxm", "model": "llama-3.1-8b", "perf": "roofline"}},
    )
    (found,) = anatomies(long, View(long).pools)
    prefills = next(kind for kind in found.kinds if kind.name == "prefills")
    # most of a late chunk's attention is to the chunks before it
    assert prefills.shares[PARTS.index("rest")] > 0.05
    assert sum(prefills.shares) == pytest.approx(1.0)


def test_steps_are_explained_whole(result):
    (found,) = anatomies(result, View(result).pools)
    assert (found.pool, found.perf, found.problem) == ("gpu", "roofline", "")
    assert sum(kind.num_steps for kind in found.kinds) == len(result.records.steps)
    for kind in found.kinds:
        assert sum(kind.shares) == pytest.approx(1.0)
        for step in kind.steps:
            assert sum(step.parts) == pytest.approx(step.time_ns)
    decodes = next(kind for kind in found.kinds if kind.name == "decodes")
    assert PARTS[int(np.argmax(decodes.shares))] == "memory"
    # of decodes alone records tell all
    assert decodes.shares[PARTS.index("rest")] == pytest.approx(0.0, abs=1e-6)


def test_steps_that_nothing_explains_any_more_are_said(result):
    gone = Result(result.name, result.scenario | {"clients": {"gpu": {"device": "gone", "model": "llama-3.1-8b"}}},
                  result.records, result.metrics)  # fmt: skip
    assert "there is no device" in "".join(check(report_html(gone)).texts)


def test_the_slowest_tell_what_they_waited_for():
    found = mist.run({
        "workload": {"arrivals": "all_at_once", "num_requests": 9, "input_tokens": 200, "output_tokens": 40},
        "clients": {"gpu": {"device": "h100-sxm", "model": "llama-3.1-8b", "perf": "roofline",
                            "batching": {"chunked": {"max_num_seqs": 2, "max_num_batched_tokens": 512}}}},
    })  # fmt: skip
    text = "".join(Page(str(slowest(View(found)))).texts)
    longest = int(np.nanargmax(found.requests["e2e_s"]))
    assert text.index(f"Request {longest}") < 250
    assert "batch full at 2" in text
    assert "Mostly waiting for prefill" in text


def test_what_a_measurement_may_show():
    pool = {"errors": {"ttft": {"median_ape": 25.0}, "e2e": {"median_ape": 150.0}}}
    summary = {"expected_error": {"a": pool, "b": {"errors": {"ttft": {"median_ape": 10.0}}}}}
    assert expected_range(summary, "ttft_s", 1.0) == (pytest.approx(0.8), pytest.approx(1 / 0.75))
    assert expected_range(summary, "e2e_s", 1.0) == (None, None)
    assert expected_range({"expected_error": {"a": pool}}, "e2e_s", 1.0) == (0.4, None)
    assert expected_range(summary, "ttft_s", None) == (None, None)
    assert expected_range({}, "ttft_s", 1.0) == (None, None)


def test_targets_of_slowdowns_are_told_as_factors():
    found = small(slo={"ttft_slowdown": {"p99": 1.05}, "ttft_s": {"p99": 0.5}})
    (target,) = (each for each in found.metrics["slo"]["targets"] if "target_slowdown" in each)
    texts = check(report_html(found)).texts
    assert {"TTFT slowdown P99", "≤ 1.05 x", slowdown(target["actual_slowdown"]), "TTFT P99"} <= set(texts)


def test_cost_and_energy_are_shown_where_they_are(result):
    blocks = {
        "cost": {"usd": 0.04, "usd_per_hour": 6.2, "usd_per_million_output_tokens": 1.5, "pools": {"gpu": 0.04},
                 "stages": {"prefill": 0.01, "decode": 0.03}, "tenants": {"one": {"usd": 0.02}},
                 "quotes": {"gpu": {"device": "h100-sxm", "usd_per_hour": 3.1}}, "remarks": ["a quote"]},
        "energy": {"joules": 5000.0, "mean_w": 900.0, "joules_per_output_token": 0.4, "carbon_g": None,
                   "stages": {"prefill": 4000.0}},
    }  # fmt: skip
    priced = Result(result.name, result.scenario, result.records, result.metrics | blocks)
    texts = set(check(report_html(priced)).texts)
    assert {"$6.2", "$1.5 per million output tokens", "a quote", "0.9 kW", "3.1", "900 W"} <= texts
    assert {"stage decode", "75 %", "stage prefill", "80 %", "tenant one", "50 %"} <= texts
    for partial in ({"cost": blocks["cost"]}, {"energy": blocks["energy"]}, {"cost": {"usd": None, "remarks": []}}):
        check(report_html(Result(result.name, result.scenario, result.records, result.metrics | partial)))
    empty = Result(result.name, result.scenario, result.records, result.metrics | {"cost": None, "energy": None})
    assert 'id="cost"' not in report_html(empty)


def test_the_summary_shows_tenants():
    chat = {"workload": {"arrivals": {"poisson": {"rate_per_s": 5}}, "num_requests": 30, "input_tokens": 100,
                         "output_tokens": 20}}  # fmt: skip
    data = {"tenants": {"one": chat, "two": chat | {"slo": {"ttft_s": {"p99": 1}}}},
            "clients": {"gpu": {"device": "h100-sxm", "model": "llama-3.1-8b", "perf": "roofline"}}}  # fmt: skip
    texts = check(report_html(mist.run(data))).texts
    assert {"TTFT · one", "TTFT · two", "two", "30 of 30"} <= set(texts)
    assert any("Jain's fairness index" in text for text in texts)


# --- files and commands ---


def test_a_report_now_and_one_later_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text(
        "workload: {arrivals: {poisson: {rate_per_s: 9}}, num_requests: 30, input_tokens: 99, output_tokens: 9}\n"
        "clients: {gpu: {device: h100-sxm, model: llama-3.1-8b, perf: roofline}}\n"
    )
    runner = CliRunner()

    def mist_(*arguments: str) -> tuple[int, str]:
        done = runner.invoke(main, arguments)
        return done.exit_code, done.stderr

    assert mist_("run", "a.yaml", "--out", "out", "--report", "out/now.html")[0] == 0
    assert mist_("report", "out")[0] == 0
    assert Path("out/now.html").read_bytes() == Path("out/report.html").read_bytes()
    assert mist_("report", "out")[0] == 2
    assert mist_("report", "out", "--overwrite")[0] == 0
    assert "there is no folder" in mist_("run", "a.yaml", "--report", "none/x.html")[1]
    assert "written twice" in mist_("run", "a.yaml", "--report", "x", "--trace", "x")[1]
    assert "this run reads it" in mist_("report", "out", "--report", "out/summary.json", "--overwrite")[1]
    assert "holds no result" in mist_("report", ".")[1]


def test_a_report_appears_when_it_is_whole(result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    target = tmp_path / "x.html"
    target.write_text("before")
    monkeypatch.setattr("mist.report.html.report_html", lambda result: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(result, target)
    assert target.read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["x.html"]


def test_a_browser_opens_it_without_an_error(result, tmp_path: Path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here: the page's script is not run")
    target = write_report(result, tmp_path / "x.html")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--dump-dom",
             "--disable-background-networking", "--disable-component-update", "--disable-sync",
             "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}"]  # fmt: skip
    done = subprocess.run([browser, *flags, target.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr
    assert re.search(r"<html[^>]*scripted", done.stdout)


def test_every_section_is_a_function_of_the_view(result):
    view = View(result)
    for make_section in SECTIONS:
        fragment = make_section(view)
        assert fragment is None or Page(str(fragment)).names >= {"section", "h2"}
    assert json.dumps(view.summary)
