"""One step of a model on devices, explained: which operators it runs, and how long each takes and why.

Beside the schema: it reads the same catalogues, engines and performance models as a scenario, for a step written as
text instead of one that a run meets. It simulates nothing, and the memory that a step needs is only remarked on.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from mist import registry
from mist.engine import EngineProfile
from mist.errors import Problem, ScenarioError, nearest
from mist.hardware import Device, Platform
from mist.metrics import SCHEMA_VERSION
from mist.model import DTYPE_BYTES, ModelSpec
from mist.model.quantization import UNKNOWN
from mist.perf import Deployment, OperatorTime
from mist.request import Step
from mist.scenario import catalogue
from mist.scenario.clients import MAX_STEP_TOKENS, PerfList
from mist.scenario.named import Spec
from mist.scenario.pricing import PREFERRED, host_beside, price
from mist.scenario.source import override, read_mapping

_PERF_LIST: TypeAdapter[list[Spec]] = TypeAdapter(PerfList)
_TERM = re.compile(r"(?:(?P<tokens>\d+)(?:@(?P<before>\d+))?|(?P<count>\d+)x(?P<context>\d+))", re.ASCII)
_GRAMMAR = "terms joined by +: 512 or 512@1024 (a prefill of 512 tokens, 1,024 before it), 64x2048 (64 decodes)"

#: the engine whose release the operator tables are of: kernels as measured
TABLES_ENGINE = "vllm-0.24"


@dataclass(frozen=True, slots=True)
class Explanation:
    """A step's operators and sums. `total_ns` is the device's time, `host_ns` what the engine's host adds.

    `remarks`: what one should know of the answer, such as a model that doesn't fit.
    """

    deployment: Deployment
    engine: EngineProfile
    step: Step
    perf: str
    total_ns: int
    host_ns: int
    floor_ns: int
    operators: tuple[OperatorTime, ...]
    remarks: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """The whole as a JSON document, times in ms, work in FLOP and bytes of one device."""
        d, p = self.deployment, self.deployment.platform
        return {
            "schema_version": SCHEMA_VERSION,
            "model": d.model.name,
            "device": p.device.name,
            "parallelism": {"tp": p.tp, "pp": p.pp, "ep": p.ep, "attn_dp": p.attn_dp},
            "weights_dtype": d.weights_dtype,
            "kv_dtype": d.kv_dtype,
            "engine": self.engine.name,
            "perf": self.perf,
            "step": {
                "prefills": [{"tokens": c, "context": s} for c, s in self.step.chunks],
                "decodes": self.step.num_decodes,
                "decode_context": self.step.decode_context,
            },
            "total_ms": self.total_ns / 1e6,
            "host_ms": self.host_ns / 1e6,
            "floor_ms": self.floor_ns / 1e6,
            "efficiency": self.floor_ns / self.total_ns,
            "origins": self.origins(),
            "operators": [_operator_json(o) for o in self.operators],
            "remarks": list(self.remarks),
        }

    def origins(self) -> dict[str, float]:
        """Share of the operators' time by origin."""
        total = sum(o.time_ns for o in self.operators)
        shares: dict[str, float] = {}
        for o in self.operators:
            shares[o.origin] = shares.get(o.origin, 0.0) + o.time_ns / total
        return shares

    def rows(self) -> list[dict[str, Any]]:
        """A table for people: an operator a row, and the sum."""

        def row(name: str, launches: int, flop: float, time_ns: float, floor_ns: float, **rest: Any) -> dict[str, Any]:
            efficiency = round(100 * floor_ns / time_ns) if time_ns else None
            return {"operator": name, "launches": launches, "GFLOP": round(flop / 1e9, 1), "MB": None,
                    "ms": round(time_ns / 1e6, 3), "share %": round(100 * time_ns / self.total_ns, 1),
                    "efficiency %": efficiency, "bound by": "", "origin": ""} | rest  # fmt: skip

        rows = [
            row(o.name, o.count, o.flop, o.time_ns, o.floor_ns, MB=round(o.bytes / 1e6, 1))
            | {"bound by": o.bound_by, "origin": o.origin}
            for o in self.operators
        ]
        launches, flop = sum(o.count for o in self.operators), sum(o.flop for o in self.operators)
        total = row("total", launches, flop, self.total_ns, self.floor_ns)
        return [*rows, total]

    def __str__(self) -> str:
        d, p = self.deployment, self.deployment.platform
        degrees = (("tp", p.tp), ("pp", p.pp), ("ep", p.ep), ("attn_dp", p.attn_dp))
        split = ", ".join(f"{name} {n}" for name, n in degrees if n > 1)
        devices = f"{p.num_devices} x {p.device.name}" + (f" ({split})" if split else "")
        return (
            f"{d.model.name} in {d.weights_dtype}, KV in {d.kv_dtype}, on {devices}, by {self.perf}: "
            f"{self.total_ns / 1e6:.3f} ms on the device (floor {self.floor_ns / 1e6:.3f} ms), "
            f"{self.host_ns / 1e6:.3f} ms on the host ({self.engine.name})"
        )


