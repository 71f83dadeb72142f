"""Relations that hold exactly between runs, for any small scenario: every one is an equality of records.

Hypothesis draws the scenarios (ties, lengths around the block size, preemptions, prefix caching); all run under the
ledger. That more resources never hurt is not among them: for real schedulers it is false.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kit import POLICIES, LinearSteps, Run, SmallScenario, engine, play, rows, sampled, small_scenarios, table
from mist.batching.sglang import SGLang
from mist.client import Client
from mist.kernel import FOREVER, Kernel
from mist.pipeline.stages import StageList
from mist.records import FINISHED, PREEMPTED, REJECTED
from mist.request import Batch, ClientView, Task, Wait
from mist.routing.join_shortest_queue import JoinShortestQueue
from mist.routing.least_outstanding import LeastOutstanding
from mist.routing.round_robin import RoundRobin
from mist.testing import random_scenario, record_bytes

policies = st.sampled_from(POLICIES)
few = settings(max_examples=40)


@dataclass
class Nosy:
    """Chooses by a hash of all that it may see: any difference in any view shows."""

    def choose(self, task: Task, views: Sequence[ClientView], now: int) -> ClientView:
        seen = [
            (v.num_outstanding, v.num_waiting, v.num_running, v.pending_prefill_tokens, v.decode_context,
             v.kv_blocks_used) for v in views
        ]  # fmt: skip
        return views[hash((now, *seen)) % len(views)]


ROUTERS = (RoundRobin, LeastOutstanding, JoinShortestQueue, Nosy)
routers = st.sampled_from(ROUTERS)


@dataclass
class Fixed:
    """Request i to the client that `to` names."""

    to: Sequence[int] = field(default_factory=list)

    def choose(self, task: Task, views: Sequence[ClientView], now: int) -> ClientView:
        return views[self.to[task.request.index]]


def columns(run: Run, table_name: str, *names: str) -> list[tuple[int, ...]]:
    """Chosen columns of a table, by row."""
    found = getattr(run.records, table_name).as_columns()
    return list(zip(*(found[name].tolist() for name in names), strict=True))


def closed(scenario: SmallScenario, concurrency: int) -> SmallScenario:
    """The same requests in a closed loop: the first `concurrency` arrive at once."""
    return replace(scenario, requests=tuple((0, *rest) for _, *rest in scenario.requests), concurrency=concurrency)


# --- time ---


@few
@given(small_scenarios(), policies, st.integers(1, 10**12))
def test_shifted_arrivals_shift_every_timestamp(scenario: SmallScenario, policy: Any, shift: int) -> None:
    later = replace(scenario, requests=tuple((t + shift, *rest) for t, *rest in scenario.requests))
    assert rows(later.play(policy).records) == rows(scenario.play(policy).records, shift=shift)


@few
@given(small_scenarios(), policies, st.sampled_from([2, 8, 1 << 20]))
def test_slower_by_a_power_of_two_is_the_same_run(scenario: SmallScenario, policy: Any, k: int) -> None:
    slow = replace(scenario, requests=tuple((t * k, *rest) for t, *rest in scenario.requests))
    perf = LinearSteps(1000 * k, 10 * k, 3 * k, k, 7 * k)
    host, slow_host = engine(step_ns=100, request_ns=50), engine(step_ns=100 * k, request_ns=50 * k)
    assert rows(slow.play(policy, perf=perf, engine_profile=slow_host).records) == rows(
        scenario.play(policy, engine_profile=host).records, scale=k
    )


@few
@given(small_scenarios(), policies, routers, st.integers(1, 3), st.integers(1, 60_000))
def test_a_run_until_then_is_the_front_of_the_full_run(
    scenario: SmallScenario, policy: Any, router: Any, num_clients: int, until: int
) -> None:
    full = rows(scenario.play(policy, router=router(), num_clients=num_clients).records)
    cut = rows(scenario.play(policy, router=router(), num_clients=num_clients, until_ns=until).records)
    assert cut["steps"] == [row for row in full["steps"] if row[2] < until]
    assert [r for r in cut["requests"] if r[3] < until] == [r for r in full["requests"] if r[3] < until]
    assert len(cut["requests"]) == sum(arrival < until for arrival, *_ in scenario.requests)
    assert [r for r in cut["tasks"] if r[7] < until] == [r for r in full["tasks"] if r[7] < until]


@few
@given(small_scenarios(), policies, st.integers(0, 3000), st.integers(1, 3))
def test_front_end_time_is_a_later_arrival(
    scenario: SmallScenario, policy: Any, overhead: int, num_clients: int
) -> None:
    later = replace(scenario, requests=tuple((t + overhead, *rest) for t, *rest in scenario.requests))
    delayed = scenario.play(policy, num_clients=num_clients, engine_profile=engine(request_ns=overhead))
    shifted = later.play(policy, num_clients=num_clients)
    assert rows(delayed.records)["steps"] == rows(shifted.records)["steps"]
    names = ("request", "first_token_ns", "end_ns", "output_tokens", "num_preemptions")
    ends = [
        sorted(r[:5] for r in columns(run, "requests", *names, "status") if r[5] == FINISHED)
        for run in (delayed, shifted)
    ]
    assert ends[0] == ends[1]


@few
@given(small_scenarios(), policies, st.integers(1, 2000))
def test_host_time_adds_up_or_overlaps(scenario: SmallScenario, policy: Any, host: int) -> None:
    def play_with(perf: LinearSteps, **overheads: Any) -> tuple[bytes, ...]:
        return record_bytes(scenario.play(policy, perf=perf, engine_profile=engine(**overheads)).records)

    assert play_with(LinearSteps(), step_ns=host) == play_with(LinearSteps(base=1000 + host))
    assert play_with(LinearSteps(), overlapped=True) == play_with(LinearSteps())
    device = LinearSteps(host, 0, 0, 0, 0)
    assert play_with(device, step_ns=10_000, overlapped=True) == play_with(LinearSteps(10_000, 0, 0, 0, 0))
    assert play_with(device, step_ns=host, overlapped=True) == play_with(device)


# --- running ahead, watching ---


#: step times that all differ, and such that steps and arrivals often fall on the same instant
STEP_TIMES = (LinearSteps(), LinearSteps(1000, 0, 0, 0, 0), LinearSteps(500, 0, 500, 0, 0))


def random_cluster(seed: int, **options: Any) -> Callable[[], Run]:
    """Plays a random scenario on 1 to 4 clients, in an open or closed loop, to the end or cut."""
    rng = random.Random(f"cluster {seed}")
    scenario = random_scenario(seed)
    concurrency = rng.choice([0, 0, 1, 2, 4])
    if concurrency:
        scenario = closed(scenario, concurrency)
    policy, router = rng.choice(POLICIES), rng.choice(ROUTERS)
    options |= {
        "num_clients": rng.randint(1, 4),
        "perf": rng.choice(STEP_TIMES),
        "until_ns": rng.choice([FOREVER, FOREVER, 1000 * rng.randint(1, 30)]),
        "engine_profile": engine(
            step_ns=rng.choice([0, rng.randint(0, 900)]),
            token_ns=rng.choice([0, rng.randint(0, 9)]),
            request_ns=rng.choice([0, 0, rng.randint(0, 900), 1000]),
            overlapped=rng.random() < 0.5,
        ),
    }
    return lambda: scenario.play(policy, router=router(), **options)


@pytest.mark.parametrize("part", sampled(range(4), 2))
def test_running_ahead_changes_nothing(part: int) -> None:
    heap_events: list[int] = []
    num_steps = 0
    post = Kernel.step_ends
    for seed in range(150 * part, 150 * (part + 1)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Kernel, "step_ends", lambda *step: (heap_events.append(1), post(*step)))
            ahead = random_cluster(seed)()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Kernel, "horizon", lambda kernel: kernel.now)
            stepwise = random_cluster(seed)()
        assert rows(ahead.records) == rows(stepwise.records), f"random_cluster({seed})"
        num_steps += len(stepwise.records.steps)
    assert len(heap_events) < 0.6 * num_steps


@pytest.mark.parametrize("part", sampled(range(2), 1))
def test_a_policy_that_decides_nothing_need_not_be_asked(part: int) -> None:
    asked: list[int] = []
    ask = Client._ask

    def counting(client: Client, now: int) -> Batch | Wait:
        asked.append(now)
        return ask(client, now)

    for seed in range(150 * part, 150 * (part + 1)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Client, "_ask", counting)
            sometimes = random_cluster(seed)()
            num_asked = len(asked)
            patch.setattr(Client, "_only_decodes", lambda client: False)
            always = random_cluster(seed)()
        assert record_bytes(sometimes.records) == record_bytes(always.records), f"random_cluster({seed})"
        assert num_asked <= len(asked) - num_asked
        asked.clear()


@few
@given(small_scenarios(), policies, routers, st.integers(1, 3))
def test_the_ledger_only_watches(scenario: SmallScenario, policy: Any, router: Any, num_clients: int) -> None:
    with_it, without = (
        scenario.play(policy, router=router(), num_clients=num_clients, ledger=ledger).records
        for ledger in (True, False)
    )
    assert record_bytes(with_it) == record_bytes(without)


# --- names ---


@few
@given(small_scenarios(caching=True), policies, st.permutations(range(200)))
def test_other_names_for_the_same_blocks_change_nothing(scenario: SmallScenario, policy: Any, names: list[int]) -> None:
    renamed = replace(
        scenario,
        requests=tuple(
            (t, p, o, tuple(names[k] if k < 200 else 7 * k for k in keys)) for t, p, o, keys in scenario.requests
        ),
    )
    assert record_bytes(renamed.play(policy).records) == record_bytes(scenario.play(policy).records)


@few
@given(small_scenarios(), policies.filter(lambda policy: policy is not SGLang), st.data())  # it goes by the mean output
def test_requests_that_never_fit_leave_no_trace(scenario: SmallScenario, policy: Any, data: st.DataObject) -> None:
    """Rejected ones among the others only renumber these: ties keep their order."""
    requests, label = [], []
    for request in scenario.requests:
        for _ in range(data.draw(st.integers(0, 2))):
            requests.append((request[0], 10**6, 1, ()))
        label.append(len(requests))
        requests.append(request)
    mixed = replace(scenario, requests=tuple(requests)).play(policy)
    alone = rows(scenario.play(policy).records)
    own = {new: old for old, new in enumerate(label)}
    got = rows(mixed.records)
    assert got["steps"] == alone["steps"]
    for name in ("requests", "tasks"):
        renumbered = sorted((own[row[0]], *row[1:]) for row in got[name] if row[0] in own)
        reason = 5 if name == "requests" else len(alone[name])  # reasons are numbered as they come up
        assert [r[:reason] + r[reason + 1 :] for r in renumbered] == [r[:reason] + r[reason + 1 :] for r in alone[name]]


@pytest.mark.parametrize("policy", POLICIES)
def test_ties_are_served_in_order_of_arrival(policy: Any) -> None:
    run = SmallScenario(tuple((5, 4, 2, ()) for _ in range(6)), max_num_seqs=1).play(policy)
    starts = [start for _, start in sorted(columns(run, "tasks", "request", "started_ns"))]
    assert starts == sorted(starts)
    assert len(set(starts[::2])) == 6


# --- more than is needed, nothing that is shared ---


@few
@given(small_scenarios(roomy=True), policies)
def test_capacity_beyond_demand_changes_nothing(scenario: SmallScenario, policy: Any) -> None:
    much = replace(scenario, num_blocks=10**6, max_num_seqs=100, max_num_batched_tokens=10**5)
    more = replace(scenario, num_blocks=10**9, max_num_seqs=10**6, max_num_batched_tokens=10**9)
    assert record_bytes(much.play(policy).records) == record_bytes(more.play(policy).records)
    roomier = replace(scenario, num_blocks=10**9)
    assert record_bytes(roomier.play(policy).records) == record_bytes(scenario.play(policy).records)


@few
@given(small_scenarios(caching=True, shared=False), policies)
def test_a_prefix_cache_with_nothing_shared_is_off_until_a_preemption(scenario: SmallScenario, policy: Any) -> None:
    """After one, a request may find again what it computed itself, and no more than that."""
    on, off = scenario.play(policy), replace(scenario, caching=False, unit_tokens=0).play(policy)
    preempted = [end for end, how in columns(on, "tasks", "end_ns", "how") if how == PREEMPTED]
    first = min(preempted, default=FOREVER)
    both = [[row for row in rows(run.records)["steps"] if row[1] < first] for run in (on, off)]
    assert both[0] == both[1]
    if not preempted:
        assert record_bytes(on.records) == record_bytes(off.records)
    assert not any(cached for (cached,) in columns(on, "requests", "cached_tokens"))
    lost: Counter[int] = Counter()
    names = ("request", "how", "computed_tokens", "cached_tokens", "join_step", "last_step")
    for request, how, computed, cached, joined, last in columns(on, "tasks", *names):
        assert cached <= lost[request]
        if how == PREEMPTED:
            # with what the prefill before this decode computed, which has a row of its own
            lost[request] += computed + cached + (last - joined if joined >= 0 else 0)
        elif computed:
            lost[request] += computed + cached


@few
@given(small_scenarios(), policies)
def test_an_unused_client_is_absent(scenario: SmallScenario, policy: Any) -> None:
    both = ("prefill", "decode")
    alone = scenario.play(policy)
    beside = scenario.play(policy, num_clients=2, serves=[both, ("rerank",)])
    assert record_bytes(alone.records) == record_bytes(beside.records)


@few
@given(small_scenarios(), policies)
def test_a_decode_of_no_tokens_is_no_stage(scenario: SmallScenario, policy: Any) -> None:
    prefills = replace(scenario, requests=tuple((t, p, 0, keys) for t, p, _, keys in scenario.requests))
    assert record_bytes(prefills.play(policy).records) == record_bytes(
        prefills.play(policy, pipeline=StageList(("prefill",))).records
    )


@few  # SGLang's goes by the mean output of the whole workload
@given(small_scenarios(), policies.filter(lambda policy: policy is not SGLang), st.integers(2, 4), st.data())
def test_clients_behind_a_fixed_split_are_separate_runs(
    scenario: SmallScenario, policy: Any, num_clients: int, data: st.DataObject
) -> None:
    to = [data.draw(st.integers(0, num_clients - 1)) for _ in scenario.requests]
    together = rows(scenario.play(policy, num_clients=num_clients, router=Fixed(to)).records)
    for client in range(num_clients):
        mine = [i for i, chosen in enumerate(to) if chosen == client]
        if not mine:
            continue
        alone = rows(replace(scenario, requests=tuple(scenario.requests[i] for i in mine)).play(policy).records)
        assert [(0, *r[1:]) for r in together["steps"] if r[0] == client] == alone["steps"]
        assert [(*r[:3], 0, *r[4:]) for r in together["tasks"] if r[0] in mine] == [
            (mine[r[0]], *r[1:]) for r in alone["tasks"]
        ]
        # all but the number of the reason, which counts those of the other clients too
        assert [(*r[:5], *r[6:]) for r in together["requests"] if r[0] in mine] == [
            (mine[r[0]], *r[1:5], *r[6:]) for r in alone["requests"]
        ]


@few
@given(small_scenarios(), policies, st.integers(2, 4), st.data())
def test_relabelled_clients_permute_the_records(
    scenario: SmallScenario, policy: Any, num_clients: int, data: st.DataObject
) -> None:
    to = [data.draw(st.integers(0, num_clients - 1)) for _ in scenario.requests]
    label = data.draw(st.permutations(range(num_clients)))
    one = rows(scenario.play(policy, num_clients=num_clients, router=Fixed(to)).records)
    other = rows(scenario.play(policy, num_clients=num_clients, router=Fixed([label[c] for c in to])).records)
    assert sorted((label[r[0]], *r[1:]) for r in one["steps"]) == other["steps"]
    assert sorted((*r[:3], label[r[3]], *r[4:]) for r in one["tasks"]) == other["tasks"]


# --- closed loop ---


@settings(max_examples=80)
@given(small_scenarios(), policies, routers, st.integers(1, 3), st.integers(1, 12))
def test_a_closed_loop_keeps_its_concurrency(
    scenario: SmallScenario, policy: Any, router: Any, num_clients: int, concurrency: int
) -> None:
    """After each instant exactly min(concurrency, requests not yet done) are in the system."""
    scenario = closed(scenario, concurrency)
    run = scenario.play(policy, router=router(), num_clients=num_clients)
    ends = sorted(columns(run, "requests", "end_ns", "arrival_ns"))
    total = len(scenario.requests)
    assert len(ends) == total
    assert sorted(r for (r,) in columns(run, "requests", "request")) == list(range(total))
    for now, _ in ends:
        left = sum(end <= now for end, _ in ends)
        in_system = sum(arrival <= now for _, arrival in ends) - left
        assert in_system == min(concurrency, total - left)


def test_a_closed_loop_may_start_staggered() -> None:
    """The first requests come at their own instants; one that ends meanwhile lets the next in at once."""
    run = play(table([0, 9000, 50_000], [4] * 6, [1] * 6, concurrency=3), perf=LinearSteps(1000, 0, 0, 0, 0))
    arrivals = sorted(columns(run, "requests", "request", "arrival_ns"))
    assert arrivals == [(0, 0), (1, 9000), (2, 50_000), (3, 1000), (4, 2000), (5, 3000)]


# --- everything at once ---


def test_clusters_keep_the_laws() -> None:
    for seed in range(1000, 1300):
        run = random_cluster(seed)()
        assert record_bytes(run.records) == record_bytes(random_cluster(seed)().records), f"random_cluster({seed})"
        status = {status for (status,) in columns(run, "requests", "status")}
        if run.end_ns != run.kernel.now:
            continue  # cut
        assert status <= {FINISHED, REJECTED}, f"random_cluster({seed})"
        for client in run.clients:
            kv = client.residents.kv
            assert kv.available == kv.num_blocks
            assert client.residents.cohort.count == client.view.num_outstanding == client.residents.pending_tokens == 0


@dataclass
class RetrieveThenRead(StageList):
    """Retrieval elsewhere, then prefill and decode."""

    kinds: tuple[str, ...] = ("retrieve", "prefill", "decode")


@few
@given(small_scenarios(), policies, st.integers(0, 4))
def test_stages_on_different_clients_hand_over_at_the_instant(
    scenario: SmallScenario, policy: Any, concurrency: int
) -> None:
    if concurrency:
        scenario = closed(scenario, concurrency)
    serves = [("retrieve",), ("prefill", "decode"), ("prefill", "decode")]

    def once() -> Run:
        return scenario.play(policy, pipeline=RetrieveThenRead(), num_clients=3, serves=serves, router=Nosy())

    run = once()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Kernel, "horizon", lambda kernel: kernel.now)
        assert rows(run.records) == rows(once().records)
    retrieved = {r: end for r, kind, end in columns(run, "tasks", "request", "kind", "end_ns") if kind == 0}
    for request, kind, queued, preemptible in columns(run, "tasks", "request", "kind", "queued_ns", "stage_index"):
        if kind == 1 and preemptible == 1:
            assert queued >= retrieved[request]


# --- another process ---

DIGEST = """
import hashlib
from mist.routing.join_shortest_queue import JoinShortestQueue
from mist.testing import random_scenario, record_bytes
digest = hashlib.sha256()
for seed in range(40):
    for part in record_bytes(random_scenario(seed).play(num_clients=2, router=JoinShortestQueue()).records):
        digest.update(part)
