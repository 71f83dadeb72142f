"""Sharing: max-min fair rates against brute force, flows against an exact fluid, a channel against M/G/1-PS.

Guards `mist.sharing`: what is sent arrives, no sooner than its channels allow, whoever else comes and goes.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from math import inf

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kit import sampled
from mist.errors import InvariantError
from mist.kernel import Kernel
from mist.sharing import Channel, Flow, Sharing, duration_ns
from test_closed_forms import Floats, agrees, poisson

ALIKE = 1e-9


@dataclass(frozen=True)
class Sent:
    """A flow to start: when, over which channels, how much, under which cap (units a second), how late."""

    at: int
    channels: tuple[int, ...]
    size: int
    cap: float = inf
    latency_ns: int = 0


@dataclass(frozen=True)
class Traffic:
    capacities: tuple[float, ...]
    sent: tuple[Sent, ...]


Watch = Callable[[int, Sharing, list[Channel], list[Flow]], None]


def play(traffic: Traffic, watch: Watch | None = None) -> list[int]:
    """When each of `traffic.sent` arrived."""
    kernel = Kernel()
    sharing = Sharing(kernel)
    channels = [Channel(f"channel {i}", capacity) for i, capacity in enumerate(traffic.capacities)]
    ends = [-1] * len(traffic.sent)
    flows: list[Flow] = []

    def start(index: int, now: int) -> None:
        sent = traffic.sent[index]
        path = [channels[i] for i in sent.channels]
        flows.append(
            sharing.start(
                path, sent.size, ends.__setitem__, index, now, max_rate_per_s=sent.cap, latency_ns=sent.latency_ns
            )
        )

    if watch is not None:
        kernel.on_instant = lambda now: watch(now, sharing, channels, flows)
    for index, sent in enumerate(traffic.sent):
        kernel.at(sent.at, start, index)
    kernel.run()
    assert not sharing.flows
    assert all(channel.num_flows == 0 for channel in channels)
    for i, channel in enumerate(channels):
        assert channel.carried == sum(sent.size for sent in traffic.sent if i in sent.channels)
    return ends


def fair(paths: list[tuple[int, ...]], caps: list[float], capacities: tuple[float, ...]) -> list[Fraction]:
    """Max-min fair rates by the definition: raise all rates until something is full, stop who uses it, go on."""
    rates: list[Fraction | None] = [None] * len(paths)
    while None in rates:
        still = [i for i, rate in enumerate(rates) if rate is None]
        shares = {("cap", i): Fraction(caps[i]) for i in still if caps[i] < inf}
        for c, capacity in enumerate(capacities):
            users = [i for i in still if c in paths[i]]
            if users and capacity < inf:
                taken = sum((rate for i, rate in enumerate(rates) if rate is not None and c in paths[i]), Fraction(0))
                shares["channel", c] = (Fraction(capacity) - taken) / len(users)
        lowest = min(shares.values())
        full = [key for key, share in shares.items() if share == lowest]
        for i in still:
            if ("cap", i) in full or any(("channel", c) in full for c in paths[i]):
                rates[i] = lowest
    return [rate for rate in rates if rate is not None]


def fluid(traffic: Traffic) -> list[Fraction]:
    """When each flow ends, exactly: nothing is rounded, every rate is computed anew at every event."""
    left = {i: Fraction(sent.size) for i, sent in enumerate(traffic.sent)}
    waiting = sorted(left, key=lambda i: traffic.sent[i].at)
    now, ends = Fraction(0), [Fraction(-1)] * len(left)
    live: list[int] = []
    while waiting or live:
        for i in live:
            if not left[i]:
                ends[i] = now
        live = [i for i in live if left[i]]
        while waiting and traffic.sent[waiting[0]].at <= now:
            live.append(waiting.pop(0))
        sent = [traffic.sent[i] for i in live]
        rates = fair([s.channels for s in sent], [s.cap for s in sent], traffic.capacities)
        spans = [left[i] * 10**9 / rate for i, rate in zip(live, rates, strict=True)]
        spans += [Fraction(traffic.sent[waiting[0]].at) - now] if waiting else []
        span = min(spans, default=Fraction(0))
        for i, rate in zip(live, rates, strict=True):
            left[i] -= rate * span / 10**9
        now += span
    return ends


@st.composite
def traffics(draw: st.DrawFn, *, max_gap_ns: int = 3000, limited: bool = True) -> Traffic:
    """Few channels, round capacities and sizes, so that ties happen; every flow is limited by something."""
    capacities = draw(st.lists(st.sampled_from([1e9, 2e9, 3e9, 5e8, 7e9]), min_size=1, max_size=5))
    if not limited:
        capacities = [c if draw(st.booleans()) else inf for c in capacities]
    channels = st.lists(st.integers(0, len(capacities) - 1), min_size=1, max_size=3, unique=True).map(tuple)
    sent = []
    now = 0
    for _ in range(draw(st.integers(1, 10))):
        now += draw(st.sampled_from([0, 0, 500]) | st.integers(0, max_gap_ns))
        size = draw(st.sampled_from([1000, 2000]) | st.integers(1, 5000))
        cap = draw(st.sampled_from([inf, inf, 1e9, 3e8]))
        sent.append(Sent(now, draw(channels), size, cap, draw(st.sampled_from([0, 0, 40]))))
    return Traffic(tuple(capacities), tuple(sent))


# --- one channel ---


@pytest.mark.parametrize("readers", [1, 2, 3, 7, 64])
def test_k_readers_each_see_a_kth(readers: int) -> None:
    size, capacity = 10_007, 3e9

    def watch(now: int, sharing: Sharing, channels: list[Channel], flows: list[Flow]) -> None:
        if sharing.flows:
            assert channels[0].num_flows == readers
            assert [flow.rate_per_s for flow in flows] == [capacity / readers] * readers

    ends = play(Traffic((capacity,), (Sent(5, (0,), size),) * readers), watch)
    assert len(set(ends)) == 1, "they all end in the same instant"
    assert ends[0] - 5 == duration_ns(readers * size, capacity)
    assert abs(ends[0] - 5 - readers * duration_ns(size, capacity)) <= readers / 2


@given(st.integers(0, 10**12), st.floats(1e3, 1e13), st.integers(0, 10**6), st.integers(0, 10**15))
def test_alone_a_flow_takes_size_over_capacity_and_the_latency(size: int, rate: float, latency: int, at: int) -> None:
    exact = Fraction(size) * 10**9 / Fraction(rate)
    end = play(Traffic((rate, 2 * rate, inf), (Sent(at, (2, 1, 0), size, latency_ns=latency),)))[0]
    assert end == at + duration_ns(size, rate) + latency
    assert abs(end - at - latency - exact) <= Fraction(1, 2) + exact / 10**15 + Fraction(1, 10**5)


@pytest.mark.parametrize("latency_ns", [0, 70])
def test_without_a_limit_it_is_there_in_the_same_instant(latency_ns: int) -> None:
    sent = (Sent(3, (0,), 10**15, latency_ns=latency_ns), Sent(3, (), 8, latency_ns=latency_ns), Sent(4, (1,), 0))
    assert play(Traffic((inf, 1.0), sent)) == [3 + latency_ns, 3 + latency_ns, 4]


def test_a_cap_limits_a_flow_and_leaves_the_rest_to_others() -> None:
    ends = play(Traffic((4e9,), (Sent(0, (0,), 1000, cap=1e9), Sent(0, (0,), 6000))))
    assert ends == [1000, duration_ns(3000, 3e9) + duration_ns(3000, 4e9)]


def test_caps_hold_without_any_channel() -> None:
    sent = (Sent(1, (), 1000, cap=1e9), Sent(500, (0,), 1000, cap=1e9), Sent(600, (), 7, cap=2e9))
    assert play(Traffic((inf,), sent)) == [1001, 1500, 604]


def test_what_was_sent_before_leaves_as_long_as_others_join() -> None:
    """1000 alone for 500 ns, then at half the rate; the second gets the channel when the first has left."""
    ends = play(Traffic((1e9,), (Sent(0, (0,), 1000), Sent(500, (0,), 1000))))
    assert ends == [1500, 2000]


def test_a_capacity_is_positive() -> None:
    for capacity in (0.0, -1.0, float("nan")):
        with pytest.raises(InvariantError, match="a capacity of"):
            Channel("dram", capacity)


SIZES: dict[str, Callable[[np.random.Generator, int], Floats]] = {
    "deterministic": lambda rng, n: np.full(n, 1.0),
    "exponential": lambda rng, n: rng.exponential(1.0, n),
    "hyperexponential": lambda rng, n: np.where(rng.random(n) < 0.9, 0.5, 5.5),
}


@pytest.mark.parametrize("sizes", sampled(SIZES, 1))
def test_a_shared_channel_is_processor_sharing(sizes: str) -> None:
    """M/G/1-PS: E[T] = E[S] / (1 - ρ), whatever the distribution (Kleinrock, Queueing Systems II, 4.4)."""
    rho, n, mean = 0.7, 30_000, 1_000_000
    rng = np.random.default_rng(5)
    size = np.maximum(1, mean * SIZES[sizes](rng, n)).astype(np.int64).tolist()
    arrivals = poisson(rng, n, mean / rho).tolist()
    ends = play(Traffic((1e9,), tuple(Sent(at, (0,), s) for at, s in zip(arrivals, size, strict=True))))
    agrees((np.array(ends) - np.array(arrivals)) / mean, 1 / (1 - rho), at_most=0.15)


def test_capped_flows_below_the_capacity_dont_see_each_other() -> None:
    """A capacity that is never reached is M/G/∞: each takes as long as its cap says."""
    rng = np.random.default_rng(6)
    arrivals = poisson(rng, 2000, 1e5).tolist()
    sent = tuple(Sent(at, (0,), int(rng.integers(1, 10**6)), cap=1e9) for at in arrivals)
    ends = play(Traffic((1e15,), sent))
    assert ends == [s.at + duration_ns(s.size, 1e9) for s in sent]


# --- many channels ---


@given(traffics(max_gap_ns=0))
def test_rates_are_those_of_progressive_filling(traffic: Traffic) -> None:
    def watch(now: int, sharing: Sharing, channels: list[Channel], flows: list[Flow]) -> None:
        live = [i for i, flow in enumerate(flows) if flow in sharing.flows]
        sent = [traffic.sent[i] for i in live]
        expected = fair([s.channels for s in sent], [s.cap for s in sent], traffic.capacities)
        assert [flows[i].rate_per_s for i in live] == pytest.approx([float(rate) for rate in expected], rel=ALIKE)

    play(traffic, watch)


def test_rates_of_a_large_random_network() -> None:
    rng = random.Random(3)
    capacities = tuple(rng.choice([1e9, 3e9, 10e9, 25e9, inf]) for _ in range(60))
    sent = tuple(
        Sent(0, tuple(rng.sample(range(60), rng.randint(1, 6))), 10**9, rng.choice([inf, 5e8, 2e9])) for _ in range(120)
    )
    kept = tuple(s for s in sent if s.cap < inf or any(capacities[c] < inf for c in s.channels))
    expected = fair([s.channels for s in kept], [s.cap for s in kept], capacities)
    seen: list[list[float]] = []
    play(Traffic(capacities, kept), lambda now, s, c, flows: seen.append([f.rate_per_s for f in flows]))
    assert seen[0] == pytest.approx([float(rate) for rate in expected], rel=ALIKE)


@given(traffics(limited=False))
def test_every_flow_is_at_its_cap_or_has_a_bottleneck(traffic: Traffic) -> None:
    """A full channel on which no flow is faster (Bertsekas and Gallager, Data Networks, 6.5.2); no channel is over."""

    def watch(now: int, sharing: Sharing, channels: list[Channel], flows: list[Flow]) -> None:
        rates = {channel: [f.rate_per_s for f in sharing.flows if channel in f.channels] for channel in channels}
        assert all(sum(rates[c]) <= c.capacity_per_s * (1 + ALIKE) for c in channels)
        full = {c for c in channels if sum(rates[c]) >= c.capacity_per_s * (1 - ALIKE)}
        for flow in sharing.flows:
            rate = flow.rate_per_s * (1 + ALIKE)
            cap = traffic.sent[flows.index(flow)].cap
            assert rate >= cap or any(c in full and rate >= max(rates[c]) for c in flow.channels)

    play(traffic, watch)


@given(traffics(limited=False))
def test_units_are_conserved_at_every_instant(traffic: Traffic) -> None:
    """Put on a channel = carried + in flight; in flight shrinks by the rates, and by nothing else."""
    last: dict[Flow, tuple[int, float, float]] = {}

    def watch(now: int, sharing: Sharing, channels: list[Channel], flows: list[Flow]) -> None:
        for c in channels:
            mine = [flow for flow in flows if c in flow.channels]
            in_flight = [flow for flow in mine if flow in sharing.flows]
            assert sum(flow.size for flow in mine) == c.carried + sum(flow.size for flow in in_flight)
            assert c.num_flows == len(in_flight)
        for flow in flows:
            before, rate, left = last.get(flow, (now, 0.0, flow.size if flow in sharing.flows else 0.0))
            narrowest = min((c.capacity_per_s for c in flow.channels if c.capacity_per_s < inf), default=1e9)
            half_ns = 0.0 if flow in sharing.flows else 0.51e-9 * narrowest  # its end is rounded
            assert flow.remaining(now) == pytest.approx(left - rate * (now - before) / 1e9, abs=half_ns + 1e-6)
            last[flow] = (now, flow.rate_per_s, flow.remaining(now))

    play(traffic, watch)


@given(traffics())
def test_ends_are_those_of_the_exact_fluid(traffic: Traffic) -> None:
    """Within half a ns for each end before, which moves what others get; and never faster than its channels."""
    ends = play(traffic)
    for sent, end, exact in zip(traffic.sent, ends, fluid(traffic), strict=True):
        assert abs(end - sent.latency_ns - exact) <= len(ends) + 1
        fastest = min(sent.cap, *(traffic.capacities[c] for c in sent.channels))
        assert end >= sent.at + duration_ns(sent.size, fastest) + sent.latency_ns


@given(traffics(limited=False), st.randoms(use_true_random=False))
def test_the_order_of_an_instant_doesnt_matter(traffic: Traffic, rng: random.Random) -> None:
    order = list(range(len(traffic.sent)))
    rng.shuffle(order)
    shuffled = play(Traffic(traffic.capacities, tuple(traffic.sent[i] for i in order)))
    assert [shuffled[order.index(i)] for i in range(len(order))] == play(traffic)


def test_who_ends_at_an_instant_leaves_before_others_join_at_it() -> None:
    """0.4 ns after 1000 it would be gone, which rounds to 1000: the second joins no sooner than that."""
    ends = play(Traffic((1e10,), (Sent(0, (0,), 10_004), Sent(1000, (0,), 1000))))
    assert ends == [1000, 1100]


def test_a_flow_of_less_than_half_a_ns_shares_with_those_of_its_instant() -> None:
    for sent in (Sent(0, (0,), 1), Sent(0, (0,), 1000)), (Sent(0, (0,), 1000), Sent(0, (0,), 1)):
        assert sorted(play(Traffic((3e9,), sent))) == [1, 334]


@given(traffics(limited=False), st.integers(1, 10**15))
def test_a_shift_in_time_shifts_every_end(traffic: Traffic, shift: int) -> None:
    later = tuple(Sent(s.at + shift, s.channels, s.size, s.cap, s.latency_ns) for s in traffic.sent)
    assert play(Traffic(traffic.capacities, later)) == [end + shift for end in play(traffic)]


@given(traffics(), traffics())
def test_what_happens_elsewhere_moves_nothing(here: Traffic, elsewhere: Traffic) -> None:
    first = len(here.capacities)
    moved = tuple(Sent(s.at, tuple(c + first for c in s.channels), s.size, s.cap) for s in elsewhere.sent)
    both = Traffic(here.capacities + elsewhere.capacities, here.sent + moved)
    assert play(both)[: len(here.sent)] == play(here)


@given(traffics(), st.integers(1, 50))
def test_a_channel_beyond_demand_and_a_path_through_it_change_nothing(traffic: Traffic, extra: int) -> None:
    wide = len(traffic.capacities)
    through = tuple(Sent(s.at, (wide, *s.channels), s.size, s.cap, s.latency_ns) for s in traffic.sent)
    for capacity in (inf, 1e13 * extra):
        assert play(Traffic((*traffic.capacities, capacity), through)) == play(traffic)


def test_neighbours_that_take_nothing_away_dont_move_an_end_by_a_nanosecond() -> None:
    """A flow at its cap beside others that come and go for a long time ends when its size and cap say."""
    crowd = tuple(Sent(7 * i, (0, 1), 1 + i % 90, 3e8) for i in range(3000))
    ends = play(Traffic((1e10, 1e11), (Sent(3, (0,), 7_777, 1e9 / 3), *crowd)))
    assert ends[0] == 3 + duration_ns(7_777, 1e9 / 3)


def test_components_fall_apart_and_grow_together() -> None:
    """A flow over two channels ties them together while it lasts."""
    sent = (Sent(0, (0,), 4000), Sent(0, (1,), 4000), Sent(1000, (0, 1), 500), Sent(1000, (0,), 0))
    assert play(Traffic((1e9, 1e9), sent)) == [4500, 4500, 2000, 1000]


def test_few_events_are_posted() -> None:
    """One for a flow's start, one for its arrival, at most two for the ends that were foreseen."""
    kernel = Kernel()
    sharing, channel = Sharing(kernel), Channel("nic", 1e9)
    starts = np.cumsum(np.random.default_rng(1).integers(1, 2000, 500)).tolist()

    def start(_: None, now: int) -> None:
        sharing.start([channel], 900, lambda argument, time_ns: None, None, now)

    for at in starts:
        kernel.at(at, start, None)
    kernel.run()
    assert kernel.num_events <= 4 * len(starts)


def test_deliveries_of_one_instant_come_in_the_order_of_the_starts() -> None:
    kernel = Kernel()
    sharing, channel = Sharing(kernel), Channel("nic", 1e9)
    came: list[tuple[int, int]] = []
    for index, cap in enumerate((1e8, inf, 1e8, inf)):
        arrived: Callable[[int, int], None] = lambda i, now: came.append((i, now))  # noqa: E731
        sharing.start([channel], 100 if cap < inf else 400, arrived, index, 0, max_rate_per_s=cap)
    kernel.run()
    assert came == [(0, 1000), (1, 1000), (2, 1000), (3, 1000)]
    assert all(a[1] <= b[1] for a, b in pairwise(came))
