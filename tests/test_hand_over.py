"""Prefill on one client and decode on another: closed forms, random pools under the ledger, planted bugs."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kit import POLICIES, LinearSteps, Run, engine, play, rows, sampled, table
from mist.batching.chunked import Chunked
from mist.client import Client
from mist.coordinator import Coordinator
from mist.errors import InvariantError
from mist.front_end import FrontEnd
from mist.hand_over import HandOver
from mist.kernel import Kernel
from mist.metrics import ClientInfo, summarise
from mist.metrics.stages import PARTS
from mist.network import Network
from mist.records import FINISHED, REJECTED, UNFINISHED, Records
from mist.request import Batch, ClientView, Task, Wait
from mist.residents import Residents
from mist.routing.join_shortest_queue import JoinShortestQueue
from mist.routing.least_outstanding import LeastOutstanding
from mist.routing.round_robin import RoundRobin
from mist.testing import random_scenario
from mist.testing.cluster import KVLink

ONE_TO_ONE = [("prefill",), ("decode",)]
#: 10 bytes a token at one byte per ns
LINK = KVLink(10, 1e9, 500)


def pair(workload: Any, **options: Any) -> Run:
    """One prefill client, gpu-0, and one that decodes, gpu-1."""
    return play(workload, num_clients=2, serves=ONE_TO_ONE, **{"nic": LINK, **options})


def column(records: Records, table_name: str, name: str) -> list[int]:
    return list(getattr(records, table_name).as_columns()[name].tolist())


STREAMS = pytest.mark.parametrize("first_token", ["prefill", "decode"])


def figures(run: Run) -> dict[str, Any]:
    return summarise(run.records, clients=[ClientInfo(c.name, c.name) for c in run.clients])


# --- closed forms ---


@STREAMS
@pytest.mark.parametrize("output", [2, 3, 40])
@pytest.mark.parametrize("link", [LINK, KVLink(7, 3e9, 0), KVLink(10)])
def test_one_request_alone_is_the_sum_of_its_parts(link: KVLink, output: int, first_token: str) -> None:
    run = pair(table([100], [300], [output]), nic=link, engine_profile=engine(first_token=first_token))
    steps = LinearSteps()
    prefill_end = 100 + steps.of(300, 0, 0, 1)
    arrival = prefill_end + link.wire_ns(300 * link.bytes_per_token) + link.latency_ns
    end = arrival + sum(steps.of(0, 1, 300 + k, 0) for k in range(1, output))
    assert column(run.records, "requests", "first_token_ns") == [arrival if first_token == "decode" else prefill_end]
    assert column(run.records, "requests", "end_ns") == [end]
    assert column(run.records, "requests", "output_tokens") == [output]
    assert column(run.records, "transfers", "bytes") == [300 * link.bytes_per_token]
    assert column(run.records, "transfers", "end_ns") == [arrival]
    assert sum(column(run.records, "steps", "num_prefill_tokens")) == 300


@STREAMS
@pytest.mark.parametrize("output", [0, 1])
def test_what_the_prefill_answers_alone_moves_nowhere(output: int, first_token: str) -> None:
    run = pair(table([0], [300], [output]), engine_profile=engine(first_token=first_token))
    assert not len(run.records.transfers)
    assert column(run.records, "requests", "output_tokens") == [output]
    assert column(run.records, "requests", "end_ns") == [LinearSteps().of(300, 0, 0, 1)]
    assert column(run.records, "requests", "first_token_ns") == [LinearSteps().of(300, 0, 0, 1) if output else -1]
    assert figures(run)["kv_transfer"] is None


@pytest.mark.parametrize("policy", POLICIES)
def test_over_an_infinite_link_requests_that_never_meet_run_as_on_one_client(policy: Any) -> None:
    rng = random.Random(5)
    prompts, outputs = ([rng.randint(1, 90) for _ in range(20)] for _ in range(2))
    workload = table([10**9 * i for i in range(20)], prompts, outputs)
    apart, together = pair(workload, nic=KVLink(10), policy=policy), play(workload, policy=policy)
    assert rows(apart.records)["requests"] == rows(together.records)["requests"]
    durations = [np.subtract(column(run.records, "steps", "end_ns"), column(run.records, "steps", "start_ns")).sum()
                 for run in (apart, together)]  # fmt: skip
    assert durations[0] == durations[1]


def test_transfers_of_one_client_share_its_link_and_their_latencies_overlap() -> None:
    """Two prompts end in one step: both at half the rate until the shorter one is there, then the rest at all of it."""
    run = pair(table([0, 0], [300, 200], [5, 5]))
    end = LinearSteps().of(500, 0, 0, 2)
    assert column(run.records, "transfers", "request") == [1, 0]
    assert column(run.records, "transfers", "start_ns") == [end, end]
    assert column(run.records, "transfers", "end_ns") == [end + 4500, end + 5500]
    summary = figures(run)["kv_transfer"]
    assert summary["transfers"] == 2
    assert summary["mean_bytes"] == 2500
    assert summary["time_s"]["mean"] == pytest.approx(5000e-9)


def test_each_prefill_client_has_a_link_of_its_own() -> None:
    run = play(table([0, 0], [300, 300], [5, 5]), num_clients=3, serves=[("prefill",)] * 2 + [("decode",)], nic=LINK)
    assert column(run.records, "transfers", "sender") == [0, 1]
    assert len(set(column(run.records, "transfers", "end_ns"))) == 1


def test_the_stage_that_streams_the_first_token_moves_nothing_else() -> None:
    """Tokens, steps and transfers stay; the first token of whatever moved comes out as it joins."""
    workload = table([0, 0, 500, 9000], [300, 200, 90, 40], [5, 12, 1, 7])
    early, late = (pair(workload, engine_profile=engine(first_token=who)) for who in ("prefill", "decode"))
    for name in ("steps", "transfers"):
        assert rows(early.records)[name] == rows(late.records)[name]
    for name in ("request", "end_ns", "output_tokens"):
        assert column(early.records, "requests", name) == column(late.records, "requests", name)
    tasks = late.records.tasks.as_columns()
    joined = {r: int(t) for r, k, t in zip(*(tasks[n] for n in ("request", "kind", "started_ns")), strict=True) if k}
    first, ended = (
        dict(zip(column(run.records, "requests", "request"), column(run.records, "requests", "first_token_ns"),
                 strict=True)) for run in (late, early)
    )  # fmt: skip
    assert first == ended | joined
    assert all(joined[r] > ended[r] for r in joined)


# --- blocks ---


def test_the_prefill_clients_blocks_are_free_once_its_transfer_is_over() -> None:
    """Room for one prompt at a time: the second starts when the first one's KV cache is gone."""
    run = pair(table([0, 0], [32, 32], [3, 3]), num_blocks=3)
    starts = column(run.records, "steps", "start_ns")
    arrivals = column(run.records, "transfers", "end_ns")
    assert column(run.records, "steps", "client")[0] == 0
    second = next(s for s, c in zip(starts[1:], column(run.records, "steps", "client")[1:], strict=True) if c == 0)
    assert second == arrivals[0]


