"""What a user may write: the sections of a scenario with their types, defaults, help and checks.

Between the plain data of a `Source` and the `Scenario` that runs; `mist schema` is generated from here. Checks that
need more than one section are elsewhere, and nothing here builds a policy to run it or reads a trace.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)

from mist import registry
from mist.errors import Problem, ScenarioError
from mist.request import DECODE, PREFILL
from mist.scenario import catalogue
from mist.scenario.clients import Count, Name, PerfList
from mist.scenario.events import EventSection
from mist.scenario.hand_over import HandOver
from mist.scenario.memory import Memory
from mist.scenario.named import Located, Section, Short, Spec, SpecOf, problem, problems, short
from mist.scenario.network import Network
from mist.scenario.pools import AnyPool
from mist.scenario.prices import DEFAULT_PRICES, AnyPrices, Energy
from mist.scenario.pricing import PREFERRED
from mist.scenario.quantities import MAX_SECONDS, Seconds
from mist.workload.trace import find_trace

Arrivals = Annotated[Spec, SpecOf("arrivals")]
Lengths = Annotated[Spec, SpecOf("lengths", bare="fixed")]
Routing = Annotated[Spec, SpecOf("routing")]
Admission = Annotated[
    list[Annotated[Spec, SpecOf("admission")]],
    Short(lambda value: value if isinstance(value, list) else [value]),
]
PipelineSpec = Annotated[Spec, SpecOf("pipeline", bare="stages", bare_type="array")]

PositiveSeconds = Annotated[float, Field(gt=0, le=MAX_SECONDS)]


def _window(value: Any) -> tuple[float | None, float]:
    """START:END, [START, END] or a duration, as (start, end) or (None, duration)."""
    pair: Any = value.split(":") if isinstance(value, str) and ":" in value else value
    if isinstance(pair, int | float | str) and not isinstance(pair, bool):
        pair = [None, pair]
    try:
        first, second = pair
        start, end = None if first is None else float(first), float(second)
    except (TypeError, ValueError, OverflowError):
        start, end = None, math.nan
    if not 0 <= (start or 0) < end < math.inf:
        raise problem(f"{short(value)} is not a window of time", "write 60:600 (start:end, in s) or 540 (its length)")
    return start, end


def _trace_is_there(value: str, info: ValidationInfo) -> str:
    try:
        find_trace(value, (info.context or {}).get("folder", Path()), os.environ)
    except ScenarioError as error:
        raise problems(((), each) for each in error.problems) from None
    return value


def _is_a_length_catalogue(value: str) -> str:
    try:
        catalogue.read("workloads", value, Path())
    except ScenarioError as error:
        raise problems(((), each) for each in error.problems) from None
    return value


def _client_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]*", value):
        raise problem(f"{short(value)} can't name a client", "use letters, digits, - and _")
    return value


def _memory_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]*", value):
        raise problem(f"{short(value)} can't name a memory", "use letters, digits, - and _")
    return value


def _tenant_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]*", value):
        raise problem(f"{short(value)} can't name a tenant", "use letters, digits, - and _")
    return value


def _size_name(value: str) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", value):
        raise problem(f"{short(value)} can't name a size", "use small letters, digits and _, such as query_tokens")
    return value


def _percentile(value: str) -> str:
    if not re.fullmatch(r"mean|p[1-9]?[0-9](\.[0-9]+)?", value):
        raise problem(f"{short(value)} is not a percentile", "such as p50, p99, p99.9, or mean")
    return value


def _routing(value: Any) -> Any:
    """A policy for all stages, in any of its forms, as {"": policy}; {stage: policy} as it is."""
    known = registry.names("routing")
    if isinstance(value, dict) and value and not any(key in known for key in value):
        return value
    return {"": value}


def _none_of_zero(value: Any) -> Any:
    return None if value == 0 and not isinstance(value, bool) else value


_SECONDS = {"type": "number", "minimum": 0}
Window = Annotated[
    tuple[float | None, float],
    BeforeValidator(_window),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "pattern": "^[^:]+(:[^:]+)?$"},
                {"type": "array", "items": {"anyOf": [_SECONDS, {"type": "null"}]}, "minItems": 2, "maxItems": 2},
                _SECONDS,
            ]
        }
    ),
]
MemoryName = Annotated[str, AfterValidator(_memory_name)]
ClientName = Annotated[str, AfterValidator(_client_name)]
TenantName = Annotated[str, AfterValidator(_tenant_name)]
SizeName = Annotated[str, AfterValidator(_size_name)]
Percentile = Annotated[str, AfterValidator(_percentile)]
Targets = dict[Percentile, PositiveSeconds]
Slowdowns = dict[Percentile, Annotated[float, Field(gt=1, le=1e9)]]
#: a policy by stage; "" is all stages that are not named
Routings = Annotated[dict[str, Routing], Short(_routing)]


def _beside_a_trace(given: Set[str]) -> Iterator[Located]:
    for key in ("num_requests", "sessions", "lengths", "input_tokens", "output_tokens"):
        if key in given:
            hint = "`limit` takes the first requests" if key == "num_requests" else f"remove trace or {key}"
            yield (key,), Problem(f"a trace brings its own {key}", hint=hint)
    if {"format", "columns"} <= given:
        yield ("format",), Problem("format and columns are both given", hint="`columns` is a format: keep one of them")


def _to_draw(given: Set[str]) -> Iterator[Located]:
    if not given & {"arrivals", "concurrency", "num_requests", "lengths", "input_tokens", "output_tokens"}:
        hint = "trace: FILE; or arrivals: {poisson: {rate_per_s: 4}}, num_requests: 1000, lengths: azure-conversation"
        yield (), Problem("the workload is empty", hint=hint)
        return
    for key in ("format", "columns"):
        if key in given:
            yield (key,), Problem(f"{key} is for a trace, and there is none", hint="give trace: FILE")
    if not given & {"arrivals", "concurrency"}:
        yield (), Problem("arrivals are missing", hint="such as arrivals: {poisson: {rate_per_s: 4}}")
    if "sessions" in given and (extra := given & {"num_requests", "concurrency", "cached_tokens"}):
        for key in sorted(extra):
            yield (key,), Problem(f"{key} is not for sessions", hint="sessions: {num_sessions: ..., turns: ...}")
    elif "num_requests" not in given and "sessions" not in given:
        yield (), Problem("num_requests is missing", hint="such as num_requests: 1000")
    for key in ("input_tokens", "output_tokens"):
        if not given & {key, "lengths"}:
            hint = f"such as {key}: 256, or lengths: azure-conversation for both"
            yield (), Problem(f"{key} is missing", hint=hint)
    if {"lengths", "input_tokens", "output_tokens"} <= given:
        message = "lengths, input_tokens and output_tokens are all given, and nothing of lengths is used"
        yield ("lengths",), Problem(message, hint="keep lengths, with one of the others at most, or both of these")


class Sessions(Section):
    """Conversations drawn: each turn's prompt is all that was said before, and what the turn adds."""

    num_sessions: Count
    """sessions to draw, begun by the workload's arrivals"""
    turns: Lengths
    """requests of a session: a number or a distribution"""
    think_ms: Lengths
    """time from the end of a turn to the next, such as that of a tool, in ms: a number or a distribution"""
    system_tokens: Annotated[int, Field(ge=0, le=2**40)] = 0
    """tokens in front of every session, the same for all"""
    hash_block_size: Annotated[int, Field(ge=1, le=2**20)] = 64
    """tokens per prefix key, a multiple of the engine's block size"""


