"""The clock by hand-made clients: phases within an instant, ties, the horizon, the end of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kit import LinearSteps, SmallScenario, play, table
from mist.kernel import FOREVER, Kernel

DELIVERED = list[tuple[int, str]]


class Metronome:
    """Steps of `length` ns, `beats` of them, written to a log; runs ahead where the kernel lets it."""

    def __init__(self, kernel: Kernel, index: int, length: int, beats: int, log: DELIVERED, emits: bool = True) -> None:
        self.kernel, self.index, self.length, self.beats, self.log, self.emits = (
            kernel,
            index,
            length,
            beats,
            log,
            emits,
        )
        self.woken = False
        self.on_finish: Callable[[int], None] = lambda now: None

    def start_step(self, now: int) -> None:
        while self.beats:
            self.beats -= 1
            self.log.append((now, f"start {self.index}"))
            if now + self.length >= self.kernel.horizon():
                self.kernel.step_ends(self, now + self.length)
                return
            now += self.length
            self.finish_step(now)

    def finish_step(self, now: int) -> None:
        self.log.append((now, f"end {self.index}"))
        self.on_finish(now)


@pytest.fixture
def kernel() -> Kernel:
    return Kernel()


@pytest.fixture
def log() -> DELIVERED:
    return []


def note(log: DELIVERED, what: str) -> Callable[[Any, int], None]:
    return lambda argument, now: log.append((now, what))


def test_nobody_starts_before_all_events_of_the_instant(kernel: Kernel, log: DELIVERED) -> None:
    client = Metronome(kernel, 0, 10, 1, log)
    kernel.at(5, lambda _, now: kernel.wake(client), None)
    kernel.at(5, note(log, "arrival"), None)
    kernel.run()
    assert log == [(5, "arrival"), (5, "start 0"), (15, "end 0")]


@pytest.mark.parametrize("emits", [True, False])
def test_step_ends_come_first_and_in_client_order(kernel: Kernel, log: DELIVERED, emits: bool) -> None:
    clients = [Metronome(kernel, i, 10, 1, log, emits) for i in range(3)]
    kernel.at(10, note(log, "posted before the steps"), None)
    for client in reversed(clients):
        kernel.at(0, lambda client, now: kernel.wake(client), client)
    kernel.run()
    assert log[:3] == [(0, "start 0"), (0, "start 1"), (0, "start 2")]
    assert log[3:] == [(10, "end 0"), (10, "end 1"), (10, "end 2"), (10, "posted before the steps")]


def test_ties_keep_the_order_in_which_they_were_posted(kernel: Kernel, log: DELIVERED) -> None:
    for name in "cab":
        kernel.at(3, note(log, name), None)
    kernel.at(2, lambda _, now: kernel.at(3, note(log, "last"), None), None)
    kernel.run()
    assert [what for _, what in log] == ["c", "a", "b", "last"]


def test_an_event_for_now_belongs_to_this_instant(kernel: Kernel, log: DELIVERED) -> None:
    client = Metronome(kernel, 0, 10, 1, log)
    kernel.at(1, lambda _, now: (kernel.wake(client), kernel.at(now, note(log, "at once"), None)), None)
    kernel.run()
    assert log[:2] == [(1, "at once"), (1, "start 0")]


def test_a_client_is_woken_once(kernel: Kernel, log: DELIVERED) -> None:
    client = Metronome(kernel, 0, 10, 2, log)
    kernel.at(0, lambda _, now: (kernel.wake(client), kernel.wake(client)), None)
    kernel.at(100, note(log, "later"), None)
    kernel.run()
    assert [what for _, what in log].count("start 0") == 2


def test_it_runs_ahead_strictly_before_the_next_event(kernel: Kernel, log: DELIVERED) -> None:
    """Steps of 10 before an event at 30: those ending at 10 and 20 need no heap, the one ending at 30 waits for it."""
    client = Metronome(kernel, 0, 10, 3, log)
    kernel.at(0, lambda _, now: kernel.wake(client), None)
    kernel.at(30, note(log, "arrival"), None)
    kernel.run()
    assert log[-2:] == [(30, "end 0"), (30, "arrival")]
    assert kernel.num_events == 2
    assert kernel.now == 30


def test_nobody_runs_ahead_of_others_that_may_emit(kernel: Kernel, log: DELIVERED) -> None:
    """Two that emit take turns by time; two that don't run to the end one after the other."""
    for emits, in_time_order in ((True, True), (False, False)):
        log.clear()
        clients = [Metronome(kernel, i, 10 - i, 3, log, emits) for i in range(2)]
        for client in clients:
            kernel.at(kernel.now, lambda client, now: kernel.wake(client), client)
        kernel.run()
        assert (log == sorted(log, key=lambda entry: entry[0])) is in_time_order