def test_a_decode_client_without_room_lets_them_wait() -> None:
    """Four contexts of 33 tokens (3 blocks) for a cache of 7 blocks: two at a time."""
    run = pair(table([0] * 4, [33] * 4, [4] * 4), num_blocks=7, policy=lambda: Chunked(40, 4), nic=KVLink(1, 1e12))
    tasks = run.records.tasks.as_columns()
    decodes = tasks["kind"] == 1
    assert (tasks["started_ns"] > tasks["queued_ns"])[decodes].any()
    steps = run.records.steps.as_columns()
    assert steps["num_decodes"][steps["client"] == 1].max() == 2
    assert column(run.records, "requests", "num_preemptions") == [0] * 4


def test_a_decode_joins_the_very_next_step_and_computes_nothing() -> None:
    run = pair(table([0, 2000], [40, 40], [30, 5]))
    tasks, steps = run.records.tasks.as_columns(), run.records.steps.as_columns()
    second = (tasks["request"] == 1) & (tasks["kind"] == 1)
    (queued,), (started,), (computed,) = (tasks[n][second] for n in ("queued_ns", "started_ns", "computed_tokens"))
    starts = steps["start_ns"][steps["client"] == 1]
    assert started == starts[starts >= queued][0]
    assert computed == 0
    assert not steps["num_prefill_tokens"][steps["client"] == 1].any()


def test_a_preempted_decode_is_computed_again_where_it_decodes() -> None:
    run = pair(table([0, 0], [24, 24], [30, 30]), num_blocks=6, block_size=16, policy=lambda: Chunked(64, 4))
    tasks = run.records.tasks.as_columns()
    assert sum(column(run.records, "requests", "num_preemptions")) > 0
    again = (tasks["kind"] == 1) & (tasks["computed_tokens"] > 0)
    assert set(tasks["client"][again].tolist()) == {1}
    assert column(run.records, "requests", "output_tokens") == [30, 30]


def test_a_request_that_fits_on_no_decode_client_is_rejected_before_its_transfer() -> None:
    def shrink(kernel: Kernel, clients: list[Client]) -> None:
        clients[1].max_model_len = 50

    run = pair(table([0, 0], [40, 40], [5, 20]), prepare=shrink)
    assert sorted(column(run.records, "requests", "status")) == [FINISHED, REJECTED]
    assert len(run.records.transfers) == 1
    assert run.records.reasons == ["more tokens than max_model_len 50 of gpu-1"]
    assert not run.clients[0].residents.kv.used


