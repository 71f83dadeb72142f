"""The operators of one forward pass and their FLOP and bytes, shared by every performance model and explanation.

A performance model asks for the list once per deployment; each operator's work is linear in a few sums over a step
(`StepSums`), but for the experts that its tokens touch. It knows no efficiencies and no times.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from mist.model import ACTIVATION_BYTES, Experts, LayerGroup, dtype_bytes
from mist.perf import Deployment
from mist.request import Step

#: Activations, and attention whatever the dtype of the KV cache, are computed in 16 bits.
ACTIVATION_DTYPE = "bf16"

#: Kinds of operators that move data between devices.
NETWORK_KINDS = ("allreduce", "allgather", "alltoall", "message")


@dataclass(frozen=True, slots=True)
class StepSums:
    """What a step's work depends on.

    `tokens` pass the dense layers, `sampled` rows the classifier, `shared_tokens` per attention group what the groups
    share; `decodes` sequences attend to `decode_context`
    tokens in all; `prefill_tokens` c over contexts s give `prefill_context` Σ(s + c) and `prefill_area` Σ c·(s + c/2).
    `chunks` are the (c, s) behind these sums, where they are known.
    """

    tokens: float = 0.0
    shared_tokens: float = 0.0
    sampled: float = 0.0
    decodes: float = 0.0
    decode_context: float = 0.0
    prefill_tokens: float = 0.0
    prefill_context: float = 0.0
    prefill_area: float = 0.0
    chunks: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, step: Step) -> StepSums:
        """The sums of `step`."""
        return cls(
            tokens=step.num_tokens,
            shared_tokens=step.shared_tokens or step.num_tokens,
            sampled=step.num_sampled,
            decodes=step.num_decodes,
            decode_context=step.decode_context,
            prefill_tokens=step.num_prefill_tokens,
            prefill_context=sum(s + c for c, s in step.chunks),
            prefill_area=sum(c * (s + c / 2) for c, s in step.chunks),
            chunks=tuple(step.chunks),
        )

    def windowed(self, window: int) -> StepSums:
        """The sums over tokens within `window` of each query; 0 means all.

        Exact for known `chunks`. Decodes count as if all had the mean context, which is an upper bound, and so do
        prefills without `chunks`.
        """
        if not window:
            return self
        if self.chunks:
            context: float = sum(min(s, window) + c for c, s in self.chunks)
            area = sum(windowed_area(c, s, window) for c, s in self.chunks)
        else:
            context = min(self.prefill_context, (window + 1) * self.prefill_tokens)
            area = min(self.prefill_area, window * self.prefill_tokens)
        return replace(
            self,
            decode_context=min(self.decode_context, window * self.decodes),
            prefill_context=context,
            prefill_area=area,
        )


def windowed_area(c: int, s: int, window: int) -> float:
    """∫ min(x, W) dx from s to s + c: (query, key) pairs of a chunk of c over s; c·(s + c/2) inside the window."""
    ramp = min(max(window - s, 0), c)
    return ramp * (s + ramp / 2) + (c - ramp) * window


@dataclass(frozen=True, slots=True)
class Operator:
    """One kernel of the pass on one device, launched `repeats` times in a step in which its `driver` isn't zero.

    `flop` and `bytes`: per launch, FLOP and bytes for each unit of the named sums of `StepSums`, taken over `window`;
    `weight_bytes` are read once per launch, with `experts` by the share that the tokens of `groups` attention groups
    touch. `kv_bytes` is the part of `bytes` that is the KV cache. `shape`: (n, k) of a GEMM with m = `driver` rows, of
    a grouped GEMM that of one expert; (heads, KV heads, head size) of attention; of `NETWORK_KINDS`, whose `bytes` are
    messages, (row bytes, ranks), and (row bytes, 1 if between domains) of a message.
    """

    name: str
    kind: str
    dtype: str
    repeats: int
    driver: str
    shape: tuple[int, ...]
    flop: Mapping[str, float] = field(default_factory=dict)
    bytes: Mapping[str, float] = field(default_factory=dict)
    kv_bytes: Mapping[str, float] = field(default_factory=dict)
    weight_bytes: float = 0.0
    window: int = 0
    experts: Experts | None = None
    groups: int = 1

    def runs(self, sums: StepSums) -> bool:
        """Whether a step with these sums launches it."""
        return bool(getattr(sums, self.driver) > 0)

    def flop_of(self, sums: StepSums) -> float:
        """FLOP of all launches in a step."""
        return self.repeats * _dot(self.flop, sums.windowed(self.window)) if self.runs(sums) else 0.0

    def bytes_of(self, sums: StepSums) -> float:
        """Bytes to and from memory of all launches in a step; of a collective, the tensors that it moves."""
        return self._weights_and(self.bytes, sums)

    def compulsory_bytes_of(self, sums: StepSums) -> float:
        """The part of `bytes_of` that no cache can save: weights and KV, each once per step."""
        return self._weights_and(self.kv_bytes, sums)

    def weight_bytes_of(self, sums: StepSums) -> float:
        """Weights that one launch reads in a step: all, or those of the experts touched in expectation."""
        if self.experts is None:
            return self.weight_bytes
        return self.weight_bytes * self.experts.touched_share(self.groups * float(getattr(sums, self.driver)))

    def _weights_and(self, coefficients: Mapping[str, float], sums: StepSums) -> float:
        if not self.runs(sums):
            return 0.0
        return self.repeats * (self.weight_bytes_of(sums) + _dot(coefficients, sums.windowed(self.window)))


class Launches:
    """How many kernels of `operators` a step launches: by which of its sums are there at all."""

    __slots__ = ("_counts", "_operators")

    def __init__(self, operators: Sequence[Operator]) -> None:
        self._operators = operators
        self._counts: dict[tuple[bool, bool, bool], int] = {}

    def of(self, step: Step) -> int:
        """All launches of `step`, the repeats of its layers included."""
        there = step.num_decodes > 0, step.num_prefill_tokens > 0, step.num_sampled > 0
        count = self._counts.get(there)
        if count is None:
            sums = StepSums.of(step)
            count = self._counts[there] = sum(o.repeats for o in self._operators if o.runs(sums))
        return count


def forward_pass(deployment: Deployment, expert_imbalance: float = 1.0) -> list[Operator]:
    """The operators of one forward pass on one rank, in order, equal ones of all layers folded into `repeats`.

    Pipeline stages follow each other, so that the list is that of the whole model with a message between two stages.
    `expert_imbalance`: rows of the busiest rank over the mean, where experts are spread over ranks.
    """
    model, platform = deployment.model, deployment.platform
    hidden, a = model.hidden_size, ACTIVATION_BYTES
    row = int(a * hidden)
    found = [Operator("embedding", "elementwise", ACTIVATION_DTYPE, 1, "tokens", (hidden,), bytes={"tokens": 2 * row})]
    for group in model.merged_layers():
        found += _layer(group, deployment, expert_imbalance)
    if platform.tp > 1:
        # one more than the layers': the rows of an embedding that is split by vocabulary are added up
        repeats = 1 + sum(g.num_layers * g.num_all_reduces for g in model.layers)
        found.append(_network("all_reduce", "allreduce", repeats, row, platform.tp))
    for boundary in range(platform.pp - 1):
        found.append(_network("stage_message", "message", 1, row, int(platform.crosses_domains(boundary))))
    vocab = -(-model.vocab_size // platform.tp)
    if model.has_classifier:
        found.append(_gemm("lm_head", 1, vocab, hidden, ACTIVATION_DTYPE, a, "sampled"))
        if platform.tp > 1:
            logits = int(a * vocab * platform.tp)
            found.append(_network("logits_gather", "allgather", 1, logits, platform.tp, "sampled"))
    elif model.is_encoder:
        found.append(_gemm("pooler", 1, hidden, hidden, ACTIVATION_DTYPE, a, "sampled"))
    q = deployment.tokens_per_decode
    return list(_folded(_of_queries(o, q) if o.driver == "decodes" else o for o in found))


def _of_queries(o: Operator, q: int) -> Operator:
    """An operator of decodes with `q` queries each, in causal order: a context is read once for all of them.

    Their FLOP are those of q queries of the last one's context, q(q - 1)/2 pairs a sequence too many.
    """
    rows = {driver: n if driver == "decode_context" else q * n for driver, n in o.bytes.items()}
    return replace(o, flop={driver: q * n for driver, n in o.flop.items()}, bytes=rows)


def _layer(g: LayerGroup, deployment: Deployment, expert_imbalance: float) -> Iterator[Operator]:
    """A layer on one rank: attention and dense networks are split over tp, experts over the whole stage."""
    tp, n, h = deployment.platform.tp, g.num_layers, g.hidden_size
    dtype, weight = _matrix_dtype(deployment)
    if g.num_heads:
        yield from (_latent_attention if g.latent else _attention)(g, deployment)
    if g.num_linear:
        yield _gemm("linear", g.num_linear * n, h, h // tp, dtype, weight)
    if g.ffn_size:
        yield from _network_of("", g, g.ffn_size // tp, dtype, weight)
    if g.experts:
        yield from _mixture(g, g.experts, deployment, expert_imbalance)
        if g.experts.shared_ffn_size:
            yield from _network_of("shared_", g, g.experts.shared_ffn_size // tp, dtype, weight)
    yield _elementwise("norms", g.num_norms * n, 4 * ACTIVATION_BYTES * h)


def _attention(g: LayerGroup, deployment: Deployment) -> Iterator[Operator]:
    """Multi-head or grouped-query attention with its projections, rotary embedding (with the QK norm), cache write."""
    tp, n, a = deployment.platform.tp, g.num_layers, ACTIVATION_BYTES
    dtype, weight = _matrix_dtype(deployment)
    heads, kv_heads, size = g.num_heads // tp, g.kv_heads_per_device(tp), g.head_size
    kv = g.kv_elements(tp) * dtype_bytes(deployment.kv_dtype)
    yield _gemm("qkv", n, g.qkv_size(tp), g.hidden_size, dtype, weight)
    if g.rotary or g.qk_norm:
        yield _elementwise("rotary", n, 2 * a * (heads + kv_heads) * size * (2 if g.qk_norm else 1))
    if deployment.model.is_encoder:
        yield _encoder_attention(g, heads, kv_heads)
    else:
        yield _elementwise("kv_write", n, a * g.kv_elements(tp) + kv)
        yield from _causal_attention(g, (heads, kv_heads, size), 4.0 * heads * size, 4.0 * heads * size, kv, kv)
    yield _gemm("o_proj", n, g.hidden_size, heads * size, dtype, weight)


def _encoder_attention(g: LayerGroup, heads: int, kv_heads: int) -> Operator:
    """Every token of c attends to all c: 4·c²·H·d FLOP, twice those of causal attention; no cache."""
    return Operator(
        "attention_encoder", "attention_encoder", ACTIVATION_DTYPE, g.num_layers, "prefill_tokens",
        (heads, kv_heads, g.head_size),
        flop={"prefill_area": 8.0 * heads * g.head_size},
        bytes={"prefill_tokens": 2 * (heads + kv_heads) * g.head_size * ACTIVATION_BYTES},
    )  # fmt: skip


def _causal_attention(
    g: LayerGroup, shape: tuple[int, int, int], prefill_flop: float, decode_flop: float, prefill_kv: float, kv: float
) -> Iterator[Operator]:
    """Prefill of c tokens over s cached ones, `prefill_flop`·c·(s + c/2), and one query per sequence.

    With heads of one size 4·c·(s + c/2)·H·d FLOP, and 4·s·H·d FLOP and 2·s·G·d·b bytes of KV per decode. Reads Q, all
    K and V, writes O.
    """
    heads, _, size = shape
    rows = 2 * heads * size * ACTIVATION_BYTES
    window, local = g.attended_window, "local_" if g.attended_window else ""
    cached = {} if g.latent else {"prefill_context": prefill_kv}
    yield Operator(
        f"{local}attention_prefill", "attention_prefill", ACTIVATION_DTYPE, g.num_layers, "prefill_tokens", shape,
        flop={"prefill_area": prefill_flop}, bytes={"prefill_context": prefill_kv, "prefill_tokens": rows},
        kv_bytes=cached, window=window,
    )  # fmt: skip
    if g.latent:
        rows = heads * (g.latent.cache_size + g.latent.kv_lora_rank) * ACTIVATION_BYTES
        shape = (heads, 1, g.latent.cache_size)
    yield Operator(
        f"{local}attention_decode", "attention_decode", ACTIVATION_DTYPE, g.num_layers, "decodes", shape,
        flop={"decode_context": decode_flop}, bytes={"decode_context": kv, "decodes": rows},
        kv_bytes={"decode_context": kv}, window=window,
    )  # fmt: skip


def _latent_attention(g: LayerGroup, deployment: Deployment) -> Iterator[Operator]:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1 and appendix C).

    Down projections are copied on every rank. A prefill expands the cached vectors of its whole context to keys and
    values of every head; a decode multiplies its queries by the keys' expansion instead and attends to the cached
    vectors themselves (2·H·(576 + 512) FLOP a token of context), then expands its output.
    """
    m = g.latent
    assert m is not None
    tp, n, a = deployment.platform.tp, g.num_layers, ACTIVATION_BYTES
    dtype, weight = _matrix_dtype(deployment)
    heads, kv_bytes = g.num_heads // tp, m.cache_size * dtype_bytes(deployment.kv_dtype)
    expanded = heads * (m.qk_nope_size + m.v_size)
    yield _gemm("qkv_down", n, m.q_lora_rank + m.cache_size, g.hidden_size, dtype, weight)
    yield _gemm("q_up", n, heads * m.qk_size, m.q_lora_rank or g.hidden_size, dtype, weight)
    yield _elementwise("rotary", n, 2 * a * (m.q_lora_rank + m.cache_size + heads * m.rope_size))
    yield _elementwise("kv_write", n, a * m.cache_size + kv_bytes)
    yield replace(
        _gemm("kv_up", n, expanded, m.kv_lora_rank, dtype, weight, "prefill_context"),
        bytes={"prefill_context": kv_bytes + a * expanded}, kv_bytes={"prefill_context": kv_bytes},
    )  # fmt: skip
    for name, size in (("q_absorb", m.qk_nope_size), ("v_up", m.v_size)):
        rows = {"decodes": a * heads * (size + m.kv_lora_rank)}
        gemm = _gemm(name, n, heads * size, m.kv_lora_rank, ACTIVATION_DTYPE, a, "decodes")
        yield replace(gemm, bytes=rows)
    yield from _causal_attention(
        g, (heads, heads, m.qk_size),
        prefill_flop=2.0 * heads * (m.qk_size + m.v_size),
        decode_flop=2.0 * heads * (m.cache_size + m.kv_lora_rank),
        prefill_kv=a * heads * (m.qk_size + m.v_size), kv=kv_bytes,
    )  # fmt: skip
    yield _gemm("o_proj", n, g.hidden_size, heads * m.v_size, dtype, weight)


