"""What views forecast of a client: the longest decode against a recount by brute force, and prices of steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest

from kit import LinearSteps, engine, play, table
from mist.batching.chunked import Chunked
from mist.client import Client
from mist.load import PRICES
from mist.pipeline.stages import StageList
from mist.request import DECODE, PREFILL, All, ClientView, Pipeline, Stage, Step, Task
from mist.routing.runtime_estimate import RuntimeEstimate
from mist.testing import random_scenario, record_bytes, with_hints


def recounted(client: Client, oracle: bool) -> int:
    """The longest decode of all tasks on `client`, one by one."""
    residents, found = client.residents, [0]
    tasks = [*residents.running.values(), *residents.waiting, *residents.handed_over, *client.front_end.incoming]
    for task in tasks:
        if not (task.generates or DECODE in client.serves):
            continue
        length = task.request.predicted_output_tokens
        if oracle:
            length = task.stage.oracle_output_tokens or task.request.oracle_output_tokens
        done = task.generated_tokens
        if task.join_step >= 0:
            done += residents.cohort.generated(task)
        found.append(length - done)
    return max(found)


@dataclass
class Checked:
    """Any client in turn, after a recount of what the views say."""

    needs: ClassVar[frozenset[str]] = PRICES | {"longest_decode", "oracle_longest_decode", "num_decodes"}
    clients: list[Client] = field(default_factory=list)
    num_checked: int = 0

    def choose(self, task: Task, views: Sequence[ClientView], now: int) -> ClientView:
        for view in views:
            client = self.clients[view.index]
            assert view.longest_decode == recounted(client, oracle=False), (now, view)
            assert view.oracle_longest_decode == recounted(client, oracle=True), (now, view)
            residents = client.residents
            waiting = [*residents.handed_over, *(t for t in client.front_end.incoming if not t.remaining_tokens)]
            assert view.num_decodes == residents.cohort.count + len(waiting)
            self.num_checked += 1
        return views[now % len(views)]


class Forking(StageList):
    """Two decodes of one prompt, of which the second is the longer."""

    def __init__(self) -> None:
        super().__init__((PREFILL, DECODE))
        self.is_fixed = False

    def __call__(self, request: Any, rng: Any) -> Pipeline:
        yield Stage(PREFILL, request.input_tokens)
        if request.oracle_output_tokens:
            lengths = (1 + request.oracle_output_tokens // 2, request.oracle_output_tokens)
            yield All([Stage(DECODE, oracle_output_tokens=each) for each in lengths])


PLACES = [
    {"num_clients": 2},
    {"num_clients": 2, "engine_profile": engine(request_ns=700)},
    {"num_clients": 4, "serves": [(PREFILL,), (PREFILL,), (DECODE,), (DECODE,)]},
    {"num_clients": 3, "serves": [(PREFILL, DECODE), (PREFILL, DECODE), (DECODE,)]},
    {"num_clients": 2, "pipeline": Forking()},
    {"num_clients": 4, "serves": [(PREFILL,), (PREFILL,), (DECODE,), (DECODE,)], "pipeline": Forking()},
]


@pytest.mark.parametrize("place", PLACES, ids=["mixed", "front end", "apart", "partly", "forks", "forks apart"])
def test_the_longest_decode_is_a_recount(place: dict[str, Any]) -> None:
    """With preemptions, queues, hand-overs and predictions that are too short or too long."""
    num_checked = num_preemptions = 0
    for seed in range(60):
        scenario, router = random_scenario(seed), Checked()
        longest = max(prompt + output for _, prompt, output, _ in scenario.requests)
        run = scenario.play(
            num_blocks=-(-longest // scenario.block_size) + 2,
            workload=with_hints(scenario.workload(), seed),
            router=router,
            prepare=lambda kernel, clients, router=router: router.clients.extend(clients),
            **place,
        )
        num_checked += router.num_checked
        num_preemptions += int(run.records.requests.as_columns()["num_preemptions"].sum())
    assert num_checked > 500
    assert num_preemptions > 10


def test_a_look_costs_what_came_not_what_is_there() -> None:
    """1,000 looks at 200 long decodes touch each of them a few times, not 1,000 times."""
    looks = 0

    class Counted(RuntimeEstimate):
        def choose(self, task: Task, views: Sequence[ClientView], now: int) -> ClientView:
            nonlocal looks
            looks += len(views)
            return super().choose(task, views, now)

    import mist.forecast as forecast

    calls = 0
    plain = forecast.LongestDecode._left

    def counted(self: Any, task: Task) -> int:
        nonlocal calls
        calls += 1
        return plain(self, task)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forecast.LongestDecode, "_left", counted)
        play(table(range(0, 500_000, 1000), [1] * 500, [400] * 500), num_clients=2, router=Counted(), ledger=False,
             policy=lambda: Chunked(4096, 512))  # fmt: skip
    assert looks == 1000 or looks == 2000  # prefill and decode stay together
    assert calls < 6 * 500


def test_who_has_left_is_forgotten_though_longer_ones_stay() -> None:
    """Two decodes stay to the end, beneath which 2,000 short ones come and go."""
    workload = table([0, 0, *range(1000, 2_001_000, 1000)], [1] * 2002, [2500, 2500] + [2] * 2000)
    workload.sizes["predicted_output_tokens"] = workload.output_tokens
    run = play(workload, num_clients=2, router=RuntimeEstimate(), ledger=False, policy=lambda: Chunked(4096, 512))
    for outlook in run.coordinator.views._outlooks.values():
        longest = outlook._predicted
        assert longest is not None
        assert longest._num_pushed > 500
        assert len(longest._before) + len(longest._decoding) < 300


@pytest.mark.parametrize("overlapped", [False, True])
def test_prices_of_steps_that_are_linear_are_exact(overlapped: bool) -> None:
    """A chunk beside the decodes of now, and a step with one decode more, as the client would price them."""
    perf, profile = LinearSteps(), engine(step_ns=400, token_ns=20, overlapped=overlapped)
    num_checked = 0

    class Priced(Checked):
        def choose(self, task: Task, views: Sequence[ClientView], now: int) -> ClientView:
            nonlocal num_checked
            for view in views:
                client = self.clients[view.index]
                residents = client.residents
                coming = [*residents.handed_over, *(t for t in client.front_end.incoming if not t.remaining_tokens)]
                n = residents.cohort.count + len(coming)
                context = residents.cohort.sum_context + sum(t.target_tokens for t in coming)
                chunk = Step(n, context, [(16, 0)], 16, n + 1)
                more = Step(n + 1, context, num_sampled=n + 1)
                decodes = more if DECODE in client.serves else None
                for step, told in ((chunk, view.chunk_ns), (decodes, view.decode_ns)):
                    if step is None:
                        assert told == 0
                        continue
                    host, device = client.host_ns(step), perf.step_time(step)
                    if not overlapped or device > 2 * host:
                        assert told == (max(host, device) if overlapped else host + device)
                        num_checked += 1
            return views[now % len(views)]

    router = Priced()
    play(table(range(0, 20000, 500), [9] * 40, [30] * 40), num_clients=4, router=router, engine_profile=profile,
         serves=[("prefill", "decode")] * 2 + [("prefill",), ("decode",)], perf=perf,
         policy=lambda: Chunked(16, 8), num_blocks=500, max_model_len=1000,
         prepare=lambda kernel, clients: router.clients.extend(clients))  # fmt: skip
    assert num_checked > 30


def test_looking_changes_nothing() -> None:
    """A router that looks at forecasts and doesn't use them gives the records of one that doesn't look."""

    class Turns:
        def choose(self, task: Task, views: Sequence[ClientView], now: int) -> ClientView:
            return views[now % len(views)]

    for seed in range(40):
        looking = Checked()
        first, second = (
            record_bytes(random_scenario(seed).play(router=router, num_clients=2, prepare=prepare).records)
            for router, prepare in (
                (looking, lambda kernel, clients, looking=looking: looking.clients.extend(clients)),
                (Turns(), None),
            )
        )
        assert first == second
