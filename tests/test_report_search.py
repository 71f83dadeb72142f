"""Pages of searches, sensitivities and comparisons: well-formed, without a network, their figures the documents'."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from mist.cli import main
from mist.errors import ScenarioError
from mist.report.html.compare import compare_html
from mist.report.html.explorer import MAX_LINES, Explorer, kind_of
from mist.report.html.figures import percent, seconds, shown
from mist.report.html.objectives import name_of, unit_of, with_interval
from mist.report.html.search import search_html
from mist.report.html.tornado import sensitivity_html
from mist.search.compare import Deployment, compare, paired
from mist.search.executors import executor_named
from mist.search.outcome import Found, read_found
from mist.search.run import search
from mist.search.runs import Run
from test_report import check

EVIL = "</script><script>alert(1)</script>"
POOL = {"device": "h100-sxm", "model": "llama-3.1-8b", "perf": "roofline"}
LOAD = {"arrivals": {"poisson": {"rate_per_s": 20}}, "num_requests": 100, "input_tokens": 800, "output_tokens": 20}
SPACE: dict[str, Any] = {
    "name": "tiny",
    "scenario": {"seed": 3, "workload": LOAD, "clients": {"gpu": POOL}, "slo": {"ttft_s": {"p99": 0.08}}},
    "space": {"clients.gpu": {"device": ["h100-sxm", "l40s"], "tp": [1, 2, 3], "count": [1, 2]}},
    "budget": {"devices": {"at_most": 2}},
    "objectives": ["devices", "ttft_s.p99", "output_tokens_per_s"],
    "baseline": {"clients": {"gpu": POOL}},
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    from mist.search.space import read_space

    folder = tmp_path_factory.mktemp("space")
    (folder / "space.yaml").write_text(yaml.safe_dump(SPACE))
    with executor_named("serial") as serial:
        made = search(read_space(folder / "space.yaml"), serial, strategy="exhaustive", num_seeds=2)
    return made


@pytest.fixture(scope="module")
def document(found: Found) -> dict[str, Any]:
    return json.loads(found.to_json())


def test_a_document_tells_every_measured_point(document):
    points = document["points"]
    assert len(points) == document["configurations"]["legal"] == 6
    assert {kind_of(point) for point in points} == {"front", "missed", "beaten"}
    by_name = {point["front"]: point for point in points if point["front"]}
    assert set(by_name) == {each["name"] for each in document["front"]}
    for each in document["front"]:
        point = by_name[each["name"]]
        assert point["choices"] == each["choices"]
        assert point["missed"] == 0
        assert point["share"] == 1
        for name, value in point["objectives"].items():
            assert value == pytest.approx(each["objectives"][name]["mean"], rel=1e-12)


def test_each_best_tells_its_gain_in_its_own_objective(document):
    assert document["best"]["best devices"]["gain"] == document["gain"]
    base = document["baseline"]
    for title, name in (("best ttft_s.p99", "ttft_s.p99"), ("best output_tokens_per_s", "output_tokens_per_s")):
        best = document["best"][title]
        assert best["gain"]["objective"] == name
        ours, theirs = best["objectives"][name]["mean"], base["objectives"][name]["mean"]
        factor = theirs / ours if name == "ttft_s.p99" else ours / theirs
        assert best["gain"]["factor"]["mean"] == pytest.approx(factor, rel=0.05)
    assert document["best"]["best homogeneous"]["gain"]["objective"] == "devices"


def test_the_page_says_what_the_document_says(document):
    text = search_html(document, {"front-1": "name: one\n"})
    page = check(text)
    assert {"summary", "gains", "front", "left-out"} <= set(page.ids)
    assert "name: one\n" in page.texts
    for each in [*document["front"], document["baseline"], *document["best"].values()]:
        for name, value in each["objectives"].items():
            assert with_interval(name, value) in page.texts
    for each in document["configurations"]["refused"]:
        assert {each["reason"], str(each["count"]), each["example"]} <= set(page.texts)
    explorer = Explorer(document["points"], document["objectives"])
    for i, point in enumerate(document["points"]):
        for name, value in point["objectives"].items():
            assert f"{name_of(name)}: {shown(value, unit_of(name))}" in explorer.tip(i)
        assert text.count(f'data-point="{i}"') == 2
    assert text == search_html(document, {"front-1": "name: one\n"})


def random_points(num: int, seed: int) -> tuple[list[dict[str, Any]], dict[str, str]]:
    rng = np.random.default_rng(seed)
    senses = {"devices": "minimise", "ttft_s.p99": "minimise", "attainment": "maximise"}
    values = np.column_stack((rng.integers(1, 6, num), rng.lognormal(-2, 2, num), rng.random(num)))
    return [
        {"front": f"front-{i}", "choices": {"clients.gpu.tp": str(i % 3)}, "devices": 1, "share": 1.0, "missed": 0.0,
         "objectives": dict(zip(senses, row, strict=True))}
        for i, row in enumerate(values.tolist())
    ], senses  # fmt: skip


@pytest.mark.parametrize("seed", range(5))
def test_the_line_goes_through_those_that_no_other_beats_on_both_axes(seed: int):
    points, senses = random_points(40, seed)
    explorer = Explorer(points, senses)
    sign = {name: 1 if sense == "minimise" else -1 for name, sense in senses.items()}
    for a, b in permutations(senses, 2):
        costs = [(sign[a] * point["objectives"][a], sign[b] * point["objectives"][b]) for point in points]
        best = [i for i, (x, y) in enumerate(costs)
                if not any(u <= x and v <= y and (u, v) != (x, y) for u, v in costs)]  # fmt: skip
        ends = {(round(4000 * explorer.places(a)[i]), round(1000 - 1000 * explorer.places(b)[i])) for i in best}
        path = explorer.front_line(a, b)
        (first,) = re.findall(r"^M(\d+) (\d+)", path)
        steps = [first, *re.findall(r"H(\d+)V(\d+)", path)]
        assert {(int(x), int(y)) for x, y in steps} == ends


def test_places_keep_the_order_of_values_and_stay_inside():
    points, senses = random_points(50, 7)
    points[3]["objectives"]["ttft_s.p99"] = None
    explorer = Explorer(points, senses)
    places = explorer.places("ttft_s.p99")
    assert places[3] is None
    known = [(point["objectives"]["ttft_s.p99"], place) for point, place in zip(points, places, strict=True)
             if place is not None]  # fmt: skip
    assert [place for _, place in sorted(known)] == sorted(place for _, place in known)
    assert all(0 < place < 1 for _, place in known)
    check(f"<!DOCTYPE html><html>default-src 'none'{explorer.scatter()}</html>")


def test_of_many_points_all_are_placed_and_as_many_have_lines_as_can_be_told_apart():
    points, senses = random_points(1000, 1)
    for point in points[5:]:
        point["front"] = None
    explorer = Explorer(points, senses)
    assert str(explorer.scatter()).count("data-tip=") == 1000
    drawn = str(explorer.parallel())
    assert drawn.count("data-tip=") == MAX_LINES
    assert all(f'data-point="{i}"' in drawn for i in range(5))


def test_a_search_that_found_nothing_or_is_older_has_a_page(document):
    empty = document | {"front": [], "baseline": None, "gain": None, "best": dict.fromkeys(document["best"])}
    empty["points"] = [point | {"front": None, "missed": None, "objectives": dict.fromkeys(point["objectives"])}
                       for point in document["points"]]  # fmt: skip
    assert any("Nothing meets the constraints" in text for text in check(search_html(empty, {})).texts)
    older = {key: value for key, value in document.items() if key != "points"}
    assert "front" not in check(search_html(older, {})).ids


def swap(value: Any) -> Any:
    """Every text and key that a user may have chosen becomes markup."""
    if isinstance(value, dict):
        return {f"{EVIL}{key}" if "." in key and not key.endswith("p99") else key: swap(each)
                for key, each in value.items()}  # fmt: skip
    return [swap(each) for each in value] if isinstance(value, list) else EVIL if isinstance(value, str) else value


def test_names_cannot_become_markup(document):
    evil = swap({key: value for key, value in document.items() if key != "objectives"})
    evil |= {"objectives": document["objectives"], "gain": None}
    for name, each in enumerate(evil["best"].values()):
        each["gain"] = None
        each["front"] = f"{EVIL}{name}"
    for i, each in enumerate(evil["front"]):
        each["name"] = f"{EVIL}{i}"
    text = search_html(evil, {f"{EVIL}0": EVIL})
    check(text)
    assert "<script>alert" not in text
    assert text.count("<script") == search_html(document, {}).count("<script")


def elasticities() -> dict[str, Any]:
    def of(mean: float | None, half: float | None = None) -> dict[str, Any]:
        known = mean is not None and half is not None
        return {"mean": mean, "low": mean - half if known else None, "high": mean + half if known else None}

    rows = [("load", of(0.5, 0.1)), ("gpu: FLOP/s", of(-1.5, 0.25)), (EVIL, of(0.25)), ("prices", of(0.0, 0.0)),
            ("gpu: tp", of(None))]  # fmt: skip
    return {
        "schema_version": 1, "name": EVIL, "step": 0.1, "seeds": [1, 2], "remarks": [EVIL],
        "parameters": [{"parameter": name, "values": [0.9, 1.1], "is_factor": name != "gpu: tp",
                        "error": EVIL if each["mean"] is None else None,
                        "elasticities": {"ttft_s.p99": each}} for name, each in rows],
    }  # fmt: skip


def test_a_tornado_is_to_scale_and_the_longest_is_first():
    text = sensitivity_html(elasticities())
    page = check(text)
    assert "<script>alert" not in text
    assert "95 % confidence" in text
    without = elasticities()
    for row in without["parameters"]:
        row["elasticities"]["ttft_s.p99"] |= {"low": None, "high": None}
    assert "95 % confidence" not in sensitivity_html(without)
    bars = re.findall(r'<i(?: class="less")? style="left:([\d.]+)%;width:([\d.]+)%">', text)
    lines = re.findall(r'<u style="left:([\d.]+)%;width:([\d.]+)%">', text)
    # from -1.75 to 0.6
    wanted = [(0.25, 1.5), (1.75, 0.5), (1.75, 0.25)]
    assert np.allclose(np.array(bars, float) / 100 * 2.35, wanted, atol=1e-3)
    assert np.allclose(np.array(lines, float) / 100 * 2.35, [(0, 0.5), (2.15, 0.2)], atol=1e-3)
    assert "−1.50 % ± 0.25" in page.texts
    assert "Changes nothing: prices." in page.texts
    assert [page.texts.count(each) for each in ("×0.9", "×1.1", "0.9", "1.1")] == [4, 4, 1, 1]


def deployment(label: str, times: np.ndarray) -> Deployment:
    numbers = np.arange(len(times))
    requests = {"request": numbers, "arrival_s": numbers * 1.0, "input_tokens": numbers + 1,
                "status": np.full(len(times), "finished"), "ttft_s": times, "tpot_s": np.full(len(times), np.nan),
                "e2e_s": times * 2}  # fmt: skip
    summary = {"window": {"start_s": 0.0, "end_s": 1e9}, "throughput": {"requests_per_s": float(times.mean())}}
    return Deployment(label, [Run(label, {"seed": 1, "workload": {}}, summary, requests)])


def test_a_comparison_shows_its_differences_and_the_pairs():
    times = np.random.default_rng(1).lognormal(0, 1, 900)
    sides = [deployment("one", times), deployment(EVIL, times + 0.25), deployment("three", times[::-1] * 3)]
    document = compare(sides)
    pairs = [paired(sides[0], other) for other in sides[1:]]
    text = compare_html(document, pairs)
    page = check(text)
    assert "<script>alert" not in text
    assert [page.texts.count(each) for each in ("not saturated", "none")] == [3, 3]
    for against in document["against"]:
        for statistic in ("mean", "p50", "p99"):
            each = against["requests"]["ttft_s"][statistic]
            sign = "+" if each["difference_s"] >= 0 else "−"
            wanted = {seconds(each["baseline_s"]), seconds(each["value_s"]), sign + seconds(abs(each["difference_s"]))}
            assert wanted <= set(page.texts)
        assert percent(against["requests"]["ttft_s"]["share_slower"]) in page.texts
    charts = [json.loads(found) for found in re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', text)]
    assert len(charts) == 8
    one, two = charts[0]["series"]
    assert (one["x"][-1], two["x"][-1]) == pytest.approx((times.max(), times.max() + 0.25), rel=1e-5)
    # the difference is the same for each request, whatever its own size
    assert charts[1]["series"][0]["x"] == pytest.approx([0.25] * len(charts[1]["series"][0]["x"]), rel=1e-5)


def test_what_is_nothing_has_no_sign(document):
    same = compare_html(compare(two := [deployment(name, np.arange(1.0, 400.0)) for name in "ab"]), [paired(*two)])
    assert not re.search(r">[+−]0[ .]?0* ", same)
    told = elasticities()
    told["parameters"][3]["elasticities"]["ttft_s.p99"] = {"mean": -0.001, "low": -0.002, "high": 0.0}
    assert "0.00 % ± 0.00" in check(sensitivity_html(told)).texts
    even = copy.deepcopy(document)
    even["gain"]["factor"] = {"mean": 1.0, "low": 1.0, "high": 1.0}
    objective = name_of(even["gain"]["objective"])
    assert f"In {objective} the best is as good as the engine's defaults." in " ".join(
        check(search_html(even, {})).texts
    )


def test_messages_and_their_remedies_are_told_apart(document):
    told = copy.deepcopy(document)
    told["configurations"]["refused"] = [{"reason": "too many", "count": 3, "example": "tp = 3 a\n    take 4"}]
    assert "tp = 3 a; take 4" in check(search_html(told, {})).texts


def test_a_comparison_of_several_seeds_says_that_its_curves_hold_them_all():
    times = np.random.default_rng(1).lognormal(0, 1, 90)
    sides = [deployment("one", times), deployment("two", times + 0.25)]
    pooled = "curves the requests of all seeds together"
    assert pooled not in compare_html(compare(sides), [paired(*sides)])
    twice = [Deployment(side.label, side.runs * 2) for side in sides]
    assert pooled in compare_html(compare(twice), [paired(*twice)])


def test_the_commands_write_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("space.yaml").write_text(yaml.safe_dump(SPACE))
    Path("a.yaml").write_text(yaml.safe_dump(SPACE["scenario"] | {"name": "a"}))
    Path("b.yaml").write_text(yaml.safe_dump(SPACE["scenario"] | {"clients": {"gpu": POOL | {"device": "l40s"}}}))
    runner = CliRunner()

    def mist_(*arguments: str) -> tuple[int, str]:
        done = runner.invoke(main, arguments)
        return done.exit_code, done.stderr

    assert mist_("search", "space.yaml", "--seeds", "1", "--executor", "serial", "--out", "out")[0] == 0
    written = Path("out/report.html").read_bytes()
    assert "is there already" in mist_("report", "out")[1]
    assert mist_("report", "out", "--overwrite")[0] == 0
    assert Path("out/report.html").read_bytes() == written
    assert Path("out/front-1.yaml").read_text() in [*check(written.decode()).texts]
    assert "this run reads it" in mist_("report", "out", "--report", "out/front-1.yaml", "--overwrite")[1]

    assert mist_("compare", "a.yaml", "b.yaml", "--executor", "serial", "--report", "c.html")[0] == 0
    check(Path("c.html").read_text())
    assert "is there already" in mist_("compare", "a.yaml", "b.yaml", "--report", "c.html")[1]
    assert "this run reads it" in mist_("compare", "a.yaml", "b.yaml", "--report", "b.yaml", "--overwrite")[1]
    moved = ("sensitivity", "a.yaml", "--seeds", "1", "--executor", "serial", "--objective", "ttft_s.p99")
    assert mist_(*moved, "--report", "t.html")[0] == 0
    check(Path("t.html").read_text())
    assert "there is no folder" in mist_(*moved, "--report", "none/t.html")[1]


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 1}', '{"front": [], "schema_version": 99}'])
def test_what_is_no_result_of_a_search_is_refused(tmp_path: Path, text: str):
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(ScenarioError, match="no result of a search"):
        read_found(tmp_path)


DRIVE = """<script>
const select = document.querySelector("#explorer select");
select.value = "output_tokens_per_s";
select.dispatchEvent(new Event("change"));
const first = document.querySelector('button.point[tabindex="0"]');
first.focus();
const press = (key) => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
for (let i = 0; i < 9; i++) press("ArrowLeft");
const end = document.activeElement;
press("ArrowRight");
document.body.dataset.moved = document.activeElement !== end;
press("ArrowLeft");
document.body.dataset.back = document.activeElement === end;
first.click();
document.body.dataset.opened = document.querySelector("details.story[open]")?.id;
</script></body>"""


def test_a_browser_changes_axes_and_opens_a_deployment(found: Found, document, tmp_path: Path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here: the page's script is not run")
    text = search_html(copy.deepcopy(document), dict.fromkeys(found.deployments, "name: x\n"))
    (tmp_path / "x.html").write_text(text.replace("</body>", DRIVE))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--dump-dom",
             "--disable-background-networking", "--disable-component-update", "--disable-sync",
             "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}"]  # fmt: skip
    target = (tmp_path / "x.html").as_uri()
    done = subprocess.run([browser, *flags, target], capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr
    assert re.search(r'data-opened="deployment-front-\d"', done.stdout)
    assert 'data-back="true"' in done.stdout
    assert 'data-moved="true"' in done.stdout
    line = Explorer(document["points"], document["objectives"]).front_line("output_tokens_per_s", "ttft_s.p99")
    assert f'd="{line}"' in done.stdout