def test_a_prefill_client_needs_no_room_for_the_answer() -> None:
    run = pair(table([0], [40], [4000]), num_blocks=300, prepare=lambda _, clients: clients[0].__setattr__(
        "max_model_len", 40))  # fmt: skip
    assert column(run.records, "requests", "status") == [FINISHED]


def test_a_router_sees_decodes_that_are_still_on_their_way() -> None:
    """Over a slow link all prompts end before the first arrival: counting arrivals alone would send all to one."""
    workload = table([0, 0, 0, 0], [20] * 4, [5] * 4)
    serves = [("prefill",), ("decode",), ("decode",)]
    run = play(workload, num_clients=3, serves=serves, nic=KVLink(10, 1e6), router=LeastOutstanding())
    assert sorted(column(run.records, "transfers", "receiver")) == [1, 1, 2, 2]


# --- any pools ---


class Nosy:
    """Chooses by a hash of what it sees."""

    def choose(self, task: Task, views: Any, now: int) -> ClientView:
        seen = [(v.num_outstanding, v.num_waiting, v.num_running, v.kv_blocks_used, v.decode_context) for v in views]
        chosen: ClientView = views[hash((now, *seen)) % len(views)]
        return chosen


class ShortestFirst(Chunked):
    """Admits in an order of its own, and gives up at the first that doesn't fit."""

    def next_batch(self, queue: Any, cohort: Any, budget: Any, now: int) -> Batch | Wait:
        if cohort.count:
            budget.grow_decodes()
        batch = Batch([(task, task.remaining_tokens) for task in queue.prefilling], decode=True)
        batch.chunks = [(task, chunk) for task, chunk in batch.chunks if budget.grow(task, chunk)]
        batch.chunks = [(task, chunk) for task, chunk in batch.chunks if task.admission >= 0]
        for task in sorted(queue.waiting, key=lambda task: task.remaining_tokens):
            if budget.num_running >= self.max_num_seqs or not (chunk := budget.admit(task, 1000)):
                break
            batch.chunks.append((task, chunk))
        return batch if batch.chunks or cohort.count else Wait()


def random_pools(seed: int) -> Callable[[], Run]:
    """N prefill and M decode clients, some of both, tiny pools and budgets; open or closed loop, cut or not."""
    rng = random.Random(seed)
    scenario = random_scenario(seed)
    prefills, decodes = rng.randint(1, 3), rng.randint(1, 3)
    serves: list[tuple[str, ...]] = [("prefill",)] * prefills
    serves += [rng.choice([("decode",), ("decode",), ("prefill", "decode")]) for _ in range(decodes)]
    if rng.random() < 0.3:
        scenario = replace(scenario, concurrency=2)
    policy, router = (
        (*POLICIES, ShortestFirst)[seed % (len(POLICIES) + 1)],
        rng.choice([RoundRobin, LeastOutstanding, JoinShortestQueue, Nosy]),
    )
    options: dict[str, Any] = {
        "num_clients": prefills + decodes,
        "serves": serves,
        "nic": rng.choice([None, KVLink(rng.randint(1, 900), 1e9, rng.choice([0, 500, 3000]))]),
        "engine_profile": engine(request_ns=rng.choice([0, 0, 300, 1000]), step_ns=rng.choice([0, 70])),
    }
    if rng.random() < 0.2:
        options["until_ns"] = rng.randint(1, 60_000)
    options["engine_profile"] = replace(options["engine_profile"], first_token=rng.choice(["prefill", "decode"]))
    return lambda: scenario.play(policy, router=router(), **options)


@pytest.mark.parametrize("part", sampled(range(3), 1))
def test_random_pools_drain_under_the_ledger(part: int) -> None:
    counts = np.zeros(4, np.int64)
    for seed in range(300 * part, 300 * (part + 1)):
        run = random_pools(seed)()
        requests, tokens = run.records.requests.as_columns(), figures(run)
        cut = (requests["status"] == UNFINISHED).sum()
        assert cut == 0 or run.end_ns <= 60_000, f"random_pools({seed})"
        emitted = sum(pool["output_tokens"] for pool in tokens["clients"].values())
        assert emitted == requests["output_tokens"].sum(), f"random_pools({seed})"
        counts += (requests["num_preemptions"].sum(), (requests["status"] == REJECTED).sum(), cut,
                   len(run.records.transfers))  # fmt: skip
    assert counts.min() > 0, f"preemptions, rejections, cut, transfers: {counts}: proves little"