class Cancellation(Section):
    """Users who give up before their requests have finished."""

    probability: Annotated[float, Field(ge=0, le=1)]
    """share of the requests whose users give up after some time, if they aren't finished by then"""
    after_ms: Lengths
    """that time, from arrival on, in ms: a number or a distribution"""


class Workload(Section):
    """Where requests come from: a trace, or drawn arrivals and lengths."""

    trace: Annotated[Name, AfterValidator(_trace_is_there)] | None = None
    """a trace file, looked up beside the scenario, then in the folders of MIST_DATA"""
    format: Annotated[Spec, SpecOf("trace")] | None = None
    """the trace's format; left out, its first line tells"""
    columns: Annotated[Spec, SpecOf("trace", only="columns")] | None = None
    """which columns of any CSV, JSON-lines or Parquet file are the arrival, input_tokens and output_tokens"""
    arrivals: Arrivals | None = None
    """when requests arrive, such as {poisson: {rate_per_s: 4}}; with a trace, in place of its own times"""
    concurrency: Count | None = None
    """short for arrivals: {closed_loop: {concurrency: N}}, N requests in the system at all times"""
    num_requests: Annotated[int, Field(ge=1, le=100_000_000)] | None = None
    """requests to draw"""
    sessions: Sessions | None = None
    """turns of sessions in place of single requests; input_tokens are then those that a turn adds to what was said"""
    lengths: Annotated[Name, AfterValidator(_is_a_length_catalogue)] | None = None
    """a length catalogue for inputs and outputs (`mist list workloads`)"""
    input_tokens: Lengths | None = None
    """tokens of a prompt: a number, or a distribution such as {lognormal: {mean: 1155, cv: 0.9}}"""
    output_tokens: Lengths | None = None
    """tokens of an answer: a number or a distribution"""
    cached_tokens: Annotated[Lengths | None, BeforeValidator(_none_of_zero)] = None
    """tokens of each prompt that are in the prefix cache already: a number or a distribution; one is always computed"""
    sizes: dict[SizeName, Lengths] | None = None
    """what else each request's pipeline is told, by name, such as query_tokens: a number or a distribution each"""
    rate_scale: Annotated[float, Field(ge=1e-6, le=1e6)] = 1.0
    """arrivals this many times as fast; 2 halves all arrival times"""
    limit: Count | None = None
    """only the first requests"""
    timeout_s: PositiveSeconds | None = None
    """a request that isn't finished so long after its arrival leaves, timed out"""
    cancellation: Cancellation | None = None
    """users who give up, such as {probability: 0.02, after_ms: {lognormal: {mean: 5000, cv: 1}}}"""

    @classmethod
    def conflicts(cls, given: Set[str]) -> Iterator[Located]:
        """A trace and what is drawn exclude each other, and drawing needs all its parts."""
        yield from _beside_a_trace(given) if "trace" in given else _to_draw(given)
        if {"arrivals", "concurrency"} <= given:
            yield ("concurrency",), Problem("arrivals and concurrency are both given", hint="keep one of them")

    @model_validator(mode="after")
    def _agrees(self) -> Workload:
        found = list(self._disagreements())
        if found:
            raise problems(found)
        return self

    def _disagreements(self) -> Iterator[Located]:
        if self._is_closed_loop and self.rate_scale != 1:
            yield ("rate_scale",), Problem("a closed loop has no rate to scale", hint="change concurrency")
        if self.columns and self.trace and (reason := self.columns.build().problem_with(self.trace)):
            yield ("columns", "arrival"), Problem(reason, hint="time_unit: timestamp for dates, s or ms for numbers")
        if self.arrivals and self.num_requests and (rate := self.arrivals.params.get("rate_per_s")):
            num_requests = min(self.num_requests, self.limit or self.num_requests)
            if num_requests > MAX_SECONDS * rate * self.rate_scale:
                message = f"{num_requests:,} requests at {rate:g} a second take more than {MAX_SECONDS:.0e} s"
                yield ("arrivals", self.arrivals.name, "rate_per_s"), Problem(message, hint="raise rate_per_s")

    @property
    def _is_closed_loop(self) -> bool:
        return self.concurrency is not None or (self.arrivals is not None and self.arrivals.name == "closed_loop")

    @property
    def trace_format(self) -> Spec | None:
        """The format that the user gave; None leaves it to the file."""
        return self.format or self.columns

    @property
    def arrival_process(self) -> Spec | None:
        """The arrival process; None keeps a trace's own times."""
        if self.concurrency is not None:
            return Spec("arrivals", "closed_loop", {"concurrency": self.concurrency})
        return self.arrivals

    @property
    def size_distributions(self) -> dict[str, Spec]:
        """The distributions of `sizes`: the user's own, and those of the length catalogue that he leaves out."""
        table = catalogue.read("workloads", self.lengths, Path())[0] if self.lengths else {}
        drawn = {
            key: Spec("lengths", "quantiles", {"points": marginal["quantiles"]})
            for key, marginal in table.get("sizes", {}).items()
        }
        return drawn | (self.sizes or {})

    def length_distribution(self, key: str) -> Spec:
        """The distribution of "input_tokens" or "output_tokens": the user's own, else the length catalogue's."""
        own: Spec | None = getattr(self, key)
        if own is not None:
            return own
        table = catalogue.read("workloads", str(self.lengths), Path())[0]
        return Spec("lengths", "quantiles", {"points": table[key]["quantiles"]})


