"""Prefill and decode apart: reservations, early choice, groups, layer-wise transfers, conversions, lending; their laws.

Guards what `hand_over`, `reservations`, `streams` and `lending` add; plain hand-overs have tests of their own.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from kit import LinearSteps, Run, engine, play, rows, table
from mist.batching.chunked import Chunked
from mist.batching.continuous import Continuous
from mist.errors import InvariantError, ScenarioError
from mist.hand_over import Conversion, HandOver, Terms
from mist.kernel import Kernel
from mist.records import FINISHED
from mist.request import ClientView, Task
from mist.reservations import Reservations
from mist.routing.join_shortest_queue import JoinShortestQueue
from mist.routing.least_outstanding import LeastOutstanding
from mist.routing.round_robin import RoundRobin
from mist.scenario import load
from mist.scenario.result import Result
from mist.testing import random_scenario
from mist.testing.cluster import KVLink

P, D = ("prefill",), ("decode",)
EARLY, LATE = Terms(at_arrival=True), Terms(at_arrival=True, reserves_early=False)
LAYERWISE = Terms(at_arrival=True, layerwise=True)
#: 10 bytes a token at one byte per ns
LINK = KVLink(10, 1e9, 500)
#: a prompt of n tokens takes 100 n ns, a step of decodes 1000
STEPS = LinearSteps(base=0, per_prefill_token=100, per_decode=1000, per_context=0, per_prefill=0)


def pair(workload: Any, **options: Any) -> Run:
    return play(workload, **{"num_clients": 2, "serves": [P, D], "nic": LINK, **options})


def column(run: Run | Result, name: str, key: str) -> list[int]:
    return list(getattr(run.records, name).as_columns()[key].tolist())


def by_request(run: Run, kind: int, key: str) -> dict[int, int]:
    tasks = run.records.tasks.as_columns()
    mine = tasks["kind"] == kind
    return dict(zip(tasks["request"][mine].tolist(), tasks[key][mine].tolist(), strict=True))


# --- room on the decode side ---


@pytest.mark.parametrize("terms", [Terms(), LATE])
def test_a_transfer_begins_once_there_is_room(terms: Terms) -> None:
    """Room for one context at a time: the second one's KV cache stays where it was computed until the first is done."""
    run = pair(table([0, 0], [64, 64], [5, 5]), num_blocks=8, terms=terms, perf=LinearSteps(), block_size=16)
    ends = dict(zip(column(run, "requests", "request"), column(run, "requests", "end_ns"), strict=True))
    transfers = run.records.transfers.as_columns()
    computed = by_request(run, 0, "end_ns")
    assert transfers["queued_ns"].tolist() == [computed[0], computed[1]]
    assert transfers["start_ns"].tolist() == [computed[0], ends[0]]
    assert by_request(run, 1, "started_ns")[1] == transfers["end_ns"][1]


def test_with_early_room_a_prompt_is_not_computed_before_there_is_some() -> None:
    run = pair(table([0, 0], [64, 64], [5, 5]), num_blocks=8, terms=EARLY, block_size=16)
    ends = dict(zip(column(run, "requests", "request"), column(run, "requests", "end_ns"), strict=True))
    assert by_request(run, 0, "started_ns")[1] == ends[0]
    assert column(run, "transfers", "queued_ns") == column(run, "transfers", "start_ns")


