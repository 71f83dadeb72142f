"""The operators of one forward pass and their FLOP and bytes, shared by every performance model and explanation.

A performance model asks for the list once per deployment; each operator's work is linear in seven sums over a step
(`StepSums`), so it can be tabulated or evaluated for many steps at once. It knows no efficiencies and no times.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mist.model import ACTIVATION_BYTES, LayerGroup, dtype_bytes
from mist.perf import Deployment
from mist.request import Step

#: Activations, and attention whatever the dtype of the KV cache, are computed in 16 bits.
ACTIVATION_DTYPE = "bf16"


@dataclass(frozen=True, slots=True)
class StepSums:
    """What a step's work depends on.

    `tokens` pass the dense layers, `sampled` rows the classifier; `decodes` sequences attend to `decode_context`
    tokens in all; `prefill_tokens` c over contexts s give `prefill_context` Σ(s + c) and `prefill_area` Σ c·(s + c/2).
    """

    tokens: float = 0.0
    sampled: float = 0.0
    decodes: float = 0.0
    decode_context: float = 0.0
    prefill_tokens: float = 0.0
    prefill_context: float = 0.0
    prefill_area: float = 0.0

    @classmethod
    def of(cls, step: Step) -> StepSums:
        """The sums of `step`."""
        return cls(
            tokens=step.num_tokens,
            sampled=step.num_sampled,
            decodes=step.num_decodes,
            decode_context=step.decode_context,
            prefill_tokens=step.num_prefill_tokens,
            prefill_context=sum(s + c for c, s in step.chunks),
            prefill_area=sum(c * (s + c / 2) for c, s in step.chunks),
        )


@dataclass(frozen=True, slots=True)
class Operator:
    """One kernel of the pass on one device, launched `repeats` times in a step in which its `driver` isn't zero.

    `flop` and `bytes`: per launch, FLOP and bytes for each unit of the named sums of `StepSums`; `weight_bytes` are
    read once per launch. `kv_bytes` is the part of `bytes` that is the KV cache. `shape`: (n, k) of a GEMM with m =
    `driver` rows; (heads, KV heads, head size) of attention; (row bytes,) of an all-reduce, whose `bytes` are messages.
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

    def runs(self, sums: StepSums) -> bool:
        """Whether a step with these sums launches it."""
        return bool(getattr(sums, self.driver) > 0)

    def flop_of(self, sums: StepSums) -> float:
        """FLOP of all launches in a step."""
        return self.repeats * _dot(self.flop, sums) if self.runs(sums) else 0.0

    def bytes_of(self, sums: StepSums) -> float:
        """Bytes to and from memory of all launches in a step; of an all-reduce, the tensors reduced."""
        return self.repeats * (self.weight_bytes + _dot(self.bytes, sums)) if self.runs(sums) else 0.0

    def compulsory_bytes_of(self, sums: StepSums) -> float:
        """The part of `bytes_of` that no cache can save: weights and KV, each once per step."""
        return self.repeats * (self.weight_bytes + _dot(self.kv_bytes, sums)) if self.runs(sums) else 0.0


