"""Saturated or not: verdicts on queues of known load, short runs, bursts, drains and long overloads."""

from __future__ import annotations

import heapq

import numpy as np
import pytest

from mist.metrics import ClientInfo, summarise
from mist.records import FINISHED, KV_TRANSFER, UNFINISHED, Records


def queue_records(arrivals_s: np.ndarray, service_s: np.ndarray, servers: int = 1, cut: bool = False) -> Records:
    """First come, first served by `servers`; `cut` stops the clock at the last arrival."""
    arrivals, services = ((column * 1e9).astype(np.int64).tolist() for column in (np.sort(arrivals_s), service_s))
    free, stop = [0] * servers, arrivals[-1] if cut else None
    records = Records(client_names=["gpu-0"], stage_kinds=["serve"])
    for i, (arrival, service) in enumerate(zip(arrivals, services, strict=True)):
        start = max(heapq.heappop(free), arrival)
        end = start + service
        heapq.heappush(free, end)
        status = UNFINISHED if stop is not None and end > stop else FINISHED
        seen = -1 if stop is not None and start > stop else start
        end = end if stop is None else min(end, stop)
        records.tasks.append((i, 0, 0, 0, arrival, seen, -1, end, 0, 0, 0, -1, -1, 0))
        records.requests.append((i, arrival, -1, end, status, -1, 8, 0, 0, 0))
        if seen >= 0:
            records.steps.append((0, start, end, 1, 8, 0, 0, 50, 0))
    return records


def verdict(records: Records, **options) -> dict:
    return summarise(records, clients=[ClientInfo("gpu-0", "gpu", 100, 16, 1)], **options)


def poisson(seed: int, num: int, load: float) -> tuple[np.ndarray, np.ndarray]:
    """Arrivals at `load` per second, services of one second on average."""
    rng = np.random.default_rng(seed)
    return rng.exponential(1 / load, num).cumsum(), rng.exponential(1.0, num)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("load", [0.5, 0.8, 0.95])
def test_a_stable_queue_is_not_saturated_however_busy(load, seed):
    assert verdict(queue_records(*poisson(seed, 3000, load)))["saturation_reason"] is None


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("load", [1.2, 1.5, 5])
def test_an_overloaded_queue_is_saturated(load, seed, cut):
    summary = verdict(queue_records(*poisson(seed, 3000, load), cut=cut))
    assert summary["saturated"]
    reason = summary["saturation_reason"]
    assert reason.startswith("the queue of gpu grew from about ")
    assert "KV cache 50% full" in reason
    piled_up = float(reason.split("%")[0].rsplit(maxsplit=1)[-1]) / 100
    assert piled_up == pytest.approx(1 - 1 / load, abs=0.08)


@pytest.mark.parametrize("seed", range(4))
def test_many_servers_at_ninety_percent_are_not_saturated(seed):
    arrivals, services = poisson(seed, 3000, 0.9 * 16)
    assert not verdict(queue_records(arrivals, services, servers=16))["saturated"]


def test_bursts_that_drain_are_not_saturation():
    rng = np.random.default_rng(1)
    bursts = (np.repeat(np.arange(20) * 100.0, 60) + rng.random(1200), np.ones(1200))
    first = (np.concatenate((rng.random(500), rng.random(1000) * 3000)), np.ones(1500))
    last = (np.concatenate((2900 + rng.random(300), rng.random(1000) * 3000)), np.ones(1300))
    large = (np.concatenate((2900 + rng.random(2000), rng.random(1000) * 3000)), np.ones(3000))
    for arrivals, services in (bursts, first, last, large):
        assert not verdict(queue_records(arrivals, services))["saturated"]


def test_what_chance_piles_up_in_a_short_run_is_not_saturation():
    runs = [verdict(queue_records(*poisson(seed, 150, 0.9)))["saturated"] for seed in range(40)]
    assert sum(runs) <= 1


def test_overload_that_begins_once_the_cache_is_full_is_saturation():
    arrivals = np.arange(4000.0)
    records = queue_records(arrivals, np.where(arrivals < 1500, 0.5, 1.3))
    assert verdict(records)["saturated"]


def lognormal(rng: np.random.Generator, num: int, cv: float) -> np.ndarray:
    variance = np.log1p(cv**2)
    return rng.lognormal(-variance / 2, np.sqrt(variance), num)


@pytest.mark.parametrize("num", [500, 2000])
@pytest.mark.parametrize("queue", ["M/M/1", "M/D/1", "M/M/16", "G/G/1"])
def test_few_runs_at_95_percent_are_called_saturated(queue, num):
    alarms = 0
    for seed in range(25):
        rng = np.random.default_rng([seed, num])
        servers = 16 if queue == "M/M/16" else 1
        arrivals = rng.exponential(1 / 0.95 / servers, num).cumsum()
        services = np.ones(num) if queue == "M/D/1" else rng.exponential(1.0, num)
        if queue == "G/G/1":
            arrivals, services = rng.gamma(0.25, 4 / 0.95, num).cumsum(), lognormal(rng, num, 2.0)
        alarms += verdict(queue_records(arrivals, services, servers))["saturated"]
    assert alarms <= 1


@pytest.mark.parametrize("seed", range(4))
def test_growth_drawn_out_over_a_long_run_is_saturation(seed):
    """5 % above capacity piles up no more than 5 % of the arrivals, but over 12,000 of them it's beyond chance."""
    summary = verdict(queue_records(*poisson(seed, 12_000, 1.06)))
    assert summary["saturated"]
    assert not summary["near_capacity"]
    assert summary["backlog"]["waiting_last"] > 300


