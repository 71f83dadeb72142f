"""What each client did: utilisation, batch, KV use, preemptions, tokens; per replica and per pool as the user named it.

Sums over steps and task segments are made block by block; a pool's figure is the same expression over its replicas'
sums. It never judges: `saturation` reads the figures and says what they mean.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from mist.metrics.availability import replica_of
from mist.metrics.distribution import FloatColumn
from mist.metrics.window import Columns, Window
from mist.records import LOST, NO_CLIENT, PREEMPTED, IntColumn
from mist.units import NS_PER_S


@dataclass(frozen=True, slots=True)
class ClientInfo:
    """What a summary needs to know of a client beside its records; in the order of `Records.client_names`.

    `name` is the replica's ("gpu-0"), `pool` the scenario's ("gpu"). `kv_blocks` of `block_size` tokens each, 0 for a
    client without a KV cache; `max_num_seqs` 0 where nothing limits it.
    """

    name: str
    pool: str
    kv_blocks: int = 0
    block_size: int = 0
    max_num_seqs: int = 0

    @property
    def replica(self) -> str:
        """The replica that it is, or that it is a lane of: gpu-0 of gpu-0.1."""
        return replica_of(self.name)

    @property
    def kv_tokens_capacity(self) -> int:
        return self.kv_blocks * self.block_size


@dataclass(slots=True)
class Activity:
    """Sums per client over a window, one value per client; `*_time` are integrals over busy time in ns.

    `fresh_tokens` and `cached_tokens` were computed and found by tasks at their first admission: what a preempted task
    finds of its own when it resumes is no prefix hit.
    """

    sequence_time: FloatColumn
    kv_block_time: FloatColumn
    steps: IntColumn
    busy_ns: IntColumn
    kv_blocks_peak: IntColumn
    max_waiting: IntColumn
    prefill_tokens: IntColumn
    output_tokens: IntColumn
    fresh_tokens: IntColumn
    cached_tokens: IntColumn
    preemptions: IntColumn

    @classmethod
    def none(cls, num_clients: int) -> Activity:
        return cls(**{f.name: np.zeros(num_clients, float if f.name.endswith("_time") else int) for f in fields(cls)})

    def add_steps(self, steps: Columns, window: Window) -> None:
        """Steps of the window; one that only partly lies in it counts with that part of its time."""
        start, end = steps["start_ns"], steps["end_ns"]
        inside = (end > window.start_ns) & (start < window.stop_ns)
        if not inside.all():
            steps = {name: column[inside] for name, column in steps.items()}
            start, end = steps["start_ns"], steps["end_ns"]
        client = steps["client"]
        time = np.minimum(end, window.end_ns) - np.maximum(start, window.start_ns)
        np.add.at(self.steps, client, 1)
        np.add.at(self.busy_ns, client, time)
        np.add.at(self.prefill_tokens, client, steps["num_prefill_tokens"])
        np.maximum.at(self.kv_blocks_peak, client, steps["kv_blocks"])
        np.maximum.at(self.max_waiting, client, steps["num_waiting"])
        sequences = steps["num_prefills"] + steps["num_decodes"]
        # in floating point: blocks x ns pass 2**63 within a day
        np.add.at(self.sequence_time, client, time * sequences.astype(np.float64))
        np.add.at(self.kv_block_time, client, time * steps["kv_blocks"].astype(np.float64))

    def add_tasks(self, tasks: Columns, window: Window) -> None:
        """Segments of the window: all of each request, its rows together and in order."""
        preempted = tasks["how"] == PREEMPTED
        # what was preempted, or lost once it had begun, goes on with the request's next row
        again = preempted | ((tasks["how"] == LOST) & (tasks["started_ns"] >= 0))
        first = (tasks["started_ns"] >= 0) & (tasks["client"] != NO_CLIENT) & window.holds(tasks["started_ns"])
        first[1:] &= ~(again[:-1] & (tasks["request"][1:] == tasks["request"][:-1]))
        np.add.at(self.cached_tokens, tasks["client"][first], tasks["cached_tokens"][first])
        np.add.at(self.fresh_tokens, tasks["client"][first], tasks["computed_tokens"][first])
        np.add.at(self.preemptions, tasks["client"][preempted & window.holds(tasks["end_ns"])], 1)


def summarise_clients(
    clients: Sequence[ClientInfo], sums: Activity, up_times: tuple[IntColumn, IntColumn]
) -> dict[str, dict[str, Any]]:
    """Figures of every pool, in the clients' order, with those of its `replicas` below it.

    `up_times`: for how long each client served, and was there, ns.
    """
    return {
        pool: {
            **_figures(clients, members, sums, up_times),
            "replicas": [
                {"name": clients[member].name, **_figures(clients, [member], sums, up_times)} for member in members
            ],
        }
        for pool, members in pools(clients).items()
    }


def pools(clients: Sequence[ClientInfo]) -> dict[str, list[int]]:
    """Indices of the clients of each pool."""
    members: dict[str, list[int]] = {}
    for index, client in enumerate(clients):
        members.setdefault(client.pool, []).append(index)
    return members


def _figures(
    clients: Sequence[ClientInfo], members: list[int], sums: Activity, up_times: tuple[IntColumn, IntColumn]
) -> dict[str, Any]:
    """The figures of some clients taken as one; the pool's KV peak is that of its fullest replica."""
    busy = int(sums.busy_ns[members].sum())
    prefilled = int(sums.prefill_tokens[members].sum())
    cached, fresh = (int(column[members].sum()) for column in (sums.cached_tokens, sums.fresh_tokens))
    filling = [sums.kv_blocks_peak[m] / clients[m].kv_blocks for m in members if clients[m].kv_blocks]
    block_time = sum(clients[m].kv_blocks * int(sums.busy_ns[m]) for m in members)
    served_ns, there_ns = up_times
    num_lanes = Counter(client.replica for client in clients)
    replica_ns = sum(int(there_ns[m]) / num_lanes[clients[m].replica] for m in members)
    return {
        "utilisation": ratio(busy, int(served_ns[members].sum())),
        "replica_s": replica_ns / NS_PER_S,
        "mean_batch": ratio(float(sums.sequence_time[members].sum()), busy),
        "preemptions": int(sums.preemptions[members].sum()),
        "kv_peak": float(max(filling)) if filling else None,
        "kv_mean": ratio(float(sums.kv_block_time[members].sum()), block_time),
        "kv_tokens_capacity": sum(clients[m].kv_tokens_capacity for m in members),
        "prefix_hit_rate": ratio(cached, cached + fresh),
        "steps": int(sums.steps[members].sum()),
        "prefill_tokens": prefilled,
        "output_tokens": int(sums.output_tokens[members].sum()),
        "max_waiting": int(sums.max_waiting[members].max()),
    }


def ratio(part: float, whole: float) -> float | None:
    """`part` / `whole`, None where there is no whole."""
    return part / whole if whole else None
