"""Lending: clients of a decode or mixed pool take prompts while those that prompts go to have too many waiting.

Between the router's choice for a prompt and its placement. It never moves a task that is placed, and chooses nobody for
decodes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mist.client import Client
from mist.records import Records
from mist.request import PREFILL, Task


@dataclass(slots=True)
class Lending:
    """`thresholds`: by the index of each client that may be lent, the pending prompt tokens from which on it is.

    A prompt whose router chose a client with more pending tokens than that goes to a client that is lent already and
    has no more itself, the one with the fewest pending; else one is lent, with the fewest tasks; else it stays with who
    has the fewest pending of all. What a lent client computes it decodes on itself, in mixed batches, and it goes on
    with all it had; it returns when the last prompt that it took is computed. Source: the mixed pool of Splitwise
    (arXiv 2311.18677, section IV-A), whose simulator has 8,192 tokens. `Records.loans` says from when to when.
    """

    thresholds: Mapping[int, int]
    records: Records
    #: prompts that were given to lent clients so far
    num_taken: int = field(default=0, init=False)
    #: lent clients: since when, and the prompts that they have taken and not computed
    _since_ns: dict[int, int] = field(default_factory=dict, init=False)
    _num_prompts: dict[int, int] = field(default_factory=dict, init=False)

    def place(self, task: Task, chosen: Client, decoders: Sequence[Client], now: int) -> Client:
        """Where `task` goes, for which the router chose `chosen`; `decoders` are those that its tenant may use."""
        if task.stage.kind != PREFILL or chosen.index in self.thresholds:
            return chosen
        pending = _pending(chosen)
        lenders = [client for client in decoders if pending > self.thresholds.get(client.index, pending)]
        lenders = [client for client in lenders if not client.front_end.never_fits(task)]
        if not lenders:
            return chosen
        lent = [client for client in lenders if client.index in self._since_ns]
        with_room = [client for client in lent if _pending(client) <= self.thresholds[client.index]]
        if with_room:
            there = min(with_room, key=_pending)
        elif len(lent) < len(lenders):
            there = min((client for client in lenders if client not in lent), key=_num_tasks)
            self._since_ns[there.index] = now
        else:
            there = min([chosen, *lent], key=_pending)
        if there is not chosen:
            self.num_taken += 1
            self._num_prompts[there.index] = self._num_prompts.get(there.index, 0) + 1
        return there

    def ended(self, task: Task, client: Client, now: int) -> None:
        """`task` is over on `client`, which returns if that was its last prompt."""
        if task.stage.kind != PREFILL or client.index not in self._since_ns:
            return
        self._num_prompts[client.index] -= 1
        if not self._num_prompts[client.index]:
            self.records.loans.append((client.index, self._since_ns.pop(client.index), now))

    def lost(self, client: Client, now: int) -> None:
        """`client` is lost, with all prompts that it took."""
        if client.index in self._since_ns:
            self._num_prompts[client.index] = 0
            self.records.loans.append((client.index, self._since_ns.pop(client.index), now))

    def cut(self) -> None:
        """The simulation stops: clients that are lent have not returned."""
        for index, since_ns in self._since_ns.items():
            self.records.loans.append((index, since_ns, -1))


def _pending(client: Client) -> int:
    return client.refresh_view().pending_prefill_tokens


def _num_tasks(client: Client) -> int:
    return client.view.num_outstanding
