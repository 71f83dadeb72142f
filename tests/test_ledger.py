"""The ledger catches planted bugs: one sabotage per law, each answered by an InvariantError with the numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kit import LinearSteps, Run, SmallScenario, engine, play, table
from mist.batching.chunked import Chunked
from mist.batching.continuous import Continuous
from mist.client import Client
from mist.cohort import Cohort
from mist.coordinator import Coordinator
from mist.errors import InvariantError
from mist.front_end import FrontEnd
from mist.kernel import FOREVER, Kernel
from mist.ledger import Ledger
from mist.memory.kv_cache import KVCache
from mist.records import Table
from mist.request import Batch, Step, Wait
from mist.residents import Residents

#: three overlapping requests, one preemption, shared prefixes
SCENARIO = SmallScenario(
    ((0, 9, 12, (1, 2, 3)), (100, 9, 30, (1, 2, 4)), (3000, 6, 20, (1, 5)), (200_000, 8, 4, (1, 2))),
    num_blocks=12,
    unit_tokens=4,
    caching=True,
)


def test_the_scenario_breaks_no_law_by_itself() -> None:
    run = SCENARIO.play()
    requests, tasks = run.records.requests.as_columns(), run.records.tasks.as_columns()
    assert requests["num_preemptions"].sum() > 0
    assert tasks["cached_tokens"].max() > 0
    watcher = run.clients[0].watcher
    assert isinstance(watcher, Ledger)
    assert watcher.num_checks > 500


Sabotage = Callable[[pytest.MonkeyPatch], Any]


def after(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, then: Callable[..., Any]) -> None:
    """Let `then(result, self, *arguments)` have the last word of a method."""
    original = getattr(owner, name)

    def tampered(self: Any, *arguments: Any, **named: Any) -> Any:
        return then(original(self, *arguments, **named), self, *arguments)

    monkeypatch.setattr(owner, name, tampered)


def leak_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    def leak(result: Any, kv: KVCache, *_: Any) -> None:
        kv.free -= 1

    after(monkeypatch, KVCache, "take", leak)


def free_blocks_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    def free(result: Any, kv: KVCache, task: Any, num_tokens: int, num_blocks: int) -> None:
        kv.free += num_blocks

    after(monkeypatch, KVCache, "release", free)


def lose_cached_content(monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(result: Any, kv: KVCache, *_: Any) -> None:
        kv.cached -= 1
        kv.free += 1

    after(monkeypatch, KVCache, "release", lose)


def forget_a_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    def forget(result: Any, kv: KVCache, *_: Any) -> None:
        for segment in kv._segments.values():
            segment.num_users = 0

    after(monkeypatch, KVCache, "refer", forget)


def take_what_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Residents, "_make_room", lambda self, task, num_blocks: True)
    monkeypatch.setattr(KVCache, "_evict", lambda self, num_blocks: None)


def miscount_contexts(monkeypatch: pytest.MonkeyPatch) -> None:
    def miscount(result: Any, cohort: Cohort, *_: Any) -> None:
        cohort.sum_context += 1

    after(monkeypatch, Cohort, "join", miscount)


def miscount_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    def miscount(result: Any, cohort: Cohort, *_: Any) -> None:
        cohort.count += 1

    after(monkeypatch, Cohort, "join", miscount)


def misplace_a_boundary(monkeypatch: pytest.MonkeyPatch) -> None:
    def misplace(result: Any, cohort: Cohort, *_: Any) -> None:
        cohort.boundary.append(cohort.boundary.pop(0))

    after(monkeypatch, Cohort, "join", misplace)


def lose_a_calendar_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    after(monkeypatch, Cohort, "join", lambda result, cohort, *_: cohort.calendar.clear())


def decode_one_token_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Cohort.join
    monkeypatch.setattr(Cohort, "join", lambda self, task, num_steps: original(self, task, num_steps + 1))


def beat_the_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LinearSteps, "floor_time", lambda self, step: self.step_time(step) + 1)


def forget_pending_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    after(monkeypatch, Residents, "enqueue", lambda result, who, task: setattr(who, "pending_tokens", 0))


def drop_a_waiting_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Residents, "enqueue", lambda self, task: None)


def keep_a_task_that_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def again(result: Any, who: Residents, task: Any, *_: Any) -> None:
        who.waiting.append(task)

    after(monkeypatch, Residents, "leave", again)


def miscount_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    def miscount(result: Any, front_end: FrontEnd, *_: Any) -> Any:
        front_end._client.view.num_outstanding -= 1
        return result

    after(monkeypatch, FrontEnd, "expect", miscount)


def lose_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    after(monkeypatch, Coordinator, "_begin", lambda result, coordinator, *_: coordinator.in_system.popitem())


def count_an_arrival_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    def count(result: Any, coordinator: Coordinator, *_: Any) -> None:
        coordinator.num_arrived += 1

    after(monkeypatch, Coordinator, "_begin", count)


def idle_with_work(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Chunked.next_batch

    def lazy(self: Any, queue: Any, cohort: Any, budget: Any, now: int) -> Batch | Wait:
        return Wait() if cohort.count > 1 else original(self, queue, cohort, budget, now)

    monkeypatch.setattr(Chunked, "next_batch", lazy)


def sleep_through_an_arrival(monkeypatch: pytest.MonkeyPatch) -> None:
    def doze(self: FrontEnd, task: Any, now: int) -> None:
        self._let_in(task)

    monkeypatch.setattr(FrontEnd, "_enqueue", doze)


def return_an_empty_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Chunked, "next_batch", lambda *_: Batch([], decode=True))


def start_inside_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(self: FrontEnd, task: Any, now: int) -> None:
        self._let_in(task)
        self._client.kernel.wake(self._client)

    monkeypatch.setattr(FrontEnd, "_enqueue", busy)


def end_a_step_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(result: Any, kernel: Kernel, client: Any, time_ns: int) -> None:
        kernel.at(time_ns, lambda _, now: client.finish_step(now), None)

    after(monkeypatch, Kernel, "step_ends", twice)


def forget_tokens_at_the_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    def forget(tasks: Any, client: Client, now: int) -> Any:
        for task in tasks:
            task.generated_tokens = 0
        return tasks

    after(monkeypatch, Client, "cut", forget)


def reserve_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    after(monkeypatch, Residents, "grow_decodes", lambda result, who: who.kv.take(1) or result)


def forget_a_preemption(monkeypatch: pytest.MonkeyPatch) -> None:
    def forget(result: Any, who: Residents, task: Any) -> None:
        task.request.num_preemptions -= 1

    after(monkeypatch, Residents, "preempt", forget)


SABOTAGES: dict[Sabotage, str] = {
    leak_a_block: r"at \d+ ns: gpu-0: KV blocks: \d+ is not 12",
    free_blocks_twice: r"KV blocks: \d+ is not 12",
    lose_cached_content: r"cached KV blocks: \d+ is not \d+",
    forget_a_reference: r"KV blocks: \d+ is not 12|KeyError",
    take_what_is_not_there: r"-\d+ free KV blocks",
    miscount_contexts: r"cohort context: 10 is not 9",
    miscount_sequences: r"cohort count: 2 is not 1",
    misplace_a_boundary: r"cohort block boundaries: \[.*\] is not \[.*\]",
    lose_a_calendar_entry: r"request 0 is missing in the calendar",
    decode_one_token_too_many: r"request 0: steps to its last token: 12 is not 11",
    beat_the_floor: r"a step of \d+ ns beats its floor of \d+ ns: Step\(",
    forget_pending_tokens: r"pending tokens: 0 is not 9",
    drop_a_waiting_task: r"incoming tasks: 1 is not 0",
    keep_a_task_that_left: r"pending tokens: -8 is not 1",
    miscount_tasks: r"incoming tasks: -1 is not 0",
    lose_a_request: r"arrived: 1 is not 0",
    count_an_arrival_twice: r"arrived: 2 is not 1",
    idle_with_work: r"idles with 2 running tasks, \d+ waiting, \d+ free blocks",
    sleep_through_an_arrival: r"was not woken for 1 waiting tasks",
    return_an_empty_batch: r"Chunked of gpu-0 returned an empty batch at 0 ns",
    start_inside_a_step: r"a step starts inside another",
    end_a_step_twice: r"a step ends that never started",
    forget_tokens_at_the_cut: r"tokens emitted: \d+ is not 0",
    reserve_twice: r"KV blocks: \d+ is not 12",
    forget_a_preemption: r"preemptions: 0 is not 1",
}


@pytest.mark.parametrize("sabotage", SABOTAGES, ids=lambda sabotage: sabotage.__name__)
def test_a_planted_bug_is_caught(sabotage: Sabotage, monkeypatch: pytest.MonkeyPatch) -> None:
    sabotage(monkeypatch)
    until_ns = 10_000 if sabotage is forget_tokens_at_the_cut else FOREVER
    with pytest.raises(InvariantError, match=SABOTAGES[sabotage]):
        SCENARIO.play(until_ns=until_ns)


# --- over the records, once a run is over ---


def tampered(table_name: str, change: Callable[[dict[str, Any]], None]) -> Run:
    """Play without a ledger, change one table, and let a ledger close over it."""
    run = SCENARIO.play(ledger=False)
    watch = Ledger(run.kernel, run.coordinator, run.clients, run.records)
    table: Table = getattr(run.records, table_name)
    columns = {key: column.tolist() for key, column in table.as_columns().items()}
    change(columns)
    fresh = Table(table.columns)
    for row in zip(*columns.values(), strict=True):
        fresh.append(row)
    setattr(run.records, table_name, fresh)
    watch.close(run.end_ns)
    return run


def bump(column: str, row: int, by: int) -> Callable[[dict[str, Any]], None]:
    def change(columns: dict[str, Any]) -> None:
        columns[column][row] += by

    return change


@pytest.mark.parametrize(
    ("table_name", "change", "says"),
    [
        ("steps", bump("num_prefill_tokens", 0, 1), r"gpu-0: prefill tokens: \d+ is not \d+"),
        ("steps", bump("num_decodes", 5, 1), r"gpu-0: decode tokens: \d+ is not \d+"),
        ("steps", bump("end_ns", 3, 10**6), "gpu-0: steps overlap"),
        ("tasks", bump("started_ns", 1, 10**9), "of a task lies before what comes before it"),
        ("tasks", bump("computed_tokens", 2, 1), "prefill tokens"),
        ("tasks", bump("how", 0, 1), r"preemptions: 1 is not 2"),
        ("requests", bump("first_token_ns", 0, 10**9), "a first token lies outside its request"),
        ("requests", bump("output_tokens", 0, -1), "a request ended short of tokens"),
        ("tasks", bump("joined_ns", -1, -(10**9)), "gpu-0: tokens of decode steps"),
        ("tasks", bump("generated_tokens", -1, 1), "gpu-0: tokens of decode steps"),
        ("requests", bump("num_preemptions", 0, 1), r"preemptions: 2 is not 1"),
        ("requests", lambda columns: [column.pop() for column in columns.values()], r"requests recorded: 3 is not 4"),
    ],
)
def test_records_that_do_not_add_up_are_caught(table_name: str, change: Any, says: str) -> None:
    with pytest.raises(InvariantError, match=says):
        tampered(table_name, change)


def test_tokens_computed_again_need_a_preemption() -> None:
    """A chunk moved from a prefill to its decode keeps the sums and breaks the law."""

    def move(columns: dict[str, Any]) -> None:
        kinds, requests = columns["kind"], columns["request"]
        prefill, decode = (next(i for i, k in enumerate(kinds) if k == kind and requests[i] == 3) for kind in (0, 1))
        columns["computed_tokens"][prefill] -= 1
        columns["computed_tokens"][decode] += 1

    with pytest.raises(InvariantError, match="tokens computed again without a preemption: 1 is not 0"):
        tampered("tasks", move)


def test_front_end_tasks_are_counted_while_they_are_there() -> None:
    run = play(table([0, 10], [3, 3], [0, 0]), engine_profile=engine(request_ns=500))
    assert len(run.records.requests) == 2


def test_waiting_with_a_date_is_no_idleness() -> None:
    class Ticking(Continuous):
        """Batches what came within each 10 µs."""

        def next_batch(self, queue: Any, cohort: Any, budget: Any, now: int) -> Batch | Wait:
            if now % 10_000 and not cohort.count and len(queue):
                return Wait(now + 10_000 - now % 10_000)
            return super().next_batch(queue, cohort, budget, now)

    run = play(table([1, 2, 3, 10_001], [3, 4, 5, 6], [0, 0, 0, 0]), policy=Ticking)
    steps = run.records.steps.as_columns()
    assert steps["start_ns"].tolist() == [10_000, 20_000]
    assert steps["num_prefills"].tolist() == [3, 1]


def test_an_invariant_error_says_when_and_what() -> None:
    class Wrong(LinearSteps):
        def floor_time(self, step: Step) -> int:
            return 5000

    with pytest.raises(InvariantError) as caught:
        play(table([777], [3], [0]), perf=Wrong())
    assert str(caught.value).startswith("at 777 ns: gpu-0: a step of 1037 ns beats its floor of 5000 ns: Step(num_dec")
