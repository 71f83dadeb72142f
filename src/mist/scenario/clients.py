"""What a user may write of a client: device, model, engine, and the parts that default to the engine's.

A part of the schema. A validated `Pool` is complete: what was left out holds the value that a run uses. It never
looks at other sections; whether the clients together can serve the pipeline is checked elsewhere.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)

from mist.engine import EngineProfile, KVCapacity
from mist.errors import Problem, ScenarioError, nearest
from mist.hardware import Device, Platform
from mist.model import DTYPE_BYTES, ModelSpec
from mist.model.quantization import UNKNOWN
from mist.perf import Deployment
from mist.request import DECODE, PREFILL
from mist.scenario import catalogue
from mist.scenario.catalogued import Catalogued, left_out
from mist.scenario.encoders import cut_sequences, default_batching, engine_of, kept_caches
from mist.scenario.hand_over import Lending
from mist.scenario.memory import TierSettings
from mist.scenario.named import Located, Section, Short, Spec, SpecOf, problem, problems
from mist.scenario.prices import AnyPoolPrice
from mist.scenario.pricing import runs_without_model
from mist.scenario.quantities import Size
from mist.scenario.scaling import ScalingSection
from mist.scenario.speculation_settings import SpeculationSettings
from mist.scenario.unserved import unlimited, unserved
from mist.units import parse_bytes

DEFAULT_ENGINE = "vllm-0.10"
MAX_STEP_TOKENS = 2**22
#: degrees beyond this are not proposed
MAX_SUGGESTED_TP = 64

Count = Annotated[int, Field(ge=1, le=2**40)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Name = Annotated[str, Field(min_length=1, max_length=200)]
Perf = Annotated[Spec, SpecOf("perf")]


def _read_profiles(specs: list[Spec], info: ValidationInfo) -> list[Spec]:
    """Step profiles by the catalogue's name or in place, so that they mean the same wherever the scenario goes."""
    read: list[Spec] = []
    found: list[Located] = []
    for at, spec in enumerate(specs):
        given = spec.params.get("profile") if spec.name == "steps" else None
        if given == "":
            hint = f"steps: a path, or one of {', '.join(catalogue.names('steps'))}"
            found.append(((at, "steps"), Problem("no step profile is named", hint=hint)))
        elif given is not None:
            try:
                form = catalogue.read("steps", given, (info.context or {}).get("folder", Path()))[1]
                spec = replace(spec, params={**spec.params, "profile": form})
            except ScenarioError as error:
                found += [((at, "steps", "profile"), each) for each in error.problems]
        read.append(spec)
    if found:
        raise problems(found)
    return read


PerfList = Annotated[
    list[Perf],
    Field(min_length=1),
    AfterValidator(_read_profiles),
    Short(lambda value: value if isinstance(value, list) else [value]),
]
Stages = Annotated[list[Name], Field(min_length=1)]


def _dtype(value: Any) -> Any:
    if isinstance(value, str) and value != "auto" and value not in DTYPE_BYTES:
        raise problem(f"there is no dtype {value!r}", nearest(value, DTYPE_BYTES))
    return value


Dtype = Annotated[str, BeforeValidator(_dtype), WithJsonSchema({"enum": ["auto", *sorted(DTYPE_BYTES)]})]


