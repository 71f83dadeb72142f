"""What was seen at the place of a reason, in figures: how full, how busy, how slow it was.

From the summary and the records of the run; every fact is an expression over them. It ranks nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mist.advice.evidence import Evidence
from mist.advice.latency import Account
from mist.advice.reasons import BATCH, HOST, IDLE, INTERFERENCE, KV, LINK, QUEUEING, RETRIEVAL, STAGE
from mist.metrics.distribution import FloatColumn
from mist.metrics.window import BoolColumn, Columns
from mist.records import IntColumn

Facts = dict[str, Any]


def facts(evidence: Evidence, code: str, at: str, account: Account | None = None) -> Facts:
    """Facts of a reason: fractions of 1, seconds, bytes and counts, under the names that `docs/advice.md` explains."""
    return _OF[code](evidence, at, account)


def _queueing(evidence: Evidence, at: str, account: Account | None) -> Facts:
    steps, limits = evidence.steps_of(at), evidence.limits[at]
    waited = _had_waiting(steps)
    took = (steps["end_ns"] - steps["start_ns"]).astype(float)
    tokens = steps["num_prefill_tokens"] + steps["num_decodes"] * limits.tokens_per_decode
    seqs = steps["num_prefills"] + steps["num_decodes"]
    bounds = account.bounds[at] if account else {}
    return {
        "bound": max(bounds, key=lambda name: bounds[name]) if bounds else "step",
        "token_budget": _mean(tokens, took, waited, limits.max_num_batched_tokens),
        "sequences": _mean(seqs, took, waited, limits.max_num_seqs),
        **_busy(evidence, at, account),
        "max_waiting": evidence.summary["clients"][at]["max_waiting"],
    }


def _had_waiting(steps: Columns) -> BoolColumn:
    """Which steps somebody waited for as they began: as the step before of the same client ended."""
    order = np.lexsort((steps["start_ns"], steps["client"]))
    client, waiting = steps["client"][order], steps["num_waiting"][order] > 0
    found = np.zeros(len(order), bool)
    found[order[1:]] = waiting[:-1] & (client[1:] == client[:-1])
    return found


def _mean(amounts: IntColumn, took: FloatColumn, chosen: BoolColumn, limit: int) -> float | None:
    """The mean share of a limit over the time of the chosen steps; None without a limit, or such steps."""
    whole = float(took[chosen].sum())
    return float((amounts * took)[chosen].sum()) / whole / limit if limit and whole else None


def _kv(evidence: Evidence, at: str, account: Account | None) -> Facts:
    figures = evidence.summary["clients"][at]
    return {key: figures[key] for key in ("kv_mean", "kv_peak", "kv_tokens_capacity", "preemptions")}


def _link(evidence: Evidence, at: str, account: Account | None) -> Facts:
    sender, _, receiver = at.partition(" -> ")
    names = [*evidence.pool_of, *reversed(evidence.records.memory_names)]
    rows = evidence.transfers
    sent = np.array([names[i] == sender for i in rows["sender"].tolist()], bool)
    sent &= np.array([names[i] == receiver for i in rows["receiver"].tolist()], bool)
    sent &= (rows["end_ns"] >= 0) & (rows["start_ns"] >= 0)
    if not sent.any():
        return {"transfers": 0}
    took = (rows["end_ns"] - rows["start_ns"])[sent] / 1e9
    return {"transfers": int(sent.sum()), "mean_s": float(took.mean()), "mean_bytes": float(rows["bytes"][sent].mean())}


def _retrieval(evidence: Evidence, at: str, account: Account | None) -> Facts:
    whole = account.times["retrieval", at] if account else 0.0
    return {"waiting": account.waiting.get(at, 0.0) / whole if account and whole else 0.0, **_busy(evidence, at, None)}


def _busy(evidence: Evidence, at: str, account: Account | None) -> Facts:
    figures = evidence.summary["clients"][at]
    return {"utilisation": figures["utilisation"], "mean_batch": figures["mean_batch"]}


def _host(evidence: Evidence, at: str, account: Account | None) -> Facts:
    return {"of_steps": evidence.host_share(at), "engine": evidence.limits[at].engine.name}


def _interference(evidence: Evidence, at: str, account: Account | None) -> Facts:
    steps = evidence.steps_of(at)
    took = (steps["end_ns"] - steps["start_ns"]) / 1e9
    decodes, prompts = steps["num_decodes"] > 0, steps["num_prefills"] > 0
    kinds = {"with_prompts_s": decodes & prompts, "without_s": decodes & ~prompts}
    return {name: float(took[rows].mean()) if rows.any() else None for name, rows in kinds.items()}


def _batch(evidence: Evidence, at: str, account: Account | None) -> Facts:
    return {**_busy(evidence, at, account), "max_num_seqs": evidence.limits[at].max_num_seqs}


_OF: dict[str, Callable[[Evidence, str, Account | None], Facts]] = {
    QUEUEING: _queueing, KV: _kv, LINK: _link, RETRIEVAL: _retrieval, STAGE: _busy, HOST: _host,
    INTERFERENCE: _interference, IDLE: _busy, BATCH: _batch,
}  # fmt: skip
