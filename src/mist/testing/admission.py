"""The contract suite of admission policies: everybody is let in and served, or turned away with the reason.

A third party's test class inherits it and names its policy, as with the other suites. Every run is small, random and
under the ledger; it never judges how good a policy is.
"""

from __future__ import annotations

import copy
import random

from mist.admission import AdmissionPolicy
from mist.request import DECODE, PREFILL, Request
from mist.testing.cluster import KVLink, Run, SmallScenario, random_scenario, record_bytes, with_hints
from mist.testing.contracts import LIVELOCK_NS, _all_leave, _same_until_it_knows, _view

_SERVES = (None, [(PREFILL,), (DECODE,), (DECODE,)], [(PREFILL, DECODE), (DECODE,)])


class AdmissionContract:
    """Inherit, and return your policy from `admission`. `oracle`: it reads true output lengths; its name says so."""

    oracle = False
    num_scenarios = 45

    def admission(self) -> AdmissionPolicy:
        """A fresh instance."""
        raise NotImplementedError

    def _play(self, scenario: SmallScenario) -> Run:
        serves = _SERVES[len(scenario.requests) % len(_SERVES)]
        return scenario.play(
            workload=with_hints(scenario.workload(), len(scenario.requests)),
            admission=[self.admission()],
            num_clients=len(serves or (1,)),
            serves=serves,
            nic=KVLink(bytes_per_token=8, bytes_per_s=1e9),
            until_ns=LIVELOCK_NS,
        )

    def test_it_answers_in_words_and_changes_nothing(self) -> None:
        rng, policy = random.Random(1), self.admission()
        for now in range(5 * self.num_scenarios):
            views = {kind: [_view(i, rng) for i in range(rng.randint(1, 4))] for kind in (PREFILL, DECODE)}
            request = Request(now, now, rng.randint(1, 50), 5)
            before = copy.deepcopy((request, views))
            reason = policy.refuses(request, views, now)
            assert isinstance(reason, str), f"it answered {reason!r}: a reason, or an empty text, would do"
            assert (request, views) == before, "it changed what it saw"

    def test_every_request_is_served_or_rejected(self) -> None:
        for seed in range(self.num_scenarios):
            _all_leave(self._play(random_scenario(seed)), f"random_scenario({seed})")

    def test_the_same_scenario_gives_the_same_records(self) -> None:
        for seed in range(self.num_scenarios // 4):
            first, second = (record_bytes(self._play(random_scenario(seed)).records) for _ in range(2))
            assert first == second, f"random_scenario({seed}) differs from run to run: instances share state"

    def test_it_does_not_know_true_output_lengths(self) -> None:
        for seed in range(0 if self.oracle else self.num_scenarios):
            _same_until_it_knows("the policy", random_scenario(seed, roomy=True), self._play)
