"""Layers of a transformer: attention (grouped-query, latent, windowed or none) and a feed-forward network or experts.

`ModelSpec` sums these over a model, and the operator decomposition reads the shapes. Nothing here knows of bytes, of
devices or of time: it counts elements.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt

#: one number, or an array of them
Numbers = TypeVar("Numbers", float, npt.NDArray[np.float64])


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): one small vector cached per token.

    Queries go down to `q_lora_rank` (0: straight from the hidden state) and up to heads of `qk_nope_size + rope_size`;
    keys and values go down to `kv_lora_rank`, cached with a rotated key of `rope_size` that all heads share.
    """

    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_size: int
    rope_size: int
    v_size: int

    @property
    def cache_size(self) -> int:
        """Elements cached per token and layer."""
        return self.kv_lora_rank + self.rope_size

    @property
    def qk_size(self) -> int:
        """Size of one head's query, and of its key once it is expanded."""
        return self.qk_nope_size + self.rope_size


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture: each token takes `top_k` of `num_experts` networks of `ffn_size`, and one of `shared_ffn_size`.

    `bias`: router and experts have biases.
    """

    num_experts: int
    top_k: int
    ffn_size: int
    shared_ffn_size: int = 0
    bias: bool = False

    def touched_share(self, tokens: Numbers) -> Numbers:
        """Share of the experts that `tokens` tokens reach in expectation, routed evenly: 1 - (1 - k/E)^T."""
        share: Numbers = 1 - (1 - self.top_k / self.num_experts) ** tokens
        return share


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """`num_layers` equal layers.

    Attention: none if `num_heads` is 0, `latent` in place of grouped-query attention. `window`: tokens that one attends
    to at most (0: all), within fixed chunks of that size if `chunked`. `qk_norm`: a norm on queries and keys.
    Feed-forward: dense of `ffn_size` (0: none) or `experts`; `gated_ffn`: three matrices (gate, up, down), not two.
    `num_linear` square matrices stand in for attention or network where a layer was pruned to them. `parallel`:
    attention and network read the same input and share one all-reduce. `rotary`: positions rotate queries and keys.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    ffn_size: int
    gated_ffn: bool = True
    qkv_bias: bool = False
    output_bias: bool = False
    ffn_bias: bool = False
    qk_norm: bool = False
    latent: LatentAttention | None = None
    experts: Experts | None = None
    window: int = 0
    chunked: bool = False
    num_linear: int = 0
    num_norms: int = 2
    norm_bias: bool = False
    parallel: bool = False
    rotary: bool = True

    def repeated(self, num_layers: int) -> LayerGroup:
        """`num_layers` layers of this kind."""
        return replace(self, num_layers=num_layers)

    @property
    def attended_window(self) -> int:
        """The window that a token uses once its context exceeds it: of chunks, half on average. 0: all."""
        return self.window // 2 if self.chunked else self.window

    @property
    def num_up_matrices(self) -> int:
        """Matrices that read the FFN's input: gate and up, or up alone."""
        return 2 if self.gated_ffn else 1

    @property
    def num_all_reduces(self) -> int:
        """All-reduces of a layer in tensor parallelism: behind attention, network and each linear replacement."""
        has_ffn = self.ffn_size > 0 or self.experts is not None
        blocks = (self.num_heads > 0) + has_ffn
        return self.num_linear + (min(1, blocks) if self.parallel else blocks)

    def kv_heads_per_device(self, tp: int) -> int:
        """KV heads that one of `tp` ranks holds; beyond one head per rank they are replicated."""
        return max(1, self.num_kv_heads // tp)

    def kv_elements(self, tp: int = 1) -> int:
        """Elements cached per token and layer on one of `tp` ranks; latent attention caches the same on every rank."""
        if not self.num_heads:
            return 0
        return self.latent.cache_size if self.latent else 2 * self.kv_heads_per_device(tp) * self.head_size

    def qkv_size(self, tp: int = 1) -> int:
        """Output width of the fused QKV projection on one of `tp` ranks."""
        if not self.num_heads:
            return 0
        return (self.num_heads // tp + 2 * self.kv_heads_per_device(tp)) * self.head_size

    def num_attention_parameters(self, tp: int = 1) -> int:
        """Elements of one layer's attention matrices on one of `tp` ranks."""
        heads, hidden, m = self.num_heads // tp, self.hidden_size, self.latent
        if not self.num_heads:
            return 0
        if m is None:
            return hidden * (self.qkv_size(tp) + heads * self.head_size)
        down = hidden * (m.q_lora_rank + m.cache_size)
        up = (m.q_lora_rank or hidden) * heads * m.qk_size + m.kv_lora_rank * heads * (m.qk_nope_size + m.v_size)
        return down + up + heads * m.v_size * hidden

    def num_dense_parameters(self, tp: int = 1) -> int:
        """Elements on one of `tp` ranks of the networks that every token passes: dense, shared experts, replacements.

        Linear replacements are split over the ranks by their input.
        """
        shared = self.experts.shared_ffn_size if self.experts else 0
        ffn = (self.num_up_matrices + 1) * self.hidden_size * (self.ffn_size + shared) // tp
        return ffn + self.num_linear * self.hidden_size**2 // tp

    def num_expert_parameters(self) -> int:
        """Elements of one routed expert; 0 in a layer without."""
        if self.experts is None:
            return 0
        return (self.num_up_matrices + 1) * self.hidden_size * self.experts.ffn_size

    def num_router_parameters(self) -> int:
        """Elements of the router, which every rank holds in 16 bits."""
        return self.hidden_size * self.experts.num_experts if self.experts else 0

    def num_matrix_parameters(self, tp: int = 1) -> int:
        """Elements of one layer's matrices on one of `tp` ranks, experts split like dense layers; router aside."""
        experts = self.experts.num_experts * self.num_expert_parameters() // tp if self.experts else 0
        return self.num_attention_parameters(tp) + self.num_dense_parameters(tp) + experts

    def num_vector_parameters(self) -> int:
        """Elements of one layer's norms and biases; small, so counted as held by every rank."""
        vectors = self.num_norms * self.hidden_size * (1 + self.norm_bias)
        if self.num_heads:
            vectors += 2 * self.head_size * self.qk_norm + self.qkv_size() * self.qkv_bias
            vectors += self.hidden_size * self.output_bias
        if self.latent:
            vectors += self.latent.q_lora_rank + self.latent.kv_lora_rank
        vectors += (self.num_up_matrices * self.ffn_size + self.hidden_size) * self.ffn_bias
        if self.experts and self.experts.bias:
            per_expert = self.num_up_matrices * self.experts.ffn_size + self.hidden_size + 1
            vectors += self.experts.num_experts * per_expert
        return vectors
