"""Engine profiles: what a serving engine adds to the device's time, its default limits, and its KV capacity rule.

The client adds a profile's host overheads to the time of a step; the scenario takes defaults and the number of KV
blocks from here. A profile never schedules, and its figures belong to an engine version, not to a device or model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from mist.hardware import Device, MappingReader, Platform
from mist.model import ACTIVATION_BYTES, LayerGroup, ModelSpec
from mist.units import GIB

#: classes of operators whose time an engine version changes
OPERATOR_CLASSES = (
    "gemm", "gemm_8bit", "gemm_compute", "experts", "experts_4bit", "experts_compute_4bit", "attention_prefill",
    "attention_decode", "attention_decode_gqa", "attention_decode_kv8", "elementwise", "network",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class KVCapacity:
    """Where the memory of one device goes, in bytes, and the KV blocks that fit into the rest (0 if none does)."""

    memory_bytes: int
    gpu_memory_utilization: float
    weight_bytes: int
    activation_bytes: int
    overhead_bytes: int
    block_bytes: int
    block_size: int
    is_of_free: bool = False

    @property
    def kv_bytes(self) -> int:
        """What is left for KV; negative where weights and activations alone don't fit."""
        used = self.weight_bytes + self.activation_bytes + self.overhead_bytes
        if self.is_of_free:
            free = self.memory_bytes - used
            return int(self.gpu_memory_utilization * free) if free > 0 else free
        return int(self.gpu_memory_utilization * self.memory_bytes) - used

    @property
    def num_blocks(self) -> int:
        return max(0, self.kv_bytes // self.block_bytes)

    @property
    def num_tokens(self) -> int:
        return self.num_blocks * self.block_size

    @property
    def missing_bytes(self) -> int:
        """By how much memory a single block fails to fit; 0 where one fits."""
        return max(0, self.block_bytes - self.kv_bytes)

    def __str__(self) -> str:
        used = (
            f"{self.memory_bytes / GIB:.1f} GiB - weights {self.weight_bytes / GIB:.2f}"
            f" - activations {self.activation_bytes / GIB:.2f} - overhead {self.overhead_bytes / GIB:.2f}"
        )
        used = f"({used})" if self.is_of_free else used
        terms = f"{self.gpu_memory_utilization:g} x {used} = {self.kv_bytes / GIB:.2f} GiB per device"
        if self.missing_bytes:
            return f"{terms}: does not fit, {self.missing_bytes / GIB:.2f} GiB are missing"
        return f"{terms}: {self.num_blocks:,} blocks of {self.block_size}, {self.num_tokens:,} tokens of KV"


@dataclass(frozen=True, slots=True)
class EngineProfile:
    """An engine version: host time, defaults of its limits, memory rule. `sources` says where each figure is from.

    `engine`, `era` in words and `first_version` say which releases it stands for, `first_date` from when on where only
    a date is known, `harness` static_batch that it stands for a benchmark of single batches alone.
    Host time: `step_overhead_ns` per step, `token_overhead_ns` per sequence that samples in it, `prefill_overhead_ns`
    more per step with prefills and `prefill_layer_overhead_ns` for each layer of the model then (what no graph replays
    the host launches); `overlapped` engines prepare a step while the device runs the one before, so that a step takes
    the longer of the two rather than their sum. With `async_scheduling` the next step is decided when one starts: what
    arrives meanwhile joins the step after it. Before it joins the queue, a request takes `request_overhead_ns` and
    `prompt_token_overhead_ns` for each token of its prompt; for `request_serial_ns` the front end serves it alone.
    Device time: `time_factors` by class of operator, this version's kernels over those that are measured;
    `tables_version`, a release such as "0.19": these are each operator's newest that aren't newer, "" the newest.
    Limits: `large_device_*` replace the defaults on devices of `large_device_bytes` and more, but not on
    `small_devices`; with `fit_whole_prompts` a step may always hold a prompt of the model's longest context.
    Memory: `gpu_memory_utilization` is a share of the whole, or with `utilization_of_free` of what weights and
    activations leave; `overhead_bytes` is what is neither (context, communicators, graphs). With `reserves_output` a
    request is admitted only where its longest answer and those of all that run fit, so that none is ever preempted.
    `first_token`: where prefill and decode are apart, the stage whose client streams the token that a prefill sampled:
    `prefill` as it ends, or `decode` as it goes on there (an answer of one token never moves).
    With `frees_windows` layers with an attention window keep nothing behind it, so that long contexts take less room.
    `cuda_graph`: steps replay captured graphs; without, the host launches every kernel of a step.
    """

    name: str
    engine: str = ""
    era: str = ""
    first_version: str = ""
    first_date: str = ""
    harness: str = ""
    step_overhead_ns: int = 0
    token_overhead_ns: int = 0
    prefill_overhead_ns: int = 0
    prefill_layer_overhead_ns: int = 0
    request_overhead_ns: int = 0
    request_serial_ns: int = 0
    prompt_token_overhead_ns: int = 0
    overlapped: bool = False
    async_scheduling: bool = False
    time_factors: Mapping[str, float] = field(default_factory=dict)
    tables_version: str = ""
    batching: str = "chunked"
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    large_device_bytes: int = 0
    large_device_max_num_seqs: int = 0
    large_device_max_num_batched_tokens: int = 0
    small_devices: tuple[str, ...] = ()
    fit_whole_prompts: bool = False
    gpu_memory_utilization: float = 0.9
    utilization_of_free: bool = False
    enable_prefix_caching: bool = False
    block_size: int = 16
    watermark: float = 0.0
    reserves_output: bool = False
    frees_windows: bool = False
    overhead_bytes: int = 0
    cuda_graph: bool = True
    first_token: str = "prefill"
    sources: Mapping[str, str] = field(default_factory=dict)

    @property
    def has_front_end(self) -> bool:
        """Whether a request takes any time before it joins the queue."""
        return self.async_scheduling or any(
            (self.request_overhead_ns, self.request_serial_ns, self.prompt_token_overhead_ns)
        )

    def limits_for(self, device: Device, model: ModelSpec) -> tuple[int, int]:
        """The engine's default (max_num_seqs, max_num_batched_tokens) for `model` on `device`."""
        seqs, tokens = self.max_num_seqs, self.max_num_batched_tokens
        is_small = any(device.name.startswith(prefix) for prefix in self.small_devices)
        if self.large_device_bytes and device.memory_bytes >= self.large_device_bytes and not is_small:
            seqs, tokens = self.large_device_max_num_seqs, self.large_device_max_num_batched_tokens
        return seqs, max(tokens, model.max_context) if self.fit_whole_prompts else tokens

    def kv_blocks(
        self,
        model: ModelSpec,
        platform: Platform,
        weights_dtype: str,
        kv_dtype: str,
        max_num_batched_tokens: int,
        max_num_seqs: int,
        *,
        gpu_memory_utilization: float | None = None,
        block_size: int | None = None,
    ) -> KVCapacity:
        """The KV cache that vLLM's rule leaves per device; every rank of every stage holds as many blocks.

        utilization x memory - weights of the shard - activations of the largest step - overhead, in blocks of
        `block_size` tokens, at the pipeline stage that has room for the fewest; sequences of one attention group. A
        result with `num_blocks` 0 says by how much it doesn't fit. The tokens of an encoder, which caches nothing,
        hold their hidden state while they are in flight. Raises ValueError for more stages than layers.
        """
        sizes = (model, platform, weights_dtype, kv_dtype, max_num_batched_tokens, max_num_seqs)
        share, size = gpu_memory_utilization or self.gpu_memory_utilization, block_size or self.block_size
        whole = self._kv_blocks(*sizes, share, size, frees_windows=False)
        if not self.frees_windows or not any(g.window for g in model.layers):
            return whole
        # windows of all sequences set aside; short sequences keep as much as anywhere
        return max(whole, self._kv_blocks(*sizes, share, size, frees_windows=True), key=lambda fits: fits.num_blocks)

    def _kv_blocks(
        self, model: ModelSpec, p: Platform, weights_dtype: str, kv_dtype: str, max_num_batched_tokens: int,
        max_num_seqs: int, share: float, size: int, *, frees_windows: bool,
    ) -> KVCapacity:  # fmt: skip
        weights = model.stage_weight_bytes(weights_dtype, p.tp, pp=p.pp, ep=p.ep, attn_dp=p.attn_dp)
        token_bytes = model.stage_kv_bytes_per_token(kv_dtype, p.tp, p.pp, frees_windows=frees_windows)
        windows = model.stage_window_bytes(kv_dtype, p.tp, p.pp) if frees_windows else [0] * p.pp
        stages = [
            KVCapacity(
                memory_bytes=p.device.memory_bytes,
                gpu_memory_utilization=share,
                weight_bytes=stage_weights,
                activation_bytes=activation_bytes(model, p, max_num_batched_tokens, max_num_seqs),
                overhead_bytes=self.overhead_bytes + max_num_seqs * window_bytes,
                block_bytes=size * (kv_bytes or round(ACTIVATION_BYTES * model.hidden_size)),
                block_size=size,
                is_of_free=self.utilization_of_free,
            )
            for stage_weights, kv_bytes, window_bytes in zip(weights, token_bytes, windows, strict=True)
        ]
        return min(stages, key=lambda stage: (stage.num_blocks, -stage.missing_bytes))

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any]) -> EngineProfile:
        """A profile from a catalogue file or a user's YAML; keys are the fields, quantities may carry units.

        ScenarioError lists every key that is unknown, missing or out of range.
        """
        kinds = {f.name: f.type for f in fields(cls)}
        reader = MappingReader(data, set(kinds), required=("name",))
        values: dict[str, Any] = {}
        for key in data.keys() & kinds.keys():
            if kinds[key] in ("int", "float"):
                values[key] = reader.quantity(key)
            elif kinds[key] == "bool":
                values[key] = data[key]
                if not isinstance(data[key], bool):
                    reader.problem(key, f"must be true or false, not {data[key]!r}")
            else:
                values[key] = data[key] if isinstance(data[key], Mapping) else str(data[key] or "")
        if isinstance(data.get("tables_version"), int | float):
            reader.problem("tables_version", 'is a number: a release is written in quotes, as "0.10"')
        values["small_devices"] = tuple(map(str, data.get("small_devices") or ()))
        for name, factor in dict(values.get("time_factors") or {}).items():
            if name not in OPERATOR_CLASSES:
                reader.problem("time_factors", f"has no {name!r}; known: {', '.join(OPERATOR_CLASSES)}")
            elif "_compute" in name and isinstance(factor, int | float) and factor < 1:
                reader.problem("time_factors", f"has {name}: {factor!r}, where 1 or more would do")
            elif isinstance(factor, bool) or not isinstance(factor, int | float) or not 0.1 <= factor <= 100:
                reader.problem("time_factors", f"has {name}: {factor!r}, where 0.1 to 100 would do")
        if values.get("first_token", "prefill") not in ("prefill", "decode"):
            reader.problem("first_token", f"must be prefill or decode, not {data['first_token']!r}")
        for key in ("max_num_seqs", "max_num_batched_tokens", "block_size"):
            if values.get(key) == 0:
                reader.problem(key, "must be at least 1")
        if not 0 < (values.get("gpu_memory_utilization", 0.9) or 0) <= 1:
            reader.problem("gpu_memory_utilization", "must be above 0 and at most 1")
        reader.finish()
        return cls(**values)


