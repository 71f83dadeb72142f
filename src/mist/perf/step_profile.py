"""A learned step model as a value: times of an engine's steps by four features, as `mist calibrate steps` writes it.

Between a profile file, read by whoever builds a scenario, and the performance model `steps`, which tabulates it. It
knows neither operators nor devices, and never opens a file.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from mist.errors import nearest
from mist.hardware import MappingReader

FloatArray = npt.NDArray[np.float64]

PREFILL, DECODE, MIXED = REGIMES = ("prefill", "decode", "mixed")

#: What a step's time follows from. `new_tokens`: prefill chunks c and one per decode; `sequences`: chunks and decodes;
#: `context`: Σ s, tokens in the KV cache before the step; `attention`: Σ c·(s + c/2) of chunks + Σ (s + 1) of decodes.
FEATURES = ("new_tokens", "sequences", "context", "attention")


@dataclass(frozen=True, slots=True)
class Regime:
    """Steps of one kind: linear between `knots` of new tokens, plus a rate for each other feature, all in ns.

    Below the first knot as at it, since few tokens wait for the weights; beyond the last at the mean slope of the
    knots' upper half. No rate is negative and `knot_ns` never falls, so that more work never takes less time.
    `ranges`: (least, most) of each feature measured.
    """

    knots: tuple[float, ...]
    knot_ns: tuple[float, ...]
    sequence_ns: float = 0.0
    context_ns: float = 0.0
    attention_ns: float = 0.0
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)

    def of_tokens(self, new_tokens: FloatArray) -> FloatArray:
        """The part of the time that new tokens alone make, ns."""
        knots, ns = np.array(self.knots), np.array(self.knot_ns)
        beyond = np.maximum(new_tokens - knots[-1], 0.0)
        found: FloatArray = np.interp(new_tokens, knots, ns) + beyond * self.last_slope_ns
        return found

    @property
    def last_slope_ns(self) -> float:
        """Slope of the knots' upper half, ns per new token; through the origin where there is but one knot."""
        base = int(np.searchsorted(self.knots[:-1], self.knots[-1] / 2))
        if len(self.knots) == 1:
            return self.knot_ns[0] / self.knots[0]
        base = min(base, len(self.knots) - 2)
        return (self.knot_ns[-1] - self.knot_ns[base]) / (self.knots[-1] - self.knots[base])

    def time_ns(self, features: FloatArray) -> FloatArray:
        """Times of steps, ns; `features`: [steps, 4] in the order of `FEATURES`."""
        rates = np.array([self.sequence_ns, self.context_ns, self.attention_ns])
        found: FloatArray = self.of_tokens(features[:, 0]) + features[:, 1:] @ rates
        return found


@dataclass(frozen=True, slots=True)
class StepProfile:
    """Learned steps of one engine with one model on one platform.

    With `includes_host` the times are those from one step to the next, so that an engine's host time per step is in
    them. `source`, `licence`, `calibrated` (a date), `engine` and `notes` say what they were learned from.
    """

    name: str
    model: str
    device: str
    tp: int
    weights_dtype: str
    kv_dtype: str
    regimes: Mapping[str, Regime]
    includes_host: bool = True
    engine: str = ""
    source: str = ""
    licence: str = ""
    calibrated: str = ""
    notes: tuple[str, ...] = ()

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any]) -> StepProfile:
        """A profile from its file; ScenarioError lists every key that is unknown, missing or out of range."""
        known = set(cls.__dataclass_fields__)
        needed = ("name", "model", "device", "tp", "weights_dtype", "kv_dtype", "regimes")
        reader = MappingReader(data, known, required=needed)
        values: dict[str, Any] = {
            key: str(data.get(key, "")) for key in known - {"tp", "regimes", "includes_host", "notes"}
        }
        tp, host, notes = data.get("tp"), data.get("includes_host", True), data.get("notes") or ()
        if "tp" in data and (isinstance(tp, bool) or not isinstance(tp, int) or tp < 1):
            reader.problem("tp", f"must be a whole number of at least 1, not {tp!r}")
        if not isinstance(host, bool):
            reader.problem("includes_host", f"must be true or false, not {host!r}")
        if isinstance(notes, str) or not isinstance(notes, Sequence):
            reader.problem("notes", "must be a list of sentences")
            notes = ()
        regimes = _regimes(reader, data["regimes"]) if data.get("regimes") else {}
        reader.finish()
        return cls(**values, tp=int(tp or 0), includes_host=host, notes=tuple(map(str, notes)), regimes=regimes)

    def as_mapping(self) -> dict[str, Any]:
        """Plain data that reads back as this profile; what is empty is left out."""
        plain = {key: value for key, value in asdict(self).items() if value not in ("", ())}
        plain["regimes"] = {name: _plain(regime) for name, regime in plain["regimes"].items()}
        return plain | ({"notes": list(self.notes)} if self.notes else {})


