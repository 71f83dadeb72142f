"""SLO verdicts, goodput, and the numbers in a system that saturation and Little's law stand on."""

from __future__ import annotations

import numpy as np
import pytest

from handmade import random_story
from mist.metrics import ClientInfo, summarise
from mist.metrics.load import highest_number, littles_identity, mean_number
from mist.records import FINISHED, UNFINISHED, Records


def test_verdicts_and_goodput():
    records = Records(client_names=["gpu"], stage_kinds=["decode"])
    for i in range(10):
        status = UNFINISHED if i == 9 else FINISHED
        start = i * 10**9
        records.requests.append((i, start, start + (i + 1) * 10**8, start + 10**9, status, -1, 8, 2, 0, 0))
    targets = {"ttft_s": {"p50": 0.55, "mean": 0.4}, "tpot_s": {"p99": 0.8}}
    slo = summarise(records, clients=[ClientInfo("gpu", "gpu")], slo=targets)["slo"]
    assert [target["met"] for target in slo["targets"]] == [True, False, False]
    assert slo["met"] is False
    # of ten requests, those with TTFT 0.2, 0.3 and 0.4 s meet all three bounds
    assert slo["attainment"] == pytest.approx(0.3)
    assert slo["goodput_requests_per_s"] == pytest.approx(3 / 10)


def test_a_single_token_cannot_miss_a_bound_between_tokens():
    records = Records(client_names=["gpu"], stage_kinds=["decode"])
    records.requests.append((0, 0, 10**8, 10**9, FINISHED, -1, 8, 1, 0, 0))
    slo = summarise(records, clients=[ClientInfo("gpu", "gpu")], slo={"tpot_s": {"p99": 1e-6}})["slo"]
    assert slo["attainment"] == 1
    assert slo["targets"][0]["met"] is None


def test_further_percentiles_join_the_figures():
    story = random_story(5)
    summary = summarise(story.records, clients=story.clients, slo={"itl_s": {"p99.9": 1}})
    assert list(summary["e2e_s"]) == ["mean", "p50", "p90", "p99", "p99.9"]
    assert summary["slo"]["targets"][0]["actual_s"] == summary["itl_s"]["p99.9"]


@pytest.mark.parametrize(
    ("targets", "message"),
    [({"ttft": {"p99": 1}}, "known: ttft_s"), ({"ttft_s": {"99": 1}}, "'99'"), ({"ttft_s": {"p101": 1}}, "'p101'")],
)
def test_unknown_targets_are_named(targets, message):
    with pytest.raises(ValueError, match=message):
        summarise(Records(), clients=[], slo=targets)


def test_mean_number_is_exact_for_intervals_it_can_see():
    mean = mean_number(np.array([0, 5, 30]), np.array([10, 25, 40]), np.array([0.0, 10.0, 20.0, 40.0]))
    assert mean.tolist() == [1.5, 1.0, 0.75]


def test_the_highest_number_counts_no_instant_twice():
    starts, ends = np.array([0, 5, 10, 10, 30]), np.array([10, 10, 12, 10, 99])
    assert highest_number(starts, ends, 50) == 2
    assert highest_number(starts, ends, 4) == 1
    assert highest_number(starts[3:4], ends[3:4], 50) == 0
    assert highest_number(starts[:0], ends[:0], 50) == 0


def test_littles_identity_holds_beyond_64_bits():
    arrivals, ends = np.arange(50), np.full(50, 2**62)
    requests = {"arrival_ns": arrivals, "end_ns": ends, "status": np.full(50, UNFINISHED)}
    integral, sojourns = littles_identity(requests, 2**62)
    assert integral == sojourns == 50 * 2**62 - 49 * 25