def test_a_quiet_client_stops_before_what_an_emitting_one_may_send(kernel: Kernel, log: DELIVERED) -> None:
    quiet = Metronome(kernel, 0, 10, 9, log, emits=False)
    source = Metronome(kernel, 1, 25, 1, log)
    source.on_finish = lambda now: log.append((now, "reaches 0"))
    for client in (quiet, source):
        kernel.at(0, lambda client, now: kernel.wake(client), client)
    kernel.run()
    assert [now for now, what in log] == sorted(now for now, what in log)


@pytest.mark.parametrize("until", [1, 9, 10, 11, 25, 30, 31])
def test_until_is_exclusive(until: int) -> None:
    kernel, log = Kernel(), DELIVERED()
    client = Metronome(kernel, 0, 10, 9, log)
    kernel.at(0, lambda _, now: kernel.wake(client), None)
    kernel.at(30, note(log, "arrival"), None)
    kernel.run(until)
    assert [now for now, what in log if what == "end 0"] == [t for t in range(10, 91, 10) if t < until]
    assert ((30, "arrival") in log) is (until > 30)


def test_a_run_can_go_on_after_a_cut(kernel: Kernel, log: DELIVERED) -> None:
    client = Metronome(kernel, 0, 10, 5, log)
    kernel.at(0, lambda _, now: kernel.wake(client), None)
    kernel.at(33, note(log, "arrival"), None)
    kernel.run(15)
    kernel.run()
    whole: DELIVERED = []
    other = Kernel()
    again = Metronome(other, 0, 10, 5, whole)
    other.at(0, lambda _, now: other.wake(again), None)
    other.at(33, note(whole, "arrival"), None)
    other.run()
    assert log == whole


def test_horizon_is_the_next_event_or_the_end_of_the_run(kernel: Kernel) -> None:
    seen = []
    kernel.at(5, lambda _, now: seen.append(kernel.horizon()), None)
    kernel.at(8, lambda _, now: seen.append(kernel.horizon()), None)
    kernel.run(100)
    assert seen == [8, 100]
    kernel.at(101, lambda _, now: seen.append(kernel.horizon()), None)
    kernel.run()
    assert seen[-1] == FOREVER


# --- the same with real clients ---


def test_arrivals_at_a_step_end_see_its_outcome() -> None:
    """One slot; the second request comes at the very instant at which the first leaves, and starts at once."""
    run = play(table([0, 1000], [1, 1], [0, 0]), perf=LinearSteps(1000, 0, 0, 0, 0))
    steps = run.records.steps.as_columns()
    assert steps["start_ns"].tolist() == [0, 1000]
    assert steps["num_waiting"].tolist() == [0, 0]  # the step's row is written before the arrival is delivered
    run = play(table([0, 999], [1, 1], [0, 0]), perf=LinearSteps(1000, 0, 0, 0, 0))
    assert run.records.steps.as_columns()["num_waiting"].tolist() == [1, 0]


def test_simultaneous_arrivals_share_a_step() -> None:
    run = SmallScenario(tuple((7, 3, 0, ()) for _ in range(4)), max_num_seqs=4).play()
    assert run.records.steps.as_columns()["num_prefills"].tolist() == [4]


def test_steady_decode_needs_no_heap(monkeypatch: pytest.MonkeyPatch) -> None:
    posted: list[int] = []
    monkeypatch.setattr(Kernel, "step_ends", lambda self, client, time_ns: posted.append(time_ns))
    run = play(table([0], [1], [1000]))
    assert len(run.records.steps) == 1000
    assert posted == []


@pytest.mark.parametrize("until", [0, 1, 999, 1000, 1001])
def test_a_cut_run_counts_everybody(until: int) -> None:
    run = play(table([0, 500], [1, 1], [1, 1]), perf=LinearSteps(1000, 0, 0, 0, 0), until_ns=until)
    rows = run.records.requests.as_columns()
    assert len(rows["request"]) == (until > 0) + (until > 500)
    assert (rows["status"] == 0).sum() == (until > 1000)
    assert run.end_ns == until