def test_growth_that_proves_nothing_is_told():
    summaries = [verdict(queue_records(*poisson(seed, 1000, 1.05))) for seed in range(20)]
    near = [summary for summary in summaries if summary["near_capacity"]]
    assert len(near) >= 5
    for summary in near:
        assert not summary["saturated"]
        assert summary["saturation_reason"] is None
        assert summary["backlog"]["waiting_last"] > summary["backlog"]["waiting_first"] + 10
    assert sum(summary["saturated"] or summary["near_capacity"] for summary in summaries) >= 12
    arrivals = np.arange(3000.0)
    late = verdict(queue_records(arrivals, np.where(arrivals < 2700, 0.9, 2.0)))
    assert late["near_capacity"]  # no straight line, but not to be passed over
    assert not any(verdict(queue_records(*poisson(seed, 1000, 0.8)))["near_capacity"] for seed in range(20))


def test_a_backlog_is_what_waited():
    # two tenths of the period at 2 per service, nothing else: 20 arrive at 0, 1, .. and are served in 2 s each
    arrivals = np.concatenate((np.arange(20.0), np.arange(100.0, 201.0, 20)))
    summary = verdict(queue_records(arrivals, np.full(len(arrivals), 2.0)))
    waits = [2.0 * i - i for i in range(20)]
    seen = summary["backlog"]
    assert seen["pool"] == "gpu"
    assert seen["waiting_peak"] == 10
    assert seen["waiting_last"] == 0
    in_first = sum(min(i + wait, 20.0) - i for i, wait in enumerate(waits))
    assert seen["waiting_first"] == pytest.approx(in_first / 20)


def crowd(sojourn_s: np.ndarray, num: int = 3000) -> Records:
    """Requests a second apart that are served at once and take `sojourn_s`."""
    records = Records(client_names=["gpu-0"], stage_kinds=["serve"])
    for i, sojourn in enumerate((sojourn_s * 1e9).astype(np.int64).tolist()):
        arrival = i * 10**9
        records.tasks.append((i, 0, 0, 0, arrival, arrival, -1, arrival + sojourn, 0, 0, 0, -1, -1, 0))
        records.requests.append((i, arrival, -1, arrival + sojourn, FINISHED, -1, 8, 0, 0, 0))
    assert len(records.requests) == num
    return records


def test_a_batch_that_grows_without_end_is_saturation():
    summary = verdict(crowd(5 + 0.3 * np.arange(3000)))
    assert summary["saturation_reason"].startswith("requests in the system grew from about")


@pytest.mark.parametrize("sojourn_s", [5.0, 500.0, 2900.0, 10_000.0])
def test_long_service_is_not_saturation(sojourn_s):
    assert not verdict(crowd(np.full(3000, sojourn_s)))["saturated"]


def test_saturation_does_not_apply_where_the_load_waits_for_the_system():
    summary = verdict(queue_records(*poisson(0, 3000, 2.0)), open_loop=False)
    assert not summary["saturated"]
    assert summary["saturation_reason"] is None
    assert any("saturation doesn't apply" in note for note in summary["notes"])


def test_all_at_once_is_never_saturated():
    assert not verdict(queue_records(np.zeros(500), np.ones(500)))["saturated"]


def hand_over_records(arrivals_s: np.ndarray, wire_s: float, holding: float = np.inf) -> Records:
    """Prompts of 10 ms, whose KV caches then share a link for `wire_s` each; the prefill holds `holding` of them."""
    records = Records(client_names=["prefill-0", "decode-0"], stage_kinds=["prefill", "decode"])
    sent: list[int] = []
    free = 0
    for i, arrival in enumerate((arrivals_s * 1e9).astype(np.int64).tolist()):
        start = max(arrival, free, sent[i - int(holding)] if i >= holding else 0)
        free = start + 10_000_000
        began = max(free, sent[-1] if sent else 0)
        sent.append(began + int(wire_s * 1e9))
        end = sent[-1] + 10**9
        records.tasks.append((i, 0, 0, 0, arrival, start, free, free, 0, 9, 0, -1, -1, 1))
        records.tasks.append((i, 1, 1, 1, sent[-1], sent[-1], sent[-1], end, 0, 0, 0, -1, -1, 9))
        records.transfers.append((i, KV_TRANSFER, 0, 1, 1000, free, free, sent[-1]))
        records.requests.append((i, arrival, free, end, FINISHED, -1, 9, 10, 0, 0))
    return records


HAND_OVER = [ClientInfo("prefill-0", "prefill", 100, 16, 1), ClientInfo("decode-0", "decode", 100, 16)]


def test_a_link_that_cannot_carry_the_load_is_saturation():
    arrivals, _ = poisson(3, 1000, 4.0)
    slow = summarise(hand_over_records(arrivals, 1.3), clients=HAND_OVER)
    assert slow["saturated"]
    assert slow["saturation_reason"].startswith("the queue of transfers from prefill grew from about ")
    assert slow["backlog"]["pool"] == "transfers from prefill"
    piled_up = float(slow["saturation_reason"].split("%")[0].rsplit(maxsplit=1)[-1]) / 100
    assert piled_up == pytest.approx(1 - 1 / (4 * 1.3), abs=0.05)
    fast = summarise(hand_over_records(arrivals, 0.15), clients=HAND_OVER)
    assert not fast["saturated"]
    assert not fast["near_capacity"]


def test_a_prefill_held_up_by_its_link_says_so():
    held_up = summarise(hand_over_records(poisson(3, 1000, 4.0)[0], 1.3, holding=20), clients=HAND_OVER)
    assert held_up["saturation_reason"].startswith("the queue of prefill grew")
    assert "20 transfers under way" in held_up["saturation_reason"]