def _plain(regime: dict[str, Any]) -> dict[str, Any]:
    lists = {key: list(value) if isinstance(value, tuple) else value for key, value in regime.items()}
    return lists | {"ranges": {name: list(pair) for name, pair in regime["ranges"].items()}}


def _regimes(reader: MappingReader, given: Any) -> dict[str, Regime]:
    if not isinstance(given, Mapping):
        reader.problem("regimes", f"must be a mapping, not {given!r:.60}", f"the kinds are {', '.join(REGIMES)}")
        return {}
    for name in given.keys() - set(REGIMES):
        reader.problem(f"regimes.{name}", "is not a kind of steps", nearest(str(name), REGIMES))
    found = {name: _regime(reader, f"regimes.{name}", given[name]) for name in REGIMES if name in given}
    return {name: regime for name, regime in found.items() if regime is not None}


def _regime(reader: MappingReader, key: str, given: Any) -> Regime | None:
    if not isinstance(given, Mapping):
        reader.problem(key, f"must be a mapping, not {given!r:.60}")
        return None
    known = Regime.__dataclass_fields__
    for name in given.keys() - set(known):
        reader.problem(f"{key}.{name}", "is not a known key", nearest(str(name), known))
    knots, ns = (_rising(reader, f"{key}.{name}", given.get(name), name == "knots") for name in ("knots", "knot_ns"))
    if len(knots) != len(ns) and knots and ns:
        reader.problem(f"{key}.knot_ns", f"has {len(ns)} values for {len(knots)} knots")
    names = ("sequence_ns", "context_ns", "attention_ns")
    rates = {name: given.get(name, 0.0) for name in names}
    for name, rate in rates.items():
        if not _is_number(rate) or rate < 0:
            reader.problem(f"{key}.{name}", f"must be a number of at least 0, not {rate!r:.60}")
    ranges = _ranges(reader, f"{key}.ranges", given.get("ranges") or {})
    errors = given.get("errors") or {}
    if not isinstance(errors, Mapping) or not all(map(_is_number, errors.values())):
        reader.problem(f"{key}.errors", "must be a mapping of numbers")
        errors = {}
    if reader.problems:
        return None
    return Regime(knots, ns, **{name: float(rate) for name, rate in rates.items()}, ranges=ranges, errors=dict(errors))


def _rising(reader: MappingReader, key: str, given: Any, strictly: bool) -> tuple[float, ...]:
    if not isinstance(given, list | tuple) or not given or not all(_is_number(x) and x > 0 for x in given):
        reader.problem(key, "must be a list of numbers above 0")
        return ()
    steps = [b - a for a, b in itertools.pairwise(given)]
    if any(step < 0 or (strictly and step == 0) for step in steps):
        reader.problem(key, "must rise" if strictly else "must not fall", "more work never takes less time")
    return tuple(map(float, given))


def _ranges(reader: MappingReader, key: str, given: Any) -> dict[str, tuple[float, float]]:
    found: dict[str, tuple[float, float]] = {}
    for name, pair in given.items() if isinstance(given, Mapping) else [("", None)]:
        if name not in FEATURES:
            reader.problem(key, f"has no feature {name!r}", nearest(str(name), FEATURES))
        elif not isinstance(pair, list | tuple) or len(pair) != 2 or not all(map(_is_number, pair)):
            reader.problem(f"{key}.{name}", "must be [least, most]")
        else:
            found[name] = (float(pair[0]), float(pair[1]))
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