def forward_pass(deployment: Deployment) -> list[Operator]:
    """The operators of one forward pass on one of `tp` ranks, in order, layers of a group folded into `repeats`."""
    model, tp = deployment.model, deployment.platform.tp
    hidden, a = model.hidden_size, ACTIVATION_BYTES
    operators = [
        Operator("embedding", "elementwise", ACTIVATION_DTYPE, 1, "tokens", (hidden,), bytes={"tokens": 2 * a * hidden})
    ]
    for group in model.layers:
        operators += _layer(group, deployment)
    if tp > 1:
        row = int(a * hidden)
        repeats = 2 * model.num_layers
        operators.append(
            Operator("all_reduce", "allreduce", ACTIVATION_DTYPE, repeats, "tokens", (row,), bytes={"tokens": row})
        )
    operators.append(_gemm("lm_head", 1, -(-model.vocab_size // tp), hidden, ACTIVATION_DTYPE, a, "sampled"))
    return operators


def _layer(g: LayerGroup, deployment: Deployment) -> list[Operator]:
    tp = deployment.platform.tp
    dtype = deployment.platform.device.compute_dtype(deployment.weights_dtype)
    weight = dtype_bytes(deployment.weights_dtype)
    heads, ffn, n = g.num_heads // tp, g.ffn_size // tp, g.num_layers
    up = g.num_up_matrices * ffn
    return [
        _gemm("qkv", n, g.qkv_size(tp), g.hidden_size, dtype, weight),
        _prefill_attention(g, deployment),
        _decode_attention(g, deployment),
        _gemm("o_proj", n, g.hidden_size, heads * g.head_size, dtype, weight),
        _gemm("gate_up", n, up, g.hidden_size, dtype, weight),
        _gemm("down", n, g.hidden_size, ffn, dtype, weight),
        *_elementwise(g, deployment, up, ffn),
    ]


def _gemm(name: str, repeats: int, n: int, k: int, dtype: str, weight: float, rows: str = "tokens") -> Operator:
    """[rows, k] by [k, n]: 2·rows·n·k FLOP; reads the weights and the input (in `dtype`), writes 16-bit outputs."""
    return Operator(
        name, "gemm", dtype, repeats, rows, (n, k),
        flop={rows: 2.0 * n * k},
        bytes={rows: k * min(dtype_bytes(dtype), ACTIVATION_BYTES) + n * ACTIVATION_BYTES},
        weight_bytes=weight * n * k,
    )  # fmt: skip


def _prefill_attention(g: LayerGroup, deployment: Deployment) -> Operator:
    """Causal attention of c new tokens over s cached ones: 4·c·(s + c/2)·H·d FLOP; reads Q, all K and V, writes O."""
    heads, kv_heads, kv = _attention_heads(g, deployment)
    return Operator(
        "attention_prefill", "attention_prefill", ACTIVATION_DTYPE, g.num_layers, "prefill_tokens",
        (heads, kv_heads, g.head_size),
        flop={"prefill_area": 4.0 * heads * g.head_size},
        bytes={"prefill_context": kv, "prefill_tokens": 2 * heads * g.head_size * ACTIVATION_BYTES},
        kv_bytes={"prefill_context": kv},
    )  # fmt: skip


def _decode_attention(g: LayerGroup, deployment: Deployment) -> Operator:
    """One query token per sequence: 4·s·H·d FLOP and 2·s·G·d·b bytes of KV, Σ s being `decode_context`."""
    heads, kv_heads, kv = _attention_heads(g, deployment)
    return Operator(
        "attention_decode", "attention_decode", ACTIVATION_DTYPE, g.num_layers, "decodes",
        (heads, kv_heads, g.head_size),
        flop={"decode_context": 4.0 * heads * g.head_size},
        bytes={"decode_context": kv, "decodes": 2 * heads * g.head_size * ACTIVATION_BYTES},
        kv_bytes={"decode_context": kv},
    )  # fmt: skip


def _elementwise(g: LayerGroup, deployment: Deployment, up: int, ffn: int) -> list[Operator]:
    """Two norms fused with their residual sums, rotary embedding (with the QK norm), cache write, activation."""
    heads, kv_heads, kv = _attention_heads(g, deployment)
    a = ACTIVATION_BYTES
    kv_elements = 2 * kv_heads * g.head_size
    rows = {
        "norms": (2, 4 * a * g.hidden_size),
        "rotary": (1, 2 * a * (heads + kv_heads) * g.head_size * (2 if g.qk_norm else 1)),
        "kv_write": (1, a * kv_elements + kv),
        "activation": (1, a * (up + ffn)),
    }
    return [
        Operator(name, "elementwise", ACTIVATION_DTYPE, count * g.num_layers, "tokens", (), bytes={"tokens": per_token})
        for name, (count, per_token) in rows.items()
    ]


def _attention_heads(g: LayerGroup, deployment: Deployment) -> tuple[int, int, float]:
    """Query heads and KV heads of one rank, and its bytes of K and V per token of context and layer."""
    tp = deployment.platform.tp
    kv_heads = g.kv_heads_per_device(tp)
    return g.num_heads // tp, kv_heads, 2 * kv_heads * g.head_size * dtype_bytes(deployment.kv_dtype)


def _dot(coefficients: Mapping[str, float], sums: StepSums) -> float:
    return sum(value * float(getattr(sums, name)) for name, value in coefficients.items())
