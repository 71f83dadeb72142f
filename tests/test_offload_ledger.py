"""The ledger catches planted bugs of memory tiers: one sabotage per law."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kit import Run, play, table
from mist.errors import InvariantError
from mist.fabric import Path
from mist.memory.hierarchy import Found, Hierarchy
from mist.memory.tier import MemoryTier, Tier
from mist.network import Network
from mist.offload import Offload
from mist.records import KV_WRITE, PREFIX_FETCH
from mist.request import Task
from test_offload import TOKEN_BYTES, UNIT, behind

Sabotage = Callable[[pytest.MonkeyPatch], Any]


def run() -> Run:
    """Five prompts from two beginnings on two clients, behind a tier of four units."""
    prompts = [(1, 2, 3), (7, 8), (1, 2, 4), (7, 8), (1, 2, 3)]
    workload = table(range(0, 500_000, 100_000), [UNIT * len(keys) + 3 for keys in prompts], [3] * 5, prompts)
    spec = MemoryTier("host", 4 * UNIT * TOKEN_BYTES, 1e9, latency_ns=50)
    return play(workload, num_clients=2, unit_tokens=UNIT, connect=behind(spec))


def test_the_scenario_breaks_no_law_by_itself() -> None:
    records = run().records
    kinds = records.transfers.as_columns()["kind"].tolist()
    assert kinds.count(PREFIX_FETCH) >= 2
    assert kinds.count(KV_WRITE) >= 4


def fetch_what_is_not_there(patch: pytest.MonkeyPatch) -> None:
    def find(self: Hierarchy, task: Task, num_device_tokens: int, now: int, **_: Any) -> list[Found]:
        return [Found(self.tiers[0], UNIT)]

    patch.setattr(Hierarchy, "find", find)


def fetch_what_was_evicted(patch: pytest.MonkeyPatch) -> None:
    def find(self: Hierarchy, task: Task, num_device_tokens: int, now: int, **_: Any) -> list[Found]:
        keys = task.request.block_keys
        return [Found(self.tiers[0], 2 * UNIT)] if keys[0] not in self.tiers[0] or keys[1] not in self.tiers[0] else []

    patch.setattr(Hierarchy, "find", find)


def fetch_the_whole_prompt(patch: pytest.MonkeyPatch) -> None:
    original = Hierarchy.find

    def find(self: Hierarchy, task: Task, num_device_tokens: int, now: int, **_: Any) -> list[Found]:
        found = original(self, task, num_device_tokens, now, **_)
        return [Found(tier, task.target_tokens) for tier, _ in found]

    patch.setattr(Hierarchy, "find", find)


def send_fewer_bytes(patch: pytest.MonkeyPatch) -> None:
    original = Network.send

    def send(self: Network, request: int, kind: int, *rest: Any) -> None:
        sender, receiver, num_bytes, *others = rest
        original(self, request, kind, sender, receiver, num_bytes - (kind == PREFIX_FETCH), *others)

    patch.setattr(Network, "send", send)


def write_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Offload, "_write", lambda *_: None)


def find_what_is_on_its_way(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Tier, "count_units", lambda self, keys, start: sum(key in self._entries for key in keys[start:]))
    patch.setattr("test_offload.Path", lambda channels, latency_ns=0: Path(channels, latency_ns + 150_000))


def never_find_what_came(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Tier, "written", lambda *_: None)


def forget_a_fetch(patch: pytest.MonkeyPatch) -> None:
    original = Offload.fetch

    def fetch(self: Offload, task: Task, *rest: Any) -> bool:
        came = original(self, task, *rest)
        self.fetching.clear()
        return came

    patch.setattr(Offload, "fetch", fetch)


def lose_stored_bytes(patch: pytest.MonkeyPatch) -> None:
    original = Tier._drop

    def drop(self: Tier, key: int) -> int:
        self.held_bytes -= 1
        return original(self, key)

    patch.setattr(Tier, "_drop", drop)


def keep_what_was_evicted(patch: pytest.MonkeyPatch) -> None:
    original = Tier._drop

    def drop(self: Tier, key: int) -> int:
        num_bytes = original(self, key)
        self._entries[key + (1 << 40)] = num_bytes
        return num_bytes

    patch.setattr(Tier, "_drop", drop)


def compute_what_was_fetched(patch: pytest.MonkeyPatch) -> None:
    original = Offload._is_there

    def is_there(self: Offload, fetch: Any, now: int) -> None:
        fetch.task.target_tokens += 5
        original(self, fetch, now)

    patch.setattr(Offload, "_is_there", is_there)


def overfill(patch: pytest.MonkeyPatch) -> None:
    original = Tier.insert

    def insert(self: Tier, *arguments: Any) -> int:
        self.spec = MemoryTier("host", 1 << 40, 1e9)
        stored = original(self, *arguments)
        self.spec = MemoryTier("host", 4 * UNIT * TOKEN_BYTES, 1e9)
        return stored

    patch.setattr(Tier, "insert", insert)


SABOTAGES: dict[Sabotage, str] = {
    fetch_what_is_not_there: "gpu-0: 16 tokens of request 0 from host aren't there",
    fetch_what_was_evicted: "32 tokens of request 0 from host aren't there",
    fetch_the_whole_prompt: "leave nothing to compute",
    send_fewer_bytes: "bytes fetched: ",
    find_what_is_on_its_way: "32 tokens of request 4 from host aren't there",
    never_find_what_came: r"host: \d+ bytes can't be found, and 0 are on their way",
    write_nothing: "host: 640 bytes can't be found, and 0 are on their way",
    forget_a_fetch: "tasks at the front end",
    lose_stored_bytes: "host: bytes held: ",
    keep_what_was_evicted: "host: bytes held: ",
    compute_what_was_fetched: "computed and found tokens of a request are not those of its prompt|pending|incoming",
    overfill: r"host: \d+ bytes in 640",
}


@pytest.mark.parametrize("sabotage", SABOTAGES, ids=lambda sabotage: sabotage.__name__)
def test_a_planted_bug_is_caught(sabotage: Sabotage, monkeypatch: pytest.MonkeyPatch) -> None:
    sabotage(monkeypatch)
    with pytest.raises(InvariantError, match=SABOTAGES[sabotage]):
        run()


def test_fetches_without_room_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Offload, "_has_room", lambda *_: True)
    workload = table([0, 0, 0], [UNIT * 5] * 3, [1] * 3, cached_tokens=[UNIT * 4] * 3)
    with pytest.raises(InvariantError, match="gpu-0: 0 blocks in use and 12 fetched, of 8"):
        play(workload, caching=True, num_blocks=8, connect=behind(MemoryTier("host", 1 << 40, 1e9, hit_rate=1.0)))
