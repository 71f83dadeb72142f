"""The contract suite of orders: keys that can be compared, taken without the truth, under which everybody is served.

A third party's test class inherits it and names its order, as with the other suites. Every run is small, random, short
of KV blocks and under the ledger; it never judges how good an order is.
"""

from __future__ import annotations

import random

from mist.batching.chunked import Chunked
from mist.batching.continuous import Continuous
from mist.batching.mixed import Mixed
from mist.batching.orders import Order
from mist.batching.sglang import SGLang
from mist.batching.static import Static
from mist.request import DECODE, PREFILL, Request, Stage, Task
from mist.testing.cluster import Run, SmallScenario, play, random_scenario, record_bytes, with_hints
from mist.testing.contracts import LIVELOCK_NS, _all_leave, _same_until_it_knows

_POLICIES = (Chunked, Continuous, Static, Mixed, SGLang)


class OrderContract:
    """Inherit, and return your order from `order`. `oracle`: it reads true output lengths and says so in its name."""

    oracle = False
    num_scenarios = 45

    def order(self) -> Order:
        """A fresh instance."""
        raise NotImplementedError

    def _play(self, scenario: SmallScenario) -> Run:
        """Run it on a client with as few KV blocks as its longest request needs."""
        policy = _POLICIES[len(scenario.requests) % len(_POLICIES)]
        tokens = max(scenario.max_num_batched_tokens, scenario.max_num_seqs)
        return play(
            with_hints(scenario.workload(), len(scenario.requests)),
            policy=lambda: policy(tokens, scenario.max_num_seqs, self.order()),
            num_blocks=scenario.num_blocks,
            block_size=scenario.block_size,
            unit_tokens=scenario.unit_tokens,
            caching=scenario.caching,
            watermark=scenario.watermark,
            until_ns=LIVELOCK_NS,
        )

    def test_keys_are_whole_numbers_of_one_length(self) -> None:
        order, rng = self.order(), random.Random(1)
        keys = [order.key(_task(rng, i)) for i in range(100)]
        assert all(type(key) is tuple and all(type(part) is int for part in key) for key in keys), keys[:5]
        assert len({len(key) for key in keys}) == 1, f"keys of several lengths: {keys[:5]}"

    def test_a_key_depends_on_the_task_alone_and_changes_nothing(self) -> None:
        order = self.order()
        first = [order.key(_task(random.Random(i), i)) for i in range(100)]
        tasks = [_task(random.Random(i), i) for i in reversed(range(100))]
        before = repr(tasks)
        assert [order.key(task) for task in tasks] == first[::-1], "a key depends on those taken before"
        assert repr(tasks) == before, "it changed a task"

    def test_no_key_depends_on_a_true_output_length(self) -> None:
        order = self.order()
        for i in range(0 if self.oracle else 100):
            task, same = _task(random.Random(i), i), _task(random.Random(i), i)
            same.request.oracle_output_tokens += 7
            same.stage.oracle_output_tokens += 7 * (same.stage.kind == DECODE)
            assert order.key(task) == order.key(same), "it reads true output lengths; name it oracle_*"

    def test_it_serves_every_request(self) -> None:
        for seed in range(self.num_scenarios):
            _all_leave(self._play(random_scenario(seed)), f"random_scenario({seed})")

    def test_the_same_scenario_gives_the_same_records(self) -> None:
        for seed in range(self.num_scenarios // 4):
            first, second = (record_bytes(self._play(random_scenario(seed)).records) for _ in range(2))
            assert first == second, f"random_scenario({seed}) differs from run to run: instances share state"

    def test_it_does_not_know_true_output_lengths(self) -> None:
        for seed in range(0 if self.oracle else self.num_scenarios):
            _same_until_it_knows("the order", random_scenario(seed, roomy=True), self._play)


def _task(rng: random.Random, index: int) -> Task:
    """A prefill that waits, or a decode whose context was computed elsewhere."""
    tokens, output = rng.randint(1, 50), rng.randint(1, 50)
    request = Request(index, rng.randint(0, 1000), tokens, output, priority=rng.randint(-2, 5))
    request.predicted_output_tokens = rng.randint(0, 50)
    if rng.random() < 0.5:
        return Task(request, Stage(PREFILL, tokens), 0, tokens, 1000 + index)
    task = Task(request, Stage(DECODE, oracle_output_tokens=output), 1, tokens, 1000 + index)
    task.computed_tokens = tokens
    return task