class KVSettings(TierSettings):
    """The KV cache of each replica; what is left out is the engine's."""

    num_blocks: Count | None = None
    """KV blocks, in place of those that fit into memory"""
    capacity_tokens: Count | None = None
    """tokens of KV, in place of those that fit into memory"""
    block_size: Annotated[int, Field(ge=1, le=65536)] = left_out()
    """tokens in a block"""
    enable_prefix_caching: bool = left_out()
    """keep the blocks of prompts for requests that begin alike"""
    prefix_tier: Literal["hbm", "cpu"] = "hbm"
    """where the workload's `cached_tokens` are: in device memory, or in the host's, from which they are fetched"""
    watermark: Annotated[float, Field(ge=0, lt=1)] = left_out()
    """share of the blocks that admission leaves free"""
    gpu_memory_utilization: Fraction = left_out()
    """share of device memory that the engine may use"""
    merge_shared_reads: bool = False
    """read blocks that several decodes share, as thoughts share a prompt, once per step for all of them"""
    preemption: Literal["recompute", "swap"] = "recompute"
    """what becomes of the KV cache of a preempted decode: computed again, or kept in the host's memory meanwhile"""
    swap_space: Size = "4 GiB"
    """with preemption: swap, the host's memory for that, per device; where it is full, contexts are computed again"""

    @model_validator(mode="after")
    def _one_size(self) -> KVSettings:
        if self.num_blocks is not None and self.capacity_tokens is not None:
            raise problem("num_blocks and capacity_tokens are both given", "keep one of them", ("capacity_tokens",))
        if self.prefix_tier == "cpu" and self.tiers:
            message = "prefix_tier is short for a tier of the host, and tiers are given"
            raise problem(message, "keep one of them", ("prefix_tier",))
        return self

    def completed(self, engine: EngineProfile) -> KVSettings:
        """With the engine's values for what was left out; an override is in blocks (0 if less than one)."""
        keys = ("block_size", "enable_prefix_caching", "watermark", "gpu_memory_utilization")
        fill = {key: getattr(engine, key) for key in keys if getattr(self, key) is None}
        if self.capacity_tokens is not None:
            size = self.block_size or engine.block_size
            fill |= {"num_blocks": self.capacity_tokens // size, "capacity_tokens": None}
        return self.model_copy(update=fill)


class Pool(Section):
    """`count` equal replicas of a model on devices, behind one name."""

    device: Annotated[Device, Catalogued("devices")]
    """an accelerator: a name of `mist list devices`, the path of a YAML file, or a mapping"""
    model: Annotated[ModelSpec, Catalogued("models")]
    """a model: a name of `mist list models`, or the path of a Hugging Face config.json"""
    count: Annotated[int, Field(ge=1, le=100_000)] = 1
    """replicas"""
    tp: Annotated[int, Field(ge=1, le=1024)] = 1
    """devices of one replica, in tensor parallelism"""
    pp: Annotated[int, Field(ge=1, le=64)] = 1
    """pipeline stages of one replica: as many lanes contend for them, each with its queue and share of the KV cache"""
    ep: Annotated[int, Field(ge=1, le=1024)] = 1
    """expert parallelism over the tp x attn_dp ranks; 1 splits each expert by tp"""
    attn_dp: Annotated[int, Field(ge=1, le=1024)] = 1
    """groups of tp ranks with queue and KV cache of their own; sharing the experts, each step lasts as the slowest's"""
    weights_dtype: Dtype = "auto"
    """dtype of the weights; auto is that of the model's checkpoint"""
    kv_dtype: Dtype = "auto"
    """dtype of the KV cache; auto is bf16, or the weights' if they are wider"""
    serves: Stages = [PREFILL, DECODE]  # noqa: RUF012
    """stages of the pipeline that run here"""
    engine: Annotated[EngineProfile, Catalogued("engines")] = Field(default=DEFAULT_ENGINE, validate_default=True)
    """the serving engine, whose defaults and host time apply: a name of `mist list engines`, a path or a mapping"""
    batching: Annotated[Spec, SpecOf("batching", unchecked=True)] = left_out()
    """a batching policy, such as {chunked: {max_num_batched_tokens: 2048}}; left out, the engine's"""
    kv_cache: KVSettings = KVSettings()
    """the KV cache, where it is not to follow from the engine and the memory"""
    perf: PerfList = left_out()
    """performance models, the first that supports the client answers; left out, the scenario's"""
    max_model_len: Count = left_out()
    """longest context in tokens; left out, the model's"""
    power_cap_w: Annotated[float, Field(gt=0)] | None = None
    """power cap of each device, W, at most its TDP: what is bound by compute slows down with the clock"""
    speculation: SpeculationSettings | None = None
    """speculative decoding, such as {method: mtp, num_draft_tokens: 3, acceptance: 0.6}"""
    scaling: ScalingSection | None = None
    """replicas that start and drain, by schedule or by rule; `count` is then the most that there can be"""
    group: Name | None = None
    """KV caches are handed over only between pools of one group; left out, between all that have none"""
    price: AnyPoolPrice | None = None
    """what a device costs, in place of the scenario's `prices`: USD per hour, a list, or {purchase: spot}"""
    lending: Lending | None = None
    """a decode pool whose clients take prompts while all of the prefill clients have too many waiting"""

    @model_validator(mode="after")
    def _complete(self) -> Pool:
        if "engine" not in self.model_fields_set:
            self = self.model_copy(update={"engine": engine_of(self.model, self.engine)})
        weights_dtype = self.model.checkpoint_dtype if self.weights_dtype == "auto" else self.weights_dtype
        if weights_dtype == UNKNOWN:
            raise problem(f"the quantisation of {self.model.name} isn't known", "give weights_dtype", ("model",))
        client = self.model_copy(
            update={
                "weights_dtype": weights_dtype,
                "kv_dtype": self._kv_dtype(weights_dtype),
                "max_model_len": self.max_model_len or self.model.max_context,
                "batching": self._batching(),
                "kv_cache": self.kv_cache.completed(self.engine),
            }
        )
        if found := list(client._misfits()):
            raise problems(found)
        return client

    @property
    def platform(self) -> Platform:
        """The devices of one replica."""
        return Platform(self.device, tp=self.tp, pp=self.pp, ep=self.ep, attn_dp=self.attn_dp)

    @property
    def lanes(self) -> int:
        """Schedulers of one replica: one for each pipeline stage of each attention group."""
        return self.pp * self.attn_dp

    @property
    def kv_layout(self) -> tuple[Any, ...]:
        """What KV caches must have in common to be exchanged: whose they are, and in which dtype."""
        return self.model.name, self.model.layers, self.kv_dtype

    def swap_blocks(self) -> int:
        """KV blocks of one lane that the host keeps for preempted decodes."""
        if self.kv_cache.preemption != "swap":
            return 0
        return int(parse_bytes(self.kv_cache.swap_space)) // self.kv_capacity().block_bytes // self.pp

    def kv_capacity(self) -> KVCapacity:
        """The KV cache that fits into a device's memory, by the engine's rule; overrides aside."""
        batching = self.batching.build()
        capacity = self.engine.kv_blocks(
            self.model,
            self.platform,
            self.weights_dtype,
            self.kv_dtype,
            batching.max_num_batched_tokens,
            batching.max_num_seqs * self.tokens_per_decode,
            gpu_memory_utilization=self.kv_cache.gpu_memory_utilization,
            block_size=self.kv_cache.block_size,
        )
        draft = self.draft
        if self.speculation is None or draft is None:
            return capacity
        own = draft.model if self.speculation.draft_model else replace(draft.model, vocab_size=0)  # a head shares both
        degrees = {"ep": draft.platform.ep, "attn_dp": draft.platform.attn_dp}
        token_bytes = draft.model.kv_bytes_per_token_per_device(self.kv_dtype, self.tp)
        return replace(
            capacity,
            weight_bytes=capacity.weight_bytes + own.weight_bytes(draft.weights_dtype, self.tp, **degrees),
            block_bytes=capacity.block_bytes + capacity.block_size * token_bytes,
        )

    @property
    def tokens_per_decode(self) -> int:
        """Tokens that a step computes for each sequence that decodes."""
        return self.speculation.tokens_per_decode if self.speculation else 1

    def deployment(self) -> Deployment:
        """What step times are asked for."""
        limits = self.batching.build()
        return Deployment(
            self.model,
            self.platform,
            self.weights_dtype,
            self.kv_dtype,
            limits.max_num_batched_tokens,
            limits.max_num_seqs,
            cuda_graph=self.engine.cuda_graph,
            tokens_per_decode=self.tokens_per_decode,
            engine=self.engine.engine,
            time_factors=self.engine.time_factors,
            clock=self.device.clock_under(self.power_cap_w),
            tables_version=self.engine.tables_version,
        )

    @property
    def draft(self) -> Deployment | None:
        """What drafts, on the same devices, decoding token by token; None where nothing of that kind does.

        A dense draft of a mixture runs on the ranks of one attention group. Its weights are in its checkpoint's dtype,
        those of a head in the model's.
        """
        model = self.speculation.draft_of(self.model) if self.speculation else None
        if self.speculation is None or model is None:
            return None
        is_mixture = any(g.experts for g in model.layers)
        known = self.speculation.draft_model is not None and model.checkpoint_dtype != UNKNOWN
        return replace(
            self.deployment(),
            model=model,
            platform=self.platform if is_mixture else replace(self.platform, ep=1, attn_dp=1),
            weights_dtype=model.checkpoint_dtype if known else self.weights_dtype,
            tokens_per_decode=1,
        )

    def hands_over(self, stages: Collection[str]) -> bool:
        """Whether decodes of prompts that are computed here go on elsewhere, in a pipeline of `stages`."""
        return DECODE in stages and PREFILL in self.serves and DECODE not in self.serves

    def _with_tp(self, tp: int) -> Pool:
        return self.model_copy(update={"tp": tp})

    def _possible_tp(self) -> Iterator[int]:
        """Degrees of tensor parallelism, rising, that go with the model, the devices and the other degrees."""
        for tp in range(1, MAX_SUGGESTED_TP + 1):
            client = self._with_tp(tp)
            if not (self.model.parallel_problem(tp, self.pp, self.ep, self.attn_dp) or client.platform.problem()):
                yield tp

    def _tp_hint(self) -> str:
        would_do = ", ".join(map(str, self._possible_tp()))
        others = [f"{key} = {n}" for key in ("pp", "ep", "attn_dp") if (n := getattr(self, key)) > 1]
        beside = f" beside {', '.join(others)}" if others else ""
        return f"a tp of {would_do} would do{beside}" if would_do else f"no tp would do{beside}: change these"

    def _oversized(self) -> Iterator[Located]:
        """Limits beyond any device's step, whose tables would not fit into memory."""
        for key in ("max_num_batched_tokens", "max_num_seqs"):
            if self.batching.params.get(key, 0) > MAX_STEP_TOKENS:
                message = f"no step holds {self.batching.params[key]:,}"
                yield ("batching", self.batching.name, key), Problem(message, hint=f"at most {MAX_STEP_TOKENS:,}")

    def _unspeculative(self) -> Iterator[Located]:
        """What speculation can't go with."""
        if self.speculation is None:
            return
        if self.pp > 1:
            message = "speculative decoding isn't available with pipeline stages"
            yield ("speculation",), Problem(message, hint="leave pp out, and raise tp instead")
        if set(self.serves) <= {PREFILL}:
            yield ("speculation",), Problem("nothing decodes here", hint="remove it, or add decode to serves")
        seqs, tokens = (self.batching.params.get(key) for key in ("max_num_seqs", "max_num_batched_tokens"))
        if seqs and tokens and tokens < seqs * self.tokens_per_decode:
            message = f"{tokens:,} tokens a step don't hold {seqs:,} sequences of {self.tokens_per_decode} each"
            hint = f"at least {seqs * self.tokens_per_decode:,}, or lower max_num_seqs or num_draft_tokens"
            yield ("batching", self.batching.name, "max_num_batched_tokens"), Problem(message, hint=hint)
        draft = self.speculation.draft_model
        if draft is not None and (reason := draft.parallel_problem(self.tp, 1, 1, 1)):
            yield ("speculation", "draft_model"), Problem(reason, hint="take another draft, or another tp")

    def _unmergeable(self) -> Iterator[Located]:
        """Merged reads where attention soon computes longer than it reads: FLOP are counted as if merged too."""
        if self.kv_cache.merge_shared_reads and any(group.latent for group in self.model.layers):
            message = f"reads of latent attention, which {self.model.name} has, can't be merged"
            hint = "leave it out: such reads are soon bound by compute"
            yield ("kv_cache", "merge_shared_reads"), Problem(message, hint=hint)

    def _kv_dtype(self, weights_dtype: str) -> str:
        if self.kv_dtype != "auto":
            return self.kv_dtype
        return weights_dtype if DTYPE_BYTES[weights_dtype] >= DTYPE_BYTES["bf16"] else "bf16"

    def _batching(self) -> Spec:
        """The policy with the engine's limits where it is the engine's own policy and the user gave none.

        Fewer tokens than the engine's sequences lower these too, as vLLM does.
        """
        default = default_batching(self.engine, self.model)
        spec = self.batching or SpecOf("batching", unchecked=True).read(default)
        if spec.name != default:
            return spec
        seqs, tokens = self.engine.limits_for(self.device, self.model)
        tokens = spec.params["max_num_batched_tokens"] if "max_num_batched_tokens" in spec.given else tokens
        fitting = max(1, tokens // self.tokens_per_decode)
        return spec.with_defaults(max_num_seqs=min(seqs, fitting), max_num_batched_tokens=tokens)

    def _misfits(self) -> Iterator[Located]:
        """Parts of this client that don't go together."""
        refused = [*self.batching.refused(("batching", self.batching.name)), *unlimited(self.batching)]
        refused += [*self._oversized(), *self._unspeculative()]
        yield from refused
        yield from self._unmergeable()
        yield from cut_sequences(self.model, self.batching)
        yield from unserved(self.batching, self.serves)
        if self.kv_cache.preemption == "swap" and self.device.num_cores:
            message = f"{self.device.name} is a CPU: its KV cache is in the host's memory already"
            yield ("kv_cache", "preemption"), Problem(message, hint="leave it out")
        yield from kept_caches(self.model, self.kv_cache.tiers, self.kv_cache.prefix_tier)
        if reason := self.model.parallel_problem(self.tp, self.pp, self.ep, self.attn_dp) or self.platform.problem():
            key = next((key for key in ("pp", "ep", "attn_dp") if f"{key} = " in reason), "tp")
            yield (key,), Problem(reason, hint=self._tp_hint() if key == "tp" else f"lower {key}, or leave it out")
        elif not refused and self.kv_capacity().missing_bytes:
            devices = f"{self.platform.num_devices} x {self.device.name}"
            message = f"{self.model.name} does not fit on {devices}: {self.kv_capacity()}"
            fits = next((tp for tp in self._possible_tp() if not self._with_tp(tp).kv_capacity().missing_bytes), None)
            raised = f"tp: {fits} would do; or " if fits else "raise pp, "
            hint = f"{raised}narrow weights_dtype, lower the limits of batching, or take a device with more memory"
            yield ("device",), Problem(message, hint=hint)
        for index, spec in enumerate(self.perf or ()):
            if runs_without_model(spec.name):
                message = f"{spec.name} runs no model, and there is one"
                yield ("perf", index), Problem(message, hint="leave `model` out, or take kernels or roofline")
        if self.weights_dtype == "fp32" and "fp32" not in self.device.peak_flop_per_s:
            message = f"no fp32 rate is known of {self.device.name}"
            hint = "take bf16, or give the device peak_tflops: {fp32: ...}"
            yield ("weights_dtype",), Problem(message, hint=hint)
        try:
            self.device.clock_under(self.power_cap_w)
        except ValueError as error:
            cap, tdp = self.power_cap_w or 0.0, self.device.tdp_w
            above = tdp is not None and cap > tdp
            message = f"{cap:g} W is above the TDP of {tdp:g} W" if above else f"no clock is known under {cap:g} W"
            yield ("power_cap_w",), Problem(message, hint=str(error))
        if self.max_model_len > self.model.max_context:
            message = (
                f"{self.model.name} has a context of {self.model.max_context:,} tokens, not {self.max_model_len:,}"
            )
            yield ("max_model_len",), Problem(message, hint="lower it, or leave it out")
        if self.kv_cache.num_blocks == 0:
            message = f"less than one block of {self.kv_cache.block_size} tokens"
            yield ("kv_cache", "capacity_tokens"), Problem(message, hint="give more tokens, or a smaller block_size")
        for place, found in self.scaling.misfits(self.count) if self.scaling else ():
            yield ("scaling", *place), found
        if len(set(self.serves)) < len(self.serves):
            yield ("serves",), Problem("a stage is here twice", hint="name each stage once")
