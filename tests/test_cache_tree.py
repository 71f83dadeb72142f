"""The prefix cache's radix tree against one that keeps every unit by itself, on random conversations that branch."""

from __future__ import annotations

import random
from collections import OrderedDict

import pytest

from kit import sampled, task
from mist.memory.kv_cache import KVCache
from mist.request import Task

BLOCK, UNIT = 2, 4


class Units:
    """The same cache, a unit at a time."""

    def __init__(self, num_blocks: int) -> None:
        self.free = num_blocks
        self.refs: dict[int, int] = {}
        self.evictable: OrderedDict[int, int] = OrderedDict()
        self.told: list[int] = []
        self.next_run = -1

    def match(self, keys: tuple[int, ...]) -> tuple[int, int]:
        units = unreferenced = 0
        for key in keys:
            if key not in self.refs and key not in self.evictable:
                break
            unreferenced += UNIT // BLOCK if key not in self.refs else 0
            units += 1
        return units, unreferenced

    def refer(self, key: int) -> None:
        self.evictable.pop(key, None)
        self.refs[key] = self.refs.get(key, 0) + 1

    def take(self, num_blocks: int) -> None:
        while self.free < num_blocks:
            entry, blocks = self.evictable.popitem(last=False)
            need = num_blocks - self.free
            if entry < 0 and blocks > need:
                self.evictable[entry] = blocks - need
                self.evictable.move_to_end(entry, last=False)
                blocks = need
            elif entry >= 0:
                self.told.append(entry)
            self.free += blocks
        self.free -= num_blocks

    def index(self, keys: tuple[int, ...]) -> None:
        for key in keys:
            self.free += UNIT // BLOCK if key in self.refs or key in self.evictable else 0
            self.refer(key)

    def release(self, keys: tuple[int, ...], private: int) -> None:
        if private:
            self.evictable[self.next_run] = private
            self.next_run -= 1
        for key in reversed(keys):
            self.refs[key] -= 1
            if not self.refs[key]:
                del self.refs[key]
                self.evictable[key] = UNIT // BLOCK


def conversations(rng: random.Random) -> list[tuple[int, ...]]:
    """Chained keys of prompts of which many begin like another, up to any unit."""
    made: list[tuple[int, ...]] = [()]
    for _ in range(12):
        trunk = rng.choice(made)
        trunk = trunk[: rng.randint(0, len(trunk))]
        first = 100 * len(made)
        made.append(trunk + tuple(range(first, first + rng.randint(1, 7))))
    return made[1:]


@pytest.mark.parametrize("seed", sampled(range(60), 30))
def test_stretches_behave_as_their_units(seed: int) -> None:
    rng = random.Random(seed)
    kv, units = KVCache(60, BLOCK, enable_prefix_caching=True, hash_block_size=UNIT), Units(60)
    told: list[int] = []
    kv.on_evict = told.append
    prompts = conversations(rng)
    running: list[tuple[Task, int, int]] = []  # tokens reserved, tokens of the prompt
    for step in range(200):
        if running and rng.random() < 0.5:
            who, reserved, total = running.pop(rng.randrange(len(running)))
            chunk = min(total - reserved, rng.randint(1, 12))
            needed = kv.blocks_for(reserved + chunk) - kv.blocks_for(reserved)
            keys = who.request.block_keys
            if chunk and needed <= kv.available:
                kv.take(needed)
                units.take(needed)
                before = who.num_indexed
                kv.index(who, reserved + chunk)
                units.index(keys[before : who.num_indexed])
                running.append((who, reserved + chunk, total))
            else:
                blocks = kv.blocks_for(reserved)
                units.release(keys[: who.num_indexed], blocks - who.num_indexed * UNIT // BLOCK)
                kv.release(who, reserved, blocks, resumes=False)
        else:
            keys = rng.choice(prompts)
            who = task(step, len(keys) * UNIT + rng.randint(1, 3), keys=keys)
            hit = kv.match(who)
            assert (hit.num_units, hit.num_unreferenced) == units.match(keys)
            if hit.num_unreferenced <= kv.available and len(running) < 5:
                kv.refer(who, hit)
                for key in keys[: hit.num_units]:
                    units.refer(key)
                running.append((who, hit.num_tokens, who.target_tokens))
        # blocks that nobody looks for may be free before they are needed
        assert (kv.available, told) == (units.free + sum(units.evictable.values()), units.told)
        assert kv.free >= units.free
        assert kv.count_evictable() == kv.cached
        assert kv.count_referenced_units() == len(units.refs) * UNIT // BLOCK
