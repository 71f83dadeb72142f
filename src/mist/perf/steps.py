"""The performance model of learned steps: whole steps of a real engine, priced by a profile of them.

Prepared once per client: the profile is tabulated by new tokens, so that a step costs a few array reads. It knows no
operators, answers for the deployment that was profiled alone, and never beats the data-sheet floor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from operator import gt
from typing import Any

import numpy as np

from mist.errors import ScenarioError
from mist.perf import ORIGINS, Deployment, OperatorTime, PerfModel
from mist.perf.floor import StepFloor
from mist.perf.step_profile import DECODE, FEATURES, MIXED, PREFILL, Regime, StepProfile
from mist.registry import register
from mist.request import Step

INTERPOLATED, EXTRAPOLATED, CLAMPED = (ORIGINS.index(name) for name in ("interpolated", "extrapolated", "clamped"))

#: Tokens that are tabulated at least; steps beyond the tables are computed by the same rule.
MIN_TABULATED_TOKENS = 8192


@register("perf", "steps")
@dataclass(slots=True)
class Steps:
    """Step times learned from a profile of the engine itself.

    `profile`: a name of `mist list steps`, the path of a YAML file that `mist calibrate steps` wrote, or its contents.
    A mixed step takes at least what its decodes alone and its prefills alone take; one of a kind that wasn't profiled
    is priced by the other kinds and counts as extrapolated. Beyond the most of any feature in the whole profile a step
    takes at least what `fallback` says.
    """

    profile: str | dict[str, Any] = ""
    fallback: PerfModel | None = None
    num_clamped: int = field(init=False, default=0, repr=False)
    _prefill: _Table = field(init=False, repr=False)
    _decode: _Table = field(init=False, repr=False)
    _mixed: _Table = field(init=False, repr=False)
    _floor: StepFloor = field(init=False, repr=False)
    _most: tuple[float, ...] = field(init=False, repr=False)
    _memory_bytes_per_s: float = field(init=False, repr=False)
    _spent_ns: list[float] = field(init=False, repr=False)

    @property
    def includes_host(self) -> bool:
        """Whether the engine's host time per step is in the times already."""
        found = self._read()
        return isinstance(found, StepProfile) and found.includes_host

    def supports(self, deployment: Deployment) -> str | None:
        """None, or why not: a profile of something else, or without steps that this deployment runs."""
        found = self._read()
        reason = found if isinstance(found, str) else _mismatch(found, deployment)
        return reason or (self.fallback.supports(deployment) if self.fallback else None)

    def prepare(self, deployment: Deployment) -> None:
        """Tabulate the profile up to the deployment's tokens, and its floor."""
        found = self._read()
        assert isinstance(found, StepProfile), found
        last = max(deployment.max_num_batched_tokens, deployment.max_num_seqs, MIN_TABULATED_TOKENS)
        self._prefill, self._decode, self._mixed = (_Table(regime, last) for regime in _complete(found.regimes))
        self._most = tuple(max(r.ranges.get(f, (0.0, 0.0))[1] for r in found.regimes.values()) for f in FEATURES)
        if self.fallback is not None:
            self.fallback.prepare(deployment)
        self._floor = StepFloor(deployment)
        self._memory_bytes_per_s = deployment.platform.device.memory_bytes_per_s
        self._spent_ns = [0.0] * len(ORIGINS)
        self.num_clamped = 0

    def step_time(self, step: Step) -> int:
        """Time of `step`, ns, rounded up."""
        ns, origin = self._time(step)
        self._spent_ns[origin] += ns
        if origin == CLAMPED:
            self.num_clamped += 1
        return int(ns) + 1

    def floor_time(self, step: Step) -> int:
        """max(FLOP / peak, bytes / bandwidth) of the whole step, ns, rounded down."""
        return int(self._floor.time(step))

    def explain(self, step: Step) -> list[OperatorTime]:
        """The step as a whole: what was learned says nothing of its operators."""
        ns, origin = self._time(step)
        flop, moved = self._floor.work(step)
        floor_ns = self._floor.time(step)
        kind = MIXED if step.chunks and step.num_decodes else DECODE if step.num_decodes else PREFILL
        by_memory = moved * 1e9 / self._memory_bytes_per_s >= floor_ns * (1 - 1e-9)
        bound = "memory" if by_memory else "compute"
        return [OperatorTime(f"{kind}_step", 1, flop, moved, ns, bound, ORIGINS[origin], floor_ns)]

    def provenance(self) -> dict[str, float]:
        """Share of the answered time by origin; before the first step all of it counts as interpolated."""
        total = sum(self._spent_ns)
        if not total:
            return {"interpolated": 1.0}
        return {name: ns / total for name, ns in zip(ORIGINS, self._spent_ns, strict=True)}

    def _time(self, step: Step) -> tuple[float, int]:
        """(ns, code of its origin)."""
        n, chunks, context = step.num_decodes, step.chunks, step.decode_context
        cached, area = 0, 0.0
        for c, s in chunks:
            cached += s
            area += c * (s + 0.5 * c)
        tokens, sequences = step.num_prefill_tokens, len(chunks)
        whole = tokens + n, sequences + n, cached + context - n, area + context
        if not chunks:
            ns, origin = self._decode.time(*whole)
        elif not n:
            ns, origin = self._prefill.time(*whole)
        else:
            ns, origin = self._mixed.time(*whole)
            prefill_ns = self._prefill.time(tokens, sequences, cached, area)[0]
            ns = max(ns, prefill_ns, self._decode.time(n, n, context - n, context)[0])
        if origin == EXTRAPOLATED and self.fallback is not None and any(map(gt, whole, self._most)):
            ns = max(ns, self.fallback.step_time(step))
        floor_ns = self._floor.time(step)
        return (floor_ns, CLAMPED) if ns < floor_ns else (ns, origin)

    def _read(self) -> StepProfile | str:
        """The profile, or why there is none."""
        if isinstance(self.profile, str):
            return (
                f"the profile {self.profile!r} was not read: give its contents"
                if self.profile
                else "no profile is named"
            )
        try:
            return StepProfile.from_mapping(self.profile)
        except ScenarioError as error:
            return "; ".join(p.message for p in error.problems)