class Slo(Section):
    """Targets by metric and percentile: seconds, such as ttft_s: {p99: 1.5}, or times what the request takes alone."""

    ttft_s: Targets = {}  # noqa: RUF012
    """time to first token"""
    tpot_s: Targets = {}  # noqa: RUF012
    """time per output token after the first"""
    itl_s: Targets = {}  # noqa: RUF012
    """inter-token latency"""
    e2e_s: Targets = {}  # noqa: RUF012
    """time from arrival to last token"""
    ttft_slowdown: Slowdowns = {}  # noqa: RUF012
    """time to first token over that of the same request alone on these clients, such as {p50: 2, p90: 3, p99: 6}"""
    tpot_slowdown: Slowdowns = {}  # noqa: RUF012
    """time per output token over that of the same request alone"""
    e2e_slowdown: Slowdowns = {}  # noqa: RUF012
    """time from arrival to last token over that of the same request alone"""


class TenantSection(Section):
    """A tenant: a workload of its own, on clients that it may share with others."""

    workload: Workload
    """where its requests come from"""
    pipeline: PipelineSpec | None = None
    """the stages of a request; left out, the scenario's"""
    clients: Annotated[list[ClientName], Field(min_length=1)] | None = None
    """the clients that may serve it, by name; left out, all that serve a stage of it"""
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] = 0
    """the lowest number is served first, where a client's batching has order: priority"""
    slo: Slo | None = None
    """service levels of its requests; left out, the scenario's"""
    admission: Admission | None = None
    """policies that may turn its requests away as they arrive; left out, the scenario's"""