def activation_bytes(model: ModelSpec, platform: Platform, max_num_batched_tokens: int, max_num_seqs: int) -> int:
    """Peak memory of a step's activations on one device: an estimate, not a measurement.

    The larger of a layer at its widest (residual, hidden and the network's inputs and output, 16 bits; of experts, the
    rows of all attention groups that come to a device) and the classifier (a row of 16-bit logits and its 32-bit copy
    for each sequence).
    """
    hidden = model.hidden_size
    widest = max(_widest(g, platform) for g in model.layers)
    layer = max_num_batched_tokens * (2 * hidden + widest) * ACTIVATION_BYTES
    classifier = max_num_seqs * model.vocab_size * (ACTIVATION_BYTES + 4) + max_num_batched_tokens * 2 * hidden
    return round(max(layer, classifier if model.has_classifier else 0))


def _widest(g: LayerGroup, platform: Platform) -> float:
    """Elements that a token occupies in the network of a layer."""
    dense = (g.num_up_matrices + 1) * (g.ffn_size or (g.experts.shared_ffn_size if g.experts else 0)) // platform.tp
    if g.experts is None:
        return dense
    rows = g.experts.top_k * platform.attn_dp / platform.ep
    ffn = g.experts.ffn_size * platform.ep / platform.num_stage_devices
    return max(dense, rows * ((g.num_up_matrices + 1) * ffn + g.hidden_size))