class _Table:
    """A regime by new tokens; `time` gives (ns, code of its origin)."""

    def __init__(self, regime: Regime, last: int) -> None:
        self._ns: list[float] = regime.of_tokens(np.arange(last + 1, dtype=np.float64)).tolist()
        self._last, self._slope_ns = last, regime.last_slope_ns
        self._rates = regime.sequence_ns, regime.context_ns, regime.attention_ns
        ranges = [regime.ranges.get(name, (1.0, 0.0)) for name in FEATURES]
        self._least, self._most = zip(*ranges, strict=True)

    def time(self, new_tokens: int, sequences: int, context: float, attention: float) -> tuple[float, int]:
        if new_tokens <= self._last:
            ns = self._ns[new_tokens]
        else:
            ns = self._ns[-1] + (new_tokens - self._last) * self._slope_ns
        sequence_ns, context_ns, attention_ns = self._rates
        ns += sequences * sequence_ns + context * context_ns + attention * attention_ns
        a, b, c, d = self._least
        e, f, g, h = self._most
        inside = a <= new_tokens <= e and b <= sequences <= f and c <= context <= g and d <= attention <= h
        return ns, INTERPOLATED if inside else EXTRAPOLATED


def _complete(regimes: Mapping[str, Regime]) -> tuple[Regime, Regime, Regime]:
    """Regimes of prefill, decode and mixed steps; those that weren't profiled by the others, without any range.

    Without mixed steps, decodes in a prefill cost a new token each and their context what it costs a decode step.
    """
    mixed = regimes.get(MIXED)
    prefill, decode = regimes.get(PREFILL), regimes.get(DECODE)
    stand_in = mixed or prefill
    assert stand_in is not None
    if mixed is None:
        context_ns = max(stand_in.context_ns, decode.context_ns if decode else 0.0)
        mixed = replace(stand_in, context_ns=context_ns, ranges={})
    anything = replace(mixed, ranges={})
    return prefill or anything, decode or anything, mixed


def _mismatch(profile: StepProfile, d: Deployment) -> str | None:
    """What differs between what was profiled and what is deployed."""
    p = d.platform
    pairs = (
        ("model", profile.model, d.model.name),
        ("device", profile.device, p.device.name),
        ("tp", profile.tp, p.tp),
        ("pp", 1, p.pp),
        ("ep", 1, p.ep),
        ("attn_dp", 1, p.attn_dp),
        ("tokens per decode", 1, d.tokens_per_decode),
        ("weights_dtype", *map(_bits, (profile.weights_dtype, d.weights_dtype))),
        ("kv_dtype", *map(_bits, (profile.kv_dtype, d.kv_dtype))),
    )
    wrong = [f"{key} {theirs}, not {ours}" for key, theirs, ours in pairs if theirs != ours]
    if wrong:
        return f"the profile {profile.name} is of {'; '.join(wrong)}"
    if d.clock < 1:
        return f"the profile {profile.name} is of devices without a power cap"
    if not profile.regimes.keys() & {PREFILL, MIXED}:
        return f"the profile {profile.name} has no steps with prefills"
    if not profile.regimes.keys() & {DECODE, MIXED} and not d.model.is_encoder:
        return f"the profile {profile.name} has no steps with decodes"
    return None


def _bits(dtype: str) -> str:
    """Both 16-bit formats take the same time."""
    return "bf16" if dtype == "fp16" else dtype