@pytest.mark.parametrize("part", sampled(range(2), 1))
def test_running_ahead_changes_nothing_between_pools(part: int) -> None:
    for seed in range(100 * part, 100 * (part + 1)):
        ahead = random_pools(seed)()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Kernel, "horizon", lambda kernel: kernel.now)
            assert rows(ahead.records) == rows(random_pools(seed)().records), f"random_pools({seed})"


def test_gaps_between_tokens_span_the_transfer() -> None:
    """Every gap of every request adds up to its time from the first token to the last, hand-over included."""
    for seed in range(60):
        run = random_pools(seed)()
        requests = run.records.requests.as_columns()
        if (requests["status"] != FINISHED).any() or not requests["output_tokens"].any():
            continue
        summary = figures(run)
        many = requests["output_tokens"] > 1
        spans = (requests["end_ns"] - requests["first_token_ns"])[many].sum()
        gaps = (requests["output_tokens"][many] - 1).sum()
        if gaps:
            assert summary["itl_s"]["mean"] == pytest.approx(spans / gaps / 1e9)
        parts = [kind[part]["mean"] for kind in summary["stages"].values() for part in PARTS]
        assert sum(parts) == pytest.approx(summary["e2e_s"]["mean"])


@STREAMS
def test_a_cut_leaves_transfers_without_an_end(first_token: str) -> None:
    first = LinearSteps().of(500, 0, 0, 2)
    profile = engine(first_token=first_token)
    run = pair(table([0, 0], [300, 200], [5, 5]), until_ns=first + 1000, engine_profile=profile)
    assert column(run.records, "transfers", "start_ns") == [first, first]
    assert column(run.records, "transfers", "end_ns") == [-1, -1]
    assert column(run.records, "requests", "output_tokens") == [first_token == "prefill"] * 2
    assert figures(run)["kv_transfer"] is None


# --- planted bugs ---

Sabotage = Callable[[pytest.MonkeyPatch], Any]


def keep_sent_blocks(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Residents, "sent", lambda self, task: None)


def free_blocks_at_once(patch: pytest.MonkeyPatch) -> None:
    def free(self: Residents, task: Task) -> None:
        self.leave(task, task.computed_tokens, task.computed_tokens)
        self.sending[task.admission] = task

    patch.setattr(Residents, "hold", free)


def lose_a_transfer(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Network, "send", lambda *_, **__: None)


def leave_on_the_way(patch: pytest.MonkeyPatch) -> None:
    original = Coordinator.hand_over

    def leave(self: Coordinator, task: Task, *arguments: Any) -> bool:
        self._leave(task.request, FINISHED, arguments[-1])
        return original(self, task, *arguments)

    patch.setattr(Coordinator, "hand_over", leave)


def beat_the_link(patch: pytest.MonkeyPatch) -> None:
    original = Network.send

    def send(self: Network, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **options)
        next(reversed(self.in_flight)).num_bytes *= 2

    patch.setattr(Network, "send", send)


def go_on_without_the_cache(patch: pytest.MonkeyPatch) -> None:
    def early(self: HandOver, order: Any, now: int) -> None:
        order.here.sent(order.task)
        order.followings[0].queued_ns = now - 1
        order.there.front_end.receive(order.followings[0], now)

    patch.setattr(HandOver, "_arrived", early)


def compute_the_context_again(patch: pytest.MonkeyPatch) -> None:
    original = FrontEnd.receive

    def receive(self: FrontEnd, task: Task, now: int) -> None:
        if task.generates:
            task.computed_tokens = task.inherited_tokens = 0
            self.incoming_tokens += task.target_tokens
        original(self, task, now)

    patch.setattr(FrontEnd, "receive", receive)


SABOTAGES: dict[Sabotage, str] = {
    keep_sent_blocks: r"gpu-0: KV caches being sent: \d is not \d",
    free_blocks_at_once: "gpu-0: KV blocks: .* is not",
    lose_a_transfer: "gpu-0: KV caches being sent: 2 is not 0",
    leave_on_the_way: "tasks of requests: 0 is not 2",
    beat_the_link: "a transfer from 0 to 1 beats its path",
    go_on_without_the_cache: "decodes went on without their KV cache",
    compute_the_context_again: "tokens computed again without a preemption|tokens emitted|computed and found",
}


@STREAMS
@pytest.mark.parametrize("sabotage", SABOTAGES, ids=lambda sabotage: sabotage.__name__)
def test_a_planted_bug_is_caught(sabotage: Sabotage, first_token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sabotage(monkeypatch)
    with pytest.raises(InvariantError, match=SABOTAGES[sabotage]):
        pair(table([0, 0, 9000], [300, 200, 50], [5, 5, 9]), engine_profile=engine(first_token=first_token))