def _network_of(prefix: str, g: LayerGroup, ffn: int, dtype: str, weight: float) -> Iterator[Operator]:
    """A feed-forward network of `ffn` on this rank: gate and up, activation, down."""
    up, n = g.num_up_matrices * ffn, g.num_layers
    yield _gemm(f"{prefix}gate_up", n, up, g.hidden_size, dtype, weight)
    yield _elementwise(f"{prefix}activation", n, ACTIVATION_BYTES * (up + ffn))
    yield _gemm(f"{prefix}down", n, g.hidden_size, ffn, dtype, weight)


def _mixture(g: LayerGroup, experts: Experts, deployment: Deployment, expert_imbalance: float) -> Iterator[Operator]:
    """Router, choice of k, grouped GEMMs over the experts of this rank, weighted sum.

    Each token costs k networks. `ep` ranks (times what splits each expert) share the tokens of all attention groups, so
    that a rank has k·attn_dp/ep rows per token of a group, in the mean over the groups. Without attention groups every
    rank has all tokens, and the layer's all-reduce adds up what the experts return; with them tokens travel.
    """
    platform, n, h, a = deployment.platform, g.num_layers, g.hidden_size, ACTIVATION_BYTES
    dtype, weight = _matrix_dtype(deployment, routed=True)
    ffn = experts.ffn_size * platform.ep // platform.num_stage_devices
    local = -(-experts.num_experts // platform.ep)
    rows = experts.top_k * platform.attn_dp / platform.ep * (expert_imbalance if platform.ep > 1 else 1.0)
    up = g.num_up_matrices * ffn
    tokens = "shared_tokens" if platform.attn_dp > 1 else "tokens"
    yield _gemm("router", n, experts.num_experts, h, ACTIVATION_DTYPE, a)
    yield _elementwise("top_k", n, 2 * a * experts.num_experts)
    if platform.attn_dp > 1:
        yield from _dispatch(g, experts, deployment, dtype)
    for name, width, depth in (("experts_gate_up", up, h), ("experts_down", h, ffn)):
        yield Operator(
            name, "grouped_gemm", dtype, n, tokens, (width, depth),
            flop={tokens: 2.0 * rows * width * depth},
            bytes={tokens: rows * _gemm_row_bytes(width, depth, dtype)},
            weight_bytes=weight * local * width * depth, experts=experts, groups=platform.attn_dp,
        )  # fmt: skip
    yield _elementwise("experts_activation", n, a * rows * (up + ffn), tokens)
    yield _elementwise("experts_sum", n, a * h * (rows + 1), tokens)


def _dispatch(g: LayerGroup, experts: Experts, deployment: Deployment, dtype: str) -> Iterator[Operator]:
    """How tokens of other attention groups reach the experts and return, tp ranks of a group sharing its tokens.

    Experts spread over ranks: an all-to-all there (in the GEMM's dtype) and back, with one copy of a token for each of
    the R = ep groups of experts that its k fall into, R(1 - (1 - 1/R)^k) in expectation, on all ranks of the group.
    Experts split like dense layers: an all-gather of the tokens of all groups, and a reduce-scatter. Where a group has
    several ranks, the layer's all-reduce stands for what they exchange afterwards.
    """
    platform, n, h = deployment.platform, g.num_layers, g.hidden_size
    if platform.ep > 1:
        there = min(dtype_bytes(dtype), ACTIVATION_BYTES)
        reached = platform.ep * (1 - (1 - 1 / platform.ep) ** experts.top_k)
        copies = reached * platform.num_stage_devices / platform.ep / platform.tp
        for name, element in (("dispatch", there), ("combine", ACTIVATION_BYTES)):
            row = round(copies * h * element)
            yield _network(name, "alltoall", n, row, platform.num_stage_devices)
    else:
        row = int(platform.attn_dp * h * ACTIVATION_BYTES)
        yield _network("tokens_gather", "allgather", n, row, platform.attn_dp, "shared_tokens")
        yield _network("tokens_scatter", "allgather", n, row, platform.attn_dp, "shared_tokens")


def _matrix_dtype(deployment: Deployment, *, routed: bool = False) -> tuple[str, float]:
    """The dtype in which the matrices are multiplied, and the bytes of a weight."""
    dtype = deployment.model.matrix_dtypes(deployment.weights_dtype)[routed]
    return deployment.platform.device.compute_dtype(dtype), dtype_bytes(dtype)


def _gemm(name: str, repeats: int, n: int, k: int, dtype: str, weight: float, rows: str = "tokens") -> Operator:
    """[rows, k] by [k, n]: 2·rows·n·k FLOP; reads the weights and the input, writes 16-bit outputs."""
    return Operator(
        name, "gemm", dtype, repeats, rows, (n, k),
        flop={rows: 2.0 * n * k}, bytes={rows: _gemm_row_bytes(n, k, dtype)}, weight_bytes=weight * n * k,
    )  # fmt: skip


def _gemm_row_bytes(n: int, k: int, dtype: str) -> float:
    """Bytes of one row's input in `dtype` and output in 16 bits."""
    return k * min(dtype_bytes(dtype), ACTIVATION_BYTES) + n * ACTIVATION_BYTES


def _elementwise(name: str, repeats: int, bytes_per_row: float, driver: str = "tokens") -> Operator:
    return Operator(name, "elementwise", ACTIVATION_DTYPE, repeats, driver, (), bytes={driver: bytes_per_row})


def _network(name: str, kind: str, repeats: int, row: int, ranks: int, driver: str = "tokens") -> Operator:
    return Operator(name, kind, ACTIVATION_DTYPE, repeats, driver, (row, ranks), bytes={driver: row})


def _folded(operators: Iterable[Operator]) -> Iterator[Operator]:
    """Operators that differ in `repeats` alone as one, at the first one's place."""
    kinds: list[Operator] = []
    counts: list[int] = []
    for o in operators:
        if not o.repeats:
            continue
        kind = replace(o, repeats=1)
        if kind in kinds:
            counts[kinds.index(kind)] += o.repeats
        else:
            kinds.append(kind)
            counts.append(o.repeats)
    return (replace(kind, repeats=n) for kind, n in zip(kinds, counts, strict=True))


def _dot(coefficients: Mapping[str, float], sums: StepSums) -> float:
    return sum(value * float(getattr(sums, name)) for name, value in coefficients.items())