def parse_step(text: str, only: str = "") -> Step:
    """A step from text such as `512@0+64x2048`: prefills `tokens[@context before]`, decodes `sequences x context`.

    Every prefill is taken to end in the step and to sample a token; `only` "tokens" or "count" allows prefills or
    decodes alone. ScenarioError says what is wrong with the text.
    """
    step = Step()
    for term in text.replace(" ", "").split("+"):
        found = _TERM.fullmatch(term)
        if found is None or (only and not found[only]):
            what = {"tokens": "a prefill", "count": "decodes"}.get(only, "a step")
            raise ScenarioError(Problem(f"{term!r} is not {what}", hint=_GRAMMAR))
        if found["tokens"]:
            c, s = int(found["tokens"]), int(found["before"] or 0)
            step.chunks.append((c, s))
            step.num_prefill_tokens += c
            step.num_sampled += 1
        else:
            n, context = int(found["count"]), int(found["context"])
            step.num_decodes += n
            step.decode_context += n * context
            step.num_sampled += n
        if not all(int(value) for key, value in found.groupdict().items() if value and key != "before"):
            raise ScenarioError(Problem(f"{term!r} is no work", hint="give whole numbers of at least 1"))
        if int(found["before"] or found["context"] or 0) > MAX_STEP_TOKENS:
            raise ScenarioError(Problem(f"{term!r} has a longer context than any model", hint=_GRAMMAR))
    if step.num_tokens > MAX_STEP_TOKENS:
        raise ScenarioError(Problem(f"no step holds {step.num_tokens:,} tokens", hint=f"at most {MAX_STEP_TOKENS:,}"))
    return step


def explain_step(
    model: str,
    device: str,
    step: Step,
    *,
    tp: int = 1,
    pp: int = 1,
    ep: int = 1,
    attn_dp: int = 1,
    engine: str = TABLES_ENGINE,
    weights_dtype: str = "auto",
    kv_dtype: str = "auto",
    perf: str = "",
    folder: Path | None = None,
) -> Explanation:
    """What `step` takes on `tp` x `pp` x `attn_dp` devices; sizes of the step are those of one attention group.

    Names are those of the catalogues or paths from `folder`. `weights_dtype` auto is the checkpoint's, `kv_dtype` auto
    16 bits. `perf`: a performance model, also with parameters as YAML (`steps: file.yaml`), "" the first of `kernels`
    and `roofline` that supports the deployment.
    ScenarioError lists all that can't be read, or why nothing can price it.
    """
    values = _read({"models": model, "devices": device, "engines": engine}, folder or Path())
    _check_dtypes(weights_dtype, kv_dtype)
    spec, profile, hardware = values["models"], values["engines"], values["devices"]
    assert isinstance(spec, ModelSpec)
    assert isinstance(profile, EngineProfile)
    assert isinstance(hardware, Device)
    platform = Platform(hardware, tp=tp, pp=pp, ep=ep, attn_dp=attn_dp)
    if reason := platform.problem() or spec.parallel_problem(tp, pp, ep, attn_dp):
        raise ScenarioError(Problem(reason, hint="choose degrees that divide the model and the nodes evenly"))
    if spec.is_encoder and (step.num_decodes or any(context for _, context in step.chunks)):
        hint = "give a --prefill without a context before it"
        raise ScenarioError(Problem(f"{spec.name} is an encoder: it decodes nothing and keeps no context", hint=hint))
    if weights_dtype == "auto" and spec.checkpoint_dtype == UNKNOWN:
        raise ScenarioError(Problem(f"the quantisation of {spec.name} isn't known", hint="give --weights-dtype"))
    seqs, tokens = profile.limits_for(hardware, spec)
    deployment = Deployment(
        spec,
        platform,
        spec.checkpoint_dtype if weights_dtype == "auto" else weights_dtype,
        "bf16" if kv_dtype == "auto" else kv_dtype,
        max(tokens, step.num_tokens),
        max(seqs, step.num_sampled),
        cuda_graph=profile.cuda_graph,
        engine=profile.engine,
        time_factors=profile.time_factors,
        tables_version=profile.tables_version,
    )
    priced = price(_specs(perf, folder or Path()), deployment)
    prepared = priced.model
    if prepared is None:
        raise ScenarioError([Problem(reason, hint="try --perf roofline") for reason in priced.refusals])
    host = host_beside(profile, prepared, spec.num_layers)
    prefill_ns = host.prefill_overhead_ns if step.chunks else 0
    return Explanation(
        deployment, profile, step, priced.name,
        total_ns=prepared.step_time(step),
        host_ns=host.step_overhead_ns + prefill_ns + host.token_overhead_ns * step.num_sampled,
        floor_ns=prepared.floor_time(step),
        operators=tuple(prepared.explain(step)),
        remarks=(*priced.refusals, *_remarks(deployment, profile, step, tokens, seqs)),
    )  # fmt: skip


