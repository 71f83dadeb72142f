"""What the routers decide that remember: which client had a session, and which was sent a prefix."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from kit import task
from mist.request import ClientView, Task
from mist.routing.prefix_affinity import PrefixAffinity, _count_seen
from mist.routing.session_affinity import SessionAffinity


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
    assert _count_seen(router._seen[0], (1, 2, 3), 0) == 2
    assert _count_seen(router._seen[0], (7, 8), 0) == 2


def test_every_nth_key_is_enough_to_know_a_long_prompt() -> None:
    router = PrefixAffinity(stride=4)
    router.choose(prompt(*range(10)), views(1, 0), 0)
    assert len(router._seen[1]) == 2
    assert router.choose(prompt(*range(12)), views(0, 3), 0).index == 1


def test_what_is_remembered_is_a_prefix_whatever_was_forgotten() -> None:
    """Halving finds the same as looking key by key."""
    rng = random.Random(5)
    router = PrefixAffinity(max_num_keys=25)
    chains = [tuple(100 * i + j for j in range(12)) for i in range(6)]
    for _ in range(300):
        chain = rng.choice(chains)[: rng.randint(1, 12)]
        router.choose(prompt(*chain), views(rng.randint(0, 2), rng.randint(0, 2)), 0)
        for seen in router._seen.values():
            assert len(seen) <= 25
            for each in chains:
                counted = next((n for n, key in enumerate(each) if key not in seen), len(each))
                assert _count_seen(seen, each, router._count_common(each)) == counted
                assert not any(key in seen for key in each[counted:])
        assert router._num_clients == Counter(key for seen in router._seen.values() for key in seen)


@pytest.mark.parametrize("changes", [{"load_weight": -1}, {"stride": 0}, {"max_num_keys": 0}])
def test_parameters_out_of_range_are_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        PrefixAffinity(**changes)  # type: ignore[arg-type]
    for wrong in ({"max_num_outstanding": 0}, {"load_weight": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            SessionAffinity(**wrong)  # type: ignore[arg-type]
