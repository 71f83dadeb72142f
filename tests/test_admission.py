"""Admission: decisions on hand-made views, laws, and what early rejection is for."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from kit import LinearSteps, Run, play, table
from mist.admission import AdmissionPolicy
from mist.admission.early_rejection import EarlyRejection
from mist.admission.max_waiting import MaxWaiting
from mist.admission.rate_limit import RateLimit
from mist.batching.chunked import Chunked
from mist.errors import ScenarioError
from mist.records import FINISHED, REJECTED
from mist.request import DECODE, PREFILL, ClientView, Request
from mist.routing.least_outstanding import LeastOutstanding
from mist.scenario import load
from mist.testing import random_scenario, record_bytes
from mist.testing.cluster import KVLink
from mist.units import NS_PER_S


def view(index: int = 0, **values: int) -> ClientView:
    return ClientView(index, f"gpu-{index}", **values)


def request(tokens: int = 8, predicted: int = 5, index: int = 0) -> Request:
    return Request(index, 0, tokens, 5, predicted_output_tokens=predicted)


def statuses(run: Run) -> list[int]:
    rows = run.records.requests.as_columns()
    return rows["status"][np.argsort(rows["request"])].tolist()  # type: ignore[no-any-return]


# --- decisions ---


def test_early_rejection_holds_the_best_client_against_the_target() -> None:
    """(pending + prompt) x chunk_ns / chunk_tokens: 400 tokens at 1 ms take 0.4 s, 200 at 3 ms take 0.6 s."""
    fast = view(0, pending_prefill_tokens=300, chunk_tokens=1000, chunk_ns=NS_PER_S)
    slow = view(1, pending_prefill_tokens=100, chunk_tokens=1000, chunk_ns=3 * NS_PER_S)
    views = {PREFILL: [fast, slow], DECODE: [fast, slow]}
    assert EarlyRejection(ttft_s=0.4).refuses(request(100), views, 0) == ""
    assert EarlyRejection(ttft_s=0.39).refuses(request(100), views, 0) == "an estimated TTFT of more than 0.39 s"
    assert EarlyRejection(ttft_s=0.39).refuses(request(100), {DECODE: [slow]}, 0) == ""
    decodes = {PREFILL: [slow], DECODE: [view(2, decode_ns=40_000_000), view(3, decode_ns=50_000_000)]}
    assert EarlyRejection(tpot_s=0.04).refuses(request(100), decodes, 0) == ""
    assert EarlyRejection(tpot_s=0.03).refuses(request(100), decodes, 0) == "an estimated TPOT of more than 0.03 s"


def test_a_full_queue_is_the_shortest_one() -> None:
    policy = MaxWaiting(3)
    assert policy.refuses(request(), {PREFILL: [view(0, num_waiting=3), view(1, num_waiting=2)]}, 0) == ""
    full = {PREFILL: [view(0, num_waiting=3), view(1, num_waiting=9)]}
    assert policy.refuses(request(), full, 0) == "3 tasks or more waiting on every client"


def test_a_bucket_lets_a_burst_in_and_then_the_rate() -> None:
    """Six a second with a burst of three: at one instant three, then one more every sixth of a second."""
    policy = RateLimit(6.0, burst=3)
    at = [0, 0, 0, 0, NS_PER_S // 6, NS_PER_S // 6 + 1, NS_PER_S // 3 + 1, NS_PER_S, NS_PER_S, NS_PER_S, NS_PER_S]
    let_in = [not policy.refuses(request(), {}, now) for now in at]
    assert let_in == [True, True, True, False, True, False, True, True, True, True, False]


def test_a_bucket_of_tokens_counts_the_prompt_and_what_is_predicted() -> None:
    policy = RateLimit(100.0, burst=100, of="tokens")
    sizes = [(60, 20), (10, 11), (10, 10), (1, 0)]
    assert [not policy.refuses(request(*size), {}, 0) for size in sizes] == [True, False, True, False]
    assert policy.refuses(request(1, 0), {}, 0) == "more than 100 tokens a second, with a burst of 100"


def test_no_bucket_lets_more_in_than_it_holds_and_gets() -> None:
    rng = np.random.default_rng(5)
    policy = RateLimit(1000.0, burst=7)
    times = np.cumsum(rng.exponential(2e5, 4000)).astype(np.int64)
    let_in = np.array([now for now in times.tolist() if not policy.refuses(request(), {}, now)])
    for width in (1, 10, 100, 1000):
        spans = (let_in[width:] - let_in[:-width]) / 1e6  # ms, one token each
        assert (width + 1 <= 7 + spans + 1e-4).all()
    assert len(let_in) == pytest.approx(7 + times[-1] / 1e6, abs=2)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: EarlyRejection(), "ttft_s and tpot_s"),
        (lambda: EarlyRejection(ttft_s=0), "ttft_s"),
        (lambda: MaxWaiting(0), "max_num_waiting"),
        (lambda: RateLimit(0), "rate_per_s"),
        (lambda: RateLimit(1, 0), "burst"),
    ],
)
def test_parameters_out_of_range_are_refused(make: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


# --- laws ---


@pytest.mark.parametrize("policy", [EarlyRejection(1e6, 1e6), MaxWaiting(1 << 40), RateLimit(1e9, 1 << 40)])
def test_a_policy_that_refuses_nobody_changes_nothing(policy: AdmissionPolicy) -> None:
    for seed in range(30):
        places: dict[str, Any] = {"num_clients": 3, "serves": [(PREFILL,), (DECODE,), (PREFILL, DECODE)]}
        plain, let_in = (
            record_bytes(random_scenario(seed).play(router=LeastOutstanding(), admission=policies, **places).records)
            for policies in ([], [policy])
        )
        assert plain == let_in


def test_whoever_is_refused_leaves_at_once_and_is_counted_with_the_reason() -> None:
    run = play(table([0, 10, 20, 900_000], [50] * 4, [3] * 4), admission=[MaxWaiting(1)], policy=lambda: Chunked(64, 1))
    assert statuses(run) == [FINISHED, FINISHED, REJECTED, FINISHED]
    rows = run.records.requests.as_columns()
    (at,) = np.flatnonzero(rows["request"] == 2)
    assert rows["end_ns"][at] == rows["arrival_ns"][at] == 20
    assert rows["output_tokens"][at] == 0
    assert run.records.reasons[rows["reason"][at]] == "1 tasks or more waiting on every client"
    assert 2 not in run.records.tasks.as_columns()["request"]


def test_the_first_policy_that_refuses_tells_the_reason_and_later_ones_are_not_charged() -> None:
    run = play(table([0] * 6, [5] * 6, [0] * 6), policy=lambda: Chunked(64, 1),
               admission=[MaxWaiting(2), RateLimit(1.0, 9)])  # fmt: skip
    assert Counter(statuses(run)) == {FINISHED: 2, REJECTED: 4}
    assert run.records.reasons == ["2 tasks or more waiting on every client"]


def test_an_estimate_of_one_queue_is_its_wait() -> None:
    """Chunks of 10 tokens that take 10 µs each: the k-th of ten prompts at once waits k x 10 µs, so four come in."""
    run = play(table([0] * 10, [10] * 10, [0] * 10), perf=LinearSteps(0, 1000, 0, 0, 0), max_model_len=1000,
               num_blocks=100, policy=lambda: Chunked(10, 1), admission=[EarlyRejection(ttft_s=40e-6)])  # fmt: skip
    assert statuses(run) == [FINISHED] * 4 + [REJECTED] * 6
    ends = run.records.requests.as_columns()["end_ns"]
    assert ends.max() == 40_000


def test_load_that_has_grown_meanwhile_is_found_before_the_hand_over() -> None:
    """All come while nobody decodes; a decode step of n takes n x 100 ns, and only three may be in one."""
    perf = LinearSteps(0, 10, 100, 0, 0)
    run = play(
        table([0] * 6, [10] * 6, [50] * 6), num_clients=2, serves=[(PREFILL,), (DECODE,)], perf=perf,
        policy=lambda: Chunked(10, 8), num_blocks=100, max_model_len=1000,
        admission=[EarlyRejection(tpot_s=300e-9)],
    )  # fmt: skip
    counted = Counter(statuses(run))
    assert counted[FINISHED] == 3
    assert counted[REJECTED] == 3
    steps = run.records.steps.as_columns()
    assert steps["num_decodes"].max() == 3
    assert run.records.reasons == ["an estimated TPOT of more than 3e-07 s"]
    assert set(run.records.tasks.as_columns()["request"].tolist()) == set(range(6))  # their prefills were in vain


def test_rejected_hand_overs_keep_the_laws() -> None:
    """Under the ledger, with transfers, branches of nobody, and blocks that come back."""
    rejected = 0
    for seed in range(60):
        run = random_scenario(seed).play(
            router=LeastOutstanding(), num_clients=2, serves=[(PREFILL,), (DECODE,)],
            nic=KVLink(bytes_per_token=8, bytes_per_s=1e9), admission=[EarlyRejection(tpot_s=1.01e-6)],
        )  # fmt: skip
        began = set(run.records.tasks.as_columns()["request"].tolist())
        rejected += sum(status == REJECTED and i in began for i, status in enumerate(statuses(run)))
        assert all(client.residents.kv.used == 0 for client in run.clients)
    assert rejected > 20


def test_a_closed_loop_goes_on_when_one_is_refused() -> None:
    workload = table([0] * 20, [30] * 20, [4] * 20, concurrency=5)
    run = play(workload, admission=[MaxWaiting(2)], policy=lambda: Chunked(64, 1))
    assert len(statuses(run)) == 20
    assert set(statuses(run)) == {FINISHED, REJECTED}


# --- in a scenario ---

CHAT: dict[str, Any] = {
    "arrivals": {"poisson": {"rate_per_s": 40}}, "num_requests": 400, "input_tokens": 2000, "output_tokens": 20,
}  # fmt: skip
GPU: dict[str, Any] = {"device": "h100-sxm", "model": "llama-3.1-8b", "engine": "vllm-0.10", "perf": "roofline"}
BUSY: dict[str, Any] = {"seed": 2, "workload": CHAT, "clients": {"gpu": GPU}, "slo": {"ttft_s": {"p99": 1}}}


def test_early_rejection_keeps_goodput_up_under_overload() -> None:
    """At twice the capacity nearly nobody meets the target without it; with it most of those served do."""
    plain, early = (
        load(BUSY, **more).run(check=True) for more in ({}, {"admission": {"early_rejection": {"ttft_s": 1.0}}})
    )
    assert plain.metrics["requests"]["rejected"] == 0
    assert early.metrics["requests"]["rejected"] > 40
    assert any("rejected: an estimated TTFT of more than 1 s" in note for note in early.metrics["notes"])
    good = []
    for each in (plain, early):
        rows = each.records.requests.as_columns()
        in_time = rows["first_token_ns"] - rows["arrival_ns"] <= NS_PER_S
        good.append(int((in_time & (rows["status"] == FINISHED)).sum()))
    assert good[1] > 2 * good[0]


def test_tenants_have_buckets_of_their_own() -> None:
    two = {**BUSY, "tenants": {"a": {"workload": CHAT}, "b": {"workload": CHAT, "admission": []}},
           "admission": {"rate_limit": {"rate_per_s": 10}}}  # fmt: skip
    del two["workload"]
    metrics = load(two).run(check=True).metrics["tenants"]
    assert metrics["b"]["requests"]["rejected"] == 0
    assert 0 < metrics["a"]["requests"]["finished"] <= 1 + 10 * 400 / 40 * 1.5
    resolved = load(two).resolved()
    assert load(resolved) == load(two)
    assert "admission" not in resolved["tenants"]["b"]


def test_admission_reads_back_and_none_is_not_written() -> None:
    given = [{"rate_limit": {"rate_per_s": 30, "burst": 5}}, {"max_waiting": 50}]
    scenario = load(BUSY, admission=given)
    assert load(scenario.resolved()) == scenario
    assert [spec.name for spec in scenario.tenants[""].admission] == ["rate_limit", "max_waiting"]
    assert "admission" not in load(BUSY).resolved()


@pytest.mark.parametrize(
    ("admission", "says"),
    [
        ({"early_rejection": {}}, "ttft_s and tpot_s are both left out"),
        ({"early_rejection": {"tpot_s": 1, "ttft": 2}}, "no key 'ttft'"),
        ("max_wating", "no admission policy 'max_wating'"),
        ([{"max_waiting": {"max_num_waiting": 3, "stage": "embed"}}], "looks at the clients of 'embed'"),
        ({"rate_limit": {"rate_per_s": 1, "of": "bytes"}}, "'requests' or 'tokens'"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(admission: Any, says: str) -> None:
    with pytest.raises(ScenarioError) as caught:
        load(BUSY, admission=admission)
    assert says in "\n".join(map(str, caught.value.problems))