print(digest.hexdigest())
"""


def test_another_process_with_another_hash_seed_gives_equal_bytes() -> None:
    source = Path(sys.modules["mist.ledger"].__file__ or "").parents[1]
    runs = [
        subprocess.run(
            [sys.executable, "-c", DIGEST],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(source)},
            capture_output=True,
            text=True,
            check=True,
        )
        for seed in ("0", "4242")
    ]
    assert runs[0].stdout == runs[1].stdout
    assert len(runs[0].stdout.strip()) == 64


def test_the_fuzz_reaches_what_it_is_meant_to_reach() -> None:
    """Preemptions, hits, rejections and several clients at work occur in plenty."""
    seen: Counter[str] = Counter()

    @settings(max_examples=150, database=None)
    @given(small_scenarios())
    def count(scenario: SmallScenario) -> None:
        records = scenario.play(num_clients=2, router=LeastOutstanding()).records
        tasks, requests = records.tasks.as_columns(), records.requests.as_columns()
        seen["preempted"] += int((tasks["how"] == PREEMPTED).sum())
        seen["hits"] += int((tasks["cached_tokens"] > 0).sum())
        seen["rejected"] += int((requests["status"] == REJECTED).sum())
        seen["ties"] += len(requests["arrival_ns"]) - len(np.unique(requests["arrival_ns"]))
        seen["both busy"] += len(np.unique(tasks["client"])) == 2

    count()
    assert min(seen[key] for key in ("preempted", "hits", "rejected", "ties", "both busy")) >= 5, seen
