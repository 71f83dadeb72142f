"""What the routers decide that remember: which client had a session, and which was sent a prefix."""

from __future__ import annotations

import copy
import random
from collections import OrderedDict
from collections.abc import Sequence

import pytest

from kit import task
from mist.request import ClientView, Task
from mist.routing.prefix_affinity import PrefixAffinity
from mist.routing.session_affinity import SessionAffinity
from mist.testing import random_scenario
from mist.testing.cluster import engine


def views(*outstanding: int, pending: tuple[int, ...] = ()) -> list[ClientView]:
    waiting = pending or (0,) * len(outstanding)
    return [ClientView(i, f"gpu-{i}", n, pending_prefill_tokens=waiting[i]) for i, n in enumerate(outstanding)]


def turn_of(session: int) -> Task:
    made = task()
    made.request.session = session
    return made


# --- sessions ---


def test_a_session_begins_where_fewest_are_outstanding_and_stays() -> None:
    router = SessionAffinity()
    assert router.choose(turn_of(7), views(3, 1, 2), 0).index == 1
    assert router.choose(turn_of(7), views(3, 99, 2), 0).index == 1
    assert router.choose(turn_of(8), views(3, 99, 2), 0).index == 2


def test_sessions_spread_over_idle_clients() -> None:
    router = SessionAffinity()
    assert [router.choose(turn_of(s), views(0, 0, 0), 0).index for s in range(6)] == [0, 1, 2, 0, 1, 2]


def test_a_session_moves_where_its_client_is_full_and_stays_there() -> None:
    router = SessionAffinity(max_num_outstanding=4)
    assert router.choose(turn_of(7), views(0, 0), 0).index == 0
    assert router.choose(turn_of(7), views(3, 0), 0).index == 0
    assert router.choose(turn_of(7), views(4, 0), 0).index == 1
    assert router.choose(turn_of(7), views(0, 3), 0).index == 1
    assert router.choose(turn_of(9), views(0, 0), 0).index == 0  # the session that moved counts there no more


def test_a_full_client_that_is_the_least_loaded_keeps_its_session() -> None:
    router = SessionAffinity(max_num_outstanding=2)
    router.choose(turn_of(7), views(0, 1), 0)
    assert router.choose(turn_of(7), views(5, 6), 0).index == 0


def test_a_session_that_goes_on_without_its_client_is_counted_once() -> None:
    """Its home wasn't among those to choose from; 0 has one session then, 1 one and 2 none."""
    router = SessionAffinity()
    assert [router.choose(turn_of(s), views(0, 0, 0), 0).index for s in range(3)] == [0, 1, 2]
    assert router.choose(turn_of(2), views(0, 0), 0).index == 0
    assert router.choose(turn_of(0), views(9, 0, 0)[1:], 0).index == 2
    assert router.choose(turn_of(9), views(0, 0, 9), 0).index == 0


def test_requests_of_no_session_go_by_load() -> None:
    router = SessionAffinity()
    assert [router.choose(turn_of(-1), views(*n), 0).index for n in ((1, 0), (0, 1), (1, 0))] == [1, 0, 1]


@pytest.mark.parametrize(("weight", "there"), [(0.0, 0), (0.5, 0), (2.0, 0), (2.01, 1), (9.0, 1)])
def test_work_that_waits_is_held_against_the_session(weight: float, there: int) -> None:
    """Client 0 has 60 tokens of the session, and 50 wait there; elsewhere, 20: a tie at a weight of 2."""
    router = SessionAffinity(load_weight=weight)
    first, second = turn_of(7), turn_of(7)
    first.target_tokens, second.target_tokens = 60, 90
    assert router.choose(first, views(0, 0, 0, pending=(0, 9, 9)), 0).index == 0
    assert router.choose(second, views(0, 9, 0, pending=(50, 20, 30)), 0).index == there
    assert router.choose(turn_of(7), views(0, 0, 0), 0).index == there


# --- prefixes ---


def prompt(*keys: int, tokens: int = 0) -> Task:
    return task(tokens=tokens or 10 * len(keys), keys=keys)


def seen_by(router: PrefixAffinity, client: int) -> set[int]:
    return {key for key, lack in router._lacking.items() if not lack >> client & 1}


def test_a_prompt_follows_its_prefix() -> None:
    router = PrefixAffinity()
    assert router.choose(prompt(1, 2, 3), views(1, 0), 0).index == 1
    assert router.choose(prompt(1, 2, 3, 4), views(0, 5), 0).index == 1
    assert router.choose(prompt(9, 8), views(0, 5), 0).index == 0


def test_the_longest_prefix_wins() -> None:
    router = PrefixAffinity()
    router.choose(prompt(1, 2), views(0, 9), 0)
    router.choose(prompt(1, 2, 3, 4), views(9, 0, pending=(99, 0)), 0)
    assert router.choose(prompt(1, 2, 3, 5), views(0, 0), 0).index == 1
    assert router.choose(prompt(1, 2, 7, 8), views(0, 1), 0).index == 0


@pytest.mark.parametrize(("weight", "there"), [(0.0, 1), (0.5, 1), (0.99, 1), (1.01, 0), (3.0, 0)])
def test_work_that_waits_is_held_against_the_prefix(weight: float, there: int) -> None:
    """30 of 40 tokens are seen on client 1, where 30 wait: a tie at a weight of 1."""
    router = PrefixAffinity(load_weight=weight)
    router.choose(prompt(1, 2, 3), views(1, 0), 0)
    assert router.choose(prompt(1, 2, 3, 4), views(0, 0, pending=(0, 30)), 0).index == there