def _read(wanted: dict[str, str], folder: Path) -> dict[str, Any]:
    """The value of each kind's name; ScenarioError of all that can't be read."""
    values: dict[str, Any] = {}
    problems: list[Problem] = []
    for kind, name in wanted.items():
        try:
            values[kind] = catalogue.read(kind, name, folder)[0]
        except ScenarioError as error:
            problems += error.problems
    if problems:
        raise ScenarioError(problems)
    return values


def _check_dtypes(*dtypes: str) -> None:
    known = ("auto", *DTYPE_BYTES)
    problems = [Problem(f"there is no dtype {d!r}", hint=nearest(d, known)) for d in dtypes if d not in known]
    if problems:
        raise ScenarioError(problems)


def _specs(perf: str, folder: Path) -> list[Spec]:
    """The performance models to ask: the one given, or the usual ones."""
    given = override(read_mapping({"perf": list(PREFERRED)}), [f"perf={perf}"] if perf else []).at(("perf",))
    try:
        return _PERF_LIST.validate_python(given, context={"folder": folder})
    except ValidationError as error:
        found = [each["ctx"] for each in error.errors()]
        if isinstance(given, str) and given not in registry.names("perf"):
            found = [
                {"message": f"there is no performance model {given!r}", "hint": nearest(given, registry.names("perf"))}
            ]
        raise ScenarioError(Problem(each["message"], hint=each["hint"]) for each in found) from None


def _remarks(
    d: Deployment, engine: EngineProfile, step: Step, max_num_batched_tokens: int, max_num_seqs: int
) -> list[str]:
    """What speaks against ever seeing this step: memory, and contexts beyond the model's."""
    capacity = engine.kv_blocks(
        d.model, d.platform, d.weights_dtype, d.kv_dtype, max_num_batched_tokens, max_num_seqs
    )  # fmt: skip
    found = []
    tokens = step.decode_context + sum(c + s for c, s in step.chunks)
    if capacity.missing_bytes:
        found.append(f"out of memory: {capacity}")
    elif tokens > capacity.num_tokens and not d.model.is_encoder:
        found.append(f"the KV cache holds {capacity.num_tokens:,} tokens, and this step attends to {tokens:,}")
    longest = max([c + s for c, s in step.chunks] + [-(-step.decode_context // max(1, step.num_decodes))])
    if longest > d.model.max_context:
        found.append(f"{d.model.name} has a context of {d.model.max_context:,} tokens, not {longest:,}")
    return found


def _operator_json(o: OperatorTime) -> dict[str, Any]:
    return {
        "name": o.name,
        "count": o.count,
        "flop": o.flop,
        "bytes": o.bytes,
        "time_ms": o.time_ns / 1e6,
        "floor_ms": o.floor_ns / 1e6,
        "efficiency": o.efficiency,
        "bound_by": o.bound_by,
        "origin": o.origin,
    }