class ScenarioFile(Section):
    """A scenario: a workload, a pipeline, and the clients that serve it; or several tenants, with one of each."""

    name: Name | None = None
    """what the result is called; left out, the file's name"""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """all that is drawn comes from here; the same seed gives the same bytes"""
    workload: Workload | None = None
    """where requests come from"""
    tenants: Annotated[dict[TenantName, TenantSection], Field(min_length=1)] = {}  # noqa: RUF012
    """in place of a workload: several, by name"""
    pipeline: PipelineSpec = Field(default=[PREFILL, DECODE], validate_default=True)
    """the stages of a request: a list of stages, or a pipeline by name"""
    clients: Annotated[dict[ClientName, AnyPool], Field(min_length=1)]
    """who serves the stages, by name"""
    memories: dict[MemoryName, Memory] = {}  # noqa: RUF012
    """memories outside the devices, by name, for `tiers` of clients and for KV stores"""
    routing: Routings = Field(default="least_outstanding", validate_default=True)
    """which replica takes a task: a policy for all stages, or {stage: policy}"""
    admission: Admission = []  # noqa: RUF012
    """policies that may turn requests away as they arrive, such as {early_rejection: {ttft_s: 2}}, or a list of them"""
    view_refresh_s: Seconds = 0.0
    """routing and admission see the clients as of the period of this length that it is; 0: as of now"""
    network: Network = Network()
    """what lies between the clients"""
    hand_over: HandOver = HandOver()
    """how KV caches get from prefill to decode clients"""
    events: list[EventSection] = []  # noqa: RUF012
    """what happens: clients that go down and come up, links that slow down"""
    slo: Slo = Slo()
    """service levels that the result is held against"""
    warmup_s: Seconds = 0.0
    """leave requests that arrive in the first seconds out of the metrics"""
    window_s: Window | None = None
    """measure only requests that arrive in this window: start:end in seconds, or its length after the warm-up"""
    max_time_s: PositiveSeconds | None = None
    """stop the simulation at this time; requests still in the system count as unfinished"""
    prices: AnyPrices = Field(default=DEFAULT_PRICES, validate_default=True)
    """what devices cost: a list of `mist list prices`, USD per device-hour by device, or both"""
    energy: Energy = Energy()
    """what a site adds to the energy of its devices, such as {pue: 1.3, carbon_g_per_kwh: 400}"""
    perf: PerfList = Field(default=list(PREFERRED), validate_default=True)
    """performance models of clients that name none, the first that supports the client answers"""

    @classmethod
    def conflicts(cls, given: Set[str]) -> Iterator[Located]:
        """A scenario has a workload, or tenants with one each."""
        if not given & {"workload", "tenants"}:
            hint = "workload: where requests come from; or tenants: several of them, by name"
            yield ("workload",), Problem("the key 'workload' is missing", hint=hint)
        if {"workload", "tenants"} <= given:
            yield ("tenants",), Problem("workload and tenants are both given", hint="give each tenant its workload")


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a scenario, with every registered policy's parameters and every catalogue's names."""
    schema = ScenarioFile.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "MIST scenario", **schema}
