"""What a report is made of: fewer points than values, levels over time, axes, escaped texts, results read back."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from handmade import random_story
from mist.errors import ScenarioError
from mist.report.html import reduce
from mist.report.html.bars import Part, Row, bar_chart
from mist.report.html.charts import Series, heat_chart, line_chart
from mist.report.html.figures import digits, percent, seconds, shown, size
from mist.report.html.markup import Markup, el, embedded, table
from mist.report.html.scales import Scale
from mist.report.html.sections.cluster import Flow, _way
from mist.scenario.stored import read_result
from test_result import make

VALUES = st.lists(st.integers(0, 10**6), min_size=1, max_size=60)


# --- fewer points ---


@given(VALUES)
def test_a_short_distribution_keeps_every_value(values):
    x, y = reduce.cdf(np.array(values))
    assert x.tolist() == sorted(set(values))
    assert y.tolist() == [sum(v <= limit for v in values) / len(values) for limit in sorted(set(values))]


@given(VALUES, st.data())
def test_weights_are_repetitions(values, data):
    values = sorted(set(values))
    weights = [data.draw(st.integers(1, 9)) for _ in values]
    weighted, plain = reduce.cdf(np.array(values), np.array(weights)), reduce.cdf(np.repeat(values, weights))
    assert [each.tolist() for each in weighted] == [each.tolist() for each in plain]


@pytest.mark.parametrize("num", [401, 5_000, 1_000_000])
def test_a_long_distribution_has_few_points_and_all_of_them_exact(num):
    values = np.random.default_rng(num).lognormal(size=num)
    ranked = np.sort(values)
    x, y = reduce.cdf(values)
    assert len(x) <= reduce.MAX_POINTS + 2
    assert np.array_equal(x, ranked[np.rint(y * num).astype(int) - 1])
    assert (x[0], x[-1], y[-1]) == (ranked[0], ranked[-1], 1.0)
    # no percentile is further than a point from one that is drawn
    assert max(np.diff(y)) < 0.011
    assert np.count_nonzero(y > 0.99) >= 40 or num < 5_000


INTERVALS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20), st.integers(1, 5)), max_size=12)


@given(INTERVALS, st.integers(1, 7))
def test_levels_against_counting_every_instant(intervals, num):
    columns = [np.array([row[i] for row in intervals], np.int64) for i in range(3)]
    starts, ends, amounts = columns[0], columns[0] + columns[1], columns[2]
    bounds = reduce.edges(0, 60, num)
    bounds = np.unique(np.round(bounds))
    found = reduce.levels(starts, ends, bounds, amounts)
    for i, (low, high) in enumerate(pairwise(bounds.astype(int).tolist())):
        there = [int(amounts[(starts <= t) & (t < ends)].sum()) for t in range(low, high)]
        assert found.mean[i] == pytest.approx(np.mean(there))
        assert (found.least[i], found.most[i]) == (min(there), max(there))


def test_what_follows_at_once_leaves_no_gap():
    starts = np.arange(0, 100, 10)
    found = reduce.levels(starts, starts + 10, np.array([5.0, 45.0, 95.0]))
    assert (found.least.tolist(), found.most.tolist()) == ([1, 1], [1, 1])


# --- axes and figures ---


@given(st.floats(1e-9, 1e6), st.floats(1.001, 1e6), st.booleans())
def test_axes_have_a_few_ticks_in_order(low, factor, log):
    ticks = Scale(low, low * factor, "s", log).ticks()
    places = [place for place, _ in ticks]
    assert places == sorted(places)
    assert all(0 <= place <= 1 for place in places)
    assert 1 <= len(ticks) <= 9


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1.23 s", seconds(1.2345)), ("45.6 ms", seconds(0.0456)), ("0 s", seconds(0.0)), ("-", seconds(None)),
        ("1,234 s", seconds(1234.0)), ("1 s", seconds(0.9999)), ("1.5 GB", size(1.5e9)), ("999 B", size(999)),
        ("<0.1 %", percent(0.0001)), ("12.3 GB/s", shown(12.3e9, "B/s")), ("12/s", shown(12.0, "1/s")),
        ("2,557", digits(2557.3)), ("0.05", digits(0.05)), ("100", digits(99.99)),
    ],
)  # fmt: skip
def test_figures(text, value):
    assert value == text


# --- fragments ---


def test_texts_are_escaped_and_fragments_are_not():
    made = el("p", "a < b & c", el("b", "x"), None, False, ["y", 3], title='"quoted"', hidden=True, id=None)
    assert made == '<p title="&quot;quoted&quot;" hidden>a &lt; b &amp; c<b>x</b>y3</p>'
    assert isinstance(made, Markup)


def test_embedded_values_cannot_end_their_element():
    made = embedded({"name": "</script><b>"})
    assert made.count("</script>") == 1
    assert json.loads(re.search(r">(.*)</script>$", made)[1]) == {"name": "</script><b>"}


def test_columns_of_numbers_are_set_to_the_right():
    made = table(["name", "n", "text"], [["a", 1, "x"], ["b", "-", "2"]], label="numbers")
    assert re.findall(r'<th scope="col"( class="n")?>', made) == ["", ' class="n"', ""]


def test_a_chart_carries_what_it_draws():
    series = Series("a", np.array([0.0, 1.0, 2.0]), np.array([1.0, 3.0, 2.0]))
    made = line_chart("a chart", [series], Scale(0.0, 2.0, "s"), Scale(0.0, 4.0))
    assert 'd="M0 750L2000 250L4000 500"' in made
    data = json.loads(re.search(r'class="data">(.*?)</script>', made)[1])
    assert data["series"] == [{"name": "a", "x": [0.0, 1.0, 2.0], "y": [1.0, 3.0, 2.0]}]


def test_rows_of_shades_stay_small():
    made = heat_chart("busy", [("one", np.linspace(0, 1, 240)), ("two", np.ones(240))], Scale(0.0, 1.0, "s"))
    assert made.count("<path") == 11 + 1
    assert "M0 0h240v1h-240z" in made


def test_parts_of_a_bar_are_its_shares():
    made = bar_chart("bars", [Part("a", ""), Part("b", "")], [Row("one", [1.0, 3.0]), Row("two", [2.0, 0.0])], "s")
    assert re.findall(r"flex-grow:([\d.]+)", made) == ["0.250000", "0.750000", "1.000000"]
    assert re.findall(r"--length:([\d.]+)%", made) == ["100.000", "50.000"]


# --- results that are read back ---


@pytest.mark.parametrize("seed", range(8))
def test_a_result_comes_back_as_it_was(seed: int, tmp_path: Path):
    written = make(
        random_story(seed, num_clients=3, disaggregated=seed % 2 == 1, cut=150_000_000 if seed > 3 else None)
    )
    found = read_result(written.write(tmp_path / "out"))
    assert found.records.client_names == written.records.client_names
    assert found.records.stage_kinds == written.records.stage_kinds
    assert (found.name, found.scenario, found.summary()) == (written.name, written.scenario, written.summary())
    for name in ("requests", "tasks", "steps", "transfers"):
        before, after = getattr(written, name), getattr(found, name)
        assert list(before) == list(after)
        for key in before:
            np.testing.assert_array_equal(before[key], after[key], err_msg=f"{name}.{key}")


@given(st.integers(0, 2**51 - 1))
def test_seconds_hold_nanoseconds_exactly(time_ns):
    assert int(np.rint(np.float64(time_ns / 1e9) * 1_000_000_000)) == time_ns


def test_what_is_no_result_is_said(tmp_path: Path):
    with pytest.raises(ScenarioError, match=r"no summary\.json"):
        read_result(tmp_path)
    folder = make(random_story(0)).write(tmp_path / "out")
    (folder / "tasks.parquet").write_bytes(b"nothing")
    with pytest.raises(ScenarioError, match="can be read"):
        read_result(folder)
    (folder / "tasks.parquet").unlink()
    with pytest.raises(ScenarioError, match=r"no tasks\.parquet"):
        read_result(folder)


def test_dark_is_for_screens_alone() -> None:
    """Paper is light, whatever the button or the browser says; every other colour by role is of the screen."""
    sheet = (Path(reduce.__file__).parent / "report.css").read_text()
    before = [sheet[: found.start()] for found in re.finditer("color-scheme: dark;", sheet)]
    assert len(before) == 2
    assert all(text.rpartition("@media ")[2].startswith("screen") for text in before)


CELLS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), min_size=2, unique=True)


@given(CELLS, st.data())
def test_ways_go_past_boxes_and_end_at_theirs(cells: list[tuple[int, int]], data: st.DataObject) -> None:
    boxes = {f"{cell}": (8 + 208 * cell[0], 8 + 122 * cell[1]) for cell in cells}
    sender, receiver = (data.draw(st.sampled_from(sorted(boxes))) for _ in range(2))
    (x0, _), (x1, _) = boxes[sender], boxes[receiver]
    path = _way(Flow(sender, receiver, 1), boxes)
    numbers = [int(each) for each in re.findall(r"-?\d+", path)]
    assert {numbers[0] - x0, numbers[-2] - x1} <= {0, 152}
    passed = re.findall(r"(-?\d+)H(-?\d+)", path)
    assert len(passed) in (0, len({x for x, _ in boxes.values() if min(x0, x1) < x < max(x0, x1)}))
    for y, leave in passed:
        column = int(leave) - (152 if x1 > x0 else 0)
        assert not any(x == column and top < int(y) < top + 96 for x, top in boxes.values()), path


def test_a_way_past_a_box_in_its_row() -> None:
    boxes = {"a": (8, 8), "b": (216, 8), "c": (424, 8)}
    assert _way(Flow("a", "b"), boxes).count("H") == 0
    assert "H368" in (path := _way(Flow("a", "c"), boxes))
    assert re.search(r" (-5|117)H368", path), "above or below"