def test_idle_clients_get_new_prompts_in_turn() -> None:
    router = PrefixAffinity()
    assert [router.choose(prompt(10 * i, 10 * i + 1), views(0, 0, 0), 0).index for i in range(6)] == [0, 1, 2, 0, 1, 2]


def test_only_the_keys_used_last_are_remembered_the_tail_goes_first() -> None:
    router = PrefixAffinity(max_num_keys=4)
    router.choose(prompt(1, 2, 3), views(0, 1), 0)
    router.choose(prompt(7, 8), views(0, 1, pending=(0, 50)), 0)
    assert seen_by(router, 0) == {1, 2, 7, 8}


def test_every_nth_key_is_enough_to_know_a_long_prompt() -> None:
    router = PrefixAffinity(stride=4)
    router.choose(prompt(*range(10)), views(1, 0), 0)
    assert seen_by(router, 1) == {3, 7}
    assert router.choose(prompt(*range(12)), views(0, 3), 0).index == 1


class KeyByKey:
    """The same rule by the letter: of each client an ordered set of keys, which every prompt walks through."""

    def __init__(self, load_weight: float, max_num_keys: int, stride: int) -> None:
        self.load_weight, self.max_num_keys, self.stride = load_weight, max_num_keys, stride
        self.seen: dict[int, OrderedDict[int, None]] = {}
        self.num_ever: dict[int, int] = {}

    def choose(self, task: Task, views: Sequence[ClientView]) -> ClientView:
        keys = task.prompt_keys[self.stride - 1 :: self.stride]
        key_tokens = self.stride * task.keyed_tokens / max(1, len(task.prompt_keys))

        def cost(view: ClientView) -> tuple[float, int, int]:
            seen = self.seen.get(view.index, ())
            num_seen = next((n for n, key in enumerate(keys) if key not in seen), len(keys))
            to_compute = task.remaining_tokens - num_seen * key_tokens + self.load_weight * view.pending_prefill_tokens
            return to_compute, view.num_outstanding, self.num_ever.get(view.index, 0)

        there = min(views, key=cost)
        seen = self.seen.setdefault(there.index, OrderedDict())
        for key in reversed(keys):
            self.num_ever[there.index] = self.num_ever.get(there.index, 0) + (key not in seen)
            seen[key] = None
            seen.move_to_end(key)
        while len(seen) > self.max_num_keys:
            seen.popitem(last=False)
        return there


def a_conversation(rng: random.Random, number: int) -> tuple[int, ...]:
    """One of few, each grown from one of three beginnings: it may be longer, or shorter, the next time."""
    begin = number % 3
    own = tuple(1000 * number + i for i in range(rng.randint(0, 30)))
    return (tuple(range(-100 * begin - 8, -100 * begin)) + own)[: rng.randint(0, 40)]


@pytest.mark.parametrize("seed", range(24))
def test_choices_and_memory_are_those_of_the_rule_by_the_letter(seed: int) -> None:
    """Clients that come late, are down for a while or follow in another order; little to remember with, or much."""
    rng = random.Random(seed)
    load_weight, stride = rng.choice([0.0, 0.3, 1.0, 7.0]), rng.choice([1, 1, 2, 5])
    max_num_keys = rng.choice([1, 7, 25, 60, 10_000])
    router = PrefixAffinity(load_weight, max_num_keys, stride)
    by_the_letter = KeyByKey(load_weight, max_num_keys, stride)
    num_clients = rng.choice([2, 5, 12])
    for i in range(400):
        keys = a_conversation(rng, rng.randint(0, 11))
        indices = rng.sample(range(num_clients), rng.randint(1, num_clients))
        if rng.random() < 0.8:
            indices.sort()
        seen = [ClientView(i, "", rng.randint(0, 3), pending_prefill_tokens=rng.choice([0, 0, 5, 90])) for i in indices]
        who = task(i, tokens=10 * len(keys) + rng.randint(1, 9), keys=keys)
        assert router.choose(who, seen, 0) is by_the_letter.choose(who, seen)
        for client, its_keys in by_the_letter.seen.items():
            assert seen_by(router, client) == set(its_keys)
            assert router._sent[client].num_keys == len(its_keys)


def test_what_it_notes_does_not_grow_with_what_is_sent_again() -> None:
    router = PrefixAffinity()
    for _ in range(2000):
        router.choose(prompt(*range(100)), views(0, 9), 0)
    assert len(router._sent[0]._prompts) < 200


def test_what_is_told_as_it_is_read_is_what_the_clients_have() -> None:
    """While prompts are read, and in chunks: at every choice the view reads as one that is brought up to date."""
    seen: list[tuple[int, int]] = []

    class Looking(PrefixAffinity):
        def choose(self, task: Task, views: Sequence[ClientView], now: int) -> ClientView:
            for view in views:
                fresh = copy.copy(view._client.refresh_view())  # type: ignore[attr-defined]
                assert (view.index, view.name, view.kv_blocks) == (fresh.index, fresh.name, fresh.kv_blocks)
                told = view.num_outstanding, view.pending_prefill_tokens
                assert told == (fresh.num_outstanding, fresh.pending_prefill_tokens)
                seen.append(told)
            return super().choose(task, views, now)

    for seed in range(20):
        random_scenario(seed).play(router=Looking(), num_clients=3, engine_profile=engine(request_ns=2_000_000))
    assert any(outstanding for outstanding, _ in seen)
    assert any(pending for _, pending in seen)


@pytest.mark.parametrize("changes", [{"load_weight": -1}, {"stride": 0}, {"max_num_keys": 0}])
def test_parameters_out_of_range_are_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        PrefixAffinity(**changes)  # type: ignore[arg-type]
    for wrong in ({"max_num_outstanding": 0}, {"load_weight": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            SessionAffinity(**wrong)  # type: ignore[arg-type]