def test_an_early_choice_sees_those_made_before() -> None:
    """All arrive at once, before anybody decodes: counting what has come alone would send all to one client."""
    for terms in (EARLY, LATE, LAYERWISE):
        run = play(table([0] * 6, [20] * 6, [5] * 6), num_clients=4, serves=[P, D, D, D], nic=LINK, terms=terms,
                   router=LeastOutstanding())  # fmt: skip
        assert sorted(column(run, "transfers", "receiver")) == [1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("terms", [EARLY, LAYERWISE])
@pytest.mark.parametrize("output", [0, 1])
def test_room_for_nobody_is_given_back(terms: Terms, output: int) -> None:
    run = pair(table([0, 0, 9], [300] * 3, [output] * 3), terms=terms, num_blocks=40)
    assert column(run, "requests", "status") == [FINISHED] * 3
    assert not run.clients[1].residents.kv.used


# --- layer by layer ---


def after_the_prefill(chunks: list[tuple[int, int]], num_layers: int, ns_per_byte: Fraction) -> Fraction:
    """How long after the last chunk the last byte leaves: chunks are (bytes, ns that it is computed in)."""
    left = now = Fraction(0)
    for num_bytes, took in chunks:
        but_last = num_bytes * (num_layers - 1) // num_layers
        begin = max(left, now + Fraction(took, num_layers))
        now += took
        left = max(begin + but_last * ns_per_byte, now if but_last and begin < now else Fraction(0))
        left = max(left, now) + (num_bytes - but_last) * ns_per_byte
    return left - now


@pytest.mark.parametrize("num_layers", [1, 2, 8, 80])
@pytest.mark.parametrize("ns_per_byte", [1, 4, 10, 40, 200])
def test_alone_a_layerwise_transfer_is_exposed_by_its_formula(num_layers: int, ns_per_byte: int) -> None:
    link = KVLink(10, 1e9 / ns_per_byte, 700)
    run = pair(table([50], [320], [3]), terms=LAYERWISE, num_layers=num_layers, nic=link, perf=STEPS)
    compute, transfer = 32_000, 3200 * ns_per_byte
    prefill_end = 50 + compute
    exposed = max(transfer // num_layers, transfer - compute * (num_layers - 1) // num_layers)
    assert column(run, "transfers", "end_ns") == [prefill_end + exposed + 700]
    assert column(run, "transfers", "start_ns") == [50 + compute // num_layers]
    assert column(run, "transfers", "bytes") == [3200]
    assert exposed == after_the_prefill([(3200, compute)], num_layers, Fraction(ns_per_byte))


@pytest.mark.parametrize("num_layers", [1, 4])
@pytest.mark.parametrize("ns_per_byte", [1, 8, 12, 50])
def test_chunks_travel_while_later_ones_are_computed(num_layers: int, ns_per_byte: int) -> None:
    link = KVLink(10, 1e9 / ns_per_byte)
    run = pair(table([0], [240], [3]), terms=LAYERWISE, num_layers=num_layers, nic=link, perf=STEPS,
               policy=lambda: Chunked(max_num_batched_tokens=80, max_num_seqs=8))  # fmt: skip
    exposed = after_the_prefill([(800, 8000)] * 3, num_layers, Fraction(ns_per_byte))
    assert column(run, "transfers", "end_ns") == [24_000 + exposed]
    assert column(run, "transfers", "bytes") == [2400]


def test_over_infinite_links_layers_change_nothing() -> None:
    for seed in range(40):
        scenario = random_scenario(seed, roomy=True)
        options: dict[str, Any] = {"num_clients": 3, "serves": [P, D, D], "nic": KVLink(10)}
        whole, layered = (scenario.play(Chunked, terms=terms, **options) for terms in (EARLY, LAYERWISE))
        for name in ("requests", "tasks", "steps"):
            assert rows(whole.records)[name] == rows(layered.records)[name]


def test_layers_of_two_prompts_share_the_link() -> None:
    """Bound by the link: both are under way from the first layer on, and end when all bytes have crossed it."""
    link = KVLink(10, 1e7)
    run = pair(table([0, 0], [320, 320], [3, 3]), terms=LAYERWISE, nic=link, perf=STEPS,
               policy=lambda: Chunked(2048, 8))  # fmt: skip
    start = 64_000 // 4
    assert column(run, "transfers", "start_ns") == [start] * 2
    assert column(run, "transfers", "end_ns") == [start + 6400 * 100] * 2


# --- groups and dtypes ---


def test_a_group_hands_over_to_its_own() -> None:
    terms = Terms(reach={0: frozenset([2]), 1: frozenset([3])})
    run = play(table([0] * 8, [20] * 8, [5] * 8), num_clients=4, serves=[P, P, D, D], nic=LINK, terms=terms)
    ways = set(zip(column(run, "transfers", "sender"), column(run, "transfers", "receiver"), strict=True))
    assert ways == {(0, 2), (1, 3)}


@pytest.mark.parametrize("is_before", [False, True])
def test_a_conversion_takes_its_time_once(is_before: bool) -> None:
    terms = Terms(conversions={(0, 1): Conversion(2.5, is_before)})

    def halve(_: Kernel, clients: Any) -> None:
        clients[1].kv_bytes_per_token = 5

    run = pair(table([0], [300], [3]), terms=terms, perf=STEPS, prepare=halve)
    sent = 30_000 + (750 if is_before else 0)
    num_bytes = 1500 if is_before else 3000
    assert column(run, "transfers", "bytes") == [num_bytes]
    assert column(run, "transfers", "start_ns") == [sent]
    assert column(run, "transfers", "end_ns") == [sent + num_bytes + 500]
    assert by_request(run, 1, "started_ns") == {0: 30_000 + 750 + num_bytes + 500}


# --- lending ---

LOAN = {2: 100}


def burst(lending: Mapping[int, int], num: int = 12, gap_ns: int = 0) -> Run:
    """One prefill client, one that decodes, and one that decodes and is lent."""
    workload = table([gap_ns * i for i in range(num)], [80] * num, [6] * num)
    return play(workload, num_clients=3, serves=[P, D, D], nic=LINK, lending=lending, perf=STEPS,
                policy=lambda: Chunked(80, 8), router=LeastOutstanding())  # fmt: skip


def test_a_lending_pool_converts_drains_and_returns() -> None:
    run = burst(LOAN)
    ((lent, since, until),) = zip(*(column(run, "loans", k) for k in ("client", "start_ns", "end_ns")), strict=True)
    tasks = run.records.tasks.as_columns()
    prompts = (tasks["kind"] == 0) & (tasks["client"] == 2)
    assert (lent, since) == (2, 0)
    assert 0 < prompts.sum() < 12
    assert until == tasks["end_ns"][prompts].max() < max(column(run, "requests", "end_ns"))
    assert (tasks["queued_ns"][prompts] <= until).all()
    assert max(column(run, "requests", "end_ns")) < max(column(burst({}), "requests", "end_ns"))
    decoded_there = (tasks["kind"] == 1) & np.isin(tasks["request"], tasks["request"][prompts])
    assert set(tasks["client"][decoded_there].tolist()) == {2}
    assert run.coordinator.lending is not None
    assert not run.coordinator.lending._since_ns
    assert column(run, "requests", "status") == [FINISHED] * 12


def test_nobody_is_lent_below_the_threshold() -> None:
    quiet = burst(LOAN, gap_ns=9_000)
    assert not len(quiet.records.loans)
    assert rows(quiet.records) == rows(burst({}, gap_ns=9_000).records)


def test_a_second_burst_lends_again() -> None:
    at = [0] * 10 + [10**6] * 10
    run = play(table(at, [80] * 20, [6] * 20), num_clients=3, serves=[P, D, D], nic=LINK, lending=LOAN, perf=STEPS,
               policy=lambda: Chunked(80, 8))  # fmt: skip
    starts, ends = column(run, "loans", "start_ns"), column(run, "loans", "end_ns")
    assert starts == [0, 10**6]
    assert ends[0] < 10**6 < ends[1]


# --- any ratio, any terms ---


def random_terms(seed: int) -> Callable[[], Run]:
    """xPyD with tiny caches and budgets under random terms."""
    rng = random.Random(seed)
    scenario = random_scenario(seed)
    x, y = rng.randint(1, 4), rng.randint(1, 4)
    terms = replace(rng.choice([Terms(), Terms(), EARLY, LATE, LAYERWISE]))
    if rng.random() < 0.3:
        groups = min(x, y)
        reach = {p: frozenset(x + d for d in range(y) if d % groups == p % groups) for p in range(x)}
        terms = replace(terms, reach=reach)
    if rng.random() < 0.3:
        is_before = not terms.layerwise and rng.random() < 0.5
        ways = {(p, x + d): Conversion(rng.choice([0.5, 20]), is_before) for p in range(x) for d in range(y)}
        terms = replace(terms, conversions=ways)
    if rng.random() < 0.3:
        scenario = replace(scenario, concurrency=2)
    router = rng.choice([RoundRobin, LeastOutstanding, JoinShortestQueue])
    options: dict[str, Any] = {
        "num_clients": x + y, "serves": [P] * x + [D] * y, "terms": terms, "num_layers": rng.choice([1, 3, 32]),
        "nic": KVLink(rng.randint(1, 900), 1e9, rng.choice([0, 500, 3000])),
        "engine_profile": engine(request_ns=rng.choice([0, 0, 300]), step_ns=rng.choice([0, 70])),
        "lending": {x: rng.randint(0, 40)} if rng.random() < 0.3 else None,
    }  # fmt: skip
    if rng.random() < 0.15:
        options["until_ns"] = rng.randint(1, 60_000)
    policy: Any = rng.choice([Chunked, Continuous])
    return lambda: scenario.play(policy, router=router(), **options)


@pytest.mark.parametrize("part", range(4))
def test_any_ratio_drains_under_the_ledger(part: int) -> None:
    counts = np.zeros(4, np.int64)
    for seed in range(150 * part, 150 * (part + 1)):
        run = random_terms(seed)()
        requests, transfers = run.records.requests.as_columns(), run.records.transfers.as_columns()
        if run.end_ns > 60_000:
            assert not run.coordinator.in_system, f"random_terms({seed})"
            assert not any(client.residents.kv.used for client in run.clients), f"random_terms({seed})"
        token_bytes = run.clients[0].kv_bytes_per_token
        whole = dict(zip(requests["request"].tolist(), (requests["input_tokens"] * token_bytes).tolist(), strict=True))
        done = [r for r, s in zip(requests["request"], requests["status"], strict=True) if s == FINISHED]
        moved = [(r, b) for r, b in zip(transfers["request"].tolist(), transfers["bytes"].tolist(), strict=True)]
        assert len(dict(moved)) == len(moved), f"random_terms({seed}): sent twice"
        answered = set(np.array(done)[(requests["output_tokens"] > 1)[requests["status"] == FINISHED]].tolist())
        assert all(b == whole[r] for r, b in moved if r in answered), f"random_terms({seed})"
        counts += (len(moved), requests["num_preemptions"].sum(), len(run.records.loans),
                   (transfers["start_ns"] > transfers["queued_ns"]).sum())  # fmt: skip
    assert counts.min() > 0, f"transfers, preemptions, loans, waits for room: {counts}: proves little"


@pytest.mark.parametrize("terms", [Terms(), LATE, EARLY, LAYERWISE])
def test_who_was_handed_over_never_waits_for_blocks(terms: Terms) -> None:
    """With places for all, a decode joins the first step from when it is there, in caches that hold two or three."""
    num_held_up = 0
    for seed in range(40):
        rng = random.Random(seed)
        prompts, outputs = ([rng.randint(1, most) for _ in range(40)] for most in (40, 25))
        run = play(table([0] * 40, prompts, outputs), num_clients=4, serves=[P, P, D, D], terms=terms,
                   num_blocks=110 // rng.choice([1, 4, 8]), block_size=1, nic=KVLink(20, 1e9, 300),
                   policy=lambda: Chunked(64, 64))  # fmt: skip
        tasks, steps = run.records.tasks.as_columns(), run.records.steps.as_columns()
        came = set(zip(*(column(run, "transfers", k) for k in ("request", "receiver", "end_ns")), strict=True))
        for request, client, queued, started, _ in zip(
            *(tasks[k].tolist() for k in ("request", "client", "queued_ns", "started_ns", "kind")), strict=True
        ):
            if (request, client, queued) in came:
                starts = steps["start_ns"][steps["client"] == client]
                assert started == starts[starts >= queued][0], f"seed {seed}"
        transfers = run.records.transfers.as_columns()
        num_held_up += int((transfers["start_ns"] > transfers["queued_ns"]).sum())
        num_held_up += int((tasks["started_ns"] > 30_000)[tasks["kind"] == 0].sum())
    assert num_held_up > 100


def test_running_ahead_changes_nothing_under_any_terms() -> None:
    for seed in range(150):
        ahead = random_terms(seed)()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Kernel, "horizon", lambda kernel: kernel.now)
            assert rows(ahead.records) == rows(random_terms(seed)().records), f"random_terms({seed})"


# --- stations in series ---


class InTurn:
    """Round robin, each stage for itself."""

    def __init__(self) -> None:
        self.routers: dict[str, RoundRobin] = {}

    def choose(self, task: Task, views: Any, now: int) -> ClientView:
        return self.routers.setdefault(task.stage.kind, RoundRobin()).choose(task, views, now)


@pytest.mark.parametrize(("x", "y"), [(1, 1), (2, 1), (1, 3), (3, 2)])
@pytest.mark.parametrize("terms", [Terms(), LATE])
def test_constant_steps_are_stations_in_series(x: int, y: int, terms: Terms) -> None:
    """One place each, infinite links: x and y servers that requests take in turn, first come first served (Lindley)."""
    rng = random.Random(x + y)
    num, prefill_ns, decode_ns = 200, 9000, 7000
    arrivals = sorted(rng.randrange(5000 * num) for _ in range(num))
    perf = LinearSteps(base=0, per_prefill_token=900, per_decode=decode_ns, per_context=0, per_prefill=0)
    run = play(table(arrivals, [10] * num, [2] * num), num_clients=x + y, serves=[P] * x + [D] * y, nic=KVLink(10),
               perf=perf, policy=lambda: Chunked(16, 1), terms=terms, router=InTurn())  # fmt: skip
    free = [0] * x
    computed = []
    for i, arrival in enumerate(arrivals):
        free[i % x] = max(arrival, free[i % x]) + prefill_ns
        computed.append((free[i % x], i % x, i))
    free, ends = [0] * y, {}
    for turn, (ready, _, i) in enumerate(sorted(computed)):
        server = (i if terms.at_arrival else turn) % y  # in turn as they arrive, or as their prompts are done
        free[server] = max(ready, free[server]) + decode_ns
        ends[i] = free[server]
    assert dict(zip(column(run, "requests", "request"), column(run, "requests", "end_ns"), strict=True)) == ends


# --- scenarios ---

POOL = {"model": "llama-3.1-8b", "count": 2}
APART: dict[str, Any] = {
    "seed": 2,
    "workload": {"arrivals": {"poisson": {"rate_per_s": 6}}, "num_requests": 60,
                 "input_tokens": {"uniform": {"low": 10, "high": 3000}}, "output_tokens": 20},
    "clients": {"prefill": POOL | {"device": "h100-sxm", "serves": ["prefill"]},
                "decode": POOL | {"device": "h100-sxm", "serves": ["decode"]}},
    "perf": "roofline",
    "network": {"kv_transfer": {"bandwidth": "50 GB/s", "latency": "1 ms"}},
}  # fmt: skip
NODES = {"preset": "h100-nvl8", "nodes": {"gpu": {"count": 2, "devices": 2}}}


def apart(*, hand_over: Any = None, network: Any = None, **changes: Mapping[str, Any]) -> Result:
    """The scenario with `changes` to its pools."""
    clients = {name: {**pool, **changes.get(name, {})} for name, pool in APART["clients"].items()}
    more = {"hand_over": hand_over} if hand_over else {}
    return load(APART | {"clients": clients} | ({"network": network} if network else {}) | more).run(check=True)


def of_client(result: Result, pool: str, name: str) -> list[tuple[int, ...]]:
    mine = [i for i, client in enumerate(result.records.client_names) if client.startswith(pool)]
    columns = getattr(result.records, name).as_columns()
    here = np.isin(columns["client"], mine)
    return list(zip(*(c[here].tolist() for c in columns.values()), strict=True))


def test_another_decode_device_changes_decodes_and_nothing_else() -> None:
    same, other = apart(), apart(decode={"device": "mi300x", "tp": 2})
    for name in ("steps", "tasks"):
        assert of_client(same, "prefill", name) == of_client(other, "prefill", name)
    for key in ("request", "sender", "bytes", "queued_ns", "start_ns", "end_ns"):
        assert sorted(column(same, "transfers", key)) == sorted(column(other, "transfers", key))
    assert of_client(same, "decode", "steps") != of_client(other, "decode", "steps")


def test_swapped_vendors_swap_results() -> None:
    """Requests one at a time: what a prompt takes, and what its decodes take, is its own pool's alone."""

    def took(prefill: str, decode: str) -> tuple[list[int], list[int]]:
        workload = {"arrivals": {"constant": {"rate_per_s": 0.5}}, "num_requests": 10, "input_tokens":
                    {"uniform": {"low": 10, "high": 3000}}, "output_tokens": 20}  # fmt: skip
        clients = {name: {**APART["clients"][name], "device": device, "count": 1}
                   for name, device in (("prefill", prefill), ("decode", decode))}  # fmt: skip
        result = load(APART | {"workload": workload, "clients": clients}).run(check=True)
        return tuple(  # type: ignore[return-value]
            [end - start for _, start, end, *_ in of_client(result, pool, "steps")] for pool in ("prefill", "decode")
        )

    nvidia, amd = took("h100-sxm", "h100-sxm"), took("mi300x", "mi300x")
    assert took("h100-sxm", "mi300x") == (nvidia[0], amd[1])
    assert took("mi300x", "h100-sxm") == (amd[0], nvidia[1])
    assert nvidia[0] != amd[0]


@pytest.mark.parametrize(("within", "network"), [("node", NODES), ("rack", NODES | {"nodes_per_rack": 1})])
def test_within_a_node_or_a_rack(within: str, network: dict[str, Any]) -> None:
    network = network | {"placement": {"prefill": ["gpu-0", "gpu-1"], "decode": ["gpu-0", "gpu-1"]}}
    result = apart(hand_over={"within": within}, network=network)
    ways = set(zip(result.transfers["sender"], result.transfers["receiver"], strict=True))
    assert ways == {("prefill-0", "decode-0"), ("prefill-1", "decode-1")}


def test_groups_of_pools() -> None:
    clients = {f"{stage}-{group}": {**APART["clients"][stage], "count": 1, "group": group}
               for group in "ab" for stage in ("prefill", "decode")}  # fmt: skip
    result = load(APART | {"clients": clients}).run(check=True)
    ways = set(zip(result.transfers["sender"], result.transfers["receiver"], strict=True))
    assert ways == {("prefill-a", "decode-a"), ("prefill-b", "decode-b")}


def test_layers_hide_transfers_and_move_as_many_bytes() -> None:
    early = {"choose_decode": "at_arrival"}
    whole, layered = apart(hand_over=early), apart(hand_over=early | {"layerwise": True})
    assert sum(column(whole, "transfers", "bytes")) == sum(column(layered, "transfers", "bytes"))
    waits = [r.summary()["stages"]["decode"]["transfer_s"]["mean"] for r in (whole, layered)]
    assert 1e-3 < waits[1] < 0.6 * waits[0]
    assert load(layered.scenario) == load(load(layered.scenario).resolved())


@pytest.mark.parametrize("convert", ["before", "after"])
def test_another_dtype_costs_a_read_and_a_write(convert: str) -> None:
    plain, narrow = apart(), apart(decode={"kv_dtype": "fp8"}, hand_over={"convert": convert})
    bytes_per_token = 131_072
    assert sum(column(narrow, "transfers", "bytes")) * (2 if convert == "before" else 1) == sum(
        column(plain, "transfers", "bytes")
    )
    first = column(plain, "transfers", "request").index(0)
    tokens = column(plain, "transfers", "bytes")[first] // bytes_per_token
    took = round(tokens * 1.5 * bytes_per_token / 3352e9 * 1e9)
    start = column(narrow, "transfers", "start_ns")[first] - column(plain, "transfers", "start_ns")[first]
    assert start == pytest.approx(took if convert == "before" else 0, rel=0.01)
    notes = [note for note in narrow.metrics["notes"] if "converted from bf16 to fp8" in note]
    assert notes == [f"prefill, decode: KV caches are converted from bf16 to fp8 on "
                     f"{'prefill' if convert == 'before' else 'decode'}, at its memory bandwidth."]  # fmt: skip


def test_a_lending_pool_of_a_scenario() -> None:
    crowd = {"arrivals": {"poisson": {"rate_per_s": 80}}, "num_requests": 300, "input_tokens": 3000,
             "output_tokens": 20}  # fmt: skip
    clients = {**APART["clients"], "decode": {**APART["clients"]["decode"], "lending": {"threshold_tokens": 6000}}}
    result = load(APART | {"workload": crowd, "clients": clients}).run(check=True)
    assert len(result.records.loans) > 0
    assert min(column(result, "loans", "end_ns")) > 0
    tasks = result.records.tasks.as_columns()
    assert ((tasks["kind"] == 0) & (tasks["client"] >= 2)).sum() > 0


def test_each_tenant_has_somebody_within_reach() -> None:
    clients = {f"{stage}-{group}": {**APART["clients"][stage], "count": 1, "group": group}
               for group in "ab" for stage in ("prefill", "decode")}  # fmt: skip
    own = {"workload": APART["workload"], "clients": ["prefill-a", "decode-b"]}
    rest = {key: value for key, value in APART.items() if key != "workload"}
    with pytest.raises(ScenarioError, match="nobody decodes what prefill-a computes"):
        load(rest | {"clients": clients, "tenants": {"one": own, "two": {"workload": APART["workload"]}}})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hand_over": {"layerwise": True}}, "layers are sent before the prefill ends"),
        ({"hand_over": {"layerwise": True, "choose_decode": "at_prefill_end"}}, "to a client that has room"),
        ({"hand_over": {"within": "node"}}, "the network has no nodes"),
        ({"hand_over": {"within": "node"}, "network": NODES}, "prefill-0 has no decode client in its node"),
        ({"hand_over": {"within": "rack"}, "network": NODES | {"nodes_per_rack": 1}}, "no decode client in its rack"),
        ({"decode": {"group": "a"}}, "nobody decodes what prefill computes"),
        ({"prefill": {"lending": {}}}, "decodes what it computes"),
        ({"prefill": {"serves": ["prefill", "decode"], "lending": {}}}, "nobody takes prompts"),
        ({"hand_over": {"layerwise": True, "choose_decode": "at_arrival", "convert": "before"},
          "decode": {"kv_dtype": "fp8"}}, "converted where it arrives"),
    ],
)  # fmt: skip
def test_terms_that_do_not_go_together_are_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ScenarioError, match=says):
        apart(**change)


