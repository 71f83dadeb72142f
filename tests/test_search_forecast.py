"""What a search says of the time it may still take: no part that comes is left out, and runs weigh as they took."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from kit import sampled
from mist.cli import output
from mist.search import forecast
from mist.search.forecast import Forecast
from mist.search.run import search
from test_search_loads import LOADS, MadeUp, written


@pytest.mark.parametrize("strategy", ["halving", "bounded", "exhaustive", "nsga2"])
@pytest.mark.parametrize("seed", sampled(range(6), 2))
def test_from_half_of_a_search_on_all_that_comes_is_counted(tmp_path: Path, strategy: str, seed: int) -> None:
    told: list[tuple[int, int, float]] = []
    path = written(tmp_path, {"load": LOADS})
    found = search(path, MadeUp(seed, 0.1), strategy=strategy, num_trials=40, progress=lambda *each: told.append(each))
    runs = sum(each["runs"] for each in found.document["runs"])
    assert abs(told[-1][0] - runs) <= 1
    assert told[0][2] == math.inf
    for done, in_all, left_s in told:
        assert done <= in_all
        if done > runs / 2:
            assert in_all > 0.8 * runs, "the others come as a surprise"
            assert 0 <= left_s < math.inf


def test_time_left_is_of_all_runs_to_come_by_what_each_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(forecast.time, "perf_counter", lambda: now[0])
    made = Forecast(_began_s=now[0])
    made.expect("halving", 1.0, 3)
    made.expect("fill", 1.0, lambda: 2.0)
    made.begin_batch()
    assert made.num_coming == 5
    now[0] += 10.0
    for number in range(20):
        assert (made.left_s(0.25, 4) == math.inf) == (number < 10)
        made.add(0.25, 1.0, is_new=True)
    # twenty seconds of processors took ten by the clock; a run on the whole starts once and has four times the requests
    whole_s = 0.05 + 4 * 0.95
    assert made.left_s(0.25, 4) == pytest.approx((4 * 1.0 + 5 * whole_s) / 2)
    made.add(1.0, 2.0, is_new=False)  # known from before: it says what such a run takes, and nothing of the pace
    assert made.left_s(0.25, 4) == pytest.approx((4 * 1.0 + 5 * 2.0) / 2)
    made.expect("halving", 1.0, 0)
    made.begin_batch()
    assert made.left_s(1.0, 1) == pytest.approx((1 + 2) * 2.0 / 2)


def test_lines_tell_the_time_that_they_are_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    now = [0.0]
    monkeypatch.setattr(output.time, "monotonic", lambda: now[0])
    with output.progress_of("runs") as progress:
        for done, left in ((0, None), (10, None), (20, math.inf), (30, 7.4)):
            progress(done, 100, left)
            now[0] += 20
    told = capsys.readouterr().err.splitlines()
    assert told == ["10 of 100 runs, about 180 s left", "20 of 100 runs", "30 of 100 runs, about 7 s left"]
