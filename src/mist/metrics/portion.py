"""Some of a run's requests, all or a tenant's, and what came of them: gaps between tokens, stages, answers, tokens.

Under `tally`, which brings it block after block: the requests of a block are all there with all that they did. It
reads no request twice, and keeps a few numbers of each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np

from mist.metrics.distribution import Blocks, Multiset
from mist.metrics.quality import answers
from mist.metrics.stages import Stages
from mist.metrics.tenants import TenantInfo
from mist.metrics.tokens import DecodeSteps, Segments, longest_gaps, token_gaps, tokens_by_client
from mist.metrics.window import BoolColumn, Columns, Window
from mist.records import FINISHED, IntColumn


class Portion:
    """What is `asked` of requests that may go through stages of some `kinds`, by number, on `num_clients` clients.

    `gaps` between tokens, and `longest_gap_ns` of each request in the order in which they left (-1: none), where there
    is a target for it; `emitted` tokens by client in the window, those `generated` in all; `answered`, by stage kind.
    """

    def __init__(self, asked: TenantInfo, kinds: Mapping[int, str], num_clients: int) -> None:
        self.asked = asked
        self._numbers, self._kinds = list(kinds), list(kinds.values())
        self.gaps, self.longest_gap_ns = Multiset(), Blocks()
        self.emitted = np.zeros(num_clients, np.int64)
        self.generated = 0
        self.stages = Stages(self._kinds)
        self.answered: Counter[str] = Counter()

    def add(
        self, requests: Columns, tasks: Columns, transfers: Columns, decode_steps: DecodeSteps, window: Window
    ) -> None:
        """Requests that left, in order; all their tasks, each request's together and in order; transfers, theirs too.

        `join_step` and `last_step` of tasks count from the first of `decode_steps`.
        """
        numbers = np.unique(np.concatenate((requests["request"], tasks["request"])))
        requests, tasks, transfers = (_numbered(table, numbers) for table in (requests, tasks, transfers))
        tasks["kind"] = np.searchsorted(self._numbers, tasks["kind"])
        segments = Segments.of(tasks, decode_steps)
        self.emitted += tokens_by_client(segments, decode_steps, window)
        self.generated += int(tasks["generated_tokens"].sum())
        is_finished = requests["status"] == FINISHED
        chosen = is_finished & window.holds(requests["arrival_ns"])
        since = segments.since(_first_tokens(requests, chosen, len(numbers)), decode_steps)
        self.gaps.add(*token_gaps(since, decode_steps))
        if "itl_s" in self.asked.slo:
            since = segments.since(_first_tokens(requests, is_finished, len(numbers)), decode_steps)
            self.longest_gap_ns.add(longest_gaps(since, decode_steps, len(numbers))[requests["request"]])
        finished = {name: column[chosen] for name, column in requests.items()}
        self.stages.add(finished, tasks, transfers)
        self.answered += answers(self.asked.quality or {}, finished, tasks, self._kinds)


def _numbered(table: Columns, numbers: IntColumn) -> dict[str, IntColumn]:
    """The rows of requests with these numbers, which stand for their places among them."""
    places = np.searchsorted(numbers, table["request"])
    known = numbers.take(places, mode="clip") == table["request"] if len(numbers) else np.zeros(len(places), np.bool_)
    return {**{name: column[known] for name, column in table.items()}, "request": places[known]}


def _first_tokens(requests: Columns, chosen: BoolColumn, num_requests: int) -> IntColumn:
    """First visible token in ns by request number; -1 for those not chosen."""
    first = np.full(num_requests, -1, np.int64)
    first[requests["request"][chosen]] = requests["first_token_ns"][chosen]
    return first