# --- planted bugs ---


def send_without_room(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(HandOver, "_has_reserved", lambda *_: True)


def forget_who_waits(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(HandOver, "room_came", lambda *_: None)


def take_the_room_twice(patch: pytest.MonkeyPatch) -> None:
    original = Reservations._end

    def twice(self: Reservations, task: Any) -> int:
        return original(self, task) - 1

    patch.setattr(Reservations, "_end", twice)


def send_half(patch: pytest.MonkeyPatch) -> None:
    original = Reservations.make
    patch.setattr(Reservations, "make", lambda self, task, tokens: original(self, task, tokens // 2))


@pytest.mark.parametrize(
    ("sabotage", "says"),
    [(send_without_room, "there is no room for it"), (take_the_room_twice, "gpu-1: KV blocks: .* is not"),
     (send_half, "KV blocks|there is no room")],
)  # fmt: skip
def test_a_planted_bug_is_caught(sabotage: Any, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sabotage(monkeypatch)
    with pytest.raises(InvariantError, match=says):
        pair(table([0, 0, 9000], [64, 64, 50], [5, 5, 9]), num_blocks=8)


def test_who_is_forgotten_is_still_in_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_who_waits(monkeypatch)
    run = pair(table([0, 0], [64, 64], [5, 5]), num_blocks=8)
    assert sorted(column(run, "requests", "status")) != [FINISHED] * 2
